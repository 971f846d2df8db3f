"""What fits where: a model, a recipe and a context against real cards and machines.

    >>> plan("Mixtral-8x7B", Recipe(attention="nf4"), Machine(CARDS["RTX 5090"])).verdict
    'fits'

Three things are stacked up and held against a card's memory: the weights with their constants,
exact to the byte; the keys and values of the context, exact too; and an allowance for what a
forward pass holds (`budget`). Two more allowances are taken off the memory itself:

- `CONTEXT_BYTES` of each card, for the CUDA context: the driver's own data and the kernels that
  were used. 300 to 500 MiB in PyTorch since kernels are loaded when first used
  (pytorch/pytorch#107667 names 300, 3DTopia/Phidias-Diffusion#8 shows 471 on an RTX 4090).
- `HOST_BYTES` of main memory, for the system and a Python process with torch in it.

With several cards whole layers go to each, in their order, as `device_map` does it: the embeddings
lie on the first card, the last norm and the head on the last, and the fullest card decides. The
split taken here is the one whose fullest card is least full.

Allowances are not bounds. A card that also draws a desktop has less, and so has one that somebody
else is using: `python -m labutils doctor` shows what is free.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from functools import lru_cache
from heapq import nlargest
from numbers import Integral, Real
from pathlib import Path
from textwrap import shorten

import pandas as pd
from huggingface_hub.errors import StrictDataclassError

from .anatomy import COMPONENTS, Part, Weight
from .budget import (
    Budget,
    activation_bytes,
    kv_cache_by_layer,
    read_config,
    weight_bytes,
    weights_of,
)
from .ledger import PUBLISHED
from .meter import GIB
from .recipes import Recipe, check_overrides

FITS = "fits"
SHORTER = "fits with a shorter context"
OFFLOADED = "fits with experts in CPU memory"
TOO_LARGE = "does not fit"
VERDICTS = (FITS, SHORTER, OFFLOADED, TOO_LARGE)

CONTEXT_BYTES = GIB // 2
HOST_BYTES = 4 * GIB
SHORTEST_CONTEXT_TOKENS = 512
MOST_TOKENS = 10**12
_TO_4_BITS = ("experts", "attention", "shared_experts", "dense_mlp")


# ------------------------------------------------------------------------------ cards and machines


@dataclass(frozen=True)
class Card:
    """A graphics card: its name, and the memory that CUDA says it has, in GiB.

    That is less than what is printed on the box, by what the driver keeps for itself and, on
    server cards, by error correction. PyTorch prints it when memory runs out: "GPU 0 has a total
    capacity of 23.52 GiB". It differs by some hundredths between drivers.

    Raises ValueError for a size that is no finite number above 0.
    """

    name: str
    gib: float

    def __post_init__(self):
        if not _is_size(self.gib) or self.gib <= 0:
            raise ValueError(
                f"The memory of card {self.name!r} is a number of GiB above 0, not {self.gib!r}."
            )

    @property
    def usable_bytes(self) -> int:
        """Bytes for a model: all but the allowance for the CUDA context."""
        return max(0, int(self.gib * GIB) - CONTEXT_BYTES)


def _is_size(gib) -> bool:
    """Whether it is a number of GiB that bytes can be counted of."""
    return isinstance(gib, Real) and not isinstance(gib, bool) and math.isfinite(gib * GIB)


def _is_whole(count) -> bool:
    return isinstance(count, Integral) and not isinstance(count, bool)


def _cards() -> dict[str, Card]:
    """Each size as such a message shows it, in the issue named beside it or in several."""
    sizes = {
        "RTX 4060": 7.72,  # 8 GB; longxiang-ai/TSGS#6
        "RTX 3060": 11.76,  # 12 GB; TencentARC/PhotoMaker#47
        "T4": 14.75,  # 16 GB; hpcaitech/Open-Sora#697
        "RTX 5060 Ti": 15.45,  # 16 GB, 15,816 MiB; Luce-Org/lucebox#407
        "RTX 4090": 23.52,  # 24 GB; Soul-AILab/SoulX-FlashTalk#5; 23.64 with older drivers
        "RTX 3090": 23.69,  # 24 GB; vllm-project/vllm#2140
        "RTX 5090": 31.36,  # 32 GB; TrajectoryCrafter/TrajectoryCrafter#20
        "A100 40GB": 39.50,  # TianheWu/CoSeR#10
        "RTX 6000 Ada": 44.43,  # 48 GB, and the L40S; DINGYANB/MTVCrafter#21
        "H100 80GB": 79.11,  # vllm-project/vllm#27508
        "RTX PRO 6000": 94.97,  # 96 GB; antirez/ds4#431
        "H200": 139.80,  # 141 GB; in several logs, some say 139.81
    }
    return {name: Card(name, gib) for name, gib in sizes.items()}


CARDS = _cards()


def card_named(name: str) -> Card:
    """The card called `name`, in any case; ValueError with those that there are if it is none."""
    by_name = {known.lower(): card for known, card in CARDS.items()}
    if name.lower() in by_name:
        return by_name[name.lower()]
    near = [by_name[close].name for close in get_close_matches(name.lower(), by_name, 3, 0.4)]
    meant = f"did you mean {' or '.join(near)}? There" if near else "there"
    raise ValueError(
        f"Unknown card {name!r}; {meant} are {', '.join(CARDS)}; any other is given by its memory "
        f"in GiB, as --card-gib 180 in a terminal or Card({name!r}, 180)."
    )


@dataclass(frozen=True)
class Machine:
    """`cards` cards of one kind, or none at all, and `host_gib` GiB of main memory.

    `card` is a `Card`, or the name of one in `CARDS`.

    Raises ValueError for an unknown name, for a number of cards that is not whole or less than 1,
    for several of none, and for memory that is not finite or less than 0; TypeError for a card that
    is neither.
    """

    card: Card | None = None
    cards: int = 1
    host_gib: float = 64

    def __post_init__(self):
        if isinstance(self.card, str):
            object.__setattr__(self, "card", card_named(self.card))
        if not isinstance(self.card, Card | None):
            raise TypeError(f"A machine's card is a Card, its name or None, not {self.card!r}.")
        if not _is_whole(self.cards) or self.cards < 1:
            raise ValueError(f"There is no machine of {self.cards!r} cards; give a whole number.")
        if not _is_size(self.host_gib) or self.host_gib < 0:
            raise ValueError(f"There is no machine with {self.host_gib!r} GiB of main memory.")
        if self.card is None and self.cards > 1:
            raise ValueError(f"A machine without a card cannot have {self.cards}; name one.")

    @property
    def name(self) -> str:
        if self.card is None:
            return f"CPU with {self.host_gib:g} GiB"
        return self.card.name if self.cards == 1 else f"{self.cards} x {self.card.name}"

    @property
    def host_bytes(self) -> int:
        """Bytes of main memory for a model: all but the allowance for the system."""
        return max(0, int(self.host_gib * GIB) - HOST_BYTES)

    @property
    def usable_bytes(self) -> int:
        """Bytes for a model on each card; of main memory where there is no card."""
        return self.card.usable_bytes if self.card else self.host_bytes


# --------------------------------------------------------------------------------- what is stacked


@dataclass(frozen=True)
class _Model:
    """A config with its name; equal to another if the text of both is the same."""

    name: str
    text: str
    config: object = field(compare=False)

    @property
    def tokens(self) -> int:
        """The longest context that it was made for; `MOST_TOKENS` where its config has none."""
        own = getattr(self.config.get_text_config(), "max_position_embeddings", None)
        return own if own and own > 0 else MOST_TOKENS


_WAYS = f"give a folder, a config.json, a hub name, or one of {', '.join(PUBLISHED)}."


def _model(config_or_path) -> _Model:
    if hasattr(config_or_path, "to_json_string"):
        config = config_or_path
        return _Model(config.name_or_path or config.model_type, config.to_json_string(), config)
    if not str(config_or_path).strip():
        raise ValueError(f"A model needs a name: {_WAYS}")
    path = Path(PUBLISHED.get(str(config_or_path), config_or_path)).expanduser()
    file = path / "config.json" if path.is_dir() else path
    if file.is_file():
        return _read(path.name.removesuffix(".json"), str(path), file.stat().st_mtime_ns)
    if path.is_dir():
        raise FileNotFoundError(f"{path} holds no config.json.")
    return _read(str(config_or_path), str(config_or_path), None)


@lru_cache(maxsize=64)
def _read(name: str, place: str, modified_ns: int | None) -> _Model:
    """The model of a file, a folder or (without a time of change) the hub, read once."""
    if modified_ns is None and not _is_hub_name(place):
        near = get_close_matches(place, PUBLISHED, 3, 0.4)
        meant = f"did you mean {' or '.join(near)}?" if near else ""
        raise FileNotFoundError(f"There is no model {place!r}; {meant or _WAYS}")
    try:
        config = read_config(place)
    except (OSError, ValueError, StrictDataclassError) as error:
        reason = shorten(str(error), 200)
        raise ValueError(f"No config can be read from {place!r}: {reason}") from None
    return _Model(name, config.to_json_string(), config)


def _is_hub_name(name: str) -> bool:
    return name.count("/") == 1 and name[0] not in "./~" and not name.endswith(".json")


_NOT_BUILT = (ValueError, RuntimeError, TypeError, ArithmeticError, LookupError, AttributeError)


@lru_cache(maxsize=64)
def _counted(model: _Model, by_expert: bool) -> tuple[tuple[Weight, int], ...]:
    """Every weight once; where experts need not be told apart, one for all of them, and how many.

    Qwen3-30B-A3B has 18,867 weights, and 483 of them differ in more than the expert.
    """
    try:
        weights = weights_of(model.config)
    except _NOT_BUILT as error:
        kind = model.config.model_type
        reason = "" if isinstance(error, ValueError) else f": {shorten(str(error), 100)}"
        raise ValueError(
            f"{model.name} ({kind}) is no language model that can be built{reason.rstrip('.')}."
        ) from None
    if by_expert:
        return tuple((weight, 1) for weight in weights)
    alike = Counter(
        weight
        if weight.part.expert is None
        else replace(weight, part=replace(weight.part, expert=0))
        for weight in weights
    )
    return tuple(alike.items())


@dataclass(frozen=True)
class _Stored:
    """A model's stored bytes, by the place where they lie in it; `experts` has a list a layer."""

    budget: Budget
    before: int
    layers: tuple[int, ...]
    experts: tuple[tuple[int, ...], ...]
    after: int

    @property
    def experts_bytes(self) -> int:
        return sum(map(sum, self.experts))


