import json
import tempfile
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import pytest
import torch
import transformers
from families import FAMILIES
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, GptOssConfig

from labutils import languages, standin
from labutils.anatomy import Part, matrices
from labutils.budget import weight_bytes
from labutils.budget import weights_in as weights_in_budget
from labutils.calibrated import METHODS, Rounder, Statistics, rounded_experts
from labutils.checkpoints import load
from labutils.codebooks import Codebook
from labutils.experts import quantized_linears
from labutils.formats import FORMATS, MICROSCALED, STORABLE, quantize
from labutils.recipes import HEADING, Recipe, rounded, simulated

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


RECIPES = st.builds(
    lambda method, double_quant, **choices: Recipe(
        method=method, double_quant=double_quant and method == "rtn", **choices
    ),
    method=st.sampled_from(METHODS),
    double_quant=st.booleans(),
    experts=st.sampled_from(tuple(FORMATS)),
    router=st.sampled_from(STORABLE),
    block_size=st.sampled_from((32, 64, 128)),
    overrides=st.dictionaries(
        st.sampled_from(("layers.0", "layers.1.experts.3", "layers.*.attention", "*")),
        st.sampled_from(tuple(FORMATS)),
    ),
)


@given(RECIPES)
def test_a_recipe_survives_a_file(recipe):
    """In the text that people read and in a checkpoint's JSON; also which override comes last."""
    with tempfile.TemporaryDirectory() as folder:
        again = Recipe.read(recipe.save(Path(folder) / "mine.yaml"))
        assert [path.name for path in Path(folder).iterdir()] == ["mine.yaml"]
    assert again == recipe and list(again.overrides) == list(recipe.overrides)
    assert Recipe(**json.loads(json.dumps(recipe.to_dict()))) == recipe


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        ({"experts": "nf9"}, "Unknown format 'nf9'"),
        ({"block_size": 48}, "Block size 48"),
        ({"double_quant": "no"}, "double_quant is True or False, and here 'no'"),
        ({"double_quant": 0}, "double_quant is True or False, and here 0"),
        ({"overrides": {0: "nf4"}}, "The override 0 names no part"),
        ({"overrides": {("layers", 0): "nf4"}}, "names no part"),
        ({"overrides": {"layers.0.expert": "nf4"}}, "'layers.0.expert' names no part"),
        ({"overrides": {"layers.0.norms": "int8"}}, "'layers.0.norms' names no part"),
        ({"overrides": {"layers.0": "int9"}}, "Unknown format 'int9'"),
        ({"method": "gtpq"}, "Unknown method 'gtpq'; the methods are rtn, gptq, awq"),
        ({"method": "awq"}, "awq keeps .* float32: it goes with double_quant=False"),
    ],
)
def test_a_mistake_is_named_at_once(mistake, message):
    with pytest.raises(ValueError, match=message):
        Recipe(**mistake)


def test_what_is_not_quantized_must_be_in_one_format():
    with pytest.raises(ValueError, match="mixes bf16 and fp32"):
        Recipe(router="fp32").float_format  # noqa: B018
    assert Recipe(experts="int8").float_format == "bf16"


# --------------------------------------------------------------------------- to read and to print


def test_the_file_is_what_one_would_write_by_hand(tmp_path):
    recipe = Recipe("int3", double_quant=False, method="gptq", overrides={"layers.0": "int8"})
    assert recipe.save(tmp_path / "mine.yaml").read_text() == HEADING + (
        "experts: int3\nattention: bf16\nrouter: bf16\nembeddings: bf16\nlm_head: bf16\n"
        "shared_experts: bf16\ndense_mlp: bf16\nblock_size: 64\ndouble_quant: false\n"
        "method: gptq\noverrides:\n  layers.0: int8\n"
    )
    assert "overrides" not in Recipe().save(tmp_path / "mine.yaml").read_text()


