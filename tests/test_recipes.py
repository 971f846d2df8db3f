import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from labutils.anatomy import Part
from labutils.formats import STORABLE
from labutils.recipes import Recipe

EXPERT = Part("experts", layer=2, expert=5, projection="up_proj")


def test_experts_in_nf4_and_everything_else_in_16_bits_is_the_default():
    recipe = Recipe()
    assert recipe.format_of(EXPERT) == "nf4"
    assert {recipe.format_of(Part(name)) for name in ("router", "attention", "lm_head")} == {"bf16"}
    assert recipe.format_of(Part("norms", layer=0)) is None


@pytest.mark.parametrize(
    ("path", "covers"),
    [
        ("layers.2", True),
        ("layers.2.experts", True),
        ("layers.2.experts.5", True),
        ("layers.2.experts.5.up_proj", True),
        ("layers.*.experts.5", True),
        ("layers.*.experts.*.up_proj", True),
        ("layers.20", False),
        ("layers.2.experts.50", False),
        ("layers.2.attention", False),
        ("layers.2.experts.5.down_proj", False),
    ],
)
def test_an_override_covers_what_its_path_names(path, covers):
    recipe = Recipe(overrides={path: "int8"})
    assert recipe.format_of(EXPERT) == ("int8" if covers else "nf4")
    assert recipe.unused_overrides([EXPERT]) == ([] if covers else [path])


def test_of_several_overrides_the_last_counts():
    recipe = Recipe(overrides={"layers.2.experts.5": "bf16", "layers.2": "int8"})
    assert recipe.format_of(EXPERT) == "int8"


@given(
    st.builds(
        Recipe,
        experts=st.sampled_from(STORABLE),
        router=st.sampled_from(STORABLE),
        block_size=st.sampled_from((32, 64, 128)),
        double_quant=st.booleans(),
        overrides=st.dictionaries(
            st.sampled_from(("layers.0", "layers.1.experts.3", "layers.*.attention")),
            st.sampled_from(STORABLE),
        ),
    )
)
def test_a_recipe_survives_a_file(recipe):
    assert Recipe(**json.loads(json.dumps(recipe.to_dict()))) == recipe


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        ({"experts": "nf9"}, "Unknown format 'nf9'"),
        ({"block_size": 48}, "Block size 48"),
        ({"overrides": {"layers.0.expert": "nf4"}}, "'layers.0.expert' names no part"),
        ({"overrides": {"layers.0.norms": "int8"}}, "'layers.0.norms' names no part"),
        ({"overrides": {"layers.0": "int3"}}, "int3 can be studied, not stored"),
    ],
)
def test_a_mistake_is_named_at_once(mistake, message):
    with pytest.raises(ValueError, match=message):
        Recipe(**mistake)


def test_what_is_not_quantized_must_be_in_one_format():
    with pytest.raises(ValueError, match="mixes bf16 and fp32"):
        Recipe(router="fp32").float_format  # noqa: B018
    assert Recipe(experts="int8").float_format == "bf16"
