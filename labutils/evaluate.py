"""What a change has cost: exact answers, cross-entropy, and distance from a reference.

Three measures, from blunt to sharp. *Accuracy* counts answers that are exactly right: it is what
a user notices, and it stays at 100% long after damage has begun. *Cross-entropy* is the mean
surprise at the right token, -log p(token), in nats; its exponential is the *perplexity*, the
number of equally likely tokens among which the model seems to choose. It can stay still while
some tokens get better and others worse. *KL divergence* compares the whole distribution over the
next token with that of the undisturbed model and is 0 only if nothing changed.

All three take any causal language model of transformers. Without a generator or texts of your
own the same held-out examples and pages are used each time, so that two models can be compared.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from scipy import stats

from labutils import languages
from labutils.flips import divergence


@dataclass(frozen=True)
class CrossEntropy:
    """The mean surprise at a token, in nats, and the number of tokens it is the mean of."""

    nats_per_token: float
    tokens: int

    @property
    def perplexity(self) -> float:
        return math.exp(self.nats_per_token)


def task_accuracy(
    model,
    tokenizer,
    examples_per_language: int = 100,
    generator: torch.Generator | None = None,
) -> pd.DataFrame:
    """The share of held-out prompts answered exactly right, one row for each language.

    Columns: `examples` (at most `examples_per_language`; the 80 capitals are all there are),
    `correct`, `accuracy` between 0 and 1. An answer is the greedy continuation up to the
    newline, and must agree in every character.
    """
    generator = generator or torch.Generator().manual_seed(0)
    scores = languages.score(model, tokenizer, examples_per_language, generator)
    return pd.DataFrame(
        {
            "examples": [score.examples for score in scores.values()],
            "correct": [score.correct for score in scores.values()],
            "accuracy": [score.accuracy for score in scores.values()],
        },
        index=pd.Index(scores, name="language"),
    )


@torch.no_grad()
def right_answers(
    model, tokenizer, examples: Sequence[languages.Example], examples_per_batch: int = 16
) -> list[bool]:
    """For each example, whether the greedy answer is right to the last character.

    Found without generating: an answer is given exactly if each of its tokens, and the newline that
    ends it, is the likeliest after the prompt and the tokens before it. So one forward pass over
    prompts with their right answers does, some twenty times faster. Examples of about the same
    length should stand together: a batch is as wide as its longest.

    The tokens of a prompt must be the first tokens of the line, as with one token a character.
    """
    right = []
    for start in range(0, len(examples), examples_per_batch):
        batch = examples[start : start + examples_per_batch]
        prompts = [len(tokenizer(example.prompt)["input_ids"]) for example in batch]
        lines = [tokenizer(example.line)["input_ids"] for example in batch]
        token_ids = _padded(lines).to(model.device)
        likeliest = model(input_ids=token_ids).logits.argmax(dim=-1)
        same = likeliest[:, :-1] == token_ids[:, 1:]
        right += [
            bool(row[prompt - 1 : len(ids) - 1].all())
            for row, prompt, ids in zip(same, prompts, lines, strict=True)
        ]
    return right


@torch.no_grad()
def cross_entropy(
    model, tokenizer, texts: Sequence[str] | None = None, texts_per_batch: int = 16
) -> CrossEntropy:
    """The mean of -log p(token | tokens before it) over `texts`, by default 64 held-out pages.

    Texts of different lengths are padded on the right, where causal attention never looks; the
    padding is neither counted nor scored. The first token of a text has nothing before it and is
    not scored either. The mean is over tokens, not over texts: a long text counts for more.

    A model that gives each of 64 tokens the same probability scores log 64 = 4.159 nats, a
    perplexity of 64.

    Raises ValueError if no token can be scored.
    """
    if texts is None:
        texts = languages.pages(64, torch.Generator().manual_seed(0), held_out=True)
    nats, tokens = 0.0, 0
    for start in range(0, len(texts), texts_per_batch):
        rows = [tokenizer(text)["input_ids"] for text in texts[start : start + texts_per_batch]]
        token_ids = _padded(rows)
        visible = _padded([[1] * len(ids) for ids in rows])
        targets = token_ids.masked_fill(visible == 0, -100)[:, 1:].to(model.device)
        logits = model(
            input_ids=token_ids.to(model.device), attention_mask=visible.to(model.device)
        ).logits[:, :-1]
        nats += F.cross_entropy(
            logits.float().transpose(1, 2), targets, ignore_index=-100, reduction="sum"
        ).item()
        tokens += int((targets != -100).sum())
    if tokens == 0:
        raise ValueError(
            f"{len(texts)} texts hold 0 tokens that follow another, at least 1 is needed; "
            "pass longer texts."
        )
    return CrossEntropy(nats / tokens, tokens)


def _padded(rows: Sequence[list[int]]) -> torch.Tensor:
    """Rows of different lengths as one tensor, filled up with zeros on the right."""
    width = max(map(len, rows))
    return torch.tensor([row + [0] * (width - len(row)) for row in rows])


def kl(reference_logits: torch.Tensor, logits: torch.Tensor) -> float:
    """How far the next-token distributions moved: the mean of `kl_by_token`, in nats."""
    return kl_by_token(reference_logits, logits).mean().item()


def kl_by_token(reference_logits: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """How far each next-token distribution moved: the sum of p log(p / q), in nats, (...).

    Both (..., vocabulary), from the same tokens; `reference_logits` gives p. It is 0 where
    nothing changed and never negative (Kullback and Leibler 1951). From probabilities (1/2, 1/2)
    to (3/4, 1/4) it is 1/2 log(2/3) + 1/2 log 2 = 0.1438. Computed in float64: in float32 rounding
    alone would give some 1e-7 of either sign.

    Raises ValueError if the shapes differ.
    """
    if reference_logits.shape != logits.shape:
        raise ValueError(
            f"The logits have shape {tuple(logits.shape)} but the reference has "
            f"{tuple(reference_logits.shape)}; compute both on the same tokens."
        )
    return divergence(reference_logits, logits)


def nats_by_token(logits: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    """The surprise at each token but the first, (pages, tokens - 1), in nats.

    `logits` (pages, tokens, vocabulary) is what a model answered to `token_ids` (pages, tokens),
    pages without padding. Their mean is the cross-entropy.
    """
    answers = logits[:, :-1].float().transpose(1, 2)
    return F.cross_entropy(answers, token_ids[:, 1:], reduction="none")


@dataclass(frozen=True)
class Answer:
    """Where an answer stands: its tokens, newline included, are first to last on its page."""

    language: str
    page: int
    first: int
    last: int


@dataclass(frozen=True, eq=False)
class Exam:
    """Pages to be read in one pass, and what on them can be scored.

    `token_ids` (pages, tokens); `languages` (pages, tokens) is the language of the line that each
    token is in, empty in the line that the page cuts off and at the token that begins a text;
    `answers` are those of all whole lines.
    """

    token_ids: torch.Tensor
    languages: np.ndarray
    answers: tuple[Answer, ...]

    def right(self, logits: torch.Tensor) -> np.ndarray:
        """Whether each answer is the likeliest, token by token, given all that stands before it.

        `logits` (pages, tokens, vocabulary) is what a model answered to `token_ids`.

        Raises ValueError for logits of other pages.
        """
        if logits.shape[:2] != self.token_ids.shape:
            raise ValueError(
                f"The logits are of {tuple(logits.shape[:2])} pages and tokens, the exam has "
                f"{tuple(self.token_ids.shape)}."
            )
        wrong = logits[:, :-1].argmax(dim=-1) != self.token_ids[:, 1:]
        before = F.pad(wrong.cumsum(dim=-1), (1, 0))  # wrong tokens among the first so many
        places = [(answer.page, answer.first, answer.last) for answer in self.answers]
        page, first, last = torch.tensor(places, dtype=torch.long).view(-1, 3).T
        return (before[page, last] == before[page, first - 1]).numpy()

    def by_page(self, right: np.ndarray) -> np.ndarray:
        """How many of the answers of each page are right, (pages)."""
        pages = [answer.page for answer in self.answers]
        return np.bincount(pages, weights=right, minlength=len(self.token_ids))


def exam(tokenizer, pages: Sequence[str]) -> Exam:
    """An exam on `pages` of `labutils.languages`.

    Any tokenizer does that says where its tokens stand in the text. If it makes pages of different
    numbers of tokens, all are cut to the shortest; answers that are cut are not scored.

    Raises ValueError if there is no page, or a line that is of none of the languages.
    """
    if not pages or isinstance(pages, str):
        raise ValueError("An exam needs a list of at least one page.")
    read = tokenizer(list(pages), return_offsets_mapping=True)
    tokens = min(map(len, read["input_ids"]))
    names = np.full((len(pages), tokens), "", dtype=object)
    answers = []
    for page, (text, offsets) in enumerate(zip(pages, read["offset_mapping"], strict=True)):
        begins, ends = np.array(offsets).T
        for passage in languages.passages(text):
            within = (begins >= passage.start) & (begins < passage.stop) & (ends > begins)
            names[page, np.flatnonzero(within[:tokens])] = passage.language
            inside = np.flatnonzero((ends > passage.answer) & (begins < passage.stop))
            if inside[-1] < tokens:
                answers.append(Answer(passage.language, page, int(inside[0]), int(inside[-1])))
    token_ids = torch.tensor([ids[:tokens] for ids in read["input_ids"]])
    return Exam(token_ids, names, tuple(answers))


@dataclass(frozen=True)
class Interval:
    """An estimate and the 95% interval around it.

    >>> print(Interval(0.25, 0.2, 0.3))
    0.25 [0.2, 0.3]
    """

    estimate: float
    low: float
    high: float

    def __format__(self, spec: str) -> str:
        return f"{self.estimate:{spec}} [{self.low:{spec}}, {self.high:{spec}}]"

    def __str__(self):
        return format(self, "")


def bootstrap(
    statistic: Callable[..., np.ndarray], *samples, generator: torch.Generator | None = None
) -> Interval:
    """A statistic of means over pages, with its interval: how other pages might have come out.

    Each of `samples` has a row a page, (pages, ...), of the same pages, and is averaged to one
    number a page. `statistic` takes the means of all pages, one argument a sample, and must work on
    arrays of them: `lambda flips: flips`, `lambda before, after: after - before`, `lambda part,
    whole: part / whole`.

    Whole pages are drawn, 2000 times, with replacement, since the tokens of a page have much in
    common and are no independent witnesses; a page keeps its place in all samples, so a difference
    is one of pairs. The interval holds the middle 95% of the draws (Efron 1979, the percentile
    method). Fewer than ten pages make it too narrow.

    Raises ValueError unless all samples have the same number of pages, at least 2.
    """
    rows = [
        np.asarray(sample.double() if isinstance(sample, torch.Tensor) else sample, dtype=float)
        for sample in samples
    ]
    counts = {len(row) for row in rows}
    if len(counts) != 1 or min(counts) < 2:
        raise ValueError(
            f"The samples have {sorted(counts)} pages: give the same pages to all, at least 2."
        )
    rows = [row.reshape(len(row), -1).mean(axis=1) for row in rows]
    found = _resampled(rows, statistic, generator)
    estimate = statistic(*(row.mean() for row in rows))
    return Interval(float(estimate), float(found.low), float(found.high))


def mean_intervals(columns: np.ndarray, generator: torch.Generator | None = None) -> list[Interval]:
    """`bootstrap` of the mean of each of `columns` (pages, columns), all with the same drawn pages.

    Many intervals in hardly more time than one.
    """
    found = _resampled([columns], lambda means: means, generator)
    ends = zip(columns.mean(axis=0), found.low, found.high, strict=True)
    return [Interval(*map(float, each)) for each in ends]


def _resampled(rows: list[np.ndarray], statistic: Callable, generator: torch.Generator | None):
    generator = generator or torch.Generator().manual_seed(0)
    return stats.bootstrap(
        rows,
        lambda *drawn, axis: statistic(*(sample.mean(axis=axis) for sample in drawn)),
        paired=True,
        vectorized=True,
        method="percentile",
        n_resamples=2000,
        rng=np.random.default_rng(int(torch.randint(2**62, (), generator=generator))),
    ).confidence_interval
