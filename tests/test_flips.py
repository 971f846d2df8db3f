"""Flips against a count by hand, probabilities against noise that is drawn, replays to the bit."""

import copy
import itertools
import math
from dataclasses import replace

import pytest
import torch
import transformers
from families import FAMILIES
from hypothesis import given, settings
from hypothesis import strategies as st
from random_checkpoints import write_any
from scipy import stats
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from labutils import standin
from labutils.checkpoints import load
from labutils.flips import (
    Recording,
    compare,
    divergence,
    flip_probability,
    intercepted,
    margins,
    moe_blocks,
    record,
    replay,
    reroute,
)
from labutils.moe import Routing, route
from labutils.recipes import Recipe

CONFIDENCE = 0.999


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal_cdf(x: float) -> float:
    return math.erfc(-x / math.sqrt(2)) / 2


# ------------------------------------------------------------------------------------------ compare


def small_logits(draw, tokens: int, experts: int) -> torch.Tensor:
    """Whole numbers, so that many of them are equal."""
    largest = draw(st.integers(0, 4))
    drawn = generator(draw(st.integers(0, 2**31)))
    return torch.randint(-largest, largest + 1, (tokens, experts), generator=drawn).float()


@st.composite
def routing_pairs(draw) -> tuple[Routing, Routing]:
    """Two routings of the same tokens, of which some are routed by the same logits in both."""
    experts = draw(st.integers(2, 64))
    top_k = draw(st.integers(1, min(4, experts)))
    tokens = draw(st.integers(1, 12))
    before, other = (small_logits(draw, tokens, experts) for _ in range(2))
    same = torch.tensor(draw(st.lists(st.booleans(), min_size=tokens, max_size=tokens)))
    return route(before, top_k), route(torch.where(same[:, None], before, other), top_k)


def probabilities(logits: list[float]) -> list[float]:
    powers = [math.exp(logit - max(logits)) for logit in logits]
    return [power / sum(powers) for power in powers]


@settings(deadline=None)
@given(pair=routing_pairs())
def test_flips_are_those_that_are_counted_token_by_token(pair):
    reference, other = pair
    experts, top_k = reference.experts, reference.chosen.shape[1]
    kept, changed, first, order, divergences = [], [], [], [], []
    moves = [[0] * experts for _ in range(experts)]
    rows = zip(*(tensor.tolist() for tensor in (reference.chosen, other.chosen)), strict=True)
    for was, now in rows:
        kept.append(len(set(was) & set(now)))
        changed.append(set(was) != set(now))
        first.append(was[0] != now[0])
        order.append(was != now and set(was) == set(now))
        lost = [expert for expert in was if expert not in now]
        gained = [expert for expert in now if expert not in was]
        stayed = [expert for expert in was if expert in now]
        for source, target in zip(lost + stayed, gained + stayed, strict=True):
            moves[source][target] += 1
    for before, after in zip(reference.logits.tolist(), other.logits.tolist(), strict=True):
        pairs = zip(probabilities(before), probabilities(after), strict=True)
        divergences.append(sum(p * math.log(p / q) for p, q in pairs))

    flips = compare(reference, other)
    tokens = len(kept)
    assert flips.kept.tolist() == kept
    assert flips.set_changed.tolist() == changed
    assert flips.top1_changed.tolist() == first
    assert flips.order_changed.tolist() == order
    assert flips.flip_rate == pytest.approx(sum(changed) / tokens)
    assert flips.top1_flip_rate == pytest.approx(sum(first) / tokens)
    assert flips.order_flip_rate == pytest.approx(sum(order) / tokens)
    assert flips.overlap == pytest.approx(sum(kept) / (tokens * top_k))
    assert flips.moves.tolist() == moves
    assert flips.kl_by_token.tolist() == pytest.approx(divergences, abs=1e-12)
    assert flips.kl == pytest.approx(sum(divergences) / tokens, abs=1e-12)
    assert torch.equal(flips.moves.sum(dim=1), reference.counts)
    assert torch.equal(flips.moves.sum(dim=0), other.counts)


