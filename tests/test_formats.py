"""Codes, constants and bytes against bitsandbytes, and against the rule of half a step."""

import math

import pytest
import torch
from bitsandbytes import functional as bnb_functional
from hypothesis import given
from hypothesis import strategies as st

from labutils.codebooks import CODEBOOKS
from labutils.formats import (
    BLOCK_SIZES,
    FORMATS,
    STORABLE,
    NestedMaxima,
    Quantized,
    Rounding,
    check_storable,
    pack,
    quantize,
    relative_error,
    stored_bytes,
)

CODED = [name for name, format in FORMATS.items() if format.codebook]
IN_BLOCKS = [name for name in CODED if FORMATS[name].scaled != "own"]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@st.composite
def weights(draw, dtypes=DTYPES, largest=5000):
    """Weights as they come and as they should not: zeros, constants, tiny, huge, of any length."""
    count = draw(st.integers(1, largest))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    weight = torch.randn(count, generator=generator)
    kind = draw(st.sampled_from(["normal", "heavy", "zeros", "constant", "sparse", "uniform"]))
    if kind == "heavy":
        weight = weight**3
    elif kind == "zeros":
        weight[: draw(st.integers(1, count))] = 0
    elif kind == "constant":
        weight = weight[:1].expand(count).clone()
    elif kind == "sparse":
        weight[torch.rand(count, generator=generator) < 0.9] = 0
    elif kind == "uniform":
        weight = torch.rand(count, generator=generator) * 2 - 1
    dtype = draw(st.sampled_from(dtypes))
    exponent = draw(st.integers(-4, 3) if dtype == torch.float16 else st.integers(-30, 30))
    return (
        (weight * 10.0**exponent).clamp(-6e4, 6e4).to(dtype)
        if dtype == torch.float16
        else (weight * 10.0**exponent).to(dtype)
    )


# ------------------------------------------------------------------------------ published figures


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


@pytest.mark.parametrize(
    ("format", "settings", "bits"),
    [
        ("nf4", {}, 4 + 32 / 64),
        ("nf4", {"block_size": 32}, 4 + 32 / 32),
        ("nf4", {"double_quant": True}, 4 + 8 / 64 + 32 / (64 * 256) + 32 / 2**20),
        ("int3", {"block_size": 128}, 3 + 32 / 128),
        ("int4", {"asymmetric": True}, 4 + 64 / 64),
        ("int8", {"block_size": "row"}, 8 + 32 / 1024),
        ("int8", {"block_size": "tensor"}, 8 + 32 / 2**20),
        ("mxfp4", {}, 4 + 8 / 32),
        ("nvfp4", {}, 4 + 8 / 16 + 32 / 2**20),
        ("fp8_e4m3", {}, 8 + 32 / 64),
    ],
)
def test_bits_per_weight_count_every_constant(format, settings, bits):
    assert quantize(torch.ones(1024, 1024), format, **settings).bits_per_weight == bits


def test_absmax_int4_by_hand():
    """The largest, 1.0, becomes 7; 0.1 * 7 = 0.7 rounds to 1, -0.5 * 7 = -3.5 to the even -4."""
    quantized = quantize(torch.tensor([0.1, -0.5, 0.3, 1.0]), "int4")
    assert quantized.codes.tolist() == [1, 16 - 4, 2, 7]
    assert quantized.packed.tolist() == [0x1C, 0x27]
    torch.testing.assert_close(quantized.dequantize(), torch.tensor([1 / 7, -4 / 7, 2 / 7, 1.0]))


def test_asymmetric_int2_by_hand():
    """From 1 to 4 in three steps of 1, where symmetric levels would begin at -4."""
    quantized = quantize(torch.tensor([1.0, 2.2, 3.0, 4.0]), "int2", asymmetric=True)
    assert quantized.codes.tolist() == [0, 1, 2, 3]
    assert quantized.dequantize().tolist() == [1, 2, 3, 4]


def test_mxfp4_by_hand():
    """The largest, 5, needs a unit of 5 / 6 at least: 1, the next power of two."""
    quantized = quantize(torch.tensor([5.0, -2.4, 0.3, 0.0]), "mxfp4")
    assert quantized.scales.exponents.tolist() == [127]
    assert quantized.dequantize().tolist() == [4.0, -2.0, 0.5, 0.0]


