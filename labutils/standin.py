"""The stand-in: a small Mixtral, trained by this package and shipped in it.

Every notebook needs a Mixture-of-Experts model that has learned something, for only then does
damage show. Mixtral-8x7B is 93 GB; the stand-in is 10 MB and the same architecture: each of its
4 layers has 8 SwiGLU experts of which a router picks 2 for each token, attention shares its keys
and values between pairs of heads, and its file names every expert matrix as Mistral's does. It
reads characters and was trained on the ten languages of `labutils.languages`. Eight of them it
answers almost without error; `code` and `count` it has learned only in part. `scores()` has
the figures.

Training minimizes three sums at once:

1. the cross-entropy of the answers, in nats per token;
2. a fifth of the cross-entropy of the questions. They are mostly random, so there is little to
   learn in them, but the model should still know what a question looks like;
3. the load balancing loss of the Switch Transformer (Fedus et al. 2021, arXiv:2101.03961,
   equations 4 to 6), layer by layer. It is smallest when every expert of a layer is chosen
   equally often. Transformers' own `aux_loss` pools the layers first, so that a layer can be
   lopsided as long as another makes up for it; here each layer is balanced for itself.

Pages have no padding, so no padding is counted in any of the three. Training runs in float32;
the weights are rounded to bfloat16 when saved, and the recorded scores are those of the file.
"""

import dataclasses
import hashlib
import json
import math
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import safetensors.torch
import tokenizers
import torch
import torch.nn.functional as F
import transformers
from tqdm.auto import tqdm
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedTokenizerFast,
)
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from labutils import flips, languages
from labutils.checkpoints import written_whole

PATH = Path(__file__).parent / "data" / "standin"
WEIGHTS = "model.safetensors"
SCORES = "scores.json"
SPECIAL_TOKENS = ("<pad>", "<s>", "<unk>")
CHARACTERS = "\n " + languages.DIGITS + languages.LETTERS + "CDILMVX" + "()[]{}+-=;>,.:*?"
KINDS = {
    "letters": languages.LETTERS,
    "digits": languages.DIGITS,
    "roman numerals": "CDILMVX",
    "brackets": "()[]{}",
    "signs": "+-=;,.:*?",
    "arrow": ">",
    "space": " ",
    "newline": "\n",
}
PAGE_TOKENS = languages.PAGE_CHARACTERS + 1
PAGES_PER_STEP = 16
QUESTION_WEIGHT = 0.2
BALANCE_WEIGHT = 0.02
PEAK_LEARNING_RATE = 3e-3
WARMUP_STEPS = 100
RETRAIN = f"reinstall the package or run `python -m labutils train-standin '{PATH}'`"


@dataclass(frozen=True)
class TrainingRecord:
    """How a training went; `losses` are nats per token of all tokens, one for each step."""

    steps: int
    seed: int
    tokens: int
    seconds: float
    losses: tuple[float, ...]


def tokenizer() -> PreTrainedTokenizerFast:
    """One token for each of 61 characters, after a `<s>`: 64 tokens with the special ones.

    >>> tokenizer()("sum 1+2 > 3")["input_ids"]
    [1, 33, 35, 27, 4, 6, 54, 7, 4, 58, 4, 8]
    """
    vocabulary = {token: index for index, token in enumerate([*SPECIAL_TOKENS, *CHARACTERS])}
    characters = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    characters.pre_tokenizer = tokenizers.pre_tokenizers.Split(
        tokenizers.Regex(r"[\s\S]"), behavior="isolated"
    )
    characters.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", vocabulary["<s>"])]
    )
    characters.decoder = tokenizers.decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=characters,
        bos_token="<s>",
        pad_token="<pad>",
        unk_token="<unk>",
        padding_side="left",
        model_max_length=PAGE_TOKENS,
        clean_up_tokenization_spaces=False,
    )


def config() -> MixtralConfig:
    """The stand-in's shape: 4.9 million parameters, 96% of them in experts.

    >>> config().num_local_experts, config().num_experts_per_tok
    (8, 2)
    """
    tokens = tokenizer()
    return MixtralConfig(
        vocab_size=len(tokens),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_local_experts=8,
        num_experts_per_tok=2,
        router_aux_loss_coef=BALANCE_WEIGHT,
        max_position_embeddings=PAGE_TOKENS,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        tie_word_embeddings=False,
        bos_token_id=tokens.bos_token_id,
        pad_token_id=tokens.pad_token_id,
        eos_token_id=tokens.convert_tokens_to_ids("\n"),
    )


def scores(path: Path | str = PATH) -> dict:
    """What was recorded when the checkpoint was made: its hash, scores, seed and versions."""
    return json.loads((Path(path) / SCORES).read_text())


