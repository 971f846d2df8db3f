"""Parameters against what is published, and against models that are really built."""

import pytest
import torch
from families import FAMILIES
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, MixtralConfig

from labutils.budget import predict
from labutils.ledger import PUBLISHED, ledger_of
from labutils.recipes import Recipe

BILLION = 10**9

# Both sizes as the authors print them, in billions; see the table in labutils.ledger.
PRINTED = {
    "Mixtral-8x7B": (46.7, 12.9),
    "Mixtral-8x22B": (141, 39),
    "OLMoE-1B-7B": (6.9, 1.3),
    "Qwen3-30B-A3B": (30.5, 3.3),
    "DeepSeek-V2-Lite": (15.7, 2.4),
    "Qwen1.5-MoE-A2.7B": (14.3, 2.7),
    "gpt-oss-20b": (20.91, 3.61),
    "Llama-4-Scout-17B-16E": (109, 17),
}

# What the authors leave out of what is active: the embeddings of the input, in billions.
LEFT_OUT = {"DeepSeek-V2-Lite": 0.21, "gpt-oss-20b": 0.579}

# Half of the `total_size` in the index of each published checkpoint, which is stored in bf16.
STORED = {
    "Mixtral-8x7B": 46_702_792_704,
    "Mixtral-8x22B": 140_620_634_112,
    "OLMoE-1B-7B": 6_919_161_856,
    "Qwen3-30B-A3B": 30_532_122_624,
    "DeepSeek-V2-Lite": 15_706_484_224,
}


# How many experts there are, and how many of them a token meets.
CHOSEN = {
    "Mixtral-8x7B": (8, 2),
    "Mixtral-8x22B": (8, 2),
    "OLMoE-1B-7B": (64, 8),
    "Qwen3-30B-A3B": (128, 8),
    "DeepSeek-V2-Lite": (64, 6),
    "Qwen1.5-MoE-A2.7B": (60, 4),
    "gpt-oss-20b": (32, 4),
    "Llama-4-Scout-17B-16E": (16, 1),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_both_sizes_are_the_published_ones(name):
    ledger = ledger_of(PUBLISHED[name])
    total, active = PRINTED[name]
    if name == "Llama-4-Scout-17B-16E":  # its eyes, 0.87 B beside the text model, are not here
        total -= 0.87
    assert ledger.total / BILLION == pytest.approx(total, rel=0.005)
    assert ledger.active / BILLION - LEFT_OUT.get(name, 0) == pytest.approx(active, rel=0.025)
    assert STORED.get(name) in (None, ledger.total)


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_parameter_is_counted_that_transformers_builds(name):
    """No weight is forgotten, none counted twice, and none is of an unknown kind."""
    config = AutoConfig.from_pretrained(PUBLISHED[name])
    with torch.device("meta"):
        built = AutoModelForCausalLM.from_config(config)
    ledger = ledger_of(PUBLISHED[name])
    assert ledger.total == built.num_parameters()
    assert "other" not in ledger.parameters
    assert (ledger.experts, ledger.top_k) == CHOSEN[name]


def test_components_of_gpt_oss_are_those_in_its_paper():
    """arXiv:2508.10925, table 1: the MLP, routers among it, attention, and both embeddings."""
    sizes = ledger_of(PUBLISHED["gpt-oss-20b"]).parameters
    assert (sizes["experts"] + sizes["router"]) / BILLION == pytest.approx(19.12, abs=0.005)
    assert sizes["attention"] / BILLION == pytest.approx(0.64, abs=0.005)
    assert (sizes["embeddings"] + sizes["lm_head"]) / BILLION == pytest.approx(1.16, abs=0.005)


def test_mixtral_is_what_transformers_calls_mixtral():
    assert ledger_of(PUBLISHED["Mixtral-8x7B"]) == ledger_of(MixtralConfig())


@pytest.mark.parametrize("config", FAMILIES.values(), ids=FAMILIES)
def test_adds_up_to_what_is_built_and_predicted(config):
    ledger = ledger_of(config)
    with torch.device("meta"):
        built = AutoModelForCausalLM.from_config(config)
    assert ledger.total == built.num_parameters()
    budget = predict(config, Recipe(experts="bf16"))
    assert {name: 2 * size for name, size in ledger.parameters.items()} == budget.by_component
    assert ledger.top_k == config.num_experts_per_tok


@given(st.integers(1, 20), st.data())
def test_more_experts_as_if_they_were_built(experts, data):
    top_k = data.draw(st.integers(1, experts))
    config = MixtralConfig(**FAMILIES["mixtral"].to_dict())
    config.num_local_experts, config.num_experts_per_tok = experts, top_k
    assert ledger_of(FAMILIES["mixtral"]).with_experts(experts, top_k) == ledger_of(config)


@given(st.integers(1, 64), st.data())
def test_active_is_total_where_every_expert_is_chosen_and_less_elsewhere(experts, data):
    top_k = data.draw(st.integers(1, experts))
    ledger = ledger_of(FAMILIES["olmoe"]).with_experts(experts, top_k)
    assert (ledger.active == ledger.total) == (top_k == experts)
    one_expert = ledger.parameters["experts"] // experts
    assert ledger.total - ledger.active == (experts - top_k) * one_expert
    chosen = top_k * one_expert
    assert ledger.experts_share_of_active == pytest.approx(chosen / ledger.active)
    assert 0 < ledger.experts_share_of_active <= ledger.experts_share < 1


@pytest.mark.parametrize(("experts", "top_k"), [(4, 5), (4, 0), (0, 0)])
def test_more_chosen_than_there_are(experts, top_k):
    with pytest.raises(ValueError, match=f"top_k={top_k}: with {experts} experts"):
        ledger_of(FAMILIES["mixtral"]).with_experts(experts, top_k)


def test_a_model_without_experts_has_no_such_ledger():
    dense = LlamaConfig(hidden_size=64, intermediate_size=64, num_hidden_layers=1, vocab_size=64)
    with pytest.raises(ValueError, match="LlamaConfig model has no experts"):
        ledger_of(dense)