@settings(deadline=None)
@given(pair=routing_pairs(), impossible=st.integers(0, 3))
def test_nothing_has_flipped_where_nothing_changed(pair, impossible):
    """Exactly: no rounding, also where some experts can never be chosen."""
    logits, top_k = pair[0].logits.clone(), pair[0].chosen.shape[1]
    logits[:, : min(impossible, logits.shape[1] - top_k)] = -torch.inf
    flips = compare(route(logits, top_k), route(logits.clone(), top_k))
    assert flips.flip_rate == flips.top1_flip_rate == flips.order_flip_rate == flips.kl == 0
    assert flips.overlap == 1
    assert torch.equal(flips.moves, flips.reference.counts.diag())


@settings(deadline=None)
@given(pair=routing_pairs(), seed=st.integers(0, 2**31))
def test_another_order_of_the_same_experts_is_no_flip_of_the_set(pair, seed):
    reference, _ = pair
    order = torch.rand(reference.chosen.shape, generator=generator(seed)).argsort(dim=1)
    chosen = reference.chosen.gather(1, order)
    flips = compare(reference, Routing(reference.logits, reference.weights, chosen))
    moved = (order != torch.arange(order.shape[1])).any(dim=1)
    assert flips.flip_rate == flips.kl == 0
    assert flips.overlap == 1
    assert torch.equal(flips.order_changed, moved)
    assert torch.equal(flips.top1_changed, order[:, 0] != 0)


def test_what_has_become_impossible_is_infinitely_far_and_what_was_counts_nothing():
    whole, cut = torch.zeros(1, 2), torch.tensor([[0.0, -torch.inf]])
    assert compare(route(cut, 1), route(whole, 1)).kl == pytest.approx(math.log(2))
    assert compare(route(whole, 1), route(cut, 1)).kl == math.inf


@pytest.mark.parametrize("broken", [torch.nan, torch.inf])
def test_divergence_from_or_to_what_is_no_number_is_none(broken):
    """0 would say that nothing changed."""
    whole, other = torch.zeros(2, 3), torch.zeros(2, 3)
    other[1, 2] = broken
    for pair in ((whole, other), (other, whole), (other, other)):
        assert divergence(*pair).isnan().tolist() == [False, True]


@pytest.mark.parametrize("change", [1e-7, 1e-5, 1e-3])
def test_divergence_of_a_small_change_is_half_its_variance(change):
    """To second order: half the variance of the change under p. In float32 it would drown."""
    before, noise = torch.randn(2, 4096, 64, generator=generator(0), dtype=torch.float64)
    p = before.softmax(dim=-1)
    variance = (p * noise**2).sum(dim=-1) - (p * noise).sum(dim=-1) ** 2
    found = divergence(before, before + change * noise)
    assert found.mean().item() == pytest.approx(change**2 * variance.mean().item() / 2, rel=0.01)


def test_divergence_is_never_negative():
    """Where the change is so small that what is left of it is rounding, of either sign."""
    before, noise = torch.randn(2, 4096, 64, generator=generator(0), dtype=torch.float64)
    found = divergence(before, before + 1e-10 * noise)
    assert (found >= 0).all()
    assert found.max() < 1e-15


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (route(torch.zeros(4, 8), 2), "3 tokens to 8 experts, 2 each, the other 4 tokens"),
        (route(torch.zeros(3, 9), 2), "the other 3 tokens to 9 experts, 2 each"),
        (route(torch.zeros(3, 8), 3), "the other 3 tokens to 8 experts, 3 each"),
    ],
)
def test_routings_of_something_else_are_refused(other, message):
    with pytest.raises(ValueError, match=message):
        compare(route(torch.zeros(3, 8), 2), other)


def test_no_tokens_are_refused():
    nothing = route(torch.zeros(0, 8), 2)
    with pytest.raises(ValueError, match="at least one"):
        compare(nothing, nothing)


# ------------------------------------------------------------------ margins and flip probabilities


@settings(deadline=None)
@given(pair=routing_pairs())
def test_a_margin_is_the_least_of_all_gaps(pair):
    routing, _ = pair
    for logits, chosen, margin in zip(
        routing.logits.tolist(), routing.chosen.tolist(), margins(routing).tolist(), strict=True
    ):
        others = set(range(routing.experts)) - set(chosen)
        gaps = [logits[inside] - logits[outside] for inside in chosen for outside in others]
        assert margin == min(gaps, default=math.inf)


