"""How many bytes a weight matrix takes in each format, constants included.

A 4-bit weight is not 4 bits. The weights are cut into blocks of `block_size` values, and each block
keeps its largest magnitude (its *block maximum*) in float32, so that the 16 levels of the codebook
can be stretched over it: 32 / 64 = 0.5 bit per weight more. **Double quantization** stores the
block maxima in 8 bits, in groups of 256 that share one float32 (QLoRA, arXiv:2305.14314, section
3): 8 / 64 + 32 / (64 * 256) = 0.127 bit. Each matrix also carries its codebooks: 16 float32 levels,
and 256 more for the double quantization.
"""

import math
from dataclasses import dataclass

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
NESTED_BLOCK = 256


@dataclass(frozen=True)
class Format:
    """How one weight is stored: `weight_bits` for itself, and which constants come with it.

    `scaled` says what shares a constant: "block" (a float32 per block), "row" (a float32 per row),
    or "" for a plain floating-point number.
    """

    name: str
    weight_bits: int
    scaled: str = ""


FORMATS = {
    format.name: format
    for format in (
        Format("fp32", 32),
        Format("bf16", 16),
        Format("fp16", 16),
        Format("int8", 8, "row"),
        Format("nf4", 4, "block"),
        Format("fp4", 4, "block"),
    )
}


def check_format(name: str) -> str:
    """`name` if it is a format; ValueError with the names that are, if it is not."""
    if not isinstance(name, str) or name not in FORMATS:
        raise ValueError(f"Unknown format {name!r}; the formats are {', '.join(FORMATS)}.")
    return name


def check_block_size(block_size: int) -> int:
    """`block_size` if blocks can have it; ValueError with the sizes that they can have, if not."""
    if type(block_size) is not int or block_size not in BLOCK_SIZES:
        sizes = ", ".join(map(str, BLOCK_SIZES))
        raise ValueError(f"Block size {block_size} is not one of {sizes}.")
    return block_size


def stored_bytes(
    name: str, rows: int, columns: int, block_size: int = 64, double_quant: bool = True
) -> int:
    """Bytes of a (rows, columns) weight matrix stored in the format `name`, every constant counted.

    One matrix of a Mixtral expert, 14336 x 4096, in NF4 with double quantization:

    >>> stored_bytes("nf4", 14336, 4096) * 8 / (14336 * 4096)
    4.127...

    Raises ValueError for an unknown format or block size. Left out: the 100 or so bytes of names
    and shapes that a file adds for each tensor.
    """
    stored = FORMATS[check_format(name)]
    weight_bytes = math.ceil(rows * columns * stored.weight_bits / 8)
    if stored.scaled == "row":
        return weight_bytes + 4 * rows
    if stored.scaled == "block":
        blocks = math.ceil(rows * columns / check_block_size(block_size))
        return weight_bytes + _block_constants_bytes(blocks, double_quant)
    return weight_bytes


def _block_constants_bytes(blocks: int, double_quant: bool) -> int:
    codebook_bytes = 16 * 4
    if not double_quant:
        return codebook_bytes + 4 * blocks
    offset_bytes = 4
    nested_bytes = 256 * 4 + 4 * math.ceil(blocks / NESTED_BLOCK) + offset_bytes
    return codebook_bytes + blocks + nested_bytes
