import json
import math
import re
import shutil
import sys
from collections import namedtuple

import pytest
import torch
from compressed_tensors.entrypoints.convert.converters.ct_dequantizer import (
    CompressedTensorsDequantizer,
)
from compressed_tensors.quantization import QuantizationConfig
from families import FAMILIES
from hypothesis import given
from hypothesis import strategies as st
from random_checkpoints import INDEX, mixtral_config, read_tensors, write_any, write_mixtral
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, CompressedTensorsConfig

from labutils import checkpoints, export, standin
from labutils.anatomy import part_of
from labutils.budget import predict
from labutils.checkpoints import load, save
from labutils.export import load_back, to_compressed_tensors
from labutils.formats import FORMATS, quantize
from labutils.meter import Meter
from labutils.recipes import Recipe, simulated

TOKENS = torch.arange(40).reshape(2, 20)
MIXED = Recipe(
    experts="int4",
    attention="int8",
    lm_head="int5",
    double_quant=False,
    overrides={
        "layers.1.experts": "int3",
        "layers.0.experts.5": "int8",
        "layers.0.experts.6.up_proj": "mxfp4",
        "layers.0.experts.7": "bf16",
    },
)


def plain(format: str, **choices) -> Recipe:
    """Everything that may be in `format` is, without double quantization."""
    kept = {"embeddings": "bf16", "router": "bf16"}
    return Recipe.keeping(format, double_quant=False, **kept | choices)


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


def stated(folder) -> dict:
    return json.loads((folder / "config.json").read_text())["quantization_config"]


def targets(folder) -> list[str]:
    groups = stated(folder)["config_groups"].values()
    return [target for group in groups for target in group["targets"]]


def fits(target: str, module: str) -> bool:
    assert target.startswith("re:^")
    assert target.endswith("$")
    return re.match(target.removeprefix("re:"), module) is not None


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A small Mixtral in the published layout, in three shards."""
    generator = torch.Generator().manual_seed(0)
    return write_mixtral(tmp_path_factory.mktemp("mixtral") / "model", mixtral_config(), generator)


# ---------------------------------------------------------------------------- what comes back


def expected(name: str, weight: torch.Tensor, recipe: Recipe) -> torch.Tensor:
    """The weight in float32 as the lab's own formats round it."""
    format = recipe.format_of(part_of(name))
    if format is None or not FORMATS[format].scaled:
        return weight.float()
    block_size = "row" if format == "int8" else recipe.block_size
    return quantize(weight.float(), format, block_size).dequantize()


@pytest.mark.parametrize("recipe", [*map(plain, export.EXACT), MIXED], ids=str)
def test_every_matrix_is_decompressed_to_what_the_lab_simulates(recipe, tmp_path):
    """By the library's own converter, which reads the config and infers the forms itself."""
    folder = to_compressed_tensors(standin.PATH, recipe, tmp_path / "small")
    decompressed = CompressedTensorsDequantizer(folder, dtype=torch.float32).process(
        read_tensors(folder)
    )
    original = read_tensors(standin.PATH)
    assert decompressed.keys() == original.keys()
    for name, weight in original.items():
        assert torch.equal(decompressed[name].float(), expected(name, weight, recipe)), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("recipe", [*map(plain, export.EXACT), MIXED], ids=str)
def test_logits_equal_the_simulation(recipe, dtype, tmp_path):
    back = load_back(to_compressed_tensors(standin.PATH, recipe, tmp_path / "small"), dtype)
    model = AutoModelForCausalLM.from_pretrained(standin.PATH, dtype=dtype)
    unquantized = logits(model)
    with simulated(model, recipe):
        assert torch.equal(logits(back), logits(model))
    assert not torch.equal(logits(back), unquantized)
    assert {parameter.dtype for parameter in back.parameters()} == {dtype}


