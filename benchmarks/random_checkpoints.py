"""Random checkpoints in published layouts, written shard by shard: what the hub would have sent."""

import json
from pathlib import Path

import torch
from bitsandbytes import functional as bnb_functional
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, MixtralConfig

INDEX = "model.safetensors.index.json"


def mixtral_config(hidden=128, ffn=256, layers=2, experts=8, vocab=512) -> MixtralConfig:
    return MixtralConfig(
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 128,
        num_local_experts=experts,
        vocab_size=vocab,
        max_position_embeddings=4096,
        dtype="bfloat16",
        architectures=["MixtralForCausalLM"],
    )


def write_mixtral(folder: Path, config: MixtralConfig, generator: torch.Generator) -> Path:
    """A random Mixtral in the published layout, one shard a layer and one for the rest.

    Routers get weights twenty times larger than the others, so that their choices are clear-cut
    and a change by rounding alone flips no expert.
    """
    folder.mkdir(parents=True, exist_ok=True)
    weight_map = _write_shard(folder, 0, config.num_hidden_layers, _outer(config, generator))
    for layer in range(config.num_hidden_layers):
        tensors = _layer(config, layer, generator)
        weight_map |= _write_shard(folder, layer + 1, config.num_hidden_layers, tensors)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config.save_pretrained(folder)
    return folder


def _write_shard(folder, number, layers, tensors) -> dict[str, str]:
    name = f"model-{number + 1:05}-of-{layers + 1:05}.safetensors"
    save_file(tensors, folder / name, metadata={"format": "pt"})
    return dict.fromkeys(tensors, name)


def _outer(config, generator) -> dict[str, torch.Tensor]:
    shape = (config.vocab_size, config.hidden_size)
    return {
        "model.embed_tokens.weight": _random(generator, *shape, scale=1.0),
        "lm_head.weight": _random(generator, *shape),
        "model.norm.weight": torch.ones(config.hidden_size, dtype=torch.bfloat16),
    }


def _layer(config, layer, generator) -> dict[str, torch.Tensor]:
    hidden, ffn = config.hidden_size, config.intermediate_size
    kv = hidden * config.num_key_value_heads // config.num_attention_heads
    name = f"model.layers.{layer}"
    tensors = {
        f"{name}.self_attn.{which}_proj.weight": _random(generator, rows, hidden)
        for which, rows in (("q", hidden), ("k", kv), ("v", kv), ("o", hidden))
    }
    for norm in ("input_layernorm", "post_attention_layernorm"):
        tensors[f"{name}.{norm}.weight"] = torch.ones(hidden, dtype=torch.bfloat16)
    moe = f"{name}.block_sparse_moe"
    experts = config.num_local_experts
    tensors[f"{moe}.gate.weight"] = _random(generator, experts, hidden, scale=0.4)
    for expert in range(experts):
        for which, shape in (("w1", (ffn, hidden)), ("w2", (hidden, ffn)), ("w3", (ffn, hidden))):
            tensors[f"{moe}.experts.{expert}.{which}.weight"] = _random(generator, *shape)
    return tensors


def _random(generator, *shape, scale=0.02) -> torch.Tensor:
    return (torch.randn(*shape, generator=generator) * scale).to(torch.bfloat16)


def write_any(folder: Path, config, seed: int) -> Path:
    """A random checkpoint of any family, as transformers itself saves it."""
    torch.manual_seed(seed)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    return folder


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            tensors |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    return tensors


def write_transformers_4_nf4(source: Path, folder: Path, keep_gate: bool) -> Path:
    """What transformers 4 saved of the checkpoint in `source` after `load_in_4bit=True`.

    Every linear but the head in NF4, each expert by its own name; the router too, unless it was
    listed in `llm_int8_skip_modules`.
    """
    folder.mkdir()
    kept = ("embed_tokens", "lm_head", "norm") + ((".gate.",) if keep_gate else ())
    saved = {}
    for name, tensor in read_tensors(source).items():
        if any(piece in name for piece in kept):
            saved[name] = tensor
            continue
        codes, state = bnb_functional.quantize_4bit(
            tensor, quant_type="nf4", compress_statistics=True
        )
        saved[name] = codes
        saved |= {f"{name}.{key}": value for key, value in state.as_dict(packed=True).items()}
    save_file(saved, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    config["transformers_version"] = "4.57.6"
    config["quantization_config"] = {
        "_load_in_4bit": True,
        "_load_in_8bit": False,
        "bnb_4bit_compute_dtype": "bfloat16",
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": ["gate"] if keep_gate else None,
        "llm_int8_threshold": 6.0,
        "load_in_4bit": True,
        "load_in_8bit": False,
        "quant_method": "bitsandbytes",
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder
