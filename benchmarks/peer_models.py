"""The peers: each loads the same Mixtral in its own way, with default settings."""

import importlib.util
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import init_empty_weights
from bitsandbytes import functional as bnb_functional
from bitsandbytes import nn as bnb_nn
from bitsandbytes.nn.parametrize import replace_parameter_4bit
from llamacpp import KINDS, LlamaCpp
from safetensors import safe_open
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import AutoConfig, BitsAndBytesConfig, MixtralForCausalLM

from labutils import speeds
from labutils.checkpoints import load, read_header, weight_files
from labutils.recipes import Recipe

NF4 = Recipe(attention="nf4")
TORCHAO_GROUP = 64

# What a peer loads, beside llama.cpp's kinds.
BF16, SAVED = "bf16", "saved"


# -------------------------------------------------------------------------------------- the peers


def load_ours(folder: Path) -> nn.Module:
    return load(folder, NF4, device_map="cpu")


def load_ours_saved(folder: Path) -> nn.Module:
    return load(folder, device_map="cpu")


def load_eager(folder: Path) -> nn.Module:
    return from_pretrained(folder, experts_implementation="eager")


def load_grouped_mm(folder: Path) -> nn.Module:
    return from_pretrained(folder, experts_implementation="grouped_mm")


def load_stock(folder: Path) -> nn.Module:
    """The well-known recipe; the experts stay in bf16."""
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    return from_pretrained(folder, quantization_config=nf4)


def load_replaced(folder: Path) -> nn.Module:
    """The same, then the fused experts as quantized parameters."""
    model = load_stock(folder)
    for layer in model.model.layers:
        for name in ("gate_up_proj", "down_proj"):
            replace_parameter_4bit(
                layer.mlp.experts, name, compress_statistics=True, quant_type="nf4"
            )
    return model


def load_linears(folder: Path) -> nn.Module:
    """One stock `Linear4bit` for each matrix, attention too, filled from the files."""
    return filled(folder, bitsandbytes_linear)


def load_torchao(folder: Path) -> nn.Module:
    return filled(folder, torchao_linear)


@dataclass(frozen=True)
class Peer:
    """A way to run the model: `source` is what it loads, `needs` the packages it takes."""

    name: str
    load: Callable[[Path], object]
    source: str = BF16
    needs: tuple[str, ...] = ()
    install: str = ""

    @property
    def missing(self) -> bool:
        return any(importlib.util.find_spec(package) is None for package in self.needs)


OURS = Peer(speeds.OURS, load_ours)
OURS_SAVED = Peer("this lab, saved in 4 bits", load_ours_saved, SAVED)
GROUPED_MM = Peer("transformers bf16, grouped_mm", load_grouped_mm)
BUILD_LLAMA_CPP = "pip install gguf==0.19.0 llama-cpp-python==0.3.36"
PEERS = (
    OURS,
    OURS_SAVED,
    Peer("transformers bf16, eager", load_eager),
    GROUPED_MM,
    Peer("bitsandbytes, stock", load_stock),
    Peer("bitsandbytes, replace_parameter", load_replaced),
    Peer("bitsandbytes, a Linear4bit each", load_linears),
    Peer("torchao int4", load_torchao, BF16, ("torchao",), "pip install torchao==0.18.0"),
    *(
        Peer(f"llama.cpp {kind}", LlamaCpp, kind, ("llama_cpp", "gguf"), BUILD_LLAMA_CPP)
        for kind in KINDS
    ),
)
BY_NAME = {peer.name: peer for peer in PEERS}


def from_pretrained(folder: Path, **settings) -> nn.Module:
    return MixtralForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **settings)


# ---------------------------------------------------------- a module for each matrix of each expert


