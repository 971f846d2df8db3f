"""Damage is measured against one reference, and undone."""

import itertools

import numpy as np
import pytest
import torch
import transformers

from labutils import languages, standin
from labutils.checkpoints import load
from labutils.damage import Probe
from labutils.evaluate import cross_entropy, right_answers
from labutils.recipes import Recipe, simulated


@pytest.fixture(scope="module")
def model():
    transformers.utils.logging.disable_progress_bar()
    return load(standin.PATH, device_map="cpu").float()


@pytest.fixture(scope="module")
def probe(model):
    return Probe(model, standin.tokenizer(), pages=2, examples=4)


def test_a_recipe_that_rounds_nothing_does_no_damage(probe):
    """The stand-in's weights are bfloat16 numbers, so bf16 is what they are."""
    untouched = probe.damage(Recipe(experts="bf16"))
    assert untouched.nats_per_token == probe.undisturbed.nats_per_token
    assert (untouched.expert_errors == 0).all()
    assert untouched.accuracy.equals(probe.undisturbed.accuracy)


def test_loss_and_answers_are_those_of_the_simulated_model(model, probe):
    tokenizer, generator = standin.tokenizer(), torch.Generator().manual_seed(0)
    pages = languages.pages(2, generator, held_out=True)
    examples = {
        name: languages.held_out_examples(name, 4, generator) for name in languages.LANGUAGES
    }
    damage = probe.damage(Recipe("int2", "int3"))
    with simulated(model, Recipe("int2", "int3")):
        loss = cross_entropy(model, tokenizer, pages).nats_per_token
        right = {n: np.mean(right_answers(model, tokenizer, e)) for n, e in examples.items()}
    assert damage.nats_per_token == pytest.approx(loss, abs=1e-6)
    assert damage.accuracy.to_dict() == right


def test_only_a_rounded_expert_has_an_error(model, probe):
    damage = probe.damage(Recipe("bf16", overrides={"layers.1.experts.6": "int2"}))
    assert np.argwhere(damage.expert_errors).tolist() == [[1, 6]]
    duty = probe.duties[1][6]
    block = model.model.layers[1].mlp.experts
    with torch.no_grad(), simulated(model, Recipe("int2")):
        gate, up = (duty.inputs @ block.gate_up_proj[6].T).chunk(2, dim=-1)
        answers = (torch.nn.functional.silu(gate) * up) @ block.down_proj[6].T
    error = ((answers - duty.answers).norm() / duty.answers.norm()).item()
    assert damage.expert_errors[1, 6] == pytest.approx(error, rel=1e-4)


def test_fewer_bits_of_an_expert_are_a_larger_error(probe):
    errors = [probe.damage(Recipe(f"int{bits}")).expert_errors for bits in (8, 4, 3, 2)]
    assert all((fewer > more).all() for more, fewer in itertools.pairwise(errors))


def test_bits_count_the_constants_of_what_is_quantized(probe):
    """A 384 x 128 matrix in INT3: 3 + 8 / 64 bits, and 4 + 1024 + 4 * 3 bytes of double quant."""
    needed = 3 + 8 / 64 + 8 * (4 + 1024 + 4 * 3) / (384 * 128)
    assert probe.damage(Recipe("int3")).bits_per_weight == pytest.approx(needed, rel=1e-6)
    assert probe.undisturbed.bits_per_weight == 32


def test_every_token_of_an_expert_is_on_duty(probe):
    for layer in probe.duties:
        assert sum(len(duty.inputs) for duty in layer) == 2 * 2 * 256, "2 pages, 2 experts a token"


def test_the_model_is_left_as_it_was(model, probe):
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    probe.damage(Recipe("nf2", "nf2", "nf2"))
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    assert not any(layer.mlp._forward_pre_hooks for layer in model.model.layers)


def test_a_probe_without_pages_is_refused(model):
    with pytest.raises(ValueError, match="pages=0, examples=4"):
        Probe(model, standin.tokenizer(), pages=0, examples=4)
