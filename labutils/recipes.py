"""A recipe: which format each component of a model is stored in.

One noun for the whole lab: what a budget predicts, what a loader does, and what a coverage report
is held against. A recipe names a format for each component; `overrides` makes exceptions for some
layers, experts or projections:

>>> recipe = Recipe(experts="nf4", overrides={"layers.0.experts.3": "int8"})
>>> recipe.format_of(Part("experts", layer=0, expert=3, projection="up_proj"))
'int8'
>>> recipe.format_of(Part("experts", layer=1, expert=3, projection="up_proj"))
'nf4'

It is kept in a text file, `recipe.save("experts4.yaml")` and `Recipe.read("experts4.yaml")`, that
can be written by hand just as well:

    experts: nf4
    attention: int8
    double_quant: false
    overrides:
      layers.0.experts.3: int8
"""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from difflib import get_close_matches
from fnmatch import fnmatchcase
from functools import partial
from itertools import groupby
from pathlib import Path

import pandas as pd
import torch
import yaml

from .anatomy import COMPONENTS, Part, is_transposed, matrices
from .calibrated import METHODS, RoundedPart, Rounder, check_token_ids, folds, restored, round_model
from .formats import (
    FORMATS,
    MICROSCALED,
    check_block_size,
    check_format,
    check_storable,
    quantize,
    stored_bytes,
)

LARGE = 4096
HEADING = "# A recipe of labutils: the format that each component of a model is stored in.\n"
_ROUNDED_PLAINLY = ("router", "embeddings")
_KINDS = {
    str: "a word",
    int: "a whole number",
    float: "a number with a point",
    bool: "true or false",
    type(None): "nothing",
    list: "a list",
    dict: "names and values",
}


