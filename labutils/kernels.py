"""Matrices of 4-bit codes on a CPU: quantized, dequantized, and multiplied without dequantizing.

Beside them, for `decoding`, the small steps between a layer's matrices.

The work is done by `kernels.cpp`, which the set-up compiles where there is a C++ compiler;
`INSTRUCTIONS` says what it uses of this processor, and is None where it was not compiled. Then the
functions here must not be called: `experts` has bitsandbytes do the same, more slowly, and
`decoding` leaves transformers its own way.

Codes and maxima are those of bitsandbytes, byte for byte and in its layout. Nothing is packed anew
and nothing is kept beside them: a product decodes what is stored, double quantization included.
"""

import ctypes
from collections.abc import Collection, Sequence
from contextlib import suppress
from enum import IntEnum
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import torch

GROUP = 64  # what a block must be a multiple of
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


class Weight(ctypes.Structure):
    """Where a matrix of 4-bit codes lies: addresses only, so keep the tensors alive."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("codes", "table", "maxima")),
        *((name, ctypes.c_void_p) for name in ("nested", "nested_table", "nested_offset")),
        *((name, ctypes.c_int64) for name in ("rows", "columns", "block")),
    )


class Expert(ctypes.Structure):
    """The three matrices of a SwiGLU expert."""

    _fields_ = (("gate", Weight), ("up", Weight), ("down", Weight))


class Layer(ctypes.Structure):
    """A layer of Mixtral: norms and router in bfloat16, the other matrices in 4 bits or, of
    attention, also `plain_weight`s; and its sizes."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("first_norm", "second_norm", "router")),
        ("experts", ctypes.POINTER(Expert)),
        *((name, ctypes.c_int64) for name in ("expert_count", "top_k")),
        *((name, Weight) for name in ("query", "key", "value", "output")),
        *((name, ctypes.c_int64) for name in ("hidden", "heads", "groups", "size")),
        *((name, ctypes.c_float) for name in ("epsilon", "scale")),
    )


# Of each function, its parameters: address, matrix, whole numbers of 64 and 32 bits, real number.
_TYPES = {
    "p": ctypes.c_void_p,
    "m": ctypes.POINTER(Weight),
    "l": ctypes.c_int64,
    "i": ctypes.c_int,
    "f": ctypes.c_float,
}
_SIGNATURES = {
    "prefer_large_pages": "pl",
    "quantize": "pilippppi",
    "quantize_rows": "pillppi",
    "dequantize": "mllipii",
    "multiply": "pipplii",
    "mix": "ppipllpppii",
    "multiply_16bit": "pllplpii",
    "norm": "ppfllpi",
    "rotate": "plllppl",
    "attend": "pppllllllfpi",
    "decode": "pippllppii",
}


def _compiled(folder: Path) -> ctypes.CDLL | None:
    """The library in `folder`, if it is there and loads: it takes its OpenMP from torch."""
    for suffix in EXTENSION_SUFFIXES:
        with suppress(OSError):
            library = ctypes.CDLL(str(folder / f"_kernels{suffix}"))
            for name, types in _SIGNATURES.items():
                function = getattr(library, name)
                function.argtypes = [_TYPES[letter] for letter in types]
                function.restype = ctypes.c_int64 if name.startswith("quantize") else None
            return library
    return None


_LIBRARY = _compiled(Path(__file__).parent)
INSTRUCTIONS = None if _LIBRARY is None else Instructions(_LIBRARY.instructions())


def weight(codes: torch.Tensor, state) -> Weight:
    """The matrix that bitsandbytes stores as `codes` and the `QuantState` `state`."""
    if state.nested:
        maxima = state.state2.absmax
        nested = (state.absmax, state.state2.code, state.offset)
    else:
        maxima, nested = state.absmax, ()
    tensors = codes, state.code, maxima, *nested
    places = [tensor.data_ptr() for tensor in tensors]
    found = Weight(*places, *[None] * (6 - len(places)), *state.shape, state.blocksize)
    found.kept = [tensor.untyped_storage() for tensor in tensors]
    return found


def plain_weight(weight: torch.Tensor) -> Weight:
    """A contiguous matrix in bfloat16, where one is taken: with blocks of 0."""
    return Weight(weight.data_ptr(), *[None] * 5, *weight.shape, 0)


def take(*tensors: torch.Tensor) -> bool:
    """Whether these can be inputs here: in bfloat16, on a CPU, and not to be differentiated."""
    return (
        INSTRUCTIONS is not None
        and all(x.dtype is torch.bfloat16 and x.device.type == "cpu" for x in tensors)
        and not (torch.is_grad_enabled() and any(x.requires_grad for x in tensors))
    )


def multiply(
    weights: Sequence[Weight], inputs: torch.Tensor, using: Instructions | None = INSTRUCTIONS
) -> list[torch.Tensor]:
    """`inputs` (tokens, columns) times each of several matrices: (tokens, rows), all in bfloat16.

    Columns must be a multiple of the block, and the block 64 times a power of two.
    """
    inputs, rows = inputs.contiguous(), [weight.rows for weight in weights]
    outputs = inputs.new_empty(len(inputs) * sum(rows))
    _LIBRARY.multiply(
        _addresses(weights),
        len(rows),
        inputs.data_ptr(),
        outputs.data_ptr(),
        len(inputs),
        torch.get_num_threads(),
        using,
    )
    parts = outputs.split([len(inputs) * each for each in rows])
    return [part.view(len(inputs), each) for part, each in zip(parts, rows, strict=True)]


