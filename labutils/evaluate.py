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
from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd
import torch
import torch.nn.functional as F

from labutils import languages


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
    """How far the next-token distributions moved: the mean of sum p log(p / q), in nats per token.

    Both (..., vocabulary), from the same tokens; `reference_logits` gives p. It is 0 where
    nothing changed and never negative (Kullback and Leibler 1951). From probabilities (1/2, 1/2)
    to (3/4, 1/4) it is 1/2 log(2/3) + 1/2 log 2 = 0.1438.

    Raises ValueError if the shapes differ.
    """
    if reference_logits.shape != logits.shape:
        raise ValueError(
            f"The logits have shape {tuple(logits.shape)} but the reference has "
            f"{tuple(reference_logits.shape)}; compute both on the same tokens."
        )
    reference = reference_logits.float().log_softmax(-1)
    changed = logits.float().log_softmax(-1)
    return F.kl_div(changed, reference, reduction="none", log_target=True).sum(-1).mean().item()