def test_a_rounding_by_hand():
    """0.1, -0.5 and 0.3 in sevenths of 1: 1/7, -4/7 and 2/7."""
    weight = torch.tensor([0.1, -0.5, 0.3, 1.0])
    rounding = Rounding(weight, quantize(weight, "int4"))
    error = [1 / 7 - 0.1, -4 / 7 + 0.5, 2 / 7 - 0.3, 0]
    torch.testing.assert_close(rounding.error, torch.tensor(error))
    assert rounding.relative_error == pytest.approx(math.hypot(*error) / math.hypot(*weight))
    assert rounding.relative_absolute_error == pytest.approx(sum(map(abs, error)) / 1.9)
    assert rounding.positions.tolist() == weight.tolist()


# -------------------------------------------------------------------------------------- round trip


@given(bits=st.integers(2, 8), codes=st.lists(st.integers(0, 255), min_size=1, max_size=100))
def test_packed_codes_come_back(bits, codes):
    codes = (torch.tensor(codes) % 2**bits).to(torch.uint8)
    packed = pack(codes, CODEBOOKS[f"nf{bits}"])
    assert packed.numel() == math.ceil(len(codes) * bits / 8)
    written = "".join(f"{byte:08b}" for byte in packed.tolist())
    read = [int(written[bits * i : bits * (i + 1)], 2) for i in range(len(codes))]
    assert read == codes.tolist()


@pytest.mark.parametrize("format", CODED)
def test_shape_and_dtype_come_back(format):
    for dtype in DTYPES:
        weight = torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(0)).to(dtype)
        back = quantize(weight, format).dequantize()
        assert back.shape == weight.shape and back.dtype == dtype


@pytest.mark.parametrize("format", CODED)
@given(weight=weights())
def test_what_was_quantized_once_does_not_change_again(format, weight):
    once = quantize(weight.float(), format).dequantize()
    twice = quantize(once, format).dequantize()
    torch.testing.assert_close(twice, once, rtol=1e-5, atol=1e-37)


# ------------------------------------------------------------------------- bitsandbytes as oracle


@given(
    weight=weights(),
    format=st.sampled_from(["nf4", "fp4"]),
    block_size=st.sampled_from(BLOCK_SIZES),
)
def test_4_bit_codes_and_maxima_equal_bitsandbytes(weight, format, block_size):
    codes, state = bnb_functional.quantize_4bit(weight, blocksize=block_size, quant_type=format)
    ours = quantize(weight, format, block_size)
    assert torch.equal(ours.packed, codes.flatten())
    assert torch.equal(ours.scales.maxima, state.absmax)
    theirs = bnb_functional.dequantize_4bit(codes, state).flatten().float()
    tolerance = torch.finfo(weight.dtype).eps
    torch.testing.assert_close(ours.dequantize().float(), theirs, rtol=tolerance, atol=1e-37)


@given(
    weight=weights(largest=60_000),
    format=st.sampled_from(["nf4", "fp4"]),
    block_size=st.sampled_from(BLOCK_SIZES),
)
def test_double_quantized_constants_equal_bitsandbytes(weight, format, block_size):
    codes, state = bnb_functional.quantize_4bit(
        weight, blocksize=block_size, quant_type=format, compress_statistics=True
    )
    ours = quantize(weight, format, block_size, double_quant=True)
    assert torch.equal(ours.packed, codes.flatten())
    assert torch.equal(ours.scales.codes, state.absmax)
    assert torch.equal(ours.scales.group_maxima, state.state2.absmax)
    assert torch.equal(ours.scales.offset, state.offset)
    maxima = bnb_functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
    torch.testing.assert_close(ours.scales.units, maxima, rtol=1e-6, atol=1e-37)


@given(weight=weights(), columns=st.integers(1, 300))
def test_int8_rows_equal_bitsandbytes(weight, columns):
    weight = weight[: max(1, len(weight) // columns) * columns]
    weight = weight.view(-1, min(columns, len(weight)))
    codes, maxima, _ = bnb_functional.int8_vectorwise_quant(weight.clone())
    ours = quantize(weight, "int8", "row")
    assert torch.equal(ours.packed.view(torch.int8), codes.flatten())
    assert torch.equal(ours.scales.maxima, maxima)
    theirs = bnb_functional.int8_vectorwise_dequant(codes, maxima)
    torch.testing.assert_close(
        ours.dequantize().float(), theirs.to(weight.dtype).float(), rtol=1e-2, atol=1e-37
    )


@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 40),
    format=st.sampled_from(["nf4", "fp4"]),
    block_size=st.sampled_from(BLOCK_SIZES),
    double_quant=st.booleans(),
)
def test_bytes_in_a_model_equal_the_tensors_of_bitsandbytes(
    rows, columns, format, block_size, double_quant
):
    codes, state = bnb_functional.quantize_4bit(
        torch.ones(rows, columns),
        blocksize=block_size,
        compress_statistics=double_quant,
        quant_type=format,
    )
    tensors = [codes, state.absmax, state.code]
    if double_quant:
        tensors += [state.state2.absmax, state.state2.code, state.offset]
    real_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    assert stored_bytes(format, rows, columns, block_size, double_quant) == real_bytes


