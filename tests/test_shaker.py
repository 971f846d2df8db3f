"""Shaken, a model is disturbed where and as much as was asked, and then is what it was."""

import copy
import math

import numpy as np
import pytest
import torch
import transformers
from families import FAMILIES
from torch import nn
from transformers import AutoModelForCausalLM

from labutils import languages, standin
from labutils.anatomy import part_of
from labutils.checkpoints import load
from labutils.evaluate import cross_entropy, kl
from labutils.flips import compare, moe_blocks, record
from labutils.recipes import Recipe, simulated
from labutils.shaker import CONTROL, WEIGHTS, WHAT, Disturbance, Shaker

PAGES = 2
LAYERS, EXPERTS = 4, 8
COMPONENTS = {what: what for what in WEIGHTS} | {CONTROL: "experts"}
ALL = [Disturbance(what, noise=0.3) for what in WHAT] + [
    Disturbance(what, bits=3) for what in WEIGHTS
]
everything = pytest.mark.parametrize("disturbance", ALL, ids=str)


@pytest.fixture(scope="module")
def model():
    transformers.utils.logging.disable_progress_bar()
    return load(standin.PATH, device_map="cpu").float()


@pytest.fixture(scope="module")
def shaker(model):
    return Shaker(model, standin.tokenizer(), pages=PAGES)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def weights_in(model) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def hooks(model: nn.Module) -> int:
    return sum(
        len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()
    )


def bits(weights: torch.Tensor) -> torch.Tensor:
    return weights.view({2: torch.int16, 4: torch.int32}[weights.itemsize])


def assert_is_as_it_was(model, before: dict[str, torch.Tensor], hooks_before: int) -> None:
    for name, parameter in model.named_parameters():
        assert torch.equal(bits(parameter.detach()), bits(before[name])), name
    assert hooks(model) == hooks_before


def size(values: torch.Tensor) -> float:
    return values.double().square().mean().sqrt().item()


def noise_on(shaker: Shaker, disturbance: Disturbance) -> dict[str, torch.Tensor]:
    """What is added to each weight that is changed, by its name."""
    before = weights_in(shaker.model)
    with shaker.disturbed(disturbance):
        after = weights_in(shaker.model)
    return {
        name: after[name] - weight
        for name, weight in before.items()
        if not torch.equal(after[name], weight)
    }


# -------------------------------------------------------------------------- nothing, and back again


@pytest.mark.parametrize("what", WHAT)
def test_no_noise_changes_nothing_at_all(shaker, what):
    shaken = shaker.shake(Disturbance(what))
    assert not shaken.set_changed.any()
    assert shaken.flip_rate == shaken.loss_rise == 0
    assert [flips.kl for flips in shaken.flips] == [0] * LAYERS
    assert (shaken.kl == 0).all()
    assert torch.equal(shaken.nats, shaken.reference_nats)
    assert (shaken.right == shaken.reference_right).all()
    assert (shaken.flips_by_language.fillna(0) == 0).all(axis=None)


@everything
def test_afterwards_the_model_is_what_it_was_to_the_last_bit(shaker, disturbance):
    before, hooks_before = weights_in(shaker.model), hooks(shaker.model)
    shaken = shaker.shake(disturbance)
    assert (shaken.kl > 0).any()
    assert_is_as_it_was(shaker.model, before, hooks_before)
    again = record(shaker.model, shaker.exam.token_ids)
    assert torch.equal(again.logits, shaker.reference.logits)


class Interrupted(Exception):
    pass


def interrupt(*_given, **_named):
    raise Interrupted


@everything
def test_after_an_error_too(shaker, monkeypatch, disturbance):
    before, hooks_before = weights_in(shaker.model), hooks(shaker.model)
    with pytest.raises(Interrupted), shaker.disturbed(disturbance):
        raise Interrupted
    assert_is_as_it_was(shaker.model, before, hooks_before)
    monkeypatch.setattr(shaker.model.model.layers[2].mlp.experts, "forward", interrupt)
    with pytest.raises(Interrupted):
        shaker.shake(disturbance)
    assert_is_as_it_was(shaker.model, before, hooks_before)


