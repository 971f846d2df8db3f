"""LLM.int8(): multiply in 8 bits, but for the few input columns that would spoil it.

To multiply in 8 bits the *inputs* must be rounded too: each token (a row of `x`) gets one scale,
its largest magnitude over 127. If one of its numbers is a hundred times larger than the rest, the
rest is rounded to a handful of levels. In trained models such numbers do not lie about at random;
they stand in the same few columns for many tokens. So those columns are taken out, and multiplied
in 16 bits (Dettmers et al. 2022, arXiv:2208.07339, section 3):

    y  =  int8(x without the columns) · int8(W)ᵀ · scales  +  x[columns] · W[columns]ᵀ

What counts as an outlier is a magnitude of 6 and more. Weights need no such care: each row of W has
a scale of its own, and trained weights have few outliers.
"""

from dataclasses import dataclass

import torch

from .codebooks import CODEBOOKS
from .formats import Maxima, Quantized, quantize

THRESHOLD = 6.0


@dataclass(frozen=True, eq=False)
class Int8Product:
    """`y` (tokens, out), and which input columns were multiplied in 16 bits to get it."""

    y: torch.Tensor
    columns: torch.Tensor


def outlier_columns(x: torch.Tensor, threshold: float = THRESHOLD) -> torch.Tensor:
    """The columns of `x` (tokens, in) in which some magnitude is `threshold` or more.

    >>> outlier_columns(torch.tensor([[0.5, -7.0, 1.0], [0.1, 0.2, 6.0]]))
    tensor([1, 2])

    The paper also asks that a column stand out in many tokens and layers; as bitsandbytes does,
    this looks at the tokens at hand.
    """
    return torch.where((x.abs() >= threshold).any(dim=0))[0]


def int8_product(x: torch.Tensor, weight: Quantized, threshold: float = THRESHOLD) -> Int8Product:
    """x (tokens, in) times a weight (out, in) kept in INT8, as LLM.int8() computes it.

    `weight` is `quantize(w, "int8", "row")`. `threshold=torch.inf` takes no column out: plain INT8.
    What is multiplied in 8 bits is summed exactly, as int32 would.

    >>> x = torch.tensor([[1.0, 0.01, 100.0]])
    >>> w = quantize(torch.tensor([[1.0, 1.0, 0.0]]), "int8", "row")
    >>> int8_product(x, w, torch.inf).y, int8_product(x, w).y
    (tensor([[0.7874]]), tensor([[1.0079]]))

    The answer is 1.01: beside 100 the step is 0.79, and without it 0.0079.

    Raises ValueError for a weight in another format or with other blocks than rows, for inputs of
    another shape or that are not finite, and for a threshold of 0 or less. Left out: the
    paper keeps the weights' outlier columns in 16 bits as well; here they are dequantized from
    INT8, as in bitsandbytes' inference.
    """
    _check(x, weight, threshold)
    columns = outlier_columns(x, threshold)
    rest = x.clone()
    rest[:, columns] = 0
    inputs = quantize(rest, "int8", "row")
    sums = _whole(inputs) @ _whole(weight).T
    y = sums * inputs.scales.units[:, None] * weight.scales.units
    y += x[:, columns].double() @ weight.dequantize()[:, columns].double().T
    return Int8Product(y.to(x.dtype), columns)


def _whole(quantized: Quantized) -> torch.Tensor:
    """The codes as whole numbers, in float64, where sums of their products are exact."""
    values = CODEBOOKS["int8"].values.to(quantized.codes.device)
    return values[quantized.codes.long()].double()


def _check(x: torch.Tensor, weight: Quantized, threshold: float) -> None:
    if not isinstance(weight, Quantized):
        raise TypeError(f'A {type(weight).__name__} is no weight; give quantize(w, "int8", "row").')
    in_rows = isinstance(weight.scales, Maxima) and weight.block_size == weight.shape[-1]
    if weight.format != "int8" or not in_rows:
        raise ValueError(
            f"The weight is in {weight.format} with blocks of {weight.block_size}; INT8 products "
            'take quantize(w, "int8", "row").'
        )
    if x.dim() != 2 or x.shape[1] != weight.shape[-1]:
        raise ValueError(
            f"x has shape {tuple(x.shape)}; this weight takes (tokens, {weight.shape[-1]})."
        )
    if not torch.isfinite(x).all():
        raise ValueError("x holds NaN or infinite values; each would spoil a token's whole row.")
    if not threshold > 0:
        raise ValueError(
            f"threshold={threshold} takes every column out; to take out none (0 in bitsandbytes) "
            "give torch.inf."
        )
