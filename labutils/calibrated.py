"""Rounding that looks at data: GPTQ and AWQ, one expert at a time.

Plain rounding (*RTN*, round to nearest) keeps each weight as near as it can. But nobody looks at
weights: what counts is the output `X W^T` for the inputs X that really come, a few hundred
*calibration* tokens of them. Both methods here minimise

    || X W^T - X Q^T ||^2 = trace((W - Q) G (W - Q)^T),   G = X^T X  (in, in)

over matrices Q that a format can hold. So all that is kept of the tokens is G, and for AWQ the mean
size of each input: a `Statistics`.

**GPTQ** (Frantar et al. 2022, arXiv:2210.17323, algorithm 1) rounds one column after the other and
lets the columns still to come make up for it. With H = 2 G, the Hessian of the above, and U the
upper triangle of inverse(H) = U^T U:

    for each column j, from left to right:
        Q[:, j] = nearest(W[:, j])
        e       = (W[:, j] - Q[:, j]) / U[j, j]
        W[:, k] = W[:, k] - e U[j, k]           for all k > j

Column k moves most where input k is most like input j, for then it can stand in for it. If inputs
are unrelated, H is diagonal, nothing moves, and GPTQ is plain rounding.

**AWQ** (Lin et al. 2023, arXiv:2306.00978, section 3.2) moves no weight to another column. It
multiplies the columns whose inputs are large before rounding, so that they fill more levels, and
divides afterwards: Q(W s) / s with s = mean|x|^alpha, alpha the best of a grid from 0 to 1.

**In a Mixture of Experts** each expert has its own inputs: the tokens that the router sends to it.
An expert that got few of them is judged by few, and one that got none cannot be calibrated: it is
rounded plainly, and its record says so.

Everything here is *simulated*: the codes and block maxima are made and counted, and a model is run
with weights put back together from them, in 32 bits.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .anatomy import Part, matrices, part_of
from .codebooks import Codebook
from .formats import (
    FORMATS,
    MICROSCALED,
    SMALLEST_MAXIMUM,
    Maxima,
    Quantized,
    check_block_size,
    check_format,
    quantize,
)
from .moe import MoELayer, SwiGLU, route

METHODS = ("rtn", "gptq", "awq")
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
EXPONENTS = tuple(step / 20 for step in range(21))
COLUMNS_AT_ONCE = 128
SMALLEST_SHARE = 1e-4


# ------------------------------------------------------------------------- what the tokens leave


@dataclass(frozen=True, eq=False)
class Statistics:
    """All that calibration needs to know of a matrix' inputs X (tokens, in).

    `tokens` counts them, `gram` (in, in) is X^T X, `magnitudes` (in) the mean of |x| over tokens.

    >>> seen = Statistics.of(torch.tensor([[1.0, -2.0], [3.0, 0.0]]))
    >>> seen.gram.tolist(), seen.magnitudes.tolist()
    ([[10.0, -2.0], [-2.0, 4.0]], [2.0, 1.0])
    """

    tokens: int
    gram: Tensor
    magnitudes: Tensor

    @classmethod
    def of(cls, inputs: Tensor) -> Statistics:
        """The statistics of `inputs` (tokens, in); zeros if there are no tokens.

        Raises ValueError for other shapes and for inputs that hold NaN or infinite values.
        """
        if inputs.dim() != 2:
            raise ValueError(
                f"The inputs have the shape {tuple(inputs.shape)}; give (tokens, in), one row a "
                "token."
            )
        x = inputs.detach().float()
        _check_finite("inputs hold", x)
        return cls(len(x), x.T @ x, x.abs().sum(dim=0) / max(1, len(x)))

    @property
    def hessian(self) -> Tensor:
        """2 X^T X: the second derivative of the squared output error by a row of the weight."""
        return 2 * self.gram

    def output_error(self, weight: Tensor, rounded: Tensor) -> float:
        """||X W^T - X Q^T|| / ||X W^T||: 0.1 is a tenth of the output lost. NaN without tokens.

        >>> Statistics.of(torch.eye(2)).output_error(
        ...     torch.tensor([[3.0, 4.0]]), torch.tensor([[3.0, 3.5]])
        ... )
        0.1
        """
        lost, whole = (
            ((matrix @ self.gram.double()) * matrix).sum().clamp(min=0).sqrt().item()
            for matrix in (weight.double() - rounded.double(), weight.double())
        )
        return lost / whole if whole else math.nan


def _check_finite(who_holds: str, values: Tensor) -> None:
    bad = values.numel() - int(torch.isfinite(values).sum())
    if bad:
        raise ValueError(
            f"The {who_holds} {bad:,} NaN or infinite values among {values.numel():,}; a single "
            "one would spoil the whole matrix. Find out where they come from."
        )


@dataclass(frozen=True, eq=False)
class ExpertStatistics:
    """What one expert's matrices are fed: `inputs` of gate and up, `middle` of down."""

    inputs: Statistics
    middle: Statistics

    def of(self, projection: str) -> Statistics:
        return self.middle if projection == "down_proj" else self.inputs


