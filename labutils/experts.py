"""Experts that are really stored in 4 or 8 bits, inside a transformers model.

transformers 5 keeps the experts of a layer in two fused 3-D parameters, `experts.gate_up_proj`
(experts, 2 * ffn, hidden) and `experts.down_proj` (experts, hidden, ffn). bitsandbytes replaces
`nn.Linear` modules and nothing else, so it walks past them, silently: 96.6% of Mixtral stays in 16
bits. The remedy here has three steps, all of them on the empty model, before a weight is read:

1. **take apart**: each fused module becomes a list of experts with three 2-D linears each;
2. **replace**: every linear that the recipe names becomes a `Linear4bit` or `Linear8bit`;
3. **rename**: the loader is told that the published `experts.3.w1.weight` now has a place of its
   own, instead of a slice of a fused tensor.

After that transformers' own loader reads tensor by tensor, and each is quantized as it arrives.
Importing this module registers the whole with transformers:

    import labutils.experts
    AutoModelForCausalLM.from_pretrained(path, quantization_config=RecipeConfig(Recipe()))

It works for every family whose experts transformers merges from `gate`, `up` and `down` matrices:
Mixtral, OLMoE, Qwen3-MoE and their relatives.
"""

import ctypes
import logging
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache, partial
from itertools import pairwise

import torch
from torch import nn
from transformers.activations import SiLUActivation
from transformers.core_model_loading import (
    ConversionOps,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
)
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import get_module_from_name
from transformers.utils.quantization_config import QuantizationConfigMixin

from . import kernels
from .anatomy import part_of
from .budget import parts_of
from .decoding import Watched, is_looked_at, quicken
from .formats import FORMATS, NESTED_BLOCK, stored_bytes
from .meter import mark
from .recipes import Recipe, check_overrides

# While it is imported, bitsandbytes says on some processors that a kernel on the hub was not
# fetched. Nothing is fetched at import, and its own kernel serves.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

import bitsandbytes as bnb  # noqa: E402
from bitsandbytes import functional as bnb_functional  # noqa: E402

QUANT_METHOD = "labutils"
DTYPES = {format.name: format.dtype for format in FORMATS.values() if format.dtype}

SLICE_WEIGHTS = 2**22  # dequantized at a time, to be multiplied while they are in the cache
TOKENS_TOGETHER = 8  # multiplied in multiples of it: torch compiles a product for each number
COMPARED_TOKENS = (1, 4, 16, 64, 256)  # at which the two ways to multiply are timed
ROUNDS = 4  # of timing, in turn

NOWHERE = None, None  # what it is whose place is known, and that place
SILU = nn.SiLU, SiLUActivation
_kept = threading.local()

QUANTIZE_CHUNK = 2**17
INT8_THRESHOLD = 6.0

# glibc's names, its own upper ends (`man 3 mallopt`), and what a load wants instead.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
KEPT_BYTES = 2**25
RETURNED_BYTES = 2**20
RETURNED_WEIGHTS = 2**22

# Called with the bytes of every tensor of a checkpoint that has been quantized or restored.
count_used: ContextVar[Callable[[int], None]] = ContextVar("count_used", default=lambda size: None)

# bitsandbytes says so at every INT8 multiplication of a bf16 model; it is how LLM.int8() works.
logging.getLogger("bitsandbytes.autograd._functions").addFilter(
    lambda record: "inputs will be cast" not in record.msg
)


class UnusableWeight(BaseException):
    """A weight that must not be quantized, with its name and what is wrong with it.

    Not an `Exception`, because transformers' loader collects those and reports them after the last
    tensor; this one stops it at the first.
    """