def verify(path: Path | str = PATH) -> None:
    """Raise unless the weights are, bit for bit, those whose scores are recorded beside them.

    Raises FileNotFoundError for a missing file and ValueError for another SHA-256.
    """
    weights = Path(path) / WEIGHTS
    for file in (weights, weights.with_name(SCORES)):
        if not file.exists():
            raise FileNotFoundError(f"The stand-in's {file} is missing; {RETRAIN}.")
    needed = scores(path)["sha256"]
    seen = _sha256(weights)
    if seen != needed:
        raise ValueError(
            f"{weights} has SHA-256 {seen} but {SCORES} records {needed}, so its scores are not "
            f"the recorded ones; {RETRAIN}."
        )


def widen(folder: Path | str, times: int = 16) -> Path:
    """The same model in many times the bytes, at `folder`: for looking at memory and time.

    Every neuron of every expert is repeated `times` times and its output weights are divided by
    `times`. That changes no answer, in any format: a block of 64 weights is still the same block,
    divided by a power of two. 16 times makes 75.7 million parameters (151 MB in bf16) of 4.9.

    Raises ValueError unless `times` is a power of two, and FileExistsError if there is something at
    `folder` already.
    """
    if times < 1 or times & (times - 1):
        raise ValueError(f"times={times} is no power of two; take 8, 16 or 32.")
    folder = Path(folder)
    tensors = safetensors.torch.load_file(PATH / WEIGHTS)
    for name, tensor in tensors.items():
        if name.endswith((".w1.weight", ".w3.weight")):
            tensors[name] = tensor.repeat(times, 1)
        elif name.endswith(".w2.weight"):
            tensors[name] = tensor.repeat(1, times) / times
    wide = config()
    wide.intermediate_size *= times
    wide.dtype, wide.architectures = "bfloat16", ["MixtralForCausalLM"]
    with written_whole(folder) as unfinished:
        shutil.copytree(PATH, unfinished, ignore=shutil.ignore_patterns(WEIGHTS, SCORES))
        wide.save_pretrained(unfinished)
        safetensors.torch.save_file(tensors, unfinished / WEIGHTS, metadata={"format": "pt"})
    return folder


def expert_use(
    model, tokenizer, pages_per_language: int = 8, generator: torch.Generator | None = None
) -> pd.DataFrame:
    """Which expert serves which language: the share of a layer's choices that each expert gets.

    One row for each (layer, language), one column for each expert; a row adds up to 1, and an
    expert chosen as often as any other has 1 / experts. Counted on held-out pages of one
    language; without a generator they are always the same. `model` is any that `flips.record`
    reads.
    """
    generator = generator or torch.Generator().manual_seed(0)
    shares = {}
    for name in languages.LANGUAGES:
        drawn = languages.pages(pages_per_language, generator, held_out=True, only=name)
        recording = flips.record(model, _token_ids(tokenizer, drawn))
        for layer, routing in enumerate(recording.routings):
            shares[layer, name] = _shares(routing.counts)
    return _use_table(shares, "language")


def expert_use_by_kind(
    model, tokenizer, pages: int = 32, generator: torch.Generator | None = None
) -> pd.DataFrame:
    """Which expert serves which kind of character (`KINDS`), as `expert_use` has it for languages.

    Counted on held-out pages of all languages; without a generator they are always the same.
    """
    generator = generator or torch.Generator().manual_seed(0)
    token_ids = _token_ids(tokenizer, languages.pages(pages, generator, held_out=True))
    characters = tokenizer.convert_ids_to_tokens(token_ids.flatten().tolist())
    shares = {}
    for layer, routing in enumerate(flips.record(model, token_ids).routings):
        for kind, members in KINDS.items():
            of_kind = torch.tensor([character in members for character in characters])
            counts = torch.bincount(routing.chosen[of_kind].flatten(), minlength=routing.experts)
            shares[layer, kind] = _shares(counts)
    return _use_table(shares, "kind")


def train(
    folder: Path | str = PATH, steps: int = 3500, seed: int = 0, progress: bool = True
) -> TrainingRecord:
    """Train a stand-in from nothing, score it, and put the whole checkpoint at `folder`.

    A step reads 16 pages of 256 tokens; all 3500 take about 20 minutes on two processor cores
    that do nothing else. The same seed, versions, processor and number of threads give the same
    losses. Everything is written to a folder beside `folder` and renamed at the end, replacing
    an older stand-in there: an interrupted training leaves the old checkpoint, or none. Raises
    FileExistsError, before training, if anything else stands at `folder`.
    """
    folder = Path(folder)
    if folder.exists() and not (folder / SCORES).is_file():
        raise FileExistsError(f"{folder} exists and is no stand-in; take another name.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    model, record = _fit(steps, seed, progress)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as beside:
        made = Path(beside) / "new"
        _save(model, made)
        _write_scores(made, record)
        if folder.exists():
            folder.rename(Path(beside) / "old")
        made.rename(folder)
    return record


def _fit(steps: int, seed: int, progress: bool) -> tuple[MixtralForCausalLM, TrainingRecord]:
    tokens = tokenizer()
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = MixtralForCausalLM(config())
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=PEAK_LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.1
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: _learning_rate_share(step, steps)
    )
    losses = []
    started = time.perf_counter()
    for _ in (bar := tqdm(range(steps), "training the stand-in", disable=not progress)):
        drawn = languages.pages(PAGES_PER_STEP, generator)
        loss, cross_entropy = _objective(model, _token_ids(tokens, drawn))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(cross_entropy.item())
        bar.set_postfix(nats_per_token=f"{losses[-1]:.3f}", refresh=False)
    seconds = time.perf_counter() - started
    tokens_read = steps * PAGES_PER_STEP * PAGE_TOKENS
    return model, TrainingRecord(steps, seed, tokens_read, seconds, tuple(losses))


