"""What becomes of a weight matrix in each format, and how many bytes it then takes.

Quantizing has three parts. The weights are cut into *blocks* that lie one after the other in a row.
Each block keeps its largest magnitude, its *block maximum*, so that the levels of a codebook can be
stretched over it. And each weight becomes the *code* of the level nearest to it:

    scaled = weight * peak / maximum      between -peak and peak, the codebook's ends
    code   = nearest(scaled)              a few bits, packed without gaps
    weight ≈ levels[code] * maximum / peak

So a 4-bit weight is not 4 bits: with a float32 maximum for each block of 64 it is 4 + 32 / 64 =
4.5. **Double quantization** stores the block maxima in 8 bits, in groups of 256 that share one
float32 (QLoRA, arXiv:2305.14314, section 3): 4 + 8 / 64 + 32 / (64 * 256) = 4.127. The microscaled
formats fix their block and their scale: MXFP4 a power of two for 32 weights, NVFP4 an 8-bit float
for 16 weights and a float32 for the whole matrix.
"""

import math
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property

import torch

from .codebooks import CODEBOOKS, Codebook, Table, dynamic_map, unsigned

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
NESTED_BLOCK = 256
DYNAMIC_MAP = dynamic_map()
SMALLEST_MAXIMUM = 1e-38
_LARGEST = torch.finfo(torch.float32).max
NESTED_GRID = 2**16 - 1


@dataclass(frozen=True)
class Format:
    """How one weight is stored: `weight_bits` for itself, and which constants come with it.

    `scaled` says what shares a constant where a model is stored in the format: "block" (a float32
    per block, or 8 bits of it), "row" (a float32 per row), "own" (blocks and scales of the
    format's own, see `MICROSCALED`), or "" for a plain floating-point number, which is a torch
    `dtype` and has no codebook. `storable` formats can be stored and computed with in a model; the
    others can be studied.
    """

    name: str
    weight_bits: int
    scaled: str = ""
    codebook: Codebook | None = None
    dtype: torch.dtype | None = None
    storable: bool = False


def _formats() -> dict[str, Format]:
    plain = [
        Format(name, dtype.itemsize * 8, dtype=dtype, storable=True)
        for name, dtype in _DTYPES.items()
    ]
    in_blocks = [
        Format(name, codebook.bits, "block", codebook, storable=name in ("nf4", "fp4"))
        for name, codebook in CODEBOOKS.items()
        if name not in ("int8", "e2m1", "e4m3")
    ]
    others = [
        Format("int8", 8, "row", CODEBOOKS["int8"], storable=True),
        Format("fp8_e4m3", 8, "block", CODEBOOKS["e4m3"]),
        Format("mxfp4", 4, "own", CODEBOOKS["e2m1"]),
        Format("nvfp4", 4, "own", CODEBOOKS["e2m1"]),
    ]
    return {format.name: format for format in plain + in_blocks + others}


_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
FORMATS = _formats()
STORABLE = tuple(format.name for format in FORMATS.values() if format.storable)


def check_format(name: str) -> str:
    """`name` if it is a format; ValueError with the names that are, if it is not."""
    if not isinstance(name, str) or name not in FORMATS:
        meant = get_close_matches(str(name).lower(), FORMATS, n=1)
        guess = f" Did you mean {meant[0]!r}?" if meant else ""
        raise ValueError(f"Unknown format {name!r}; the formats are {', '.join(FORMATS)}.{guess}")
    return name


def check_storable(name: str) -> str:
    """`name` if a model can be stored in it; ValueError with the formats that can be, if not."""
    if not FORMATS[check_format(name)].storable:
        raise ValueError(
            f"{name} can be studied, not stored in a model; what can be is {', '.join(STORABLE)}."
        )
    return name


def check_block_size(block_size: int) -> int:
    """`block_size` if blocks can have it; ValueError with the sizes that they can have, if not."""
    if type(block_size) is not int or block_size not in BLOCK_SIZES:
        sizes = ", ".join(map(str, BLOCK_SIZES))
        raise ValueError(f"Block size {block_size!r} is not one of {sizes}.")
    return block_size


# ----------------------------------------------------------------------------- the blocks' scales


@dataclass(frozen=True, eq=False)
class Maxima:
    """One float32 per block: its largest magnitude. A codebook unit stands for maximum / peak."""

    maxima: torch.Tensor
    peak: float

    @cached_property
    def units(self) -> torch.Tensor:
        return self.maxima / self.peak

    @property
    def stored_bytes(self) -> int:
        return 4 * self.maxima.numel()


