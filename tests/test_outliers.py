"""Outlier columns are found, and LLM.int8() computes what bitsandbytes' layer does."""

import bitsandbytes as bnb
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from labutils.formats import quantize, relative_error
from labutils.outliers import int8_product, outlier_columns


def inputs(tokens: int, columns: int, seed: int, outliers: dict[int, float] | None = None):
    """Tokens of unit size whose columns in `outliers` are that many times larger."""
    x = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(seed))
    for column, times in (outliers or {}).items():
        x[:, column] *= times
    return x


def test_the_example_of_the_docstring():
    x = torch.tensor([[1.0, 0.01, 100.0]])
    weight = quantize(torch.tensor([[1.0, 1.0, 0.0]]), "int8", "row")
    assert int8_product(x, weight, torch.inf).y.item() == pytest.approx(100 / 127, rel=1e-6)
    assert int8_product(x, weight).y.item() == pytest.approx(1 + 1 / 127, rel=1e-6)


def test_planted_columns_are_found():
    x = inputs(200, 64, seed=0, outliers={3: 40, 50: 40})
    assert outlier_columns(x).tolist() == [3, 50]
    assert outlier_columns(x, torch.inf).tolist() == []


@pytest.mark.parametrize("outliers", [{}, {7: 50}, {1: 30, 2: 80, 90: 50}])
def test_equals_the_layer_of_bitsandbytes(outliers):
    """To the rounding of 16 bits, in which that layer computes."""
    x = inputs(60, 96, seed=1, outliers=outliers).clamp(-3e4, 3e4).half()
    weight = inputs(40, 96, seed=2).half() / 10
    layer = bnb.nn.Linear8bitLt(96, 40, bias=False, has_fp16_weights=False, threshold=6.0)
    stored = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    layer.weight = stored.to("cpu")
    with torch.no_grad():
        theirs = layer.eval()(x)
    product = int8_product(x, quantize(weight, "int8", "row"))
    assert product.columns.tolist() == sorted(outliers)
    assert relative_error(theirs, product.y) < 0.001


@given(
    tokens=st.integers(1, 20),
    columns=st.integers(1, 40),
    threshold=st.sampled_from([0.5, 2.0, 6.0, torch.inf]),
    seed=st.integers(0, 2**32),
)
def test_error_stays_within_half_a_step_of_the_inputs(tokens, columns, threshold, seed):
    """Each rounded input is off by half its row's step at most; sums cannot be off by more."""
    x = inputs(tokens, columns, seed, outliers={0: 20})
    weight = quantize(inputs(8, columns, seed + 1), "int8", "row")
    product = int8_product(x, weight, threshold)
    rest = x.clone()
    rest[:, product.columns] = 0
    half_steps = rest.abs().amax(dim=1, keepdim=True) / 127 / 2
    largest = half_steps * weight.dequantize().abs().sum(dim=1)
    assert ((product.y - x @ weight.dequantize().T).abs() <= largest * 1.001 + 1e-4).all()


def test_taking_the_column_out_helps_where_there_is_one_and_only_there():
    weight = inputs(64, 128, seed=3)
    rows = quantize(weight, "int8", "row")
    for outliers, gain in (({}, 1.0), ({5: 100}, 10)):
        x = inputs(300, 128, seed=4, outliers=outliers)
        exact = x @ rows.dequantize().T
        plain, split = (int8_product(x, rows, t).y for t in (torch.inf, 6.0))
        assert relative_error(exact, plain) >= gain * relative_error(exact, split)


@pytest.mark.parametrize(
    ("x", "weight", "message"),
    [
        (torch.ones(1, 64), quantize(torch.ones(4, 64), "nf4"), "in nf4 with blocks of 64"),
        (torch.ones(1, 128), quantize(torch.ones(4, 128), "int8"), "int8 with blocks of 64"),
        (torch.ones(1, 32), quantize(torch.ones(4, 64), "int8", "row"), r"\(1, 32\)"),
        (torch.ones(64), quantize(torch.ones(4, 64), "int8", "row"), r"\(64,\)"),
        (torch.full((1, 64), torch.nan), quantize(torch.ones(4, 64), "int8", "row"), "x holds NaN"),
    ],
)
def test_what_cannot_be_multiplied_is_refused(x, weight, message):
    with pytest.raises(ValueError, match=message):
        int8_product(x, weight)


@pytest.mark.parametrize("threshold", [0.0, -1.0, torch.nan])
def test_a_threshold_that_takes_everything_out_is_refused(threshold):
    with pytest.raises(ValueError, match=r"give torch\.inf"):
        int8_product(torch.ones(1, 64), quantize(torch.ones(4, 64), "int8", "row"), threshold)


def test_a_weight_that_is_not_quantized_is_refused():
    with pytest.raises(TypeError, match="A Tensor is no weight"):
        int8_product(torch.ones(1, 64), torch.ones(4, 64))