def _objective(model, token_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What training minimizes, and the plain cross-entropy in nats per token."""
    output = model(input_ids=token_ids, output_router_logits=True, use_cache=False)
    nats = F.cross_entropy(
        output.logits[:, :-1].float().transpose(1, 2), token_ids[:, 1:], reduction="none"
    )
    weight = torch.where(_in_answer(token_ids), 1.0, QUESTION_WEIGHT)
    balance = torch.stack(
        [
            load_balancing_loss_func(
                (logits,), model.config.num_local_experts, model.config.num_experts_per_tok
            )
            for logits in output.router_logits
        ]
    ).mean()
    return (nats * weight).sum() / weight.sum() + BALANCE_WEIGHT * balance, nats.detach().mean()


def _in_answer(token_ids: torch.Tensor) -> torch.Tensor:
    """Which of the tokens after the first stand between an arrow and the end of its line.

    `token_ids` (pages, tokens) to a mask (pages, tokens - 1).
    """
    arrow, newline = (len(SPECIAL_TOKENS) + CHARACTERS.index(mark) for mark in ">\n")
    position = torch.arange(token_ids.shape[1]).expand_as(token_ids)
    last_arrow, last_newline = (
        torch.where(token_ids == mark, position, -1).cummax(dim=1).values
        for mark in (arrow, newline)
    )
    return (last_arrow > last_newline)[:, :-1]


def _learning_rate_share(step: int, steps: int) -> float:
    """The share of the peak rate: a linear rise, then half a cosine down to a hundredth."""
    if step < WARMUP_STEPS:
        return (step + 1) / WARMUP_STEPS
    done = (step - WARMUP_STEPS) / max(1, steps - WARMUP_STEPS)
    return 0.01 + 0.99 * (1 + math.cos(math.pi * done)) / 2


def _token_ids(tokenizer, drawn: list[str]) -> torch.Tensor:
    return torch.tensor(tokenizer(drawn)["input_ids"])


def _shares(counts: torch.Tensor) -> list[float]:
    return (counts / counts.sum()).tolist()


def _use_table(shares: dict[tuple[int, str], list[float]], of: str) -> pd.DataFrame:
    table = pd.DataFrame.from_dict(shares, orient="index").rename_axis(columns="expert")
    table.index = pd.MultiIndex.from_tuples(table.index, names=["layer", of])
    return table.sort_index(level="layer", sort_remaining=False)


def _save(model: MixtralForCausalLM, folder: Path) -> None:
    model.to(torch.bfloat16)
    model.generation_config = GenerationConfig(
        do_sample=False,
        bos_token_id=model.config.bos_token_id,
        eos_token_id=model.config.eos_token_id,
        pad_token_id=model.config.pad_token_id,
    )
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)


def _write_scores(folder: Path, record: TrainingRecord) -> None:
    """Score the checkpoint as a reader would load it, and record how it was made."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    scored = languages.score(model, tokenizer(), 200, torch.Generator().manual_seed(0))
    pages = languages.pages(64, torch.Generator().manual_seed(0), held_out=True)
    token_ids = _token_ids(tokenizer(), pages)
    with torch.no_grad():
        _, nats_per_token = _objective(model, token_ids)
    counts = [routing.counts for routing in flips.record(model, token_ids).routings]
    record_of_file = {
        "sha256": _sha256(folder / WEIGHTS),
        "bytes": (folder / WEIGHTS).stat().st_size,
        "parameters": model.num_parameters(),
        "languages": {name: dataclasses.asdict(score) for name, score in scored.items()},
        "nats_per_token": round(nats_per_token.item(), 4),
        "scored_tokens": token_ids[:, 1:].numel(),
        "load_max_over_min": [round((layer.max() / layer.min()).item(), 2) for layer in counts],
        "steps": record.steps,
        "seed": record.seed,
        "tokens": record.tokens,
        "seconds": round(record.seconds),
        "versions": {
            library.__name__: library.__version__ for library in (torch, transformers, tokenizers)
        },
    }
    (folder / SCORES).write_text(json.dumps(record_of_file, indent=2) + "\n")


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
