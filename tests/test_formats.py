import pytest
import torch
from bitsandbytes import functional as bnb_functional
from hypothesis import given
from hypothesis import strategies as st

from labutils.formats import BLOCK_SIZES, FORMATS, stored_bytes


def test_bits_per_weight_of_one_mixtral_matrix_as_published():
    """QLoRA, section 3: 0.5 bit of constants without double quantization, 0.127 with."""
    weights = 14336 * 4096
    bits = {
        double: 8 * stored_bytes("nf4", 14336, 4096, double_quant=double) / weights
        for double in (True, False)
    }
    assert bits[False] == pytest.approx(4.5, abs=1e-4)
    assert bits[True] == pytest.approx(4 + 8 / 64 + 32 / (64 * 256), abs=2e-4)
    assert bits[False] - bits[True] == pytest.approx(0.373, abs=5e-4)


@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 40),
    block_size=st.sampled_from(BLOCK_SIZES),
    double_quant=st.booleans(),
)
def test_equals_the_tensors_of_bitsandbytes(rows, columns, block_size, double_quant):
    codes, state = bnb_functional.quantize_4bit(
        torch.ones(rows, columns),
        blocksize=block_size,
        compress_statistics=double_quant,
        quant_type="nf4",
    )
    tensors = [codes, state.absmax, state.code]
    if double_quant:
        tensors += [state.state2.absmax, state.state2.code, state.offset]
    real_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    assert stored_bytes("nf4", rows, columns, block_size, double_quant) == real_bytes


@given(rows=st.integers(1, 5000), columns=st.integers(1, 5000))
def test_fewer_bits_never_take_more_bytes(rows, columns):
    order = ("fp32", "bf16", "int8")
    sizes = [stored_bytes(name, rows, columns) for name in order]
    assert sizes[0] >= sizes[1]
    assert sizes[2] == rows * columns + 4 * rows
    assert stored_bytes("fp4", rows, columns) == stored_bytes("nf4", rows, columns)


def test_an_unknown_format_is_named_with_those_that_are_known():
    with pytest.raises(ValueError, match="'nf3'") as refused:
        stored_bytes("nf3", 8, 8)
    assert all(name in str(refused.value) for name in FORMATS)


def test_a_block_size_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match="Block size 100 is not one of 32, 64"):
        stored_bytes("nf4", 8, 8, block_size=100)
