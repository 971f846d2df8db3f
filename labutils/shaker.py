"""One part of a model disturbed, and what becomes of it: its flips, and beside them the damage.

A `Shaker` holds a model, an exam, and what the undisturbed model makes of it. Asked to `shake`, it
disturbs one part, reads the exam once, and puts everything back. Disturbances are of two kinds:

- `noise`, relative: Gaussian, with `noise` times the root mean square of what it is added to (a
  matrix, an expert's gate and up as one, a token's state), or the standard deviation of a layer's
  router logits, to which a common shift means nothing. So parts of different size and scale are
  disturbed alike. It is drawn once for each place and then scaled, so that more of it is the same,
  and more.
- `bits`: weights rounded to integers of so many bits, *simulated*, as `Recipe` stores them: in
  blocks of 64 with a maximum in float32 each, 8 bits by row. No double quantization, whose 1 KiB a
  matrix is more than a small router has to save.

They are put on

- `router`, `experts`, `attention`: weights;
- `router logits`: what the routers say, after their weights;
- `hidden states`: what each MoE block is given, router and experts alike;
- `as many expert weights`: the control. In each layer as many weights as its router has, drawn at
  random among those of its experts.
"""

import math
import statistics
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from . import languages
from .anatomy import part_of
from .evaluate import Exam, Interval, exam, kl_by_token, mean_intervals, nats_by_token
from .flips import Flips, Recording, compare, intercepted, moe_blocks, record, reroute
from .formats import FORMATS
from .moe import Routing
from .recipes import Recipe, rounded, simulated

WEIGHTS = ("router", "experts", "attention")
CONTROL = "as many expert weights"
WHAT = (*WEIGHTS, "router logits", "hidden states", CONTROL)
ROUNDED_TENSORS = 128  # of some recipes: what a recipe shares with one just tried is not made again


@dataclass(frozen=True)
class Disturbance:
    """What is disturbed, and how much: relative `noise`, or weights rounded to `bits`.

    `layer` and `expert` say where; None is everywhere.

    >>> print(Disturbance("experts", bits=3, layer=2, expert=5))
    expert 5 of layer 2 in 3 bits

    Raises ValueError for what cannot be disturbed that way.
    """

    what: str
    noise: float = 0.0
    bits: int | None = None
    layer: int | None = None
    expert: int | None = None

    def __post_init__(self):
        if self.what not in WHAT:
            raise ValueError(f"{self.what!r} cannot be disturbed; {', '.join(WHAT)} can.")
        for name in ("bits", "layer", "expert"):
            if not isinstance(getattr(self, name), int | None) or getattr(self, name) is True:
                raise ValueError(f"{name}={getattr(self, name)!r}: a whole number, or None.")
        if not 0 <= self.noise < math.inf:
            raise ValueError(f"noise={self.noise}: relative noise is 0 or larger, and finite.")
        if self.expert is not None and self.what != "experts":
            raise ValueError(f"expert={self.expert} says which of the experts, not of {self.what}.")
        if self.bits is not None and (self.noise or self.what not in WEIGHTS):
            raise ValueError("Only weights are rounded, and rounded weights get no noise.")
        if self.bits is not None and f"int{self.bits}" not in FORMATS:
            raise ValueError(f"bits={self.bits}: weights are rounded to 2 to 8 bits.")

    def recipe(self, dtype: torch.dtype = torch.float32) -> Recipe:
        """What rounds the weights in this way, and leaves all else in `dtype`.

        Raises ValueError for noise, which no recipe has, and for a dtype that is no format.
        """
        kept = next((name for name, format in FORMATS.items() if format.dtype == dtype), None)
        if self.bits is None or kept is None:
            raise ValueError(f"{self}, all else in {dtype}: no recipe stores weights like that.")
        layer = "*" if self.layer is None else self.layer
        path = f"layers.{layer}.{self.what}" + ("" if self.expert is None else f".{self.expert}")
        return Recipe.keeping(kept, double_quant=False, overrides={path: f"int{self.bits}"})

    def __str__(self):
        what = self.what if self.expert is None else f"expert {self.expert}"
        everywhere = "" if self.expert is None else " of every layer"
        place = what + (everywhere if self.layer is None else f" of layer {self.layer}")
        if self.bits is not None:
            return f"{place} in {self.bits} bits"
        return f"{100 * self.noise:g}% noise on {place}"