@dataclass(frozen=True, eq=False)
class NestedMaxima:
    """Block maxima in 8 bits: double quantization.

    Their mean is taken off as `offset`, what remains is quantized in groups of 256 with the dynamic
    map: `codes` (blocks,) uint8 and `group_maxima` (groups,) float32. arXiv:2305.14314, section 3.
    """

    codes: torch.Tensor
    group_maxima: torch.Tensor
    offset: torch.Tensor
    peak: float

    @classmethod
    def of(cls, maxima: torch.Tensor, peak: float) -> "NestedMaxima":
        """The nearest map level for each maximum, byte for byte as bitsandbytes' CPU code has it.

        That code rounds to one of 65,536 steps before it looks up the nearest level, so that a
        maximum within 1/65,536 of a midpoint may go to the next level; a group of nothing but
        zeros gets code 0.
        """
        offset = maxima.mean()
        groups = _padded(maxima - offset, NESTED_BLOCK)
        group_maxima = groups.abs().amax(dim=1)
        scaled = (groups * (1 / group_maxima)[:, None]).clamp(-1, 1)
        step = ((scaled + 1) * 0.5 * NESTED_GRID + 0.5).nan_to_num(0).floor()
        codes = DYNAMIC_MAP.nearest(-1 + 2 * step / NESTED_GRID)
        codes[group_maxima == 0] = 0
        return cls(codes.flatten()[: maxima.numel()], group_maxima, offset, peak)

    @cached_property
    def units(self) -> torch.Tensor:
        levels = DYNAMIC_MAP.values.to(self.codes.device)[_padded(self.codes, NESTED_BLOCK).long()]
        maxima = (levels * self.group_maxima[:, None]).flatten()[: self.codes.numel()] + self.offset
        return maxima / self.peak

    @property
    def stored_bytes(self) -> int:
        return self.codes.numel() + 4 * self.group_maxima.numel() + 4


@dataclass(frozen=True, eq=False)
class PowersOfTwo:
    """MXFP4's scales: `exponents` (blocks,) uint8, a unit being 2^(exponent - 127).

    OCP Microscaling Formats 1.0, section 6.3, rounds the exponent down, so that up to a quarter of
    a block's largest weight is cut off; here it is rounded up, so that no weight moves by more than
    half a step. On heavy-tailed weights that loses a little more on the whole (notebook 02).
    """

    exponents: torch.Tensor

    @classmethod
    def of(cls, maxima: torch.Tensor, peak: float) -> "PowersOfTwo":
        fraction, exponent = torch.frexp(maxima / peak)
        exponent = exponent - (fraction == 0.5).int()
        return cls((exponent + 127).clamp(0, 254).to(torch.uint8))

    @cached_property
    def units(self) -> torch.Tensor:
        ones = torch.ones_like(self.exponents, dtype=torch.float32)
        return torch.ldexp(ones, self.exponents.int() - 127)

    @property
    def stored_bytes(self) -> int:
        return self.exponents.numel()


@dataclass(frozen=True, eq=False)
class Float8Scales:
    """NVFP4's scales: `codes` (blocks,) in FP8 E4M3, times one float32 for the whole matrix.

    A scale is rounded to the nearest, but up where its block's largest weight would otherwise be
    cut off by more than half a step.
    """

    codes: torch.Tensor
    whole: torch.Tensor

    @classmethod
    def of(cls, maxima: torch.Tensor, peak: float) -> "Float8Scales":
        e4m3 = CODEBOOKS["e4m3"]
        whole = (maxima.amax() / (peak * e4m3.peak)).clamp(min=SMALLEST_MAXIMUM)
        exact = maxima / (peak * whole)
        codes = e4m3.nearest(exact)
        half_step_over_peak = (peak + 1) / peak
        cut_off = exact > e4m3.values.to(codes.device)[codes.long()] * half_step_over_peak
        return cls(codes + cut_off.to(torch.uint8), whole)

    @cached_property
    def units(self) -> torch.Tensor:
        return CODEBOOKS["e4m3"].values.to(self.codes.device)[self.codes.long()] * self.whole

    @property
    def stored_bytes(self) -> int:
        return self.codes.numel() + 4


@dataclass(frozen=True)
class Microscaled:
    """A format's own block size and kind of scale: a byte a block, and bytes for the whole."""

    block_size: int
    scales: type[PowersOfTwo] | type[Float8Scales]
    whole_bytes: int


MICROSCALED = {"mxfp4": Microscaled(32, PowersOfTwo, 0), "nvfp4": Microscaled(16, Float8Scales, 4)}


