import ast
import json
import re
import shlex
import subprocess
import sys
from dataclasses import replace

import gguf
import pytest
import yaml
from compressed_tensors.quantization import QuantizationScheme, preset_name_to_scheme
from compressed_tensors.utils.match import match_name
from families import FAMILIES
from transformers import LlamaConfig, MixtralConfig, Qwen3MoeConfig

from labutils import engines, standin
from labutils.budget import weights_of
from labutils.checkpoints import coverage, load
from labutils.engines import GGML_FTYPES, GGML_TYPES, Skeleton, _ggml_name, handouts
from labutils.export import load_back
from labutils.formats import FORMATS
from labutils.ledger import PUBLISHED
from labutils.recipes import Recipe

HERE, CONFIG = str(standin.PATH), standin.config()
MIXED = Recipe(
    attention="int8",
    router="nf4",
    lm_head="int8",
    overrides={
        "layers.1.experts.3": "int8",
        "layers.2": "bf16",
        "layers.*.experts.5.down_proj": "int8",
    },
)
BY_LAYER = Recipe(
    attention="int8", router="int8", embeddings="nf4", overrides={"layers.1.experts": "int8"}
)
IN_LLAMA_CPP = FAMILIES | {
    "qwen3_moe": Qwen3MoeConfig(**FAMILIES["qwen3_moe"].to_dict() | {"mlp_only_layers": []})
}
ARCHITECTURES = {
    "mixtral": gguf.MODEL_ARCH.LLAMA,
    "olmoe": gguf.MODEL_ARCH.OLMOE,
    "qwen3_moe": gguf.MODEL_ARCH.QWEN3MOE,
    "deepseek_v2": gguf.MODEL_ARCH.DEEPSEEK2,
}


def run(handout):
    """What the code of a handout leaves behind."""
    names = {}
    exec(compile(handout.text, handout.filename, "exec"), names)
    return names


# -------------------------------------------------------------------------------- transformers


@pytest.mark.parametrize("recipe", [Recipe(), MIXED], ids=["plain", "mixed"])
@pytest.mark.parametrize("make", [engines.labutils, engines.transformers])
def test_the_lab_s_own_code_loads_the_recipe(make, recipe, capsys):
    handout = make(Skeleton.of(HERE, CONFIG, recipe))
    coverage(run(handout)["model"]).require(recipe)
    assert (handout.checked, handout.warnings) == ("loaded", ())


@pytest.mark.parametrize("make", [engines.labutils, engines.transformers])
@pytest.mark.parametrize("choice", [{"experts": "int3"}, {"method": "gptq", "double_quant": False}])
def test_what_can_only_be_simulated_is_refused(make, choice):
    with pytest.raises(ValueError, match=r"simulated|studied"):
        make(Skeleton.of(HERE, CONFIG, Recipe(**choice)))


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(attention="nf4"),
        Recipe(attention="nf4", router="nf4", double_quant=False, overrides={"layers.1": "bf16"}),
        Recipe("int8", attention="int8", lm_head="int8", embeddings="int8"),
        Recipe("bf16", attention="fp4", overrides={"layers.0.attention.q_proj": "bf16"}),
    ],
    ids=["nf4", "by layer", "int8", "one projection"],
)
def test_stock_bitsandbytes_skips_what_the_warning_says(recipe):
    handout = engines.bitsandbytes(Skeleton.of(HERE, CONFIG, recipe))
    covered = coverage(run(handout)["model"])
    skipped = [
        weight
        for weight in covered.weights
        if FORMATS[recipe.format_of(weight.part) or "bf16"].scaled and weight.stored_as == "bf16"
    ]
    assert all(
        weight.stored_as == (recipe.format_of(weight.part) or "bf16")
        for weight in covered.weights
        if weight not in skipped
    )
    warning = " ".join(text for text in handout.warnings if "skips" in text)
    if not skipped:
        assert not warning
        return
    parameters = sum(weight.parameters for weight in skipped)
    share = parameters / standin.scores()["parameters"]
    kept_mib = sum(weight.bytes for weight in skipped) / 2**20
    assert f"{parameters:,} parameters, {share:.2%} of the model" in warning
    assert f"take {kept_mib:.2f} MiB instead" in warning
    components = {weight.part.component for weight in skipped}
    assert all(component in warning for component in components)