@dataclass(frozen=True)
class Recipe:
    """A format for each component, and exceptions by name.

    Formats: nf4, fp4 (bitsandbytes' 4-bit codebooks, in blocks of `block_size`), int8 (LLM.int8(),
    a scale per row), bf16, fp16, fp32. A model can be loaded in these; in any other of
    `formats.FORMATS` it can be `simulated`. Norms and what the lab does not know stay as they are.

    `method` is how weights are rounded: "rtn" to the nearest level, "gptq" and "awq" by what tokens
    show (`calibrated`), which is only simulated and keeps block maxima in float32: `double_quant`
    must be False. Router, embeddings, MXFP4 and NVFP4 are rounded plainly with any method.

    `overrides` maps a path to a format. A path is that of `anatomy.Part.path`, or the beginning of
    one; `*` stands for anything between two dots. Where several fit, the last one counts:

    - `"layers.0.experts"`: all experts of layer 0
    - `"layers.*.experts.3.down_proj"`: one projection of expert 3 in every layer
    - `"layers.31.attention"`, `"layers.31.router"`

    Raises ValueError for an unknown format or method, a block size that does not exist, a
    `double_quant` other than True and False, a path that names no component, or calibrated rounding
    with double quantization.
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
    method: str = "rtn"
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
        if not isinstance(self.double_quant, bool):
            raise ValueError(f"double_quant is True or False, and here {self.double_quant!r}.")
        _check_method(self.method, self.double_quant)
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

    def rounder_of(self, part: Part) -> Rounder | None:
        """How `part` is rounded on calibration tokens; None for what is rounded without, or not."""
        format = self.format_of(part)
        if self.method == "rtn" or format is None or part.component in _ROUNDED_PLAINLY:
            return None
        scaled = FORMATS[format].scaled
        if scaled not in ("block", "row"):
            return None
        return Rounder(self.method, format, "row" if scaled == "row" else self.block_size)

    def keeps_input_scales(self, part: Part) -> bool:
        """Whether 16 bits for each input of `part` are stored: AWQ's, unless `calibrated.folds`.

        AWQ may find that a matrix is better without, and an expert that no token reaches has none:
        a budget counts them all.
        """
        awq = self.method == "awq" and self.rounder_of(part) is not None
        return awq and not folds(part, self.rounder_of)

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
        """Raise ValueError if it names a format or a method that can only be simulated."""
        if self.method != "rtn":
            raise ValueError(
                f"A model is rounded plainly while it is loaded, and this recipe asks for "
                f'{self.method}: simulate it with `simulated`, or load it with method="rtn".'
            )
        for format in sorted(self.formats):
            check_storable(format)

    def unused_overrides(self, parts) -> list[str]:
        """The overrides that fit none of `parts`: a layer or expert that is not there."""
        return [path for path in self.overrides if not any(_covers(path, part) for part in parts)]

    def to_dict(self) -> dict:
        """The recipe as plain values, for a file; `Recipe(**recipe.to_dict())` gives it back."""
        return asdict(self)

    def save(self, path: str | Path) -> Path:
        """Write it to `path`, a text file (YAML); a file that is there is replaced as a whole.

        Raises IsADirectoryError for a folder. After any error nothing is left beside `path`.
        """
        path = Path(path)
        if path.is_dir():
            raise IsADirectoryError(f"{path} is a folder; name a file in it.")
        values = self.to_dict()
        if not self.overrides:
            del values["overrides"]
        beside = path.with_name(f"{path.name}.part")
        text = HEADING + yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
        try:
            beside.write_text(text, encoding="utf-8", newline="\n")
            os.replace(beside, path)
        finally:
            beside.unlink(missing_ok=True)
        return path

    @classmethod
    def read(cls, path: str | Path) -> "Recipe":
        """The recipe in the file `path`; what it does not name is as in `Recipe()`.

        Nothing in the file is ever executed. Raises ValueError, with the file's name, for what is
        not YAML, an unknown key or one that occurs twice, a value of another type, an empty file,
        and for what a recipe cannot be.
        """
        path = Path(path)
        try:
            values = yaml.load(path.read_text(encoding="utf-8"), _KeysOnce)
        except (yaml.YAMLError, ValueError, RecursionError) as problem:
            raise ValueError(f"{path} is not YAML text: {problem}") from None
        try:
            _check_values(values)
            return cls(**values)
        except ValueError as problem:
            raise ValueError(f"{path}: {problem}") from None

    @property
    def table(self) -> pd.DataFrame:
        """One row a component, then one an override: component (or path), format, bits_per_weight.

        The bits are those of a matrix of 4096 x 4096 with all its constants; smaller ones take
        more. AWQ's scales, 0.004 bits in such a matrix, are left out.
        """
        named = [(name, getattr(self, name)) for name in self.components]
        return pd.DataFrame(
            {
                "component": name,
                "format": format,
                "bits_per_weight": 8
                * stored_bytes(format, LARGE, LARGE, self.block_size, self.double_quant)
                / LARGE**2,
            }
            for name, format in [*named, *self.overrides.items()]
        )

    def _repr_markdown_(self) -> str:
        rows = (
            f"| `{row.component}` | {row.format} | {row.bits_per_weight:.3f} |"
            for row in self.table.itertuples()
        )
        lines = ["| component | format | bits per weight |", "|:--|:--|--:|", *rows]
        return "\n".join([*lines, "", f"({self._how})"])

    @property
    def _how(self) -> str:
        double = "with" if self.double_quant else "without"
        method = "" if self.method == "rtn" else f"{self.method}, "
        return f"{method}blocks of {self.block_size}, {double} double quantization"

    def __str__(self):
        named = {name: getattr(self, name) for name in self.components} | self.overrides
        formats = ", ".join(f"{name} {format}" for name, format in named.items())
        return f"{formats} ({self._how})"


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


class _KeysOnce(yaml.SafeLoader):
    """Plain values only, and an error where a mapping names a key twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    problem=f"{key.value!r} occurs twice", problem_mark=key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