def test_margins_of_16_bit_logits_are_not_rounded_to_16_bits():
    logits = torch.tensor([[3.0, -0.01171875]], dtype=torch.bfloat16)
    assert margins(route(logits, 1)).item() == 3.01171875


@pytest.mark.parametrize("margin", [0.0, 1e-3, 0.5, 1.0, 3.0, 30.0])
@pytest.mark.parametrize("noise", [1e-2, 0.3, 1.0, 1e3])
def test_between_two_experts_it_is_the_closed_form(margin, noise):
    routing = route(torch.tensor([[margin, 0.0]], dtype=torch.float64), 1)
    expected = normal_cdf(-margin / (math.sqrt(2) * noise))
    assert flip_probability(routing, noise).item() == pytest.approx(expected, abs=1e-14)


@pytest.mark.parametrize(
    ("experts", "top_k"),
    [(3, 1), (3, 2), (4, 3), (6, 4), (8, 1), (8, 2), (16, 1), (16, 2), (16, 4)],
)
def test_as_many_tokens_flip_as_predicted(experts, top_k):
    """Against noise that is drawn, ten strengths of it."""
    draws, drawn = 100_000, generator(10 * experts + top_k)
    logits = torch.randn(1, experts, generator=drawn, dtype=torch.float64)
    noise = torch.randn(draws, experts, generator=drawn, dtype=torch.float64)
    routing = route(logits, top_k)
    chosen = routing.chosen.sort().values
    for strength in torch.logspace(-1.5, 1.5, 10).tolist():
        noisy = (logits + strength * noise).topk(top_k).indices.sort(dim=-1).values
        flipped = (noisy != chosen).any(dim=-1).sum().item()
        seen = stats.binomtest(flipped, draws).proportion_ci(CONFIDENCE, method="wilson")
        assert seen.low <= flip_probability(routing, strength).item() <= seen.high, strength


@settings(deadline=None)
@given(pair=routing_pairs(), exponent=st.floats(-2, 2))
def test_a_flip_is_at_least_the_nearest_pairs_and_at_most_all_pairs_together(pair, exponent):
    """Two logits change places with Phi(-gap / (sqrt(2) noise)); a flip needs one such pair."""
    routing, noise = pair[0], 10**exponent
    for logits, chosen, found in zip(
        routing.logits.tolist(),
        routing.chosen.tolist(),
        flip_probability(routing, noise).tolist(),
        strict=True,
    ):
        others = set(range(routing.experts)) - set(chosen)
        pairs = [
            normal_cdf((logits[outside] - logits[inside]) / (math.sqrt(2) * noise))
            for inside in chosen
            for outside in others
        ]
        assert max(pairs, default=0) - 1e-12 <= found <= min(1, sum(pairs)) + 1e-12


@pytest.mark.parametrize(("experts", "top_k"), [(2, 1), (5, 2), (64, 1), (64, 4), (64, 63)])
@pytest.mark.parametrize("noise", [1e-6, 1.0, 1e6])
def test_among_equals_every_set_is_as_likely_as_any_other(experts, top_k, noise):
    routing = route(torch.zeros(3, experts), top_k)
    expected = 1 - 1 / math.comb(experts, top_k)
    assert flip_probability(routing, noise).tolist() == pytest.approx([expected] * 3, abs=1e-12)


@pytest.mark.parametrize("noise", [1e-6, 1.0, 1e6])
def test_extremes_give_probabilities(noise):
    logits = torch.randn(64, 64, generator=generator(0))
    logits[0] = torch.linspace(-1e4, 1e4, 64)
    logits[1, 10:] = -1e4
    logits[2, :3] = 1e4
    logits[3, 5:] = -torch.inf
    for top_k in (1, 3, 64):
        probability = flip_probability(route(logits, top_k), noise)
        assert ((probability >= 0) & (probability <= 1)).all()


def test_noise_that_cannot_change_the_set_flips_nothing():
    logits = torch.tensor([[1.0, 0.0, -torch.inf]])
    assert flip_probability(route(logits, 2), noise=5.0).item() == 0
    assert flip_probability(route(logits, 3), noise=5.0).item() == 0
    assert flip_probability(route(logits, 1), noise=0).item() == 0
    two = flip_probability(route(logits[:, :2], 1), noise=5.0)
    assert torch.equal(flip_probability(route(logits, 1), noise=5.0), two)