def test_an_error_half_way_through_the_weights_leaves_none_disturbed(shaker, monkeypatch):
    before, hooks_before = weights_in(shaker.model), hooks(shaker.model)
    drawn, unit = [], shaker._unit

    def third_fails(*given):
        drawn.append(given)
        return interrupt() if len(drawn) == 3 else unit(*given)

    monkeypatch.setattr(shaker, "_unit", third_fails)
    with pytest.raises(Interrupted):
        shaker.shake(Disturbance("experts", noise=0.3))
    assert_is_as_it_was(shaker.model, before, hooks_before)


# ----------------------------------------------------------------------------- where, and how much


@pytest.mark.parametrize("what", WEIGHTS)
@pytest.mark.parametrize("noise", [0.01, 1.0])
def test_noise_on_weights_has_its_relative_size_in_each_matrix(shaker, what, noise):
    added = noise_on(shaker, Disturbance(what, noise=noise))
    names = {name for name, _ in shaker.model.named_parameters() if part_of(name).component == what}
    assert set(added) == names
    for name, all_added in added.items():
        weights = shaker.model.get_parameter(name).detach()
        matrices = weights.view(-1, *weights.shape[-2:])
        for drawn, matrix in zip(all_added.view(matrices.shape), matrices, strict=True):
            unit = drawn.double() / size(matrix) / noise
            spread = 5 / math.sqrt(matrix.numel())
            assert size(unit) == pytest.approx(1, abs=spread)
            assert unit.mean().item() == pytest.approx(0, abs=spread)
            assert (unit * matrix).mean().item() / size(matrix) == pytest.approx(0, abs=spread)
            assert unit.pow(4).mean().item() == pytest.approx(3, abs=10 * spread)


@pytest.mark.parametrize("what", COMPONENTS)
def test_noise_on_one_layer_is_the_same_as_there_in_all_layers(shaker, what):
    everywhere = noise_on(shaker, Disturbance(what, noise=0.1))
    here = noise_on(shaker, Disturbance(what, noise=0.1, layer=2))
    assert set(here) == {name for name in everywhere if part_of(name).layer == 2}
    assert all(torch.equal(here[name], everywhere[name]) for name in here)


@pytest.mark.parametrize("layer", [None, 1])
def test_noise_on_one_expert_is_the_same_as_there_on_all_experts(shaker, layer):
    everyone = noise_on(shaker, Disturbance("experts", noise=0.1, layer=layer))
    alone = noise_on(shaker, Disturbance("experts", noise=0.1, layer=layer, expert=5))
    assert set(alone) == set(everyone)
    for name, added in alone.items():
        assert torch.equal(added[5], everyone[name][5])
        assert not added[[expert for expert in range(EXPERTS) if expert != 5]].any()


@pytest.mark.parametrize("what", COMPONENTS)
def test_twice_the_noise_is_the_same_noise_twice(shaker, what):
    once, twice = (noise_on(shaker, Disturbance(what, noise=noise)) for noise in (0.5, 1.0))
    assert set(once) == set(twice)
    for name, added in once.items():
        torch.testing.assert_close(2 * added, twice[name], rtol=0, atol=1e-6)


def test_the_control_disturbs_as_many_expert_weights_as_the_router_has(shaker):
    added = noise_on(shaker, Disturbance(CONTROL, noise=1.0))
    for layer, block in enumerate(moe_blocks(shaker.model)):
        here = {name: noise for name, noise in added.items() if part_of(name).layer == layer}
        assert set(here) == {
            f"model.layers.{layer}.mlp.experts.{name}" for name in ("gate_up_proj", "down_proj")
        }
        wanted = block.gate.weight.numel()
        disturbed = sum(noise.count_nonzero().item() for noise in here.values())
        assert disturbed == pytest.approx(wanted, abs=6 * math.sqrt(wanted))
        units = [
            (noise / weight.square().mean(dim=(1, 2), keepdim=True).sqrt())[noise != 0]
            for name, noise in here.items()
            for weight in [shaker.model.get_parameter(name).detach()]
        ]
        assert size(torch.cat(units)) == pytest.approx(1, abs=6 / math.sqrt(wanted))
        assert torch.cat(units).mean().item() == pytest.approx(0, abs=6 / math.sqrt(wanted))


