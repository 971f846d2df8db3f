"""The compiled kernels against bitsandbytes, and against exact products."""

from contextlib import contextmanager
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest
import torch
from bitsandbytes import functional as bnb_functional
from bitsandbytes.nn import Int8Params
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.mixtral.modeling_mixtral import MixtralRMSNorm, apply_rotary_pos_emb

from labutils import kernels
from labutils.kernels import GROUP, INSTRUCTIONS, Instructions
from labutils.meter import Meter

MIB = 2**20

pytestmark = pytest.mark.skipif(
    INSTRUCTIONS is None, reason="no C++ compiler was there when the lab was set up"
)

FORMATS = st.sampled_from(("nf4", "fp4"))
DTYPES = st.sampled_from((torch.bfloat16, torch.float16, torch.float32))
BLOCKS = st.sampled_from((64, 128, 4096))
HERE = [level for level in Instructions if INSTRUCTIONS is not None and level <= INSTRUCTIONS]


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def table(format: str) -> torch.Tensor:
    return bnb_functional.get_4bit_type(format, device="cpu")


def stored(weight: torch.Tensor, format: str, block: int, double_quant: bool):
    """Codes and state as bitsandbytes makes them."""
    return bnb_functional.quantize_4bit(
        weight, blocksize=block, quant_type=format, compress_statistics=double_quant
    )


def adversarial() -> torch.Tensor:
    """Rows of 128 weights that are easily got wrong."""
    rows = drawn(12, 128)
    rows[0] = 0
    rows[1] = -0.0
    rows[2] = 0.37
    rows[3] = -2.5
    rows[4] *= 1e-40
    rows[5] = torch.tensor([0.0, 1e-45]).repeat(64)
    rows[6] = torch.tensor([1.0, -1.0]).repeat(64)
    rows[7, 5] = 3e4
    rows[8] *= 1e-20
    rows[9] = table("nf4").repeat(8)
    rows[10] = (table("nf4")[1:] + table("nf4")[:-1]).div(2).repeat(9)[:128]
    rows[11, 64:] = 0
    return rows


# ---------------------------------------------------------------------------------------- quantize


def is_quantized_as_by_bitsandbytes(weight: torch.Tensor, format: str, block: int) -> bool:
    expected_codes, expected = stored(weight, format, block, double_quant=False)
    codes, maxima = kernels.quantize(weight, table(format), block)
    return torch.equal(codes, expected_codes) and torch.equal(maxima, expected.absmax)


@settings(deadline=None)
@given(rows=st.integers(1, 40), block=BLOCKS, format=FORMATS, dtype=DTYPES, seed=st.integers(0, 9))
def test_codes_and_maxima_are_those_of_bitsandbytes(rows, block, format, dtype, seed):
    assert is_quantized_as_by_bitsandbytes(drawn(rows, block, seed=seed).to(dtype), format, block)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("format", ["nf4", "fp4"])
def test_so_are_those_of_zeros_constants_denormals_and_ties(format, dtype):
    assert is_quantized_as_by_bitsandbytes(adversarial().to(dtype), format, 64)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_is_counted_and_refused(bad):
    weight = drawn(4, 128).to(torch.bfloat16)
    weight[1, 7] = weight[3, 127] = bad
    for quantize in (
        lambda: kernels.quantize(weight, table("nf4"), 64),
        lambda: kernels.quantize_rows(weight),
    ):
        with pytest.raises(ValueError, match="2 of 512 weights are NaN or infinite"):
            quantize()


def test_a_matrix_of_mixtral_is_quantized_without_temporaries():
    weight = drawn(4096, 14336).to(torch.bfloat16)
    meter = Meter()
    with meter("quantize"):
        codes, maxima = kernels.quantize(weight, table("nf4"), 64)
    results_bytes = codes.nbytes + maxima.nbytes
    assert meter.runs[0].peak_above_start_bytes - results_bytes <= 16 * MIB


def is_int8_as_by_bitsandbytes(weight: torch.Tensor) -> bool:
    expected = Int8Params(weight.clone(), requires_grad=False, has_fp16_weights=False)
    expected._quantize("cpu")
    codes, maxima = kernels.quantize_rows(weight)
    return torch.equal(codes, expected.CB) and torch.equal(maxima, expected.SCB)


@settings(deadline=None)
@given(rows=st.integers(1, 20), columns=st.integers(1, 5000), dtype=DTYPES)
def test_int8_rows_are_those_of_bitsandbytes(rows, columns, dtype):
    assert is_int8_as_by_bitsandbytes(drawn(rows, columns).mul(0.02).to(dtype))


def test_int8_rows_of_zeros_and_of_little_more_are_too():
    rows = adversarial()[[0, 1, 2, 3, 6, 7, 8, 11]]
    assert is_int8_as_by_bitsandbytes(rows.to(torch.bfloat16))