def test_mixtral_s_experts_are_skipped_by_stock_bitsandbytes():
    handout = engines.bitsandbytes(
        Skeleton.of("m", PUBLISHED["Mixtral-8x7B"], Recipe(attention="nf4"))
    )
    assert "45,097,156,608 parameters, 96.56% of the model" in handout.warnings[0]
    assert "take 84.00 GiB instead of 21.6" in handout.warnings[0]


def test_stock_bitsandbytes_has_blocks_of_64():
    handout = engines.bitsandbytes(
        Skeleton.of(HERE, CONFIG, Recipe(attention="nf4", block_size=128))
    )
    assert "blocks of 64, not of 128" in handout.warnings[1]


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (MIXED, "one format for the whole model.* int8 and nf4"),
        (Recipe("int4"), "the recipe has int4"),
        (Recipe("bf16"), "none that is quantized"),
        (Recipe(), "skipped by stock bitsandbytes.*: experts"),
    ],
)
def test_what_stock_bitsandbytes_cannot_do_is_refused(recipe, message):
    with pytest.raises(ValueError, match=message):
        engines.bitsandbytes(Skeleton.of(HERE, CONFIG, recipe))


def test_a_tied_output_head_is_left_alone():
    handout = engines.bitsandbytes(Skeleton.of("m", FAMILIES["qwen3_moe"], Recipe(attention="nf4")))
    settings = next(n for n in ast.walk(ast.parse(handout.text)) if isinstance(n, ast.Call))
    chosen = {keyword.arg: ast.unparse(keyword.value) for keyword in settings.keywords}
    assert "lm_head" in chosen["llm_int8_skip_modules"]


# -------------------------------------------------------------------------------- llm-compressor


def modifiers(recipe, config=CONFIG):
    text = engines.llm_compressor(Skeleton.of(HERE, config, recipe)).text
    return yaml.safe_load(text)["quant_stage"]["quant_modifiers"]


def expected(model, in_reach=("experts", "attention", "lm_head", "dense_mlp", "shared_experts")):
    """The format of every module that a calibrating engine reaches, by name."""
    return {
        module.name: format
        for module, format in model.formats.items()
        if module.part.component in in_reach
    }


@pytest.mark.parametrize("family", [*FAMILIES, "standin"])
@pytest.mark.parametrize("recipe", [Recipe(block_size=32), MIXED], ids=["plain", "mixed"])
def test_compressed_tensors_finds_every_module_in_its_group(family, recipe):
    config = FAMILIES.get(family, CONFIG)
    if recipe is MIXED:
        overrides = {path: format for path, format in MIXED.overrides.items() if "2" not in path}
        recipe = replace(MIXED, block_size=32, overrides=overrides | {"layers.0": "bf16"})
    settings = modifiers(recipe, config)["QuantizationModifier"]
    groups = settings["config_groups"].values()
    for group in groups:
        QuantizationScheme.model_validate(group)
    bits = {"nf4": 4, "int8": 8}
    for name, format in expected(Skeleton.of("m", config, recipe)).items():
        for called in (name, published(name)):
            found = [
                group["weights"]["num_bits"]
                for group in groups
                for target in group["targets"]
                if match_name(called, target)
            ]
            ignored = any(match_name(called, target) for target in settings["ignore"])
            assert found == ([bits[format]] if format in bits else []), called
            assert ignored == (format not in bits), called


def published(name: str) -> str:
    """An expert's name as Mixtral's checkpoint has it."""
    if ".experts." not in name:
        return name
    path, _, leaf = name.replace(".mlp.", ".block_sparse_moe.").rpartition(".")
    return f"{path}.{dict(gate_proj='w1', up_proj='w3', down_proj='w2')[leaf]}"