@pytest.mark.parametrize("noise", [-0.1, math.nan])
def test_noise_that_is_no_deviation_is_refused(noise):
    with pytest.raises(ValueError, match="a standard deviation is 0 or larger"):
        flip_probability(route(torch.zeros(1, 2), 1), noise)


class LargestTensor(TorchDispatchMode):
    """Remembers the bytes of the largest tensor that any operation has made."""

    bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **kwargs or {})
        for tensor in made if isinstance(made, tuple) else [made]:
            if isinstance(tensor, torch.Tensor):
                self.bytes = max(self.bytes, tensor.nbytes)
        return made


def test_many_tokens_need_no_more_memory_than_some_and_get_the_same_probabilities():
    logits = torch.randn(4096, 64, generator=generator(0))
    with LargestTensor() as largest:
        together = flip_probability(route(logits, 8), 0.3)
    assert largest.bytes <= 2**23
    some = [0, 83, 84, 85, 2000, 4095]
    alone = torch.cat([flip_probability(route(logits[[token]], 8), 0.3) for token in some])
    torch.testing.assert_close(together[some], alone, rtol=0, atol=1e-14)


# ------------------------------------------------------------------------------------- the rule


def routed(logits: torch.Tensor, top_k: int, divided: bool) -> Routing:
    """What a router of transformers decides, weights in the dtype of its logits."""
    weights, chosen = logits.float().softmax(dim=-1).topk(top_k)
    if divided:
        weights /= weights.sum(dim=-1, keepdim=True)
    return Routing(logits, weights.to(logits.dtype), chosen)


def same_routing(one: Routing, other: Routing) -> bool:
    return all(
        torch.equal(getattr(one, name), getattr(other, name))
        for name in ("logits", "weights", "chosen")
    )


@settings(deadline=None)
@given(
    experts=st.integers(1, 64),
    top_k=st.integers(1, 8),
    scale=st.sampled_from((0.01, 1.0, 10.0, 100.0)),
    divided=st.booleans(),
    dtype=st.sampled_from((torch.float32, torch.bfloat16)),
    seed=st.integers(0, 2**31),
)
def test_rerouted_by_its_own_logits_it_is_the_same_routing(
    experts, top_k, scale, divided, dtype, seed
):
    """At scale 10 the weights nearly add up to 1 as they are: both rules come within a percent."""
    logits = (scale * torch.randn(5, experts, generator=generator(seed))).to(dtype)
    routing = routed(logits, min(top_k, experts), divided)
    assert same_routing(reroute(routing, logits), routing)


@pytest.mark.parametrize("divided", [True, False])
def test_rerouted_it_is_what_the_router_would_have_decided(divided):
    seen, logits = torch.randn(2, 50, 16, generator=generator(0))
    assert same_routing(reroute(routed(seen, 4, divided), logits), routed(logits, 4, divided))


def test_other_rules_are_refused():
    routing = routed(torch.randn(50, 16, generator=generator(0)), 4, divided=False)
    scaled = Routing(routing.logits, 16 * routing.weights, routing.chosen)
    with pytest.raises(ValueError, match="neither the largest probabilities"):
        reroute(scaled, routing.logits)
    halves = routing.probabilities.clone()
    halves[:, 8:] = 0
    weights, chosen = halves.topk(4)
    for limited in (weights, weights / weights.sum(dim=-1, keepdim=True)):
        with pytest.raises(ValueError, match="neither the largest probabilities"):
            reroute(Routing(routing.logits, limited, chosen), routing.logits)


@pytest.mark.parametrize("shape", [(49, 16), (50, 15), (50,)])
def test_logits_of_other_tokens_or_experts_are_refused(shape):
    routing = route(torch.randn(50, 16, generator=generator(0)), 2)
    with pytest.raises(ValueError, match=r"the router's have \(50, 16\)"):
        reroute(routing, torch.zeros(shape))


def test_a_broken_routing_has_no_rule():
    broken = route(torch.full((3, 4), torch.nan), 2)
    with pytest.raises(ValueError, match="neither the largest probabilities"):
        reroute(broken, torch.zeros(3, 4))


# ------------------------------------------------------------------------- recorded and replayed


def variant(family: str, **changes):
    config = copy.deepcopy(FAMILIES[family])
    for name, value in changes.items():
        setattr(config, name, value)
    return config


