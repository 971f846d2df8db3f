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

from collections import Counter
from collections.abc import Iterable, Iterator
from copy import deepcopy
from dataclasses import dataclass

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from .anatomy import COMPONENTS, Part, Weight, is_transposed, matrices
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


def skeleton(config: PreTrainedConfig) -> torch.nn.Module:
    """The model that `config` describes on the meta device: every module and shape, no storage."""
    own = deepcopy(config)  # building writes its dtype into the config
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(own, dtype=torch.bfloat16)


def weights_of(config: PreTrainedConfig) -> list[Weight]:
    """Every weight of the model that `config` describes, matrix by matrix.

    Shared weights (an output head tied to the embeddings) appear once. Mixtral-8x7B gives 995
    weights with 46,702,792,704 parameters, 768 of them experts' matrices of 14336 x 4096.
    """
    return list(weights_in(skeleton(config)))


def weights_in(model: torch.nn.Module) -> Iterator[Weight]:
    """Every weight of a model that is already built, matrix by matrix."""
    shapes = {name: tuple(tensor.shape) for name, tensor in model.named_parameters()}
    for name, shape in shapes.items():
        yield from matrices(name, shape, is_transposed(name, shapes))


def parts_of(model: torch.nn.Module) -> list[Part]:
    """The part of each weight of a model that is already built."""
    return [weight.part for weight in weights_in(model)]


def weight_bytes(weight: Weight, recipe: Recipe) -> int:
    """Bytes of one weight; what a recipe names no format for (norms) is in its floating point.

    With AWQ, 16 bits for each input come to every matrix that has to keep its scales; what is
    stored is less where AWQ finds a matrix to be better without (`Recipe.keeps_input_scales`).
    """
    format = recipe.format_of(weight.part) or recipe.float_format
    if len(weight.shape) != 2:
        return FORMATS[recipe.float_format].weight_bits // 8 * weight.parameters
    scales_bytes = 2 * weight.shape[1] if recipe.keeps_input_scales(weight.part) else 0
    return (
        stored_bytes(format, *weight.shape, recipe.block_size, recipe.double_quant) + scales_bytes
    )


def kv_cache_by_layer(
    config: PreTrainedConfig, context_tokens: int, batch_size: int = 1
) -> list[int]:
    """Bytes of the keys and values in each layer; see `kv_cache_bytes`."""
    config = config.get_text_config()
    sliding = getattr(config, "sliding_window", None)
    chunk = getattr(config, "attention_chunk_size", None)
    kept_tokens = {
        "sliding_attention": min(sliding or context_tokens, context_tokens),
        "chunked_attention": min(chunk or context_tokens, context_tokens),
        "linear_attention": 0,
    }
    one_token = batch_size * _values_per_token(config) * 2
    return [one_token * kept_tokens.get(kind, context_tokens) for kind in _kinds(config)]


def kv_cache_bytes(config: PreTrainedConfig, context_tokens: int, batch_size: int = 1) -> int:
    """Bytes of the keys and values of `batch_size` sequences of `context_tokens`, in 16 bits.

    A layer with a sliding window, or with attention inside chunks, keeps at most its window or
    chunk (transformers' `StaticCache`; its `DynamicCache` one token less between two steps);
    multi-head latent attention (DeepSeek) keeps one compressed vector a token instead of a key and
    a value a head. Left out: the states of linear-attention layers, whose size is constant.
    """
    return sum(kv_cache_by_layer(config, context_tokens, batch_size))


def _values_per_token(config: PreTrainedConfig) -> int:
    """Numbers that one layer keeps of one token."""
    if getattr(config, "kv_lora_rank", None):
        return config.kv_lora_rank + config.qk_rope_head_dim
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * heads * head_dim


def _kinds(config: PreTrainedConfig) -> list[str]:
    """The kind of attention in each layer, as transformers' caches tell it."""
    if kinds := getattr(config, "layer_types", None):
        return kinds
    windowed = getattr(config, "sliding_window", None) is not None
    kind = "sliding_attention" if windowed else "full_attention"
    return [kind] * config.num_hidden_layers


def activation_bytes(config: PreTrainedConfig, context_tokens: int, batch_size: int = 1) -> int:
    """An allowance for what a forward pass holds at once, when the whole context is read in one go.

    Per token, in 16 bits: six vectors of the hidden width (the residual stream, its norm, queries,
    keys, values, attention output), and for each chosen expert three of the expert's width (gate,
    up, their product) and one of the hidden width; transformers' Llama-4 has every token go through
    every expert. To this come one expert matrix dequantized to 16 bits, the last token's logits in
    float32, and the keys and values outside a layer's window, which transformers lets go of only
    with the first new token. An allowance, not a bound: measure yours.
    """
    config = config.get_text_config()
    ffn = getattr(config, "moe_intermediate_size", None) or config.intermediate_size
    chosen = getattr(config, "num_experts_per_tok", 1) or 1
    if config.model_type == "llama4_text":
        chosen = config.num_local_experts
    values = 6 * config.hidden_size + chosen * (3 * ffn + config.hidden_size)
    one_matrix = 2 * ffn * config.hidden_size
    logits = 4 * config.vocab_size * batch_size
    tokens = context_tokens * batch_size
    whole_layers = sum(kind != "linear_attention" for kind in _kinds(config))
    read_bytes = 2 * tokens * _values_per_token(config) * whole_layers
    outside_windows = read_bytes - kv_cache_bytes(config, context_tokens, batch_size)
    return 2 * values * tokens + one_matrix + logits + outside_windows


def budget_of(weights: Iterable[Weight], recipe: Recipe) -> Budget:
    """The bytes of weights that are counted already, by component.

    Raises ValueError if an override of the recipe fits none of them.
    """
    weights = list(weights)
    check_overrides(recipe, [weight.part for weight in weights])
    sizes = Counter()
    for weight in weights:
        sizes[weight.part.component] += weight_bytes(weight, recipe)
    in_order = {name: sizes[name] for name in COMPONENTS if name in sizes}
    return Budget(sum(weight.parameters for weight in weights), in_order)


def predict(config_or_path, recipe: Recipe, context_tokens: int = 0, batch_size: int = 1) -> Budget:
    """The memory that a model takes under `recipe`: exact for weights, exact for the KV cache.

    `config_or_path` is a folder with a config.json, that file, a hub name, or a config. With
    `context_tokens=0` the budget holds weights and their constants alone.

    >>> round(predict(MixtralConfig(), Recipe(attention="nf4")).total_bytes / 1e9, 2)
    24.48

    Raises ValueError if an override of the recipe fits no part of the model.
    """
    config = read_config(config_or_path)
    budget = budget_of(weights_of(config), recipe)
    beside = {}
    if context_tokens:
        beside["kv_cache"] = kv_cache_bytes(config, context_tokens, batch_size)
        beside["activations"] = activation_bytes(config, context_tokens, batch_size)
    return Budget(budget.parameters, budget.by_component | beside)