class Expert(nn.Module):
    """One expert, by its published names."""

    def __init__(self, config):
        super().__init__()
        hidden, ffn = config.hidden_size, config.intermediate_size
        self.w1 = nn.Linear(hidden, ffn, bias=False)
        self.w2 = nn.Linear(ffn, hidden, bias=False)
        self.w3 = nn.Linear(hidden, ffn, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.w2(nn.functional.silu(self.w1(x)) * self.w3(x))


class Experts(nn.ModuleList):
    """The experts of a layer, one after the other as in transformers' eager loop."""

    def forward(self, x: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        output = torch.zeros_like(x)
        for expert in chosen.unique().tolist():
            token, slot = torch.where(chosen == expert)
            result = self[expert](x[token]) * weights[token, slot, None]
            output.index_add_(0, token, result.to(output.dtype))
        return output


def filled(folder: Path, linear_of: Callable[[torch.Tensor], nn.Linear]) -> nn.Module:
    """The model with every linear but the head as `linear_of` makes it, one tensor at a time."""
    config = AutoConfig.from_pretrained(folder)
    with init_empty_weights(include_buffers=False):
        model = MixtralForCausalLM(config)
        for layer in model.model.layers:
            layer.mlp.experts = Experts(Expert(config) for _ in range(config.num_local_experts))
    for file in weight_files(folder):
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                tensor = opened.get_tensor(name)
                path, leaf = name.replace("block_sparse_moe", "mlp").rsplit(".", 1)
                module = model.get_submodule(path)
                if isinstance(module, nn.Linear) and path != "lm_head":
                    model.set_submodule(path, linear_of(tensor))
                else:
                    setattr(module, leaf, nn.Parameter(tensor.clone(), requires_grad=False))
    return model.eval()


def bitsandbytes_linear(weight: torch.Tensor) -> nn.Linear:
    rows, columns = weight.shape
    linear = bnb_nn.Linear4bit(
        columns, rows, bias=False, compute_dtype=weight.dtype, quant_type="nf4", device="meta"
    )
    unquantized = bnb_nn.Params4bit(weight, False, quant_type="nf4", module=linear)
    linear.weight = unquantized.to("cpu")
    return linear


def torchao_linear(weight: torch.Tensor) -> nn.Linear:
    """In the prototype that runs on CPUs; torchao leaves fused 3-D experts as they are."""
    from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig
    from torchao.quantization import quantize_

    rows, columns = weight.shape
    linear = nn.Linear(columns, rows, bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    quantize_(linear, PrototypeInt4WeightOnlyConfig(TORCHAO_GROUP, set_inductor_config=False))
    return linear


# ------------------------------------------------------------------------- running, in transformers


class Transformers:
    """A model of transformers, asked as `LlamaCpp` is."""

    def __init__(self, model: nn.Module):
        self.model = model

    @torch.no_grad()
    def prefill(self, tokens: torch.Tensor) -> None:
        """A new cache with tokens (batch, length), and the logits of the last ones."""
        self.cache = self.model(tokens, use_cache=True, logits_to_keep=1).past_key_values

    @torch.no_grad()
    def step(self, tokens: torch.Tensor) -> None:
        """One more token (batch, 1) for each sequence."""
        self.model(tokens, past_key_values=self.cache, use_cache=True)

    @torch.no_grad()
    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        """tokens (1, length) -> (length, vocabulary), in float32."""
        return self.model(tokens).logits[0].float()

    @property
    def expert_bytes(self) -> int:
        return held_bytes(layer.mlp.experts for layer in self.model.model.layers)

    @property
    def outer_bytes(self) -> int:
        """All but experts and embeddings: what every token reads."""
        embeddings = held_bytes([self.model.model.embed_tokens])
        return held_bytes([self.model]) - embeddings - self.expert_bytes

    def bits_on_disk(self, folder: Path, expert_weights: int) -> float:
        tensors = {}
        for file in weight_files(folder):
            tensors |= read_header(file)
        sizes = {"U8": 8, "I8": 8, "BF16": 16, "F16": 16, "F32": 32}
        bits = sum(
            sizes[tensor.dtype] * torch.Size(tensor.shape).numel()
            for name, tensor in tensors.items()
            if ".experts." in name
        )
        return bits / expert_weights


def active_bytes(runner: Transformers | LlamaCpp, config) -> int:
    """What one token reads: all but the embeddings and the experts that it is not sent to."""
    chosen = config.num_experts_per_tok / config.num_local_experts
    return round(runner.outer_bytes + chosen * runner.expert_bytes)


def held_bytes(things: Iterable[object]) -> int:
    """Bytes of all tensors that modules hold, quantization constants too, each counted once."""
    seen, storages = set(), {}
    for thing in things:
        for tensor in _tensors_in(thing, seen):
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def _tensors_in(thing: object, seen: set[int]) -> Iterator[torch.Tensor]:
    if id(thing) in seen:
        return
    seen.add(id(thing))
    if isinstance(thing, torch.Tensor):
        if not is_traceable_wrapper_subclass(thing) and not thing.is_meta:
            yield thing
        children = vars(thing).values()
    elif isinstance(thing, nn.Module | bnb_functional.QuantState):
        children = vars(thing).values()
    elif isinstance(thing, dict):
        children = thing.values()
    else:
        children = thing if isinstance(thing, list | tuple) else ()
    for child in children:
        yield from _tensors_in(child, seen)