# -------------------------------------------------------------------------- quantizing, and back


@dataclass(frozen=True, eq=False)
class Quantized:
    """A weight in a format: its codes, the blocks' scales, and what is needed to go back.

    `codes` holds a byte for each weight (uint8), to compute with; `packed` is how they are stored,
    without gaps, the first code in the highest bits, and what `stored_bytes` counts. `block_size`
    is the number of weights that share a scale. `minima` is there only if the levels are counted
    from each block's minimum instead of from zero.

    The codebook belongs to the format and is not counted among the bytes; `stored_bytes` of this
    module adds what a model carries of it for each matrix.
    """

    format: str
    codes: torch.Tensor
    dtype: torch.dtype
    block_size: int
    scales: Maxima | NestedMaxima | PowersOfTwo | Float8Scales
    minima: torch.Tensor | None = None

    @property
    def codebook(self) -> Codebook:
        codebook = FORMATS[self.format].codebook
        return codebook if self.minima is None else unsigned(codebook.bits)

    @property
    def shape(self) -> torch.Size:
        return self.codes.shape

    @property
    def packed(self) -> torch.Tensor:
        """The codes as they are stored, uint8 (bytes,)."""
        return pack(self.codes.flatten(), self.codebook)

    @property
    def stored_bytes(self) -> int:
        codes_bytes = math.ceil(self.shape.numel() * self.codebook.bits / 8)
        minima_bytes = 0 if self.minima is None else 4 * self.minima.numel()
        return codes_bytes + self.scales.stored_bytes + minima_bytes

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.stored_bytes / self.shape.numel()

    def dequantize(self) -> torch.Tensor:
        """The weight as codes and scales give it, in its old shape and dtype."""
        values = self.codebook.values.to(self.codes.device)[self.codes.flatten().int()]
        blocks = _padded(values, self.block_size) * self.scales.units[:, None]
        if self.minima is not None:
            blocks = blocks + self.minima[:, None]
        largest = min(torch.finfo(self.dtype).max, _LARGEST)
        flat = blocks.flatten()[: self.shape.numel()].clamp(-largest, largest)
        return flat.view(self.shape).to(self.dtype)


def quantize(
    weight: torch.Tensor,
    format: str,
    block_size: int | str = 64,
    double_quant: bool = False,
    asymmetric: bool = False,
) -> Quantized:
    """`weight`, of any shape, in `format`: codes and scales, nothing kept of the original.

    `block_size` weights in a row share a scale; "row" and "tensor" give one scale to each row or to
    everything. `double_quant` keeps block maxima in 8 bits. `asymmetric`, for integers, stretches
    the levels from a block's minimum to its maximum instead of evenly around zero. MXFP4 and NVFP4
    have blocks and scales of their own, which neither of these changes.

    >>> quantize(torch.tensor([0.1, -0.5, 0.3, 1.0]), "int4").dequantize()
    tensor([ 0.1429, -0.5714,  0.2857,  1.0000])

    NF4 and FP4 equal `bitsandbytes.functional.quantize_4bit` on a CPU byte for byte, INT8 with
    block_size "row" its `int8_vectorwise_quant` (a row whose largest magnitude is below 1.3e-36
    apart, where that one overflows).

    Raises ValueError for an unknown format, a format without codes (bf16), a block size that does
    not exist, an empty weight, or one that holds NaN or infinite values; TypeError for integers.
    """
    codebook = _codebook(format)
    flat = _checked(weight)
    size = _weights_per_block(weight, block_size)
    if asymmetric:
        _check_asymmetric(format, double_quant)
        return _quantize_asymmetric(weight, flat, format, size)
    if format in MICROSCALED:
        return _quantize_microscaled(weight, flat, format, codebook)
    maxima = _padded(flat, size).abs().amax(dim=1)
    scaled = _scaled(flat, maxima, size, codebook.peak)
    scales = (NestedMaxima.of if double_quant else Maxima)(maxima, codebook.peak)
    codes = codebook.nearest(scaled).view(weight.shape)
    return Quantized(format, codes, weight.dtype, size, scales)


