"""The layer against transformers' own block, brute force, and what the papers say."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from families import FAMILIES
from hypothesis import given
from hypothesis import strategies as st
from transformers import MixtralConfig, MixtralForCausalLM
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Moe
from transformers.models.mixtral.modeling_mixtral import (
    MixtralSparseMoeBlock,
    load_balancing_loss_func,
)
from transformers.models.olmoe.modeling_olmoe import OlmoeSparseMoeBlock

from labutils.moe import (
    MoELayer,
    Routing,
    SwiGLU,
    block_inputs,
    load_balancing_loss,
    route,
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def block_of(
    hidden: int = 16, ffn: int = 24, experts: int = 8, top_k: int = 2, seed: int = 0, **more
) -> MixtralSparseMoeBlock:
    config = MixtralConfig(
        hidden_size=hidden,
        intermediate_size=ffn,
        num_local_experts=experts,
        num_experts_per_tok=top_k,
        experts_implementation="eager",
        **more,
    )
    return filled(MixtralSparseMoeBlock(config), seed)


def filled(block: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    drawn = generator(seed)
    for weight in block.parameters():
        torch.nn.init.normal_(weight, std=weight.shape[-1] ** -0.5, generator=drawn)
    return block


@st.composite
def layers(draw: st.DrawFn) -> tuple[MixtralSparseMoeBlock, torch.Tensor]:
    """A block of transformers with random sizes and weights, and tokens for it."""
    experts = draw(st.integers(1, 9))
    hidden = draw(st.integers(1, 24))
    block = block_of(
        hidden,
        draw(st.integers(1, 40)),
        experts,
        draw(st.integers(1, experts)),
        draw(st.integers(0, 2**20)),
    )
    shape = (draw(st.integers(1, 4)), draw(st.integers(1, 9)), hidden)
    return block, torch.randn(shape, generator=generator(draw(st.integers(0, 2**20))))


# ----------------------------------------------------------------------------- published examples


def test_weights_are_a_softmax_over_the_chosen_logits():
    """Mixtral writes its rule as Softmax(TopK(x Wg)), arXiv:2401.04088, section 2.1."""
    logits = torch.randn(100, 8, generator=generator())
    routing = route(logits, top_k=2)
    kept, chosen = logits.topk(2)
    assert torch.equal(routing.chosen, chosen)
    torch.testing.assert_close(routing.weights, kept.softmax(dim=-1))


def test_mixtral_has_the_published_number_of_parameters_in_its_experts():
    with torch.device("meta"):
        layer = MoELayer(hidden=4096, ffn=14336, experts=8, top_k=2)
    router, expert = 8 * 4096, 176_160_768
    assert layer.total_parameters == router + 8 * expert
    assert layer.active_parameters == router + 2 * expert
    assert 32 * (layer.total_parameters - router) == 45_097_156_608


def test_balance_loss_knows_even_and_collapsed_routing():
    """Switch, section 2.2: 1 when routing is even; here top_k times that."""
    even = route(10 * torch.eye(4).repeat(3, 1), top_k=1)
    assert load_balancing_loss(even).item() == pytest.approx(1)
    collapsed = route(torch.tensor([[99.0, 0, 0, 0]]).repeat(12, 1), top_k=1)
    assert load_balancing_loss(collapsed).item() == pytest.approx(4)


# ------------------------------------------------------------------------------------- round trip


@given(layers())
def test_writing_back_what_was_read_changes_nothing(case):
    block, _ = case
    before = {name: weight.clone() for name, weight in block.state_dict().items()}
    MoELayer.from_transformers(block).write_to(block)
    for name, weight in block.state_dict().items():
        assert torch.equal(weight, before[name]), name


def test_changed_layer_is_what_the_block_computes_after_writing():
    block, x = block_of(), torch.randn(2, 5, 16, generator=generator())
    layer = MoELayer.from_transformers(block)
    with torch.no_grad():
        for weight in layer.parameters():
            weight.mul_(torch.randn(weight.shape, generator=generator(1)))
        assert not torch.allclose(block(x), layer(x)[0], atol=1e-3), "the weights are copies"
        layer.write_to(block)
        torch.testing.assert_close(block(x), layer(x)[0], rtol=0, atol=1e-5)


# ----------------------------------------------------------------------------------------- oracle


@given(layers())
def test_equals_transformers(case):
    block, x = case
    y, routing = MoELayer.from_transformers(block)(x)
    torch.testing.assert_close(y, block(x), rtol=0, atol=1e-5)
    logits, weights, chosen = block.gate(x)
    torch.testing.assert_close(routing.logits, logits, rtol=0, atol=1e-5)
    torch.testing.assert_close(routing.weights, weights, rtol=0, atol=1e-5)
    assert torch.equal(routing.chosen, chosen)


def test_equals_transformers_in_bfloat16():
    block = block_of().to(torch.bfloat16)
    x = torch.randn(2, 50, 16, generator=generator(), dtype=torch.bfloat16)
    y, routing = MoELayer.from_transformers(block)(x)
    assert y.dtype == torch.bfloat16 and routing.weights.dtype == torch.float32
    torch.testing.assert_close(y, block(x))
    torch.testing.assert_close(routing.weights, block.gate(x)[1])


@given(st.integers(1, 9), st.integers(1, 30), st.integers(0, 2**20), st.data())
def test_balance_loss_equals_transformers(experts, tokens, seed, data):
    top_k = data.draw(st.integers(1, experts))
    logits = 3 * torch.randn(tokens, experts, generator=generator(seed))
    theirs = load_balancing_loss_func((logits,), experts, top_k)
    torch.testing.assert_close(load_balancing_loss(route(logits, top_k)), theirs)


@given(layers())
def test_equals_the_sum_written_plainly(case):
    block, x = case
    layer = MoELayer.from_transformers(block)
    y, routing = layer(x)
    for place, token in enumerate(x.flatten(0, 1)):
        probabilities = (layer.router.weight @ token).softmax(dim=0)
        chosen = routing.chosen[place].tolist()
        answer = sum(
            probabilities[index]
            * (expert.down_proj.weight @ (F.silu(expert.gate_proj(token)) * expert.up_proj(token)))
            for index, expert in enumerate(layer.experts)
            if index in chosen
        )
        torch.testing.assert_close(
            y.flatten(0, 1)[place], answer / probabilities[chosen].sum(), rtol=1e-4, atol=1e-5
        )


# ------------------------------------------------------------------------------------- invariants


@given(st.integers(1, 12), st.integers(0, 30), st.integers(0, 2**20), st.data())
def test_a_routing_is_consistent(experts, tokens, seed, data):
    top_k = data.draw(st.integers(1, experts))
    logits = 5 * torch.randn(tokens, experts, generator=generator(seed))
    routing = route(logits, top_k)
    assert routing.weights.shape == routing.chosen.shape == (tokens, top_k)
    torch.testing.assert_close(routing.weights.sum(-1), torch.ones(tokens))
    torch.testing.assert_close(routing.probabilities.sum(-1), torch.ones(tokens))
    assert routing.counts.sum() == tokens * top_k and len(routing.counts) == experts
    assert all(len(set(row)) == top_k for row in routing.chosen.tolist())
    assert all((a >= b).all() for a, b in pairwise(routing.weights.T))
    chosen = torch.zeros(tokens, experts, dtype=torch.bool).scatter(1, routing.chosen, True)
    assert not routing.gates[~chosen].any()
    torch.testing.assert_close(routing.gates.gather(1, routing.chosen), routing.weights)
    if tokens > 0 and top_k < experts:
        unchosen = logits.masked_fill(chosen, -torch.inf).amax(1)
        assert (logits.masked_fill(~chosen, torch.inf).amin(1) >= unchosen).all()


@pytest.mark.parametrize("shape", [(16,), (7, 16), (2, 7, 16), (2, 3, 4, 16), (0, 16)])
def test_any_leading_axes(shape):
    layer, x = MoELayer(16, 24, 8, 2), torch.randn(shape, generator=generator())
    y, routing = layer(x)
    flat, _ = layer(x.reshape(-1, 16))
    assert y.shape == shape and routing.logits.shape == (x.numel() // 16, 8)
    torch.testing.assert_close(y.reshape(-1, 16), flat)


def test_a_token_is_routed_by_itself():
    layer, x = MoELayer(16, 24, 8, 2), torch.randn(20, 16, generator=generator())
    order = torch.randperm(20, generator=generator())
    torch.testing.assert_close(layer(x)[0][order], layer(x[order])[0])


def test_only_chosen_experts_are_computed():
    layer, seen = MoELayer(16, 24, 8, 2), {}
    for index, expert in enumerate(layer.experts):
        expert.register_forward_hook(lambda _, x, y, index=index: seen.update({index: len(x[0])}))
    _, routing = layer(torch.randn(3, 16, generator=generator()))
    assert seen == {i: n for i, n in enumerate(routing.counts.tolist()) if n}
    assert len(seen) < 8


def test_every_chosen_expert_and_the_router_learn_and_the_others_do_not():
    layer = MoELayer(16, 24, 8, 2)
    y, routing = layer(torch.randn(2, 16, generator=generator()))
    y.square().sum().backward()
    assert layer.router.weight.grad.any()
    for index, expert in enumerate(layer.experts):
        grad = expert.down_proj.weight.grad
        assert (grad is not None and bool(grad.any())) == (index in routing.chosen)


def test_balance_loss_pushes_down_what_is_chosen_most():
    logits = torch.tensor([[2.0, 1, 0], [2, 0, 1], [2, 1, 0]], requires_grad=True)
    load_balancing_loss(route(logits, top_k=1)).backward()
    assert (logits.grad[:, 0] > 0).all() and (logits.grad[:, 1:] < 0).all()


def test_seeded_and_of_a_sensible_scale():
    state = torch.get_rng_state()
    first, second = MoELayer(64, 128, 8, 2), MoELayer(64, 128, 8, 2)
    other = MoELayer(64, 128, 8, 2, generator=generator(1))
    assert torch.equal(torch.get_rng_state(), state), "torch's own random numbers were used"
    x = torch.randn(500, 64, generator=generator())
    y, routing = first(x)
    assert torch.equal(y, second(x)[0]) and not torch.equal(y, other(x)[0])
    assert 0.3 < y.std() < 1 and 0.8 < routing.logits.std() < 1.2


def test_parameters_are_those_that_a_token_meets():
    layer = MoELayer(16, 24, 8, 3)
    used = [layer.router, *layer.experts[:3]]
    assert layer.total_parameters == 8 * 16 + 8 * 3 * 16 * 24
    assert layer.active_parameters == sum(w.numel() for part in used for w in part.parameters())
    assert SwiGLU(16, 24, generator()).down_proj.bias is None


def test_a_copied_layer_can_be_trained_and_the_block_stays():
    block = block_of().requires_grad_(False)
    before = block.gate.weight.clone()
    layer = MoELayer.from_transformers(block)
    assert all(weight.requires_grad for weight in layer.parameters())
    torch.nn.init.zeros_(layer.router.weight)
    assert torch.equal(block.gate.weight, before)


# ----------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((16, 24, 8, 9), "top_k=9: with 8 experts it must be 1 to 8"),
        ((16, 24, 8, 0), "top_k=0: with 8 experts"),
        ((16, 24, 8, -1), "top_k=-1"),
        ((16, 24, 0, 1), "experts=0"),
        ((0, 24, 8, 2), "hidden=0"),
        ((16, -3, 8, 2), "ffn=-3"),
    ],
)
def test_sizes_that_make_no_layer(sizes, message):
    with pytest.raises(ValueError, match=message):
        MoELayer(*sizes)


def test_routing_to_more_experts_than_there_are():
    with pytest.raises(ValueError, match="top_k=3: with 2 experts"):
        route(torch.zeros(1, 2), top_k=3)


def test_tokens_of_another_width():
    with pytest.raises(ValueError, match="width 12; this layer takes 16"):
        MoELayer(16, 24, 8, 2)(torch.zeros(1, 12))


def misshapen() -> MixtralSparseMoeBlock:
    block = block_of()
    block.experts.gate_up_proj.data = block.experts.gate_up_proj.data.mT.contiguous()
    return block


@pytest.mark.parametrize(
    ("block", "message"),
    [
        (torch.nn.Linear(4, 4), "A Linear holds weight, bias, and a Mixtral block exactly"),
        (
            filled(DeepseekV2Moe(FAMILIES["deepseek_v2"])),
            r"shared_experts\.gate_proj.*, and a Mixtral block exactly",
        ),
        (
            filled(OlmoeSparseMoeBlock(FAMILIES["olmoe"])),
            "OlmoeTopKRouter weighs experts by another rule",
        ),
        (block_of(hidden_act="gelu"), "activation is GELU"),
        (misshapen(), r"gate_up_proj has the shape \(8, 16, 48\).* must be \(8, 48, 16\)"),
    ],
    ids=["no block", "shared experts", "another rule", "another activation", "transposed"],
)
def test_blocks_that_are_no_mixtral(block, message):
    with pytest.raises(ValueError, match=message):
        MoELayer.from_transformers(block)


def test_another_rule_is_noticed_where_one_expert_has_nearly_all_the_weight():
    block = filled(OlmoeSparseMoeBlock(FAMILIES["olmoe"]))
    block.gate.weight.data *= 1000
    with pytest.raises(ValueError, match="another rule"):
        MoELayer.from_transformers(block)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (MoELayer(16, 24, 8, 3), "top_k=3, the block 2"),
        (MoELayer(16, 24, 7, 2), r"router\.weight: the layer has \(7, 16\), the block \(8, 16\)"),
        (MoELayer(16, 25, 8, 2), r"gate_proj\.weight: the layer has \(25, 16\), the block \(24"),
    ],
)
def test_a_block_is_written_whole_or_not_at_all(layer, message):
    block = block_of()
    before = {name: weight.clone() for name, weight in block.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        layer.write_to(block)
    assert all(torch.equal(weight, before[name]) for name, weight in block.state_dict().items())


def test_a_record_is_frozen():
    with pytest.raises(AttributeError):
        route(torch.zeros(1, 2), 1).chosen = None
    assert isinstance(route(torch.zeros(1, 2), 1), Routing)


def test_block_inputs_are_what_the_blocks_compute_with():
    model = MixtralForCausalLM(FAMILIES["mixtral"]).float()
    answers = []
    for decoder in model.model.layers:
        decoder.mlp.register_forward_hook(lambda _, given, answer: answers.append(answer))
    inputs = block_inputs(model, torch.arange(14).view(2, 7))
    assert [len(x) for x in inputs] == [14] * len(model.model.layers)
    for decoder, x, answer in zip(model.model.layers, inputs, answers, strict=True):
        y, _ = MoELayer.from_transformers(decoder.mlp)(x)
        torch.testing.assert_close(y.view_as(answer), answer, rtol=1e-5, atol=1e-5)
    assert not any(decoder.mlp._forward_pre_hooks for decoder in model.model.layers)


def test_tokens_of_another_dtype_are_refused():
    with pytest.raises(ValueError, match=r"bfloat16, the layer torch\.float32: use x\.to"):
        MoELayer(8, 8, 2, 1)(torch.ones(3, 8, dtype=torch.bfloat16))


def test_block_inputs_leave_no_hook_behind_after_an_error():
    model = MixtralForCausalLM(FAMILIES["mixtral"])
    with pytest.raises(IndexError):
        block_inputs(model, torch.full((1, 3), 10**6))
    assert not any(decoder.mlp._forward_pre_hooks for decoder in model.model.layers)