@lru_cache(maxsize=256)
def _stored(model: _Model, recipe: Recipe) -> _Stored:
    counted = _counted(model, bool(recipe.overrides))
    check_overrides(recipe, [weight.part for weight, _ in counted])
    by_component, by_place, experts = Counter(), Counter(), defaultdict(Counter)
    for weight, count in counted:
        part, size = weight.part, weight_bytes(weight, recipe)
        by_component[part.component] += count * size
        if part.component != "experts":
            by_place[_place(part)] += count * size
        elif count == 1:
            experts[part.layer][part.expert] += size
        else:
            experts[part.layer].update(dict.fromkeys(range(count), size))
    layers = range(model.config.get_text_config().num_hidden_layers)
    return _Stored(
        Budget(
            sum(count * weight.parameters for weight, count in counted),
            {name: by_component[name] for name in COMPONENTS if name in by_component},
        ),
        by_place["before"],
        tuple(by_place[layer] for layer in layers),
        tuple(tuple(experts[layer].values()) for layer in layers),
        by_place["after"],
    )


def _place(part: Part) -> int | str:
    """The layer of `part`, or on which side of them all it lies."""
    if part.layer is not None:
        return part.layer
    return "after" if part.component in ("norms", "lm_head") else "before"


@dataclass(frozen=True)
class _Stack:
    """What lies on the cards at one context length: in a row, and on every card."""

    row: list[int]
    everywhere: int

    def fits(self, cards: int, card_bytes: int) -> bool:
        """Whether whole pieces of the row, in their order, go onto the cards."""
        room = card_bytes - self.everywhere
        return max(self.row) <= room and len(_filled(self.row, room)) <= cards

    def shares(self, cards: int) -> tuple[int, ...]:
        """The bytes on each card, split so that the fullest is least full."""
        low, high = max(self.row), sum(self.row)
        while low < high:
            middle = (low + high) // 2
            if len(_filled(self.row, middle)) <= cards:
                high = middle
            else:
                low = middle + 1
        return tuple(share + self.everywhere for share in _filled(self.row, low))