@pytest.mark.parametrize("layer", [None, 0, 3])
def test_noise_on_router_logits_has_its_relative_size(shaker, layer):
    """Layer 0 alone is given what it was given before; later layers, where none before is noisy."""
    reference = shaker.reference.routings
    with shaker.disturbed(Disturbance("router logits", noise=0.1, layer=layer)):
        seen = record(shaker.model, shaker.exam.token_ids).routings
    first = layer or 0
    for before, after in zip(reference[:first], seen[:first], strict=True):
        assert torch.equal(before.logits, after.logits)
        assert torch.equal(before.chosen, after.chosen)
    noise = seen[first].logits - reference[first].logits
    spread = 5 / math.sqrt(noise.numel())
    assert (noise.std() / reference[first].logits.std()).item() == pytest.approx(0.1, rel=spread)
    for before, after in zip(reference[first:], seen[first:], strict=True):
        assert not torch.equal(before.logits, after.logits)


@pytest.mark.parametrize("layer", [None, 0, 3])
def test_noise_on_hidden_states_has_its_relative_size_in_every_token(shaker, layer):
    disturbance = Disturbance("hidden states", noise=0.1, layer=layer)
    first = layer or 0
    _, before = seen_by(shaker, Disturbance("hidden states"), first)
    given_gate, given_block = seen_by(shaker, disturbance, first)
    assert torch.equal(given_gate, given_block)
    unit = (given_block - before) / before.square().mean(dim=-1, keepdim=True).sqrt() / 0.1
    drawn = shaker._unit(f"hidden states {first}", torch.empty(PAGES, 256, unit.shape[-1]))
    torch.testing.assert_close(unit, drawn.flatten(0, 1), rtol=0, atol=1e-4)
    assert size(unit) == pytest.approx(1, abs=5 / math.sqrt(2 * unit.numel()))
    shaken = shaker.shake(disturbance)
    assert not shaken.set_changed[:, :first].any()
    assert shaken.set_changed[:, first:].any()


def seen_by(shaker: Shaker, disturbance: Disturbance, layer: int):
    """What the gate and the experts of a layer are given, (tokens, hidden) each."""
    block, seen = moe_blocks(shaker.model)[layer], {}
    handles = [
        module.register_forward_pre_hook(lambda _, given, name=name: seen.update({name: given[0]}))
        for name, module in (("gate", block.gate), ("experts", block.experts))
    ]
    try:
        with shaker.disturbed(disturbance):
            record(shaker.model, shaker.exam.token_ids)
    finally:
        for handle in handles:
            handle.remove()
    return seen["gate"], seen["experts"]


@pytest.mark.parametrize("layer", range(LAYERS))
@pytest.mark.parametrize("what", ["experts", CONTROL])
def test_what_experts_answer_reaches_routers_of_later_layers_only(shaker, what, layer):
    shaken = shaker.shake(Disturbance(what, noise=3.0, layer=layer))
    flipped = [flips.flip_rate for flips in shaken.flips]
    assert flipped[: layer + 1] == [0] * (layer + 1)
    assert all(rate > 0 for rate in flipped[layer + 1 :])
    assert (shaken.kl > 0).any()


def test_noise_on_all_experts_leaves_the_first_layers_choices_alone(shaker):
    shaken = shaker.shake(Disturbance("experts", noise=1.0))
    assert shaken.flips[0].kl == shaken.flips[0].flip_rate == 0
    assert shaken.flips[1].flip_rate > 0


def test_another_text_can_be_read_while_the_model_is_disturbed(shaker):
    line = torch.tensor([standin.tokenizer()("sort 52914 > 12459")["input_ids"]])
    undisturbed = record(shaker.model, line)
    for what in WHAT:
        shaker.shake(Disturbance(what, noise=0.1))
        with shaker.disturbed(Disturbance(what, noise=0.1)):
            assert not torch.equal(record(shaker.model, line).logits, undisturbed.logits)


# ----------------------------------------------------------------------------------- seeds and bits


def numbers(shaken) -> list:
    return [shaken.flip_rate, shaken.kl.mean().item(), shaken.loss_rise]


@pytest.mark.parametrize("what", WHAT)
def test_the_same_seed_gives_the_same_numbers_and_another_one_others(model, shaker, what):
    disturbance = Disturbance(what, noise=1.0)
    again, other = (
        Shaker(model, standin.tokenizer(), PAGES, generator(seed)).shake(disturbance)
        for seed in (0, 1)
    )
    once, twice = shaker.shake(disturbance), shaker.shake(disturbance)
    assert numbers(once) == numbers(twice) == numbers(again)
    assert numbers(once)[1:] != numbers(other)[1:]


