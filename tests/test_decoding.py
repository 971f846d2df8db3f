"""A quickened model beside itself as transformers computes it."""

from contextlib import contextmanager
from copy import copy, deepcopy

import pytest
import torch
from families import FAMILIES
from random_checkpoints import mixtral_config, write_any
from torch import nn
from transformers import DynamicCache, MixtralForCausalLM
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter

from labutils import kernels
from labutils.checkpoints import load
from labutils.decoding import quicken
from labutils.recipes import Recipe

pytestmark = pytest.mark.skipif(
    kernels.INSTRUCTIONS is None, reason="no C++ compiler was there when the lab was set up"
)


@pytest.fixture(scope="module")
def pair() -> tuple[MixtralForCausalLM, MixtralForCausalLM]:
    """A random Mixtral in bfloat16, and the same quickened."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        plain = MixtralForCausalLM(mixtral_config()).to(torch.bfloat16).eval()
    quick = deepcopy(plain)
    quicken(quick)
    return plain, quick


def decoded(model, tokens: torch.Tensor, prompt: int, **settings) -> torch.Tensor:
    """Logits of `tokens` (sequences, length), those after the prompt one by one."""
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        steps = [model(tokens[:, :prompt], past_key_values=cache, **settings).logits]
        for place in range(prompt, tokens.shape[1]):
            token = tokens[:, place : place + 1]
            steps.append(model(token, past_key_values=cache, **settings).logits)
    return torch.cat(steps, dim=1).float()


def token_errors(expected: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
    """Relative distance of each token's logits."""
    return (found - expected).norm(dim=-1) / expected.norm(dim=-1)


def some_tokens(sequences: int, length: int) -> torch.Tensor:
    return torch.randint(0, 256, (sequences, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("sequences", [1, 3, 6])
@pytest.mark.parametrize("prompt", [1, 5, 20])
def test_logits_are_those_of_transformers_to_16_bits(pair, sequences, prompt):
    tokens = some_tokens(sequences, prompt + 6)
    errors = token_errors(*(decoded(model, tokens, prompt) for model in pair))
    assert errors.median() < 0.01
    assert (errors > 0.05).float().mean() <= 0.02  # tokens that a rounding sent to another expert


def test_a_padded_batch_goes_the_way_of_transformers(pair):
    tokens = some_tokens(2, 9)
    mask = torch.ones(2, 8, dtype=torch.int64)
    mask[0, :3] = 0
    with torch.no_grad():
        steps = []
        for model in pair:
            prompt = model(tokens[:, :7], attention_mask=mask[:, :7], use_cache=True)
            cache = prompt.past_key_values
            step = model(tokens[:, 7:8], attention_mask=mask, past_key_values=cache)
            steps.append(step.logits.float())
    assert token_errors(*steps).max() < 0.05


def test_generating_gives_the_tokens_of_transformers(pair):
    settings = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    plain, quick = (model.generate(some_tokens(1, 7), **settings) for model in pair)
    assert plain.tolist() == quick.tolist()


def test_a_sliding_window_holds():
    config = mixtral_config()
    config.sliding_window = 8
    with torch.random.fork_rng():
        torch.manual_seed(0)
        plain = MixtralForCausalLM(config).to(torch.bfloat16).eval()
    quick = deepcopy(plain)
    quicken(quick)
    tokens = some_tokens(1, 24)
    errors = token_errors(*(decoded(model, tokens, 5) for model in (plain, quick)))
    assert errors.max() < 0.05


def test_in_float32_nothing_changes(pair):
    plain, quick = (deepcopy(model).float() for model in pair)
    tokens = some_tokens(2, 8)
    assert torch.equal(decoded(plain, tokens, 4), decoded(quick, tokens, 4))


def test_gradients_are_those_of_transformers(pair):
    tokens = some_tokens(1, 6)
    gradients = []
    for model in pair:
        copied = deepcopy(model).train()
        copied(tokens, labels=tokens).loss.backward()
        gradients.append(copied.model.layers[0].input_layernorm.weight.grad)
    assert torch.equal(*gradients)


def test_hooks_and_recorded_logits_see_every_router(pair):
    _, quick = pair
    seen = []
    hooks = [
        module.register_forward_hook(lambda *call: seen.append(call[2][0]))
        for module in quick.modules()
        if isinstance(module, MixtralTopKRouter)
    ]
    with torch.no_grad():
        output = quick(some_tokens(1, 1), output_router_logits=True)
    for hook in hooks:
        hook.remove()
    assert len(seen) == quick.config.num_hidden_layers
    assert all(torch.equal(*both) for both in zip(seen, output.router_logits, strict=True))


def test_a_hook_on_a_projection_is_called(tmp_path):
    write_any(tmp_path, FAMILIES["mixtral"], seed=0)
    model = load(tmp_path, Recipe(attention="nf4"), device_map="cpu")
    tokens, seen = some_tokens(1, 6), []
    expected = decoded(model, tokens, 3)
    attention = model.model.layers[0].self_attn
    attention.k_proj.register_forward_hook(lambda *call: seen.append(call[2].shape[1]))
    assert torch.equal(decoded(model, tokens, 3), expected)
    assert seen == [3, 1, 1, 1]


# --------------------------------------------------------------------------- all layers in one call


@pytest.fixture(scope="module")
def stored(tmp_path_factory) -> MixtralForCausalLM:
    """A random Mixtral with attention and experts in NF4."""
    folder = tmp_path_factory.mktemp("stored")
    write_any(folder, mixtral_config(), seed=0)
    return load(folder, Recipe(attention="nf4"), device_map="cpu")


@contextmanager
def looked_at(model):
    """A hook, so that the layers are computed module by module."""
    hook = model.model.layers[0].mlp.gate.register_forward_hook(lambda *call: None)
    yield
    hook.remove()


@pytest.fixture
def calls(monkeypatch) -> list[int]:
    """The length of the past at each call."""
    lengths, decode = [], kernels.decode

    def counted(layers, x, states, length, *turns):
        lengths.append(length)
        return decode(layers, x, states, length, *turns)

    monkeypatch.setattr(kernels, "decode", counted)
    return lengths


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(),
        Recipe(attention="fp4", block_size=128),
        Recipe(overrides={"layers.1.attention.q_proj": "nf4"}),
    ],
    ids=["attention in 16 bits", "in 4", "in both"],
)
def test_a_recipe_goes_in_one_call(tmp_path, recipe, calls):
    write_any(tmp_path, mixtral_config(), seed=0)
    model = load(tmp_path, recipe, device_map="cpu")
    tokens = some_tokens(1, 30)
    together = decoded(model, tokens, 10)
    assert len(calls) == 20
    with looked_at(model):
        errors = token_errors(decoded(model, tokens, 10), together)
    assert errors.median() < 0.01
    assert (errors > 0.05).float().mean() <= 0.05


