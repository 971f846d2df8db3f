import json

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

from labutils import standin
from labutils.anatomy import Part
from labutils.checkpoints import load
from labutils.experts import quantized_linears
from labutils.formats import FORMATS, STORABLE, quantize
from labutils.recipes import Recipe, simulated

EXPERT = Part("experts", layer=2, expert=5, projection="up_proj")


def test_experts_in_nf4_and_everything_else_in_16_bits_is_the_default():
    recipe = Recipe()
    assert recipe.format_of(EXPERT) == "nf4"
    assert {recipe.format_of(Part(name)) for name in ("router", "attention", "lm_head")} == {"bf16"}
    assert recipe.format_of(Part("norms", layer=0)) is None


def test_all_but_one_thing_can_be_kept():
    recipe = Recipe.keeping("fp32", experts="int3", block_size=128)
    assert {name for name in recipe.components if getattr(recipe, name) != "fp32"} == {"experts"}
    assert (recipe.experts, recipe.block_size) == ("int3", 128)


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
        ({"overrides": {"layers.0": "int9"}}, "Unknown format 'int9'"),
    ],
)
def test_a_mistake_is_named_at_once(mistake, message):
    with pytest.raises(ValueError, match=message):
        Recipe(**mistake)


def test_what_is_not_quantized_must_be_in_one_format():
    with pytest.raises(ValueError, match="mixes bf16 and fp32"):
        Recipe(router="fp32").float_format  # noqa: B018
    assert Recipe(experts="int8").float_format == "bf16"


# -------------------------------------------------------------------------------------- simulated


@pytest.fixture
def model():
    """The shipped Mixtral in float32, so that a rounded weight is not rounded once more."""
    transformers.utils.logging.disable_progress_bar()
    return load(standin.PATH).float()


def weights_in(model) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def changed(model, before: dict[str, torch.Tensor]) -> set[str]:
    after = dict(model.named_parameters())
    return {name for name, weight in before.items() if not torch.equal(weight, after[name])}


@pytest.mark.parametrize("double_quant", [True, False])
def test_simulated_weights_are_those_that_a_loaded_model_dequantizes(model, double_quant):
    recipe = Recipe(
        experts="nf4",
        attention="fp4",
        double_quant=double_quant,
        overrides={"layers.1.experts.3.up_proj": "int8", "layers.2": "bf16"},
    )
    loaded = load(standin.PATH, recipe)
    stored = {name: linear.dequantized().float() for name, linear in quantized_linears(loaded)}
    with simulated(model, recipe):
        weights = weights_in(model)
    assert len(stored) == 3 * (8 * 3 + 4)
    for name, there in stored.items():
        here = weights.get(f"{name}.weight")
        if here is None:
            fused, expert, projection = name.rsplit(".", 2)
            place = "down_proj" if projection == "down_proj" else "gate_up_proj"
            here = weights[f"{fused}.{place}"][int(expert)]
            halves = {"gate_proj": here[:384], "up_proj": here[384:], "down_proj": here}
            here = halves[projection]
        torch.testing.assert_close(there, here, rtol=2**-8, atol=1e-7)


def test_only_what_the_recipe_names_is_rounded(model):
    before = weights_in(model)
    with simulated(model, Recipe(experts="bf16", overrides={"layers.3.experts.5": "int2"})):
        assert changed(model, before) == {
            f"model.layers.3.mlp.experts.{name}" for name in ("gate_up_proj", "down_proj")
        }
        name = "model.layers.3.mlp.experts.down_proj"
        now, then = model.get_parameter(name), before[name]
        assert [e for e in range(8) if not torch.equal(now[e], then[e])] == [5]
        assert torch.equal(now[5], quantize(then[5], "int2", double_quant=True).dequantize())


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_weights_that_have_the_dtype_already_are_not_even_touched(model, dtype):
    """Neither copied nor written: the counter that torch keeps of writes stands still."""
    model = model.to(FORMATS[dtype].dtype)
    kept = dict.fromkeys(("attention", "router", "embeddings", "lm_head"), dtype)
    recipe = Recipe(dtype, **kept, overrides={"layers.1.experts.2.up_proj": "int3"})
    rounded = "model.layers.1.mlp.experts.gate_up_proj"
    before, writes = weights_in(model), {n: p._version for n, p in model.named_parameters()}
    with simulated(model, recipe):
        assert changed(model, before) == {rounded}
        now, then = model.get_parameter(rounded), before[rounded]
        assert [e for e in range(8) if not torch.equal(now[e], then[e])] == [2]
        assert torch.equal(now[2, :384], then[2, :384])
    assert not changed(model, before)
    written = {n for n, p in model.named_parameters() if p._version != writes[n]}
    assert written == {rounded}


@pytest.mark.parametrize(("there", "asked"), [("fp32", "bf16"), ("bf16", "fp16"), ("fp16", "bf16")])
def test_another_dtype_is_rounded_to(model, there, asked):
    there, dtype = FORMATS[there].dtype, FORMATS[asked].dtype
    model = model.to(there)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + 2**-9)
    before = weights_in(model)
    with simulated(model, Recipe(asked, overrides={"layers.0.attention": "int8"})):
        assert any(name.endswith("experts.down_proj") for name in changed(model, before))
        for name, weight in before.items():
            if ".experts." in name:
                assert torch.equal(model.get_parameter(name), weight.to(dtype).to(there))
    assert not changed(model, before)


def test_a_weight_that_cannot_be_rounded_leaves_all_as_they_were(model):
    """The last layer's is no number, which is found after the others have been rounded."""
    with torch.no_grad():
        model.get_parameter("model.layers.3.mlp.experts.down_proj")[7, 0, 0] = float("nan")
    before = weights_in(model)
    with pytest.raises(ValueError, match=r"(?i)nan"), simulated(model, Recipe("int3", "fp32")):
        pass
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.view(torch.int32), before[name].view(torch.int32)), name


def test_weights_come_back_after_an_error_too(model):
    before = weights_in(model)
    with pytest.raises(KeyboardInterrupt), simulated(model, Recipe("int3", "mxfp4", "nf2")):
        assert len(changed(model, before)) == 4 * (2 + 4 + 1)
        raise KeyboardInterrupt
    assert not changed(model, before)


def test_an_override_that_fits_nothing_changes_nothing(model):
    before = weights_in(model)
    with (
        pytest.raises(ValueError, match=r"layers\.9"),
        simulated(model, Recipe(overrides={"layers.9": "int8"})),
    ):
        pass
    assert not changed(model, before)


def test_a_format_that_can_only_be_simulated_is_not_loaded():
    with pytest.raises(ValueError, match="int3 can be studied, not stored"):
        load(standin.PATH, Recipe(experts="int3"))


def test_a_quantized_model_is_not_simulated_upon():
    stored = load(standin.PATH, Recipe(experts="nf4"))
    with pytest.raises(ValueError, match="quantized already"), simulated(stored, Recipe("int3")):
        pass
