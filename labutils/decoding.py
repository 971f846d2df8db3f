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
from dataclasses import dataclass
from functools import cache

import torch
from torch import nn
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks
from torch.utils.hooks import RemovableHandle
from transformers.modeling_outputs import MoeModelOutputWithPast
from transformers.utils.generic import can_return_tuple

from . import kernels
from .moe import route

FEW = 4  # tokens, up to which matrices are read rather than computed with
RECORDER = "output_capturing_hook"  # in transformers.utils.output_capturing
POSITIONS = 256  # whose turns are computed at a time


class Watched(nn.Module):
    """A module that counts what is set in it: `Watched.changes`, of all of them together."""

    changes = 0

    def __setattr__(self, name: str, value: object) -> None:
        Watched.changes += 1
        super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        Watched.changes += 1
        super().__delattr__(name)

    def add_module(self, name: str, module: nn.Module | None) -> None:
        Watched.changes += 1
        super().add_module(name, module)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        Watched.changes += 1
        super().register_parameter(name, param)


class _Norm(Watched):
    """RMSNorm: `weight * (x / rms(x))`, with the rounding between."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if not kernels.take(hidden_states, self.weight):
            return super().forward(hidden_states)
        return kernels.norm(hidden_states, self.weight, self.variance_epsilon)


class _Linear(Watched):
    """A matrix that stayed in 16 bits, the head above all."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.bias is not None or not kernels.take(x, self.weight):
            return super().forward(x)
        return _product(x, self.weight)


class _Router(Watched):
    """Mixtral's."""

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x = hidden_states.reshape(-1, self.hidden_dim)
        if not kernels.take(x, self.weight):
            return super().forward(hidden_states)
        routing = route(_product(x, self.weight), self.top_k)
        return routing.logits, routing.weights, routing.chosen


class _Attention(Watched):
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
            and not (self.training or torch.is_grad_enabled())
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
        usual = inputs_embeds is None and not self.training and _is_usual(self.config, kwargs)
        if usual and _next_of_one(input_ids, attention_mask, position_ids, past_key_values):
            layers = self._stack.layers()
            room = layers and _room(past_key_values, len(layers))
            if room:
                x = self.embed_tokens(input_ids)
                if kernels.take(x):
                    x = self._next_state(layers, room, x, position_ids)
                    past_key_values.room = room.grown()
                    return MoeModelOutputWithPast(x, past_key_values=past_key_values)
                input_ids, inputs_embeds = None, x
        return super().forward(
            input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, **kwargs
        )

    def _next_state(self, layers, room: "_Room", x: torch.Tensor, position) -> torch.Tensor:
        if position is None:
            position = torch.tensor([[room.length]])
        turns = self.rotary_emb(x, position_ids=position)
        return self.norm(kernels.decode(layers, x, room.states, room.length, *turns))

    @property
    def _stack(self) -> "_Stack":
        stack = self.__dict__.get("stack")
        if stack is None or stack.of is not self.layers:
            stack = self.__dict__["stack"] = _Stack(self.layers)
        return stack


def _is_usual(config, settings: dict) -> bool:
    """Whether nothing is asked for but what leaves the last layer, with the usual attention."""
    more = config.output_hidden_states, config.output_attentions, config.output_router_logits
    asked = [value for name, value in settings.items() if name != "use_cache"]
    nothing_more = not any(more) and all(value is None or value is False for value in asked)
    return nothing_more and config._attn_implementation == "sdpa" and config.sliding_window is None


def _next_of_one(token, mask, position, past) -> bool:
    """Whether this is one token of one sequence, and sees all tokens before it."""
    if torch.is_grad_enabled() or token is None or past is None or token.shape != (1, 1):
        return False
    sees_all = mask is None or (mask.shape == (1, past.get_seq_length() + 1) and bool(mask.all()))
    return sees_all and (position is None or position.shape == (1, 1))