@pytest.mark.parametrize("prompt", [1, 20, 70])
def test_layers_in_one_call_are_their_modules_in_turn(stored, prompt, calls):
    """Beyond the first room too, which is for 65, 94 and 169 tokens."""
    tokens = some_tokens(1, prompt + 150)
    together = decoded(stored, tokens, prompt)
    assert len(calls) == 150
    with looked_at(stored):
        apart = decoded(stored, tokens, prompt)
    assert len(calls) == 150
    errors = token_errors(apart, together)
    assert errors.median() < 0.01
    assert (errors > 0.05).float().mean() <= 0.05  # sent to another expert, and those after it


def test_a_cropped_past_goes_on(stored):
    tokens = some_tokens(1, 30)
    cache = DynamicCache(config=stored.config)
    with torch.no_grad():
        stored(tokens[:, :10], past_key_values=cache)
        for place in range(10, 20):
            stored(tokens[:, place : place + 1], past_key_values=cache)
        cache.crop(-8)
        again = stored(tokens[:, 12:13], past_key_values=cache).logits.float()
    assert cache.get_seq_length() == 13
    assert token_errors(decoded(stored, tokens[:, :13], 10)[:, -1:], again).max() < 1e-6


@pytest.mark.parametrize("duplicate", [deepcopy, copy])
def test_copies_of_a_past_go_different_ways(stored, duplicate, calls):
    tokens = some_tokens(3, 12)
    tokens[:, :8] = tokens[0, :8]
    cache = DynamicCache(config=stored.config)
    with torch.no_grad():
        stored(tokens[:1, :7], past_key_values=cache)
        stored(tokens[:1, 7:8], past_key_values=cache)
        caches = [cache, *(duplicate(cache) for _ in range(2))]
        for each in caches[1:]:
            each.layers = [duplicate(layer) for layer in each.layers]
        for place in range(8, 12):
            steps = [
                stored(tokens[i : i + 1, place : place + 1], past_key_values=each).logits.float()
                for i, each in enumerate(caches)
            ]
    assert calls
    for i, step in enumerate(steps):
        assert token_errors(decoded(stored, tokens[i : i + 1], 7)[:, -1:], step).max() < 1e-6


@pytest.mark.parametrize(("beams", "expected_calls"), [(1, 5), (3, 0)])
def test_one_sequence_is_generated_so_and_beams_not(stored, beams, expected_calls, calls):
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "num_beams": beams}
    together = stored.generate(1 + some_tokens(1, 7), **settings)
    assert len(calls) == expected_calls
    with looked_at(stored):
        assert stored.generate(1 + some_tokens(1, 7), **settings).tolist() == together.tolist()