@torch.no_grad()
def expert_statistics(
    layer: MoELayer, tokens: Tensor, every_token: bool = False
) -> list[ExpertStatistics]:
    """What each expert of `layer` sees of `tokens` (tokens, hidden), one record for each expert.

    An expert sees the tokens that the router sends to it, or all of them with `every_token`. Its
    down_proj is fed silu(gate x) * (up x), from the weights as they are in `layer`.

    A token counts the same whatever its routing weight is, as in the published implementations. To
    the layer's output its error counts with that weight; on the stand-in it made no difference.

    Raises ValueError for tokens of another width and for NaN or infinite values.
    """
    hidden = layer.router.in_features
    tokens = tokens.reshape(-1, tokens.shape[-1])
    if tokens.shape[1] != hidden:
        raise ValueError(f"The tokens have width {tokens.shape[1]}; this layer takes {hidden}.")
    routing = route(layer.router(tokens), layer.top_k)
    seen = []
    for index, expert in enumerate(layer.experts):
        mine = slice(None) if every_token else (routing.chosen == index).any(dim=1)
        x = tokens[mine]
        seen.append(ExpertStatistics(Statistics.of(x), Statistics.of(expert.middle(x))))
    return seen


# ------------------------------------------------------------------------------- one weight matrix


@dataclass(frozen=True, eq=False)
class Rounded:
    """A weight matrix in codes and block maxima, and how it came to them.

    `method` is the one that was used: "rtn" also where another was asked for and no token was seen.
    `input_scales` (in), AWQ's s, divide the columns; None where there are none. They cost 16 bits
    each, unless `folded`: then another matrix absorbs them.
    """

    quantized: Quantized
    method: str
    input_scales: Tensor | None = None
    folded: bool = False

    @property
    def weight(self) -> Tensor:
        """The weight as codes, maxima and scales give it, in its old shape and dtype."""
        weight = self.quantized.dequantize()
        if self.input_scales is None:
            return weight
        return (weight.float() / self.input_scales).to(weight.dtype)

    @property
    def stored_bytes(self) -> int:
        kept = self.input_scales is not None and not self.folded
        return self.quantized.stored_bytes + (2 * len(self.input_scales) if kept else 0)

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.stored_bytes / self.quantized.shape.numel()