def test_int8_refuses_what_float16_cannot_hold():
    weight = torch.full((2, 64), 1.0)
    weight[0, 0] = 7e4
    with pytest.raises(ValueError, match="1 of 128"):
        kernels.quantize_rows(weight)


# -------------------------------------------------------------------------------------- dequantize


@settings(deadline=None)
@given(
    rows=st.integers(1, 40),
    block=st.sampled_from((32, 64, 128)),
    format=FORMATS,
    double_quant=st.booleans(),
    dtype=st.sampled_from((torch.bfloat16, torch.float32)),
    using=st.sampled_from(HERE),
)
def test_values_are_those_of_bitsandbytes(rows, block, format, double_quant, dtype, using):
    weight = drawn(rows, 2 * block).to(dtype)
    codes, state = stored(weight, format, block, double_quant)
    expected = bnb_functional.dequantize_4bit(codes, state)
    first = rows // 3
    out = torch.empty(rows - first, 2 * block, dtype=dtype)
    kernels.dequantize(kernels.weight(codes, state), out, first, using)
    assert torch.equal(out, expected[first:])


# ---------------------------------------------------------------------------------------- multiply


def products(weight: torch.Tensor, tokens: int, format="nf4", block=64, double_quant=True, using=0):
    """A product, what it is exactly, and the sum of the magnitudes of its terms."""
    codes, state = stored(weight, format, block, double_quant)
    x = drawn(tokens, weight.shape[1], seed=1).to(torch.bfloat16)
    (y,) = kernels.multiply([kernels.weight(codes, state)], x, using)
    state.dtype = torch.float32
    values = bnb_functional.dequantize_4bit(codes, state).double().T
    return y.double(), x.double() @ values, x.double().abs() @ values.abs()


@settings(deadline=None)
@given(
    tokens=st.integers(1, 9),
    rows=st.integers(1, 41),
    blocks=st.sampled_from((1, 2, 3, 5, 17, 35)),
    block=st.sampled_from((64, 128, 256)),
    format=FORMATS,
    double_quant=st.booleans(),
    using=st.sampled_from(HERE),
)
def test_a_product_is_right_to_16_bits(tokens, rows, blocks, block, format, double_quant, using):
    """The 16 values of the table are rounded to 8 bits, by one part in 2**9, and so is the sum."""
    weight = drawn(rows, blocks * block).to(torch.bfloat16)
    y, exact, magnitude = products(weight, tokens, format, block, double_quant, using)
    assert ((y - exact).abs() <= 1.02 * (magnitude + exact.abs()) / 2**9).all()


@pytest.mark.parametrize("using", HERE, ids=lambda level: level.label)
def test_a_large_product_errs_no_more_than_the_16_bits_of_weights_and_outputs(using):
    """Rounding outputs errs by 0.17%, rounding the 16 values of the table by about 0.2%."""
    y, exact, _ = products(drawn(512, 1024).to(torch.bfloat16), 4, using=using)
    assert (y - exact).norm() / exact.norm() < 0.0035


@pytest.mark.parametrize("using", HERE, ids=lambda level: level.label)
def test_products_together_are_those_apart_whatever_the_threads(using):
    kept = [stored(drawn(rows, 1024), "nf4", 64, True) for rows in (700, 3, 64)]
    weights = [kernels.weight(*each) for each in kept]
    x = drawn(5, 1024, seed=9).to(torch.bfloat16)
    with computing_threads(1):
        apart = [kernels.multiply([weight], x, using)[0] for weight in weights]
    for threads in (2, 3):
        with computing_threads(threads):
            together = kernels.multiply(weights, x, using)
        assert all(torch.equal(*both) for both in zip(apart, together, strict=True))


@contextmanager
def computing_threads(threads: int):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    yield
    torch.set_num_threads(before)


@settings(deadline=None)
@given(
    tokens=st.integers(1, 9),
    experts=st.integers(1, 6),
    top_k=st.integers(1, 3),
    threads=st.integers(1, 3),
    using=st.sampled_from(HERE),
    seed=st.integers(0, 9),
)
def test_experts_mixed_are_their_products_in_turn(tokens, experts, top_k, threads, using, seed):
    """Each matrix by itself, torch's SiLU and sums between; the results differ by a last place."""
    hidden, ffn = 128, 192
    top_k = min(top_k, experts)
    kept = [
        [stored(drawn(*shape, seed=3 * number + place), "nf4", 64, True) for place, shape in shapes]
        for number in range(experts)
        for shapes in [enumerate([(ffn, hidden), (ffn, hidden), (hidden, ffn)])]
    ]
    matrices = [[kernels.weight(*each) for each in expert] for expert in kept]
    x = drawn(tokens, hidden, seed=seed).to(torch.bfloat16)
    odds = drawn(tokens, experts, seed=seed + 1).softmax(-1)
    weights, chosen = odds.topk(top_k, dim=-1)
    used = {
        number: kernels.Expert(*matrices[number])
        for number in sorted(set(chosen.flatten().tolist()))
    }
    with computing_threads(threads):
        mixed = kernels.mix(used, chosen.flatten().tolist(), weights, x, using)

    expected = torch.zeros_like(x)
    for number in used:
        token, place = (chosen == number).nonzero(as_tuple=True)
        gate, up, down = matrices[number]
        gates, ups = kernels.multiply([gate, up], x[token], using)
        (part,) = kernels.multiply([down], torch.nn.functional.silu(gates) * ups, using)
        part = part * weights[token, place, None]
        expected.index_add_(0, token, part.to(torch.bfloat16))
    assert (mixed - expected).norm() <= 0.002 * expected.norm()