@dataclass(frozen=True, eq=False)
class Rounding:
    """A weight beside what a format makes of it: what was lost, and where the levels lie.

    >>> weight = torch.tensor([0.1, -0.5, 0.3, 1.0])
    >>> rounding = Rounding(weight, quantize(weight, "int4"))
    >>> rounding.relative_error, rounding.positions
    (0.0727..., tensor([ 0.1000, -0.5000,  0.3000,  1.0000]))

    The rounded weights are kept in their old dtype; only `quantized` holds packed bytes.
    """

    weight: torch.Tensor
    quantized: Quantized

    @cached_property
    def error(self) -> torch.Tensor:
        """By how much each weight moved, float32, in the weight's shape."""
        return self.quantized.dequantize().float() - self.weight.float()

    @property
    def relative_error(self) -> float:
        """The root of the mean squared error over that of the weights: 0.1 is a tenth lost."""
        return _ratio(self.error.norm(), self.weight.float().norm())

    @property
    def relative_absolute_error(self) -> float:
        """The mean of the error's magnitude over that of the weights."""
        return _ratio(self.error.abs().mean(), self.weight.float().abs().mean())

    @cached_property
    def positions(self) -> torch.Tensor:
        """Where each weight lies among its block's levels: -1 the lowest, 1 the highest."""
        blocks = _padded(self.weight.detach().reshape(-1).float(), self.quantized.block_size)
        spans = (self.quantized.scales.units * self.quantized.codebook.peak)[:, None]
        if self.quantized.minima is None:
            positions = (blocks / spans).nan_to_num(0)
        else:
            positions = 2 * ((blocks - self.quantized.minima[:, None]) / spans).nan_to_num(0) - 1
        return positions.flatten()[: self.weight.numel()].view(self.weight.shape)

    @property
    def levels(self) -> torch.Tensor:
        """The codebook's levels on the scale of `positions`."""
        levels = self.quantized.codebook.levels / self.quantized.codebook.peak
        return levels if self.quantized.minima is None else 2 * levels - 1


def relative_error(weight: torch.Tensor, rounded: torch.Tensor) -> float:
    """The length of the difference over the length of the weight: 0.1 is a tenth lost.

    >>> relative_error(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 3.5]))
    0.1
    """
    weight, rounded = weight.double(), rounded.double()
    return _ratio((weight - rounded).norm(), weight.norm())


def _ratio(lost: torch.Tensor, whole: torch.Tensor) -> float:
    """The share that is lost; nothing can be lost of nothing."""
    return (lost / whole).item() if lost else 0.0


