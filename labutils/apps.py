"""Controls wired to computations and figures: what moves under the reader's hand, or by itself.

An app is a box with its controls on top, one figure, and a line that says what went wrong. The
figure is a widget that is made once and then changed in place, since each new one ships its own
copy of plotly to the page. A module below computes, one of the figures' modules draws, `redraw`
carries the picture into the widget, and an `ErrorLine` shows what Jupyter would swallow, while the
last good picture stays. An app can be driven without a browser: set a control's `.value`, read the
figure's `.data`.
"""

from __future__ import annotations

import html
import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache

import ipywidgets as widgets
import numpy as np
import pandas as pd
import torch

from .budget import budget_of, weights_in
from .calibrated import Rounder, expert_statistics, round_expert
from .cost_figures import damage_view, threshold_view
from .damage import Damage
from .figures import cache_growth
from .format_figures import rounding_chart
from .formats import BLOCK_SIZES, MICROSCALED, Rounding, quantize, relative_error
from .layer_figures import parameters_by_experts, routing_map
from .ledger import Ledger
from .memory_chart import memory_chart
from .meter import MIB, Meter, Record
from .moe import MoELayer, Routing, route
from .outliers import int8_product
from .plan_figures import memory_of
from .planner import CARDS, Card, Machine, plan
from .recipe_figures import mixture_view
from .recipes import Recipe
from .rounding_figures import calibration_view
from .shaker import CONTROL, WEIGHTS, Disturbance, Shaker
from .shaker_figures import shaken_view
from .style import Figure, FigureWidget, changeable

_DRAWING = threading.RLock()