@pytest.mark.parametrize(("format", "preset"), [("mxfp4", "MXFP4A16"), ("nvfp4", "NVFP4A16")])
def test_the_library_s_own_presets_are_used(format, preset):
    (group,) = modifiers(Recipe(format))["QuantizationModifier"]["config_groups"].values()
    assert (
        QuantizationScheme.model_validate(group).weights
        == preset_name_to_scheme(preset, ["Linear"]).weights
    )


def test_blocks_and_rows_are_those_of_the_recipe():
    groups = modifiers(MIXED)["QuantizationModifier"]["config_groups"]
    weights = {g["weights"]["num_bits"]: g["weights"] for g in groups.values()}
    assert (weights[4]["strategy"], weights[4]["group_size"]) == ("group", 64)
    assert (weights[8]["strategy"], weights[8].get("group_size")) == ("channel", None)


@pytest.mark.parametrize(
    ("method", "names"),
    [
        ("rtn", ["QuantizationModifier"]),
        ("gptq", ["GPTQModifier"]),
        ("awq", ["AWQModifier", "QuantizationModifier"]),
    ],
)
def test_the_method_is_the_modifier(method, names):
    recipe = Recipe("int4", double_quant=False, method=method)
    handout = engines.llm_compressor(Skeleton.of(HERE, CONFIG, recipe))
    assert list(modifiers(recipe)) == names
    assert any("calibration text" in warning for warning in handout.warnings) == (method != "rtn")


def test_what_is_changed_or_left_is_in_the_warnings():
    for handout in (
        engines.llm_compressor(Skeleton.of(HERE, CONFIG, MIXED)),
        engines.gptqmodel(Skeleton.of(HERE, CONFIG, MIXED)),
    ):
        said = " ".join(handout.warnings)
        assert "has no nf4: int4 stands in for it" in said
        assert "Left in bf16: router." in said
        assert "no double quantization" in said
    exact = engines.llm_compressor(Skeleton.of(HERE, CONFIG, Recipe("int4", double_quant=False)))
    assert exact.warnings == ()


@pytest.mark.parametrize("make", [engines.llm_compressor, engines.gptqmodel])
def test_rows_that_are_no_whole_blocks_are_refused(make):
    with pytest.raises(ValueError, match="rows of 128 weights, which blocks of 256 do not divide"):
        make(Skeleton.of(HERE, CONFIG, Recipe("int4", block_size=256)))


@pytest.mark.parametrize("make", [engines.llm_compressor, engines.gptqmodel, engines.llama_cpp])
def test_nothing_to_quantize_is_refused(make):
    with pytest.raises(ValueError, match="quantizes nothing"):
        make(Skeleton.of(HERE, CONFIG, Recipe("bf16", router="int8")))


# ------------------------------------------------------------------------------------ GPTQModel


@pytest.mark.parametrize("family", [*FAMILIES, "standin"])
def test_gptqmodel_s_patterns_give_every_module_its_bits(family):
    """The first pattern that fits decides, as GPTQModel's `dynamic_get` has it."""
    config = FAMILIES.get(family, CONFIG)
    recipe = Recipe(
        attention="int8",
        block_size=32,
        overrides={"layers.1.experts.3": "int3", "layers.0": "bf16"},
    )
    text = engines.gptqmodel(Skeleton.of("m", config, recipe)).text
    call = next(
        node
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "QuantizeConfig"
    )
    settings = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
    assert (settings["bits"], settings["group_size"]) == (4, 32)
    for name, format in expected(Skeleton.of("m", config, recipe)).items():
        found = settings["bits"]
        for pattern, its in settings["dynamic"].items():
            if re.match(pattern[2:], name):
                found = None if pattern.startswith("-:") else its["bits"]
                break
        if name == "lm_head":
            assert settings["lm_head"] is False
        else:
            bits = FORMATS[format].weight_bits
            assert found == (bits if bits < 16 else None), name


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (Recipe("int4", block_size=2048), "GPTQModel has groups of|do not divide"),
        (Recipe("int4", double_quant=False, method="awq"), "take llm-compressor"),
    ],
)
def test_what_gptqmodel_has_not_is_refused(recipe, message):
    with pytest.raises(ValueError, match=message):
        engines.gptqmodel(Skeleton.of("m", PUBLISHED["Mixtral-8x7B"], recipe))