@contextmanager
def simulated(
    model: torch.nn.Module,
    recipe: Recipe,
    calibration: torch.Tensor | None = None,
    rounding: Callable[..., torch.Tensor] | None = None,
) -> Iterator[tuple[RoundedPart, ...]]:
    """Inside, `model` computes with weights rounded as `recipe` would store them, *simulated*.

    They are kept in 16 or 32 bits as before, so that any format can be tried on any model, at its
    own speed and in its own memory: what is simulated is the damage, not the saving. Each matrix is
    quantized by itself, as a loader does it, also where experts are fused. On leaving, after an
    error too, the weights are what they were, to the last bit; until then a copy of those that
    change is kept.

    Example: `with simulated(model, Recipe(experts="int3")): cross_entropy(model, tokenizer)`. On a
    model in float32 that rounds all other components to bf16 too, for so the recipe would store
    them; `Recipe.keeping("fp32", experts="int3")` leaves them alone.

    The methods "gptq" and "awq" need `calibration`, token ids (pages, tokens), which "rtn" does not
    read. What is rounded without them comes first; then experts and linear layers are, one after
    the other, in a single pass (`calibrated.round_model`). What it gives is a record of each.

    `rounding` is `rounded` of this model with a memory, for those who try many recipes:
    `lru_cache(128)(partial(rounded, model))`.

    Raises ValueError, before anything is changed, for an override that fits no part of the model,
    for a model that is already quantized or keeps its experts transposed (gpt-oss, Llama-4), and
    without the tokens that the method needs, or with what are no tokens of this model.
    """
    _check_rows(model)
    held = {name: matrices(name, tuple(p.shape)) for name, p in model.named_parameters()}
    check_overrides(recipe, [weight.part for weights in held.values() for weight in weights])
    _check_unquantized(model)
    if recipe.method != "rtn" and calibration is None:
        raise ValueError(
            f"{recipe.method} rounds by what tokens show, and there are none: give `calibration`, "
            'token ids (pages, tokens), or take the method "rtn".'
        )
    if recipe.method != "rtn":
        check_token_ids(model, calibration)
    changing = {
        name: weights
        for name, weights in held.items()
        if len(weights[0].shape) == 2
        and any(_rounds(model.get_parameter(name), recipe.format_of(w.part)) for w in weights)
    }
    rounding = rounding or partial(rounded, model)
    with restored(map(model.get_parameter, changing)):
        for name, weights in changing.items():
            plain = (w.part for w in weights if recipe.rounder_of(w.part) is None)
            formats = {part: recipe.format_of(part) for part in plain}
            wanted = tuple(formats.get(weight.part) for weight in weights)
            if any(wanted):
                changed = rounding(name, wanted, recipe.block_size, recipe.double_quant)
                model.get_parameter(name).detach().copy_(changed)
        if recipe.method == "rtn":
            yield ()
        else:
            yield round_model(model, calibration, recipe.rounder_of)


def _check_rows(model: torch.nn.Module) -> None:
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    for name in shapes:
        if is_transposed(name, shapes):
            raise ValueError(
                f"{name} keeps its matrices as (inputs, outputs), and rounding here goes along the "
                "rows of (outputs, inputs): such experts can be counted and loaded, not simulated."
            )