def _filled(row: list[int], room: int) -> list[int]:
    """What goes onto each card if every card takes as much of the row as it has room for."""
    shares = [0]
    for piece in row:
        if shares[-1] + piece > room:
            shares.append(0)
        shares[-1] += piece
    return shares


def _stack(
    model: _Model, stored: _Stored, tokens: int, batch_size: int, with_experts: bool
) -> _Stack:
    caches = kv_cache_by_layer(model.config, tokens, batch_size)
    layers = [size + cache for size, cache in zip(stored.layers, caches, strict=True)]
    everywhere = activation_bytes(model.config, tokens, batch_size)
    if with_experts:
        layers = [size + sum(experts) for size, experts in zip(layers, stored.experts, strict=True)]
    else:
        everywhere += max((max(layer, default=0) for layer in stored.experts), default=0)
    return _Stack([stored.before, *layers, stored.after], everywhere)


def _longest(fits: Callable[[int], bool]) -> int:
    """The largest number of tokens that fits, by bisection; 0 if not even one does.

    The search ends at `MOST_TOKENS`, for a context that takes no memory.
    """
    fitting, over = 0, 1
    while over < MOST_TOKENS and fits(over):
        fitting, over = over, 2 * over
    while over - fitting > 1:
        middle = (fitting + over) // 2
        if fits(middle):
            fitting = middle
        else:
            over = middle
    return fitting