# ----------------------------------------------------------------------------------------- vLLM


def test_vllm_serves_what_the_script_exports(tmp_path):
    handout = engines.vllm(Skeleton.of(HERE, CONFIG, BY_LAYER))
    export = next(line for line in handout.text.splitlines() if "python" in line)
    code = shlex.split(export)[-1]
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=tmp_path, check=True)
    settings = json.loads((tmp_path / "quantized" / "config.json").read_text())
    groups = settings["quantization_config"]["config_groups"].values()
    assert {group["weights"]["num_bits"] for group in groups} == {4, 8}
    assert load_back(tmp_path / "quantized").num_parameters() == standin.scores()["parameters"]
    said = " ".join(handout.warnings)
    assert "int4 stands in" in said and "router and embeddings" in said.replace(
        "embeddings and router", "router and embeddings"
    )


@pytest.mark.parametrize(
    ("gpus", "nodes", "wanted"),
    [
        (1, 1, "vllm serve ./quantized"),
        (4, 1, "vllm serve ./quantized --tensor-parallel-size 4 --enable-expert-parallel"),
    ],
)
def test_vllm_s_command_line(gpus, nodes, wanted):
    recipe = Recipe("int4", double_quant=False)
    assert (
        engines.vllm(Skeleton.of(HERE, CONFIG, recipe), gpus, nodes).text.splitlines()[-1] == wanted
    )


def test_vllm_on_several_machines(tmp_path):
    """The script as it runs on the second of two, with a `vllm` that says what it was given."""
    recipe = Recipe("int4", double_quant=False)
    (tmp_path / "serve.sh").write_text(engines.vllm(Skeleton.of(HERE, CONFIG, recipe), 2, 2).text)
    (tmp_path / "quantized").mkdir()
    (tmp_path / "vllm").write_text('#!/bin/sh\necho "$@"\n')
    (tmp_path / "vllm").chmod(0o755)
    given = [
        subprocess.run(
            ["sh", "serve.sh", rank, "10.0.0.1"],
            cwd=tmp_path,
            env={"PATH": f"{tmp_path}:/usr/bin:/bin"},
            check=True,
            capture_output=True,
            text=True,
        ).stdout.split()
        for rank in "01"
    ]
    shared = (
        "serve ./quantized --tensor-parallel-size 2 --enable-expert-parallel "
        "--pipeline-parallel-size 2 --nnodes 2 --node-rank"
    ).split()
    assert given[0] == [*shared, "0", "--master-addr", "10.0.0.1"]
    assert given[1] == [*shared, "1", "--master-addr", "10.0.0.1", "--headless"]


def test_a_calibrated_recipe_is_served_from_llm_compressor_s_folder():
    recipe = Recipe("int4", double_quant=False, method="gptq")
    handout = engines.vllm(Skeleton.of(HERE, CONFIG, recipe))
    assert "export" not in handout.text
    assert "llm-compressor writes with gptq" in handout.warnings[-1]


@pytest.mark.parametrize(
    ("recipe", "gpus", "nodes", "message"),
    [
        (MIXED, 1, 1, "one format for all experts of a layer; in layer 0"),
        (Recipe(overrides={"layers.1.attention.q_proj": "int8"}), 1, 1, "for the attention of a"),
        (Recipe("int3"), 1, 1, "not int3"),
        (Recipe("nvfp4"), 1, 1, "not nvfp4"),
        (Recipe("bf16", attention="fp8_e4m3"), 1, 1, "not fp8_e4m3"),
        (Recipe("int4", block_size=256), 1, 1, "do not divide"),
        (Recipe(), 3, 1, "3 GPUs do not divide the model's 4 attention heads"),
        (Recipe(), 1, 5, "5 machines for 4 layers"),
        (Recipe(), 0, 1, "at least 1"),
    ],
)
def test_what_vllm_would_not_load_is_refused(recipe, gpus, nodes, message):
    with pytest.raises(ValueError, match=message):
        engines.vllm(Skeleton.of(HERE, CONFIG, recipe), gpus, nodes)


# ------------------------------------------------------------------------------------ llama.cpp


