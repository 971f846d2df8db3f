"""The values that each format can represent, and where they come from.

To quantize is to keep, instead of a number, the index of the nearest entry in a short list: the
*codebook*. The index is the *code*. Four ideas of what to put in the list:

- **integers** (`int2` to `int8`): evenly spaced, the same number of levels below zero as above.
- **quantiles of a normal distribution** (`nf2` to `nf8`): trained weights crowd around zero, so
  the levels crowd there too, and every level is used about equally often. Zero itself is a level.
  NF4 is the one of QLoRA (arXiv:2305.14314, section 3 and appendix E).
- **small floating-point numbers** (`e2m1`, `e4m3`): a sign, an exponent and a mantissa, so that the
  spacing doubles from one power of two to the next (OCP Microscaling Formats 1.0, section 5.3).
- **a hand-made mixture** (bitsandbytes' `fp4`, and the 8-bit map of double quantization): decades
  or powers of two with some linear steps inside each.

A codebook counts in units of its own: `int8` in whole numbers up to 127, `nf4` up to 1, `e2m1` up
to 6. That largest magnitude is its *peak*, which a block's largest weight is stretched to.
"""

from dataclasses import dataclass
from functools import cached_property
from statistics import NormalDist

import torch


@dataclass(frozen=True, eq=False)
class Codebook:
    """What each code stands for: `values` (codes,), float32, NaN where a code stands for nothing.

    >>> CODEBOOKS["int2"].levels
    tensor([-1.,  0.,  1.])
    >>> CODEBOOKS["int2"].nearest(torch.tensor([-0.6, 0.4, 0.9]))
    tensor([3, 0, 1], dtype=torch.uint8)

    Here 3 is -1 in two bits of two's complement, and 2, which would be -2, stands for nothing.
    """

    values: torch.Tensor

    @property
    def bits(self) -> int:
        return (len(self.values) - 1).bit_length()

    @cached_property
    def levels(self) -> torch.Tensor:
        """The numbers that it can represent, each once, in rising order."""
        return self.values[self.values.isfinite()].unique()

    @cached_property
    def lowest(self) -> float:
        return self.levels[0].item()

    @cached_property
    def peak(self) -> float:
        """The highest level: what a block's largest weight is stretched to."""
        return self.levels[-1].item()

    def nearest(self, scaled: torch.Tensor) -> torch.Tensor:
        """The code (uint8) of the level nearest to each number; beyond the ends, of the last."""
        raise NotImplementedError


class Integers(Codebook):
    """Evenly spaced levels, in two's complement, or from 0 if unsigned; a tie goes to the even."""

    def nearest(self, scaled: torch.Tensor) -> torch.Tensor:
        whole = scaled.round().clamp(self.lowest, self.peak).to(torch.int16)
        return (whole & (len(self.values) - 1)).to(torch.uint8)


class Table(Codebook):
    """Any list of levels; a tie goes to the lower one. `order` are its codes by rising value."""

    @cached_property
    def order(self) -> torch.Tensor:
        return self.values.argsort(stable=True).to(torch.uint8)

    @cached_property
    def midpoints(self) -> torch.Tensor:
        ordered = self.values[self.order.long()]
        return (ordered[:-1] + ordered[1:]) / 2

    def nearest(self, scaled: torch.Tensor) -> torch.Tensor:
        device = scaled.device
        position = torch.bucketize(scaled, self.midpoints.to(device), out_int32=True)
        return self.order.to(device)[position]


