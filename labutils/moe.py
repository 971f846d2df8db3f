"""A Mixture-of-Experts layer: a router, experts, and the record of who did what.

A dense transformer layer sends every token through one feed-forward block. A Mixture of Experts
has several of them, the *experts*, and sends each token through a few. For one token `x` of width
`hidden`:

1. The router, a single matrix, gives each expert a logit: `logits = router(x)`, (experts).
2. A softmax over **all** experts turns the logits into probabilities, in float32.
3. The `top_k` most probable experts are chosen, and their probabilities divided by their sum, so
   that the weights of the chosen ones add up to 1.
4. Each chosen expert is a SwiGLU block (Shazeer 2020, arXiv:2002.05202, section 2):
   `expert(x) = down(silu(gate(x)) * up(x))`, with gate and up (hidden to ffn) and down (ffn to
   hidden).
5. The answer is the weighted sum of the chosen experts' outputs. The others are not computed.

This is Mixtral's rule (Jiang et al. 2024, arXiv:2401.04088, section 2.1). A model of this kind is
as large as all of its experts and as cheap as the chosen ones: Mixtral-8x7B keeps 8 experts in each
layer and computes 2 for a token.

Nothing in the rule asks that experts be used equally. `load_balancing_loss` does, in training.

Left out, because Mixtral does without: shared experts (DeepSeek), a limit to the tokens that an
expert takes (Switch), noise on the router while training, and weights that are not renormalized
(OLMoE).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True, eq=False)
class Routing:
    """Which experts each token was sent to, and why.

    `logits` (tokens, experts) is what the router said, `chosen` (tokens, top_k) which experts that
    chose, the most probable first, and `weights` (tokens, top_k) how much each of them counts, in
    float32. A row of weights adds up to 1; with OLMoE, which does not divide them by their sum, to
    less. The leading axes of a batch are flattened into tokens.
    """

    logits: Tensor
    weights: Tensor
    chosen: Tensor

    @property
    def experts(self) -> int:
        return self.logits.shape[-1]

    @property
    def probabilities(self) -> Tensor:
        """The softmax of the logits over all experts, (tokens, experts), in float32."""
        return self.logits.float().softmax(dim=-1)

    @property
    def counts(self) -> Tensor:
        """How many tokens each expert got, (experts). They add up to tokens x top_k."""
        return torch.bincount(self.chosen.flatten(), minlength=self.experts)

    @property
    def gates(self) -> Tensor:
        """How much each expert counts for each token, (tokens, experts): 0 where not chosen."""
        return torch.zeros_like(self.logits, dtype=self.weights.dtype).scatter(
            1, self.chosen, self.weights
        )


def route(logits: Tensor, top_k: int) -> Routing:
    """What Mixtral's rule makes of the router's logits (tokens, experts).

    >>> routing = route(torch.tensor([[1.0, 3.0, 2.0, 0.0]]), top_k=2)
    >>> routing.chosen.tolist()
    [[1, 2]]
    >>> routing.weights.round(decimals=3).tolist()
    [[0.7310000061988831, 0.26899999380111694]]

    The weights are those of a softmax over the chosen logits alone: e / (e + 1) = 0.731. Experts
    equally probable are taken as torch.topk takes them, which is nothing to rely on.

    Raises ValueError unless 1 <= top_k <= experts. Jiang et al. 2024, arXiv:2401.04088, 2.1.
    """
    _check_top_k(top_k, logits.shape[-1])
    probabilities = logits.float().softmax(dim=-1)
    kept, chosen = probabilities.topk(top_k, dim=-1)
    return Routing(logits, kept / kept.sum(dim=-1, keepdim=True), chosen)


def load_balancing_loss(routing: Routing) -> Tensor:
    """A number to add to a training loss, so that experts are used equally; a scalar.

    With f the number of choices that fell on an expert, divided by the tokens, and P the mean
    probability that the router gave it, it is experts x (sum of f x P over the experts). It is
    `top_k` where both are even, and `experts` where top-1 routing sends all to one expert with
    certainty. Only P has a gradient: it pushes down the probability of the experts that are chosen
    often.

    Switch Transformer (Fedus et al. 2021, arXiv:2101.03961, equations 4 to 6), which has top_k = 1;
    for more, f counts every choice, as in transformers. Its factor alpha is left to the caller.
    """
    f = routing.counts / len(routing.chosen)
    return routing.experts * (f * routing.probabilities.mean(dim=0)).sum()


class SwiGLU(nn.Module):
    """One expert: `down_proj(silu(gate_proj(x)) * up_proj(x))`, from hidden to hidden.

    Its three matrices have no bias and 3 x hidden x ffn weights in all, drawn with a standard
    deviation of one over the square root of their inputs, so that a token of unit size gives an
    answer of about that size.
    """

    def __init__(self, hidden: int, ffn: int, generator: torch.Generator):
        super().__init__()
        self.gate_proj = _linear(hidden, ffn, generator)
        self.up_proj = _linear(hidden, ffn, generator)
        self.down_proj = _linear(ffn, hidden, generator)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.middle(x))

    def middle(self, x: Tensor) -> Tensor:
        """What `down_proj` is given, (tokens, ffn)."""
        return F.silu(self.gate_proj(x)) * self.up_proj(x)


class MoELayer(nn.Module):
    """A router and its experts: `layer(x)` gives an answer shaped like `x`, and a `Routing`.

    `x` is (tokens, hidden), (batch, tokens, hidden), or has any other axes before the last. Only
    chosen experts are computed, each of them once, on all tokens that chose it.

    >>> layer = MoELayer(hidden=16, ffn=32, experts=8, top_k=2)
    >>> y, routing = layer(torch.ones(3, 5, 16))
    >>> y.shape, routing.logits.shape, routing.chosen.shape
    (torch.Size([3, 5, 16]), torch.Size([15, 8]), torch.Size([15, 2]))
    >>> layer.total_parameters, layer.active_parameters
    (12416, 3200)

    The weights are drawn from `generator`, without one from a generator seeded with 0: then they
    are the same each time. torch's global random numbers are left alone.

    Raises ValueError for a size below 1, for top_k > experts, and for tokens of another width.
    """

    def __init__(
        self,
        hidden: int,
        ffn: int,
        experts: int,
        top_k: int,
        generator: torch.Generator | None = None,
    ):
        super().__init__()
        for name, size in (("hidden", hidden), ("ffn", ffn), ("experts", experts)):
            if size < 1:
                raise ValueError(f"{name}={size}: a layer needs at least 1.")
        _check_top_k(top_k, experts)
        generator = generator or torch.Generator().manual_seed(0)
        self.top_k = top_k
        self.router = _linear(hidden, experts, generator)
        self.experts = nn.ModuleList(SwiGLU(hidden, ffn, generator) for _ in range(experts))

    def forward(self, x: Tensor) -> tuple[Tensor, Routing]:
        hidden = self.router.in_features
        if x.shape[-1] != hidden:
            raise ValueError(f"The tokens have width {x.shape[-1]}; this layer takes {hidden}.")
        if x.dtype != self.router.weight.dtype:
            raise ValueError(
                f"The tokens are {x.dtype}, the layer {self.router.weight.dtype}: use x.to(...)."
            )
        tokens = x.reshape(-1, hidden)
        routing = route(self.router(tokens), self.top_k)
        y = torch.zeros_like(tokens)
        for index in routing.counts.nonzero().flatten().tolist():
            token, place = torch.where(routing.chosen == index)
            answer = self.experts[index](tokens[token]) * routing.weights[token, place, None]
            y = y.index_add(0, token, answer.to(y.dtype))
        return y.reshape(x.shape), routing

    @property
    def total_parameters(self) -> int:
        """Weights that are kept: the router and all experts."""
        return sum(weight.numel() for weight in self.parameters())

    @property
    def active_parameters(self) -> int:
        """Weights that one token is multiplied with: the router and `top_k` experts."""
        idle = len(self.experts) - self.top_k
        return self.total_parameters - idle * sum(w.numel() for w in self.experts[0].parameters())

    @classmethod
    def from_transformers(cls, block: nn.Module) -> MoELayer:
        """The same layer as `block`, a `MixtralSparseMoeBlock` of transformers 5; weights copied.

        Nothing is imported from transformers: any block of that build and behaviour will do.
        `block.gate.weight` is (experts, hidden), `block.experts.gate_up_proj` (experts, 2 x ffn,
        hidden) with the gate's rows first, and `block.experts.down_proj` (experts, hidden, ffn).
        The dtype and the device stay. Left out: the noise that Mixtral can put on its input while
        it is trained.

        Raises ValueError, with the reason, for a block that holds other tensors (quantized or
        shared experts), has another activation than silu, or routes by another rule.
        """
        weights = _weights_in(block)
        _check_behaviour(block)
        experts, hidden = weights["router.weight"].shape
        ffn = len(weights["experts.0.gate_proj.weight"])
        with torch.device("meta"):
            layer = cls(hidden, ffn, experts, block.gate.top_k)
        copies = {name: weight.detach().clone() for name, weight in weights.items()}
        layer.load_state_dict(copies, assign=True)
        return layer.requires_grad_()

    def write_to(self, block: nn.Module) -> None:
        """Put this layer's weights into `block`, from which `from_transformers` made it.

        So a model can be run with experts that were changed: quantized and back, pruned, swapped.
        The block keeps its dtype: what is written is rounded to it. All is checked first, so that a
        block is written whole or not at all.

        >>> layer = MoELayer.from_transformers(block)
        >>> layer.experts[3].up_proj.weight.data.zero_()
        >>> layer.write_to(block)

        Raises ValueError, naming the first weight that does not fit, or for another top_k.
        """
        places, weights = _weights_in(block), self.state_dict()
        if block.gate.top_k != self.top_k:
            raise ValueError(f"The layer has top_k={self.top_k}, the block {block.gate.top_k}.")
        for name in places | weights:
            here, there = (
                tuple(held[name].shape) if name in held else "nothing" for held in (weights, places)
            )
            if here != there:
                raise ValueError(f"{name}: the layer has {here}, the block {there}.")
        with torch.no_grad():
            for name, place in places.items():
                place.copy_(weights[name])


@torch.no_grad()
def block_inputs(model: nn.Module, token_ids: Tensor) -> list[Tensor]:
    """What each MoE block of a transformers model is given for `token_ids` (pages, tokens).

    One tensor (pages x tokens, hidden) a layer, first layer first, the pages one after the other.
    The blocks stand at `model.model.layers[i].mlp`.
    """
    seen = []
    hooks = [
        decoder.mlp.register_forward_pre_hook(lambda _, given: seen.append(given[0].flatten(0, -2)))
        for decoder in model.model.layers
    ]
    try:
        model.model(input_ids=token_ids.to(model.device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def _linear(inputs: int, outputs: int, generator: torch.Generator) -> nn.Linear:
    linear = nn.Linear(inputs, outputs, bias=False, device="meta")
    linear.weight = nn.Parameter(torch.randn(outputs, inputs, generator=generator) / inputs**0.5)
    return linear


def _check_top_k(top_k: int, experts: int) -> None:
    if type(top_k) is not int or not 1 <= top_k <= experts:
        raise ValueError(f"top_k={top_k}: with {experts} experts it must be 1 to {experts}.")


def _weights_in(block: nn.Module) -> dict[str, Tensor]:
    """Views of a transformers block's tensors, under the names that a `MoELayer` has for them."""
    held = dict(block.state_dict(keep_vars=True))
    needed = ("gate.weight", "experts.gate_up_proj", "experts.down_proj")
    if set(held) != set(needed):
        raise ValueError(
            f"A {type(block).__name__} holds {_some(held)}, and a Mixtral block exactly "
            f"{', '.join(needed)}; take one of a Mixtral that is loaded in 16 or 32 bits."
        )
    router, gate_up, down = (held[name] for name in needed)
    experts, hidden = router.shape
    ffn = down.shape[-1]
    for name, needed_shape in (
        ("experts.gate_up_proj", (experts, 2 * ffn, hidden)),
        ("experts.down_proj", (experts, hidden, ffn)),
    ):
        if held[name].shape != needed_shape:
            raise ValueError(
                f"{name} has the shape {tuple(held[name].shape)}; with gate.weight "
                f"{tuple(router.shape)} and an expert width of {ffn} it must be {needed_shape}."
            )
    weights = {"router.weight": router}
    for expert in range(experts):
        weights[f"experts.{expert}.gate_proj.weight"] = gate_up[expert, :ffn]
        weights[f"experts.{expert}.up_proj.weight"] = gate_up[expert, ffn:]
        weights[f"experts.{expert}.down_proj.weight"] = down[expert]
    return weights


def _some(names) -> str:
    first = list(names)[:4]
    return ", ".join(first) + (", ..." if len(names) > len(first) else "")


@torch.no_grad()
def _check_behaviour(block: nn.Module) -> None:
    """ValueError unless the block's activation is silu and its router follows Mixtral's rule."""
    points = torch.linspace(-4, 4, 17)
    if not torch.allclose(block.experts.act_fn(points), F.silu(points)):
        raise ValueError(f"The experts' activation is {block.experts.act_fn}; this layer has silu.")
    router = block.gate.weight
    probes = torch.randn(64, router.shape[1], generator=torch.Generator().manual_seed(0))
    probes = probes.to(router)
    # Where one expert takes it all, every rule agrees: keep the logits moderate.
    probes /= F.linear(probes, router).std().clamp(min=1)
    logits, weights, chosen = block.gate(probes)
    expected = route(F.linear(probes, router), block.gate.top_k).gates
    seen = Routing(logits, weights.float(), chosen).gates
    if not torch.allclose(seen, expected, atol=1e-2, equal_nan=True):
        raise ValueError(
            f"{type(block.gate).__name__} weighs experts by another rule than Mixtral's (a softmax "
            "over all experts, the top_k kept and their weights divided by their sum)."
        )