# -------------------------------------------------------------------------------------- invariants


def half_steps(quantized: Quantized) -> torch.Tensor:
    """Half of the wider gap beside each weight's level: how far off a rounding may ever be."""
    levels = quantized.codebook.levels
    gaps = torch.cat([levels.diff()[:1], levels.diff(), levels.diff()[-1:]])
    wider = torch.maximum(gaps[:-1], gaps[1:])
    values = quantized.codebook.values[quantized.codes.flatten().long()]
    units = quantized.scales.units.repeat_interleave(quantized.block_size)[: values.numel()]
    return wider[torch.searchsorted(levels, values)] / 2 * units


@pytest.mark.parametrize("format", CODED)
@given(weight=weights(dtypes=(torch.float32,)), block_size=st.sampled_from((*BLOCK_SIZES, "row")))
def test_no_weight_moves_by_more_than_half_a_step(format, weight, block_size):
    quantized = quantize(weight, format, block_size)
    moved = (quantized.dequantize() - weight).abs()
    assert (moved <= half_steps(quantized) * (1 + 1e-4) + 1e-37).all()


@pytest.mark.parametrize("settings", [{}, {"double_quant": True}, {"asymmetric": True}])
@pytest.mark.parametrize("format", ["int3", "nf4", "nvfp4"])
@given(count=st.integers(1, 3000))
def test_positions_and_levels_share_one_scale(format, settings, count):
    """A weight goes to the level nearest to its position: what the figures rest on."""
    if "asymmetric" in settings and format != "int3":
        settings = {}
    weight = torch.randn(count, generator=torch.Generator().manual_seed(count))
    rounding = Rounding(weight, quantize(weight, format, **settings))
    assert (rounding.levels[0], rounding.levels[-1]) == (-1, 1)
    again = Rounding(rounding.quantized.dequantize(), rounding.quantized)
    distance = (again.positions[:, None] - rounding.levels).abs().amin(dim=1)
    assert distance.max() < 1e-4, "rounded weights lie on levels"
    half_gap = rounding.levels.diff().max() / 2
    assert (rounding.positions - again.positions).abs().max() < half_gap + 0.07


@pytest.mark.parametrize("bits", range(2, 9))
@given(weight=weights(dtypes=(torch.float32,)))
def test_asymmetric_levels_reach_from_minimum_to_maximum(bits, weight):
    quantized = quantize(weight, f"int{bits}", asymmetric=True)
    moved = (quantized.dequantize() - weight).abs()
    units = quantized.scales.units.repeat_interleave(64)[: weight.numel()]
    assert (moved <= units / 2 + weight.abs().max() * 1e-5 + 1e-37).all()


@pytest.mark.parametrize("family", ["int", "nf"])
@pytest.mark.parametrize("spread", ["normal", "heavy", "uniform"])
@pytest.mark.parametrize("block_size", (*BLOCK_SIZES, "row", "tensor"))
def test_more_bits_are_never_worse(family, spread, block_size):
    weight = torch.randn(64, 4096, generator=torch.Generator().manual_seed(1))
    if spread == "heavy":
        weight = weight**3
    elif spread == "uniform":
        weight = weight.erf()
    errors = [
        relative_error(weight, quantize(weight, f"{family}{bits}", block_size).dequantize())
        for bits in range(2, 9)
    ]
    assert errors == sorted(errors, reverse=True)


@given(rows=st.integers(1, 60), columns=st.integers(1, 60), block_size=st.sampled_from(BLOCK_SIZES))
@pytest.mark.parametrize("format", [*IN_BLOCKS, "mxfp4", "nvfp4"])
def test_bytes_in_a_model_are_the_tensors_and_the_codebook(format, rows, columns, block_size):
    blocks = "row" if format == "int8" else block_size
    tensors = quantize(torch.ones(rows, columns), format, blocks).stored_bytes
    table = 4 * 2 ** FORMATS[format].weight_bits if format[:2] in ("nf", "fp") else 0
    codebook_bytes = 0 if format == "fp8_e4m3" else table
    predicted = stored_bytes(format, rows, columns, block_size, double_quant=False)
    assert predicted == tensors + codebook_bytes


