"""One picture of a disturbed model: what flips, where, from which expert to which, at what cost.

Like `figures`: a record in, a `plotly.graph_objects.Figure` out, the finding in the title. Scales
are fixed, so that two disturbances can be compared; only that of flips by kind has four ends. Flips
are orange and damage is black: they are different things.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from plotly.graph_objects import Figure
from torch import Tensor

from .evaluate import Interval
from .flips import margins
from .shaker import Shaken
from .style import COLORS, INK, TEMPLATE

_FLIPPED, _KEPT = "#D55E00", "#9CC8E3"
_KINDS = (
    ("another set", "set_changed", _FLIPPED),
    ("order only", "order_changed", "#F7E3BD"),
    ("first of either", "top1_changed", "#E69F00"),
)
# Shades of flips follow the square root of the share, so that few can be told from none: grey.
_SHADES = [
    [0, "#F4F4F4"],
    [0.001, "#FFF6EC"],
    [0.01, "#FEEDDC"],
    [0.09, "#FDBE85"],
    [0.25, "#F58B3C"],
    [0.5, "#D55E00"],
    [1, "#5E2600"],
]
_HEIGHT, _MARGIN = 660, {"l": 58, "r": 20, "t": 66, "b": 46}
_PLOT = _HEIGHT - _MARGIN["t"] - _MARGIN["b"]  # pixels from the lowest panel to the highest
_GAUGES, _MAPS, _RIVER = (492, 509), (286, 420), (0, 222)  # pixels above the lowest panel
_BINS = 20
_LEAST_KL, _LEAST_LOSS = 1e-5, 1e-4  # nats; below that the logarithmic scales turn linear
_TOPS = (0.02, 0.1, 0.3, 1)  # where the scale of flips by kind may end


def shaken_view(shaken: Shaken, layer: int | None = None) -> Figure:
    """A disturbance on one page: flips and damage, flips by language and kind, the river, margins.

    The gauges on top are of the whole model, with 95% intervals over pages; the river and the
    margins are of `layer`, or of all layers. In the river each ribbon is as thick as the number of
    choices that went from an expert (left) to another (right); what stayed is pale. A choice is one
    of a token's `top_k` experts. Margins are those of the undisturbed routers.

    Raises ValueError for an exam of one page, which has no intervals.
    """
    layers = range(len(shaken.flips)) if layer is None else [layer]
    moves = sum(shaken.flips[index].moves for index in layers)
    margin = torch.cat([margins(shaken.flips[index].reference) for index in layers])
    flipped = torch.cat([shaken.flips[index].set_changed for index in layers])
    seen = "all layers" if layer is None else f"layer {layer}"
    panels = (
        gauges(shaken, _up(_GAUGES), 5),
        _languages(shaken),
        _kinds(shaken),
        _river(moves, seen),
        _margins(margin, flipped, seen),
    )
    layout = {
        "template": TEMPLATE,
        "title": _title(shaken),
        "height": _HEIGHT,
        "margin": _MARGIN,
        "showlegend": False,
        "barmode": "stack",
        "bargap": 0.25,
        "annotations": [note for panel in panels for note in panel.notes],
    }
    for panel in panels:
        layout |= panel.axes
    return Figure([trace for panel in panels for trace in panel.traces], layout)


@dataclass(frozen=True)
class Panel:
    """A part of the picture: its traces, its axes by name, and what is written above it."""

    traces: list[dict]
    axes: dict[str, dict]
    notes: list[dict]


def _title(shaken: Shaken) -> dict:
    what = str(shaken.disturbance)
    before, still = shaken.reference_right, shaken.right & shaken.reference_right
    pages, tokens = shaken.kl.shape
    simulated = "" if shaken.disturbance.bits is None else "; simulated"
    return {
        "text": f"{what[0].upper()}{what[1:]}: {percent(shaken.flip_rate)} of tokens flip, "
        f"KL {nats(shaken.kl.mean().item())}, {still.sum()} of {before.sum()} answers still right",
        "font": {"size": 15},
        "subtitle": {
            "text": f"{pages} pages of {tokens} tokens; a flip: another set of experts, mean over "
            f"{len(shaken.flips)} layers; KL and loss are per token, whiskers 95% intervals"
            + simulated
        },
    }


# ------------------------------------------------------------------------------------------- gauges


@dataclass(frozen=True)
class _Gauge:
    """A bar on a scale of its own: what is written above it, what hovering says, and its ticks.

    With a `least` the scale is logarithmic above it, on both sides of 0, and linear below.
    """

    text: str
    hover: str
    value: Interval
    ticks: dict[str, float]
    ends: tuple[float, float]
    color: str
    least: float | None = None

    def place(self, value: float) -> float:
        if self.least is None:
            return value
        return math.copysign(math.log10(1 + abs(value) / self.least), value)


def gauges(shaken: Shaken, height: list[float], first: int) -> Panel:
    """Flips, KL, rise of loss and right answers, side by side, on fixed scales with 95% intervals.

    `height` is their domain on the y axes; their four pairs of axes are numbered from `first`.
    """
    answers = len(shaken.right)
    right, before, still = (
        int(which.sum())
        for which in (shaken.right, shaken.reference_right, shaken.right & shaken.reference_right)
    )
    won = f", {right - still} new" if right > still else ""
    found = shaken.intervals
    flips, kl, rise = found.flip_rate, found.kl, found.loss_rise
    shown = (
        _Gauge(
            f"<b>{percent(shaken.flip_rate)}</b> of tokens flip per layer",
            f"{flips:.3%} of the tokens",
            flips,
            {f"{share:.0%}": share for share in (0, 0.25, 0.5, 0.75, 1)},
            (0, 1),
            _FLIPPED,
        ),
        _Gauge(
            f"KL <b>{nats(kl.estimate)}</b> nats",
            f"{kl:.4g} nats per token from the undisturbed model",
            kl,
            {"0": 0, "0.0001": 1e-4, "0.01": 1e-2, "1": 1},
            (0, 5),
            INK,
            _LEAST_KL,
        ),
        _Gauge(
            f"loss <b>{_rise(rise.estimate)}</b> nats",
            f"{rise:+.4g} nats per token",
            rise,
            {"\u22120.001": -1e-3, "0": 0, "0.01": 0.01, "1": 1},
            (-0.01, 5),
            INK,
            _LEAST_LOSS,
        ),
        _Gauge(
            f"<b>{right}</b> of {answers} answers right{won}",
            f"{right} of {answers} right; {still} of the {before} that were right before",
            Interval(right, right, right),
            {"0": 0, f"before {before}": before},
            (0, 1.1 * answers),
            INK,
        ),
    )
    wide = 0.215
    step = (1 - wide) / (len(shown) - 1)
    drawn = [
        _gauge(gauge, first + index, [index * step, index * step + wide], height)
        for index, gauge in enumerate(shown)
    ]
    return Panel(
        [panel.traces[0] for panel in drawn],
        {name: axis for panel in drawn for name, axis in panel.axes.items()},
        [panel.notes[0] for panel in drawn],
    )


def _gauge(gauge: _Gauge, number: int, width: list[float], height: list[float]) -> Panel:
    middle, low, high = (
        gauge.place(value) for value in (gauge.value.estimate, gauge.value.low, gauge.value.high)
    )
    bar = {
        "type": "bar",
        "orientation": "h",
        "x": [middle],
        "y": [0],
        "width": 1,
        "xaxis": f"x{number}",
        "yaxis": f"y{number}",
        "marker": {"color": gauge.color},
        "error_x": {
            "array": [high - middle],
            "arrayminus": [middle - low],
            "color": "#8A8A8A",
            "thickness": 1.5,
            "width": 4,
        },
        "hovertemplate": f"{gauge.hover}<extra></extra>",
    }
    axes = {
        f"xaxis{number}": axis(
            domain=width,
            anchor=f"y{number}",
            range=[gauge.place(end) for end in gauge.ends],
            tickvals=[gauge.place(value) for value in gauge.ticks.values()],
            ticktext=list(gauge.ticks),
            tickfont={"size": 10},
            tickangle=0,
            ticklen=3,
            showline=True,
            showgrid=False,
        ),
        f"yaxis{number}": axis(
            domain=height, anchor=f"x{number}", range=[-0.5, 0.5], visible=False
        ),
    }
    return Panel([bar], axes, [note(gauge.text, width[0], height[1])])


# -------------------------------------------------------------------------------------------- flips


def _languages(shaken: Shaken) -> Panel:
    rates = shaken.flips_by_language
    percents = 100 * rates.to_numpy()
    names = [f"layer {layer}" for layer in rates.index]
    cells = {
        "type": "heatmap",
        "z": percents,
        "x": list(rates.columns),
        "y": names,
        "zmin": 0,
        "zmax": 100,
        "colorscale": _SHADES,
        "showscale": False,
        "xgap": 2,
        "ygap": 2,
        "text": [[_cell(value) for value in row] for row in percents],
        "texttemplate": "%{text}",
        "textfont": {"size": 12},
        "hovertemplate": "%{y}, %{x}: %{z:.2f}% of the tokens<extra></extra>",
    }
    axes = {
        "xaxis": axis(
            domain=[0, 0.62],
            anchor="y",
            tickfont={"size": 11},
            tickangle=0,
            ticks="",
            showgrid=False,
        ),
        "yaxis": axis(
            domain=_up(_MAPS), anchor="x", autorange="reversed", ticks="", showgrid=False
        ),
    }
    title = "<b>Flips</b> by layer and language (% of the tokens)"
    return Panel([cells], axes, [note(title, 0, _up(_MAPS)[1])])


def _kinds(shaken: Shaken) -> Panel:
    names = [str(layer) for layer in range(len(shaken.flips))]
    traces, highest = [], 0.0
    for place, (name, kind, color) in enumerate(_KINDS):
        rates = getattr(shaken.intervals, kind)
        highest = max(highest, *(rate.high for rate in rates))
        traces.append(
            {
                "type": "bar",
                "x": names,
                "y": [rate.estimate for rate in rates],
                "xaxis": "x2",
                "yaxis": "y2",
                "width": 0.25,
                "offset": -0.4 + 0.27 * place,
                "offsetgroup": kind,
                "marker": {"color": color, "line": {"color": INK, "width": 0.5}},
                "error_y": {
                    "array": [rate.high - rate.estimate for rate in rates],
                    "arrayminus": [rate.estimate - rate.low for rate in rates],
                    "color": INK,
                    "thickness": 1,
                    "width": 2,
                },
                "customdata": [f"{rate:.2%}" for rate in rates],
                "hovertemplate": "layer %{x}: %{customdata} of the tokens<extra>"
                + name
                + "</extra>",
            }
        )
    top = next((top for top in _TOPS if highest <= top), _TOPS[-1])
    axes = {
        "xaxis2": axis(
            domain=[0.7, 1], anchor="y2", type="category", showgrid=False, tickprefix="layer "
        ),
        "yaxis2": axis(domain=_up(_MAPS), anchor="x2", range=[0, top], tickformat="~%", nticks=5),
    }
    kinds = key((name, color) for name, _, color in _KINDS)
    return Panel(traces, axes, [note(kinds, 0.66, _up(_MAPS)[1])])


# ------------------------------------------------------------------------------- river and margins


def _river(moves: Tensor, seen: str) -> Panel:
    """Only experts that are chosen are drawn: plotly would count the others wrongly."""
    before, after = torch.nonzero(moves, as_tuple=True)
    ribbons = list(zip(before.tolist(), after.tolist(), moves[before, after].tolist(), strict=True))
    choices = [moves.sum(dim=1), moves.sum(dim=0)]
    left, right = (torch.nonzero(side).flatten().tolist() for side in choices)
    gap = 1 / (4 * max(len(left), len(right)))
    experts = left + right
    places = {
        "x": [0.02] * len(left) + [0.98] * len(right),
        "y": [
            middle
            for side, used in zip(choices, (left, right), strict=True)
            for middle in _middles(side[used].tolist(), gap, max(len(left), len(right)))
        ],
    }
    river = {
        "type": "sankey",
        "domain": {"x": [0.025, 0.455], "y": _up(_RIVER)},
        "arrangement": "fixed",
        "node": places
        | {
            "label": [""] * len(experts),
            "customdata": experts,
            "color": [COLORS[f"expert {expert % 16}"] for expert in experts],
            "pad": gap * (_RIVER[1] - _RIVER[0]),
            "thickness": 12,
            "sort": "input",
            "line": {"color": INK, "width": 0.5},
            "hovertemplate": "expert %{customdata}: %{value:,} choices<extra></extra>",
        },
        "link": {
            "source": [left.index(old) for old, _, _ in ribbons],
            "target": [len(left) + right.index(new) for _, new, _ in ribbons],
            "value": [count for _, _, count in ribbons],
            "color": [
                _rgba(COLORS[f"expert {old % 16}"], 0.22 if old == new else 0.9)
                for old, new, _ in ribbons
            ],
            "hovertemplate": "%{value:,} choices from expert %{source.customdata} to "
            "%{target.customdata}<extra></extra>",
        },
    }
    labels = {
        "type": "scatter",
        "x": [0] * len(left) + [1] * len(right),
        "y": places["y"],
        "text": [str(expert) for expert in experts],
        "mode": "text",
        "xaxis": "x3",
        "yaxis": "y3",
        "hoverinfo": "skip",
    }
    axes = {
        "xaxis3": axis(domain=[0.005, 0.475], anchor="y3", range=[-0.02, 1.02], visible=False),
        "yaxis3": axis(domain=_up(_RIVER), anchor="x3", range=[1, 0], visible=False),
    }
    moved = sum(count for old, new, count in ribbons if old != new)
    title = f"<b>Choices</b>, old expert to new, {seen}: {moved:,} of {moves.sum():,} move"
    return Panel([river, labels], axes, [note(title, 0, _up(_RIVER)[1])])


def _middles(choices: Sequence[int], gap: float, most: int) -> list[float]:
    """Where each expert's end is on its side of the river, 0 to 1 from the top.

    `gap` lies between two of them; the side with the `most` experts fills the height.
    """
    ends = np.cumsum(choices) / sum(choices)
    starts = np.concatenate([[0], ends[:-1]])
    filled = 1 - gap * (most - 1)
    return ((starts + ends) / 2 * filled + np.arange(len(choices)) * gap).tolist()


def _margins(margin: Tensor, flipped: Tensor, seen: str) -> Panel:
    """In bins of equal width on a logarithmic scale; the first and the last have the rest too."""
    size = margin.clamp(min=1e-9).log10()
    finite = size[margin.isfinite()] if margin.isfinite().any() else torch.zeros(1)
    low = finite.quantile(0.01).item()
    high = max(low + 1, finite.max().item())
    step = (high - low) / _BINS
    bins = ((size - low) / step).clamp(0, _BINS - 1).long()
    every, turned = (torch.bincount(which, minlength=_BINS) for which in (bins, bins[flipped]))
    edges = 10 ** (low + step * np.arange(_BINS + 1))
    shared = {
        "type": "bar",
        "x": (low + step * (np.arange(_BINS) + 0.5)).tolist(),
        "width": step,
        "xaxis": "x4",
        "yaxis": "y4",
        "customdata": [
            f"margin {start:.2g} to {stop:.2g}: {part} of {whole} tokens flip"
            for start, stop, part, whole in zip(
                edges, edges[1:], turned.tolist(), every.tolist(), strict=False
            )
        ],
        "hovertemplate": "%{customdata}<extra></extra>",
    }
    traces = [
        shared
        | {
            "y": counts.tolist(),
            "marker": {"color": color, "line": {"color": "white", "width": 0.5}},
        }
        for counts, color in ((turned, _FLIPPED), (every - turned, _KEPT))
    ]
    met = every > 0
    share = {
        "type": "scatter",
        "x": [x for x, there in zip(shared["x"], met.tolist(), strict=True) if there],
        "y": (100 * turned[met] / every[met]).tolist(),
        "mode": "lines",
        "line": {"color": INK, "width": 2},
        "xaxis": "x4",
        "yaxis": "y9",
        "hovertemplate": "%{y:.1f}% of these tokens flip<extra></extra>",
    }
    powers = range(math.ceil(low), math.floor(high) + 1)
    axes = {
        "xaxis4": axis(
            domain=[0.56, 0.955],
            anchor="y4",
            range=[low, high],
            title="margin of the undisturbed router (difference of two logits)",
            tickvals=list(powers),
            ticktext=[f"{10.0**power:g}" for power in powers],
            showgrid=False,
        ),
        "yaxis4": axis(
            domain=_up(_RIVER), anchor="x4", range=[0, 1.05 * every.max().item()], nticks=5
        ),
        "yaxis9": axis(
            domain=_up(_RIVER),
            anchor="x4",
            overlaying="y4",
            side="right",
            range=[0, 105],
            tickvals=[0, 50, 100],
            ticktext=["0%", "50%", "100%"],
            showgrid=False,
        ),
    }
    fates = key((("flip", _FLIPPED), ("stay", _KEPT)))
    title = f"<b>Tokens by margin</b>, {seen}: {fates}  \u2501 share of flips"
    return Panel([*traces, share], axes, [note(title, 0.525, _up(_RIVER)[1])])


# ------------------------------------------------------------------------------------ drawing tools


def axis(**entries) -> dict:
    """An axis that keeps its place, whatever stands beside it."""
    return {"automargin": False, "zeroline": False, **entries}


def _up(pixels: tuple[int, int]) -> list[float]:
    """A panel's part of the plot, from pixels above the lowest panel."""
    return [end / _PLOT for end in pixels]