def _check_unquantized(model: torch.nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if not parameter.is_floating_point():
            raise ValueError(
                f"{name} is stored as {parameter.dtype}: the model is quantized already. To "
                "simulate other formats load it in 16 bits."
            )


def rounded(
    model: torch.nn.Module,
    name: str,
    formats: tuple[str | None, ...],
    block_size: int,
    double_quant: bool,
) -> torch.Tensor:
    """The parameter called `name` with each of its matrices as its format stores it.

    `formats` has one for each matrix, None for what stays. Neighbours of one format are rounded at
    once, which takes less time, where their blocks and constants are their own all the same.
    """
    result = model.get_parameter(name).detach().clone()
    pieces = result.view(len(formats), -1, result.shape[-1])
    first = 0
    for format, run in groupby(formats):
        last = first + len(list(run))
        if _rounds(result, format):
            nested = double_quant and FORMATS[format].scaled == "block"
            step = last - first if _alone(format, pieces[0].numel(), block_size, nested) else 1
            for piece in pieces[first:last].split(step):
                rows = piece.flatten(0, 1)
                rows.copy_(_rounded(rows, format, block_size, nested))
        first = last
    return result


def _alone(format: str, parameters: int, block_size: int, nested: bool) -> bool:
    """Whether blocks of a matrix of so many parameters know nothing of the other matrices.

    NVFP4 has a scale for the whole matrix, and double quantization a mean over it.
    """
    if format in MICROSCALED:
        return format != "nvfp4" and parameters % MICROSCALED[format].block_size == 0
    return FORMATS[format].scaled != "block" or (not nested and parameters % block_size == 0)


def _rounds(parameter: torch.Tensor, format: str | None) -> bool:
    return format is not None and FORMATS[format].dtype != parameter.dtype


def _rounded(
    weight: torch.Tensor, format: str, block_size: int, double_quant: bool
) -> torch.Tensor:
    stored = FORMATS[format]
    if not stored.scaled:
        return weight.to(stored.dtype).to(weight.dtype)
    size = "row" if stored.scaled == "row" else block_size
    return quantize(weight, format, size, double_quant).dequantize()


def _covers(path: str, part: Part) -> bool:
    wanted, present = path.split("."), part.path.split(".")
    return len(wanted) <= len(present) and all(map(fnmatchcase, present, wanted))


def _component_of(path: str) -> str:
    """The component that an override's path names; "*" for a whole layer."""
    pieces = path.split(".")
    inside = pieces[2:] if pieces[0] == "layers" else pieces
    return inside[0] if inside else "*"


def _check_path(path: str) -> None:
    known = {entry.name for entry in fields(Recipe)} & set(COMPONENTS) | {"*"}
    if not isinstance(path, str) or path == "layers" or _component_of(path) not in known:
        raise ValueError(
            f"The override {path!r} names no part of a model; write it like "
            "'layers.0.experts.3' or 'layers.*.attention'."
        )


def _check_method(method: str, double_quant: bool) -> None:
    if method not in METHODS:
        raise ValueError(f"Unknown method {method!r}; the methods are {', '.join(METHODS)}.")
    if method != "rtn" and double_quant:
        raise ValueError(
            f"{method} keeps block maxima in float32: it goes with double_quant=False, and this is "
            f"double_quant={double_quant}."
        )


def _check_values(values) -> None:
    """ValueError unless `values`, read from a file, are named and typed as a recipe's are."""
    if values is None:
        raise ValueError(
            "The file is empty. A recipe has a line for each choice, like 'experts: nf4'."
        )
    if not isinstance(values, dict):
        raise ValueError(
            "A recipe has a line for each choice, like 'experts: nf4'; this holds "
            f"{_kind(type(values))}."
        )
    usual = Recipe().to_dict()
    for key, value in values.items():
        if key not in usual:
            meant = get_close_matches(str(key), usual, n=1)
            guess = f" Did you mean {meant[0]!r}?" if meant else ""
            raise ValueError(f"Unknown key {key!r}; the keys are {', '.join(usual)}.{guess}")
        if type(value) is not type(usual[key]):
            raise _wrong_type(key, usual[key], value)
    for path, format in values.get("overrides", {}).items():
        for name, value in (("path in overrides", path), (f"overrides, {path}", format)):
            if not isinstance(value, str):
                raise _wrong_type(name, "", value)


def _wrong_type(name: str, wanted, value) -> ValueError:
    asked = "paths and formats" if isinstance(wanted, dict) else _kind(type(wanted))
    return ValueError(f"{name} is {asked}, and here {_kind(type(value))}.")


def _kind(of: type) -> str:
    """A type that YAML has, in plain words."""
    return _KINDS.get(of, f"a {of.__name__}")
