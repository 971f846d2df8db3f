"""A pattern fits the modules that it is made for, and nothing else."""

import re

from hypothesis import given
from hypothesis import strategies as st

from labutils.targets import patterns

LAYERS, EXPERTS = range(3), range(4)
ATTENTION = [f"model.layers.{n}.self_attn.{leaf}_proj" for n in LAYERS for leaf in "qkvo"]
MIXTRAL = [
    f"model.layers.{n}.block_sparse_moe.experts.{e}.{leaf}"
    for n in LAYERS
    for e in EXPERTS
    for leaf in ("w1", "w2", "w3")
]
EVERYTHING = [*ATTENTION, *MIXTRAL, "lm_head"]


def fitting(found: list[str], names: list[str]) -> set[str]:
    return {name for name in names if any(re.match(pattern, name) for pattern in found)}


def test_a_whole_component_takes_one_pattern():
    assert patterns(MIXTRAL, EVERYTHING) == [
        r"^model\.layers\.\d+\.(mlp|block_sparse_moe)\.experts\.\d+\."
        r"(w1|w2|w3|gate_proj|down_proj|up_proj)$"
    ]
    assert patterns(["lm_head"], EVERYTHING) == ["^lm_head$"]
    assert patterns([], EVERYTHING) == []


@given(st.sets(st.sampled_from(EVERYTHING)))
def test_whatever_is_chosen_is_fitted_once_and_nothing_else(chosen):
    found = patterns(chosen, EVERYTHING)
    assert fitting(found, EVERYTHING) == chosen
    assert all(sum(bool(re.match(each, name)) for each in found) == 1 for name in chosen)


def test_exceptions_stay_few_patterns():
    """Layers 1 and 11 of twelve, and one matrix of experts 2 and 10 in the others."""
    everything = [
        f"layers.{n}.mlp.experts.{e}.{leaf}"
        for n in range(12)
        for e in range(12)
        for leaf in ("gate_proj", "up_proj", "down_proj")
    ]
    chosen = [
        name for name in everything if re.search(r"layers\.(1|11)\.|experts\.(2|10)\.up", name)
    ]
    found = patterns(chosen, everything)
    assert fitting(found, everything) == set(chosen) and len(found) == 3


@given(st.sets(st.sampled_from(MIXTRAL)))
def test_both_names_of_an_expert_are_fitted(chosen):
    def renamed(name: str) -> str:
        for old, new in (("w1", "gate_proj"), ("w2", "down_proj"), ("w3", "up_proj")):
            name = name.replace(old, new)
        return name.replace("block_sparse_moe", "mlp")

    everything = [renamed(name) for name in MIXTRAL]
    expected = {renamed(name) for name in chosen}
    assert fitting(patterns(chosen, EVERYTHING), everything) == expected


def test_a_dot_is_a_dot_and_a_name_ends():
    (found,) = patterns(["a.b"], ["a.b", "axb", "a.bc"])
    assert re.match(found, "a.b") and not re.match(found, "axb") and not re.match(found, "a.bc")