def test_a_file_may_name_only_what_differs(tmp_path):
    (tmp_path / "mine.yaml").write_text("attention: int8\n# a note\noverrides: {layers.3: nf4}\n")
    expected = Recipe(attention="int8", overrides={"layers.3": "nf4"})
    assert Recipe.read(tmp_path / "mine.yaml") == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"The file is empty\. A recipe has a line for each choice"),
        ("# nothing yet\n", "The file is empty"),
        ("nf4", "this holds a word"),
        ("- nf4", "line for each choice, like 'experts: nf4'; this holds a list"),
        ("experts: nf4\nrouter: int8\nexperts: int3", r"'experts' occurs twice(.|\n)*line 3"),
        ("overrides: {layers.0: nf4, layers.0: int8}", r"'layers\.0' occurs twice"),
        ("experts: [nf4", "not YAML text: while parsing"),
        ("experts: nf4\x00", "not YAML text"),
        ("when: 2001-99-99", "not YAML text: month must be in 1..12"),
        ("[" * 5000, "not YAML text"),
        ("expert: nf4", "Unknown key 'expert'.*Did you mean 'experts'?"),
        ("7: nf4", "Unknown key 7; the keys are experts, attention"),
        ("experts: 4", "experts is a word, and here a whole number"),
        ("block_size: '64'", "block_size is a whole number, and here a word"),
        ("block_size: true", "block_size is a whole number, and here true or false"),
        ("double_quant: never", "double_quant is true or false, and here a word"),
        ("double_quant:", "double_quant is true or false, and here nothing"),
        ("overrides: nf4", "overrides is paths and formats, and here a word"),
        ("overrides: {layers.0: 4}", "overrides, layers.0 is a word, and here a whole number"),
        ("overrides: {0: nf4}", "path in overrides is a word, and here a whole number"),
        ("experts: nf9", "Unknown format 'nf9'.*Did you mean"),
        ("block_size: 48", "Block size 48"),
        ("method: gptq", "goes with double_quant=False"),
    ],
)
def test_a_file_that_is_no_recipe_is_named(tmp_path, text, message):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"mine\.yaml(:| is).*{message}"):
        Recipe.read(path)
    path.write_bytes(b"experts: \xff")
    with pytest.raises(ValueError, match=r"mine\.yaml is not YAML text: 'utf-8'"):
        Recipe.read(path)


def test_nothing_in_a_file_is_executed(tmp_path):
    """And what refers to itself a billion times over is neither built nor printed."""
    made, path = tmp_path / "made", tmp_path / "mine.yaml"
    path.write_text(f"experts: !!python/object/apply:os.mkdir ['{made}']\n")
    with pytest.raises(ValueError, match="could not determine a constructor"):
        Recipe.read(path)
    assert not made.exists()
    lines = ["a: &a0 [x]"] + [f"b{i}: &a{i + 1} [{', '.join([f'*a{i}'] * 9)}]" for i in range(30)]
    for bomb in ("\n".join(lines), "\n".join(lines).replace("b29:", "experts:")):
        path.write_text(bomb)
        with pytest.raises(ValueError, match=r"mine\.yaml: ") as refused:
            Recipe.read(path)
        assert len(str(refused.value)) < 500


def test_a_recipe_that_cannot_be_written_leaves_the_one_that_is_there(tmp_path, monkeypatch):
    path = Recipe("int2").save(tmp_path / "mine.yaml")

    def full(self, text, **_):
        self.touch()
        raise OSError("No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space"):
        Recipe("int3").save(path)
    assert Recipe.read(path).experts == "int2"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_is_not_written_over(tmp_path):
    (tmp_path / "mine").mkdir()
    with pytest.raises(IsADirectoryError, match=r"mine is a folder; name a file in it"):
        Recipe().save(tmp_path / "mine")
    assert list(tmp_path.iterdir()) == [tmp_path / "mine"]


