"""How much memory a model will take, before a byte of it is read.

The model is built on PyTorch's *meta* device, where tensors have shapes and no storage, so the
46.7 billion parameters of Mixtral-8x7B are counted in seconds on a laptop. A recipe then says what
each of its matrices costs (`formats.stored_bytes`), constants included.

What a running model needs beside its weights:

- **KV cache**: for every token of the context and every layer, a key and a value for each
  key-value head, in 16 bits. Mixtral-8x7B: 32 layers x 2 x 8 heads x 128 x 2 bytes = 131,072 bytes
  a token.
- **Activations**: an allowance, not a count. See `activation_bytes`.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from .anatomy import COMPONENTS, Part, Weight, matrices
from .formats import FORMATS, stored_bytes
from .recipes import Recipe, check_overrides


@dataclass(frozen=True)
class Budget:
    """Predicted bytes by component, and how many parameters they hold.

    `by_component` has an entry for every component that the model has, and, where a context was
    given, `kv_cache` and `activations`.
    """

    parameters: int
    by_component: dict[str, int]

    @property
    def total_bytes(self) -> int:
        return sum(self.by_component.values())

    @property
    def weights_bytes(self) -> int:
        """Weights and their constants alone."""
        return sum(size for name, size in self.by_component.items() if name in COMPONENTS)


def read_config(config_or_path) -> PreTrainedConfig:
    """The configuration itself, from a folder, a config.json, a hub name, or a config as it is."""
    if isinstance(config_or_path, PreTrainedConfig):
        return config_or_path
    return AutoConfig.from_pretrained(str(config_or_path), trust_remote_code=False)


def weights_of(config: PreTrainedConfig) -> list[Weight]:
    """Every weight of the model that `config` describes, matrix by matrix, on the meta device.

    Shared weights (an output head tied to the embeddings) appear once. Mixtral-8x7B gives 995
    weights with 46,702,792,704 parameters, 768 of them experts' matrices of 14336 x 4096.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return list(weights_in(model))


def weights_in(model: torch.nn.Module) -> Iterator[Weight]:
    """Every weight of a model that is already built, matrix by matrix."""
    for name, tensor in model.named_parameters():
        yield from matrices(name, tuple(tensor.shape))


def parts_of(model: torch.nn.Module) -> list[Part]:
    """The part of each weight of a model that is already built."""
    return [weight.part for weight in weights_in(model)]


def weight_bytes(weight: Weight, recipe: Recipe) -> int:
    """Bytes of one weight; what a recipe names no format for (norms) is in its floating point."""
    format = recipe.format_of(weight.part) or recipe.float_format
    if len(weight.shape) != 2:
        return FORMATS[recipe.float_format].weight_bits // 8 * weight.parameters
    return stored_bytes(format, *weight.shape, recipe.block_size, recipe.double_quant)


def kv_cache_bytes(config: PreTrainedConfig, context_tokens: int, batch_size: int = 1) -> int:
    """Bytes of the keys and values of `batch_size` sequences of `context_tokens`, in 16 bits.

    A layer with a sliding window keeps at most its window; multi-head latent attention (DeepSeek)
    keeps one compressed vector a token instead of a key and a value a head. Left out: the states of
    linear-attention layers, whose size is constant.
    """
    config = config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    key_value_values = 2 * heads * head_dim
    if getattr(config, "kv_lora_rank", None):
        key_value_values = config.kv_lora_rank + config.qk_rope_head_dim
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    window = getattr(config, "sliding_window", None) or context_tokens
    kept_tokens = {
        "full_attention": context_tokens,
        "sliding_attention": min(window, context_tokens),
        "linear_attention": 0,
    }
    tokens = sum(kept_tokens.get(kind, context_tokens) for kind in kinds)
    return batch_size * tokens * key_value_values * 2


def activation_bytes(config: PreTrainedConfig, context_tokens: int, batch_size: int = 1) -> int:
    """An allowance for what a forward pass holds at once, when the whole context is read in one go.

    Per token, in 16 bits: six vectors of the hidden width (the residual stream, its norm, queries,
    keys, values, attention output), and for each chosen expert three of the expert's width (gate,
    up, their product) and one of the hidden width. To this come one expert matrix dequantized to 16
    bits and the last token's logits in float32. An allowance, not a bound: measure yours.
    """
    config = config.get_text_config()
    ffn = getattr(config, "moe_intermediate_size", None) or config.intermediate_size
    chosen = getattr(config, "num_experts_per_tok", 1) or 1
    values = 6 * config.hidden_size + chosen * (3 * ffn + config.hidden_size)
    one_matrix = 2 * ffn * config.hidden_size
    logits = 4 * config.vocab_size * batch_size
    return 2 * values * context_tokens * batch_size + one_matrix + logits


def predict(config_or_path, recipe: Recipe, context_tokens: int = 0, batch_size: int = 1) -> Budget:
    """The memory that a model takes under `recipe`: exact for weights, exact for the KV cache.

    `config_or_path` is a folder with a config.json, that file, a hub name, or a config. With
    `context_tokens=0` the budget holds weights and their constants alone.

    >>> round(predict(MixtralConfig(), Recipe(attention="nf4")).total_bytes / 1e9, 2)
    24.48

    Raises ValueError if an override of the recipe fits no part of the model.
    """
    config = read_config(config_or_path)
    weights = weights_of(config)
    check_overrides(recipe, [weight.part for weight in weights])
    sizes = dict.fromkeys(
        (name for name in COMPONENTS if any(w.part.component == name for w in weights)), 0
    )
    for weight in weights:
        sizes[weight.part.component] += weight_bytes(weight, recipe)
    if context_tokens:
        sizes["kv_cache"] = kv_cache_bytes(config, context_tokens, batch_size)
        sizes["activations"] = activation_bytes(config, context_tokens, batch_size)
    return Budget(sum(weight.parameters for weight in weights), sizes)