CONFIGS = {
    "mixtral": variant("mixtral"),
    "olmoe": variant("olmoe", norm_topk_prob=False),
    "olmoe-divided": variant("olmoe", norm_topk_prob=True),
    "qwen3_moe": variant("qwen3_moe", norm_topk_prob=False),
    "qwen3_moe-divided": variant("qwen3_moe", norm_topk_prob=True),
    "deepseek_v2": variant("deepseek_v2"),
}
RECIPES = {
    "nf4": Recipe(attention="nf4"),
    "nf4-router-int8": Recipe(attention="nf4", router="int8"),
    "nf4-router-nf4": Recipe(attention="nf4", router="nf4"),
}
STORED = ["fp32", "bf16", *RECIPES]
KINDS = list(itertools.product(CONFIGS, STORED))
TOKENS = torch.randint(0, 256, (2, 24), generator=generator(0))


def build(name: str, stored: str, folder, seed: int = 0):
    transformers.utils.logging.disable_progress_bar()
    config = copy.deepcopy(CONFIGS[name])
    if stored in RECIPES:
        return load(write_any(folder / "model", config, seed), RECIPES[stored], device_map="cpu")
    torch.manual_seed(seed)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[stored]
    return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


@pytest.fixture(scope="module", params=KINDS, ids="-".join)
def model(request, tmp_path_factory):
    return build(*request.param, tmp_path_factory.mktemp("flips"))


@pytest.fixture(scope="module")
def mixtral():
    model = build("mixtral", "fp32", None)
    answer(model, TOKENS)
    return model


@pytest.fixture(scope="module")
def trained():
    transformers.utils.logging.disable_progress_bar()
    return load(standin.PATH, device_map="cpu").float()


@torch.no_grad()
def answer(model, token_ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=token_ids, use_cache=False).logits


def hooks(model: nn.Module) -> int:
    return sum(
        len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()
    )


def same_routings(one: Recording, other: Recording) -> bool:
    return all(same_routing(*pair) for pair in zip(one.routings, other.routings, strict=True))


def permuted(recording: Recording, seed: int) -> Recording:
    """The same tokens with their experts renamed: any other decisions of the same shapes."""
    routings = []
    for routing in recording.routings:
        order = torch.randperm(routing.experts, generator=generator(seed))
        logits = routing.logits[:, order.argsort()]
        routings.append(Routing(logits, routing.weights, order[routing.chosen]))
    return Recording(recording.token_ids, tuple(routings), recording.logits)


def test_replaying_its_own_decisions_gives_exactly_its_own_logits(model):
    expected = answer(model, TOKENS)
    before = hooks(model)
    recording = record(model, TOKENS)
    again = replay(model, recording)
    assert torch.equal(recording.logits, expected)
    assert torch.equal(again.logits, expected)
    assert same_routings(again, recording)
    assert torch.equal(again.token_ids, TOKENS)
    assert hooks(model) == before


def test_every_recorded_routing_is_the_largest_first_and_can_be_rerouted(model):
    for routing in record(model, TOKENS).routings:
        assert routing.logits.shape == (TOKENS.numel(), routing.experts)
        assert (routing.weights.diff(dim=-1) <= 0).all()
        assert (margins(routing) >= 0).all()
        assert same_routing(reroute(routing, routing.logits), routing)
        assert flip_probability(routing, 0.1).max() > 0


def test_other_decisions_change_the_answer_and_are_what_the_experts_use(model):
    """Against routers that are replaced by hand, not hooked."""
    own = record(model, TOKENS)
    other = permuted(own, seed=1)
    replayed = replay(model, other)

    decided, originals = [], [block.gate.forward for block in moe_blocks(model)]
    for block, ask, routing in zip(moe_blocks(model), originals, other.routings, strict=True):

        def forward(states, ask=ask, routing=routing):
            decided.append(ask(states))
            return routing.logits, routing.weights, routing.chosen

        block.gate.forward = forward
    try:
        expected = answer(model, TOKENS)
    finally:
        for block in moe_blocks(model):
            del block.gate.forward
    assert torch.equal(replayed.logits, expected)
    assert not torch.equal(replayed.logits, own.logits)
    for routing, (logits, weights, _) in zip(replayed.routings, decided, strict=True):
        assert torch.equal(routing.logits, logits)
        assert torch.equal(routing.weights, weights.sort(descending=True).values)
    assert same_routing(replayed.routings[0], own.routings[0])
    assert torch.equal(answer(model, TOKENS), own.logits)


