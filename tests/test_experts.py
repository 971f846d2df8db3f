from copy import deepcopy

import pytest
import torch
from bitsandbytes import functional as bnb_functional
from families import FAMILIES
from hypothesis import given, settings
from hypothesis import strategies as st
from random_checkpoints import read_tensors, write_any
from torch import nn
from transformers import AutoModelForCausalLM, GptOssConfig, Llama4TextConfig

from labutils import experts, kernels
from labutils.budget import predict
from labutils.experts import (
    Expert,
    Experts,
    Linear4bit,
    Linear8bit,
    RecipeConfig,
    RecipeQuantizer,
    UnusableWeight,
    quantize_4bit,
    quantized_linears,
    storage_of,
    take_apart,
)
from labutils.recipes import Recipe

BLOCKS = st.sampled_from((32, 64, 256))
FOUR_BITS = st.sampled_from(("nf4", "fp4"))


def linear(columns: int, rows: int) -> nn.Linear:
    return nn.Linear(columns, rows, bias=False, device="meta")


def bf16(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(torch.bfloat16)


@given(
    rows=st.integers(1, 70),
    columns=st.integers(1, 70),
    block_size=BLOCKS,
    format=FOUR_BITS,
    double_quant=st.booleans(),
    compiled=st.booleans(),
    dtype=st.sampled_from((torch.bfloat16, torch.float16, torch.float32)),
)
def test_quantizing_equals_bitsandbytes_byte_for_byte_with_kernels_and_without(
    rows, columns, block_size, format, double_quant, compiled, dtype
):
    weight = bf16(rows, columns).to(dtype)
    with pytest.MonkeyPatch.context() as patch:
        if not compiled:
            patch.setattr(kernels, "INSTRUCTIONS", None)
            patch.setattr("labutils.experts.QUANTIZE_CHUNK", 4096)
        codes, state = quantize_4bit(weight, format, block_size, double_quant)
    expected_codes, expected = bnb_functional.quantize_4bit(
        weight, blocksize=block_size, quant_type=format, compress_statistics=double_quant
    )
    assert torch.equal(codes, expected_codes)
    assert torch.equal(state.absmax, expected.absmax)
    if double_quant:
        assert torch.equal(state.state2.absmax, expected.state2.absmax)
        assert torch.equal(state.offset, expected.offset)


@settings(deadline=None)
@given(
    tokens=st.sampled_from((1, 2, 31, 256, 512)),
    rows=st.sampled_from((8, 33, 96)),
    blocks=st.integers(1, 3),
    block_size=BLOCKS,
    format=FOUR_BITS,
    double_quant=st.booleans(),
    fused=st.sampled_from((None, 0, 512)),
)
def test_output_equals_dequantize_and_multiply(
    tokens, rows, blocks, block_size, format, double_quant, fused
):
    """Straight from the codes, slice by slice, and without kernels (`fused` None)."""
    columns = blocks * block_size
    layer = Linear4bit(linear(columns, rows), format, block_size, double_quant)
    layer.weight = layer.quantized(bf16(rows, columns))
    x = bf16(tokens, columns, seed=1)
    expected = nn.functional.linear(x, layer.dequantized()).float()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("labutils.experts.fused_tokens", lambda: fused)
        patch.setattr("labutils.experts.SLICE_WEIGHTS", 16 * columns)
        if fused is None:
            patch.setattr(kernels, "INSTRUCTIONS", None)
        error = (layer(x).float() - expected).norm() / expected.norm()
    assert error < (0.008 if fused else 0.004)


def test_saving_after_running_gives_the_stored_bytes_back():
    layer = Linear4bit(linear(128, 64), "nf4", 64, True)
    layer.weight = layer.quantized(bf16(64, 128))
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    layer(bf16(1, 128))
    assert {name: tensor.tolist() for name, tensor in layer.state_dict().items()} == {
        name: tensor.tolist() for name, tensor in before.items()
    }


def test_a_copy_computes_with_its_own_weight():
    layer = Linear4bit(linear(128, 64), "nf4", 64, True)
    layer.weight = layer.quantized(bf16(64, 128))
    x = bf16(1, 128, seed=1)
    expected = layer(x)
    copied = deepcopy(layer)
    layer.weight.data.zero_()
    assert torch.equal(copied(x), expected)
    assert not torch.equal(layer(x), expected)


def test_another_weight_is_noticed():
    layer = Linear4bit(linear(128, 64), "nf4", 64, True)
    layer.weight = layer.quantized(bf16(64, 128))
    x = bf16(1, 128, seed=1)
    layer(x)
    layer.weight = layer.quantized(bf16(64, 128, seed=2))
    expected = nn.functional.linear(x, layer.dequantized()).float()
    assert (layer(x).float() - expected).norm() / expected.norm() < 0.008


@pytest.mark.parametrize("act", [nn.SiLU(), nn.GELU()], ids=str)
@pytest.mark.parametrize("tokens", [1, 3, 40])
def test_experts_side_by_side_give_what_each_gives_alone(act, tokens):
    experts = Experts(Expert(128, 192, act, torch.bfloat16) for _ in range(5))
    for number, expert in enumerate(experts):
        for name, plain in list(expert.named_children())[:3]:
            stored = Linear4bit(plain, "nf4", 64, True)
            shape = (plain.out_features, plain.in_features)
            stored.weight = stored.quantized(bf16(*shape, seed=number) / 8)
            setattr(expert, name, stored)
    x = bf16(tokens, 128, seed=9)
    chosen = torch.rand(tokens, 5, generator=torch.Generator().manual_seed(7)).topk(2).indices
    weights = bf16(tokens, 2, seed=8).abs()
    results = [
        sum(
            w * experts[e](row[None])[0]
            for e, w in zip(chosen[t].tolist(), weights[t], strict=True)
        )
        for t, row in enumerate(x)
    ]
    expected = torch.stack(results).float()
    with pytest.MonkeyPatch.context() as patch:
        for most in (0, 1000):
            patch.setattr("labutils.experts.fused_tokens", lambda most=most: most)
            together = experts(x, chosen, weights).float()
            assert (together - expected).norm() / expected.norm() < 0.01


def test_no_tokens_are_no_trouble():
    experts = Experts(Expert(64, 64, nn.SiLU(), torch.bfloat16) for _ in range(2))
    nothing = torch.empty(0, 2)
    assert experts(torch.empty(0, 64), nothing.long(), nothing).shape == (0, 64)


def test_gradients_reach_the_input_of_a_quantized_layer():
    layer = Linear4bit(linear(64, 32), "nf4", 64, True)
    layer.weight = layer.quantized(bf16(32, 64))
    x = bf16(3, 64).requires_grad_()
    layer(x).sum().backward()
    assert torch.allclose(x.grad[0], layer.dequantized().sum(0), atol=1e-2)


def test_int8_is_as_close_as_8_bits_allow():
    weight = bf16(64, 256)
    layer = Linear8bit(linear(256, 64))
    layer.weight = layer.quantized(weight)
    half_step = weight.float().abs().amax(dim=1, keepdim=True) / 127 / 2
    assert ((layer.dequantized() - weight.float()).abs() <= half_step * 1.01).all()
    x = bf16(2, 5, 256, seed=1)
    expected = nn.functional.linear(x.float(), weight.float())
    error = (layer(x).float() - expected).norm() / expected.norm()
    assert error < 0.02


@pytest.fixture(scope="module", params=FAMILIES)
def checkpoint(request, tmp_path_factory):
    config = FAMILIES[request.param]
    return write_any(tmp_path_factory.mktemp(request.param) / "model", config, seed=0)


TOKENS = torch.arange(40).reshape(2, 20)


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


def test_experts_taken_apart_compute_what_the_fused_ones_do(checkpoint):
    """With one expert in INT8 the others are 16-bit linears; then that one is given its own back.

    So all but the arithmetic of one expert is compared: names, order of gate and up, routing.
    """
    stock = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    recipe = Recipe(
        experts="fp32",
        attention="fp32",
        router="fp32",
        embeddings="fp32",
        lm_head="fp32",
        shared_experts="fp32",
        dense_mlp="fp32",
        overrides={"layers.1.experts.3.down_proj": "int8"},
    )
    ours = AutoModelForCausalLM.from_pretrained(
        checkpoint, quantization_config=RecipeConfig(recipe)
    )
    (name, _int8), *others = quantized_linears(ours)
    assert not others
    parent = stock.get_submodule(name.rsplit(".", 2)[0])
    original = linear(parent.down_proj.shape[2], parent.down_proj.shape[1])
    original.weight = nn.Parameter(parent.down_proj[3].detach())
    ours.set_submodule(name, original)
    assert sum(isinstance(module, Experts) for module in ours.modules()) >= 1
    torch.testing.assert_close(logits(ours), logits(stock), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(),
        Recipe(experts="fp4", attention="nf4", router="nf4", double_quant=False),
        Recipe(experts="int8", attention="int8", router="int8", dense_mlp="int8"),
        Recipe(experts="bf16", attention="nf4"),
        Recipe(
            overrides={
                "layers.1.experts.3": "int8",
                "layers.1.experts.4": "bf16",
                "layers.*.experts.5.down_proj": "fp4",
                "layers.1.router": "int8",
            }
        ),
    ],
    ids=["nf4", "fp4", "int8", "attention", "overrides"],
)
def test_saved_and_loaded_again_it_gives_the_same_logits(checkpoint, tmp_path, recipe):
    model = AutoModelForCausalLM.from_pretrained(
        checkpoint, quantization_config=RecipeConfig(recipe)
    )
    expected = logits(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(model), expected)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(again), expected)
    assert again.hf_quantizer.recipe == recipe