def test_the_table_has_a_row_for_each_component_and_exception():
    recipe = Recipe("int3", double_quant=False, overrides={"layers.*.experts.3": "mxfp4"})
    table = recipe.table.set_index("component")
    assert list(table.index) == [*recipe.components, "layers.*.experts.3"]
    assert table.loc["experts"].to_dict() == {"format": "int3", "bits_per_weight": 3.5}
    assert table.loc["router"].bits_per_weight == 16
    assert table.loc["layers.*.experts.3"].bits_per_weight == 4.25
    lines = recipe._repr_markdown_().splitlines()
    assert lines[2] == "| `experts` | int3 | 3.500 |"
    assert lines[-3:] == [
        "| `layers.*.experts.3` | mxfp4 | 4.250 |",
        "",
        "(blocks of 64, without double quantization)",
    ]


def test_a_line_names_the_method_unless_it_is_plain():
    assert str(Recipe()).endswith("dense_mlp bf16 (blocks of 64, with double quantization)")
    calibrated = Recipe(method="awq", double_quant=False)
    assert str(calibrated).endswith("(awq, blocks of 64, without double quantization)")


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


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("format", sorted(set(FORMATS) - {"bf16", "fp32"}))
def test_matrices_rounded_at_once_are_those_rounded_one_by_one(model, format, double_quant):
    """Experts of one tensor, with an exception in the middle and one for every other matrix."""
    name = "model.layers.1.mlp.experts.gate_up_proj"
    before = model.get_parameter(name).detach().clone().view(16, -1, 128)
    overrides = {"layers.1.experts.2": "int5", "layers.1.experts.6.up_proj": "fp32"}
    recipe = Recipe.keeping(
        "fp32", experts=format, block_size=256, double_quant=double_quant, overrides=overrides
    )
    with simulated(model, recipe):
        after = model.get_parameter(name).detach().clone().view(16, -1, 128)
    for index, weight in enumerate(matrices(name, tuple(model.get_parameter(name).shape))):
        its = recipe.format_of(weight.part)
        alone = Recipe.keeping(
            "fp32",
            block_size=256,
            double_quant=double_quant,
            overrides={weight.part.path: its},
        )
        with simulated(model, alone):
            expected = model.get_parameter(name).detach().view(16, -1, 128)[index].clone()
        assert torch.equal(after[index], expected), weight.part.path
        assert torch.equal(before[index], expected) == (its == "fp32")


def test_a_remembered_rounding_is_asked_for_once_and_changes_nothing(model):
    asked = []

    def counting(*of):
        asked.append(of)
        return rounded(model, *of)

    rounding = lru_cache(128)(counting)
    before = weights_in(model)
    seen = []
    for attention in ("int3", "int8", "int3"):
        recipe = Recipe.keeping("fp32", experts="int4", attention=attention, double_quant=False)
        with simulated(model, recipe, rounding=rounding):
            seen.append(weights_in(model))
        with simulated(model, recipe):
            assert not changed(model, seen[-1])
        assert not changed(model, before)
    tensors = [name for name, *_ in asked]
    assert len(asked) == len(set(asked))
    assert sum("experts" in name for name in tensors) == 8, "two tensors a layer, once"
    assert sum("self_attn" in name for name in tensors) == 32, "four a layer, in two widths"


def test_transposed_experts_are_not_simulated():
    config = GptOssConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_local_experts=4,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, vocab_size=64,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    before = weights_in(model)
    refused = pytest.raises(ValueError, match=r"gate_up_proj keeps its matrices as \(inputs")
    with refused, simulated(model, Recipe()):
        pass
    assert not changed(model, before)


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


def test_what_can_only_be_simulated_is_not_loaded():
    with pytest.raises(ValueError, match="int3 can be studied, not stored"):
        load(standin.PATH, Recipe(experts="int3"))
    with pytest.raises(ValueError, match=r'asks for gptq: .* load it with method="rtn"'):
        load(standin.PATH, Recipe(method="gptq", double_quant=False))


def test_a_quantized_model_is_not_simulated_upon():
    stored = load(standin.PATH, Recipe(experts="nf4"))
    with pytest.raises(ValueError, match="quantized already"), simulated(stored, Recipe("int3")):
        pass


