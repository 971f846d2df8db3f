import pytest
import torch
from families import FAMILIES
from transformers import AutoModelForCausalLM, DynamicCache, MixtralConfig

from labutils.budget import kv_cache_bytes, predict, weights_of
from labutils.recipes import Recipe


def test_mixtral_8x7b_as_published():
    """46.7 billion parameters; 93.4 GB in bf16, 24.48 GB in NF4 with double quantization."""
    config = MixtralConfig()
    in_4_bits = predict(config, Recipe(attention="nf4"))
    in_16_bits = predict(config, Recipe(experts="bf16"))
    assert in_4_bits.parameters == 46_702_792_704
    assert in_16_bits.total_bytes == 2 * 46_702_792_704
    assert in_4_bits.total_bytes / 1e9 == pytest.approx(24.48, abs=0.01)
    assert in_4_bits.by_component["router"] == 2 * 1_048_576
    assert kv_cache_bytes(config, context_tokens=1) == 131_072


def test_no_context_means_weights_alone():
    assert "kv_cache" not in predict(FAMILIES["mixtral"], Recipe()).by_component
    with_context = predict(FAMILIES["mixtral"], Recipe(), context_tokens=100, batch_size=2)
    assert with_context.by_component["kv_cache"] > 0
    assert with_context.weights_bytes == predict(FAMILIES["mixtral"], Recipe()).total_bytes


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_equal_transformers_own_count(family):
    model = AutoModelForCausalLM.from_config(FAMILIES[family])
    counted = sum(weight.parameters for weight in weights_of(FAMILIES[family]))
    assert counted == model.num_parameters()


@pytest.mark.parametrize("family", FAMILIES)
def test_kv_cache_equals_a_real_one(family):
    config = FAMILIES[family]
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    cache = DynamicCache(config=config)
    with torch.no_grad():
        model(torch.ones(2, 7, dtype=torch.long), past_key_values=cache)
    real_bytes = sum(2 * (layer.keys.numel() + layer.values.numel()) for layer in cache.layers)
    assert kv_cache_bytes(config, context_tokens=7, batch_size=2) == real_bytes


def test_an_override_that_fits_nothing_is_refused_with_what_there_is():
    with pytest.raises(ValueError, match=r"'layers.7.experts'.*layers 0 to 1 with experts 0 to 7"):
        predict(FAMILIES["mixtral"], Recipe(overrides={"layers.7.experts": "int8"}))