@pytest.mark.parametrize("family", FAMILIES)
def test_other_families_and_their_names(family, tmp_path):
    source = write_any(tmp_path / "model", FAMILIES[family], seed=0)
    recipe = plain("int4", attention="int8", overrides={"layers.1.experts.3": "int3"})
    back = load_back(to_compressed_tensors(source, recipe, tmp_path / "small"))
    model = AutoModelForCausalLM.from_pretrained(source)
    with simulated(model, recipe):
        assert torch.equal(logits(back), logits(model))


def test_several_shards_are_kept(published, tmp_path):
    folder = to_compressed_tensors(published, MIXED, tmp_path / "small")
    shards = {file.name for file in published.glob("*.safetensors")}
    weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
    assert set(weight_map.values()) == shards
    for shard in shards:
        held = load_file(folder / shard)
        assert set(held) == {name for name, file in weight_map.items() if file == shard}
    model = AutoModelForCausalLM.from_pretrained(published)
    with simulated(model, MIXED):
        assert torch.equal(logits(load_back(folder)), logits(model))


@pytest.mark.parametrize("format", ["int2", "int4", "int8", "mxfp4"])
def test_transformers_reads_one_format_by_itself(format, tmp_path):
    folder = to_compressed_tensors(standin.PATH, plain(format), tmp_path / "small")
    with pytest.warns(UserWarning, match="already has a `quantization_config`"):
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=torch.float32,
            quantization_config=CompressedTensorsConfig(dequantize=True),
        )
    assert torch.equal(logits(model.float()), logits(load_back(folder, torch.float32)))


def test_what_is_not_quantized_takes_the_float_format(tmp_path):
    floats = dict.fromkeys(("router", "embeddings", "lm_head", "shared_experts"), "fp32")
    recipe = plain("int4", **floats)
    folder = to_compressed_tensors(standin.PATH, recipe, tmp_path / "small")
    stored = read_tensors(folder)
    assert stored["model.norm.weight"].dtype == stored["lm_head.weight"].dtype == torch.float32
    assert next(load_back(folder).parameters()).dtype == torch.float32


def test_the_tokenizer_comes_along(tmp_path):
    folder = to_compressed_tensors(standin.PATH, plain("int4"), tmp_path / "small")
    assert (folder / "generation_config.json").is_file()
    ours, theirs = (AutoTokenizer.from_pretrained(path) for path in (folder, standin.PATH))
    assert ours("12+34=").input_ids == theirs("12+34=").input_ids


# ---------------------------------------------------------------------------- bytes and config


@pytest.mark.parametrize("recipe", [*map(plain, export.EXACT), MIXED], ids=str)
def test_it_takes_the_bytes_that_were_predicted(recipe, tmp_path):
    folder = to_compressed_tensors(standin.PATH, recipe, tmp_path / "small")
    stored_bytes = sum(tensor.nbytes for tensor in read_tensors(folder).values())
    assert stored_bytes == pytest.approx(predict(standin.PATH, recipe).total_bytes, rel=0.005)


def test_the_config_is_one_that_the_library_accepts(tmp_path):
    folder = to_compressed_tensors(standin.PATH, MIXED, tmp_path / "small")
    config = QuantizationConfig.model_validate(stated(folder))
    assert config.quant_method == "compressed-tensors"
    assert config.quantization_status == "compressed"
    assert config.format == "mixed-precision"
    forms = {(g.weights.type, g.weights.num_bits): g for g in config.config_groups.values()}
    assert set(forms) == {("int", 3), ("int", 4), ("int", 5), ("int", 8), ("float", 4)}
    assert forms["int", 4].weights.group_size == 64
    assert forms["int", 8].weights.strategy == "channel"
    assert forms["float", 4].format == "mxfp4-pack-quantized"


def test_one_form_gives_the_whole_its_name(tmp_path):
    recipe = plain("int4", attention="int8")
    config = stated(to_compressed_tensors(standin.PATH, recipe, tmp_path / "small"))
    assert config["format"] == "pack-quantized"
    assert len(config["config_groups"]) == 2


