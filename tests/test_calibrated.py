"""Both methods are what their papers say, and lose less where they claim to."""

import math
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from labutils import languages, standin
from labutils.calibrated import (
    EXPONENTS,
    METHODS,
    PROJECTIONS,
    Rounder,
    Statistics,
    awq,
    expert_statistics,
    gptq,
    restored,
    round_layer,
    round_model,
    rounded_experts,
)
from labutils.codebooks import CODEBOOKS
from labutils.formats import quantize
from labutils.moe import MoELayer

FORMATS = ("int2", "int3", "int8", "nf2", "nf4", "fp4", "fp8_e4m3")


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def correlated(tokens: int, inputs: int, seed: int = 0) -> torch.Tensor:
    """Inputs that are mixtures of a quarter as many causes, and a little noise of their own."""
    causes = normal(inputs // 4, inputs, seed=100)
    mixed = normal(tokens, inputs // 4, seed=seed) @ causes
    return mixed / mixed.std() + 0.1 * normal(tokens, inputs, seed=seed + 1)


def to_level(weights: torch.Tensor, maxima: torch.Tensor, format: str) -> torch.Tensor:
    """Each weight's nearest level, looked for among all of them."""
    codebook = CODEBOOKS[format]
    levels = codebook.levels * (maxima / codebook.peak)[..., None]
    nearest = (weights[..., None] - levels).abs().argmin(dim=-1, keepdim=True)
    return levels.gather(-1, nearest).squeeze(-1)


# ----------------------------------------------------------------------------- worked examples


def test_two_weights_that_see_the_same_input_share_an_error():
    """0.4 becomes 0; what it lacks goes to 0.3, which would have become 0 as well."""
    seen = Statistics.of(torch.tensor([[1.0, 1.0, 0.0]]))
    weight = torch.tensor([[0.4, 0.3, 1.0]])
    assert quantize(weight, "int2", "row").dequantize().tolist() == [[0, 0, 1]]
    assert gptq(weight, seen, "int2", "row").weight.tolist() == [[0, 1, 1]]


def test_a_column_takes_over_what_least_squares_gives_it():
    """The last weight is w + e H01 / H11: the one that the rounded first weight leaves best."""
    x = correlated(500, 8)[:, :2]
    weight = torch.tensor([[0.37, -0.9]])
    first = quantize(weight, "int8", "row").dequantize()[0, 0]
    rest = x @ weight[0] - x[:, 0] * first
    best = (x[:, 1] @ rest) / (x[:, 1] @ x[:, 1])
    second = gptq(weight, Statistics.of(x), "int8", "row", damping=0).weight[0, 1]
    assert second.item() == pytest.approx(best.item(), abs=0.9 / 127)


def test_statistics_of_two_tokens():
    seen = Statistics.of(torch.tensor([[1.0, -2.0], [3.0, 0.0]]))
    assert seen.tokens == 2
    assert seen.hessian.tolist() == [[20, -4], [-4, 8]]
    assert seen.magnitudes.tolist() == [2, 1]


def test_output_error_is_that_of_the_outputs_themselves():
    x, weight, rounded = normal(30, 8), normal(5, 8, seed=1), normal(5, 8, seed=2)
    measured = Statistics.of(x).output_error(weight, rounded)
    outputs = (x @ weight.T, x @ rounded.T)
    assert measured == pytest.approx(((outputs[0] - outputs[1]).norm() / outputs[0].norm()).item())
    assert math.isnan(Statistics.of(x[:0]).output_error(weight, rounded))


def test_bits_count_the_scales_that_are_kept():
    """3 bits and a float32 for 64; AWQ's 128 scales of 16 bits over 96 rows unless folded."""
    weight, seen = normal(96, 128), Statistics.of(normal(500, 128) * torch.arange(1, 129))
    bits = {method: Rounder(method, "int3").of(weight, seen).bits_per_weight for method in METHODS}
    assert bits == {"rtn": 3.5, "gptq": 3.5, "awq": 3.5 + 16 / 96}
    assert awq(weight, seen, "int3", folded=True).bits_per_weight == 3.5


# ---------------------------------------------------------------------------------- against oracles


def slow_gptq(weight, x, format, size, damping):
    """Row by row, one weight after the other, with the inverse Hessian written out each time.

    OBQ (arXiv:2208.11580, equations 3 and 4) in the fixed order of GPTQ, in float64.
    """
    hessian = 2 * x.double().T @ x.double()
    hessian += damping * hessian.diagonal().mean() * torch.eye(len(hessian))
    result = torch.empty_like(weight, dtype=torch.float64)
    for row, weights in enumerate(weight.double()):
        left, inverse = weights.clone(), hessian.inverse()
        for j in range(len(left)):
            if j % size == 0:
                maximum = left[j : j + size].abs().max()
            result[row, j] = to_level(left[j], maximum, format)
            left -= (left[j] - result[row, j]) / inverse[j, j] * inverse[j]
            inverse -= torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
            inverse[j, j] = 1  # column j is gone: its row and column are zero but for rounding
    return result


@pytest.mark.parametrize(
    ("format", "columns", "block_size"),
    [("int3", 96, 32), ("nf3", 128, 64), ("int4", 256, "row"), ("int2", 200, "row")],
)
def test_gptq_is_the_slow_one_of_the_paper(format, columns, block_size):
    """Rows longer than a batch of 128 columns and blocks shorter than one; a tie may go astray."""
    weight, x = normal(12, columns), correlated(3 * columns, columns)
    size = columns if block_size == "row" else block_size
    expected = slow_gptq(weight, x, format, size, damping=0.05)
    fast = gptq(weight, Statistics.of(x), format, block_size, damping=0.05).weight
    same = torch.isclose(fast.double(), expected, rtol=1e-4, atol=1e-5).all(dim=1)
    assert same.sum() >= len(same) - 1
    plain = quantize(weight, format, block_size).dequantize()
    assert not torch.isclose(fast, plain).all(dim=1).any(), "nothing was pushed on"


def slow_awq(weight, x, format, size):
    """Every alpha on the tokens themselves; the error of the best and its weight."""
    best = (math.inf, None)
    mean = sum(row.abs() for row in x) / len(x)
    for step in range(21):
        s = ((mean / mean.mean()) ** (step / 20)).bfloat16().float()
        scaled = (weight * s).view(-1, size)
        maxima = scaled.abs().amax(dim=1, keepdim=True).expand_as(scaled)
        rounded = to_level(scaled, maxima, format).view_as(weight) / s
        best = min(best, ((x @ (weight - rounded).T).norm().item(), rounded), key=lambda b: b[0])
    return best


@pytest.mark.parametrize("format", ["int3", "nf4"])
def test_awq_is_the_best_of_all_alphas(format):
    weight, x = normal(24, 64), normal(300, 64, seed=1)
    x[:, 5] *= 30
    error, expected = slow_awq(weight, x, format, 32)
    rounded = awq(weight, Statistics.of(x), format, 32)
    mine = (x @ (weight - rounded.weight).T).norm().item()
    assert mine == pytest.approx(error, rel=1e-3)
    assert torch.isclose(rounded.weight, expected, rtol=1e-4, atol=1e-5).float().mean() > 0.99


def test_scales_of_down_proj_fold_into_up_proj_without_touching_a_code():
    layer, tokens = MoELayer(64, 128, 1, 1), correlated(400, 64)
    expert = layer.experts[0]
    seen = expert_statistics(layer, tokens)[0]
    seen.middle.magnitudes[3] *= 50
    down = awq(expert.down_proj.weight, seen.middle, "int3", folded=True)
    assert down.input_scales is not None
    up = expert.up_proj.weight.detach()
    folded = quantize(up / down.input_scales[:, None], "int3")
    assert torch.equal(folded.packed, quantize(up, "int3").packed)

    def answer(up_weight, down_weight):
        gate = torch.nn.functional.silu(tokens @ expert.gate_proj.weight.T)
        return (gate * (tokens @ up_weight.T)) @ down_weight.T

    apart = answer(quantize(up, "int3").dequantize(), down.weight)
    together = answer(folded.dequantize(), down.quantized.dequantize())
    torch.testing.assert_close(together, apart, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("every_token", [False, True])
def test_experts_see_their_own_tokens_or_all(every_token):
    layer, tokens = MoELayer(16, 32, 4, 2), normal(50, 16)
    _, routing = layer(tokens)
    seen = expert_statistics(layer, tokens.view(5, 10, 16), every_token)
    for index, expert in enumerate(layer.experts):
        gram, middle = torch.zeros(16, 16), torch.zeros(32)
        for x, chosen in zip(tokens, routing.chosen, strict=True):
            if every_token or index in chosen:
                gram += torch.outer(x, x)
                fed = torch.nn.functional.silu(expert.gate_proj(x)) * expert.up_proj(x)
                middle += fed.abs()
        torch.testing.assert_close(seen[index].inputs.gram, gram)
        torch.testing.assert_close(
            seen[index].middle.magnitudes * seen[index].middle.tokens, middle
        )
    if not every_token:
        assert [one.inputs.tokens for one in seen] == routing.counts.tolist()


# ------------------------------------------------------------------------------------- invariants


@settings(deadline=None, max_examples=40)
@given(
    st.sampled_from(FORMATS),
    st.sampled_from([32, 64, 128, "row"]),
    st.integers(1, 9),
    st.integers(0, 1000),
    st.sampled_from([0, 0.01, 1]),
)
def test_unrelated_inputs_leave_plain_rounding_code_for_code(
    format, block_size, rows, seed, damping
):
    weight = normal(rows, 256, seed=seed)
    weight[0] = 0
    seen = Statistics(10, torch.eye(256), torch.ones(256))
    plain, rounded = (
        quantize(weight, format, block_size),
        gptq(weight, seen, format, block_size, damping).quantized,
    )
    assert torch.equal(rounded.packed, plain.packed)
    assert torch.equal(rounded.dequantize(), plain.dequantize())
    assert rounded.stored_bytes == plain.stored_bytes


@settings(deadline=None, max_examples=25)
@given(st.sampled_from(FORMATS), st.integers(0, 1000), st.floats(0.1, 100))
def test_awq_is_never_worse_on_its_own_tokens(format, seed, loud):
    weight, x = normal(16, 64, seed=seed), normal(40, 64, seed=seed + 1)
    x[:, 3] *= loud
    seen = Statistics.of(x)
    plain = seen.output_error(weight, quantize(weight, format, 32).dequantize())
    assert seen.output_error(weight, awq(weight, seen, format, 32).weight) <= plain * (1 + 1e-5)


def test_even_inputs_leave_awq_without_scales():
    weight = normal(16, 64)
    rounded = awq(weight, Statistics(5, torch.eye(64), torch.ones(64)), "int3")
    assert rounded.input_scales is None and rounded.bits_per_weight == 3.5
    assert torch.equal(rounded.weight, quantize(weight, "int3").dequantize())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("method", METHODS)
def test_the_weight_keeps_shape_and_dtype_and_only_has_levels(method, dtype):
    weight = normal(10, 64).to(dtype)
    x = correlated(100, 64) * (1 + 20 * (torch.arange(64) == 7))
    rounded = Rounder(method, "int3", "row").of(weight, Statistics.of(x))
    assert rounded.weight.shape == weight.shape and rounded.weight.dtype == dtype
    assert rounded.method == method
    assert all(len(row.unique()) <= 7 for row in rounded.quantized.dequantize())


@pytest.mark.parametrize("method", METHODS)
def test_the_weight_that_is_rounded_stays_as_it_is(method):
    """A single row is its own transpose in memory, where a copy is easily forgotten."""
    weight, seen = normal(1, 64), Statistics.of(correlated(100, 64))
    Rounder(method, "int3").of(weight, seen)
    assert torch.equal(weight, normal(1, 64))


def test_an_input_that_is_always_zero_is_rounded_plainly():
    weight, x = normal(6, 64), correlated(200, 64)
    x[:, 32:] = 0
    for damping in (0, 0.01):
        rounded = gptq(weight, Statistics.of(x), "int3", 32, damping).weight
        plain = quantize(weight, "int3", 32).dequantize()
        assert torch.equal(rounded[:, 32:], plain[:, 32:])
        assert not torch.equal(rounded[:, :32], plain[:, :32])
    assert awq(weight, Statistics.of(x), "int3", 32).weight.isfinite().all()


# ----------------------------------------------------------------------------- what is promised


def mean_errors(layer, tokens, held_out, format, **settings):
    return {
        method: round_layer(layer, tokens, Rounder(method, format, **settings), held_out)
        .table.groupby("projection")
        .held_out_error.mean()
        for method in METHODS
    }


def test_gptq_loses_a_quarter_less_on_correlated_inputs():
    layer = MoELayer(64, 128, 4, 2)
    errors = mean_errors(layer, correlated(4000, 64), correlated(2000, 64, seed=7), "int3")
    assert (errors["gptq"]["gate_proj"] < 0.75 * errors["rtn"]["gate_proj"]).all()
    assert (errors["gptq"]["up_proj"] < 0.75 * errors["rtn"]["up_proj"]).all()
    assert errors["gptq"].mean() < 0.75 * errors["rtn"].mean()


@pytest.mark.parametrize("format", ["int2", "int3", "nf4"])
def test_gptq_is_plain_rounding_on_white_inputs(format):
    weight, seen, judged = (
        normal(128, 64),
        *(Statistics.of(normal(20_000, 64, seed=seed)) for seed in (1, 2)),
    )
    plain = judged.output_error(weight, quantize(weight, format).dequantize())
    calibrated = judged.output_error(weight, gptq(weight, seen, format).weight)
    assert calibrated == pytest.approx(plain, rel=0.03)


def test_awq_helps_where_an_input_stands_out():
    layer = MoELayer(64, 128, 4, 2)
    loud = 1 + 20 * (torch.arange(64) == 11)
    errors = mean_errors(layer, normal(2000, 64) * loud, normal(1000, 64, seed=3) * loud, "int3")
    for projection in ("gate_proj", "up_proj"):
        assert errors["awq"][projection] < 0.75 * errors["rtn"][projection]


# ------------------------------------------------------------------------------ layers and models


def lonely_layer() -> MoELayer:
    """Nobody is sent to expert 2: its logit is far below the others' for positive inputs."""
    layer = MoELayer(64, 128, 4, 2)
    with torch.no_grad():
        layer.router.weight[2] = -100
    return layer


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_an_expert_without_tokens_is_rounded_plainly_and_says_so(method):
    layer, tokens = lonely_layer(), normal(200, 64).abs()
    rounded = round_layer(layer, tokens, Rounder(method, "int3"), tokens)
    table = rounded.table.set_index(["expert", "projection"])
    assert (table.loc[2].method == "rtn").all() and (table.loc[2].tokens == 0).all()
    assert (table.drop(2).method == method).all() and (table.drop(2).tokens > 0).all()
    assert table.loc[2].held_out_error.isna().all()
    assert table.drop(2).notna().all(axis=None)
    for name, weight in rounded.layer.named_parameters():
        assert weight.isfinite().all(), name
    up = layer.experts[2].up_proj.weight
    assert torch.equal(rounded.layer.experts[2].up_proj.weight, quantize(up, "int3").dequantize())

    everyone = round_layer(layer, tokens, Rounder(method, "int3"), every_token=True)
    assert (everyone.table.tokens == 200).all() and (everyone.table.method == method).all()


def test_fewer_tokens_than_inputs_do_not_break_gptq():
    layer = MoELayer(64, 128, 4, 2)
    rounded = round_layer(layer, correlated(10, 64), Rounder("gptq", "int3"), normal(99, 64))
    assert rounded.table.tokens.max() <= 10
    assert all(weight.isfinite().all() for weight in rounded.layer.parameters())
    assert rounded.bits_per_weight == 3.5


def test_a_layer_is_copied_and_its_router_kept():
    layer, tokens = MoELayer(64, 128, 4, 2), normal(100, 64)
    before = {name: weight.clone() for name, weight in layer.state_dict().items()}
    rounded = round_layer(layer, tokens, Rounder("gptq", "int2"))
    for name, weight in layer.state_dict().items():
        assert torch.equal(weight, before[name]), name
        same = torch.equal(rounded.layer.state_dict()[name], weight)
        assert same == name.startswith("router"), name


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(standin.PATH, dtype=torch.float32)


def page_ids(count: int, held_out: bool = False) -> torch.Tensor:
    pages = languages.pages(count, torch.Generator().manual_seed(5), held_out)
    return torch.tensor(standin.tokenizer()(pages)["input_ids"])


def test_a_model_is_rounded_layer_after_layer_and_restored(model):
    """Each layer's record is that of `round_layer` on what the layers before it, rounded, give."""
    token_ids, held_out = page_ids(2), page_ids(1, held_out=True)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    rounder = Rounder("gptq", "int3")
    with rounded_experts(model, token_ids, rounder, held_out) as rounded:
        inputs = []
        hooks = [
            layer.mlp.register_forward_pre_hook(lambda _, x: inputs.append(x[0].flatten(0, 1)))
            for layer in model.model.layers
        ]
        with torch.no_grad():
            model(input_ids=token_ids)
        for hook in hooks:
            hook.remove()
        block = model.model.layers[2].mlp
        inside = block.experts.down_proj[3].detach().clone()
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, before[name]), name
    again = round_layer(MoELayer.from_transformers(block), inputs[2], rounder)
    assert torch.equal(again.layer.experts[3].down_proj.weight, inside)
    assert list(rounded.table.columns[:4]) == ["layer", "expert", "projection", "tokens"]
    assert len(rounded.table) == 4 * 8 * 3
    per_layer = rounded.table[rounded.table.projection == "up_proj"].groupby("layer").tokens.sum()
    assert (per_layer == 2 * token_ids.numel()).all()
    assert rounded.bits_per_weight == 3.5
    assert (rounded.table.held_out_error > rounded.table.calibration_error * 0.5).all()


def test_a_model_is_restored_after_an_error(model):
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    with (
        pytest.raises(KeyError, match="inside"),
        rounded_experts(model, page_ids(1), Rounder("rtn", "int2")),
    ):
        assert not torch.equal(
            model.model.layers[0].mlp.experts.down_proj,
            before["model.layers.0.mlp.experts.down_proj"],
        )
        raise KeyError("inside")
    with (
        pytest.raises(ValueError, match="singular"),
        rounded_experts(model, page_ids(1), Rounder("gptq", "int2", damping=0)),
    ):
        pass
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, before[name]), name
    assert not model.model.layers[0].mlp._forward_pre_hooks


def test_the_standin_takes_seconds_and_loses_a_quarter_less(model):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a column is too small to share
    began = time.perf_counter()
    try:
        with rounded_experts(model, page_ids(16), Rounder("gptq", "int3"), page_ids(8, True)) as g:
            seconds = time.perf_counter() - began
    finally:
        torch.set_num_threads(threads)
    with rounded_experts(model, page_ids(16), Rounder("rtn", "int3"), page_ids(8, True)) as plain:
        pass
    assert seconds < 30
    calibrated, uncalibrated = (
        record.table.groupby("projection").held_out_error.mean() for record in (g, plain)
    )
    for projection in PROJECTIONS:
        assert calibrated[projection] < 0.75 * uncalibrated[projection]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_pass_over_any_model_rounds_as_over_a_mixtral(dtype):
    """In bfloat16 too, where routing is the model's own and rounding is done in 32 bits."""
    model = AutoModelForCausalLM.from_pretrained(standin.PATH, dtype=dtype)
    token_ids, rounder = page_ids(1), Rounder("awq", "int3")
    name = "model.layers.0.mlp.experts.down_proj"
    with rounded_experts(model, token_ids, rounder):
        expected = model.get_parameter(name).detach().clone()
    with restored(model.parameters()):
        parts = round_model(
            model, token_ids, lambda part: rounder if part.component == "experts" else None
        )
        same = (model.get_parameter(name) == expected).float().mean()
        assert same == 1 if dtype == torch.float32 else same > 0.9
    assert len(parts) == 4 * 8 * 3
    assert not torch.equal(model.get_parameter(name), expected)


# ----------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"method": "gtpq", "format": "int3"}, "Unknown method 'gtpq'; the methods are rtn, gptq"),
        ({"method": "gptq", "format": "mxfp4"}, "mxfp4 has no float32 block maxima.*nf4"),
        ({"method": "awq", "format": "bf16"}, "bf16 has no float32 block maxima"),
        ({"method": "awq", "format": "int9"}, "Unknown format 'int9'"),
        ({"method": "gptq", "format": "int3", "block_size": 48}, "Block size 48 is not one of 32"),
        ({"method": "gptq", "format": "int3", "damping": -0.5}, r"damping=-0.5.*try 0.01"),
    ],
)
def test_settings_that_do_not_exist(settings, said):
    with pytest.raises(ValueError, match=said):
        Rounder(**settings)