# ----------------------------------------------------------------------------- between the matrices


@pytest.mark.parametrize("using", HERE, ids=lambda level: level.label)
@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("columns", [1, 17, 128, 1000])
def test_a_matrix_in_16_bits(columns, tokens, using):
    weight, x = (drawn(rows, columns).to(torch.bfloat16) for rows in (70, tokens))
    y = kernels.multiply_16bit(weight, x, using)
    exact = x.double() @ weight.double().T
    magnitude = x.double().abs() @ weight.double().abs().T
    assert ((y.double() - exact).abs() <= exact.abs() / 2**8 + magnitude / 2**18).all()


@pytest.mark.parametrize("shape", [(1, 1, 128), (2, 7, 33), (3, 2048)])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 300.0])
def test_the_norm_is_that_of_mixtral(shape, scale):
    norm = MixtralRMSNorm(shape[-1], eps=1e-5).to(torch.bfloat16)
    norm.weight.data = drawn(shape[-1], seed=1).to(torch.bfloat16)
    x = drawn(*shape).mul(scale).to(torch.bfloat16)
    with torch.no_grad():
        found, expected = kernels.norm(x, norm.weight, 1e-5).float(), norm(x).float()
    assert ((found - expected).abs() <= expected.abs() / 2**7).all()
    assert (found != expected).float().mean() < 0.01


def test_the_norm_of_zeros_is_zero():
    zeros = torch.zeros(2, 64, dtype=torch.bfloat16)
    assert torch.equal(kernels.norm(zeros, zeros[0] + 1, 1e-5), zeros)


@pytest.mark.parametrize("positions", [1, 3])
def test_vectors_turn_as_transformers_turns_them(positions):
    vectors = drawn(3, 4, 64).to(torch.bfloat16)
    angles = drawn(positions, 1, 64, seed=1)
    cosines, sines = angles.cos().to(torch.bfloat16), angles.sin().to(torch.bfloat16)
    expected, _ = apply_rotary_pos_emb(vectors.unsqueeze(2), vectors.unsqueeze(2), cosines, sines)
    kernels.rotate(vectors, cosines, sines)
    assert torch.equal(vectors, expected.squeeze(2))


@settings(deadline=None)
@given(
    sequences=st.integers(1, 3),
    groups=st.sampled_from((1, 2, 4)),
    shared=st.sampled_from((1, 2, 3)),
    length=st.sampled_from((1, 2, 31, 600)),
    size=st.sampled_from((8, 32, 80)),
)
def test_attention_is_that_of_torch(sequences, groups, shared, length, size):
    queries = drawn(sequences, groups * shared, size).to(torch.bfloat16)
    keys, values = (
        drawn(sequences, groups, length, size, seed=seed).to(torch.bfloat16) for seed in (1, 2)
    )
    found = kernels.attend(queries, keys, values, size**-0.5)
    exact = torch.nn.functional.scaled_dot_product_attention(
        queries.unsqueeze(2).double(), keys.double(), values.double(), enable_gqa=True
    ).squeeze(2)
    assert ((found.double() - exact).abs() <= exact.abs() / 2**8 + 1e-5).all()


def test_attention_holds_with_large_scores():
    keys = torch.tensor([[[[300.0], [299.0]]]], dtype=torch.bfloat16)
    queries = torch.full((1, 1, 1), 200.0, dtype=torch.bfloat16)
    assert kernels.attend(queries, keys, keys, 1.0).item() == 300


def test_what_is_taken():
    x = torch.ones(2, dtype=torch.bfloat16)
    assert kernels.take(x, x)
    assert not kernels.take(x, x.float())
    assert not kernels.take(x.to("meta"))
    parameter = torch.nn.Parameter(x)
    assert not kernels.take(parameter)
    with torch.no_grad():
        assert kernels.take(parameter)


# ------------------------------------------------------------------------------------- the library


def test_a_library_that_does_not_load_is_as_none(tmp_path):
    assert kernels._compiled(tmp_path) is None
    (tmp_path / f"_kernels{EXTENSION_SUFFIXES[0]}").write_bytes(b"no library")
    assert kernels._compiled(tmp_path) is None


def test_the_group_is_what_the_source_says():
    source = Path(kernels.__file__).with_name("kernels.cpp").read_text()
    assert f"constexpr int GROUP = {GROUP};" in source
    assert f"constexpr int CHUNK = {kernels.CHUNK};" in source