@pytest.mark.parametrize("stored", STORED)
def test_recorded_is_what_transformers_itself_gives_out(stored, tmp_path):
    model = build("mixtral", stored, tmp_path)
    with torch.no_grad():
        output = model(input_ids=TOKENS, output_router_logits=True, use_cache=False)
    routings = record(model, TOKENS).routings
    for routing, logits in zip(routings, output.router_logits, strict=True):
        assert same_routing(routing, route(logits, 2))


def test_deepseeks_choice_of_many_is_replayed_but_for_the_last_bits():
    """Its router leaves its choice unsorted; sorted, what the experts answer adds up otherwise."""
    torch.manual_seed(0)
    config = variant("deepseek_v2", num_experts_per_tok=6)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    unsorted = []
    (block,) = moe_blocks(model)
    hook = block.gate.register_forward_hook(lambda *given: unsorted.append(given[2]))
    recording = record(model, TOKENS)
    hook.remove()
    (routing,), ((logits, weights, chosen),) = recording.routings, unsorted
    assert (weights.diff(dim=-1) > 0).any()
    assert torch.equal(recording.logits, answer(model, TOKENS))
    assert torch.equal(routing.gates, Routing(logits, weights, chosen).gates)
    assert (routing.weights.diff(dim=-1) <= 0).all()
    assert same_routing(reroute(routing, logits), routing)
    replayed = replay(model, recording)
    torch.testing.assert_close(replayed.logits, recording.logits, rtol=0, atol=1e-6)
    assert same_routings(replayed, recording)


def test_the_routing_of_one_storage_is_replayed_in_another(tmp_path):
    """The two by two of quantized weights and quantized routing: its corners are the two models."""
    whole, stored = (build("mixtral", name, tmp_path) for name in ("bf16", "nf4"))
    recordings = record(whole, TOKENS), record(stored, TOKENS)
    mixed = replay(stored, recordings[0])
    assert not torch.equal(mixed.logits, recordings[0].logits)
    assert not torch.equal(mixed.logits, recordings[1].logits)
    assert torch.equal(replay(whole, recordings[0]).logits, recordings[0].logits)
    assert torch.equal(replay(stored, recordings[1]).logits, recordings[1].logits)


def test_what_is_recorded_stays(mixtral):
    token_ids = TOKENS.clone()
    recording = record(mixtral, token_ids)
    kept = copy.deepcopy(recording)
    token_ids.zero_()
    record(mixtral, token_ids)
    replay(mixtral, permuted(recording, seed=2))
    assert torch.equal(recording.token_ids, kept.token_ids)
    assert torch.equal(recording.logits, kept.logits)
    assert same_routings(recording, kept)


def test_layers_are_counted_where_there_are_experts(mixtral):
    seen = []

    def note(layer: int, routing: Routing) -> Routing:
        seen.append(layer)
        return routing

    with intercepted(mixtral, note):
        expected = answer(mixtral, TOKENS)
    assert seen == [0, 1]
    assert torch.equal(answer(mixtral, TOKENS), expected)


def test_the_least_probable_experts_instead_of_the_most_probable_ones(mixtral):
    own = record(mixtral, TOKENS)
    with intercepted(mixtral, lambda layer, routing: reroute(routing, -routing.logits)):
        seen = record(mixtral, TOKENS)
    assert same_routing(seen.routings[0], route(-own.routings[0].logits, 2))
    assert not torch.equal(seen.logits, own.logits)
    assert torch.equal(answer(mixtral, TOKENS), own.logits)


class Interrupted(Exception):
    pass


def interrupt(*_given, **_named):
    raise Interrupted


def test_no_hook_stays_after_an_error(mixtral, monkeypatch):
    before, recording = hooks(mixtral), record(mixtral, TOKENS)
    with pytest.raises(Interrupted), intercepted(mixtral, interrupt):
        answer(mixtral, TOKENS)
    assert hooks(mixtral) == before
    with pytest.raises(Interrupted), intercepted(mixtral, interrupt):
        assert hooks(mixtral) == before + 2
        raise Interrupted
    assert hooks(mixtral) == before
    monkeypatch.setattr(mixtral.model.layers[1].mlp.experts, "forward", interrupt)
    with pytest.raises(Interrupted):
        record(mixtral, TOKENS)
    with pytest.raises(Interrupted):
        replay(mixtral, recording)
    assert hooks(mixtral) == before