# ---------------------------------------------------------------------------------------- the plan


@dataclass(frozen=True)
class Offload:
    """The way with the experts in main memory and all else on the cards.

    `card_bytes` lie on the fullest card, room for one expert among them, `host_bytes` in main
    memory. `token_bytes` is what one token moves to the cards at worst: every expert that it
    chooses, in every layer, when none of them is there already.
    """

    card_bytes: int
    host_bytes: int
    token_bytes: int


@dataclass(frozen=True)
class Plan:
    """Whether a model fits a machine, and if not, what would help.

    `verdict` is one of `VERDICTS`. `budget` stacks up the whole; `shares` are the bytes of each
    card with everything on the cards (of main memory on a machine without any).
    `longest_context_tokens` is the longest context that fits by memory, and at most what the model
    was made for: in the way that the verdict names, and for what does not fit with the experts in
    CPU memory, 0 if never. The verdict itself is about memory alone, and `next_step` says where a
    context is longer than the model's own. `offload` is None without a card or without experts.
    """

    model: str
    recipe: Recipe
    machine: Machine
    context_tokens: int
    batch_size: int
    budget: Budget
    shares: tuple[int, ...]
    offload: Offload | None
    longest_context_tokens: int
    verdict: str
    next_step: str

    @property
    def bytes_needed(self) -> int:
        """Bytes on the fullest card with everything on the cards."""
        return max(self.shares)

    @property
    def bytes_available(self) -> int:
        """Bytes that a card, or main memory, has for the model."""
        return self.machine.usable_bytes

    @property
    def short_bytes(self) -> int:
        """Bytes that the fullest card lacks; 0 if it lacks none."""
        return max(0, self.bytes_needed - self.bytes_available)

    @property
    def sentence(self) -> str:
        """What is needed, what is there, and what to do next, in one sentence."""
        machine = self.machine
        place = f"the fullest of {machine.name}" if machine.cards > 1 else f"the {machine.name}"
        sequences = "" if self.batch_size == 1 else f"{self.batch_size} times "
        return (
            f"{self.model} needs {_gib(self.bytes_needed)} GiB for {sequences}"
            f"{self.context_tokens:,} tokens and {place} has {_gib(self.bytes_available)}: "
            f"it {self.verdict}; {self.next_step}."
        )