def _scaled(flat: torch.Tensor, maxima: torch.Tensor, size: int, peak: float) -> torch.Tensor:
    """The weights stretched to -peak ... peak, in the very order of operations of bitsandbytes.

    Whole blocks are multiplied by the maximum's inverse. A last block that is not whole is divided,
    which can round differently, and its maximum is kept away from zero.
    """
    whole = flat.numel() // size * size
    inverse = peak / maxima.clamp(min=SMALLEST_MAXIMUM * peak)
    scaled = flat[:whole].view(-1, size) * inverse[: whole // size, None]
    if whole == flat.numel():
        return scaled.flatten().clamp(-peak, peak)
    maxima[-1].clamp_(min=SMALLEST_MAXIMUM)
    last = flat[whole:] / maxima[-1] * peak
    return torch.cat([scaled.flatten(), last]).clamp(-peak, peak)


def _quantize_microscaled(
    weight: torch.Tensor, flat: torch.Tensor, format: str, codebook: Codebook
) -> Quantized:
    own = MICROSCALED[format]
    blocks = _padded(flat, own.block_size)
    scales = own.scales.of(blocks.abs().amax(dim=1), codebook.peak)
    scaled = (blocks / scales.units[:, None]).nan_to_num(0).flatten()[: weight.numel()]
    codes = codebook.nearest(scaled).view(weight.shape)
    return Quantized(format, codes, weight.dtype, own.block_size, scales)


def _quantize_asymmetric(
    weight: torch.Tensor, flat: torch.Tensor, format: str, size: int
) -> Quantized:
    codebook = unsigned(FORMATS[format].codebook.bits)
    last = flat[-1:].expand(-flat.numel() % size)
    blocks = torch.cat([flat, last]).view(-1, size)
    minima = blocks.amin(dim=1)
    scales = Maxima((blocks.amax(dim=1) - minima).clamp(max=_LARGEST), codebook.peak)
    from_minimum = (blocks - minima[:, None]) / scales.units[:, None]
    scaled = from_minimum.nan_to_num(0).flatten()[: flat.numel()]
    codes = codebook.nearest(scaled).view(weight.shape)
    return Quantized(format, codes, weight.dtype, size, scales, minima)


def _padded(flat: torch.Tensor, size: int) -> torch.Tensor:
    """(n,) -> (blocks, size), filled up with zeros."""
    return torch.nn.functional.pad(flat, (0, -flat.numel() % size)).view(-1, size)


def _codebook(format: str) -> Codebook:
    codebook = FORMATS[check_format(format)].codebook
    if codebook is None:
        raise ValueError(f"{format} has no codes: `weight.to(dtype)` is all there is to it.")
    return codebook


def _weights_per_block(weight: torch.Tensor, block_size: int | str) -> int:
    if block_size == "row":
        return weight.shape[-1] if weight.dim() else 1
    return weight.numel() if block_size == "tensor" else check_block_size(block_size)


def _checked(weight: torch.Tensor) -> torch.Tensor:
    """The weights one after the other in float32, if they are numbers that can be quantized."""
    if not isinstance(weight, torch.Tensor):
        kind = type(weight).__name__
        raise TypeError(f"A {kind} cannot be quantized; give a tensor: torch.tensor(...).")
    if not weight.is_floating_point():
        raise TypeError(f"A weight of {weight.dtype} cannot be quantized; give floating point.")
    if weight.numel() == 0:
        raise ValueError(f"The weight of shape {tuple(weight.shape)} is empty.")
    flat = weight.detach().reshape(-1).float()
    finite = torch.isfinite(flat)
    if not finite.all():
        bad = weight.numel() - int(finite.sum())
        raise ValueError(
            f"The weight holds {bad:,} NaN or infinite values among {weight.numel():,}; each would "
            "ruin its whole block. Find where they come from before quantizing."
        )
    return flat


def _check_asymmetric(format: str, double_quant: bool) -> None:
    if not format.startswith("int"):
        raise ValueError(f"Only integers can be asymmetric, and {format} is none; try int4.")
    if double_quant:
        raise ValueError(
            "Asymmetric blocks keep two constants, and double quantization is for one; choose."
        )


# ----------------------------------------------------------------------------------- packed codes


def pack(codes: torch.Tensor, codebook: Codebook) -> torch.Tensor:
    """Codes (n,) as bytes without gaps, the first code in the highest bits of the first byte.

    Eight codes of k bits are k bytes. What fills up the last byte are codes for zero.

    >>> pack(torch.tensor([1, 2, 3], dtype=torch.uint8), CODEBOOKS["fp4"])
    tensor([18, 48], dtype=torch.uint8)
    """
    bits = codebook.bits
    used_bytes = math.ceil(codes.numel() * bits / 8)
    zero = codebook.nearest(torch.zeros(-codes.numel() % 8, device=codes.device))
    eights = torch.cat([codes, zero]).view(-1, 8).long()
    word = torch.zeros_like(eights[:, 0])
    for code in eights.unbind(dim=1):
        word = word << bits | code
    in_bytes = [word >> 8 * (bits - 1 - index) & 255 for index in range(bits)]
    return torch.stack(in_bytes, dim=1).flatten()[:used_bytes].to(torch.uint8)


# ------------------------------------------------------------------------------ bytes in a model


def stored_bytes(
    name: str, rows: int, columns: int, block_size: int = 64, double_quant: bool = True
) -> int:
    """Bytes of a (rows, columns) weight matrix that a model stores in the format `name`.

    Every constant is counted, and the codebooks that each matrix carries: 16 float32 levels of NF4
    or FP4, and 256 more with double quantization. INT8 has a scale per row whatever the block size,
    for so it is stored. One matrix of a Mixtral expert, 14336 x 4096, in NF4:

    >>> stored_bytes("nf4", 14336, 4096) * 8 / (14336 * 4096)
    4.127...

    Raises ValueError for an unknown format or block size. Left out: the 100 or so bytes of names
    and shapes that a file adds for each tensor.
    """
    if rows < 1 or columns < 1:
        raise ValueError(f"A matrix of {rows} x {columns} weights is empty.")
    stored = FORMATS[check_format(name)]
    weights = rows * columns
    weight_bytes = math.ceil(weights * stored.weight_bits / 8)
    if stored.scaled == "row":
        return weight_bytes + 4 * rows
    if stored.scaled == "own":
        own = MICROSCALED[name]
        return weight_bytes + math.ceil(weights / own.block_size) + own.whole_bytes
    if stored.scaled == "block":
        blocks = math.ceil(weights / check_block_size(block_size))
        codebook_bytes = 4 * 2**stored.weight_bits if isinstance(stored.codebook, Table) else 0
        return weight_bytes + codebook_bytes + _block_constants_bytes(blocks, double_quant)
    return weight_bytes


def _block_constants_bytes(blocks: int, double_quant: bool) -> int:
    if not double_quant:
        return 4 * blocks
    offset_bytes = 4
    return blocks + 256 * 4 + 4 * math.ceil(blocks / NESTED_BLOCK) + offset_bytes