@pytest.mark.parametrize(
    ("disturbance", "path"),
    [
        (Disturbance("router", bits=2), "layers.*.router"),
        (Disturbance("attention", bits=4, layer=1), "layers.1.attention"),
        (Disturbance("experts", bits=3), "layers.*.experts"),
        (Disturbance("experts", bits=8, layer=2), "layers.2.experts"),
        (Disturbance("experts", bits=2, expert=6), "layers.*.experts.6"),
        (Disturbance("experts", bits=2, layer=3, expert=0), "layers.3.experts.0"),
    ],
    ids=str,
)
def test_bits_are_those_of_a_recipe(shaker, disturbance, path):
    kept = dict.fromkeys(("experts", "attention", "router", "embeddings", "lm_head"), "fp32")
    recipe = Recipe(**kept, double_quant=False, overrides={path: f"int{disturbance.bits}"})
    with simulated(shaker.model, recipe):
        rounded = weights_in(shaker.model)
        expected = record(shaker.model, shaker.exam.token_ids)
    with shaker.disturbed(disturbance):
        assert_is_as_it_was(shaker.model, rounded, hooks(shaker.model))
    shaken = shaker.shake(disturbance)
    pairs = zip(shaker.reference.routings, expected.routings, strict=True)
    by_hand = [compare(*pair) for pair in pairs]
    assert [flips.flip_rate for flips in shaken.flips] == [flips.flip_rate for flips in by_hand]
    assert shaken.kl.mean().item() == kl(shaker.reference.logits, expected.logits) > 0


# ------------------------------------------------------------------------------- what is reported


@pytest.fixture(scope="module")
def shaken(shaker):
    return shaker.shake(Disturbance("router", noise=1.0))


def test_flips_by_language_are_those_that_are_counted_line_by_line(shaker, shaken):
    pages = languages.pages(PAGES, generator(0), held_out=True)
    counts = {name: [0, 0] for name in languages.LANGUAGES}
    for layer, flips in enumerate(shaken.flips):
        counts = {name: [0, 0] for name in languages.LANGUAGES}
        changed = flips.set_changed.tolist()
        for page, text in enumerate(pages):
            place = 256 * page + 1
            for line in text.split("\n")[:-1]:
                name, length = line.split(" ")[0], len(line) + 1
                counts[name][0] += sum(changed[place : place + length])
                counts[name][1] += length
                place += length
        for name, (flipped, tokens) in counts.items():
            found = shaken.flips_by_language.loc[layer, name]
            expected = flipped / tokens if tokens else math.nan
            assert found == pytest.approx(expected, nan_ok=True), (layer, name)
    assert len(shaken.flips_by_language) == LAYERS
    assert sum(tokens for _, tokens in counts.values()) > 0.7 * PAGES * 256


def test_loss_and_answers_are_those_of_the_disturbed_model(shaker, shaken):
    pages = languages.pages(PAGES, generator(0), held_out=True)
    tokenizer = standin.tokenizer()
    whole = cross_entropy(shaker.model, tokenizer, pages).nats_per_token
    with shaker.disturbed(shaken.disturbance):
        disturbed = cross_entropy(shaker.model, tokenizer, pages).nats_per_token
        seen = record(shaker.model, shaker.exam.token_ids)
    assert shaken.loss_rise == pytest.approx(disturbed - whole, abs=1e-6)
    assert shaken.nats.mean().item() == pytest.approx(disturbed, abs=1e-6)
    assert shaken.reference_nats.mean().item() == pytest.approx(whole, abs=1e-6)
    right = [
        (seen.logits[a.page, a.first - 1 : a.last].argmax(dim=-1).tolist())
        == shaker.exam.token_ids[a.page, a.first : a.last + 1].tolist()
        for a in shaker.exam.answers
    ]
    assert shaken.right.tolist() == right
    assert shaken.accuracy == pytest.approx(np.mean(right))
    assert shaken.reference_right.sum() > shaken.right.sum() and not shaken.answers_kept


def test_set_changes_stand_by_page_layer_and_token(shaken):
    assert shaken.set_changed.shape == (PAGES, LAYERS, 256)
    for layer, flips in enumerate(shaken.flips):
        assert torch.equal(shaken.set_changed[:, layer].flatten(), flips.set_changed)
    rates = [flips.flip_rate for flips in shaken.flips]
    assert shaken.flip_rate == pytest.approx(sum(rates) / LAYERS)


# -------------------------------------------------------------------------- other ways to be stored


