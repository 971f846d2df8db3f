import json
import resource
import shutil
import sys
from collections import namedtuple

import pytest
import torch
from families import FAMILIES
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from random_checkpoints import (
    INDEX,
    mixtral_config,
    write_any,
    write_mixtral,
    write_transformers_4_nf4,
)
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Qwen2MoeConfig

from labutils import checkpoints, experts, standin
from labutils.budget import predict
from labutils.checkpoints import NotCovered, coverage, load, save, stream
from labutils.meter import Meter, sized
from labutils.recipes import Recipe

TOKENS = torch.arange(40).reshape(2, 20)
MIXED = Recipe(
    experts="nf4",
    attention="fp4",
    router="int8",
    overrides={"layers.1.experts.3": "int8", "layers.1.experts.4": "bf16"},
)


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


class Answer:
    """What a hub's error wants to know of the response behind it."""

    status_code, headers, url, text, request = 403, {}, "https://hub", "", None


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A small Mixtral in the published layout, in three shards."""
    return write_mixtral(
        tmp_path_factory.mktemp("mixtral") / "model", mixtral_config(), generator()
    )


@pytest.fixture
def damaged(published, tmp_path):
    """A copy of it that a test may damage."""
    return shutil.copytree(published, tmp_path / "model")


# ------------------------------------------------------------------------------ what is loaded


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("double_quant", [True, False])
def test_what_was_predicted_is_what_is_stored(family, double_quant, tmp_path):
    source = write_any(tmp_path / "model", FAMILIES[family], seed=0)
    recipe = Recipe(attention="nf4", shared_experts="int8", double_quant=double_quant)
    assert coverage(load(source, recipe)).by_component() == predict(source, recipe).by_component


def test_a_recipe_with_exceptions_is_stored_as_it_says(published):
    covered = coverage(load(published, MIXED))
    assert covered.by_component() == predict(published, MIXED).by_component
    stored = covered.table.set_index(["component", "stored_as"])
    assert stored.loc[("experts", "int8"), "parameters"] == 3 * 128 * 256
    assert stored.loc[("experts", "bf16"), "bits_per_weight"] == 16
    assert stored.loc[("router", "int8"), "parameters"] == 2 * 8 * 128


def carry_dequantized(ours, carrier) -> None:
    """Give the stock 16-bit model the weights that ours stores, as its codes and constants say."""

    def stored(parent, name) -> torch.Tensor:
        return getattr(parent, name).dequantized().to(carrier.dtype)

    for mine, theirs in zip(ours.model.layers, carrier.model.layers, strict=True):
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            getattr(theirs.self_attn, name).weight.data = stored(mine.self_attn, name)
        for number, expert in enumerate(mine.mlp.experts):
            gate_up = [stored(expert, "gate_proj"), stored(expert, "up_proj")]
            theirs.mlp.experts.gate_up_proj.data[number] = torch.cat(gate_up)
            theirs.mlp.experts.down_proj.data[number] = stored(expert, "down_proj")


@pytest.mark.parametrize(("floats", "tolerance"), [("fp32", 1e-5), ("bf16", 0.004)])
def test_logits_equal_a_model_that_carries_the_dequantized_weights(published, floats, tolerance):
    """In fp32 nothing is rounded on the way; in bf16 the kernels round a format's 16 values."""
    kept = dict.fromkeys(("router", "embeddings", "lm_head", "shared_experts", "dense_mlp"), floats)
    ours = load(published, Recipe(attention="nf4", **kept))
    dtype = ours.lm_head.weight.dtype
    carrier = AutoModelForCausalLM.from_pretrained(published, dtype=dtype)
    quantization = relative(logits(ours), logits(carrier))
    carry_dequantized(ours, carrier)
    difference = relative(logits(ours), logits(carrier))
    assert difference < tolerance < quantization


def relative(result: torch.Tensor, expected: torch.Tensor) -> float:
    return ((result.float() - expected.float()).norm() / expected.float().norm()).item()


@pytest.mark.skipif(sys.platform != "linux", reason="counts glibc's page faults")
@torch.no_grad()
def test_after_a_load_a_forward_pass_fetches_no_memory_anew():
    """What loading hands back at once, running keeps: each page would be a fault in each pass."""
    model = load(standin.PATH, Recipe(experts="nf4", attention="nf4"), device_map="cpu")
    token_ids = torch.zeros(8, 256, dtype=torch.long)
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        model(input_ids=token_ids, use_cache=False)
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    assert faults < 1500, f"{faults} pages of 4 KiB; some 15,000 when all is handed back"