@given(rows=st.integers(1, 5000), columns=st.integers(1, 5000))
def test_fewer_bits_never_take_more_bytes(rows, columns):
    order = ("fp32", "bf16", "int8")
    sizes = [stored_bytes(name, rows, columns) for name in order]
    assert sizes[0] >= sizes[1]
    assert sizes[2] == rows * columns + 4 * rows
    assert stored_bytes("fp4", rows, columns) == stored_bytes("nf4", rows, columns)


def test_double_quantization_of_equal_maxima_loses_nothing():
    scales = NestedMaxima.of(torch.full((300,), 0.25), peak=1.0)
    assert torch.equal(scales.units, torch.full((300,), 0.25))


# ---------------------------------------------------------------------------------------- mistakes


def test_an_unknown_format_is_named_with_those_that_are_known():
    with pytest.raises(ValueError, match="'nf9'") as refused:
        quantize(torch.ones(8), "nf9")
    assert all(name in str(refused.value) for name in FORMATS)


def test_a_block_size_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match="Block size 100 is not one of 32, 64"):
        stored_bytes("nf4", 8, 8, block_size=100)
    with pytest.raises(ValueError, match="Block size 'column' is not one of 32, 64"):
        quantize(torch.ones(8), "nf4", block_size="column")


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("format", ["nf4", "int8", "mxfp4"])
def test_a_weight_that_is_no_number_is_refused(value, format):
    weight = torch.ones(200)
    weight[7] = value
    with pytest.raises(ValueError, match="1 NaN or infinite values among 200"):
        quantize(weight, format)


@pytest.mark.parametrize(
    ("weight", "format", "settings", "message"),
    [
        (torch.ones(0, 4), "nf4", {}, r"\(0, 4\) is empty"),
        (torch.ones(4), "bf16", {}, "bf16 has no codes"),
        (torch.ones(4), "nf4", {"asymmetric": True}, "Only integers can be asymmetric"),
        (torch.ones(4), "int4", {"asymmetric": True, "double_quant": True}, "two constants"),
    ],
)
def test_what_makes_no_sense_is_refused(weight, format, settings, message):
    with pytest.raises(ValueError, match=message):
        quantize(weight, format, **settings)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("format", CODED)
def test_the_largest_numbers_stay_finite(format, dtype):
    largest = torch.finfo(dtype).max
    weight = torch.tensor([largest, -largest, largest / 3, 0.0], dtype=dtype)
    for asymmetric in {False, format.startswith("int")}:
        assert quantize(weight, format, asymmetric=asymmetric).dequantize().isfinite().all()


def test_a_number_too_large_for_float32_is_refused():
    with pytest.raises(ValueError, match="1 NaN or infinite values among 2"):
        quantize(torch.tensor([1e300, 1.0], dtype=torch.float64), "nf4")


@pytest.mark.parametrize("weight", [[0.1, 0.2], None, quantize(torch.ones(4), "nf4")])
def test_what_is_no_tensor_is_refused(weight):
    with pytest.raises(TypeError, match=type(weight).__name__):
        quantize(weight, "nf4")


def test_a_format_nearly_right_is_guessed():
    with pytest.raises(ValueError, match=r"Did you mean 'nf4'\?"):
        quantize(torch.ones(4), "NF4")


@pytest.mark.parametrize("settings", [{"block_size": "nonsense"}, {"asymmetric": True}])
def test_microscaled_formats_check_what_they_do_not_use(settings):
    with pytest.raises(ValueError):
        quantize(torch.ones(4), "mxfp4", **settings)


def test_nothing_is_lost_of_nothing():
    assert relative_error(torch.zeros(4), torch.zeros(4)) == 0


def test_integers_are_refused():
    with pytest.raises(TypeError, match=r"torch\.int64"):
        quantize(torch.arange(4), "int8")


def test_only_some_formats_can_be_stored_in_a_model():
    assert STORABLE == ("fp32", "bf16", "fp16", "nf4", "fp4", "int8")
    with pytest.raises(ValueError, match="int3 can be studied, not stored"):
        check_storable("int3")