def test_ggml_s_types_and_blocks_are_its_own():
    for format, type in GGML_TYPES.items():
        ggml = gguf.GGMLQuantizationType[type.name.upper()]
        assert gguf.GGML_QUANT_SIZES[ggml][0] == type.block, format
    assert set(FORMATS) - set(GGML_TYPES) == {"nvfp4"}


@pytest.mark.parametrize("family", FAMILIES)
def test_llama_cpp_has_the_names_that_its_library_maps_to(family):
    names = gguf.get_tensor_name_map(ARCHITECTURES[family], 2)
    for module in Skeleton.of("m", IN_LLAMA_CPP[family], Recipe()).modules:
        if module.part.component == "router":
            continue
        stacked = re.sub(r"experts\.\d+\.", "experts.", module.name)
        wanted, made = names.get_name(stacked), _ggml_name(module)
        assert wanted is not None and re.fullmatch(made.replace(".", r"\."), wanted), module.name


def quantize_line(handout):
    return shlex.split(handout.text.splitlines()[-1])


@pytest.mark.parametrize("family", FAMILIES)
def test_every_tensor_of_llama_cpp_has_one_type(family):
    recipe = Recipe(attention="int8", overrides={"layers.1.experts.*.down_proj": "int8"})
    line = quantize_line(engines.llama_cpp(Skeleton.of("m", IN_LLAMA_CPP[family], recipe)))
    types = [line[at + 1] for at, word in enumerate(line) if word == "--tensor-type"]
    found = {}
    for layer in range(2):
        for tensor in gguf.MODEL_TENSORS[ARCHITECTURES[family]]:
            name = gguf.TENSOR_NAMES[tensor].format(bid=layer) + ".weight"
            fits = [each.split("=")[1] for each in types if re.search(each.split("=")[0], name)]
            assert len(fits) <= 1, name
            found |= dict.fromkeys([name] * len(fits), *fits)
    assert found["blk.1.ffn_down_exps.weight"] == "q8_0"
    assert found["blk.1.ffn_gate_exps.weight"] == "iq4_nl"
    assert found["blk.0.attn_output.weight"] == "q8_0"
    assert "blk.1.ffn_gate_inp.weight" not in found
    assert all(any(re.search(each.split("=")[0], name) for name in found) for each in types)
    assert line[-3:-1] == ["model.gguf", "model-quantized.gguf"]
    assert line[-1] in ("IQ4_NL", "Q8_0")
    assert line[1:3] == ["--token-embedding-type", "bf16"]
    assert ("--output-tensor-type" in line) == (family != "qwen3_moe")


def test_llama_quantize_is_given_the_type_of_most_weights():
    for recipe, base in ((Recipe(), "IQ4_NL"), (BY_LAYER, "IQ4_NL"), (Recipe("int8"), "Q8_0")):
        assert quantize_line(engines.llama_cpp(Skeleton.of(HERE, CONFIG, recipe)))[-1] == base


def test_mxfp4_is_exact_and_has_a_name_of_its_own():
    handout = engines.llama_cpp(Skeleton.of(HERE, CONFIG, Recipe("mxfp4")))
    assert quantize_line(handout)[-1] == GGML_FTYPES["mxfp4"]
    assert handout.warnings == ()


def test_what_llama_cpp_changes_is_in_the_warnings():
    said = " ".join(engines.llama_cpp(Skeleton.of(HERE, CONFIG, BY_LAYER)).warnings)
    for words in (
        "nf4 becomes iq4_nl, blocks of 32",
        "int8 becomes q8_0",
        "never quantizes routers",
    ):
        assert words in said
    assert "no double quantization" in said
    uneven = engines.llama_cpp(
        Skeleton.of(HERE, CONFIG, Recipe("int3", method="gptq", double_quant=False))
    )
    assert "Rows of 128 weights are no whole blocks" in " ".join(uneven.warnings)
    assert "the recipe asks for gptq" in uneven.warnings[-1]


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (MIXED, r"share a format; blk\.0\.ffn_down_exps would hold int8 and nf4"),
        (Recipe("nvfp4"), "nothing like nvfp4"),
    ],
)
def test_what_llama_cpp_cannot_hold_is_refused(recipe, message):
    with pytest.raises(ValueError, match=message):
        engines.llama_cpp(Skeleton.of(HERE, CONFIG, recipe))