@dataclass(frozen=True)
class Intervals:
    """Intervals over pages of what a disturbance did; shares, and nats per token.

    The rates by layer are those of the kinds of flips, of which a token has at most one of the
    first two: another set, the same set in another order, another first expert.
    """

    flip_rate: Interval
    kl: Interval
    loss_rise: Interval
    set_changed: tuple[Interval, ...]
    order_changed: tuple[Interval, ...]
    top1_changed: tuple[Interval, ...]


@dataclass(frozen=True, eq=False)
class Shaken:
    """What a model did on an exam while it was disturbed, beside what it does undisturbed.

    Disturbed it was by a `Disturbance`, or by a `Recipe` that its weights were rounded to.

    `flips` has one record a layer; `kl` and `reference_nats`, `nats` are by token, (pages, tokens)
    and (pages, tokens - 1), in nats; `right` and `reference_right` say which answers are right.
    """

    disturbance: Disturbance | Recipe
    exam: Exam
    flips: tuple[Flips, ...]
    kl: Tensor
    nats: Tensor
    reference_nats: Tensor
    right: np.ndarray
    reference_right: np.ndarray

    @cached_property
    def set_changed(self) -> Tensor:
        """Whether each token flipped, (pages, layers, tokens)."""
        pages, tokens = self.exam.token_ids.shape
        changed = [flips.set_changed.view(pages, tokens) for flips in self.flips]
        return torch.stack(changed, dim=1)

    @property
    def flip_rate(self) -> float:
        """The share of tokens whose set of experts changed, over all layers."""
        return self.set_changed.double().mean().item()

    @property
    def loss_rise(self) -> float:
        """How much the cross-entropy rose, in nats per token."""
        return (self.nats - self.reference_nats).mean().item()

    @property
    def accuracy(self) -> float:
        return float(self.right.mean())

    @property
    def answers_kept(self) -> bool:
        """Whether no answer was lost that is right undisturbed."""
        return bool((self.right >= self.reference_right).all())

    @cached_property
    def intervals(self) -> Intervals:
        """How other pages might have come out.

        Raises ValueError for an exam of one page, which has none.
        """
        pages, layers = len(self.kl), len(self.flips)
        kinds = [
            getattr(flips, kind).view(pages, -1)
            for kind in ("set_changed", "order_changed", "top1_changed")
            for flips in self.flips
        ]
        whole = (self.set_changed.flatten(1), self.kl, self.nats - self.reference_nats)
        means = [values.double().mean(dim=1) for values in (*whole, *kinds)]
        flip_rate, kl, loss_rise, *by_layer = mean_intervals(torch.stack(means, dim=1).numpy())
        rates = [tuple(by_layer[start : start + layers]) for start in range(0, 3 * layers, layers)]
        return Intervals(flip_rate, kl, loss_rise, *rates)

    @property
    def flips_by_language(self) -> pd.DataFrame:
        """Flip rates of sets by layer (rows) and the language of a token (columns).

        NaN for a language that stands on none of the pages.
        """
        names = self.exam.languages.ravel()
        columns = {
            language: [
                flips.set_changed[torch.from_numpy(names == language)].double().mean().item()
                for flips in self.flips
            ]
            for language in languages.LANGUAGES
        }
        return pd.DataFrame(columns).rename_axis(index="layer", columns="language")


