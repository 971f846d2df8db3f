"""What a recipe costs a model, measured in one go: bits, loss, answers, and each expert's error.

A `Probe` holds a model, some held-out text, and what the undisturbed model makes of it. Asked for
the damage of a recipe it simulates the recipe, reads the same text again, and puts the weights
back. So recipes can be tried by the dozen, and each is held against the same reference.

The error of an expert is that of its answers: over the tokens that the undisturbed router sends to
it, the length of the change over the length of the answer. That is what rounding does to this
expert alone; what reaches the next layer has gone through the others too.
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch

from . import languages
from .budget import weight_bytes, weights_in
from .evaluate import cross_entropy, right_answers
from .formats import FORMATS, relative_error
from .moe import MoELayer, block_inputs, route
from .recipes import Recipe, simulated


@dataclass(frozen=True, eq=False)
class Damage:
    """What a model does under one recipe.

    `bits_per_weight` is that of the weights that the recipe quantizes, constants counted, were they
    stored; `accuracy` (languages) the share of right answers; `expert_errors` (layers, experts).
    """

    bits_per_weight: float
    nats_per_token: float
    accuracy: pd.Series
    expert_errors: np.ndarray


@dataclass(frozen=True, eq=False)
class Duty:
    """What one expert is given, (tokens, hidden), and what it answers undisturbed."""

    inputs: torch.Tensor
    answers: torch.Tensor


class Probe:
    """A model and a reference to hold its damage against.

    `model` is a Mixtral of transformers in 16 or 32 bits; in float32 nothing but the recipe rounds
    its weights. `pages` held-out pages of 256 tokens and `examples` held-out questions of each
    language are read for every recipe: with the stand-in half a second on two processor cores.
    `duties` holds what each expert of each layer is given for the pages.
    """

    @torch.no_grad()
    def __init__(self, model, tokenizer, pages: int = 8, examples: int = 16):
        if pages < 1 or examples < 1:
            raise ValueError(f"pages={pages}, examples={examples}: at least 1 of each is needed.")
        self.model, self.tokenizer = model, tokenizer
        generator = torch.Generator().manual_seed(0)
        self._pages = languages.pages(pages, generator, held_out=True)
        self._examples = [
            example
            for name in languages.LANGUAGES
            for example in languages.held_out_examples(name, examples, generator)
        ]
        token_ids = tokenizer(self._pages, return_tensors="pt")["input_ids"]
        self.duties = [
            _duties(layer, inputs)
            for layer, inputs in zip(self._layers(), block_inputs(model, token_ids), strict=True)
        ]
        self.undisturbed = self._measure(bits_per_weight=8.0 * model.dtype.itemsize)

    def damage(self, recipe: Recipe) -> Damage:
        """What the model does under `recipe`, *simulated*; the model is unchanged afterwards.

        Raises ValueError for an override that fits no part of the model.
        """
        with simulated(self.model, recipe):
            return self._measure(bits_per_weight=self._bits_per_weight(recipe))

    @torch.no_grad()
    def _measure(self, bits_per_weight: float) -> Damage:
        right = pd.Series(right_answers(self.model, self.tokenizer, self._examples))
        names = pd.Index([example.language for example in self._examples], name="language")
        errors = [
            [
                relative_error(duty.answers, expert(duty.inputs))
                for expert, duty in zip(layer.experts, duties, strict=True)
            ]
            for layer, duties in zip(self._layers(), self.duties, strict=True)
        ]
        nats = cross_entropy(self.model, self.tokenizer, self._pages).nats_per_token
        accuracy = right.groupby(names, sort=False).mean()
        return Damage(bits_per_weight, nats, accuracy, np.array(errors))

    def _bits_per_weight(self, recipe: Recipe) -> float:
        quantized = [
            weight
            for weight in weights_in(self.model)
            if (format := recipe.format_of(weight.part)) and FORMATS[format].scaled
        ]
        stored_bytes = sum(weight_bytes(weight, recipe) for weight in quantized)
        return 8 * stored_bytes / max(1, sum(weight.parameters for weight in quantized))

    def _layers(self) -> list[MoELayer]:
        return [MoELayer.from_transformers(layer.mlp) for layer in self.model.model.layers]


def _duties(layer: MoELayer, inputs: torch.Tensor) -> list[Duty]:
    """The duty of each expert of a layer that is given `inputs` (tokens, hidden)."""
    chosen = route(layer.router(inputs), layer.top_k).chosen
    own = [inputs[(chosen == index).any(dim=1)] for index in range(len(layer.experts))]
    return [Duty(x, expert(x)) for x, expert in zip(own, layer.experts, strict=True)]