def on_levels(blocks: torch.Tensor, codebook: Codebook) -> torch.Tensor:
    """Whether each of `blocks` (blocks, size) is levels of `codebook` times one number, (blocks).

    Which level its largest value stands for is not known, so all are tried.
    """
    largest, fits = blocks.abs().amax(dim=1, keepdim=True), torch.zeros(len(blocks)).bool()
    for level in codebook.levels.abs().unique():
        if level > 0:
            in_units = blocks / largest * level
            inside = (in_units.abs() <= codebook.peak * 1.001).all(dim=1)
            nearest = codebook.values[codebook.nearest(in_units).long()]
            fits |= inside & torch.isclose(in_units, nearest, rtol=1e-5, atol=1e-6).all(dim=1)
    return fits


def block_of(format: str) -> int:
    """How many of the weights of a 384 x 128 matrix share a scale, as `Recipe` stores it."""
    own = MICROSCALED[format].block_size if format in MICROSCALED else 64
    return 128 if FORMATS[format].scaled == "row" else own


@pytest.mark.parametrize(("method", "double_quant"), [("rtn", 0), ("rtn", 1), ("gptq", 0)])
def test_the_bits_that_are_claimed_are_those_that_are_used(model, method, double_quant):
    """In each block nothing but a codebook's levels, times a scale; in all formats with codes."""
    formats = [format for format in FORMATS.values() if format.codebook]
    places = [(layer, expert) for layer in range(4) for expert in range(8)][: len(formats)]
    overrides = {
        f"layers.{layer}.experts.{expert}.gate_proj": format.name
        for (layer, expert), format in zip(places, formats, strict=True)
    }
    recipe = Recipe.keeping(
        "fp32", method=method, double_quant=bool(double_quant), overrides=overrides
    )
    before = weights_in(model)
    with simulated(model, recipe, page_ids(1)):
        for (layer, expert), format in zip(places, formats, strict=True):
            name = f"model.layers.{layer}.mlp.experts.gate_up_proj"
            now, then = (
                weight[expert, :64].detach().reshape(-1, block_of(format.name))
                for weight in (model.get_parameter(name), before[name])
            )
            assert on_levels(now, format.codebook).all(), format.name
            assert not on_levels(then, format.codebook).any(), format.name


# -------------------------------------------------------------------------------------- calibrated


def page_ids(count: int) -> torch.Tensor:
    pages = languages.pages(count, torch.Generator().manual_seed(5))
    return torch.tensor(standin.tokenizer()(pages)["input_ids"])


def calibrated(method: str, experts: str = "fp32", **choices) -> Recipe:
    return Recipe.keeping("fp32", method=method, double_quant=False, experts=experts, **choices)


def plainly(recipe: Recipe) -> Recipe:
    return replace(recipe, method="rtn")


def assert_untouched(model, before: dict[str, torch.Tensor]) -> None:
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.view(torch.int32), before[name].view(torch.int32)), name
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_experts_are_rounded_as_rounded_experts_does_it(model, method):
    token_ids, before = page_ids(2), weights_in(model)
    with rounded_experts(model, token_ids, Rounder(method, "int3")) as rounded:
        expected = weights_in(model)
    with simulated(model, calibrated(method, "int3"), token_ids) as parts:
        assert not changed(model, expected)
        assert len(changed(model, before)) == 2 * 4
    assert [part.tokens for part in parts] == rounded.table.tokens.tolist()
    matrices = [matrix.rounded for layer in rounded.layers for matrix in layer.matrices]
    assert [part.stored_bytes for part in parts] == [each.stored_bytes for each in matrices]
    assert_untouched(model, before)