def test_a_copied_model_has_a_plan_of_its_own(stored):
    tokens = some_tokens(1, 9)
    expected = decoded(stored, tokens, 4)
    copied = deepcopy(stored)
    assert torch.equal(decoded(copied, tokens, 4), expected)
    with torch.no_grad():
        copied.model.layers[0].input_layernorm.weight.mul_(2)
    assert not torch.equal(decoded(copied, tokens, 4), expected)
    assert torch.equal(decoded(stored, tokens, 4), expected)


def test_another_weight_is_noticed(stored):
    tokens = some_tokens(1, 9)
    model = deepcopy(stored)
    before = decoded(model, tokens, 4)
    norm = model.model.layers[0].input_layernorm
    norm.weight = nn.Parameter(norm.weight.data * 2)
    after = decoded(model, tokens, 4)
    with looked_at(model):
        assert token_errors(decoded(model, tokens, 4), after).median() < 0.01
    assert not torch.equal(before, after)


def test_a_module_in_the_place_of_another_is_used(stored, calls):
    tokens = some_tokens(1, 9)
    model = deepcopy(stored)
    before = decoded(model, tokens, 4)
    attention = model.model.layers[1].self_attn
    weight = attention.q_proj.dequantized().to(torch.bfloat16)
    attention.q_proj = nn.Linear(*weight.shape[::-1], bias=False, device="meta")
    attention.q_proj.weight = nn.Parameter(2 * weight)
    after = decoded(model, tokens, 4)
    assert len(calls) == 5
    assert token_errors(before, after).median() > 0.01


def test_weights_that_move_are_followed(stored, calls):
    tokens = some_tokens(1, 9)
    model = deepcopy(stored)
    expected = decoded(model, tokens, 4)
    for module in (model.model.layers[0].mlp.experts[0].up_proj, model.model.layers[1]):
        module._apply(lambda tensor: tensor.clone())
    assert torch.equal(decoded(model, tokens, 4), expected)
    assert len(calls) == 10


def test_a_forward_of_its_own_is_asked(stored):
    gate, seen = stored.model.layers[1].mlp.gate, []
    own = gate.forward
    gate.forward = lambda x: seen.append(len(x)) or own(x)
    decoded(stored, some_tokens(1, 6), 3)
    del gate.forward
    assert seen == [3, 1, 1, 1]


@pytest.mark.parametrize("part", ["gate_proj", "down_proj", None])
def test_a_hook_in_an_expert_is_called(stored, part):
    """As often as the expert is chosen."""
    seen, chosen, hooks = [], [], []
    for layer in stored.model.layers:
        for expert in layer.mlp.experts:
            module = getattr(expert, part) if part else expert
            hooks.append(module.register_forward_hook(lambda *call: seen.append(len(call[2]))))
        count = lambda module, inputs, output: chosen.append(output[2].numel())  # noqa: E731
        hooks.append(layer.mlp.gate.register_forward_hook(count))
    decoded(stored, some_tokens(1, 6), 3)
    for hook in hooks:
        hook.remove()
    assert sum(seen) == sum(chosen) == 6 * 2 * len(stored.model.layers)


@pytest.mark.parametrize("asked", ["output_hidden_states", "output_router_logits"])
def test_what_is_recorded_is_there_for_a_single_token(stored, asked, calls):
    model, tokens = deepcopy(stored), some_tokens(1, 4)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(tokens[:, :3], past_key_values=cache)
        output = model(tokens[:, 3:], past_key_values=cache, **{asked: True})
        recorded = getattr(output, asked.removeprefix("output_"))
        assert len(recorded) >= len(model.model.layers)
        assert not calls
        model(tokens[:, 3:], past_key_values=cache)
        assert calls
        again = model(tokens[:, 3:], past_key_values=cache, **{asked: True})
    assert len(getattr(again, asked.removeprefix("output_"))) == len(recorded)
    assert len(calls) == 1


def test_another_attention_and_fewer_experts_are_noticed(stored, calls):
    model, tokens = deepcopy(stored), some_tokens(1, 8)
    model.set_attn_implementation("eager")
    decoded(model, tokens, 4)
    assert not calls
    model.set_attn_implementation("sdpa")
    both = decoded(model, tokens, 4)
    for layer in model.model.layers:
        layer.mlp.gate.top_k = 1
    one = decoded(model, tokens, 4)
    assert len(calls) == 8
    with looked_at(model):
        assert token_errors(decoded(model, tokens, 4), one).median() < 0.01
    assert token_errors(both, one).median() > 0.05