def test_the_stock_route_leaves_the_experts_in_16_bits(published):
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    )
    stock = AutoModelForCausalLM.from_pretrained(published, quantization_config=config)
    covered = coverage(stock)
    assert covered.bits_per_weight("experts") == 16
    assert covered.bits_per_weight("attention") < 5
    with pytest.raises(NotCovered, match=r"experts: asked for nf4, found bf16, 16.00 bits"):
        covered.require(Recipe(attention="nf4"))


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (Recipe(experts="int8"), "experts: asked for int8, found nf4"),
        (Recipe(block_size=128), "asked for nf4, block 128.*found nf4.*block 64"),
        (Recipe(double_quant=False), "double_quant=False, found nf4.*double_quant=True"),
        (Recipe(overrides={"layers.1.experts.7": "fp4"}), r"in layers\.1\.experts\.7\.gate_proj"),
    ],
)
def test_the_proof_fails_for_anything_but_what_is_there(published, asked, message):
    covered = coverage(load(published, Recipe()))
    covered.require(Recipe())
    with pytest.raises(NotCovered, match=message):
        covered.require(asked)


def test_biases_stay_in_16_bits_and_are_not_asked_for(tmp_path):
    """Qwen2-MoE's attention has biases beside its matrices."""
    config = Qwen2MoeConfig(
        hidden_size=64, intermediate_size=64, moe_intermediate_size=64, num_hidden_layers=1,
        shared_expert_intermediate_size=64, num_attention_heads=4, num_key_value_heads=2,
        num_experts=4, num_experts_per_tok=2, vocab_size=64,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path / "m")
    recipe = Recipe(attention="nf4")
    model = load(tmp_path / "m", recipe)
    assert model.model.layers[0].self_attn.q_proj.bias.dtype == torch.bfloat16
    coverage(model).require(recipe)


def test_text_is_printed_as_it_comes_and_its_phases_are_marked(capsys):
    model, meter = load(standin.PATH), Meter()
    with meter("answer"):
        stream(model, standin.tokenizer(), "capital kenya > ")
    assert capsys.readouterr().out.startswith("capital kenya > nairobi")
    assert [phase.name for phase in meter.runs[0].phases] == ["first token", "generate"]


# ---------------------------------------------------------------------------- save and reload


@pytest.mark.parametrize("recipe", [Recipe(), MIXED], ids=["nf4", "mixed"])
def test_reloaded_without_the_original_it_gives_the_same_logits(damaged, tmp_path, recipe):
    model = load(damaged, recipe)
    expected = logits(model)
    saved = save(model, tmp_path / "saved")
    shutil.rmtree(damaged)
    again = load(saved)
    assert torch.equal(logits(again), expected)
    coverage(again).require(recipe)


@pytest.mark.parametrize("keep_gate", [True, False])
def test_a_checkpoint_of_transformers_4_gives_the_logits_that_ours_gives(
    published, tmp_path, keep_gate
):
    old = write_transformers_4_nf4(published, tmp_path / "old", keep_gate)
    recipe = Recipe(attention="nf4", router="bf16" if keep_gate else "nf4")
    model = load(old)
    coverage(model).require(recipe)
    assert torch.equal(logits(model), logits(load(published, recipe)))
    again = load(save(model, tmp_path / "again"))
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(overrides={"layers.0.experts.3": "int8"}),
        Recipe(experts="int8", block_size=128, double_quant=False),
        Recipe(shared_experts="nf4"),
    ],
    ids=["override", "no-blocks", "absent"],
)
def test_it_reloads_by_the_recipe_it_was_saved_with(published, tmp_path, recipe):
    load(save(load(published, recipe), tmp_path / "saved"), recipe)


def test_a_quantized_checkpoint_is_not_quantized_again(published, tmp_path):
    saved = save(load(published, Recipe()), tmp_path / "saved")
    with pytest.raises(ValueError, match=r"stored as experts nf4.*recipe=None"):
        load(saved, Recipe(experts="int8"))


def test_an_interrupted_save_leaves_nothing_under_the_name(published, tmp_path, monkeypatch):
    model = load(published, Recipe())

    def half_way(folder):
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setattr(model, "save_pretrained", half_way)
    with pytest.raises(KeyboardInterrupt):
        save(model, tmp_path / "saved")
    assert list(tmp_path.iterdir()) == []


def test_saving_over_something_is_refused(published, tmp_path):
    with pytest.raises(FileExistsError, match=r"exists already"):
        save(load(published, Recipe()), tmp_path)


