import pytest
import torch
from families import FAMILIES
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    GptOssConfig,
    Llama4Config,
    Llama4TextConfig,
    MixtralConfig,
    StaticCache,
)

from labutils.budget import (
    activation_bytes,
    kv_cache_by_layer,
    kv_cache_bytes,
    predict,
    weights_of,
)
from labutils.experts import storage_of, stored_linear
from labutils.formats import quantize
from labutils.ledger import PUBLISHED
from labutils.recipes import Recipe

_SMALL = {
    "hidden_size": 128,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 256,
    "pad_token_id": 0,
}

# Families that keep their fused experts transposed, and look at a window or a chunk of 4 tokens.
TRANSPOSED = {
    "gpt_oss": GptOssConfig(
        **_SMALL, num_local_experts=8, num_experts_per_tok=2, sliding_window=4, bos_token_id=1
    ),
    "llama4": Llama4TextConfig(
        **_SMALL,
        intermediate_size_mlp=192,
        num_local_experts=4,
        interleave_moe_layer_step=2,
        no_rope_layer_interval=2,
        attention_chunk_size=4,
    ),
}


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


@pytest.mark.parametrize("family", FAMILIES | TRANSPOSED)
def test_parameters_equal_transformers_own_count(family):
    config = (FAMILIES | TRANSPOSED)[family]
    model = AutoModelForCausalLM.from_config(config)
    assert sum(weight.parameters for weight in weights_of(config)) == model.num_parameters()


@pytest.mark.parametrize("family", FAMILIES)
def test_kv_cache_equals_a_real_one(family):
    config = FAMILIES[family]
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    cache = DynamicCache(config=config)
    with torch.no_grad():
        model(torch.ones(2, 7, dtype=torch.long), past_key_values=cache)
    real_bytes = sum(2 * (layer.keys.numel() + layer.values.numel()) for layer in cache.layers)
    assert kv_cache_bytes(config, context_tokens=7, batch_size=2) == real_bytes


def test_a_config_is_left_as_it_was():
    config = MixtralConfig(num_hidden_layers=1, vocab_size=64)
    before = config.to_json_string()
    predict(config, Recipe())
    assert config.to_json_string() == before


def test_an_override_that_fits_nothing_is_refused_with_what_there_is():
    with pytest.raises(ValueError, match=r"'layers.7.experts'.*layers 0 to 1 with experts 0 to 7"):
        predict(FAMILIES["mixtral"], Recipe(overrides={"layers.7.experts": "int8"}))


# ----------------------------------------------------------------------- windows and chunks


def prefilled(config, tokens: int, cache) -> list[int]:
    """Bytes that each layer of `cache` holds of two sequences of `tokens`, in 16 bits."""
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    with torch.no_grad():
        model(torch.ones(2, tokens, dtype=torch.long), past_key_values=cache)
    return [2 * (layer.keys.numel() + layer.values.numel()) for layer in cache.layers]


@pytest.mark.parametrize("tokens", [3, 4, 7])
@pytest.mark.parametrize("family", TRANSPOSED)
def test_a_window_or_a_chunk_is_all_that_its_layers_keep(family, tokens):
    """transformers' static cache to the byte; the growing one drops a token that it needs next."""
    config = TRANSPOSED[family]
    predicted = kv_cache_by_layer(config, tokens, batch_size=2)
    assert predicted == prefilled(config, tokens, StaticCache(config, max_cache_len=tokens))
    growing = prefilled(config, tokens, DynamicCache(config=config))
    a_token = 2 * 2 * 2 * 2 * 32
    windowed = [a_token * (tokens >= 4), 0] * 2
    assert [size + more for size, more in zip(growing, windowed, strict=True)] == predicted
    assert sum(predicted) == kv_cache_bytes(config, tokens, batch_size=2)


@pytest.mark.parametrize("family", TRANSPOSED)
def test_reading_a_prompt_holds_what_lies_outside_the_windows(family):
    """The growing cache keeps views: until the next token their storage is the whole prompt."""
    config = TRANSPOSED[family]
    cache = DynamicCache(config=config)
    prefilled(config, 40, cache)
    held = sum(
        part.untyped_storage().nbytes()
        for layer in cache.layers
        for part in (layer.keys, layer.values)
    )
    without_windows = type(config)(**config.to_dict() | {"layer_types": ["full_attention"] * 4})
    outside = activation_bytes(config, 40, 2) - activation_bytes(without_windows, 40, 2)
    assert held == kv_cache_bytes(config, 40, 2) + outside


def test_windows_of_the_published_models():
    """gpt-oss: every other layer sees 128 tokens; Llama-4: three of four see 8,192."""
    gpt_oss = predict(PUBLISHED["gpt-oss-20b"], Recipe(), 131_072).by_component["kv_cache"]
    assert gpt_oss == 12 * (131_072 + 128) * 2 * 8 * 64 * 2
    scout = predict(PUBLISHED["Llama-4-Scout-17B-16E"], Recipe(), 10**6).by_component["kv_cache"]
    assert scout == (12 * 10**6 + 36 * 8192) * 2 * 8 * 128 * 2