def test_a_tuple_is_returned_when_asked_for(stored):
    tokens = some_tokens(1, 4)
    cache = DynamicCache(config=stored.config)
    with torch.no_grad():
        stored(tokens[:, :3], past_key_values=cache)
        logits, *_ = stored(tokens[:, 3:], past_key_values=cache, return_dict=False)
        states, *_ = stored.model(tokens[:, 3:], past_key_values=cache, return_dict=False)
    assert logits.shape[:2] == states.shape[:2] == (1, 1)


@pytest.mark.parametrize(
    "recipe",
    [Recipe(router="nf4"), Recipe(attention="int8"), Recipe(experts="int8")],
    ids=["a stored router", "attention in 8 bits", "experts in 8 bits"],
)
def test_other_recipes_go_module_by_module(tmp_path, recipe, calls):
    write_any(tmp_path, mixtral_config(), seed=0)
    model = load(tmp_path, recipe, device_map="cpu")
    tokens = some_tokens(1, 9)
    with torch.no_grad():
        whole = model(tokens).logits.float()
    errors = token_errors(whole, decoded(model, tokens, 4))
    assert errors.median() < 0.05
    assert not calls


def test_equal_odds_choose_as_torch_does(stored, calls):
    model = deepcopy(stored)
    with torch.no_grad():
        for layer in model.model.layers:
            gate = layer.mlp.gate
            gate.weight[2:] = gate.weight[:2].repeat(len(gate.weight) // 2 - 1, 1)
    tokens = some_tokens(1, 40)
    together = decoded(model, tokens, 8)
    assert calls
    with looked_at(model):
        errors = token_errors(decoded(model, tokens, 8), together)
    assert errors.median() < 0.01
    assert (errors > 0.05).float().mean() <= 0.05


def _reverse_layers(model):
    model.model.layers = nn.ModuleList(list(model.model.layers)[::-1])


def _lay_out_a_router_by_columns(model):
    gate = model.model.layers[0].mlp.gate
    gate.weight = nn.Parameter(gate.weight.data.t().contiguous().t())


def _cut_routers(model):
    for layer in model.model.layers:
        layer.mlp.gate.weight.data = layer.mlp.gate.weight.data[:2]


def _subclass_a_norm(model):
    norm = model.model.layers[0].input_layernorm
    norm.__class__ = type("Doubled", (type(norm),), {"forward": lambda self, x: 2 * x})


def _turn_at_half_the_pace(model):
    model.model.rotary_emb.inv_freq.mul_(0.5)


def _register_another_norm(model):
    norm = deepcopy(model.model.layers[0].input_layernorm)
    norm.weight.data.mul_(2)
    model.model.layers[0].register_module("input_layernorm", norm)


CHANGES = (
    _reverse_layers,
    _lay_out_a_router_by_columns,
    _cut_routers,
    _subclass_a_norm,
    _turn_at_half_the_pace,
    _register_another_norm,
)


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_goes_into_the_next_token(stored, change):
    model, tokens = deepcopy(stored), some_tokens(1, 20)
    decoded(model, tokens, 8)
    with torch.no_grad():
        change(model)
    found = decoded(model, tokens, 8)
    with looked_at(model), torch.no_grad():
        whole = model(tokens).logits.float()
        errors = token_errors(decoded(model, tokens, 8), found)
    assert errors.median() < 0.01
    assert token_errors(whole, found).median() < 0.1


def test_gradients_of_a_router_arrive(stored):
    model = deepcopy(stored).requires_grad_(False)
    model.model.layers[1].mlp.gate.weight.requires_grad_(True)
    assert model(some_tokens(1, 3)).logits.requires_grad


def test_names_and_weights_stay(pair):
    plain, quick = (model.state_dict() for model in pair)
    assert list(plain) == list(quick)
    assert all(torch.equal(plain[name], quick[name]) for name in plain)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_decodes_as_it_prefills(family, tmp_path):
    """The loader quickens what it loads; a token by itself must come out as in its prompt."""
    write_any(tmp_path, FAMILIES[family], seed=0)
    model = load(tmp_path, Recipe(experts="nf4"), device_map="cpu")
    bases = {base for module in model.modules() for base in type(module).__mro__}
    assert any(base.__module__ == quicken.__module__ for base in bases)
    tokens = some_tokens(1, 10)
    errors = token_errors(decoded(model, tokens, 10), decoded(model, tokens, 1))
    assert errors.median() < 0.05


def test_modules_of_a_kind_share_a_class(pair):
    _, quick = pair
    assert len({type(layer.input_layernorm) for layer in quick.model.layers}) == 1
    assert isinstance(quick.lm_head, nn.Linear)
