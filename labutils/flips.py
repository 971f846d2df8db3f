"""When a token changes its expert: routings recorded, compared, predicted, and replayed.

A router decides. Its logits move smoothly with whatever is disturbed, but the set of the `top_k`
largest does not: it stays as it is until two logits change places, and then a token *flips* to
another expert. How far it is from there is the *margin*, the gap between the smallest logit that is
chosen and the largest that is not.

With independent Gaussian noise of standard deviation s on each logit, two of them, a margin m
apart, change places with probability Phi(-m / (sqrt(2) s)), since the noise of a difference is
sqrt(2) times as large. With more experts there are more ways to flip; `flip_probability` has them
all.

A model is looked at through hooks on its routers. `record` keeps what they said, `replay` runs the
same text again with recorded decisions in their place, and `intercepted` is what both are made of.
It works for every model of transformers whose MoE blocks have a `gate` that returns (logits,
weights, chosen) beside their `experts`: Mixtral, OLMoE, Qwen3-MoE, DeepSeek-V2; stored in 16 bits
or in 4.

Replaying separates two things that quantization does: it changes what experts answer, and it
changes which experts are asked (the experiment of arXiv:2508.01625, table 1).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from .moe import Routing

STEPS = 145
LEAST = 1e-300  # a probability that may be divided by
VALUES_AT_ONCE = 2**20
RULE_TOLERANCE = 1e-2


@dataclass(frozen=True, eq=False)
class Flips:
    """What became of each token's experts, between a reference and another routing of it.

    Order is of size: the first expert is the one with the largest weight. All rates are shares of
    the tokens, between 0 and 1.
    """

    reference: Routing
    other: Routing

    @cached_property
    def kept(self) -> Tensor:
        """How many of a token's experts are still chosen, (tokens), 0 to top_k."""
        return (_members(self.reference) & _members(self.other)).sum(dim=-1)

    @property
    def set_changed(self) -> Tensor:
        """Whether a token has another set of experts, (tokens)."""
        return self.kept < self.reference.chosen.shape[1]

    @property
    def top1_changed(self) -> Tensor:
        """Whether a token has another first expert, (tokens); also where only the order changed."""
        return self.reference.chosen[:, 0] != self.other.chosen[:, 0]

    @property
    def order_changed(self) -> Tensor:
        """Whether a token has the same experts in another order, (tokens)."""
        differs = (self.reference.chosen != self.other.chosen).any(dim=-1)
        return differs & ~self.set_changed

    @property
    def flip_rate(self) -> float:
        """The share of tokens whose set of experts changed."""
        return _share(self.set_changed)

    @property
    def top1_flip_rate(self) -> float:
        return _share(self.top1_changed)

    @property
    def order_flip_rate(self) -> float:
        """The share of tokens whose experts are the same in another order: no flip of the set."""
        return _share(self.order_changed)

    @property
    def overlap(self) -> float:
        """The share of the choices that stayed: 1 where every token kept its set."""
        return self.kept.double().mean().item() / self.reference.chosen.shape[1]

    @cached_property
    def kl_by_token(self) -> Tensor:
        """KL divergence of the router's probabilities from the reference's, (tokens), in nats."""
        return divergence(self.reference.logits, self.other.logits)

    @property
    def kl(self) -> float:
        return self.kl_by_token.mean().item()

    @property
    def moves(self) -> Tensor:
        """How many choices went from one expert (row) to another (column), (experts, experts).

        The diagonal holds those that stayed. Where a token lost several experts, the largest lost
        one goes to the largest new one.
        """
        before, after = _members(self.reference), _members(self.other)
        lost = self.reference.chosen[~after.gather(1, self.reference.chosen)]
        gained = self.other.chosen[~before.gather(1, self.other.chosen)]
        experts = self.reference.experts
        moved = torch.bincount(lost * experts + gained, minlength=experts**2)
        return moved.view(experts, experts) + (before & after).sum(dim=0).diag()