def test_each_part_has_its_own_format(model):
    """Expert 5 of layer 0 in INT8 by row and its neighbour in INT2; MXFP4 is rounded plainly."""
    token_ids, before = page_ids(1), weights_in(model)
    overrides = {
        "layers.0.experts.4": "int2",
        "layers.0.experts.5": "int8",
        "layers.0.experts.6": "mxfp4",
    }
    recipe = calibrated("gptq", overrides=overrides)
    name = "model.layers.0.mlp.experts.down_proj"
    with simulated(model, recipe, token_ids) as parts:
        simulated_down = model.get_parameter(name).detach().clone()
        assert changed(model, before) == {name, name.replace("down", "gate_up")}
    for expert, rounder in ((4, Rounder("gptq", "int2")), (5, Rounder("gptq", "int8", "row"))):
        with rounded_experts(model, token_ids, rounder):
            assert torch.equal(simulated_down[expert], model.get_parameter(name)[expert])
    assert torch.equal(simulated_down[6], quantize(before[name][6], "mxfp4").dequantize())
    assert {part.part.expert for part in parts} == {4, 5}


def test_calibrated_attention_loses_less_of_its_output(model):
    token_ids, seen = page_ids(2), {}
    q_proj = model.model.layers[0].self_attn.q_proj
    hook = q_proj.register_forward_pre_hook(lambda _, x: seen.update(x=x[0]))
    with torch.no_grad():
        model(input_ids=token_ids)
    hook.remove()
    statistics, errors = Statistics.of(seen["x"].flatten(0, 1)), {}
    names = [f"model.layers.0.self_attn.{name}_proj.weight" for name in "qkv"]
    before = weights_in(model)
    for method in METHODS:
        with simulated(model, calibrated(method, attention="int3"), token_ids):
            errors[method] = torch.tensor(
                [statistics.output_error(before[n], model.get_parameter(n)) for n in names]
            )
    assert (errors["gptq"] < 0.8 * errors["rtn"]).all()
    assert (errors["awq"] <= 1.001 * errors["rtn"]).all()
    assert errors["awq"].mean() < 0.98 * errors["rtn"].mean()


def test_what_is_downstream_is_calibrated_on_rounded_layers(model):
    """With the first attention rounded the last experts see something else, and the head too."""
    token_ids = page_ids(1)
    last = "model.layers.3.mlp.experts.down_proj"
    with simulated(model, calibrated("gptq", "int3", lm_head="int3"), token_ids):
        alone = {name: model.get_parameter(name).clone() for name in (last, "lm_head.weight")}
    both = calibrated("gptq", "int3", lm_head="int3", overrides={"layers.0.attention": "int2"})
    with simulated(model, both, token_ids) as parts:
        for name, weight in alone.items():
            assert not torch.equal(model.get_parameter(name), weight), name
    assert [part.part.path for part in parts[:4]] == [
        f"layers.0.attention.{name}_proj" for name in "qkvo"
    ]
    assert parts[-1].part.path == "lm_head" and parts[-1].tokens == token_ids.numel()


def test_router_and_embeddings_are_rounded_plainly(model):
    before = weights_in(model)
    names = ("model.embed_tokens.weight", "model.layers.1.mlp.gate.weight")
    recipe = calibrated("gptq", embeddings="int3", router="int3")
    with simulated(model, recipe, page_ids(1)) as parts:
        for name in names:
            assert torch.equal(
                model.get_parameter(name), quantize(before[name], "int3").dequantize()
            )
    assert not parts
    assert_untouched(model, before)