def test_saved_names_are_the_published_ones(tmp_path):
    source = write_any(tmp_path / "source", FAMILIES["mixtral"], seed=0)
    config = RecipeConfig(Recipe(router="nf4"))
    model = AutoModelForCausalLM.from_pretrained(source, quantization_config=config)
    model.save_pretrained(tmp_path / "saved")
    published, saved = read_tensors(source), read_tensors(tmp_path / "saved")
    assert set(published) <= set(saved)
    assert "model.layers.0.block_sparse_moe.gate.weight.absmax" in saved
    assert "model.layers.1.block_sparse_moe.experts.7.w2.weight.nested_absmax" in saved


def test_the_router_computes_with_the_weight_that_is_stored(tmp_path):
    source = write_any(tmp_path / "source", FAMILIES["olmoe"], seed=0)
    config = RecipeConfig(Recipe(router="int8"))
    model = AutoModelForCausalLM.from_pretrained(source, quantization_config=config)
    gate = model.model.layers[0].mlp.gate
    original = read_tensors(source)["model.layers.0.mlp.gate.weight"].float()
    assert storage_of(gate.stored).format == "int8"
    assert 0 < (gate.weight.float() - original).abs().max() < original.abs().max() / 127


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_weight_that_is_no_number_is_named_and_stops_the_load(tmp_path, bad):
    model = AutoModelForCausalLM.from_config(FAMILIES["mixtral"], dtype=torch.bfloat16)
    model.model.layers[1].mlp.experts.down_proj.data[5, 3, 7] = bad
    model.save_pretrained(tmp_path)
    with pytest.raises(
        UnusableWeight, match=r"layers\.1\.mlp\.experts\.5\.down_proj.* 1 of 32,768"
    ):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=RecipeConfig())