class ErrorLine(widgets.HTML):
    """The place under an app that says what went wrong, and is empty while all is well.

    >>> line = ErrorLine()
    >>> with line.shown():
    ...     int("seven")
    >>> "invalid literal" in line.value
    True
    """

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Shows here what the block raises, instead of raising it; without that, clears the line.

        KeyboardInterrupt and its like still go through.
        """
        try:
            yield
        except Exception as error:
            message = html.escape(f"{type(error).__name__}: {error}")
            self.value = f'<pre style="color: #A4262C; white-space: pre-wrap">{message}</pre>'
        else:
            self.value = ""


def redraw(shown: FigureWidget, figure: Figure) -> None:
    """Changes the shown figure into `figure`, which has the same traces, in one step.

    The reader's zoom stays where `figure` sets no range. Threads may call this at the same time:
    without taking turns they would lose each other's changes. Plotly gets only what differs, since
    it takes its time over each entry, and never the template: comparing that costs a quarter of a
    second.

    Raises ValueError if the number of traces differs.
    """
    layout = figure.layout.to_plotly_json()
    lists = {name: layout.pop(name, ()) for name in ("shapes", "annotations")}
    layout.pop("template", None)
    with _DRAWING, shown.batch_update():
        for old, new in zip(shown.data, figure.data, strict=True):
            _set_differing(old, old.to_plotly_json(), new.to_plotly_json())
        _set_differing(shown.layout, shown.layout.to_plotly_json(), layout)
        for name, items in lists.items():
            shown.layout[name] = items


def _set_differing(part, old: Mapping, new: Mapping) -> None:
    """Gives `part` of a figure, whose entries are `old`, those of `new` that are not the same.

    Plotly's own `update` looks up each name first, which takes longer than all else here. Entry by
    entry it must be: a page refuses `marker` of one trace together with `marker.color` of another.
    """
    for name, value in new.items():
        before = old.get(name)
        if isinstance(value, dict):
            _set_differing(part[name], before or {}, value)
        elif isinstance(value, np.ndarray) or type(value) is not type(before) or value != before:
            part[name] = value


def _box(
    controls: Sequence[widgets.Widget], picture: Callable[[], Figure], *beside: widgets.Widget
) -> widgets.VBox:
    """Controls over the picture that they make, which is drawn again whenever one of them moves.

    What stands `beside` the controls changes nothing. Only one picture is made at a time.
    """
    with _DRAWING:
        chart, errors = changeable(picture()), ErrorLine()

    def draw(_change) -> None:
        with _DRAWING, errors.shown():
            redraw(chart, picture())

    for control in controls:
        control.observe(draw, names="value")
    in_rows = widgets.HBox([*controls, *beside], layout={"flex_flow": "row wrap"})
    return widgets.VBox([in_rows, chart, errors])


def live_memory(meter: Meter) -> widgets.VBox:
    """A chart of what `meter` records, which grows while other cells run.

    Show it in one cell and record in later ones: a page redraws during a cell only what an earlier
    cell has shown. It is redrawn at most 5 times a second and at the end of each run; see
    `memory_chart` for what it shows. What goes wrong in drawing stands below the chart,
    and the recording goes on. The chart's own data counts too: about 1 MiB in the first run, a
    quarter of it in later ones.

    Example, two cells:

        meter = Meter()
        live_memory(meter)

        with meter("load in NF4", predicted_bytes=budget.total_bytes):
            model = load(path, recipe)
    """
    chart = changeable(_chart_of(meter.record()))
    errors = ErrorLine()

    def draw(record: Record) -> None:
        with errors.shown():
            redraw(chart, _chart_of(record))

    meter.listen(draw)
    return widgets.VBox([chart, errors])


def _chart_of(record: Record) -> Figure:
    return memory_chart(record.samples, record.runs)


def kv_cache(weights_bytes: int, token_bytes: int, rooms: dict[str, int]) -> widgets.VBox:
    """Weights and KV cache under the reader's hand: how long a context, how many sequences.

    `token_bytes` is what one token of one sequence adds; `rooms` are the memories to hold it
    against, in bytes by name. It starts with one sequence of 32,768 tokens.

    Example: `kv_cache(budget.weights_bytes, kv_cache_bytes(config, 1), {"24 GiB": 24 * 2**30})`.
    """
    context = widgets.SelectionSlider(
        options=[(f"{2**power:,}", 2**power) for power in range(9, 18)],
        value=2**15,
        description="context",
        continuous_update=False,
    )
    batch = widgets.IntSlider(1, 1, 32, description="sequences", continuous_update=False)

    def picture() -> Figure:
        return cache_growth(weights_bytes, token_bytes * batch.value, context.value, rooms)

    return _box([context, batch], picture)


# --------------------------------------------------------------------------- routing and parameters

_EXPERT_NUMBERS = (1, 2, 4, 8, 16, 32, 64, 128)


def parameters(ledgers: Mapping[str, Ledger]) -> widgets.VBox:
    """Large and cheap under the reader's hand: how many experts, how many of them for a token.

    `ledgers` are models by name; of each only the number of experts changes, to powers of two up to
    128. It starts with the first model; each model comes with the number that it has, or nearly so.

    Example: `parameters({"Mixtral-8x7B": ledger_of(PUBLISHED["Mixtral-8x7B"])})`.
    """
    model = widgets.Dropdown(options=list(ledgers), description="shape of")
    first = next(iter(ledgers.values()))
    experts = widgets.SelectionSlider(
        options=_EXPERT_NUMBERS,
        value=_nearest_number(first),
        description="experts",
        continuous_update=False,
    )
    top_k = widgets.IntSlider(
        first.top_k, 1, 16, description="for a token", continuous_update=False
    )

    def choose(_change) -> None:
        ledger = ledgers[model.value]
        experts.value, top_k.value = _nearest_number(ledger), ledger.top_k

    def limit(_change) -> None:
        top_k.max = min(16, experts.value)

    model.observe(choose, names="value")
    experts.observe(limit, names="value")
    limit(None)

    def picture() -> Figure:
        ledger = ledgers[model.value]
        here = ledger.with_experts(experts.value, top_k.value)
        numbers = [number for number in _EXPERT_NUMBERS if number >= top_k.value]
        return parameters_by_experts(
            [ledger.with_experts(number, top_k.value) for number in numbers], here
        )

    return _box([model, experts, top_k], picture)


def _nearest_number(ledger: Ledger) -> int:
    return min(_EXPERT_NUMBERS, key=lambda number: abs(number - ledger.experts))


def who_goes_where(tokens: Sequence[str], routings: Sequence[Routing]) -> widgets.VBox:
    """One text's way through the experts: which layer, how many for a token, how noisy a router.

    `tokens` are labels, `routings` a record for each layer. The noise is drawn once, seeded, and
    scaled by the control, in standard deviations of the layer's logits; a layer is noisy by itself,
    as if those before it were not. It starts in layer 0 with the `top_k` of the records.

    Example: `who_goes_where(list("sum"), record(model, token_ids).routings)`.
    """
    shape = routings[0].logits.shape
    layer = widgets.IntSlider(0, 0, len(routings) - 1, description="layer", continuous_update=False)
    top_k = widgets.IntSlider(
        routings[0].chosen.shape[1], 1, shape[1], description="for a token", continuous_update=False
    )
    noise = widgets.FloatSlider(
        0, min=0, max=2, step=0.1, description="noise", continuous_update=False
    )
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(0))

    def picture() -> Figure:
        logits = routings[layer.value].logits.float()
        return routing_map(tokens, route(logits + noise.value * logits.std() * drawn, top_k.value))

    return _box([layer, top_k, noise], picture)


# ---------------------------------------------------------------------------------- number formats

_WIDTHS = range(2, 9)
_ASYMMETRIC = "integer, minimum to maximum"
_FAMILIES = {
    "integer": {bits: f"int{bits}" for bits in _WIDTHS},
    _ASYMMETRIC: {bits: f"int{bits}" for bits in _WIDTHS},
    "normal float": {bits: f"nf{bits}" for bits in _WIDTHS},
    "float": {4: "fp4", 8: "fp8_e4m3"},
    "MXFP4": {4: "mxfp4"},
    "NVFP4": {4: "nvfp4"},
}


def number_formats(weights: Mapping[str, torch.Tensor]) -> widgets.VBox:
    """What becomes of weights under the reader's hand: bits, family, blocks, double quantization.

    `weights` are matrices by name; 64 thousand weights move without delay. It starts with the first
    of them in NF4, blocks of 64. Where a family has no such width, a line says so and the picture
    stays; controls that the family has no use for are greyed.

    Example: `number_formats({"normal": torch.randn(64, 1024)})`.
    """
    bits = widgets.IntSlider(4, 2, 8, description="bits", continuous_update=False)
    family = widgets.Dropdown(options=list(_FAMILIES), value="normal float", description="family")
    kind = widgets.Dropdown(options=list(weights), description="weights")
    block = widgets.SelectionSlider(
        options=[*BLOCK_SIZES, "row", "tensor"],
        value=64,
        description="block",
        continuous_update=False,
    )
    double = widgets.Checkbox(
        False, description="double quantization", indent=False, layout={"width": "auto"}
    )
    note = widgets.HTML()

    @lru_cache(32)
    def rounding(
        name: str, format: str, block_size: int | str, double_quant: bool, asymmetric: bool
    ) -> Rounding:
        quantized = quantize(weights[name], format, block_size, double_quant, asymmetric)
        return Rounding(weights[name], quantized)

    def picture() -> Figure:
        used = double.value and not double.disabled
        format = _FAMILIES[family.value][bits.value]
        full = family.value == _ASYMMETRIC
        return rounding_chart(rounding(kind.value, format, block.value, used, full), kind.value)

    chart, errors = changeable(picture()), ErrorLine()

    def draw(_change) -> None:
        microscaled = family.value.lower() in MICROSCALED
        block.disabled = microscaled
        double.disabled = microscaled or family.value == _ASYMMETRIC
        note.value = _format_note(family.value, bits.value)
        if bits.value in _FAMILIES[family.value]:
            with errors.shown():
                redraw(chart, picture())

    rows = [[bits, block, double], [family, kind]]
    for control in rows[0] + rows[1]:
        control.observe(draw, names="value")
    return widgets.VBox([*map(widgets.HBox, rows), note, chart, errors])


def _format_note(family: str, bits: int) -> str:
    """What a reader should know about a family at this width, or nothing."""
    formats = _FAMILIES[family]
    if bits not in formats:
        widths = " or ".join(map(str, formats))
        return f"<b>{family}</b> has {widths} bits, not {bits}: the picture is still the last one."
    if formats[bits] in MICROSCALED:
        block_size = MICROSCALED[formats[bits]].block_size
        return f"<b>{family}</b> has blocks of {block_size} and scales of its own."
    if family == _ASYMMETRIC:
        return "Each block keeps a minimum and a step, so double quantization is not for it."
    return ""


# --------------------------------------------------------------------- what quantized experts cost


def damage(
    sweeps: Mapping[str, Mapping[str, Mapping[int, Damage]]], undisturbed: Damage
) -> widgets.VBox:
    """What fewer bits cost a model, under the reader's hand: how many, of which family, for whom.

    `sweeps` has the damage by family, by what is quantized, and by bits, all measured before; it
    starts at the fewest bits of the first.
    """
    family = widgets.Dropdown(options=list(sweeps), description="family")
    targets = next(iter(sweeps.values()))
    target = widgets.Dropdown(options=list(targets), description="what")
    widths = list(next(iter(targets.values())))
    bits = widgets.IntSlider(
        widths[0], widths[0], widths[-1], description="bits", continuous_update=False
    )

    def picture() -> Figure:
        here = sweeps[family.value][target.value][bits.value]
        label = f"{target.value} in {bits.value}-bit {family.value}"
        return damage_view(here, undisturbed, label.capitalize())

    return _box([bits, target, family], picture)


def int8_threshold(
    x: torch.Tensor, weight: torch.Tensor, thresholds: Sequence[float]
) -> widgets.VBox:
    """LLM.int8() under the reader's hand: from which magnitude on a column goes to 16 bits.

    `x` (tokens, in) times `weight` (out, in). `thresholds` rise and end with `math.inf`, plain
    INT8, where it starts.
    """
    rows, exact = quantize(weight, "int8", "row"), x @ weight.T
    trials = pd.DataFrame(
        {
            "threshold": threshold,
            "in_16_bits": len(product.columns) / x.shape[1],
            "error": relative_error(exact, product.y),
        }
        for threshold in thresholds
        for product in [int8_product(x, rows, threshold)]
    )
    names = [(f"{value:g}" if math.isfinite(value) else "none", value) for value in thresholds]
    threshold = widgets.SelectionSlider(
        options=names, value=thresholds[-1], description="threshold", continuous_update=False
    )
    return _box([threshold], lambda: threshold_view(trials, threshold.value))


# ----------------------------------------------------------------------------- calibrated rounding

_DAMPINGS = (0.0001, 0.001, 0.01, 0.1, 1.0)


def calibration(layer: MoELayer, tokens: torch.Tensor, held_out: torch.Tensor) -> widgets.VBox:
    """GPTQ and AWQ under the reader's hand: method, bits, tokens, damping, and for which expert.

    `tokens` (tokens, hidden) are what `layer` can be calibrated on, the first of them first, and
    `held_out` what it is judged on; an expert gets those of them that are routed to it. It starts
    with 32 tokens and whole numbers of 3 bits.
    """
    if tokens.dim() != 2 or len(tokens) < 8:
        raise ValueError(f"tokens of shape {tuple(tokens.shape)}: give (8 or more, hidden).")
    counts = [2**power for power in range(3, len(tokens).bit_length())]
    method = widgets.Dropdown(options=[("GPTQ", "gptq"), ("AWQ", "awq")], description="method")
    bits = widgets.IntSlider(3, 2, 8, description="bits", continuous_update=False)
    drawn = widgets.SelectionSlider(
        options=[(f"{count:,}", count) for count in counts],
        value=min(32, counts[-1]),
        description="tokens",
        continuous_update=False,
    )
    damping = widgets.SelectionSlider(
        options=[(f"{value:g}", value) for value in _DAMPINGS],
        value=0.01,
        description="damping",
        continuous_update=False,
    )
    expert = widgets.IntSlider(
        0, 0, len(layer.experts) - 1, description="expert", continuous_update=False
    )
    judged = expert_statistics(layer, held_out)

    @lru_cache
    def seen(count: int):
        return expert_statistics(layer, tokens[:count])

    @lru_cache(128)
    def matrices(method: str, bits: int, count: int, damping: float, expert: int):
        rounder = Rounder(method, f"int{bits}", damping=damping)
        return round_expert(
            layer.experts[expert], rounder, seen(count)[expert], judged[expert], expert
        )

    def picture() -> Figure:
        index, count = expert.value, drawn.value
        plain = matrices("rtn", bits.value, counts[0], _DAMPINGS[0], index)
        used = damping.value if method.value == "gptq" else _DAMPINGS[0]
        calibrated = matrices(method.value, bits.value, count, used, index)
        return calibration_view(plain, calibrated)

    return _box([method, bits, drawn, damping, expert], picture)


# -------------------------------------------------------------------------------------- the shaker

_NOISES = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0)
_ONE_EXPERT = "one expert"
_SHAKEN = {
    "router logits": "router logits",
    "router weights": "router",
    "all experts": "experts",
    _ONE_EXPERT: _ONE_EXPERT,
    "attention": "attention",
    "hidden states": "hidden states",
    CONTROL: CONTROL,
}


def shaker(shaker: Shaker) -> widgets.VBox:
    """A model under the reader's hand: which part is disturbed, where, and how much.

    At once it shows which tokens flip, and what that costs. Each move reads the exam once; what was
    seen before comes from a cache. It starts with 20% noise on all router weights; on the logits
    instead where these weights are stored in 4 or 8 bits. Logits, states and scattered weights
    cannot be rounded: there the bits are greyed, and a line says so.

    While a disturbance is on, other moves wait, and other cells must leave the model alone.

    Example: `shaker(Shaker(model, tokenizer))`.
    """
    routings = shaker.reference.routings
    layers = ["all", *range(len(routings))]
    what = widgets.Dropdown(
        options=_SHAKEN.items(),
        value="router" if shaker.takes_noise("router") else "router logits",
        description="disturbed",
    )
    layer = widgets.SelectionSlider(options=layers, description="in layer", continuous_update=False)
    expert = widgets.IntSlider(
        0, 0, routings[0].experts - 1, description="expert", continuous_update=False
    )
    how = widgets.Dropdown(options=["noise", "bits"], description="by")
    noise = widgets.SelectionSlider(
        options=[(f"{value:.0%}", value) for value in _NOISES],
        value=0.2,
        description="noise",
        continuous_update=False,
    )
    bits = widgets.IntSlider(3, 2, 8, description="bits", continuous_update=False)
    shown = widgets.SelectionSlider(
        options=layers, description="show layer", continuous_update=False
    )
    note = widgets.HTML()

    def adapt() -> None:
        """Greys what has no use here."""
        expert.disabled = what.value != _ONE_EXPERT
        how.disabled = what.value not in (*WEIGHTS, _ONE_EXPERT)
        noise.disabled = how.value == "bits" and not how.disabled
        bits.disabled = not noise.disabled
        note.value = _shaker_note(what.label) if how.disabled else ""

    def disturbance() -> Disturbance:
        return Disturbance(
            "experts" if what.value == _ONE_EXPERT else what.value,
            noise=0.0 if noise.disabled else noise.value,
            bits=None if bits.disabled else bits.value,
            layer=None if layer.value == "all" else layer.value,
            expert=None if expert.disabled else expert.value,
        )

    seen = lru_cache(64)(shaker.shake)

    def picture() -> Figure:
        adapt()
        return shaken_view(seen(disturbance()), None if shown.value == "all" else shown.value)

    controls = [what, layer, expert, how, noise, bits, shown]
    for control in controls:
        control.layout.width = "277px"  # three in a row
    return _box(controls, picture, note)


def _shaker_note(name: str) -> str:
    """Why what goes by this name in the app is not rounded."""
    reason = "scattered" if name == CONTROL else "not stored"
    return f"<b>{name.capitalize()}</b> are {reason}: they get noise, not fewer bits."


# ------------------------------------------------------------------------------ recipes and plans

_WIDE = {"description_width": "90px"}
_MIXED = ("bf16", "int8", "mxfp4", "nf4", "int4", "int3", "int2")
_MIXED_PARTS = {
    "experts": "int4",
    "attention": "int4",
    "router": "bf16",
    "embeddings": "bf16",
    "lm_head": "bf16",
}


def mixture(shaker: Shaker) -> widgets.VBox:
    """A recipe under the reader's hand: a format for each component, its bytes and its damage.

    *Simulated.* Each new recipe reads the exam once; what was tried stays in the picture, and the
    smallest that lost no answer stays marked. It starts with experts and attention in INT4 and all
    else in 16 bits. Blocks have 64 weights, and a maximum in float32 each.

    Example: `mixture(Shaker(model, tokenizer))`, with a model in 32 bits.
    """
    formats = {
        name: widgets.Dropdown(options=_MIXED, value=value, description=name, style=_WIDE)
        for name, value in _MIXED_PARTS.items()
    }
    weights = list(weights_in(shaker.model))
    whole = budget_of(weights, Recipe.keeping("bf16"))
    seen = lru_cache(256)(shaker.simulate)
    tried: dict[Recipe, dict] = {}

    def recipe() -> Recipe:
        chosen = {name: control.value for name, control in formats.items()}
        return Recipe(**chosen, double_quant=False)

    def picture() -> Figure:
        here = recipe()
        shaken, budget = seen(here), budget_of(weights, here)
        tried.pop(here, None)
        tried[here] = {
            "mib": budget.total_bytes / MIB,
            "kl": shaken.kl.mean().item(),
            "answers_kept": shaken.answers_kept,
            "label": str(here),
        }
        return mixture_view(budget, whole, here, shaken, pd.DataFrame(tried.values()))

    return _box(list(formats.values()), picture)


_PLANNED = {
    "16 bits": ("bf16", "bf16", True),
    "INT8": ("int8", "int8", True),
    "NF4 with double quantization": ("nf4", "nf4", True),
    "INT3 experts, INT4 attention": ("int3", "int4", False),
    "INT2 experts, INT4 attention": ("int2", "int4", False),
}


def _planned(name: str) -> Recipe:
    """One of `_PLANNED`; router, embeddings and head stay in 16 bits."""
    experts, attention, double_quant = _PLANNED[name]
    mlps = dict.fromkeys(("experts", "shared_experts", "dense_mlp"), experts)
    return Recipe(**mlps, attention=attention, double_quant=double_quant)


def planner(models: Sequence[str], cards: Sequence[Card] = tuple(CARDS.values())) -> widgets.VBox:
    """What fits where, under the reader's hand: a model, a recipe, a context, and how many cards.

    `models` are names in `ledger.PUBLISHED`, folders, or hub names. It starts with the first of
    them in NF4 and 4,096 tokens.

    Example: `planner(list(PUBLISHED))`.
    """
    model = widgets.Dropdown(options=list(models), description="model")
    recipe = widgets.Dropdown(
        options=list(_PLANNED), value="NF4 with double quantization", description="recipe"
    )
    context = widgets.SelectionSlider(
        options=[(f"{2**power:,}", 2**power) for power in range(9, 18)],
        value=2**12,
        description="context",
        continuous_update=False,
    )
    batch = widgets.SelectionSlider(
        options=(1, 2, 4, 8, 16, 32), description="sequences", continuous_update=False
    )
    count = widgets.SelectionSlider(
        options=(1, 2, 4, 8), description="cards", continuous_update=False
    )
    host = widgets.SelectionSlider(
        options=[(f"{gib} GiB", gib) for gib in (16, 32, 64, 128, 256, 512)],
        value=64,
        description="CPU memory",
        style=_WIDE,
        continuous_update=False,
    )

    def picture() -> Figure:
        return memory_of(
            [
                plan(
                    model.value,
                    _planned(recipe.value),
                    Machine(card, count.value, host.value),
                    context.value,
                    batch.value,
                )
                for card in cards
            ]
        )

    return _box([model, recipe, context, batch, count, host], picture)