@pytest.mark.parametrize("recipe", [plain("int4"), MIXED], ids=str)
def test_each_module_fits_one_target_or_is_ignored(recipe, tmp_path):
    folder = to_compressed_tensors(standin.PATH, recipe, tmp_path / "small")
    ignored = stated(folder)["ignore"]
    for name, tensor in read_tensors(standin.PATH).items():
        module, part = name.removesuffix(".weight"), part_of(name)
        if tensor.dim() == 2:
            quantized = bool(FORMATS[recipe.format_of(part)].scaled)
            assert sum(fits(target, module) for target in targets(folder)) == quantized, name
            assert sum(fits(target, module) for target in ignored) == 1 - quantized, name


def test_the_targets_fit_the_names_that_vllm_gives_experts(tmp_path):
    folder = to_compressed_tensors(standin.PATH, plain("int4"), tmp_path / "small")
    experts = "model.layers.0.block_sparse_moe.experts.0"
    for projection in ("gate_proj", "up_proj", "down_proj"):
        assert sum(fits(target, f"{experts}.{projection}") for target in targets(folder)) == 1


MODULES = [
    f"model.layers.{layer}.moe.experts.{expert}.{leaf}"
    for layer in range(12)
    for expert in range(3)
    for leaf in ("w1", "w2")
] + ["lm_head", "model.layers.10.attn.q_proj", "model.layers.1.attn.q_proj"]


@given(st.sets(st.sampled_from(MODULES)))
def test_patterns_fit_what_they_are_made_for_and_nothing_else(names):
    patterns = export._targets(names, MODULES)
    for module in MODULES:
        assert sum(fits(pattern, module) for pattern in patterns) == (module in names)


def test_patterns_stay_short():
    everything = [name for name in MODULES if "experts" in name]
    (pattern,) = export._targets(everything, MODULES)
    assert len(pattern) < 100


@pytest.mark.skipif(sys.platform != "linux", reason="counts what glibc keeps")
def test_memory_holds_one_written_shard_and_little_more(tmp_path):
    """Two shards at once would be 50 MB, a layer of the source 88 MB."""
    config = mixtral_config(hidden=512, ffn=3584, layers=2)
    source = write_mixtral(tmp_path / "model", config, torch.Generator().manual_seed(0))
    meter = Meter()
    with meter("export"):
        folder = to_compressed_tensors(source, plain("int4"), tmp_path / "small")
    shard_bytes = max(file.stat().st_size for file in folder.glob("*.safetensors"))
    assert meter.runs[0].peak_above_start_bytes < shard_bytes + 32 * 2**20


# ------------------------------------------------------------------------------- what is refused