class Shaker:
    """A model to be disturbed, and an exam of `pages` pages of 256 tokens.

    The pages hold lines that training never showed, unless `held_out` is False: then they are of
    those it did show, to choose by, so that the held-out ones can judge the choice.

    `model` is a Mixtral, OLMoE or Qwen3-MoE of transformers with experts in every layer. Noise is
    put on weights that are kept in 16 or 32 bits, and on router logits and hidden states also in a
    model stored in 4; bits are taken from a model that is in 16 or 32 as a whole. The pages are
    always the same, the noise is drawn from `generator`.

    Take `model.float()`: bfloat16 swallows noise of less than about a percent, and its rounding
    alone, once anything has changed, flips some tokens in a thousand.

    Raises ValueError for a model in training mode, which may read the same text differently each
    time, for one that has layers without experts, and for one whose logits are not finite.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer,
        pages: int = 8,
        generator: torch.Generator | None = None,
        held_out: bool = True,
    ):
        _check_model(model)
        drawn = languages.pages(pages, torch.Generator().manual_seed(0), held_out=held_out)
        self.model, self.exam = model, exam(tokenizer, drawn)
        self.reference: Recording = record(model, self.exam.token_ids)
        _check_finite(self.reference.logits)
        self._nats = nats_by_token(self.reference.logits, self.exam.token_ids)
        self._right = self.exam.right(self.reference.logits)
        generator = generator or torch.Generator().manual_seed(0)
        self._seed = int(torch.randint(2**31, (), generator=generator))
        self._rounded = lru_cache(ROUNDED_TENSORS)(partial(rounded, model))
        self._drawn: dict[tuple[str, torch.Size], Tensor] = {}

    def shake(self, disturbance: Disturbance) -> Shaken:
        """What the model does under `disturbance`; afterwards it is what it was, to the last bit.

        Raises ValueError for a layer or an expert that the model has not, and for weights that are
        stored in 4 or 8 bits.
        """
        with self.disturbed(disturbance):
            seen = record(self.model, self.exam.token_ids)
        return self.judged(disturbance, seen)

    def simulate(self, recipe: Recipe, calibration: Tensor | None = None) -> Shaken:
        """What the model does with its weights rounded as `recipe` says, *simulated*.

        `calibration` are the token ids (pages, tokens) for a recipe that rounds by GPTQ or AWQ.

        Raises ValueError for an override that fits no part of the model, and without calibration
        where it is needed.
        """
        with simulated(self.model, recipe, calibration, self._rounded):
            seen = record(self.model, self.exam.token_ids)
        return self.judged(recipe, seen)

    def takes_noise(self, weights: str) -> bool:
        """Whether all of "router", "experts" or "attention" is stored in 16 or 32 bits."""
        return all(
            parameter.is_floating_point()
            for name, parameter in self.model.named_parameters()
            if part_of(name).component == weights
        )

    def judged(self, disturbance: Disturbance | Recipe, seen: Recording) -> Shaken:
        """What `seen`, a reading of the exam, differs in from the undisturbed reading."""
        pairs = zip(self.reference.routings, seen.routings, strict=True)
        return Shaken(
            disturbance,
            self.exam,
            tuple(compare(before, after) for before, after in pairs),
            kl_by_token(self.reference.logits, seen.logits),
            nats_by_token(seen.logits, self.exam.token_ids),
            self._nats,
            self.exam.right(seen.logits),
            self._right,
        )

    @contextmanager
    def disturbed(self, disturbance: Disturbance) -> Iterator[None]:
        """Inside, the model is disturbed; on leaving, after an error too, it is as it was."""
        self._check_place(disturbance)
        if disturbance.bits is not None:
            recipe = disturbance.recipe(self.model.dtype)
            changes = simulated(self.model, recipe, rounding=self._rounded)
        elif disturbance.noise == 0:
            changes = nullcontext()
        elif disturbance.what == "router logits":
            changes = intercepted(self.model, self._noisy_logits(disturbance))
        elif disturbance.what == "hidden states":
            changes = self._noisy_states(disturbance)
        else:
            changes = self._noisy_weights(disturbance)
        with changes:
            yield

    def _check_place(self, disturbance: Disturbance) -> None:
        layers, experts = len(self.reference.routings), self.reference.routings[0].experts
        for name, index, count in (
            ("layer", disturbance.layer, layers),
            ("expert", disturbance.expert, experts),
        ):
            if index is not None and not 0 <= index < count:
                raise ValueError(f"{name}={index}: this model has {name}s 0 to {count - 1}.")

    def _noisy_logits(self, disturbance: Disturbance) -> Callable[[int, Routing], Routing]:
        def intercept(layer: int, routing: Routing) -> Routing:
            if disturbance.layer not in (None, layer):
                return routing
            logits = routing.logits
            unit = self._unit(f"router logits {layer}", logits)
            return reroute(routing, logits + disturbance.noise * logits.std() * unit)

        return intercept

    @contextmanager
    def _noisy_states(self, disturbance: Disturbance) -> Iterator[None]:
        def hook_of(layer: int):
            def hook(_block, given):
                states, *others = given
                unit = self._unit(f"hidden states {layer}", states)
                return (states + disturbance.noise * _size(states, -1) * unit, *others)

            return hook

        with ExitStack() as hooks:
            for layer, block in enumerate(moe_blocks(self.model)):
                if disturbance.layer in (None, layer):
                    hooks.callback(block.register_forward_pre_hook(hook_of(layer)).remove)
            yield

    @contextmanager
    def _noisy_weights(self, disturbance: Disturbance) -> Iterator[None]:
        places = self._matrices(disturbance)
        originals = [weight.clone() for _, weight in places]
        try:
            for name, weight in places:
                noise = self._unit(name, weight) * self._share(disturbance, name, weight)
                weight.add_(noise * _size(weight, (-2, -1)), alpha=disturbance.noise)
            yield
        finally:
            for (_, weight), original in zip(places, originals, strict=True):
                weight.copy_(original)

    def _matrices(self, disturbance: Disturbance) -> list[tuple[str, Tensor]]:
        """The matrices that noise is put on, or on some of whose places, by their names."""
        component = "experts" if disturbance.what == CONTROL else disturbance.what
        places = [
            (name, parameter.detach())
            for name, parameter in self.model.named_parameters()
            if (part := part_of(name)).component == component
            and disturbance.layer in (None, part.layer)
            and (disturbance.expert is None or part.expert in (None, disturbance.expert))
            and parameter.dim() > 1
        ]
        for name, weight in places:
            if not weight.is_floating_point():
                raise ValueError(
                    f"{name} is stored as {weight.dtype}, to which no noise can be added; load the "
                    "model with that part in 16 bits."
                )
        return places

    def _share(self, disturbance: Disturbance, name: str, weight: Tensor) -> Tensor | float:
        """1 where a weight is disturbed and 0 where it is not."""
        if disturbance.expert is not None and weight.dim() == 3:
            places = torch.zeros(len(weight), 1, 1, dtype=weight.dtype, device=weight.device)
            places[disturbance.expert] = 1
            return places
        if disturbance.what == CONTROL:
            block = moe_blocks(self.model)[part_of(name).layer]
            whole = sum(each.numel() for each in block.experts.parameters())
            limit = statistics.NormalDist().inv_cdf(block.gate.weight.numel() / whole)
            return (self._unit(f"places in {name}", weight) < limit).to(weight.dtype)
        return 1.0

    def _unit(self, name: str, like: Tensor) -> Tensor:
        """Standard normal noise of the shape of `like`, always the same for the same name."""
        place = name, like.shape
        if place not in self._drawn:
            generator = torch.Generator().manual_seed(self._seed + zlib.crc32(name.encode()))
            self._drawn[place] = torch.randn(like.shape, generator=generator)
        return self._drawn[place].to(like)


def _check_model(model: nn.Module) -> None:
    if model.training:
        raise ValueError("The model is in training mode; call model.eval() first.")
    blocks, layers = len(moe_blocks(model)), model.config.num_hidden_layers
    if blocks != layers:
        raise ValueError(
            f"{blocks} of the model's {layers} layers have experts; a shaker wants them in all, so "
            "that a layer has one number."
        )


def _check_finite(logits: Tensor) -> None:
    if wrong := int((~logits.isfinite()).sum()):
        raise ValueError(
            f"{wrong:,} of the undisturbed model's {logits.numel():,} logits are not finite: its "
            "weights, or their dtype, are broken before anything is disturbed."
        )


def _size(values: Tensor, dim) -> Tensor:
    """The root mean square over `dim`, which is kept."""
    return values.float().square().mean(dim=dim, keepdim=True).sqrt().to(values.dtype)