class Linear4bit(Watched, bnb.nn.Linear4bit):
    """A bias-free or biased linear layer whose weight is stored in NF4 or FP4.

    Stored are the packed codes (two to a byte), a block maximum per `block_size` weights, itself in
    8 bits if `double_quant`, and the codebooks; `coverage` counts them all. Nothing is kept beside
    them: on a CPU `kernels` computes from what is stored.

    There are two ways to multiply there. Few tokens (up to `fused_tokens()`, in bfloat16) are
    multiplied straight from the codes, which are read once for every four tokens. For more the
    weight is dequantized, a slice at a time, and multiplied in 16 bits.
    """

    def __init__(self, linear: nn.Linear, format: str, block_size: int, double_quant: bool):
        super().__init__(
            linear.in_features,
            linear.out_features,
            linear.bias is not None,
            compress_statistics=double_quant,
            quant_type=format,
            device="meta",
        )
        self.weight.blocksize = block_size
        self._found = NOWHERE
        self.requires_grad_(False)

    def quantized(self, weight: torch.Tensor) -> bnb.nn.Params4bit:
        """The parameter that stores `weight` (out_features, in_features), on the same device."""
        settings = self.weight
        codes, state = quantize_4bit(
            weight, settings.quant_type, settings.blocksize, settings.compress_statistics
        )
        return bnb.nn.Params4bit(
            codes,
            quant_state=state,
            blocksize=settings.blocksize,
            compress_statistics=settings.compress_statistics,
            quant_type=settings.quant_type,
            bnb_quantized=True,
            module=self,
        )

    def restored(self, tensors: dict[str, torch.Tensor]) -> bnb.nn.Params4bit:
        """The parameter from the tensors that a checkpoint holds for it."""
        codes = tensors.pop("weight")
        return bnb.nn.Params4bit.from_prequantized(codes, tensors, device=codes.device, module=self)

    def dequantized(self) -> torch.Tensor:
        """The weight (out_features, in_features) as the stored codes and constants give it."""
        return bnb_functional.dequantize_4bit(self.weight.data, self.weight.quant_state)

    @property
    def stored(self) -> kernels.Weight | None:
        """Where the kernels find the weight; None where there are none that can use it."""
        weight = self._parameters["weight"]
        if self._found[0] is not weight:
            block = weight.blocksize
            usable = block % kernels.GROUP == 0 and self.in_features % block == 0
            if not (_has_kernels(weight) and usable):
                return None
            self._found = weight, kernels.weight(weight, weight.quant_state)
        return self._found[1]

    def _apply(self, fn, recurse=True):
        self._found = NOWHERE
        return super()._apply(fn, recurse)

    def __getstate__(self):
        """What is copied and pickled: not the addresses."""
        return self.__dict__ | {"_found": NOWHERE}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.device.type != "cpu":
            return super().forward(x)
        rows = x.reshape(-1, self.in_features)
        if not kernels.take(x) or self.stored is None:
            y = nn.functional.linear(rows, self.dequantized().to(x.dtype))
        elif len(rows) <= fused_tokens():
            y = fused_product(self, rows)
        else:
            y = sliced_product(self, rows)
        y = y.reshape(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias


def fused_product(linear: Linear4bit, x: torch.Tensor) -> torch.Tensor:
    """`x` (rows, in_features) in bfloat16 times the weight, straight from the codes."""
    return kernels.multiply([linear.stored], x)[0]


def sliced_product(linear: Linear4bit, x: torch.Tensor) -> torch.Tensor:
    """`x` (rows, in_features) in bfloat16 times the weight, dequantized a slice at a time."""
    rows = min(max(SLICE_WEIGHTS // linear.in_features, 1), linear.out_features)
    room = _room(rows * linear.in_features).view(rows, linear.in_features)
    tokens, x = len(x), nn.functional.pad(x, (0, 0, 0, -len(x) % TOKENS_TOGETHER))
    slices = [
        nn.functional.linear(
            x, kernels.dequantize(linear.stored, room[: linear.out_features - first], first)
        )
        for first in range(0, linear.out_features, rows)
    ]
    return torch.cat(slices, dim=-1)[:tokens]


def _room(weights: int) -> torch.Tensor:
    """Memory for a dequantized slice, kept by each thread: the system clears what it hands out."""
    if getattr(_kept, "room", torch.empty(0)).numel() < weights:
        _kept.room = torch.empty(max(weights, SLICE_WEIGHTS), dtype=torch.bfloat16)
    return _kept.room[:weights]


@cache
def fused_tokens() -> int:
    """Up to how many tokens this machine multiplies faster straight from 4-bit codes.

    Both ways are timed, once in a process, on a matrix of two million weights. The answer lies in
    the middle between the most tokens at which the codes win and the fewest at which they lose,
    four times as many, so that a quiet machine comes to the same answer every time. A busy one may
    come to another, which moves the pace and the last bits of results.
    """
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(2048, 1024, generator=generator, dtype=torch.bfloat16)
    linear = Linear4bit(nn.Linear(1024, 2048, bias=False, device="meta"), "nf4", 64, False)
    linear.weight = linear.quantized(weight)
    most = 0
    for tokens in COMPARED_TOKENS:
        x = torch.randn(tokens, 1024, generator=generator, dtype=torch.bfloat16)
        ways = [partial(way, linear, x) for way in (fused_product, sliced_product)]
        rounds = [list(map(_seconds, ways)) for _ in range(ROUNDS)]
        fused, sliced = map(min, zip(*rounds, strict=True))
        if fused > sliced:
            break
        most = 2 * tokens
    return most


def _seconds(function: Callable[[], object]) -> float:
    """The shortest of a few runs: other programs can only make one longer."""
    moments = [time.perf_counter()]
    for _ in range(4):
        function()
        moments.append(time.perf_counter())
    return min(after - before for before, after in pairwise(moments))


class Linear8bit(bnb.nn.Linear8bitLt):
    """A linear layer whose weight is stored as LLM.int8(): a byte per weight, a scale per row.

    At run time the inputs are rounded to 8 bits too, but for the columns in which an input exceeds
    6.0 in magnitude: those are multiplied in 16 bits (arXiv:2208.07339, section 3).
    """

    def __init__(self, linear: nn.Linear):
        super().__init__(
            linear.in_features,
            linear.out_features,
            linear.bias is not None,
            has_fp16_weights=False,
            threshold=INT8_THRESHOLD,
            device="meta",
        )
        self.requires_grad_(False)

    def quantized(self, weight: torch.Tensor) -> bnb.nn.Int8Params:
        """The parameter that stores `weight` (out_features, in_features), on the same device.

        Raises ValueError for weights that are NaN or infinite.
        """
        if _has_kernels(weight):
            codes, scales = kernels.quantize_rows(weight.contiguous())
            return self.restored({"weight": codes, "SCB": scales})
        _check_finite(weight)
        unquantized = bnb.nn.Int8Params(weight.cpu(), requires_grad=False, has_fp16_weights=False)
        return unquantized.to(weight.device)

    def restored(self, tensors: dict[str, torch.Tensor]) -> bnb.nn.Int8Params:
        """The parameter from the tensors that a checkpoint holds for it."""
        codes = tensors["weight"]
        return bnb.nn.Int8Params(
            codes, requires_grad=False, has_fp16_weights=False, CB=codes, SCB=tensors["SCB"]
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = super().forward(x.reshape(-1, x.shape[-1]))
        return flat.reshape(*x.shape[:-1], self.out_features)

    def dequantized(self) -> torch.Tensor:
        """The weight (out_features, in_features) as codes and scales give it, in float32."""
        scales = self.weight.SCB if self.weight.SCB is not None else self.state.SCB
        return bnb_functional.int8_vectorwise_dequant(self.weight.data, scales)


QUANTIZED_LINEARS = (Linear4bit, Linear8bit)


def first_device() -> dict[str, int | str]:
    """The device map that puts a whole model on the current GPU, or on the CPU without one."""
    return {"": torch.cuda.current_device() if torch.cuda.is_available() else "cpu"}


def stored_linear(linear: nn.Linear, format: str, recipe: Recipe) -> nn.Module:
    """The layer that stores `linear`'s weight in `format`; `linear` itself for a 16-bit format."""
    if format in ("nf4", "fp4"):
        return Linear4bit(linear, format, recipe.block_size, recipe.double_quant)
    if format == "int8":
        return Linear8bit(linear)
    return linear


def quantize_4bit(
    weight: torch.Tensor, format: str, block_size: int, double_quant: bool
) -> tuple[torch.Tensor, bnb_functional.QuantState]:
    """`weight` in 4 bits, byte for byte as `bitsandbytes.functional.quantize_4bit` gives it.

    On a CPU `kernels` does it where they are compiled, and allocates nothing but the result;
    elsewhere bitsandbytes, on a CPU in chunks of 131,072 weights, as its temporaries are seven
    times what it quantizes. Raises ValueError for weights that are NaN or infinite.
    """
    if _has_kernels(weight) and weight.numel() % block_size == 0:
        table = bnb_functional.get_4bit_type(format, device="cpu")
        codes, maxima = kernels.quantize(weight.contiguous(), table, block_size)
        state = bnb_functional.QuantState(
            maxima, weight.shape, table, block_size, format, weight.dtype
        )
    else:
        codes, state = _quantize_4bit_in_chunks(weight, format, block_size)
    if double_quant:
        state.offset = state.absmax.mean()
        state.absmax, state.state2 = bnb_functional.quantize_blockwise(
            state.absmax - state.offset, blocksize=NESTED_BLOCK
        )
        state.nested = True
    return codes, state


def _has_kernels(weight: torch.Tensor) -> bool:
    return kernels.INSTRUCTIONS is not None and weight.device.type == "cpu"


def _quantize_4bit_in_chunks(
    weight: torch.Tensor, format: str, block_size: int
) -> tuple[torch.Tensor, bnb_functional.QuantState]:
    def quantize(chunk):
        return bnb_functional.quantize_4bit(
            chunk, blocksize=block_size, quant_type=format, compress_statistics=False
        )

    _check_finite(weight)
    flat = weight.contiguous().view(-1)
    on_cpu = weight.device.type == "cpu"
    chunks = _on_all_cores(quantize, flat.split(QUANTIZE_CHUNK)) if on_cpu else [quantize(flat)]
    state = chunks[0][1]
    state.shape = weight.shape
    state.absmax = torch.cat([chunk_state.absmax for _, chunk_state in chunks])
    return torch.cat([codes for codes, _ in chunks]), state


def _check_finite(weight: torch.Tensor) -> None:
    kernels.refuse(weight.numel() - torch.isfinite(weight).sum().item(), weight)


def _on_all_cores(function, chunks: Sequence[torch.Tensor]) -> list:
    """`function` of each chunk, a thread for each core and one core for each thread.

    As fast as letting every operation use all cores, and ten times faster where another program
    keeps one of them busy: threads that share an operation wait for the slowest at its end.
    """
    threads = torch.get_num_threads()
    if len(chunks) == 1 or threads == 1:
        return list(map(function, chunks))
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return list(pool.map(function, chunks))
    finally:
        torch.set_num_threads(threads)


class Expert(Watched):
    """One SwiGLU expert: `down(act(gate(x)) * up(x))`, its three matrices 2-D and apart."""

    def __init__(self, hidden: int, ffn: int, act_fn: nn.Module, dtype: torch.dtype):
        super().__init__()
        self.gate_proj = nn.Linear(hidden, ffn, bias=False, device="meta", dtype=dtype)
        self.up_proj = nn.Linear(hidden, ffn, bias=False, device="meta", dtype=dtype)
        self.down_proj = nn.Linear(ffn, hidden, bias=False, device="meta", dtype=dtype)
        self.act_fn = act_fn
        self._found = NOWHERE

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))

    @property
    def linears(self) -> tuple[nn.Module, nn.Module, nn.Module]:
        return self.gate_proj, self.up_proj, self.down_proj

    @property
    def stored(self) -> kernels.Expert | None:
        """Where the kernels find the matrices; None if they cannot, or somebody looks on."""
        parts = tuple(getattr(linear, "stored", None) for linear in self.linears)
        looked_at = any(map(is_looked_at, (self, *self.linears, self.act_fn)))
        if None in parts or looked_at or not isinstance(self.act_fn, SILU):
            return None
        if parts != self._found[0]:
            self._found = parts, kernels.Expert(*parts)
        return self._found[1]

    def __getstate__(self):
        return self.__dict__ | {"_found": NOWHERE}


class Experts(Watched, nn.ModuleList):
    """The experts of one layer, called as transformers calls its fused ones."""

    def forward(
        self, hidden_states: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        """(tokens, hidden), chosen (tokens, top_k), weights (tokens, top_k) -> (tokens, hidden).

        Only chosen experts are touched. Where few tokens are for any, all experts are computed in
        one call, straight from their codes; else one by one.
        """
        numbers = chosen.flatten().tolist()
        tokens_of = Counter(sorted(numbers))
        if not tokens_of:
            return torch.zeros_like(hidden_states)
        trained = torch.is_grad_enabled() and weights.requires_grad
        few = max(tokens_of.values()) <= fused_tokens()
        if few and not trained and kernels.take(hidden_states):
            stored = {number: self[number].stored for number in tokens_of}
            if None not in stored.values():
                return kernels.mix(stored, numbers, weights, hidden_states)
        order = chosen.flatten().argsort(stable=True)
        token = order // chosen.shape[1]
        parts = hidden_states[token].split(list(tokens_of.values()))
        results = [self[number](part) for number, part in zip(tokens_of, parts, strict=True)]
        weighted = torch.cat(results) * weights.flatten()[order, None]
        weighted = weighted.to(hidden_states.dtype)
        return torch.zeros_like(hidden_states).index_add_(0, token, weighted)


class StoredRouter:
    """What a router becomes when its weight is quantized: its own forward, its weight dequantized.

    Routers differ between families (softmax before or after the choice, normalized or not), so the
    family's own class stays, as a base beside this one; only `weight` is read from storage.
    """

    @property
    def weight(self) -> torch.Tensor:
        return self.stored.dequantized().to(self.stored_dtype)


def store_router(router: nn.Module, format: str, recipe: Recipe) -> None:
    """Make `router` keep its weight in `format`, as `router.stored`."""
    experts, hidden = router.weight.shape
    linear = nn.Linear(hidden, experts, bias=False, device="meta")
    router.stored_dtype = router.weight.dtype
    del router.weight
    router.stored = stored_linear(linear, format, recipe)
    kind = type(router)
    router.__class__ = type(f"Stored{kind.__name__}", (StoredRouter, kind), {})


def fused_experts(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Name and module of every layer's fused experts."""
    for name, module in model.named_modules():
        fused = getattr(module, "gate_up_proj", None)
        if isinstance(fused, nn.Parameter) and fused.dim() == 3:
            yield name, module


def take_apart(model: nn.Module) -> None:
    """Replace fused experts by lists of `Expert`, on the meta device.

    Raises ValueError for experts that are not plain SwiGLU: with biases, transposed, or with a gate
    of their own (gpt-oss, for one).
    """
    for name, fused in list(fused_experts(model)):
        plain = (
            getattr(fused, "has_gate", False)
            and fused.is_concatenated
            and not (fused.has_bias or fused.is_transposed or fused.has_post_expert_norm)
            and fused._apply_gate.__name__ == "_default_apply_gate"
        )
        if not plain:
            raise ValueError(
                f"{name} ({type(fused).__name__}) has biases, a transposed layout or a gate of its "
                "own; experts can be quantized where they are plain gate, up and down matrices."
            )
        count, double_ffn, hidden = fused.gate_up_proj.shape
        dtype = fused.gate_up_proj.dtype
        experts = [Expert(hidden, double_ffn // 2, fused.act_fn, dtype) for _ in range(count)]
        model.set_submodule(name, Experts(experts))


def replace_linears(model: nn.Module, recipe: Recipe) -> None:
    """Give every linear and router that the recipe quantizes its storage, on the meta device."""
    for name, module in list(model.named_modules()):
        part = part_of(name + ".weight")
        format = recipe.format_of(part)
        if format is None or not FORMATS[format].scaled:
            continue
        if part.component == "embeddings" or f"{name}.weight" in model.all_tied_weights_keys:
            raise ValueError(
                f"{name} cannot be stored in {format}: embeddings, and a head that shares their "
                f"weights, are looked up, not multiplied; keep {part.component}='bf16'."
            )
        is_router = part.component == "router" and "weight" in module._parameters
        if type(module) is nn.Linear:
            _check_blocks(name, module.weight, format, recipe)
            model.set_submodule(name, stored_linear(module, format, recipe))
        elif is_router:
            _check_blocks(name, module.weight, format, recipe)
            store_router(module, format, recipe)


def _check_blocks(name: str, weight: torch.Tensor, format: str, recipe: Recipe) -> None:
    if FORMATS[format].scaled == "block" and weight.numel() % recipe.block_size:
        raise ValueError(
            f"{name} has {weight.numel():,} weights, which blocks of {recipe.block_size} do not "
            "divide; take a smaller block size."
        )


def quantized_linears(model: nn.Module) -> Iterator[tuple[str, Linear4bit | Linear8bit]]:
    """Name and module of every linear in `model` that this module stores."""
    for name, module in model.named_modules():
        if isinstance(module, QUANTIZED_LINEARS):
            yield name, module


def _return_freed_memory() -> None:
    """Have glibc hand freed memory back to the system, at once for blocks of a mebibyte and more.

    Left to itself it raises that size to the largest block it has seen freed, up to 32 MiB, and
    keeps smaller ones: a load that quantizes a thousand matrices one after the other then holds on
    to several times the model's size. Until `_keep_freed_memory`, that is: a running model frees
    and takes the same megabytes in every layer, and to fetch them anew costs a quarter of its time
    and more (the stand-in in NF4, 2,048 tokens on two cores: 99 ms against 72).
    """
    if (libc := _glibc()) is not None:
        libc.mallopt(M_MMAP_THRESHOLD, RETURNED_BYTES)
        libc.malloc_trim(0)


def _keep_freed_memory() -> None:
    """Have glibc keep freed blocks again, as large as it would by itself come to keep."""
    if (libc := _glibc()) is not None:
        libc.malloc_trim(0)
        libc.mallopt(M_MMAP_THRESHOLD, KEPT_BYTES)
        libc.mallopt(M_TRIM_THRESHOLD, 2 * KEPT_BYTES)


def _glibc() -> ctypes.CDLL | None:
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        return libc
    return None


@register_quantization_config(QUANT_METHOD)
class RecipeConfig(QuantizationConfigMixin):
    """A recipe as transformers passes it around, and as config.json keeps it."""

    def __init__(self, recipe: Recipe | dict | None = None, quant_method: str = QUANT_METHOD):
        self.quant_method = quant_method
        self.recipe = Recipe(**recipe) if isinstance(recipe, dict) else recipe or Recipe()
        if not isinstance(self.recipe, Recipe):
            raise TypeError(f"{recipe!r} is no recipe; write Recipe(experts='nf4').")
        self.recipe.require_storable()

    def to_dict(self) -> dict:
        return {"quant_method": self.quant_method, "recipe": self.recipe.to_dict()}


class Operation(ConversionOps):
    """One for all weights: transformers copies the conversion that holds it for every tensor."""

    def __deepcopy__(self, memo):
        return self


class Quantize(Operation):
    """Turns one tensor of a 16-bit checkpoint into the parameter that its module stores."""

    def __init__(self, hf_quantizer):
        self.hf_quantizer = hf_quantizer

    def convert(self, input_dict, model=None, **_):
        mark("quantize")
        (name, tensors), *_rest = input_dict.items()
        weight = tensors[0] if isinstance(tensors, list) else tensors
        module, _leaf = get_module_from_name(model, name)
        try:
            stored = {name: module.quantized(weight)}
        except ValueError as error:
            raise UnusableWeight(
                f"{name}: {error}; each would ruin its whole block. The checkpoint is damaged: "
                "download it again."
            ) from None
        self.hf_quantizer.worked_on(weight.numel())
        count_used.get()(weight.nbytes)
        return stored


class Restore(Operation):
    """Turns the tensors of a quantized checkpoint back into what their module stores."""

    def __init__(self, hf_quantizer):
        self.hf_quantizer = hf_quantizer

    def convert(self, input_dict, model=None, full_layer_name=None, **_):
        tensors = {
            key: value[0] if isinstance(value, list) else value for key, value in input_dict.items()
        }
        count_used.get()(sum(tensor.nbytes for tensor in tensors.values()))
        module, leaf = get_module_from_name(model, full_layer_name)
        if isinstance(module, QUANTIZED_LINEARS) and leaf == "weight":
            return {"weight": module.restored(tensors)}
        reference = model.get_parameter_or_buffer(full_layer_name)
        return {key: tensor.to(reference.dtype) for key, tensor in tensors.items()}


@register_quantizer(QUANT_METHOD)
class RecipeQuantizer(HfQuantizer):
    """What transformers calls while it loads a model by a `RecipeConfig`."""

    serialized_names = {  # noqa: RUF012 -- read by the base class
        "weight": [
            "weight",
            "weight.absmax",
            "weight.quant_map",
            "weight.nested_absmax",
            "weight.nested_quant_map",
            "weight.quant_state.bitsandbytes__nf4",
            "weight.quant_state.bitsandbytes__fp4",
            "SCB",
            "weight_format",
        ]
    }

    @property
    def recipe(self) -> Recipe:
        return self.quantization_config.recipe

    def worked_on(self, weights: int) -> None:
        """Return the memory that temporaries have left behind, every few million weights."""
        self._weights_since_return += weights
        if self._weights_since_return >= RETURNED_WEIGHTS:
            self._weights_since_return = 0
            _return_freed_memory()

    def update_dtype(self, dtype):
        return DTYPES[self.recipe.float_format]

    def update_device_map(self, device_map):
        return device_map or first_device()

    def validate_environment(self, *args, device_map=None, **kwargs):
        if isinstance(device_map, dict) and "disk" in device_map.values():
            raise ValueError("Quantized weights cannot be kept on disk; give a GPU or 'cpu'.")

    def _process_model_before_weight_loading(self, model, **kwargs):
        self._weights_since_return = 0
        _return_freed_memory()
        check_overrides(self.recipe, parts_of(model))
        if any(FORMATS[format].scaled for format in self.recipe.formats_of("experts")):
            take_apart(model)
        replace_linears(model, self.recipe)

    def _process_model_after_weight_loading(self, model, **kwargs):
        for name, module in quantized_linears(model):
            if storage_of(module) is None:
                raise ValueError(f"The checkpoint holds nothing for {name}: a shard is missing.")
            if isinstance(module, Linear4bit) and module.stored is not None:
                fused_tokens()  # now, that the first token need not wait for it
        model._weight_conversions = [
            conversion
            for conversion in model._weight_conversions
            if not (isinstance(conversion, WeightConverter) and self._restores(conversion))
        ]
        model.is_loaded_in_4bit = bool({"nf4", "fp4"} & self.recipe.formats)
        quicken(model)
        _keep_freed_memory()
        return model

    @staticmethod
    def _restores(converter: WeightConverter) -> bool:
        return any(isinstance(operation, Restore) for operation in converter.operations)

    def param_needs_quantization(self, model, param_name, **kwargs):
        module, leaf = get_module_from_name(model, param_name)
        return isinstance(module, QUANTIZED_LINEARS) and leaf == "weight"

    def param_element_size(self, model, param_name, param):
        if not self.param_needs_quantization(model, param_name):
            return param.element_size()
        format = self.recipe.format_of(part_of(param_name))
        stored = stored_bytes(
            format, *param.shape, self.recipe.block_size, self.recipe.double_quant
        )
        return stored / param.numel()

    def get_quantize_ops(self):
        return Quantize(self)

    def get_load_operations(self):
        return {"deserialize": Restore}

    def update_weight_conversions(self, weight_conversions, model):
        taken_apart = any(isinstance(module, Experts) for module in model.modules())
        conversions = [
            renamed
            for conversion in weight_conversions
            for renamed in (_apart(conversion) if taken_apart else [conversion])
        ]
        routers = [
            WeightRenaming(f"{name}.", f"{name}.stored.")
            for name, module in model.named_modules()
            if isinstance(module, StoredRouter)
        ]
        return super().update_weight_conversions(conversions + routers, model)

    def is_serializable(self):
        return True

    @property
    def is_trainable(self):
        return True


def _apart(conversion) -> list:
    """The conversion that leaves experts apart, in place of one that merges them.

    transformers merges `.experts.*.w1.weight` and `.experts.*.w3.weight` into
    `.experts.gate_up_proj`; the order of the sources says which is the gate. What remains to be
    done is `.experts.3.w1.` -> `.experts.3.gate_proj.`.
    """
    merges = isinstance(conversion, WeightConverter) and any(
        isinstance(operation, MergeModulelist) for operation in conversion.operations
    )
    if not merges or ".experts." not in conversion.target_patterns[0]:
        return [conversion]
    target = conversion.target_patterns[0]
    places = ("gate_proj", "up_proj") if target.endswith("gate_up_proj") else ("down_proj",)
    published = [source.split(".")[-2] for source in conversion._original_source_patterns]
    return [
        WeightRenaming(rf"\.experts\.(\d+)\.{name}\.", rf".experts.\1.{place}.")
        for name, place in zip(published, places, strict=True)
        if name != place
    ]


@dataclass(frozen=True)
class Storage:
    """How one weight matrix is kept: the format, the bytes, and the constants' settings.

    `stored_bytes` counts codes and every constant, as they are saved and as they lie in memory.
    """

    format: str
    shape: tuple[int, int]
    stored_bytes: int
    block_size: int | None = None
    double_quant: bool | None = None


def storage_of(module: nn.Module) -> Storage | None:
    """How a bitsandbytes linear keeps its weight, ours or stock; None for any other module."""
    if isinstance(module, bnb.nn.Linear4bit) and module.weight.quant_state is not None:
        state = module.weight.quant_state
        constants = [state.absmax, state.code]
        if state.nested:
            constants += [state.state2.absmax, state.state2.code, state.offset]
        return Storage(
            state.quant_type,
            tuple(state.shape),
            _bytes(module.weight.data, *constants),
            state.blocksize,
            state.nested,
        )
    if isinstance(module, bnb.nn.Linear8bitLt):
        scales = module.weight.SCB if module.weight.SCB is not None else module.state.SCB
        if scales is not None:
            codes = module.weight.data
            return Storage("int8", tuple(codes.shape), _bytes(codes, scales))
    return None


def _bytes(*tensors: torch.Tensor) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