def test_a_window_without_layer_types_is_every_layers():
    config = MixtralConfig(**FAMILIES["mixtral"].to_dict() | {"sliding_window": 4})
    real = prefilled(config, 7, StaticCache(config, max_cache_len=7))
    assert kv_cache_by_layer(config, 7, batch_size=2) == real


# --------------------------------------------------------------------------- transposed experts


def expert_matrices(family: str, experts: nn.Module) -> list[list[torch.Tensor]]:
    """Gate, up and down of each expert as (outputs, inputs), cut out by hand."""
    cut = []
    for gate_up, down in zip(experts.gate_up_proj, experts.down_proj, strict=True):
        rows = gate_up.T
        gate, up = (rows[0::2], rows[1::2]) if family == "gpt_oss" else rows.chunk(2)
        cut.append([gate, up, down.T])
    return cut


@pytest.mark.parametrize("family", TRANSPOSED)
def test_the_cut_out_matrices_compute_what_the_experts_do(family):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(TRANSPOSED[family], dtype=torch.float32)
    block = model.model.layers[1]
    experts = (block.mlp if family == "gpt_oss" else block.feed_forward).experts
    nn.init.normal_(experts.gate_up_proj, std=0.1)
    nn.init.normal_(experts.down_proj, std=0.1)
    tokens = torch.randn(experts.num_experts, 128)
    with torch.no_grad():
        by_hand = torch.stack(
            [
                down @ _gated(family, gate @ token, up @ token)
                for token, (gate, up, down) in zip(
                    tokens, expert_matrices(family, experts), strict=True
                )
            ]
        )
        if family == "gpt_oss":
            nn.init.zeros_(experts.gate_up_proj_bias)
            nn.init.zeros_(experts.down_proj_bias)
            chosen = torch.arange(experts.num_experts)[:, None]
            computed = experts(tokens, chosen, torch.ones(experts.num_experts, 1))
        else:
            computed = experts(tokens)
    torch.testing.assert_close(computed, by_hand)


def _gated(family: str, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    if family == "llama4":
        return nn.functional.silu(gate) * up
    gate, up = gate.clamp(max=7), up.clamp(-7, 7)
    return (up + 1) * gate * torch.sigmoid(1.702 * gate)


@pytest.mark.parametrize("format", ["nf4", "int8", "mxfp4"])
@pytest.mark.parametrize("family", TRANSPOSED)
def test_experts_are_as_large_as_their_matrices_one_by_one(family, format):
    config, recipe = TRANSPOSED[family], Recipe(experts=format)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    by_hand = 0
    for name, module in model.named_modules():
        if name.endswith(".experts"):
            for expert in expert_matrices(family, module):
                by_hand += sum(_really_stored(matrix, format, recipe) for matrix in expert)
            biases = (p for name, p in module.named_parameters() if name.endswith("_bias"))
            by_hand += sum(2 * bias.numel() for bias in biases)
    assert predict(config, recipe).by_component["experts"] == by_hand


def _really_stored(matrix: torch.Tensor, format: str, recipe: Recipe) -> int:
    if format == "mxfp4":
        return quantize(matrix, "mxfp4").stored_bytes
    outputs, inputs = matrix.shape
    module = stored_linear(nn.Linear(inputs, outputs, bias=False), format, recipe)
    module.weight = module.quantized(matrix.detach().contiguous())
    return storage_of(module).stored_bytes


def test_biases_stay_in_16_bits():
    config = TRANSPOSED["gpt_oss"]
    biases = [w for w in weights_of(config) if w.part.component == "experts" and len(w.shape) == 1]
    assert len(biases) == 4 * 8 * 3
    in_16_bits = predict(config, Recipe(experts="bf16")).by_component["experts"]
    in_8_bits = predict(config, Recipe(experts="int8")).by_component["experts"]
    matrices, rows = 4 * 8 * 3 * 96 * 128, 4 * 8 * (96 + 96 + 128)
    assert in_16_bits == 2 * (matrices + rows)
    assert in_8_bits == matrices + 4 * rows + 2 * rows


def test_gpt_oss_20b_in_mxfp4_is_as_large_as_its_files():
    """13.76 GB on the hub: experts in MXFP4, the rest in bf16."""
    in_mxfp4 = predict(PUBLISHED["gpt-oss-20b"], Recipe(experts="mxfp4"))
    assert in_mxfp4.total_bytes / 1e9 == pytest.approx(13.76, abs=0.005)


def test_of_a_model_with_eyes_the_text_model_counts():
    text = TRANSPOSED["llama4"]
    whole = Llama4Config(text_config=text.to_dict())
    assert predict(whole, Recipe(), 100) == predict(text, Recipe(), 100)