@pytest.mark.parametrize(
    ("decide", "message"),
    [
        (lambda old: None, "layer 0 the intercept returned None; it must return a Routing"),
        (
            lambda old: Routing(old.logits, old.weights, old.chosen + 8),
            r"chose experts \d+ to \d+; there are 0 to 7",
        ),
        (lambda old: Routing(old.logits, old.weights, old.chosen - 8), "chose experts -"),
        (
            lambda old: Routing(old.logits, old.weights, old.chosen[:, :1]),
            r"returned chosen of shape \(\d+, 1\); the router decided \(\d+, 2\)",
        ),
        (lambda old: Routing(old.logits[:1], old.weights, old.chosen), "logits of shape"),
    ],
)
def test_an_impossible_decision_is_refused(mixtral, decide, message):
    before = hooks(mixtral)
    with (
        pytest.raises(ValueError, match=message),
        intercepted(mixtral, lambda _layer, routing: decide(routing)),
    ):
        answer(mixtral, TOKENS)
    assert hooks(mixtral) == before


@pytest.mark.parametrize("token_ids", [TOKENS[0], TOKENS[:0], TOKENS[:, :0]])
def test_what_is_no_page_is_refused(mixtral, token_ids):
    with pytest.raises(ValueError, match=r"give \(pages, tokens\), at least one"):
        record(mixtral, token_ids)


def test_a_model_without_a_head_is_refused(mixtral):
    with pytest.raises(ValueError, match="MixtralModel gives no logits; load it with its output"):
        record(mixtral.model, TOKENS)


def test_the_recording_of_another_text_is_refused(mixtral):
    recording = record(mixtral, TOKENS)
    with pytest.raises(ValueError, match="replay it on the text that it was recorded on"):
        replay(mixtral, replace(recording, token_ids=TOKENS[:, :-1]))


def test_a_model_without_routers_is_refused():
    config = LlamaConfig(hidden_size=32, intermediate_size=32, num_hidden_layers=1, vocab_size=64)
    config.num_attention_heads = config.num_key_value_heads = 2
    dense = LlamaForCausalLM(config)
    with pytest.raises(ValueError, match="LlamaForCausalLM has no block with a `gate`"):
        record(dense, TOKENS)
    with pytest.raises(ValueError, match="has no block"), intercepted(dense, interrupt):
        pass
    assert hooks(dense) == 0


def test_a_router_that_says_something_else_is_refused():
    block = nn.Module()
    block.gate, block.experts = nn.Linear(4, 8), nn.ModuleList()
    with (
        pytest.raises(ValueError, match=r"Linear does not return \(logits, weights, chosen\)"),
        intercepted(block, interrupt),
    ):
        block.gate(torch.zeros(3, 4))
    assert hooks(block) == 0


@pytest.mark.parametrize("other", ["olmoe", "qwen3_moe", "deepseek_v2"])
def test_the_recording_of_another_architecture_is_refused_before_anything_runs(
    mixtral, monkeypatch, other
):
    recording = record(build(other, "fp32", None), TOKENS)
    monkeypatch.setattr(mixtral, "forward", interrupt)
    with pytest.raises(ValueError, match=r"this model 2 with \[8, 8\]"):
        replay(mixtral, recording)


@settings(deadline=None, max_examples=20)
@given(pages=st.integers(1, 3), tokens=st.integers(1, 20), seed=st.integers(0, 2**31))
def test_pages_stand_one_after_the_other(trained, pages, tokens, seed):
    token_ids = torch.randint(3, 64, (pages, tokens), generator=generator(seed))
    recording = record(trained, token_ids)
    for page in range(pages):
        alone = record(trained, token_ids[[page]])
        here = slice(page * tokens, (page + 1) * tokens)
        for routing, single in zip(recording.routings, alone.routings, strict=True):
            torch.testing.assert_close(routing.logits[here], single.logits, rtol=0, atol=1e-4)