REFUSED = {
    "no form": (Recipe("nf4", attention="fp4"), "fp4 or nf4 exactly; take int4"),
    "nvfp4": (plain("nvfp4"), "nvfp4 exactly"),
    "double quantization": (Recipe("int4"), "double-quantized .* int4; take double_quant=False"),
    "an override alone": (
        plain("int4", overrides={"layers.1.experts.3.up_proj": "nf3"}),
        "gives back nf3",
    ),
    "router": (plain("int4", router="int8"), "transformers leaves them random"),
    "embeddings": (plain("int4", embeddings="int8"), "take embeddings='bf16'"),
    "blocks longer than rows": (plain("int4", block_size=256), "rows of 128 .* smaller block"),
    "nothing": (Recipe.keeping("bf16"), "quantizes nothing"),
    "no such layer": (plain("int4", overrides={"layers.9.experts": "int3"}), "fits the override"),
    "method": (Recipe("int4", method="gptq", double_quant=False), "asks for gptq; take .*'rtn'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_held_is_refused_before_anything_is_written(case, tmp_path):
    recipe, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        to_compressed_tensors(standin.PATH, recipe, tmp_path / "small")
    assert not list(tmp_path.iterdir())


def test_experts_in_one_tensor_are_refused(tmp_path):
    """Files that hold what transformers 5 holds in memory."""
    model = AutoModelForCausalLM.from_pretrained(standin.PATH)
    source = tmp_path / "fused"
    source.mkdir()
    save_file(model.state_dict(), source / "model.safetensors")
    shutil.copy(standin.PATH / "config.json", source)
    with pytest.raises(ValueError, match="all experts of a layer in one tensor"):
        to_compressed_tensors(source, plain("int4"), tmp_path / "small")


def test_a_quantized_source_is_refused(tmp_path):
    small = to_compressed_tensors(standin.PATH, plain("int4"), tmp_path / "small")
    with pytest.raises(ValueError, match="quantized with compressed-tensors"):
        to_compressed_tensors(small, plain("int4"), tmp_path / "smaller")
    nf4 = save(load(standin.PATH, Recipe()), tmp_path / "nf4")
    with pytest.raises(ValueError, match=r"quantized already.* 16-bit checkpoint"):
        to_compressed_tensors(nf4, plain("int4"), tmp_path / "smaller")
    with pytest.raises(ValueError, match="not in compressed-tensors"):
        load_back(standin.PATH)


def test_what_is_not_there_or_there_already_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="There is no folder"):
        to_compressed_tensors(tmp_path / "nothing", plain("int4"), tmp_path / "small")
    (tmp_path / "small").mkdir()
    with pytest.raises(FileExistsError, match="exists already"):
        to_compressed_tensors(standin.PATH, plain("int4"), tmp_path / "small")


def test_the_checkpoint_s_own_folder_is_refused(tmp_path):
    source = shutil.copytree(standin.PATH, tmp_path / "model")
    before = sorted(source.rglob("*"))
    for folder in (source / "small", source / "deep" / "small"):
        with pytest.raises(ValueError, match=r"small is inside .*model, the checkpoint"):
            to_compressed_tensors(source, plain("int4"), folder)
    assert sorted(source.rglob("*")) == before


def test_a_folder_that_is_not_there_is_not_loaded(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"There is no folder .*nothing; give one that"):
        load_back(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match=r"holds no config\.json; give one that"):
        load_back(tmp_path)


def test_a_small_disk_is_refused_with_both_numbers(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(checkpoints.shutil, "disk_usage", lambda path: usage(0, 0, 2**20))
    needed = predict(standin.PATH, plain("int8")).total_bytes / 2**20
    with pytest.raises(OSError, match=rf"small would take {needed:.2f} MiB .* 1\.00 MiB free"):
        to_compressed_tensors(standin.PATH, plain("int8"), tmp_path / "small")
    assert not list(tmp_path.iterdir())


def test_a_damaged_weight_leaves_nothing_behind(published, tmp_path):
    source = shutil.copytree(published, tmp_path / "model")
    last = source / "model-00003-of-00003.safetensors"
    name = "model.layers.1.block_sparse_moe.experts.7.w2.weight"
    tensors = load_file(last)
    tensors[name][3, 5] = math.nan
    save_file(tensors, last, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"{re.escape(name)}, from row 0 on: .* 1 NaN"):
        to_compressed_tensors(source, plain("int4"), tmp_path / "small")
    assert list(tmp_path.iterdir()) == [source]


def test_an_error_in_the_middle_leaves_nothing_behind(published, tmp_path, monkeypatch):
    written = []

    def save_two(tensors, file, **settings):
        if len(written) == 2:
            raise OSError("No space left on device")
        save_file(tensors, file, **settings)
        written.append(file)

    monkeypatch.setattr(export, "save_file", save_two)
    with pytest.raises(OSError, match="No space left"):
        to_compressed_tensors(published, plain("int4"), tmp_path / "small")
    assert len(written) == 2
    assert not list(tmp_path.iterdir())


def test_a_weight_that_is_missing_is_named(tmp_path):
    folder = to_compressed_tensors(standin.PATH, plain("int4"), tmp_path / "small")
    file = folder / "model.safetensors"
    tensors = read_tensors(folder)
    stored = ("weight_packed", "weight_scale", "weight_shape")
    kept = {
        n: t for n, t in tensors.items() if not n.endswith(tuple(f"o_proj.{s}" for s in stored))
    }
    save_file(kept, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"holds nothing for model.layers.0.self_attn.o_proj"):
        load_back(folder)
