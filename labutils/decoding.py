"""What stands between a quantized model's matrices, each in one call, and a token in one for all.

A token passes through little arithmetic there: norms, rotary positions, attention, the head. In
torch most are some ten operations, and starting them takes longer than the arithmetic: with the
experts' bookkeeping half of all that a token took in a Mixtral of 0.7 billion weights on two cores.
`quicken` gives the modules of a loaded model one call of `kernels` each, and Mixtral's layers
together one call, for the next token of one sequence.

In all else they stay what they are: their classes' and weights' names, hooks on them, and their own
way wherever such a call would not do the same (other types, a GPU, training, padding, other caches,
a hook or a forward of its own anywhere inside).

Results are torch's, but for the order of sums in front of the same roundings, and of the last bit
of exponentials.
"""

from collections.abc import Sequence
from functools import cache
from itertools import chain
from operator import is_
from typing import NamedTuple

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers.modeling_outputs import MoeModelOutputWithPast
from transformers.utils.generic import can_return_tuple

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


class _Model:
    """Mixtral's: all layers in one call, for the next token of one sequence, if nobody looks on."""

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values=None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs,
    ) -> MoeModelOutputWithPast:
        last_states = inputs_embeds is None and _last_states_only(self.config, kwargs)
        if last_states and _next_of_one(input_ids, attention_mask, position_ids):
            layers, pasts = self._stack.layers(), _pasts(past_key_values, len(self.layers))
            if layers and pasts:
                states = self._next_states(layers, pasts, input_ids, position_ids)
                return MoeModelOutputWithPast(states, past_key_values=past_key_values)
        return super().forward(
            input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, **kwargs
        )

    def _next_states(self, layers, pasts, token, position) -> torch.Tensor:
        length = pasts[0].keys.shape[2]
        position = torch.tensor([[length]]) if position is None else position
        x = self.embed_tokens(token)
        rooms = [_room(past) for past in pasts]
        x = kernels.decode(layers, x, rooms, length, *self.rotary_emb(x, position_ids=position))
        for past, (keys, values) in zip(pasts, rooms, strict=True):
            past.keys, past.values = keys[:, :, : length + 1], values[:, :, : length + 1]
        return self.norm(x)

    @property
    def _stack(self) -> "_Stack":
        stack = self.__dict__.get("stack")
        if stack is None or stack.of is not self.layers:
            stack = self.__dict__["stack"] = _Stack(self.layers)
        return stack


def _last_states_only(config, settings: dict) -> bool:
    """Whether what leaves the last layer is all that is asked for."""
    more = config.output_hidden_states, config.output_attentions, config.output_router_logits
    asked = [value for name, value in settings.items() if name != "use_cache"]
    return not any(more) and all(value is None or value is False for value in asked)


def _next_of_one(token, mask, position) -> bool:
    """Whether this is one token of one sequence, and sees all tokens before it."""
    return (
        not torch.is_grad_enabled()
        and token is not None
        and token.shape == (1, 1)
        and (position is None or position.shape == (1, 1))
        and (mask is None or (mask.dim() == 2 and bool(mask.all())))
    )


class _Stack:
    """Where the weights of layers lie, for as long as they lie there and nobody looks on inside.

    A module that is stored in 4 bits has a `place`: another object, once that may have changed.
    """

    def __init__(self, of: nn.ModuleList):
        self.of = of
        self.known, self.found = None, None

    def __reduce__(self):
        return type(None), ()  # a copy of the model finds its own

    def layers(self) -> list[kernels.Layer] | None:
        """For `kernels.decode`; None where that would not do the same."""
        if not self._is_known():
            self._know()
        if self.hooked or self.handles != RemovableHandle.next_id:  # the next hook's, anywhere
            self.hooked, self.handles = any(self.hooks), RemovableHandle.next_id
        looked_at = self.hooked or any("forward" in attributes for attributes in self.own)
        return None if looked_at else self.found

    def _know(self) -> None:
        layers = [_layer(module) for module in self.of]
        self.found = None if None in layers else layers
        modules = list(self.of.modules())
        self.hooked, self.handles = True, None
        self.hooks = [hooks for m in modules for hooks in (m._forward_hooks, m._forward_pre_hooks)]
        self.own = [module.__dict__ for module in modules]
        self.held = [held for m in modules for held in (m._parameters, m._modules) if held]
        self.stored = [module for module in modules if hasattr(module, "place")]
        stored = {weight for module in self.stored for weight in module.parameters()}
        self.plain = [weight for weight in self.of.parameters() if weight not in stored]
        self.known, self.addresses = self._inside(), self._addresses()

    def _is_known(self) -> bool:
        if self.known is None:
            return False
        inside = self._inside()
        same = len(inside) == len(self.known) and all(map(is_, inside, self.known))
        return same and self._addresses() == self.addresses

    def _inside(self) -> list:
        places = [module.place for module in self.stored]
        return [*chain.from_iterable(map(dict.values, self.held)), *places]

    def _addresses(self) -> list[int]:
        return [weight.data_ptr() for weight in self.plain]


