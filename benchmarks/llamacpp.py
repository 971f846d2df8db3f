"""llama.cpp as a peer: a published Mixtral written and quantized for it, and run.

Nothing of it is imported before it is needed; both its packages may be missing.
"""

import ctypes
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import AutoConfig

from labutils.checkpoints import weight_files

KINDS = {"Q4_0": 2, "Q4_K_M": 15}  # llama_ftype of llama.h
STEPS = 32  # a context has room for as many tokens after its prompt


# ----------------------------------------------------------------------------------------- running


class LlamaCpp:
    """A GGUF file in llama.cpp; a context is made at the first prompt of each shape."""

    def __init__(self, file: Path):
        import llama_cpp

        llama_cpp.set_verbose(False)
        self.file, self.lib = file, llama_cpp
        llama_cpp.llama_backend_init()
        self.model = llama_cpp.llama_model_load_from_file(
            str(file).encode(), llama_cpp.llama_model_default_params()
        )
        self.context, self.shape = None, None

    def prefill(self, tokens: torch.Tensor) -> None:
        if self.shape != tokens.shape:
            self._open(tokens.shape)
        memory = self.lib.llama_get_memory(self.context)
        self.lib.llama_memory_clear(memory, False)
        self.length = 0
        self._decode(tokens)

    def step(self, tokens: torch.Tensor) -> None:
        self._decode(tokens)

    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        self._open(tokens.shape)
        self.length = 0
        self._decode(tokens, of_all=True)
        vocabulary = self.lib.llama_vocab_n_tokens(self.lib.llama_model_get_vocab(self.model))
        rows = ctypes.c_float * (vocabulary * tokens.numel())
        pointer = ctypes.cast(self.lib.llama_get_logits(self.context), ctypes.POINTER(rows))
        logits = torch.frombuffer(pointer.contents, dtype=torch.float32)
        return logits.reshape(-1, vocabulary).clone()

    def _open(self, shape: torch.Size) -> None:
        if self.context is not None:
            self.lib.llama_free(self.context)
        settings = self.lib.llama_context_default_params()
        settings.n_seq_max = shape[0]
        settings.n_ctx = shape[0] * (shape[1] + STEPS)
        settings.n_batch = shape.numel()
        settings.n_threads = settings.n_threads_batch = torch.get_num_threads()
        self.context, self.shape = self.lib.llama_init_from_model(self.model, settings), shape

    def _decode(self, tokens: torch.Tensor, of_all: bool = False) -> None:
        length = tokens.shape[1]
        batch = self.lib.llama_batch_init(tokens.numel(), 0, 1)
        batch.n_tokens = tokens.numel()
        for place, token in enumerate(tokens.flatten().tolist()):
            sequence, position = divmod(place, length)
            batch.token[place] = token
            batch.pos[place] = self.length + position
            batch.n_seq_id[place] = 1
            batch.seq_id[place][0] = sequence
            batch.logits[place] = of_all or position == length - 1
        failed = self.lib.llama_decode(self.context, batch)
        self.lib.llama_get_logits(self.context)
        self.lib.llama_batch_free(batch)
        if failed:
            raise RuntimeError(f"llama_decode: {failed}")
        self.length += length

    @property
    def expert_bytes(self) -> int:
        return sum(size for name, size in self._sizes() if "_exps" in name)

    @property
    def outer_bytes(self) -> int:
        return sum(
            size for name, size in self._sizes() if "_exps" not in name and "token_embd" not in name
        )

    def bits_on_disk(self, file: Path, expert_weights: int) -> float:
        return 8 * self.expert_bytes / expert_weights

    def _sizes(self) -> Iterator[tuple[str, int]]:
        from gguf import GGUFReader

        for tensor in GGUFReader(self.file).tensors:
            yield tensor.name, int(tensor.n_bytes)


# ---------------------------------------------------------------------------------- its own file


GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "block_sparse_moe.gate": "ffn_gate_inp",
    "w1": "ffn_gate_exps",
    "w2": "ffn_down_exps",
    "w3": "ffn_up_exps",
}


def gguf_name(name: str) -> str:
    """The name of a published tensor in a GGUF file.

    >>> gguf_name("model.layers.3.self_attn.q_proj.weight")
    'blk.3.attn_q.weight'
    """
    path = name.removesuffix(".weight")
    if not path.startswith("model.layers."):
        return f"{GGUF_NAMES[path]}.weight"
    layer, inner = path.removeprefix("model.layers.").split(".", 1)
    if ".experts." in inner:
        inner = inner.rsplit(".", 1)[1]
    return f"blk.{layer}.{GGUF_NAMES[inner]}.weight"


def interleaved(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of a query or key matrix in llama.cpp's order.

    It rotates neighbours, transformers the two halves of a head: `permute` of llama.cpp's
    convert_hf_to_gguf.py.
    """
    rows, columns = weight.shape
    halves = weight.reshape(heads, 2, rows // heads // 2, columns)
    return halves.transpose(1, 2).reshape(rows, columns)


def write_gguf(folder: Path, file: Path) -> None:
    """The checkpoint in bf16 for llama.cpp, without a vocabulary: token ids go in."""
    from gguf import GGMLQuantizationType, GGUFWriter

    config = AutoConfig.from_pretrained(folder)
    writer = GGUFWriter(file, "llama")
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_expert_count(config.num_local_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    writer.add_tokenizer_model("no_vocab")
    for name, tensor in gguf_tensors(folder, config):
        if tensor.dim() == 1 or "ffn_gate_inp" in name:
            writer.add_tensor(name, tensor.float().numpy())
        else:
            raw = tensor.contiguous().view(torch.uint8).numpy()
            writer.add_tensor(name, raw, raw_dtype=GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def gguf_tensors(folder: Path, config) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors by their names in GGUF, a layer's experts stacked."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    stacked = {}
    for file in weight_files(folder):
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                tensor = opened.get_tensor(name)
                leaf = name.split(".")[-2]
                if ".experts." in name:
                    expert = int(name.split(".experts.")[1].split(".")[0])
                    stacked.setdefault(gguf_name(name), {})[expert] = tensor
                else:
                    in_order = interleaved(tensor, heads[leaf]) if leaf in heads else tensor
                    yield gguf_name(name), in_order
    for name, experts in stacked.items():
        yield name, torch.stack([experts[number] for number in sorted(experts)])


def write_quantized(folder: Path, room: Path) -> None:
    """A file for each of `KINDS` in `room`, by llama.cpp's own quantizer in its usual mixtures.

    Raises RuntimeError for a kind that it cannot make.
    """
    import llama_cpp

    unquantized = room / "bf16.gguf"
    write_gguf(folder, unquantized)
    for kind, number in KINDS.items():
        settings = llama_cpp.llama_model_quantize_default_params()
        settings.ftype = number
        source, target = str(unquantized).encode(), str(room / kind).encode()
        if llama_cpp.llama_model_quantize(source, target, settings):
            raise RuntimeError(f"llama.cpp could not quantize to {kind}.")
    unquantized.unlink()