def _addresses(structures: Collection[ctypes.Structure]) -> ctypes.Array:
    return (ctypes.c_void_p * len(structures))(*map(ctypes.addressof, structures))


def mix(
    experts: dict[int, Expert],
    chosen: Sequence[int],
    weights: torch.Tensor,
    inputs: torch.Tensor,
    using: Instructions | None = INSTRUCTIONS,
) -> torch.Tensor:
    """What the chosen experts make of each of `inputs` (tokens, hidden), weighted and summed up.

    `weights` is (tokens, top_k); `chosen` has the number of the expert that each is for, row by
    row, and `experts` those that occur, in order of their numbers.

    Rounded to bfloat16 are, as torch would, what each matrix gives, the gate's SiLU, the product of
    gate and up, the weighted result, and the sum.
    """
    inputs, weights = inputs.contiguous(), weights.float().contiguous()
    outputs = torch.zeros_like(inputs)
    pairs = sorted(range(len(chosen)), key=chosen.__getitem__)
    _LIBRARY.mix(
        _addresses(experts.values()),
        (ctypes.c_int64 * len(experts))(*map(chosen.count, experts)),
        len(experts),
        (ctypes.c_int64 * len(pairs))(*pairs),
        len(pairs),
        weights.shape[1],
        weights.data_ptr(),
        inputs.data_ptr(),
        outputs.data_ptr(),
        torch.get_num_threads(),
        using,
    )
    return outputs


def multiply_16bit(
    weight: torch.Tensor, inputs: torch.Tensor, using: Instructions | None = INSTRUCTIONS
) -> torch.Tensor:
    """Few `inputs` (tokens, columns) times `weight` (rows, columns), all in bfloat16."""
    inputs, weight = inputs.contiguous(), weight.contiguous()
    outputs = inputs.new_empty(len(inputs), len(weight))
    _LIBRARY.multiply_16bit(
        weight.data_ptr(),
        *weight.shape,
        inputs.data_ptr(),
        len(inputs),
        outputs.data_ptr(),
        torch.get_num_threads(),
        using,
    )
    return outputs


def norm(inputs: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """`inputs` (..., columns) by their root mean square, rounded, times `weight` (columns)."""
    inputs = inputs.contiguous()
    outputs = torch.empty_like(inputs)
    columns = len(weight)
    _LIBRARY.norm(
        inputs.data_ptr(),
        weight.data_ptr(),
        epsilon,
        inputs.numel() // columns,
        columns,
        outputs.data_ptr(),
        torch.get_num_threads(),
    )
    return outputs


def rotate(vectors: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor) -> None:
    """Turn contiguous `vectors` (sequences, heads, size) to their positions, in place.

    `cosines` and `sines` are (sequences, 1, size), or (1, 1, size) for all.
    """
    cosines, sines = cosines.contiguous(), sines.contiguous()
    _LIBRARY.rotate(
        vectors.data_ptr(),
        *vectors.shape,
        cosines.data_ptr(),
        sines.data_ptr(),
        vectors.shape[2] if len(cosines) > 1 else 0,
    )


def attend(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float
) -> torch.Tensor:
    """What one query a sequence, (sequences, heads, size), finds in all keys and values.

    These are (sequences, groups, length, size); so many heads in turn share a group's.
    """
    queries, keys, values = queries.contiguous(), keys.contiguous(), values.contiguous()
    outputs = torch.empty_like(queries)
    _, groups, length, size = keys.shape
    room = length
    _LIBRARY.attend(
        queries.data_ptr(),
        keys.data_ptr(),
        values.data_ptr(),
        *queries.shape[:2],
        groups,
        length,
        room,
        size,
        scale,
        outputs.data_ptr(),
        torch.get_num_threads(),
    )
    return outputs


def decode(
    layers: Sequence[Layer],
    x: torch.Tensor,
    states: torch.Tensor,
    length: int,
    cosines: torch.Tensor,
    sines: torch.Tensor,
    using: Instructions | None = INSTRUCTIONS,
) -> torch.Tensor:
    """What layers, one after the other, make of the state `x` (1, 1, hidden) of one token.

    Contiguous `states` (layers, 2, 1, groups, room, size) are keys and values of `length` tokens,
    and get this token's behind them. `cosines` and `sines` are (1, 1, size).
    """
    x, count = x.clone(), len(layers)
    _LIBRARY.decode(
        (Layer * count)(*layers),
        count,
        x.data_ptr(),
        states.data_ptr(),
        length,
        states.shape[4],
        cosines.contiguous().data_ptr(),
        sines.contiguous().data_ptr(),
        torch.get_num_threads(),
        using,
    )
    return x


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
        weight,
        first_row * weight.columns // weight.block,
        out.numel() // weight.block,
        TYPES[out.dtype],
        out.data_ptr(),
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
    _LIBRARY.prefer_large_pages(codes.data_ptr(), codes.nbytes)
    maxima = torch.empty(weights.numel() // block)
    thresholds, order = _thresholds(tuple(table.tolist()))
    unusable = _LIBRARY.quantize(
        weights.data_ptr(),
        TYPES[weights.dtype],
        weights.numel(),
        block,
        thresholds.data_ptr(),
        order.data_ptr(),
        codes.data_ptr(),
        maxima.data_ptr(),
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
        weights.data_ptr(),
        TYPES[weights.dtype],
        *weights.shape,
        codes.data_ptr(),
        maxima.data_ptr(),
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