class _Stack:
    """Where the weights of layers lie, for as long as they lie there and nobody looks on inside."""

    def __init__(self, of: nn.ModuleList):
        self.of = of
        self.changes, self.plain = None, []

    def __reduce__(self):
        return type(None), ()  # a copy of the model finds its own

    def layers(self) -> list[kernels.Layer] | None:
        """For `kernels.decode`; None where that would not do the same."""
        if self.changes != Watched.changes or self._addresses() != self.addresses:
            self._find()
        if self.looked_at or self.handles != RemovableHandle.next_id:  # the next hook's, anywhere
            everywhere = _global_forward_hooks or _global_forward_pre_hooks
            self.looked_at = bool(everywhere) or any(map(is_looked_at, self.modules))
            self.handles = RemovableHandle.next_id
        return None if self.looked_at or len(self.of) != len(self.found) else self.found

    def _find(self) -> None:
        found = [_layer(module, number) for number, module in enumerate(self.of)]
        self.found = [] if None in found or not isinstance(self.of, Watched) else found
        self.modules = list(self.of.modules())
        self.looked_at, self.handles = True, None
        self.kept = [weight.data for weight in self.of.parameters()]
        self.plain = [_plain(module) for module in self.of] if self.found else []
        self.changes, self.addresses = Watched.changes, self._addresses()

    def _addresses(self) -> list[tuple]:
        weights = (held.get("weight") for layer in self.plain for held in layer)
        return [w if w is None else (w.data_ptr(), w.shape, w.stride()) for w in weights]


def _layer(module: nn.Module, number: int) -> kernels.Layer | None:
    attention, moe = module.self_attn, module.mlp
    norms = module.input_layernorm, module.post_attention_layernorm
    known = (
        _is_quick(module, Watched)
        and _is_quick(attention, _Attention)
        and _is_quick(moe, Watched)
        and _is_quick(moe.gate, _Router)
        and all(_is_quick(norm, _Norm) for norm in norms)
    )
    if not known or attention.layer_idx != number or any(m.training for m in module.modules()):
        return None
    router = moe.gate
    plain = [_plain_weight(each) for each in (*norms, router)]
    projections = [_weight(linear) for linear in _projections(attention)]
    experts = [getattr(expert, "stored", None) for expert in moe.experts.children()]
    if any(each is None for each in (*plain, *projections, *experts)):
        return None
    if len(plain[-1]) != len(experts) or router.top_k > len(experts):
        return None
    return kernels.Layer(
        *(weight.data_ptr() for weight in plain),
        (kernels.Expert * len(experts))(*experts),
        len(experts),
        router.top_k,
        *projections,
        attention.q_proj.in_features,
        attention.q_proj.out_features // attention.head_dim,
        attention.k_proj.out_features // attention.head_dim,
        attention.head_dim,
        norms[0].variance_epsilon,
        attention.scaling,
    )


def _projections(attention: nn.Module) -> tuple[nn.Module, ...]:
    return attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj


def _is_quick(module: nn.Module, quick: type) -> bool:
    """Whether `module` is transformers' own, quickened, and no class that somebody made of it."""
    return type(module).__bases__[0] is quick and type(module).__name__ in _QUICK


def _plain_weight(module: nn.Module) -> torch.Tensor | None:
    weight = module._parameters.get("weight")
    usable = weight is not None and weight.is_contiguous() and kernels.take(weight.detach())
    return weight.detach() if usable else None


def _weight(linear: nn.Module) -> kernels.Weight | None:
    """Where the kernels find the weight, in 4 or 16 bits."""
    if not _is_quick(linear, _Linear):
        return _stored(linear)
    weight = _plain_weight(linear)
    return None if weight is None or linear.bias is not None else kernels.plain_weight(weight)


def _plain(layer: nn.Module) -> list[dict[str, torch.Tensor]]:
    """Where a layer holds its weights in 16 bits, which may be exchanged without being set."""
    linears = [each for each in _projections(layer.self_attn) if isinstance(each, _Linear)]
    modules = layer.input_layernorm, layer.post_attention_layernorm, layer.mlp.gate, *linears
    return [module._parameters for module in modules]