def test_16_bit_models_are_shaken_too_and_restored_to_the_bit():
    model = load(standin.PATH, device_map="cpu")
    shaker = Shaker(model, standin.tokenizer(), pages=1)
    before, hooks_before = weights_in(model), hooks(model)
    for disturbance in ALL:
        assert (shaker.shake(disturbance).kl > 0).any()
        assert_is_as_it_was(model, before, hooks_before)
    assert shaker.shake(Disturbance("router")).kl.max() == 0
    for name, added in noise_on(shaker, Disturbance("router", noise=0.1)).items():
        weight = model.get_parameter(name).detach()
        assert size(added) / size(weight) == pytest.approx(0.1, rel=0.1)


def test_half_precision_does_not_swallow_the_size_of_small_weights():
    model = load(standin.PATH, device_map="cpu").to(torch.float16)
    gate = model.model.layers[0].mlp.gate.weight
    with torch.no_grad():
        gate.mul_(1e-4)
    shaker = Shaker(model, standin.tokenizer(), pages=1)
    added = noise_on(shaker, Disturbance("router", noise=1.0, layer=0))
    assert size(added["model.layers.0.mlp.gate.weight"]) / size(gate) == pytest.approx(1, rel=0.1)


@pytest.fixture(scope="module")
def stored_shaker():
    """Experts and attention in 4 bits, the router in 16."""
    model = load(standin.PATH, Recipe(attention="nf4"), device_map="cpu")
    return Shaker(model, standin.tokenizer(), pages=1)


@pytest.mark.parametrize("what", ["router", "router logits", "hidden states"])
def test_of_a_stored_model_what_is_in_16_bits_can_be_shaken(stored_shaker, what):
    before, hooks_before = stored_shaker.reference.logits, hooks(stored_shaker.model)
    assert stored_shaker.shake(Disturbance(what)).kl.max() == 0
    shaken = stored_shaker.shake(Disturbance(what, noise=0.3))
    assert shaken.flip_rate > 0
    assert hooks(stored_shaker.model) == hooks_before
    again = record(stored_shaker.model, stored_shaker.exam.token_ids)
    assert torch.equal(again.logits, before)


def test_it_says_which_weights_take_noise(stored_shaker):
    weights = ("router", "experts", "attention")
    assert [name for name in weights if stored_shaker.takes_noise(name)] == ["router"]


@pytest.mark.parametrize("what", ["experts", "attention", CONTROL])
def test_what_is_stored_in_4_bits_takes_no_noise(stored_shaker, what):
    with pytest.raises(ValueError, match=r"is stored as torch\.uint8, to which no noise"):
        stored_shaker.shake(Disturbance(what, noise=0.3))


def test_a_stored_model_is_not_rounded_again(stored_shaker):
    with pytest.raises(ValueError, match="quantized already"):
        stored_shaker.shake(Disturbance("router", bits=3))


def test_experts_that_stand_apart_can_be_shaken_where_they_are_in_16_bits():
    recipe = Recipe("bf16", overrides={"layers.0.experts.3": "nf4"})
    shaker = Shaker(load(standin.PATH, recipe, device_map="cpu"), standin.tokenizer(), pages=1)
    added = noise_on(shaker, Disturbance("experts", noise=0.3, layer=2, expert=5))
    places = "gate_proj up_proj down_proj".split()
    assert set(added) == {f"model.layers.2.mlp.experts.5.{place}.weight" for place in places}
    for name, noise in added.items():
        weight = shaker.model.get_parameter(name).detach()
        assert size(noise) / size(weight) == pytest.approx(0.3, rel=0.05)
    assert len(noise_on(shaker, Disturbance("experts", noise=0.3, layer=2))) == 3 * EXPERTS
    with pytest.raises(ValueError, match=r"experts\.3\.gate_proj\.weight is stored as"):
        shaker.shake(Disturbance("experts", noise=0.3))


@pytest.mark.parametrize("family", ["mixtral", "olmoe", "qwen3_moe"])
def test_other_families_are_shaken_in_every_way(family):
    """Where attention has biases, they are no matrices and stay as they are."""
    config = copy.deepcopy(FAMILIES[family])
    config.mlp_only_layers, config.attention_bias = [], True
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    shaker = Shaker(model, standin.tokenizer(), pages=1)
    before, hooks_before = weights_in(model), hooks(model)
    for disturbance in ALL:
        assert (shaker.shake(disturbance).kl > 0).any(), disturbance
    assert_is_as_it_was(model, before, hooks_before)
    changed = noise_on(shaker, Disturbance("attention", noise=0.3))
    assert all(name.endswith("_proj.weight") for name in changed)
    assert len(changed) == 2 * 4


