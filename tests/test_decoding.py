"""A quickened model beside itself as transformers computes it."""

from copy import deepcopy

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


def test_names_and_weights_stay(pair):
    plain, quick = (model.state_dict() for model in pair)
    assert list(plain) == list(quick)
    assert all(torch.equal(plain[name], quick[name]) for name in plain)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_decodes_as_it_prefills(family, tmp_path):
    """The loader quickens what it loads; a token by itself must come out as in its prompt."""
    write_any(tmp_path, FAMILIES[family], seed=0)
    model = load(tmp_path, Recipe(experts="nf4"), device_map="cpu")
    assert any(type(module).__name__.startswith("Quick") for module in model.modules())
    tokens = some_tokens(1, 10)
    errors = token_errors(decoded(model, tokens, 10), decoded(model, tokens, 1))
    assert errors.median() < 0.05


def test_modules_of_a_kind_share_a_class(pair):
    _, quick = pair
    assert len({type(layer.input_layernorm) for layer in quick.model.layers}) == 1
    assert isinstance(quick.lm_head, nn.Linear)