def compare(reference: Routing, other: Routing) -> Flips:
    """How `other` routes the tokens that `reference` routed.

    >>> before = route(torch.tensor([[3.0, 2.0, 1.0], [3.0, 2.0, 1.0], [3.0, 2.0, 1.0]]), top_k=2)
    >>> after = route(torch.tensor([[3.0, 2.0, 1.0], [2.0, 3.0, 1.0], [3.0, 1.0, 2.0]]), top_k=2)
    >>> flips = compare(before, after)
    >>> flips.set_changed.tolist(), flips.order_changed.tolist(), flips.top1_changed.tolist()
    ([False, False, True], [False, True, False], [False, True, False])

    Raises ValueError unless both route the same number of tokens, at least one, to the same number
    of the same experts.
    """
    shapes = [
        (len(routing.chosen), routing.experts, routing.chosen.shape[1])
        for routing in (reference, other)
    ]
    if shapes[0] != shapes[1] or shapes[0][0] == 0:
        described = ["{} tokens to {} experts, {} each".format(*shape) for shape in shapes]
        raise ValueError(
            f"The reference routes {described[0]}, the other {described[1]}: "
            "record both on the same tokens, at least one, of the same model."
        )
    return Flips(reference, other)


def divergence(reference_logits: Tensor, logits: Tensor) -> Tensor:
    """The sum of p log(p / q), (...), in nats, in float64; the logits (..., choices) give p and q.

    0 where nothing changed and never negative (Kullback and Leibler 1951). What the reference holds
    impossible (a logit of minus infinity) counts nothing; logits that are NaN give NaN.
    """
    choices = logits.shape[-1]
    pieces = zip(
        *(
            each.reshape(-1, choices).split(max(1, VALUES_AT_ONCE // choices))
            for each in (reference_logits, logits)
        ),
        strict=True,
    )
    return torch.cat([_divergence(*pair) for pair in pieces]).view(logits.shape[:-1])


def _divergence(reference_logits: Tensor, logits: Tensor) -> Tensor:
    before, after = (each.double().log_softmax(dim=-1) for each in (reference_logits, logits))
    p = before.exp()
    return torch.where(p == 0, 0, p * (before - after)).sum(dim=-1).clamp(min=0)


def margins(routing: Routing) -> Tensor:
    """How far each token is from another set of experts, (tokens), in units of the logits; float64.

    The smallest chosen logit minus the largest that was not chosen: 0 at a tie, infinite where no
    other expert can be chosen, be it that all are or that the others' logits are minus infinity.
    """
    chosen = _members(routing)
    logits = routing.logits.double()
    inside = logits.masked_fill(~chosen, torch.inf).amin(dim=-1)
    outside = logits.masked_fill(chosen, -torch.inf).amax(dim=-1)
    return torch.where(outside == -torch.inf, torch.inf, inside - outside)


def flip_probability(routing: Routing, noise: float) -> Tensor:
    """How probably noise on the logits changes a token's set of experts, (tokens), in float64.

    The noise is Gaussian, of standard deviation `noise`, independent for each logit and of the
    logits. The set stays if the largest noisy logit outside it, of density f, is below all inside:
    the integral of f(t) times the product of Phi((logit - t) / noise) over the chosen, taken here
    at 145 points. With two experts it is Phi(-margin / (sqrt(2) noise)):

    >>> round(flip_probability(route(torch.tensor([[1.0, 0.0]]), top_k=1), noise=1.0).item(), 12)
    0.239750061093

    An expert whose logit is minus infinity is never chosen, with any noise. Tokens are worked on in
    pieces, so that their number does not decide on the memory.

    Raises ValueError for a negative noise.
    """
    if not noise >= 0:
        raise ValueError(f"noise={noise}: a standard deviation is 0 or larger.")
    margin = margins(routing)
    if noise == 0:
        return torch.zeros_like(margin)
    piece = max(1, VALUES_AT_ONCE // (STEPS * routing.experts))
    pieces = zip(
        (routing.logits.double() / noise).split(piece), _members(routing).split(piece), strict=True
    )
    flips = 1 - torch.cat([_stays(scaled, chosen) for scaled, chosen in pieces])
    return torch.where(margin == torch.inf, 0, flips).clamp(0, 1)


def _stays(scaled: Tensor, chosen: Tensor) -> Tensor:
    """The probability that a token keeps its set: logits over noise, chosen (tokens, experts)."""
    largest = scaled.masked_fill(chosen, -torch.inf).amax(dim=-1, keepdim=True)
    steps = torch.linspace(-9, 9, STEPS, dtype=torch.float64, device=scaled.device)
    distance = (largest - scaled)[:, None] + steps[:, None]
    inside = chosen[:, None]
    in_place = torch.special.ndtr(torch.where(inside, -distance, distance)).clamp(min=LEAST)
    density = (-(distance**2) / 2).exp() / (2 * torch.pi) ** 0.5
    hazard = (density / in_place).masked_fill(inside, 0).sum(dim=-1)
    return torch.trapezoid(hazard * in_place.prod(dim=-1), steps, dim=-1)


def reroute(routing: Routing, logits: Tensor) -> Routing:
    """What the same router would have decided with other `logits` (tokens, experts).

    Its rule is read from what it did: the weights of the `top_k` most probable experts are their
    probabilities, divided by their sum (Mixtral, Qwen3-MoE) or as they are (OLMoE), whichever is
    nearer to what is seen.

    Raises ValueError for a router that chooses or weighs its experts in another way, and for logits
    of another shape.
    """
    if logits.shape != routing.logits.shape:
        raise ValueError(
            f"The new logits have shape {tuple(logits.shape)}, the router's have "
            f"{tuple(routing.logits.shape)}: give one for each token and expert."
        )
    top_k, dtype = routing.chosen.shape[1], routing.weights.dtype

    def error(divided: bool) -> float:
        expected = _decided(routing.logits, top_k, divided, dtype).weights
        errors = (routing.weights - expected).abs()
        return errors.max().item() if errors.numel() else 0.0

    errors = {divided: error(divided) for divided in (True, False)}
    divided = min(errors, key=errors.get)
    if not errors[divided] <= RULE_TOLERANCE:
        raise ValueError(
            "The router's weights are neither the largest probabilities of its experts nor those "
            "divided by their sum: what it would decide on other logits is not known here."
        )
    return _decided(logits, top_k, divided, dtype)


def _decided(logits: Tensor, top_k: int, divided: bool, dtype: torch.dtype) -> Routing:
    weights, chosen = logits.float().softmax(dim=-1).topk(top_k, dim=-1)
    if divided:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    return Routing(logits, weights.to(dtype), chosen)


@dataclass(frozen=True, eq=False)
class Recording:
    """One reading of a text: what was read, what the routers said, and what the model answered.

    `token_ids` (pages, tokens), `routings` one for each MoE layer with the pages one after the
    other, (pages x tokens), and `logits` (pages, tokens, vocabulary). All of it on the CPU.
    """

    token_ids: Tensor
    routings: tuple[Routing, ...]
    logits: Tensor


def record(model: nn.Module, token_ids: Tensor) -> Recording:
    """Read `token_ids` (pages, tokens), all in one pass, and keep what each router said.

    Pages without padding: every token that is given is read, and counted.

    >>> record(model, token_ids).routings[0].chosen.shape  # 8 pages of 256 tokens, 2 of 8 experts
    torch.Size([2048, 2])

    Raises ValueError for a model without routers that are known here (see the module) or without
    logits, and for token ids of another shape.
    """
    return _read(model, token_ids, lambda _layer, routing: routing)


def replay(model: nn.Module, recording: Recording) -> Recording:
    """Read the recorded text again, with the recorded experts and weights in every layer.

    The routers are still asked: the new recording's `routings` are what they would have decided,
    given all that came before, and its `logits` what the model made of the old decisions. Replaying
    what the model itself decided gives exactly its own logits. (Not to the last bit where a token
    goes to more than two experts of DeepSeek-V2, whose router leaves them unsorted.)

    Raises ValueError if the recording is of a model with another number of MoE layers or experts,
    or of another number of tokens than it says.
    """
    _check_fits(model, recording)

    def as_recorded(layer: int, routing: Routing) -> Routing:
        recorded = _on(recording.routings[layer], routing.logits.device)
        weights = recorded.weights.to(routing.weights.dtype)
        return Routing(recorded.logits, weights, recorded.chosen)

    return _read(model, recording.token_ids, as_recorded)


def _read(
    model: nn.Module, token_ids: Tensor, decide: Callable[[int, Routing], Routing]
) -> Recording:
    """What the routers said, and what the model answered where `decide` had the last word."""
    said: list[Routing] = []

    def intercept(layer: int, routing: Routing) -> Routing:
        said.append(routing)
        return decide(layer, routing)

    with intercepted(model, intercept):
        logits = _answer(model, token_ids)
    read = token_ids.to("cpu", copy=True)
    return Recording(read, tuple(_on(routing, "cpu") for routing in said), logits)


@contextmanager
def intercepted(model: nn.Module, intercept: Callable[[int, Routing], Routing]) -> Iterator[None]:
    """Inside, `intercept(layer, routing)` has the last word on what each router decides.

    `layer` counts the MoE layers from 0. What it returns is used by the experts; returned as it
    came, nothing changes. No hook stays behind, after an error either.

    Raises ValueError, in the model's forward pass, for a decision that is no `Routing` of the
    same tokens and experts.

    Example: the least probable experts instead of the most probable ones.

        with intercepted(model, lambda layer, routing: reroute(routing, -routing.logits)):
            model(token_ids)
    """

    def hook_of(layer: int):
        def hook(router: nn.Module, _given, answer):
            routing = _routing_of(router, answer)
            decided = intercept(layer, routing)
            if decided is not routing:
                _check_decision(layer, routing, decided)
                return decided.logits, decided.weights, decided.chosen

        return hook

    blocks = moe_blocks(model)
    handles = []
    try:
        for layer, block in enumerate(blocks):
            handles.append(block.gate.register_forward_hook(hook_of(layer)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def moe_blocks(model: nn.Module) -> list[nn.Module]:
    """The MoE block of each layer that has one: the modules with a `gate` beside their `experts`.

    Raises ValueError if there is none.
    """
    found = [
        module
        for module in model.modules()
        if {"gate", "experts"} <= {name for name, _ in module.named_children()}
    ]
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no block with a `gate` beside its `experts`; routings can "
            "be recorded of Mixtral, OLMoE, Qwen3-MoE and DeepSeek-V2 models of transformers 5."
        )
    return found


def _routing_of(router: nn.Module, answer) -> Routing:
    """A router's answer as a record, the largest weight first."""
    if not isinstance(answer, tuple) or len(answer) != 3:
        raise ValueError(
            f"{type(router).__name__} does not return (logits, weights, chosen) as the routers of "
            "Mixtral, OLMoE and Qwen3-MoE do; its routing cannot be recorded."
        )
    logits, weights, chosen = answer
    if (weights.diff(dim=-1) > 0).any():
        weights, order = weights.sort(dim=-1, descending=True, stable=True)
        chosen = chosen.gather(1, order)
    return Routing(logits, weights, chosen)


def _check_decision(layer: int, routing: Routing, decided: Routing) -> None:
    if not isinstance(decided, Routing):
        raise ValueError(
            f"In layer {layer} the intercept returned {decided!r}; it must return a Routing, the "
            "one it was given or another."
        )
    for name in ("logits", "weights", "chosen"):
        wanted, found = getattr(routing, name).shape, getattr(decided, name).shape
        if wanted != found:
            raise ValueError(
                f"In layer {layer} the intercept returned {name} of shape {tuple(found)}; the "
                f"router decided {tuple(wanted)}."
            )
    if decided.chosen.numel():
        first, last = (end.item() for end in decided.chosen.aminmax())
        if first < 0 or last >= routing.experts:
            raise ValueError(
                f"In layer {layer} the intercept chose experts {first} to {last}; there are 0 to "
                f"{routing.experts - 1}."
            )


def _check_fits(model: nn.Module, recording: Recording) -> None:
    here = [block.gate.weight.shape[0] for block in moe_blocks(model)]
    there = [routing.experts for routing in recording.routings]
    if here != there:
        raise ValueError(
            f"The recording has {len(there)} MoE layers with {there} experts, this model "
            f"{len(here)} with {here}: replay what the same architecture decided."
        )
    tokens = {len(routing.chosen) for routing in recording.routings}
    if tokens != {recording.token_ids.numel()}:
        raise ValueError(
            f"The recording is of {sorted(tokens)} routed tokens and {recording.token_ids.numel()} "
            "token ids: replay it on the text that it was recorded on."
        )


@torch.no_grad()
def _answer(model: nn.Module, token_ids: Tensor) -> Tensor:
    if token_ids.dim() != 2 or not token_ids.numel():
        raise ValueError(
            f"The token ids have shape {tuple(token_ids.shape)}: give (pages, tokens), at least "
            "one of each."
        )
    answer = model(input_ids=token_ids.to(model.device), use_cache=False)
    if not hasattr(answer, "logits"):
        raise ValueError(
            f"{type(model).__name__} gives no logits; load it with its output head, as "
            "AutoModelForCausalLM does."
        )
    return answer.logits.cpu()


def _on(routing: Routing, device) -> Routing:
    return Routing(routing.logits.to(device), routing.weights.to(device), routing.chosen.to(device))


def _members(routing: Routing) -> Tensor:
    """Which experts a token is sent to, (tokens, experts), as booleans."""
    nowhere = torch.zeros_like(routing.logits, dtype=torch.bool)
    return nowhere.scatter(1, routing.chosen, True)


def _share(which: Tensor) -> float:
    return which.double().mean().item()