@dataclass
class _Room:
    """Where all keys and values of a cache lie, with room behind those of each layer.

    transformers copies all of them for every token. Here they are copied when their room is full,
    into half as much again and 64, and what transformers sees are views of what is filled.
    """

    layers: list  # of transformers' cache
    states: torch.Tensor  # (layers, 2, 1, groups, room, size)
    length: int

    def __post_init__(self):
        views = self.states.narrow(4, 0, self.length).flatten(0, 1).unbind()
        self.shown = list(zip(views[::2], views[1::2], strict=True))
        for layer, shown in zip(self.layers, self.shown, strict=True):
            layer.keys, layer.values = shown

    def __reduce__(self):
        return type(None), ()  # a copy of the cache gets its own

    @classmethod
    def behind(cls, layers: list) -> "_Room":
        _, groups, length, size = layers[0].keys.shape
        states = layers[0].keys.new_empty(
            len(layers), 2, 1, groups, length + length // 2 + 64, size
        )
        for room, layer in zip(states, layers, strict=True):
            room[0, :, :, :length], room[1, :, :, :length] = layer.keys, layer.values
        return cls(layers.copy(), states, length)

    def goes_on(self, layers: list) -> bool:
        """Whether these are the layers, nobody has changed them since, and there is room."""
        return self.length < self.states.shape[4] and all(
            layer is known and layer.keys is keys and layer.values is values
            for layer, known, (keys, values) in zip(layers, self.layers, self.shown, strict=True)
        )

    def grown(self) -> "_Room":
        return _Room(self.layers, self.states, self.length + 1)


def _room(cache, layers: int) -> _Room | None:
    """Of a cache that merely grows, and has so many layers, and one sequence."""
    if type(cache).__name__ != "DynamicCache" or cache.offloading or len(cache.layers) != layers:
        return None
    room = getattr(cache, "room", None)
    if room is None or not room.goes_on(cache.layers):
        room = _Room.behind(cache.layers) if _grows(cache.layers) else None
    return room


def _grows(layers: list) -> bool:
    if not all(type(x).__name__ == "DynamicLayer" and x.is_initialized for x in layers):
        return False
    shapes = {tuple(states.shape) for layer in layers for states in (layer.keys, layer.values)}
    usable = all(kernels.take(layer.keys, layer.values) for layer in layers)
    return usable and len(shapes) == 1 and shapes.pop()[0] == 1


class _Rotary:
    """Mixtral's: for a single position, out of what was computed for many."""

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
        if position_ids.numel() != 1 or self.rope_type != "default" or not kernels.take(x):
            return super().forward(x, position_ids)
        page, place = divmod(position_ids.item(), POSITIONS)
        frequencies = self.inv_freq.tolist()
        basis = page, self.attention_scaling, frequencies
        known = self.__dict__.get("known")
        if known is None or known[0] != basis:
            positions = torch.arange(page * POSITIONS, (page + 1) * POSITIONS)[None]
            known = self.__dict__["known"] = basis, super().forward(x, positions)
        return tuple(turns.narrow(1, place, 1) for turns in known[1])


def _products(x: torch.Tensor, linears: Sequence[nn.Module]) -> list[torch.Tensor]:
    """What each linear makes of `x` (sequences, 1, in_features), in one call if they allow it."""
    stored = [_stored(linear) for linear in linears]
    if len(x) > FEW or None in stored:
        return [linear(x) for linear in linears]
    return kernels.multiply(stored, x[:, 0])


def is_looked_at(module: nn.Module) -> bool:
    """Whether somebody looks on when `module` is called: by a hook, or a forward in its place.

    Once something was recorded, transformers' own hooks stay, and do nothing unless asked again.
    """
    hooks = *module._forward_hooks.values(), *module._forward_pre_hooks.values()
    hooked = any(getattr(hook, "__name__", None) != RECORDER for hook in hooks)
    return hooked or "forward" in module.__dict__


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
    "ModuleList": Watched,
    "MixtralDecoderLayer": Watched,
    "MixtralSparseMoeBlock": Watched,
    "MixtralRotaryEmbedding": _Rotary,
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