def plan(
    config_or_path,
    recipe: Recipe,
    machine: Machine,
    context_tokens: int = 4096,
    batch_size: int = 1,
) -> Plan:
    """Whether a model fits a machine under a recipe, for sequences of `context_tokens`.

    `config_or_path` is a name in `ledger.PUBLISHED`, a folder with a config.json, that file, a hub
    name, or a config. It is counted once; after that a plan takes milliseconds. Everything on the
    cards is tried first, then a shorter context (512 tokens at least), then the experts in CPU
    memory.

    Raises FileNotFoundError or ValueError for a model that cannot be read, TypeError for what is no
    recipe or no machine, and ValueError for a recipe that does not fit the model or for tokens or
    sequences that are not whole, less than one, or more than `MOST_TOKENS` in all.
    """
    _check(recipe, machine, context_tokens, batch_size)
    model = _model(config_or_path)
    stored = _stored(model, recipe)

    def stack(tokens: int, with_experts: bool = True) -> _Stack:
        return _stack(model, stored, tokens, batch_size, with_experts)

    def longest(with_experts: bool) -> int:
        return _longest(
            lambda tokens: stack(tokens, with_experts).fits(machine.cards, machine.usable_bytes)
        )

    offload = _offload(model, stored, stack(context_tokens, False), machine)
    verdict, tokens = FITS, longest(True)
    if tokens < context_tokens:
        verdict = SHORTER
    if tokens < min(context_tokens, SHORTEST_CONTEXT_TOKENS):
        in_host_memory = offload and offload.host_bytes <= machine.host_bytes
        tokens = longest(False) if in_host_memory else 0
        verdict = OFFLOADED if tokens >= context_tokens else TOO_LARGE
    beside = {
        "kv_cache": sum(kv_cache_by_layer(model.config, context_tokens, batch_size)),
        "activations": activation_bytes(model.config, context_tokens, batch_size),
    }
    budget = replace(stored.budget, by_component=stored.budget.by_component | beside)
    made = Plan(
        model=model.name,
        recipe=recipe,
        machine=machine,
        context_tokens=context_tokens,
        batch_size=batch_size,
        budget=budget,
        shares=stack(context_tokens).shares(machine.cards),
        offload=offload,
        longest_context_tokens=min(tokens, model.tokens),
        verdict=verdict,
        next_step="",
    )
    return replace(made, next_step=_next_step(made, model))


def _check(recipe, machine, context_tokens, batch_size) -> None:
    if not isinstance(recipe, Recipe):
        raise TypeError(f"A plan is for a Recipe, as Recipe(attention='nf4'), not {recipe!r}.")
    if not isinstance(machine, Machine):
        raise TypeError(f"A plan is for a Machine, as Machine('RTX 4090'), not {machine!r}.")
    asked = f"{batch_size!r} sequences of {context_tokens!r} tokens"
    if not (_is_whole(context_tokens) and _is_whole(batch_size)):
        raise ValueError(f"{asked} are nothing to plan; give whole numbers.")
    if context_tokens < 1 or batch_size < 1:
        raise ValueError(f"{asked} are nothing to plan.")
    if context_tokens * batch_size > MOST_TOKENS:
        raise ValueError(f"{asked} are nothing to plan; at most {MOST_TOKENS:,} tokens can be.")


def plans_table(
    configs: Iterable,
    recipe: Recipe,
    machines: Iterable[Machine] = tuple(map(Machine, CARDS.values())),
    context_tokens: int = 4096,
    batch_size: int = 1,
) -> pd.DataFrame:
    """A row for each model and machine: what is needed, what is there, and the verdict.

    The columns are `model`, `machine`, `needed_gib` and `available_gib` (of the fullest card),
    `longest_context` in tokens, and `verdict`; `.pivot(index="model", columns="machine",
    values="verdict")` makes one row a model of it.
    """
    machines = tuple(machines)
    plans = [
        plan(config, recipe, machine, context_tokens, batch_size)
        for config in configs
        for machine in machines
    ]
    return pd.DataFrame(
        {
            "model": made.model,
            "machine": made.machine.name,
            "needed_gib": made.bytes_needed / GIB,
            "available_gib": made.bytes_available / GIB,
            "longest_context": made.longest_context_tokens,
            "verdict": made.verdict,
        }
        for made in plans
    )


def _offload(model: _Model, stored: _Stored, without: _Stack, machine: Machine) -> Offload | None:
    if machine.card is None or not stored.experts_bytes:
        return None
    top_k = model.config.get_text_config().num_experts_per_tok
    moved = sum(sum(nlargest(top_k, experts)) for experts in stored.experts)
    return Offload(max(without.shares(machine.cards)), stored.experts_bytes, moved)


# ---------------------------------------------------------------------------------- what would help


