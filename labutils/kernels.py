"""Matrices of 4-bit codes on a CPU: quantized, dequantized, and multiplied without dequantizing.

The work is done by `kernels.cpp`, which the set-up compiles where there is a C++ compiler;
`INSTRUCTIONS` says what it uses of this processor, and is None where it was not compiled. Then the
functions here must not be called, and `experts` has bitsandbytes do the same, more slowly.

Codes and maxima are those of bitsandbytes, byte for byte and in its layout. Nothing is packed anew
and nothing is kept beside them: a product decodes what is stored, double quantization included.
"""

import ctypes
from collections.abc import Sequence
from contextlib import suppress
from enum import IntEnum
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import NamedTuple

import torch

GROUP = 64  # columns that a product takes at a time
CHUNK = 4096  # weights that a thread quantizes at a time, and the largest block
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class Instructions(IntEnum):
    """What a product is computed with, slowest first."""

    PORTABLE = 0
    AVX2 = 1
    AVX512_BF16 = 2

    @property
    def label(self) -> str:
        return ("portable instructions", "AVX2", "AVX512-BF16")[self]


def _compiled(folder: Path) -> ctypes.CDLL | None:
    """The library in `folder`, if it is there and loads: it takes its OpenMP from torch."""
    for suffix in EXTENSION_SUFFIXES:
        with suppress(OSError):
            return ctypes.CDLL(str(folder / f"_kernels{suffix}"))
    return None


_LIBRARY = _compiled(Path(__file__).parent)
INSTRUCTIONS = None if _LIBRARY is None else Instructions(_LIBRARY.instructions())


class Weight(NamedTuple):
    """Where a matrix of 4-bit codes lies. It holds addresses only: keep the tensors alive."""

    codes: int
    table: int
    maxima: int
    nested: int | None
    nested_table: int | None
    nested_offset: int | None
    rows: int
    columns: int
    block: int


def weight(codes: torch.Tensor, state) -> Weight:
    """The matrix that bitsandbytes stores as `codes` and the `QuantState` `state`."""
    if state.nested:
        maxima = state.state2.absmax
        nested = (state.absmax, state.state2.code, state.offset)
    else:
        maxima, nested = state.absmax, ()
    places = [tensor.data_ptr() for tensor in (codes, state.code, maxima, *nested)]
    return Weight(*places, *[None] * (6 - len(places)), *state.shape, state.blocksize)


class _Product(ctypes.Structure):
    """A weight, and where its inputs and outputs lie."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in Weight._fields[:6]),
        *((name, ctypes.c_int64) for name in Weight._fields[6:]),
        ("inputs", ctypes.c_void_p),
        ("outputs", ctypes.c_void_p),
        ("tokens", ctypes.c_int64),
    )


def multiply(
    weights: Sequence[Weight],
    tokens: Sequence[int],
    inputs: torch.Tensor,
    outputs: torch.Tensor,
    using: Instructions | None = INSTRUCTIONS,
) -> None:
    """`inputs` (rows, columns) times several matrices: `tokens[0]` rows times the first, and so on.

    The products go into contiguous `outputs` (rows, rows of a matrix); both are in bfloat16. All
    are computed at once, each output by one thread. Columns must be a multiple of the block, and
    the block of 64.
    """
    products = []
    source, target = inputs.data_ptr(), outputs.data_ptr()
    for weight, count in zip(weights, tokens, strict=True):
        products.append(_Product(*weight, source, target, count))
        source += 2 * count * weight.columns
        target += 2 * count * weight.rows
    together = (_Product * len(products))(*products)
    _LIBRARY.multiply(together, len(products), torch.get_num_threads(), using)


def dequantize(
    weight: Weight,
    out: torch.Tensor,
    first_row: int = 0,
    using: Instructions | None = INSTRUCTIONS,
) -> torch.Tensor:
    """Rows of the matrix, from `first_row` on, into contiguous `out` (rows, columns).

    `out` is in float32 or bfloat16; each value is rounded once, as bitsandbytes does. It must begin
    and end between two blocks.
    """
    _LIBRARY.dequantize(
        ctypes.byref(_Product(*weight)),
        ctypes.c_int64(first_row * weight.columns // weight.block),
        ctypes.c_int64(out.numel() // weight.block),
        TYPES[out.dtype],
        ctypes.c_void_p(out.data_ptr()),
        torch.get_num_threads(),
        using,
    )
    return out


def quantize(
    weights: torch.Tensor, table: torch.Tensor, block: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Contiguous `weights` as codes (bytes, 1) of the 16 values of `table`, and block maxima.

    Every weight becomes the nearest value times its block's maximum, as bitsandbytes rounds it.
    `block` must divide their number and be a power of two up to 4096. Nothing is allocated but the
    results. Raises ValueError, with their number, for weights that are NaN or infinite.
    """
    codes = torch.empty(weights.numel() // 2, 1, dtype=torch.uint8)
    _LIBRARY.prefer_large_pages(ctypes.c_void_p(codes.data_ptr()), ctypes.c_int64(codes.nbytes))
    maxima = torch.empty(weights.numel() // block)
    thresholds, order = _thresholds(tuple(table.tolist()))
    unusable = _LIBRARY.quantize(
        ctypes.c_void_p(weights.data_ptr()),
        TYPES[weights.dtype],
        ctypes.c_int64(weights.numel()),
        block,
        ctypes.c_void_p(thresholds.data_ptr()),
        ctypes.c_void_p(order.data_ptr()),
        ctypes.c_void_p(codes.data_ptr()),
        ctypes.c_void_p(maxima.data_ptr()),
        torch.get_num_threads(),
    )
    refuse(unusable, weights)
    return codes, maxima


def quantize_rows(weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Contiguous `weights` (rows, columns) as LLM.int8() stores them: int8 codes, row maxima.

    As bitsandbytes does, weights are first rounded to float16. A row of zeros gets zeros. Raises
    ValueError as `quantize` does, for weights beyond float16 too.
    """
    codes = torch.empty(weights.shape, dtype=torch.int8)
    maxima = torch.empty(len(weights))
    unusable = _LIBRARY.quantize_rows(
        ctypes.c_void_p(weights.data_ptr()),
        TYPES[weights.dtype],
        *map(ctypes.c_int64, weights.shape),
        ctypes.c_void_p(codes.data_ptr()),
        ctypes.c_void_p(maxima.data_ptr()),
        torch.get_num_threads(),
    )
    refuse(unusable, weights)
    return codes, maxima


def refuse(unusable: int, weights: torch.Tensor) -> None:
    """ValueError if any weight cannot be used, with their number."""
    if unusable:
        raise ValueError(f"{unusable:,} of {weights.numel():,} weights are NaN or infinite")


@cache
def _thresholds(table: tuple[float, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """Midpoints of the sorted values, and the code of each sorted value."""
    values = torch.tensor(table)
    order = values.argsort()
    midpoints = (values[order[:-1]] + values[order[1:]]) / 2
    return midpoints, order.to(torch.uint8)


if _LIBRARY is not None:
    _LIBRARY.quantize.restype = _LIBRARY.quantize_rows.restype = ctypes.c_int64