def _layer(module: nn.Module) -> kernels.Layer | None:
    attention, moe = module.self_attn, module.mlp
    norms = module.input_layernorm, module.post_attention_layernorm
    known = (
        isinstance(attention, _Attention)
        and attention.config._attn_implementation == "sdpa"
        and isinstance(moe.gate, _Router)
        and all(isinstance(norm, _Norm) for norm in norms)
    )
    if not known:
        return None
    plain = [each.weight.detach() for each in (*norms, moe.gate)]
    projections = attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj
    stored = [_stored(linear) for linear in projections]
    experts = [getattr(expert, "stored", None) for expert in moe.experts.children()]
    if None in stored or None in experts or not kernels.take(*plain):
        return None
    return kernels.Layer(
        *(weight.data_ptr() for weight in plain),
        (kernels.Expert * len(experts))(*experts),
        len(experts),
        moe.gate.top_k,
        *stored,
        attention.q_proj.in_features,
        attention.q_proj.out_features // attention.head_dim,
        attention.k_proj.out_features // attention.head_dim,
        attention.head_dim,
        norms[0].variance_epsilon,
        attention.scaling,
    )


def _pasts(cache, layers: int) -> list | None:
    """Each layer's past, if the cache is one that merely grows, and of one sequence."""
    if type(cache).__name__ != "DynamicCache" or cache.offloading or len(cache.layers) != layers:
        return None
    pasts = cache.layers
    grow = all(type(past).__name__ == "DynamicLayer" and past.is_initialized for past in pasts)
    if not grow or not kernels.take(*(x for past in pasts for x in (past.keys, past.values))):
        return None
    shapes = {past.keys.shape for past in pasts}
    return pasts if len(shapes) == 1 and shapes.pop()[0] == 1 else None


def _room(past) -> tuple[torch.Tensor, torch.Tensor]:
    """Tensors in which a layer's keys and values lie, with room behind them.

    transformers copies all of them for every token. Here they are copied when their room is full,
    into twice as much, and `past.keys` is a view of what is filled.
    """
    length = past.keys.shape[2]
    room = getattr(past, "room", None)
    fits = (
        room is not None
        and room.owner is past
        and room.keys.data_ptr() == past.keys.data_ptr()
        and room.values.data_ptr() == past.values.data_ptr()
        and length < room.keys.shape[2]
    )
    if not fits:
        shape = *past.keys.shape[:2], 2 * length + 64, past.keys.shape[3]
        room = past.room = _Room(past, past.keys.new_empty(shape), past.keys.new_empty(shape))
        room.keys[:, :, :length] = past.keys
        room.values[:, :, :length] = past.values
    return room.keys, room.values


class _Room(NamedTuple):
    owner: object
    keys: torch.Tensor
    values: torch.Tensor


def _products(x: torch.Tensor, linears: Sequence[nn.Module]) -> list[torch.Tensor]:
    """What each linear makes of `x` (sequences, 1, in_features), in one call if they allow it."""
    stored = [_stored(linear) for linear in linears]
    if len(x) > FEW or None in stored:
        return [linear(x) for linear in linears]
    return kernels.multiply(stored, x[:, 0])


def is_looked_at(module: nn.Module) -> bool:
    """Whether somebody looks on when `module` is called: by a hook, or a forward in its place."""
    hooks = module._forward_hooks or module._forward_pre_hooks
    return bool(hooks) or "forward" in module.__dict__


def _stored(linear: nn.Module) -> kernels.Weight | None:
    if is_looked_at(linear) or linear.bias is not None:
        return None
    return getattr(linear, "stored", None)


def _product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    rows = x.reshape(-1, x.shape[-1])
    if len(rows) > FEW:
        return nn.functional.linear(x, weight)
    return kernels.multiply_16bit(weight, rows).reshape(*x.shape[:-1], -1)


# What is quickened, by the name of its class; transformers writes a family's norm out for each.
_QUICK = {
    "Linear": _Linear,
    "MixtralModel": _Model,
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
        quick = _QUICK.get(kind.__name__)
        if quick and not isinstance(module, quick):
            module.__class__ = _quickened(kind, quick)


@cache
def _quickened(kind: type, quick: type) -> type:
    """A class of the same name, by which transformers knows what can be recorded of a model."""
    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
    return type(kind.__name__, (quick, kind), names)