def _next_step(made: Plan, model: _Model) -> str:
    own = f"the model was made for {model.tokens:,} tokens"
    if made.context_tokens <= model.tokens:
        return _advice(made, model)
    return f"yet {own}" if made.verdict == FITS else f"{_advice(made, model)}; {own}"


def _advice(made: Plan, model: _Model) -> str:
    tokens = f"{made.longest_context_tokens:,} tokens"
    if made.verdict == FITS:
        return f"up to {tokens} do"
    helping = (
        _smaller_batch(made, model),
        _smaller_recipe(made, model),
        _larger_machine(made, model),
        _more_memory(made),
    )
    ways = " or ".join(filter(None, helping)) or "fewer bits or a smaller model"
    if made.verdict == SHORTER:
        return f"take at most {tokens}, or {ways}"
    if made.verdict == OFFLOADED:
        return (
            f"a card then holds {_gib(made.offload.card_bytes)} GiB, main memory "
            f"{_gib(made.offload.host_bytes)} GiB, and a token moves up to "
            f"{_gib(made.offload.token_bytes)} GiB; to do without, take {ways}"
        )
    if made.longest_context_tokens:
        return f"with its experts in main memory at most {tokens} do, or take {ways}"
    return f"take {ways}"


def _fits(made: Plan, model: _Model, recipe: Recipe, machine: Machine, batch_size: int) -> bool:
    stack = _stack(model, _stored(model, recipe), made.context_tokens, batch_size, True)
    return stack.fits(machine.cards, machine.usable_bytes)


def _smaller_batch(made: Plan, model: _Model) -> str:
    """The most sequences that would fit at once; empty if not even one would."""
    most = _longest(lambda batch: _fits(made, model, made.recipe, made.machine, batch))
    return f"a batch of {most}" if most else ""


def _smaller_recipe(made: Plan, model: _Model) -> str:
    """The fewest components that fit in NF4, else INT3 experts; empty if neither would do."""
    there = [name for name in _TO_4_BITS if name in made.budget.by_component]
    for count in range(1, len(there) + 1):
        smaller = replace(
            made.recipe,
            **dict.fromkeys(there[:count], "nf4"),
            double_quant=made.recipe.method == "rtn",
            overrides={},
        )
        if _fits(made, model, smaller, made.machine, made.batch_size):
            doubly = " with double quantization" if smaller.double_quant else ""
            return f"{', '.join(there[:count])} in NF4{doubly}"
    return _int3_experts(made, model, [name for name in there if name != "experts"])


def _int3_experts(made: Plan, model: _Model, others: list[str]) -> str:
    """INT3 experts with all else in INT4, in the form that `export` writes, if that would fit."""
    formats = {"experts": "int3"} | dict.fromkeys(others, "int4")
    smaller = replace(made.recipe, **formats, double_quant=False, overrides={})
    if "experts" not in made.budget.by_component or not _fits(
        made, model, smaller, made.machine, made.batch_size
    ):
        return ""
    return f"experts in INT3 with {', '.join(others)} in INT4 (to be exported, not loaded here)"


def _larger_machine(made: Plan, model: _Model) -> str:
    """The smallest card that it fits on, as many as there are or more; main memory without one."""
    if made.machine.card is None:
        return f"{math.ceil((made.bytes_needed + HOST_BYTES) / GIB)} GiB of main memory"
    for cards in sorted({made.machine.cards, 2, 4, 8}):
        for card in sorted(CARDS.values(), key=lambda card: card.gib):
            larger = replace(made.machine, card=card, cards=cards)
            if cards >= made.machine.cards and _fits(
                made, model, made.recipe, larger, made.batch_size
            ):
                return f"one {card.name}" if cards == 1 else larger.name
    return ""


def _more_memory(made: Plan) -> str:
    """The main memory that would hold the experts, where that is all that lacks."""
    offload = made.offload
    if offload is None or offload.host_bytes <= made.machine.host_bytes:
        return ""
    if offload.card_bytes > made.bytes_available:
        return ""
    return (
        f"{math.ceil((offload.host_bytes + HOST_BYTES) / GIB)} GiB of main memory for the experts"
    )


def _gib(size_bytes: int) -> str:
    return f"{size_bytes / GIB:.2f}"