@pytest.mark.parametrize("round", [gptq, awq])
def test_matrices_that_do_not_fit(round):
    seen = Statistics.of(normal(9, 64))
    with pytest.raises(ValueError, match=r"shape \(5, 32\) .* 64 inputs; give \(out, 64\)"):
        round(normal(5, 32), seen, "int3", 32)
    with pytest.raises(ValueError, match="Blocks of 128 do not divide rows of 64"):
        round(normal(5, 64), seen, "int3", 128)
    with pytest.raises(ValueError, match="0 tokens were seen, at least 1"):
        round(normal(5, 64), Statistics.of(normal(0, 64)), "int3")
    with pytest.raises(ValueError, match="2 NaN or infinite values among 320"):
        weight = normal(5, 64)
        weight[0, 0], weight[1, 1] = math.nan, math.inf
        round(weight, seen, "int3")


def test_inputs_that_are_none():
    with pytest.raises(ValueError, match=r"shape \(2, 3, 4\)"):
        Statistics.of(normal(2, 3, 4))
    with pytest.raises(ValueError, match="hold 1 NaN or infinite values among 40"):
        Statistics.of(torch.where(torch.arange(40).view(10, 4) == 7, math.nan, 1.0))
    with pytest.raises(ValueError, match="width 32; this layer takes 64"):
        round_layer(MoELayer(64, 128, 4, 2), normal(5, 32), Rounder("gptq", "int3"))
    with pytest.raises(ValueError, match="NaN or infinite"):
        round_layer(MoELayer(64, 128, 4, 2), normal(5, 64) / 0, Rounder("gptq", "int3"))


def test_a_hessian_that_says_too_little_needs_damping():
    weight, seen = normal(4, 64), Statistics.of(normal(5, 64))
    with pytest.raises(ValueError, match=r"damping=0 .*64 inputs.* Raise damping to 0.01"):
        gptq(weight, seen, "int3", damping=0)
    assert gptq(weight, seen, "int3").weight.isfinite().all()


def test_pages_of_two_lengths(model):
    with (
        pytest.raises(ValueError, match=r"\(1, 256\) and \(1, 100\)"),
        rounded_experts(model, page_ids(1), Rounder("rtn", "int2"), page_ids(1)[:, :100]),
    ):
        pass


def test_alphas_begin_with_plain_rounding():
    assert EXPONENTS[0] == 0 and EXPONENTS[-1] == 1 and len(EXPONENTS) == 21