def note(text: str, x: float, y: float) -> dict:
    """A line of text above a place in the plot, 0 to 1 from the left and from below."""
    return {
        "text": text,
        "x": x,
        "y": y,
        "xref": "paper",
        "yref": "paper",
        "xanchor": "left",
        "yanchor": "bottom",
        "yshift": 6,
        "align": "left",
        "showarrow": False,
        "font": {"size": 12},
    }


def key(entries: Iterable[tuple[str, str]]) -> str:
    """What the colours mean, in a line; `entries` are names with their colours."""
    return "  ".join(
        f'<span style="color: {color}">\u25a0</span> {name}' for name, color in entries
    )


def _rgba(color: str, opacity: float) -> str:
    red, green, blue = (int(color[place : place + 2], 16) for place in (1, 3, 5))
    return f"rgba({red}, {green}, {blue}, {opacity})"


def _cell(percent: float) -> str:
    """A share to be read in a small cell; only what is exactly 0 is written as 0."""
    if math.isnan(percent):
        return ""
    return "<1" if 0 < percent < 1 else f"{percent:.0f}"


def percent(share: float) -> str:
    """A share with one decimal; only what is exactly 0 is written as 0."""
    if share == 0:
        return "0%"
    return f"{share:.1%}" if share >= 0.001 else f"{share:.2%}" if share >= 1e-4 else "<0.01%"


def nats(value: float) -> str:
    """Two significant digits without an exponent; only what is exactly 0 is written as 0."""
    if value == 0:
        return "0"
    if value < 1e-5:
        return "<0.00001"
    return f"{value:.{max(0, 1 - math.floor(math.log10(value)))}f}"


def _rise(value: float) -> str:
    """The same with a sign."""
    if 0 < abs(value) < 1e-5:
        return "nearly 0"
    sign = "" if value == 0 else "\u2212" if value < 0 else "+"
    return sign + nats(abs(value))