def test_blocks_that_do_not_divide_are_refused_before_loading(tmp_path):
    source = write_any(tmp_path / "source", FAMILIES["olmoe"], seed=0)
    config = RecipeConfig(Recipe(block_size=4096, router="nf4", attention="nf4"))
    with pytest.raises(ValueError, match=r"gate.*2,048 weights, which blocks of 4096 do not"):
        AutoModelForCausalLM.from_pretrained(source, quantization_config=config)


@pytest.mark.parametrize("component", ["embeddings", "lm_head"])
def test_embeddings_and_a_head_tied_to_them_are_refused(tmp_path, component):
    source = write_any(tmp_path / "source", FAMILIES["qwen3_moe"], seed=0)
    config = RecipeConfig(Recipe(**{component: "nf4"}))
    with pytest.raises(ValueError, match=f"keep {component}='bf16'"):
        AutoModelForCausalLM.from_pretrained(source, quantization_config=config)


def test_experts_that_are_not_plain_swiglu_are_refused(tmp_path):
    config = GptOssConfig(
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=4,
        vocab_size=128,
    )
    source = write_any(tmp_path / "source", config, seed=0)
    with pytest.raises(ValueError, match=r"GptOssExperts.*has biases, a transposed layout"):
        AutoModelForCausalLM.from_pretrained(source, quantization_config=RecipeConfig())


def test_transposed_experts_without_biases_are_refused_as_well():
    config = Llama4TextConfig(
        hidden_size=64, intermediate_size=64, intermediate_size_mlp=64, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, num_local_experts=4, vocab_size=128,
    )  # fmt: skip
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(ValueError, match=r"Llama4TextExperts.*has biases, a transposed layout"):
        take_apart(model)


@pytest.mark.parametrize("family", FAMILIES)
def test_devices_are_shared_out_by_the_bytes_that_will_be_stored(family):
    """What `device_map="auto"` asks the quantizer, before anything is loaded."""
    recipe = Recipe(attention="nf4", shared_experts="int8", overrides={"layers.1.experts": "int8"})
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(FAMILIES[family], dtype=torch.bfloat16)
    quantizer = RecipeQuantizer(RecipeConfig(recipe), pre_quantized=False)
    quantizer.preprocess_model(model)
    asked = sum(
        quantizer.param_element_size(model, name, parameter) * parameter.numel()
        for name, parameter in model.named_parameters()
    )
    assert round(asked) == predict(FAMILIES[family], recipe).total_bytes


def test_a_config_that_names_no_recipe_is_refused():
    with pytest.raises(TypeError, match=r"'int8' is no recipe"):
        RecipeConfig("int8")
    with pytest.raises(TypeError, match="experts"):
        RecipeConfig(experts="int8")


def test_an_override_for_a_layer_that_is_not_there_is_refused(checkpoint):
    config = RecipeConfig(Recipe(overrides={"layers.99.experts": "int8"}))
    with pytest.raises(ValueError, match=r"'layers\.99\.experts'; it has layers 0 to 1"):
        AutoModelForCausalLM.from_pretrained(checkpoint, quantization_config=config)


@pytest.mark.parametrize(
    ("dequantizing", "most"), [(0.5, 0), (2, 2), (5, 8), (17, 32), (63, 32), (65, 128), (1000, 512)]
)
def test_the_switch_lies_between_the_last_win_and_the_first_loss(monkeypatch, dequantizing, most):
    def seconds(way):
        _, x = way.args
        return len(x) if way.func is experts.fused_product else dequantizing

    monkeypatch.setattr(experts, "_seconds", seconds)
    assert experts.fused_tokens.__wrapped__() == most