def test_saving_and_loading_mean_the_same_home(published, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    saved = save(load(published, Recipe()), "~/saved")
    assert saved == tmp_path / "saved"
    load("~/saved")


def test_saving_on_a_full_disk_is_refused_before_anything_is_written(
    published, tmp_path, monkeypatch
):
    model = load(published, Recipe())
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(checkpoints.shutil, "disk_usage", lambda path: usage(0, 0, 1000))
    monkeypatch.setattr(model, "save_pretrained", None)  # would fail if it were called
    needed = sized(coverage(model).total_bytes)
    with pytest.raises(OSError, match=rf"saved would take {needed} .* 0\.00 MiB free; name a fold"):
        save(model, tmp_path / "deep" / "saved")
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_load_leaves_the_checkpoint_loadable(published, monkeypatch):
    quantize, calls = experts.quantize_4bit, iter(range(5))

    def interrupted(*arguments):
        if next(calls, None) is None:
            raise KeyboardInterrupt
        return quantize(*arguments)

    monkeypatch.setattr(experts, "quantize_4bit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        load(published, Recipe())
    monkeypatch.undo()
    load(published, Recipe())


# --------------------------------------------------------------------------------- the errors


def test_a_missing_folder_is_looked_for_as_a_folder_first(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"There is no folder"):
        load(tmp_path / "nothing", Recipe())
    with pytest.raises(FileNotFoundError, match=r"There is no folder"):
        load("./nothing/there")


def test_a_file_in_place_of_its_folder_is_said_to_be_one(published):
    with pytest.raises(FileNotFoundError, match=r"is a file; give the folder"):
        load(published / "config.json")


def test_what_is_no_recipe_is_refused(published):
    with pytest.raises(TypeError, match=r"'nf4' is no recipe"):
        load(published, "nf4")


def test_a_folder_without_a_config_is_no_checkpoint(damaged):
    (damaged / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"holds no config\.json"):
        load(damaged, Recipe())


def test_a_missing_shard_is_named(damaged):
    (damaged / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"1 of 3 shards.*model-00002-of-00003"):
        load(damaged, Recipe())


def test_weights_without_an_index_are_not_taken_for_whole(damaged):
    (damaged / INDEX).unlink()
    with pytest.raises(FileNotFoundError, match=r"an interrupted save leaves neither"):
        load(damaged, Recipe())


@pytest.mark.parametrize("kept", [0.5, 0.001, 0])
def test_a_truncated_shard_is_named_with_both_sizes(damaged, kept):
    shard = damaged / "model-00002-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes()[: int(shard.stat().st_size * kept)])
    with pytest.raises(ValueError, match=r"model-00002-of-00003.*bytes"):
        load(damaged, Recipe())


def test_a_file_of_another_kind_is_no_safetensors_file(damaged):
    (damaged / "model-00002-of-00003.safetensors").write_bytes(b"PK\x03\x04" * 100)
    with pytest.raises(ValueError, match=r"does not begin like a safetensors file"):
        load(damaged, Recipe())


def change_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))


def test_a_wrong_number_of_experts_is_counted(damaged):
    change_config(damaged, num_local_experts=9)
    with pytest.raises(ValueError, match=r"Layer 0 has 8 experts in the files, 9 by the config"):
        load(damaged, Recipe())


def test_a_missing_layer_is_named(damaged):
    change_config(damaged, num_hidden_layers=3)
    with pytest.raises(ValueError, match=r"nothing for layers\.2\.attention"):
        load(damaged, Recipe())


def test_a_wrong_width_is_named(damaged):
    change_config(damaged, intermediate_size=512)
    with pytest.raises(ValueError, match=r"\(256, 128\) in the files, \(512, 128\) by the config"):
        load(damaged, Recipe())


def test_a_weight_that_is_no_number_is_named(damaged):
    shard = damaged / "model-00003-of-00003.safetensors"
    with safe_open(shard, "pt") as opened:
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    tensors["model.layers.1.block_sparse_moe.experts.5.w2.weight"][0, 0] = float("nan")
    save_file(tensors, shard, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"layers\.1.*experts\.5\.down_proj.*1 of 32,768"):
        load(damaged, Recipe())


def test_a_foreign_quantization_is_refused_by_name(damaged):
    change_config(damaged, quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(ValueError, match=r"quantized with gptq"):
        load(damaged)


def test_too_little_memory_is_refused_with_both_numbers(published, monkeypatch):
    monkeypatch.setattr(checkpoints, "available_bytes", lambda: 2**20)
    with pytest.raises(
        MemoryError, match=r"0\.25 GiB; this machine has 0\.00 GiB free.*force=True"
    ):
        load(published, Recipe())
    load(published, Recipe(), force=True)


@pytest.mark.parametrize(
    ("error", "says"),
    [(GatedRepoError, PermissionError), (RepositoryNotFoundError, FileNotFoundError)],
)
def test_what_the_hub_refuses_is_said_for_what_it_is(monkeypatch, error, says):
    def refuse(*arguments, **settings):
        raise error("no", response=Answer())

    monkeypatch.setattr(checkpoints.HfApi, "model_info", refuse)
    with pytest.raises(says, match="nobody/no-such-model"):
        load("nobody/no-such-model", Recipe())


def test_a_hub_that_cannot_be_reached_is_said_at_once(monkeypatch, tmp_path):
    with pytest.raises(ConnectionError, match=r"could not be reached.*standin\.PATH"):
        load("nobody/no-such-model", Recipe())
