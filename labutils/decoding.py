"""What stands between a quantized model's matrices, each in one call.

A token passes through little arithmetic there: norms, rotary positions, attention, the head. In
torch most are some ten operations, and starting them takes longer than the arithmetic: with the
experts' bookkeeping half of all that a token took in a Mixtral of 0.7 billion weights on two cores.
`quicken` gives the modules of a loaded model one call of `kernels` each. In all else they stay what
they are: their weights and names, hooks on them, and their own way wherever that call does not
apply (other types, a GPU, training).

Results are torch's, but for the order of sums in front of the same roundings.
"""

from collections.abc import Sequence
from functools import cache

import torch
from torch import nn

from . import kernels
from .moe import route

FEW = 4  # tokens, up to which matrices are read rather than computed with


class _Norm:
    """RMSNorm: `weight * (x / rms(x))`, with the rounding between."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if not kernels.take(hidden_states, self.weight):
            return super().forward(hidden_states)
        return kernels.norm(hidden_states, self.weight, self.variance_epsilon)


class _Linear:
    """A matrix that stayed in 16 bits, the head above all."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.bias is not None or not kernels.take(x, self.weight):
            return super().forward(x)
        return _product(x, self.weight)


class _Router:
    """Mixtral's."""

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x = hidden_states.reshape(-1, self.hidden_dim)
        if not kernels.take(x, self.weight):
            return super().forward(hidden_states)
        routing = route(_product(x, self.weight), self.top_k)
        return routing.logits, routing.weights, routing.chosen


class _Attention:
    """Mixtral's, for the next token of each sequence, where no token is masked."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None,
        past_key_values=None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        usable = (
            hidden_states.shape[1] == 1
            and attention_mask is None
            and past_key_values is not None
            and self.config._attn_implementation == "sdpa"
            and kernels.take(hidden_states)
        )
        if not usable:
            return super().forward(
                hidden_states, position_embeddings, attention_mask, past_key_values, **kwargs
            )
        shape = len(hidden_states), -1, self.head_dim
        projections = self.q_proj, self.k_proj, self.v_proj
        queries, keys, values = (y.view(shape) for y in _products(hidden_states, projections))
        kernels.rotate(queries, *position_embeddings)
        kernels.rotate(keys, *position_embeddings)
        keys, values = past_key_values.update(
            keys.unsqueeze(2), values.unsqueeze(2), self.layer_idx
        )
        found = kernels.attend(queries, keys, values, self.scaling)
        return self.o_proj(found.view(len(hidden_states), 1, -1)), None


def _products(x: torch.Tensor, linears: Sequence[nn.Module]) -> list[torch.Tensor]:
    """What each linear makes of `x` (sequences, 1, in_features), in one call if they allow it."""
    stored = [getattr(linear, "stored", None) for linear in linears]
    apart = (
        len(x) > FEW
        or None in stored
        or any(
            linear.bias is not None or linear._forward_hooks or linear._forward_pre_hooks
            for linear in linears
        )
    )
    if apart:
        return [linear(x) for linear in linears]
    return kernels.multiply(stored, x[:, 0])


def _product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    rows = x.reshape(-1, x.shape[-1])
    if len(rows) > FEW:
        return nn.functional.linear(x, weight)
    return kernels.multiply_16bit(weight, rows).reshape(*x.shape[:-1], -1)


# What is quickened, by the name of its class; transformers writes a family's norm out for each.
_QUICK = {
    "Linear": _Linear,
    "MixtralAttention": _Attention,
    "MixtralTopKRouter": _Router,
    "MixtralRMSNorm": _Norm,
    "OlmoeRMSNorm": _Norm,
    "Qwen3MoeRMSNorm": _Norm,
    "DeepseekV2RMSNorm": _Norm,
}


def quicken(model: nn.Module) -> None:
    """Have the modules of `model` that this module knows computed in one call each, in place."""
    for module in model.modules():
        kind = type(module)
        if kind.__name__ in _QUICK:
            module.__class__ = _quick(kind)


@cache
def _quick(kind: type) -> type:
    return type(f"Quick{kind.__name__}", (_QUICK[kind.__name__], kind), {})