# ------------------------------------------------------------------------------------- together


@pytest.mark.parametrize("model", PUBLISHED)
def test_every_published_model_has_its_handouts(model):
    made = handouts("some/model", PUBLISHED[model], Recipe(attention="nf4"))
    assert len({handout.engine for handout in made}) == len(made) == 9
    for handout in made:
        assert (handout.checked == "refused") == (handout.text == "")
        assert handout.text or handout.warnings
    refused = sum(handout.checked == "refused" for handout in made)
    assert refused == (5 if model in ("gpt-oss-20b", "Llama-4-Scout-17B-16E") else 0)


def test_an_engine_that_cannot_express_a_recipe_says_so():
    made = {handout.engine: handout for handout in handouts(HERE, CONFIG, MIXED)}
    refused = {engine for engine, handout in made.items() if handout.checked == "refused"}
    assert refused == {
        "transformers, stock bitsandbytes",
        "vLLM, one GPU",
        "vLLM, two GPUs",
        "vLLM, two machines",
        "llama.cpp",
    }
    assert all(made[engine].warnings for engine in refused)


NASTY = 'it\'s "a" $(touch pwned); `touch pwned`\\ \n\x85\u2028import os # é 😀'


def test_a_name_cannot_break_out():
    for handout in handouts(NASTY, CONFIG, Recipe(attention="nf4")):
        code = handout.text
        if handout.filename.endswith(".yaml"):
            assert set(yaml.safe_load(code)) == {"quant_stage"}
            continue
        if handout.filename.endswith(".sh"):
            subprocess.run(["sh", "-n"], input=code, text=True, check=True)
            words = shlex.split(code, comments=True)
            code = next((word for word in words if "to_compressed" in word), repr(NASTY))
            assert NASTY in words or "to_compressed" in code
        constants = {n.value for n in ast.walk(ast.parse(code)) if isinstance(n, ast.Constant)}
        assert NASTY in constants, handout.engine


@pytest.mark.parametrize("name", ["", "--help"])
def test_a_name_that_is_none_is_refused(name):
    with pytest.raises(ValueError, match="is no model"):
        handouts(name, CONFIG, Recipe())


def test_what_load_would_refuse_is_refused():
    made = {h.engine: h for h in handouts(HERE, CONFIG, Recipe(router="fp32"))}
    for engine in ("this lab", "transformers, this lab's quantizer"):
        assert made[engine].checked == "refused"
        assert "mixes bf16 and fp32" in made[engine].warnings[0]
    stored = MixtralConfig(**CONFIG.to_dict() | {"quantization_config": {"quant_method": "gptq"}})
    with pytest.raises(ValueError, match="quantized with gptq, which this lab does not read"):
        engines.labutils(Skeleton.of(HERE, stored, Recipe()))


def test_a_published_model_goes_by_its_name():
    name = "Mixtral-8x7B"
    assert handouts("m", name, Recipe()) == handouts("m", PUBLISHED[name], Recipe())


def test_a_model_without_experts_is_refused():
    dense = LlamaConfig(hidden_size=64, intermediate_size=64, num_hidden_layers=1, vocab_size=64)
    with pytest.raises(ValueError, match="A LlamaConfig model has no experts"):
        handouts("m", dense, Recipe())


def test_an_override_of_nothing_is_refused():
    with pytest.raises(ValueError, match=r"layers\.9"):
        handouts(HERE, CONFIG, Recipe(overrides={"layers.9": "int8"}))


def test_nothing_of_a_model_is_forgotten():
    model = Skeleton.of("m", CONFIG, Recipe())
    parts = {weight.part for weight in weights_of(CONFIG) if len(weight.shape) == 2}
    assert {module.part for module in model.modules} == parts
    assert model.parameters == standin.scores()["parameters"]
    names = dict(load(HERE, Recipe("nf4")).named_modules())
    assert all(module.name in names for module in model.modules)