class SmallFloats(Codebook):
    """A sign bit before magnitudes in rising order; a tie goes to the even code, as in IEEE 754."""

    @cached_property
    def magnitudes(self) -> torch.Tensor:
        positive = self.values[: len(self.values) // 2]
        return positive[positive.isfinite()]

    def nearest(self, scaled: torch.Tensor) -> torch.Tensor:
        magnitudes = self.magnitudes.to(scaled.device)
        midpoints = (magnitudes[:-1] + magnitudes[1:]) / 2
        lower = torch.bucketize(scaled.abs(), midpoints, out_int32=True)
        upper = torch.bucketize(scaled.abs(), midpoints, out_int32=True, right=True)
        code = torch.where(lower % 2 == 0, lower, upper)
        return (code + scaled.signbit() * (len(self.values) // 2)).to(torch.uint8)


def integers(bits: int) -> Codebook:
    """Whole numbers from -(2^(bits-1) - 1) to 2^(bits-1) - 1, in two's complement.

    The most negative number of two's complement is left out, so that the levels are symmetric: 255
    of 256 for 8 bits, but only 3 of 4 for 2.
    """
    half = 2 ** (bits - 1)
    values = torch.arange(2**bits, dtype=torch.float32)
    values[half:] -= 2**bits
    values[half] = torch.nan
    return Integers(values)


def unsigned(bits: int) -> Codebook:
    """Whole numbers from 0 to 2^bits - 1: every code is used, counted from a block's minimum."""
    return Integers(torch.arange(2**bits, dtype=torch.float32))


def normal_float(bits: int) -> Codebook:
    """Quantiles of the normal distribution, as NF4 places them, for any number of bits.

    1. Cut the upper half of the distribution into 2^(bits-1) parts of equal probability, and the
       lower half into one part fewer, since zero takes a code too.
    2. A level is the quantile at a part's outer edge. The outermost edge would lie at infinity; it
       is moved inwards to the mean of what half a part of the finer and of the coarser division
       would leave outside, to 7 digits: 0.9677083 for 4 bits.
    3. Divide by the largest, so that the levels reach from -1 to 1.

    >>> CODEBOOKS["nf2"].levels
    tensor([-1.0000,  0.0000,  0.4358,  1.0000])

    NF4 is QLoRA's (arXiv:2305.14314, section 3), whose text takes the means of neighbouring
    quantiles; its published levels (appendix E) follow the rule above, which its code has. For 4
    bits this equals them to the last bit; other bits are this lab's extension of the rule.
    """
    codes = 2**bits
    outermost = round(1 - (1 / (2 * codes) + 1 / (2 * (codes - 1))) / 2, 7)

    def quantiles(levels: int) -> list[float]:
        probabilities = torch.linspace(outermost, 0.5, levels + 1)[:-1]
        return [NormalDist().inv_cdf(probability) for probability in probabilities.tolist()]

    upper, lower = quantiles(codes // 2), quantiles(codes // 2 - 1)
    values = torch.tensor([*upper, 0.0, *(-level for level in lower)]).sort().values
    return Table(values / values.max())


def small_float(exponent_bits: int, mantissa_bits: int) -> Codebook:
    """Floating-point numbers of a few bits: sign, exponent, mantissa, without infinities.

    With exponent code e and mantissa code m the magnitude is (1 + m / 2^mantissa_bits) * 2^(e -
    bias), and for e = 0 it is m / 2^mantissa_bits * 2^(1 - bias). The bias is
    2^(exponent_bits-1) - 1.

    >>> CODEBOOKS["e2m1"].levels[7:]
    tensor([0.0000, 0.5000, 1.0000, 1.5000, 2.0000, 3.0000, 4.0000, 6.0000])
    """
    codes = torch.arange(2 ** (exponent_bits + mantissa_bits))
    exponent, fraction = codes >> mantissa_bits, (codes % 2**mantissa_bits) / 2**mantissa_bits
    bias = 2 ** (exponent_bits - 1) - 1
    magnitudes = torch.where(
        exponent == 0,
        torch.ldexp(fraction, torch.tensor(1 - bias)),
        torch.ldexp(1 + fraction, exponent - bias),
    )
    return SmallFloats(torch.cat([magnitudes, -magnitudes]))


def e4m3() -> Codebook:
    """FP8 with 4 exponent bits, up to 448; the code that would be 480 stands for NaN."""
    codebook = small_float(4, 3)
    values = codebook.values.clone()
    values[[127, 255]] = torch.nan
    return SmallFloats(values)


def bitsandbytes_fp4() -> Codebook:
    """bitsandbytes' FP4: a sign bit, and eight magnitudes in an order of its own.

    Zero, 1/192 and then two steps in each power of two; unlike `e2m1` it has a gap of a factor 32
    between its two smallest magnitudes.
    """
    magnitudes = torch.tensor([0, 0.0625, 8, 12, 4, 6, 2, 3]) / 12
    return Table(torch.cat([magnitudes, -magnitudes]))


def dynamic_map() -> Codebook:
    """The 8-bit map of double quantization: seven decades, twice as many steps in each next one.

    The decade that ends at 10^-6 has 1 level on each side of zero, the one that ends at 1 has 64;
    0 and 1 are added (Dettmers 2015, arXiv:1511.04561, section 2).
    """
    means = []
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2**decade + 1)
        means.append(10.0 ** (decade - 6) * (edges[:-1] + edges[1:]) / 2)
    positive = torch.cat(means)
    return Table(torch.cat([-positive, torch.tensor([0.0]), positive, torch.ones(1)]).sort().values)


CODEBOOKS: dict[str, Codebook] = {
    **{f"int{bits}": integers(bits) for bits in range(2, 9)},
    **{f"nf{bits}": normal_float(bits) for bits in range(2, 9)},
    "fp4": bitsandbytes_fp4(),
    "e2m1": small_float(2, 1),
    "e4m3": e4m3(),
}