@pytest.mark.parametrize("method", ["gptq", "awq"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_can_be_calibrated(family, method):
    """All matrices but the norms, each once, and an expert without a token, or a layer, plainly."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(FAMILIES[family], dtype=torch.float32).eval()
    unused = torch.nn.Linear(128, 32, bias=False)
    model.model.layers[1].self_attn.add_module("unused", unused)
    before = weights_in(model)
    recipe = Recipe(*["int3"] * 7, block_size=32, double_quant=False, method=method)
    with simulated(model, recipe, torch.arange(2, 12).view(1, 10)) as parts:
        assert changed(model, before) == {name for name, w in before.items() if w.dim() > 1}
        plain = quantize(before["model.layers.1.self_attn.unused.weight"], "int3", 32)
        assert torch.equal(unused.weight, plain.dequantize())
    assert_untouched(model, before)
    assert all((part.method == method) == (part.tokens > 0) for part in parts)
    assert {part.method for part in parts} == {method, "rtn"}


@pytest.mark.parametrize("family", FAMILIES)
def test_awq_takes_the_bytes_that_a_budget_counts(family):
    """Matrix by matrix, and 16 bits an input less where a budget cannot know that none are kept.

    One input is loud, so that most that it goes into want scales. down_proj's cost nothing, but
    where up_proj is kept in bf16 and has no maxima that could absorb them.
    """
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(FAMILIES[family], dtype=torch.float32).eval()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.input_layernorm.weight[3] *= 30
            layer.post_attention_layernorm.weight[3] *= 30
    overrides = {"layers.1.experts.0.up_proj": "bf16", "layers.1.experts.2": "int8"}
    recipe = Recipe(
        *["int3"] * 7, block_size=32, double_quant=False, method="awq", overrides=overrides
    )
    with simulated(model, recipe, torch.arange(2, 202).view(2, 100)) as parts:
        pass
    weights, kept = {weight.part: weight for weight in weights_in_budget(model)}, []
    for made in parts:
        weight, path = weights[made.part], made.part.path
        scales_bytes = weight_bytes(weight, recipe) - weight_bytes(weight, plainly(recipe))
        folded = path.endswith("down_proj") and path != "layers.1.experts.0.down_proj"
        assert scales_bytes == (0 if folded else 2 * weight.shape[1]), path
        spared = weight_bytes(weight, recipe) - made.stored_bytes
        assert spared in (0, scales_bytes), path
        if path.endswith(("q_proj", "gate_proj", "up_proj")) and made.tokens:
            kept.append(spared == 0)
    assert sum(kept) > 0.9 * len(kept)


def test_weights_come_back_after_an_error_in_the_block_or_in_the_calibration(model):
    token_ids, before = page_ids(1), weights_in(model)
    recipe = calibrated("gptq", "int3", attention="int3", router="int4")
    with pytest.raises(KeyboardInterrupt), simulated(model, recipe, token_ids):
        raise KeyboardInterrupt
    assert_untouched(model, before)
    with torch.no_grad():
        model.get_parameter("model.layers.3.mlp.experts.down_proj")[0, 0, 0] = float("nan")
    before = weights_in(model)
    message = r"layers\.3\.experts\.0\.down_proj: The weight holds 1 NaN"
    with pytest.raises(ValueError, match=message), simulated(model, recipe, token_ids):
        pass
    assert_untouched(model, before)


def test_calibration_that_cannot_be_changes_nothing(model):
    before = weights_in(model)
    for tokens, message in (
        (None, "gptq rounds by what tokens show, and there are none: give `calibration`"),
        (page_ids(1)[0], r"shape \(256,\); give \(pages, tokens\)"),
        (page_ids(1).tolist(), r"are a list; give token ids, .*: tokenizer\(.*\[\"input_ids\"\]"),
        (transformers.BatchEncoding({"input_ids": page_ids(1)}), "are a BatchEncoding; give token"),
        (page_ids(1).float(), r"are of torch\.float32; give token ids, a tensor of whole numbers"),
        (page_ids(1) + 10**6, r"from 1,000,\d+ to 1,000,\d+, and this model knows 0 to \d+: take"),
        (page_ids(1) - 10**6, "are from -"),
        (page_ids(1)[:0], r"shape \(0, 256\); give \(pages, tokens\), at least one"),
    ):
        with (
            pytest.raises(ValueError, match=message),
            simulated(model, calibrated("gptq", "int3"), tokens),
        ):
            pass
        assert_untouched(model, before)
    model.model.layers[1].self_attn.odd = torch.nn.Embedding(4, 64)
    with (
        pytest.raises(ValueError, match=r"odd.weight belongs to a Embedding.* \"rtn\""),
        simulated(model, calibrated("gptq", attention="int3"), page_ids(1)),
    ):
        pass
