"""A recipe: which format each component of a model is stored in.

One noun for the whole lab: what a budget predicts, what a loader does, and what a coverage report
is held against. A recipe names a format for each component; `overrides` makes exceptions for some
layers, experts or projections:

>>> recipe = Recipe(experts="nf4", overrides={"layers.0.experts.3": "int8"})
>>> recipe.format_of(Part("experts", layer=0, expert=3, projection="up_proj"))
'int8'
>>> recipe.format_of(Part("experts", layer=1, expert=3, projection="up_proj"))
'nf4'
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from fnmatch import fnmatchcase

import torch

from .anatomy import COMPONENTS, Part, matrices
from .formats import FORMATS, check_block_size, check_format, check_storable, quantize


@dataclass(frozen=True)
class Recipe:
    """A format for each component, and exceptions by name.

    Formats: nf4, fp4 (bitsandbytes' 4-bit codebooks, in blocks of `block_size`), int8 (LLM.int8(),
    a scale per row), bf16, fp16, fp32. A model can be loaded in these; in any other of
    `formats.FORMATS` it can be `simulated`. Norms and what the lab does not know stay as they are.

    `overrides` maps a path to a format. A path is that of `anatomy.Part.path`, or the beginning of
    one; `*` stands for anything between two dots. Where several fit, the last one counts:

    - `"layers.0.experts"`: all experts of layer 0
    - `"layers.*.experts.3.down_proj"`: one projection of expert 3 in every layer
    - `"layers.31.attention"`, `"layers.31.router"`

    Raises ValueError for an unknown format, a block size that does not exist, or a path that names
    no component.
    """

    experts: str = "nf4"
    attention: str = "bf16"
    router: str = "bf16"
    embeddings: str = "bf16"
    lm_head: str = "bf16"
    shared_experts: str = "bf16"
    dense_mlp: str = "bf16"
    block_size: int = 64
    double_quant: bool = True
    overrides: Mapping[str, str] = field(default_factory=dict, hash=False)

    @classmethod
    def keeping(cls, format: str, **choices) -> "Recipe":
        """`format` for every component that `choices` does not name.

        To change one thing alone in a model of 32 bits: `Recipe.keeping("fp32", experts="int3")`.
        """
        return cls(**dict.fromkeys(cls().components, format) | choices)

    def __post_init__(self):
        if not isinstance(self.overrides, Mapping):
            raise TypeError(f"overrides maps paths to formats, and is a {type(self.overrides)}.")
        check_block_size(self.block_size)
        for component in self.components:
            check_format(getattr(self, component))
        for path, format in self.overrides.items():
            check_format(format)
            _check_path(path)
        object.__setattr__(self, "overrides", dict(self.overrides))

    @property
    def components(self) -> tuple[str, ...]:
        """The components that a recipe names a format for."""
        return tuple(entry.name for entry in fields(self) if entry.name in COMPONENTS)

    @property
    def formats(self) -> set[str]:
        """Every format that occurs in it."""
        return {getattr(self, component) for component in self.components} | set(
            self.overrides.values()
        )

    @property
    def quantizes(self) -> bool:
        """Whether anything at all is stored in fewer than 16 bits."""
        return any(FORMATS[format].scaled for format in self.formats)

    @property
    def float_format(self) -> str:
        """The one format of everything that is not quantized.

        Raises ValueError where components differ in it: a layer cannot multiply bf16 by fp32.
        """
        floats = {format for format in self.formats if not FORMATS[format].scaled} or {"bf16"}
        if len(floats) > 1:
            raise ValueError(
                f"The recipe mixes {' and '.join(sorted(floats))}; what is not quantized must all "
                "be in one of them."
            )
        return floats.pop()

    def formats_of(self, component: str) -> set[str]:
        """Every format that may occur in a component, overrides included."""
        exceptions = {
            format
            for path, format in self.overrides.items()
            if fnmatchcase(component, _component_of(path))
        }
        return {getattr(self, component)} | exceptions

    def format_of(self, part: Part) -> str | None:
        """The format that `part` is to be stored in; None for what a recipe leaves as it is."""
        if part.component not in self.components:
            return None
        chosen = getattr(self, part.component)
        for path, format in self.overrides.items():
            if _covers(path, part):
                chosen = format
        return chosen

    def stores_alike(self, other: "Recipe", parts: Iterable[Part]) -> bool:
        """Whether both store each of `parts` the same, block by block where there are blocks."""
        parts = list(parts)
        formats = {self.format_of(part) for part in parts} - {None}
        in_blocks = any(FORMATS[format].scaled == "block" for format in formats)
        same_blocks = (self.block_size, self.double_quant) == (other.block_size, other.double_quant)
        return (same_blocks or not in_blocks) and all(
            self.format_of(part) == other.format_of(part) for part in parts
        )

    def require_storable(self) -> None:
        """Raise ValueError if it names a format that can only be simulated."""
        for format in sorted(self.formats):
            check_storable(format)

    def unused_overrides(self, parts) -> list[str]:
        """The overrides that fit none of `parts`: a layer or expert that is not there."""
        return [path for path in self.overrides if not any(_covers(path, part) for part in parts)]

    def to_dict(self) -> dict:
        """The recipe as plain values, for a file; `Recipe(**recipe.to_dict())` gives it back."""
        return asdict(self)

    def __str__(self):
        named = {name: getattr(self, name) for name in self.components} | self.overrides
        formats = ", ".join(f"{name} {format}" for name, format in named.items())
        double = "with" if self.double_quant else "without"
        return f"{formats} (blocks of {self.block_size}, {double} double quantization)"


def check_overrides(recipe: Recipe, parts: list[Part]) -> None:
    """ValueError naming the overrides that fit none of `parts`."""
    if unused := recipe.unused_overrides(parts):
        layers = max((part.layer for part in parts if part.layer is not None), default=None)
        experts = max((part.expert for part in parts if part.expert is not None), default=None)
        components = ", ".join(dict.fromkeys(part.component for part in parts))
        raise ValueError(
            f"No part of this model fits the override {unused[0]!r}; it has layers 0 to {layers} "
            f"with experts 0 to {experts} (gate_proj, up_proj, down_proj), and the components "
            f"{components}."
        )


@contextmanager
def simulated(model: torch.nn.Module, recipe: Recipe) -> Iterator[None]:
    """Inside, `model` computes with weights rounded as `recipe` would store them, *simulated*.

    They are kept in 16 or 32 bits as before, so that any format can be tried on any model, at its
    own speed and in its own memory: what is simulated is the damage, not the saving. Each matrix is
    quantized by itself, as a loader does it, also where experts are fused. On leaving, after an
    error too, the weights are what they were, to the last bit; until then a copy of those that
    changed is kept.

    Example: `with simulated(model, Recipe(experts="int3")): cross_entropy(model, tokenizer)`. On a
    model in float32 that rounds all other components to bf16 too, for so the recipe would store
    them; `Recipe.keeping("fp32", experts="int3")` leaves them alone.

    Raises ValueError, before anything is changed, for an override that fits no part of the model,
    and for a model that is already quantized.
    """
    held = {name: matrices(name, tuple(p.shape)) for name, p in model.named_parameters()}
    check_overrides(recipe, [weight.part for weights in held.values() for weight in weights])
    _check_unquantized(model)
    originals = {}
    try:
        for name, weights in held.items():
            parameter = model.get_parameter(name)
            formats = [recipe.format_of(weight.part) for weight in weights]
            if len(weights[0].shape) == 2 and any(_rounds(parameter, each) for each in formats):
                originals[name] = parameter.detach().clone()
                pieces = parameter.detach().view(len(weights), *weights[0].shape)
                for piece, format in zip(pieces, formats, strict=True):
                    if _rounds(parameter, format):
                        piece.copy_(_rounded(piece, format, recipe))
        yield
    finally:
        for name, original in originals.items():
            model.get_parameter(name).detach().copy_(original)


def _check_unquantized(model: torch.nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if not parameter.is_floating_point():
            raise ValueError(
                f"{name} is stored as {parameter.dtype}: the model is quantized already. To "
                "simulate other formats load it in 16 bits."
            )


def _rounds(parameter: torch.Tensor, format: str | None) -> bool:
    return format is not None and FORMATS[format].dtype != parameter.dtype


def _rounded(weight: torch.Tensor, format: str, recipe: Recipe) -> torch.Tensor:
    stored = FORMATS[format]
    if not stored.scaled:
        return weight.to(stored.dtype).to(weight.dtype)
    block_size = "row" if stored.scaled == "row" else recipe.block_size
    in_blocks = stored.scaled == "block"
    return quantize(weight, format, block_size, recipe.double_quant and in_blocks).dequantize()


def _covers(path: str, part: Part) -> bool:
    wanted, present = path.split("."), part.path.split(".")
    return len(wanted) <= len(present) and all(map(fnmatchcase, present, wanted))


def _component_of(path: str) -> str:
    """The component that an override's path names; "*" for a whole layer."""
    pieces = path.split(".")
    inside = pieces[2:] if pieces[0] == "layers" else pieces
    return inside[0] if inside else "*"


def _check_path(path: str) -> None:
    component = _component_of(path)
    known = {entry.name for entry in fields(Recipe)} & set(COMPONENTS)
    if path == "layers" or component not in known | {"*"}:
        raise ValueError(
            f"The override {path!r} names no part of a model; write it like "
            "'layers.0.experts.3' or 'layers.*.attention'."
        )