def gptq(
    weight: Tensor,
    statistics: Statistics,
    format: str,
    block_size: int | str = 64,
    damping: float = 0.01,
) -> Rounded:
    """`weight` (out, in) rounded column by column, each error pushed on to the columns after it.

    `damping` times the mean of H's diagonal is added to the diagonal: 0 trusts the tokens to the
    last digit, 1 hardly at all. A block's maximum is that of its weights at the moment when its
    first column comes up, with all that was pushed on to them. An input that is always 0 gets a
    diagonal of 1: its weights are rounded plainly. (The authors' program sets them to zero, and
    so a whole expert that saw no token.)

    Two weights that always see the same input, so that only their sum counts, in whole numbers:
    0.4 goes to 0 and pushes its 0.4 on; 0.3 + 0.4 then goes to 1.

    >>> seen = Statistics.of(torch.tensor([[1.0, 1.0, 0.0]]))
    >>> gptq(torch.tensor([[0.4, 0.3, 1.0]]), seen, "int2", "row").weight
    tensor([[0., 1., 1.]])

    Columns are updated in batches of 128 (section 3.3, step 2); the outcome is the same. Left out:
    other orders of the columns (act-order), asymmetric levels, double quantization.

    Raises ValueError for a format without block maxima (mxfp4), a block size that does not divide
    the row, statistics of another width or of no tokens, and a Hessian that is singular in spite of
    `damping`.
    """
    codebook, size = _check(weight, statistics, format, block_size)
    _check_damping(damping)
    factor = _inverse_factor(statistics.hessian, damping)
    left = weight.detach().float().T.clone(memory_format=torch.contiguous_format)
    codes = torch.empty_like(left, dtype=torch.uint8)
    maxima = torch.empty(len(left) // size, left.shape[1], device=left.device)
    step = min(size, COLUMNS_AT_ONCE)
    for begin in range(0, len(left), step):
        now = slice(begin, min(begin + step, len(left)))
        block = begin // size
        if begin % size == 0:
            maxima[block] = left[begin : begin + size].abs().amax(dim=0)
        errors = _round_columns(left[now], factor[now, now], maxima[block], codebook, codes[now])
        left[now.stop :] -= factor[now, now.stop :].T @ errors
    scales = Maxima(maxima.T.flatten(), codebook.peak)
    return Rounded(Quantized(format, codes.T.contiguous(), weight.dtype, size, scales), "gptq")


def _round_columns(
    left: Tensor, factor: Tensor, maxima: Tensor, codebook: Codebook, codes: Tensor
) -> Tensor:
    """Rounds the columns `left` (columns, out) one by one, into `codes`; what each pushes on.

    All belong to one block, so that the arithmetic can be done in units of the codebook.
    """
    unit = maxima / codebook.peak
    scaled = left * (codebook.peak / maxima.clamp(min=SMALLEST_MAXIMUM * codebook.peak))
    values = codebook.values.to(left.device)
    errors = torch.empty_like(left)
    for j, diagonal in enumerate(factor.diagonal().tolist()):
        codes[j] = code = codebook.nearest(scaled[j])
        error = (scaled[j] - values.index_select(0, code.int())).div_(diagonal)
        scaled[j + 1 :].addr_(factor[j, j + 1 :], error, alpha=-1)
        errors[j] = error
    return errors.mul_(unit)


def _inverse_factor(hessian: Tensor, damping: float) -> Tensor:
    """The upper triangle U (in, in) of inverse(H) = U^T U, H with its diagonal damped."""
    damped = hessian.double()
    diagonal = damped.diagonal()
    added = damping * diagonal.mean()
    diagonal.add_(torch.where(diagonal == 0, 1.0, added))
    lower, failed = torch.linalg.cholesky_ex(damped)
    if not failed:
        upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
    if failed:
        raise ValueError(
            f"With damping={damping:g} the Hessian ({len(hessian)} inputs) is singular: the tokens "
            "do not tell all inputs apart. Raise damping to 0.01 or calibrate on more tokens."
        )
    return upper.float()


def awq(
    weight: Tensor,
    statistics: Statistics,
    format: str,
    block_size: int | str = 64,
    folded: bool = False,
) -> Rounded:
    """`weight` (out, in) rounded with its columns scaled by s = mean|x|^alpha, for the best alpha.

    21 alphas from 0 to 1 are tried, and the one with the smallest output error on the calibration
    tokens is kept. alpha = 0 is plain rounding, so that on those tokens the error is never larger
    than with that; where it wins, no scales are kept. The scales are rounded to bfloat16.

    Whoever runs Q(W s) has to divide the inputs by s. A dense model's s goes into the norm before
    the matrix. In a Mixture of Experts the router and all experts share that norm, so that an s of
    each expert's own has no place there: gate_proj and up_proj keep theirs, 16 bits an input. (One
    s for the whole block, the router included, could go into the norm; it is not tried here.)
    down_proj's fold into the rows of up_proj, since silu(gate x) * (up x / s) is
    (silu(gate x) * up x) / s; and as blocks lie in rows, that changes up_proj's block maxima and
    not one of its codes. `folded` says that it is so.

    In whole numbers 0.4 beside 1.0 goes to 0. If its input is 100 times as large as the other's, it
    is scaled up until it reaches a level:

    >>> seen = Statistics.of(torch.tensor([[100.0, 1.0]]))
    >>> awq(torch.tensor([[0.4, 1.0]]), seen, "int2", "row").weight
    tensor([[0.4000, 1.0051]])

    Raises ValueError as `gptq` does. Left out: the paper's clipping of the block maxima.
    """
    _check(weight, statistics, format, block_size)
    exact = weight.detach().float()
    typical = (statistics.magnitudes / statistics.magnitudes.mean()).clamp(min=SMALLEST_SHARE)
    scales = [(typical**exponent).bfloat16().float() for exponent in EXPONENTS]
    lost = []
    for s in scales:
        wrong = quantize(exact * s, format, block_size).dequantize() / s - exact
        lost.append(((wrong @ statistics.gram) * wrong).sum().item())
    best = lost.index(min(lost))
    quantized = quantize(exact * scales[best], format, block_size)
    quantized = replace(quantized, dtype=weight.dtype)
    return Rounded(quantized, "awq", scales[best] if best else None, folded)


def _check_damping(damping: float) -> None:
    if not 0 <= damping < math.inf:
        raise ValueError(f"damping={damping}: it is a share of the diagonal, 0 or more; try 0.01.")


def _check(
    weight: Tensor, statistics: Statistics, format: str, block_size: int | str
) -> tuple[Codebook, int]:
    """The codebook and the weights per block; ValueError if the two methods cannot do with them."""
    check_calibrated(format)
    if weight.dim() != 2 or weight.shape[1] != len(statistics.gram):
        raise ValueError(
            f"The weight has the shape {tuple(weight.shape)} and the statistics are of "
            f"{len(statistics.gram)} inputs; give (out, {len(statistics.gram)})."
        )
    if statistics.tokens == 0:
        raise ValueError("0 tokens were seen, at least 1 is needed; `rtn` can do without.")
    _check_finite("weight holds", weight)
    _check_finite("inputs' sums of squares hold", statistics.gram)
    if not weight.numel():
        raise ValueError(f"The weight of shape {tuple(weight.shape)} is empty.")
    size = weight.shape[1] if block_size == "row" else check_block_size(block_size)
    if weight.shape[1] % size:
        raise ValueError(
            f"Blocks of {size} do not divide rows of {weight.shape[1]} weights; take a smaller "
            'block or "row".'
        )
    return FORMATS[format].codebook, size


def check_calibrated(format: str) -> str:
    """`format` if its blocks have maxima to stretch a codebook to; ValueError if they have not."""
    if FORMATS[check_format(format)].codebook is None or format in MICROSCALED:
        able = (f.name for f in FORMATS.values() if f.codebook and f.name not in MICROSCALED)
        raise ValueError(
            f"{format} has no float32 block maxima, which calibrated rounding needs; formats that "
            f"have are {', '.join(able)}."
        )
    return format


@dataclass(frozen=True)
class Rounder:
    """How to round: a method, a format, its block size, and GPTQ's damping.

    >>> Rounder("gptq", "int3").of(weight, statistics).bits_per_weight
    3.5

    Raises ValueError for a method or a format that does not exist or cannot be calibrated.
    """

    method: str
    format: str
    block_size: int | str = 64
    damping: float = 0.01

    def __post_init__(self):
        if self.method not in METHODS:
            raise ValueError(
                f"Unknown method {self.method!r}; the methods are {', '.join(METHODS)}."
            )
        check_calibrated(self.format)
        if self.block_size != "row":
            check_block_size(self.block_size)
        _check_damping(self.damping)

    def of(self, weight: Tensor, statistics: Statistics, folded: bool = False) -> Rounded:
        """`weight` (out, in) rounded so; plainly if no token was seen. `folded` as in `awq`."""
        if self.method == "gptq" and statistics.tokens:
            return gptq(weight, statistics, self.format, self.block_size, self.damping)
        if self.method == "awq" and statistics.tokens:
            return awq(weight, statistics, self.format, self.block_size, folded)
        return Rounded(quantize(weight, self.format, self.block_size), "rtn")


# --------------------------------------------------------------------------- a layer and a model


@dataclass(frozen=True, eq=False)
class RoundedMatrix:
    """One matrix of one expert: what became of it, and the share of its output that is lost.

    `tokens` is how many it was calibrated on; the two errors are `Statistics.output_error` on those
    and on the held-out tokens of the same expert, NaN where there are none.
    """

    expert: int
    projection: str
    tokens: int
    rounded: Rounded
    calibration_error: float
    held_out_error: float


@dataclass(frozen=True, eq=False)
class RoundedLayer:
    """`layer` with rounded weights, and a record of each of its matrices."""

    layer: MoELayer
    matrices: tuple[RoundedMatrix, ...]

    @property
    def bits_per_weight(self) -> float:
        """Of the experts, every constant counted."""
        weights = sum(matrix.rounded.quantized.shape.numel() for matrix in self.matrices)
        return 8 * sum(matrix.rounded.stored_bytes for matrix in self.matrices) / weights

    @property
    def table(self) -> pd.DataFrame:
        """One row a matrix: expert, projection, tokens, method, errors, bits_per_weight."""
        return pd.DataFrame(
            {
                "expert": matrix.expert,
                "projection": matrix.projection,
                "tokens": matrix.tokens,
                "method": matrix.rounded.method,
                "calibration_error": matrix.calibration_error,
                "held_out_error": matrix.held_out_error,
                "bits_per_weight": matrix.rounded.bits_per_weight,
            }
            for matrix in self.matrices
        )


@torch.no_grad()
def round_expert(
    expert: SwiGLU,
    rounder: Rounder,
    seen: ExpertStatistics,
    judged: ExpertStatistics,
    index: int = 0,
) -> list[RoundedMatrix]:
    """What `rounder` makes of the three matrices of `expert`, which itself is left as it is.

    They are calibrated on what `seen` says of its tokens, and judged by `judged`; `index` is the
    number that the records bear.
    """
    matrices = []
    for projection in PROJECTIONS:
        weight = expert.get_parameter(f"{projection}.weight")
        of_tokens = seen.of(projection)
        rounded = rounder.of(weight, of_tokens, folded=projection == "down_proj")
        restored = rounded.weight
        errors = (
            statistics.output_error(weight, restored)
            for statistics in (of_tokens, judged.of(projection))
        )
        matrices.append(RoundedMatrix(index, projection, of_tokens.tokens, rounded, *errors))
    return matrices


@torch.no_grad()
def round_layer(
    layer: MoELayer,
    tokens: Tensor,
    rounder: Rounder,
    held_out: Tensor | None = None,
    every_token: bool = False,
) -> RoundedLayer:
    """A copy of `layer` whose experts are rounded, each by its own share of `tokens`.

    `tokens` (tokens, hidden) are what the layer is fed, and `held_out` more of the same, on which
    the errors are measured that count; the router keeps its weights. With `every_token` each expert
    is calibrated on all tokens, whoever they are routed to; held-out tokens are always its own.

    >>> rounded = round_layer(layer, tokens, Rounder("gptq", "int3"), held_out)
    >>> rounded.table.groupby("projection").held_out_error.mean()

    Raises ValueError for tokens of another width and for NaN or infinite values.
    """
    seen = expert_statistics(layer, tokens, every_token)
    judged = expert_statistics(layer, tokens[:0] if held_out is None else held_out)
    result, matrices = copy.deepcopy(layer), []
    for index, expert in enumerate(result.experts):
        for matrix in round_expert(expert, rounder, seen[index], judged[index], index):
            expert.get_parameter(f"{matrix.projection}.weight").copy_(matrix.rounded.weight)
            matrices.append(matrix)
    return RoundedLayer(result, tuple(matrices))


@dataclass(frozen=True, eq=False)
class RoundedModel:
    """What `rounded_experts` made of each layer of a model, in order."""

    layers: tuple[RoundedLayer, ...]

    @property
    def bits_per_weight(self) -> float:
        """Of the experts, every constant counted; layers are of one size."""
        return sum(layer.bits_per_weight for layer in self.layers) / len(self.layers)

    @property
    def table(self) -> pd.DataFrame:
        """The layers' tables under each other, with a first column `layer`."""
        tables = {index: layer.table for index, layer in enumerate(self.layers)}
        return pd.concat(tables, names=["layer", None]).reset_index("layer").reset_index(drop=True)


@contextmanager
def rounded_experts(
    model: nn.Module,
    token_ids: Tensor,
    rounder: Rounder,
    held_out: Tensor | None = None,
    every_token: bool = False,
) -> Iterator[RoundedModel]:
    """While the block lasts, `model` runs with all its experts rounded; what became of them.

    `model` is a Mixtral of transformers in 32 bits, or anything with Mixtral blocks at
    `model.model.layers[i].mlp`. Its experts are replaced by rounded ones, *simulated*, and are back
    afterwards, also after an error. `token_ids` and `held_out` (pages, tokens) are whole pages of
    one length.

    The layers are rounded one after the other, in a single pass over all pages: as it reaches a
    block, that block's inputs are at hand, as the rounded layers before it give them; its experts
    are rounded, and the pass goes on through them.

    >>> with rounded_experts(model, token_ids, Rounder("gptq", "int3")) as rounded:
    ...     print(rounded.bits_per_weight, cross_entropy(model, tokenizer).nats_per_token)

    Raises ValueError as `round_layer` does, and for pages of different lengths. Left out:
    calibration tokens in several passes, for models whose activations do not fit at once.
    """
    pages = token_ids if held_out is None else _stacked(token_ids, held_out)
    blocks = [decoder.mlp for decoder in model.model.layers]
    layers = []

    def round_block(block: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        calibration, judged = arguments[0].float().tensor_split([len(token_ids)])
        layer = MoELayer.from_transformers(block).float()
        layers.append(
            round_layer(
                layer, calibration.flatten(0, 1), rounder, judged.flatten(0, 1), every_token
            )
        )
        layers[-1].layer.write_to(block)

    with restored(weight for block in blocks for weight in block.parameters()):
        with torch.no_grad(), _hooked(blocks, round_block):
            model.model(input_ids=pages.to(model.device), use_cache=False)
        yield RoundedModel(tuple(layers))


@contextmanager
def restored(weights: Iterable[Tensor]) -> Iterator[None]:
    """Inside, `weights` may be written to; after it, an error too, they are what they were."""
    originals = [(weight.detach(), weight.detach().clone()) for weight in weights]
    try:
        yield
    finally:
        for weight, original in originals:
            weight.copy_(original)


@contextmanager
def _hooked(modules: Iterable[nn.Module], hook: Callable) -> Iterator[None]:
    handles = [module.register_forward_pre_hook(hook) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _stacked(token_ids: Tensor, held_out: Tensor) -> Tensor:
    if token_ids.shape[1:] != held_out.shape[1:]:
        raise ValueError(
            f"The pages have the shapes {tuple(token_ids.shape)} and {tuple(held_out.shape)}; cut "
            "both to one length."
        )
    return torch.cat([token_ids, held_out])


# ------------------------------------------------------------------ any model, matrix by matrix


@dataclass(frozen=True)
class RoundedPart:
    """One matrix of a model: how it was rounded, on how many tokens, and the bytes it takes.

    `method` is the one that was used: "rtn" where no token was seen.
    """

    part: Part
    tokens: int
    method: str
    stored_bytes: int


@torch.no_grad()
def round_model(
    model: nn.Module, token_ids: Tensor, rounder_of: Callable[[Part], Rounder | None]
) -> tuple[RoundedPart, ...]:
    """Rounds `model` in place, matrix by matrix, in one pass over `token_ids`; what was done.

    `rounder_of` says how each `Part` is rounded, and None where it is left alone. Linear layers and
    fused experts can be rounded, in Mixtral, OLMoE, Qwen3-MoE, DeepSeek and others built like them.
    As the pass over the pages (pages, tokens) reaches a module, its inputs are at hand, as what
    stands before it, rounded already, gives them. An expert's three matrices are calibrated on what
    they are fed before any of the three is rounded, as in `round_layer`. What no token reaches is
    rounded plainly.

    Raises ValueError, before anything is changed, as `check_token_ids` does and for a matrix that
    is in neither; and, with the name of the matrix, as `gptq` does: then some are rounded. Put it
    `with restored(model.parameters())`.
    """
    check_token_ids(model, token_ids)
    waiting, done = _modules_to_round(model, rounder_of), []

    def meet(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        if name := waiting.pop(module, None):
            done.extend(_round_module(module, name, arguments, rounder_of))

    head = model.get_output_embeddings()
    reader = model if head in waiting else model.base_model
    with _hooked(list(waiting), meet):
        reader(input_ids=token_ids.to(model.device), use_cache=False)
    for module in list(waiting):
        weight = next(module.parameters())
        meet(module, (weight.new_zeros(0, weight.shape[-1]), weight.new_zeros(0, 1)))
    return tuple(done)


def check_token_ids(model: nn.Module, token_ids: Tensor) -> None:
    """ValueError unless `token_ids` are pages of tokens, (pages, tokens), that `model` knows."""
    wanted = (
        "give token ids, a tensor of whole numbers (pages, tokens): "
        'tokenizer(..., return_tensors="pt")["input_ids"].'
    )
    if not isinstance(token_ids, Tensor):
        raise ValueError(f"The calibration tokens are a {type(token_ids).__name__}; {wanted}")
    if token_ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"The calibration tokens are of {token_ids.dtype}; {wanted}")
    if token_ids.dim() != 2 or not token_ids.numel():
        raise ValueError(
            f"The calibration tokens have the shape {tuple(token_ids.shape)}; give (pages, "
            "tokens), at least one of each."
        )
    last = len(model.get_input_embeddings().weight) - 1
    if token_ids.min() < 0 or token_ids.max() > last:
        raise ValueError(
            f"The calibration tokens are from {token_ids.min():,} to {token_ids.max():,}, and this "
            f"model knows 0 to {last:,}: take those of its own tokenizer."
        )


def folds(part: Part, rounder_of: Callable[[Part], Rounder | None]) -> bool:
    """Whether AWQ's scales of `part`'s inputs cost nothing, since another matrix absorbs them.

    down_proj's do, in experts, shared experts and dense MLPs: up_proj's block maxima are divided by
    them (see `awq`), where up_proj has such maxima. All others stay, 16 bits an input. In attention
    that is because q_proj, k_proj and v_proj share the norm before them and each has scales of its
    own, and because several heads read a row of v_proj, which o_proj's would have to go into.
    """
    return part.projection == "down_proj" and bool(rounder_of(replace(part, projection="up_proj")))


def _modules_to_round(
    model: nn.Module, rounder_of: Callable[[Part], Rounder | None]
) -> dict[nn.Module, str]:
    """The modules that hold something to round, and their names; a shared weight counts once."""
    found = {}
    for name, parameter in model.named_parameters():
        owner = name.rpartition(".")[0]
        weights = matrices(name, tuple(parameter.shape))
        if any(len(weight.shape) == 2 and rounder_of(weight.part) for weight in weights):
            module = model.get_submodule(owner)
            if not (isinstance(module, nn.Linear) or _is_fused(module)):
                raise ValueError(
                    f"{name} belongs to a {type(module).__name__}, whose inputs cannot be told: "
                    'only linear layers and fused experts can be calibrated. Take the method "rtn".'
                )
            found[module] = owner
    return found


def _is_fused(module: nn.Module) -> bool:
    """Whether it holds gate_up_proj (experts, 2 x ffn, hidden), down_proj, and nothing else."""
    held = dict(module.named_parameters())
    if set(held) != {"gate_up_proj", "down_proj"} or held["down_proj"].dim() != 3:
        return False
    experts, hidden, ffn = held["down_proj"].shape
    return held["gate_up_proj"].shape == (experts, 2 * ffn, hidden)


def _round_module(
    module: nn.Module,
    name: str,
    arguments: tuple[Tensor, ...],
    rounder_of: Callable[[Part], Rounder | None],
) -> Iterator[RoundedPart]:
    for part, weight, statistics in _fed(module, name, arguments):
        if rounder := rounder_of(part):
            try:
                rounded = rounder.of(weight.float(), statistics, folds(part, rounder_of))
            except ValueError as stop:
                raise ValueError(f"{part.path}: {stop}") from None
            weight.copy_(rounded.weight)
            yield RoundedPart(part, statistics.tokens, rounded.method, rounded.stored_bytes)


def _fed(
    module: nn.Module, name: str, arguments: tuple[Tensor, ...]
) -> Iterator[tuple[Part, Tensor, Statistics]]:
    """Each matrix of `module`, a view of it, and what it is fed when called with `arguments`."""
    tokens = arguments[0].flatten(0, -2).float()
    if isinstance(module, nn.Linear):
        yield part_of(f"{name}.weight"), module.weight.detach(), Statistics.of(tokens)
        return
    place = part_of(f"{name}.down_proj")
    weights = zip(module.gate_up_proj.detach(), module.down_proj.detach(), strict=True)
    for index, (gate_up, down) in enumerate(weights):
        x = tokens[(arguments[1] == index).any(dim=1)]
        gate, up = gate_up.chunk(2)
        middle = module.act_fn(F.linear(x, gate.float())) * F.linear(x, up.float())
        seen = ExpertStatistics(Statistics.of(x), Statistics.of(middle))
        for projection, weight in zip(PROJECTIONS, (gate, up, down), strict=True):
            part = replace(place, expert=index, projection=projection)
            yield part, weight, seen.of(projection)