# ------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        ({"what": "norms"}, "'norms' cannot be disturbed; router, experts, attention,"),
        ({"what": "router", "noise": -0.1}, "noise=-0.1: relative noise is 0 or larger"),
        ({"what": "router", "noise": math.nan}, "noise=nan: relative noise"),
        ({"what": "router", "noise": math.inf}, "noise=inf: relative noise"),
        ({"what": "router", "noise": 0.1, "expert": 3}, "expert=3 says which of the experts"),
        ({"what": CONTROL, "noise": 0.1, "expert": 3}, "expert=3 says which of the experts"),
        ({"what": "router", "noise": 0.1, "bits": 3}, "rounded weights get no noise"),
        ({"what": "router logits", "bits": 3}, "Only weights are rounded"),
        ({"what": CONTROL, "bits": 3}, "Only weights are rounded"),
        ({"what": "router", "bits": 0}, "bits=0: weights are rounded to 2 to 8 bits"),
        ({"what": "router", "bits": 9}, "bits=9: weights are rounded to 2 to 8 bits"),
        ({"what": "router", "bits": 3.0}, r"bits=3\.0: a whole number"),
        ({"what": "router", "noise": 0.1, "layer": 1.5}, r"layer=1\.5: a whole number"),
        ({"what": "experts", "noise": 0.1, "expert": True}, "expert=True: a whole number"),
    ],
)
def test_what_cannot_be_disturbed_is_refused(mistake, message):
    with pytest.raises(ValueError, match=message):
        Disturbance(**mistake)


@pytest.mark.parametrize("place", [{"layer": 4}, {"layer": -1}, {"expert": 8}, {"expert": -1}])
@pytest.mark.parametrize("much", [{}, {"noise": 0.1}, {"bits": 3}])
def test_a_place_that_is_not_there_is_refused(shaker, place, much):
    ((name, index),) = place.items()
    last = {"layer": LAYERS, "expert": EXPERTS}[name] - 1
    with pytest.raises(ValueError, match=f"{name}={index}: this model has {name}s 0 to {last}"):
        shaker.shake(Disturbance("experts", **much, **place))


@pytest.mark.parametrize(
    ("disturbance", "text"),
    [
        (Disturbance("experts", bits=3, layer=2, expert=5), "expert 5 of layer 2 in 3 bits"),
        (Disturbance("router", bits=4), "router in 4 bits"),
        (Disturbance("router logits", noise=0.1, layer=0), "10% noise on router logits of layer 0"),
        (Disturbance("experts", noise=0.3, expert=0), "30% noise on expert 0 of every layer"),
        (Disturbance(CONTROL, noise=0.005), "0.5% noise on as many expert weights"),
    ],
)
def test_a_disturbance_says_what_it_is(disturbance, text):
    assert str(disturbance) == text


def test_noise_is_no_recipe():
    with pytest.raises(
        ValueError, match=r"10% noise on router, all else in torch\.float32: no reci"
    ):
        Disturbance("router", noise=0.1).recipe()
    with pytest.raises(ValueError, match=r"all else in torch\.float64: no recipe"):
        Disturbance("router", bits=3).recipe(torch.float64)


def test_a_broken_model_is_refused(model):
    """Beside NaN nothing could be told from nothing."""
    broken = copy.deepcopy(model)
    broken.model.layers[0].self_attn.q_proj.weight.detach()[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"16,384 of the undisturbed model's 16,384 logits are"):
        Shaker(broken, standin.tokenizer(), pages=1)


def test_a_model_in_training_mode_is_refused(model):
    model.train()
    try:
        with pytest.raises(ValueError, match=r"training mode; call model\.eval\(\)"):
            Shaker(model, standin.tokenizer(), pages=1)
    finally:
        model.eval()


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v2"])
def test_a_model_with_layers_that_have_no_experts_is_refused(family):
    model = AutoModelForCausalLM.from_config(copy.deepcopy(FAMILIES[family])).eval()
    with pytest.raises(ValueError, match="1 of the model's 2 layers have experts"):
        Shaker(model, standin.tokenizer(), pages=1)


def test_no_pages_are_refused(model):
    with pytest.raises(ValueError, match="at least one page"):
        Shaker(model, standin.tokenizer(), pages=0)
