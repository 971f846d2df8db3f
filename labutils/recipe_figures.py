"""Pictures of recipes: what goes where, what that costs, and which of them nothing beats.

Like `figures`: a record in, a `plotly.graph_objects.Figure` out, the finding in the title. The
records are tables. Their `_low` and `_high` are the 95% interval around an estimate, and drawn. A
recipe is *beaten* if another one is no larger and does less harm; those that are not beaten are the
front. KL too small for its axis is drawn at the lower end, marked "or less"; the hover has the
exact value.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from plotly.graph_objects import Figure
from plotly.subplots import make_subplots

from .budget import Budget
from .formats import FORMATS
from .meter import MIB
from .recipes import Recipe
from .shaker import Shaken
from .shaker_figures import Panel, axis, gauges, nats, note, percent
from .style import COLORS, INK, SOFT_INK, TEMPLATE, LogAxis

_KEPT, _LOST = "#0072B2", "#D55E00"
_STAR = "#E69F00"
_HEIGHT, _MARGIN = 560, {"l": 20, "r": 20, "t": 66, "b": 50}
_PLOT = _HEIGHT - _MARGIN["t"] - _MARGIN["b"]  # pixels from the lowest panel to the highest
_GAUGES, _LOWER = (388, 405), (0, 305)  # pixels above the lowest panel
_GHOST = "#F1F1F1"  # what a component would take in 16 bits
_LEAST_KL, _MOST_KL = 1e-5, 10.0  # nats; the ends of the axis of all that was tried
_KL_TITLE = "KL from the undisturbed model<br>(nats per token)"
_MARKS = (
    ("\u25cf", _KEPT, "no answer lost"),
    ("\u2605", _STAR, "smallest of these"),
    ("\u00d7", _LOST, "some lost"),
    ("\u25cb", INK, "now"),
)
_METHODS = {
    "exact": ("#0072B2", "solid", "circle"),
    "by use": ("#E69F00", "dash", "square"),
    "uniform": (INK, "dot", "diamond"),
    "random": ("#9A9A9A", "dashdot", "x"),
}
_KINDS = (
    ("#0072B2", "circle"),
    ("#E69F00", "square"),
    ("#B0006D", "diamond"),
    ("#009E73", "triangle-up"),
    ("#56B4E9", "x"),
    (INK, "cross"),
)


# -------------------------------------------------------------------------------------- one mixture


def mixture_view(
    budget: Budget, whole: Budget, recipe: Recipe, shaken: Shaken, tried: pd.DataFrame
) -> Figure:
    """A recipe on one page: what goes where and how large it is, what it does, what else was tried.

    `budget` is the model's under `recipe`, `whole` the same in 16 bits, and `shaken` what the model
    did under it. `tried` has a row for each recipe so far, the last of them this one, with columns
    mib, kl (nats per token), answers_kept (none lost that was right undisturbed) and label. The
    smallest that lost no answer has a star. It has always the same traces, on scales that depend on
    `whole` alone.

    Raises ValueError for an exam of one page, which has no intervals.
    """
    panels = (
        gauges(shaken, _up(_GAUGES), 3),
        _components(budget, whole, recipe),
        _all_tried(tried, whole.total_bytes / MIB),
    )
    layout = {
        "template": TEMPLATE,
        "title": _mixture_title(budget, whole, shaken),
        "height": _HEIGHT,
        "margin": _MARGIN,
        "showlegend": False,
        "barmode": "overlay",
        "annotations": [each for panel in panels for each in panel.notes],
    }
    for panel in panels:
        layout |= panel.axes
    return Figure([trace for panel in panels for trace in panel.traces], layout)


def _mixture_title(budget: Budget, whole: Budget, shaken: Shaken) -> dict:
    before, still = shaken.reference_right, shaken.right & shaken.reference_right
    pages, tokens = shaken.kl.shape
    return {
        "text": f"{_amount(budget.total_bytes / MIB)} of {_amount(whole.total_bytes / MIB)} MiB: "
        f"KL {nats(shaken.kl.mean().item())} nats, {still.sum()} of {before.sum()} answers still "
        f"right, {percent(shaken.flip_rate)} of tokens flip",
        "font": {"size": 15},
        "subtitle": {
            "text": "<i>Simulated</i>: weights rounded, computed as before. "
            f"{pages} pages of {tokens} tokens; KL and loss are per token, whiskers 95% intervals "
            "over pages"
        },
    }


@dataclass(frozen=True)
class _Row:
    """A component, or all of them: what it is in, and its bytes, here and in 16 bits."""

    name: str
    format: str
    color: str
    mixed: bool
    stored_bytes: int
    whole_bytes: int

    @property
    def texts(self) -> tuple[str, str, str]:
        unit, name = (2**10, "KiB") if self.whole_bytes < MIB else (MIB, "MiB")
        sizes = f"{_amount(self.stored_bytes / unit)} of {_amount(self.whole_bytes / unit)} {name}"
        bits = f"{16 * self.stored_bytes / self.whole_bytes:.3g} bits"
        return f"<b>{self.name}</b>", f"{self.format}, {bits}" if self.format else bits, sizes


def _rows(budget: Budget, whole: Budget, recipe: Recipe) -> list[_Row]:
    rows = []
    for component, whole_bytes in whole.by_component.items():
        formats = {recipe.float_format}
        if component in recipe.components:
            formats = recipe.formats_of(component)
        fewest = min(formats, key=lambda name: FORMATS[name].weight_bits)
        mixed = len(formats) > 1
        rows.append(
            _Row(
                component.replace("_", " "),
                "mixed" if mixed else fewest,
                COLORS[fewest],
                mixed,
                budget.by_component[component],
                whole_bytes,
            )
        )
    rows.sort(key=lambda row: -row.whole_bytes)
    return [*rows, _Row("all", "", INK, False, budget.total_bytes, whole.total_bytes)]


def _components(budget: Budget, whole: Budget, recipe: Recipe) -> Panel:
    """A line of text for each component, and under it its bar inside that of 16 bits."""
    rows = _rows(budget, whole, recipe)
    places = [*range(len(rows) - 1), len(rows) - 0.8]
    bars = {
        "type": "bar",
        "orientation": "h",
        "y": [place + 0.24 for place in places],
        "width": 0.3,
        "customdata": [
            f"{row.name}: {row.stored_bytes:,} bytes; in 16 bits {row.whole_bytes:,}"
            for row in rows
        ],
        "hovertemplate": "%{customdata}<extra></extra>",
    }
    in_16_bits = bars | {
        "x": [row.whole_bytes / MIB for row in rows],
        "marker": {"color": _GHOST, "line": {"color": "#C4C4C4", "width": 1}},
    }
    here = bars | {
        "x": [row.stored_bytes / MIB for row in rows],
        "marker": {
            "color": [row.color for row in rows],
            "pattern": {
                "shape": ["/" if row.mixed else "" for row in rows],
                "fillmode": "overlay",
                "fgcolor": "white",
                "size": 6,
            },
        },
    }
    end = whole.total_bytes / MIB
    texts = {
        "type": "scatter",
        "mode": "text",
        "x": [0, 0.36 * end, end] * len(rows),
        "y": [place - 0.16 for place in places for _ in range(3)],
        "text": [text for row in rows for text in row.texts],
        "textposition": ["middle right", "middle right", "middle left"] * len(rows),
        "textfont": {"size": 12, "color": INK},
        "hoverinfo": "skip",
        "cliponaxis": False,
    }
    axes = {
        "xaxis": axis(domain=[0, 0.53], anchor="y", range=[0, end], visible=False),
        "yaxis": axis(domain=_up(_LOWER), anchor="x", range=[len(rows) - 0.3, -0.5], visible=False),
    }
    title = "<b>What goes where</b>, colour: its format, pale: in 16 bits"
    return Panel([in_16_bits, here, texts], axes, [note(title, 0, _up(_LOWER)[1])])


def _all_tried(tried: pd.DataFrame, whole_mib: float) -> Panel:
    shown = tried.assign(kl=tried.kl.clip(_LEAST_KL, _MOST_KL))
    kept = shown[shown.answers_kept]
    groups = {
        "line": shown.iloc[unbeaten(shown.mib, shown.kl)],
        "lost": shown[~shown.answers_kept],
        "kept": kept,
        "star": kept.nsmallest(1, ["mib", "kl"]),
        "now": shown.iloc[-1:],
    }
    looks = {
        "line": {"mode": "lines", "line": {"color": SOFT_INK, "width": 1, "shape": "hv"}},
        "lost": {"marker": {"symbol": "x-thin", "size": 7, "line": {"color": _LOST, "width": 2}}},
        "kept": {"marker": {"symbol": "circle", "size": 7, "color": _KEPT}},
        "star": {
            "marker": {
                "symbol": "star",
                "size": 17,
                "color": _STAR,
                "line": {"color": INK, "width": 1},
            }
        },
        "now": {
            "marker": {
                "symbol": "circle-open",
                "size": 21,
                "color": INK,
                "line": {"width": 2},
            }
        },
    }
    traces = [
        {
            "type": "scatter",
            "mode": "markers",
            "x": rows.mib.tolist(),
            "y": rows.kl.tolist(),
            "xaxis": "x2",
            "yaxis": "y2",
            "customdata": [
                f"{row.label}<br>{row.mib:,.3f} MiB, KL {row.kl:.4g} nats"
                for row in tried.loc[rows.index].itertuples()
            ],
            "hovertemplate": "%{customdata}<extra></extra>",
        }
        | looks[name]
        for name, rows in groups.items()
    ]
    first, last = math.log10(_LEAST_KL), math.log10(_MOST_KL)
    powers = range(round(first), round(last) + 1)
    axes = {
        "xaxis2": axis(
            domain=[0.65, 1],
            anchor="y2",
            range=[0, 1.06 * whole_mib],
            title="all weights (MiB = 2\u00b2\u2070 bytes)",
        ),
        "yaxis2": axis(
            domain=_up(_LOWER),
            anchor="x2",
            type="log",
            range=[first - 0.3, last],
            tickvals=[10.0**power for power in powers],
            ticktext=["0.00001<br>or less"] + [f"{10.0**power:g}" for power in powers[1:]],
        ),
    }
    marks = " ".join(f'<span style="color: {c}">{symbol}</span> {of}' for symbol, c, of in _MARKS)
    title = f"<b>All that was tried</b>: KL (nats per token) by size<br>{marks}"
    return Panel(traces, axes, [note(title, 0.575, _up(_LOWER)[1])])


# ------------------------------------------------------------------------------------- many recipes


def front(table: pd.DataFrame) -> Figure:
    """What each of many recipes costs, KL and right answers, against its bytes.

    `table` has the columns mib, kl (nats per token), accuracy (share of answers right), router_kept
    (whether the router is in 16 bits) and label. With kl_low and kl_high too, the intervals of
    those on the front are drawn. Lines are the fronts; the title counts that of KL.
    """
    on_kl = unbeaten(table.mib, table.kl)
    on_answers = unbeaten(table.mib, -table.accuracy)
    kl_axis = LogAxis.over(table.kl, _LEAST_KL)
    figure = make_subplots(rows=1, cols=2, horizontal_spacing=0.13)
    for column, heights, best in (
        (1, table.kl.clip(lower=kl_axis.floor), on_kl),
        (2, 100 * table.accuracy, on_answers),
    ):
        for kept, name, look in (
            (False, "router in fewer bits", {"symbol": "diamond", "color": COLORS["router"]}),
            (True, "router in 16 bits", {"symbol": "circle-open", "color": _KEPT}),
        ):
            chosen = np.flatnonzero(table.router_kept == kept)
            rows = table.iloc[chosen]
            here = np.isin(chosen, best)
            ring = {"color": _KEPT, "width": np.where(here, 2.5, 1.5)}
            edge = {"color": INK, "width": np.where(here, 1, 0)}
            figure.add_scatter(
                x=rows.mib,
                y=heights.iloc[chosen],
                name=name,
                legendgroup=name,
                showlegend=column == 1,
                mode="markers",
                marker=look
                | {
                    "size": np.where(here, 9, 6) + (5 if kept else 0),
                    "opacity": np.where(here, 1, 0.6),
                    "line": ring if kept else edge,
                },
                customdata=rows[["label", "kl", "accuracy"]],
                hovertemplate="%{customdata[0]}<br>%{x:,.3f} MiB, KL %{customdata[1]:.4g} nats, "
                f"%{{customdata[2]:.1%}} right<extra>{name}</extra>",
                row=1,
                col=column,
            )
        figure.add_scatter(
            x=table.mib.iloc[best],
            y=heights.iloc[best],
            name="front: nothing smaller does less harm",
            legendgroup="front",
            showlegend=column == 1,
            mode="lines",
            line={"color": INK, "width": 1.5, "shape": "hv"},
            error_y=_whiskers(table.iloc[best], kl_axis.floor) if column == 1 else None,
            hoverinfo="skip",
            row=1,
            col=column,
        )
    kept = int(table.router_kept.iloc[on_kl].sum())
    pages = "" if "kl_low" not in table else "; whiskers are 95% intervals"
    figure.update_layout(
        template=TEMPLATE,
        height=470,
        title={
            "text": f"{len(on_kl)} of {len(table)} recipes are on the front of KL; {kept} of these "
            "keep the router in 16 bits",
            "subtitle": {
                "text": f"of all {len(table)}, {table.router_kept.sum()} keep it; <i>simulated</i>"
                + pages
            },
        },
        legend={"itemsizing": "constant"},
    )
    figure.update_xaxes(
        title="all weights (MiB = 2\u00b2\u2070 bytes)",
        type="log",
        tickvals=[digit * 10.0**power for power in range(-2, 6) for digit in (1, 1.5, 2, 3, 5, 7)],
        tickformat="~g",
    )
    figure.update_yaxes(kl_axis.layout(_KL_TITLE), col=1)
    figure.update_yaxes(title="answers right (%)", range=[-3, 103], col=2)
    return figure


def unbeaten(sizes: Sequence[float], harms: Sequence[float]) -> np.ndarray:
    """The places of those that nothing beats, from the smallest to the largest.

    Of several that are equal in both, the first.

    >>> unbeaten([1, 2, 3, 3], [9, 4, 5, 2]).tolist()
    [0, 1, 3]
    """
    sizes, harms = np.asarray(sizes, dtype=float), np.asarray(harms, dtype=float)
    order = np.lexsort((harms, sizes))
    before = np.fmin.accumulate(np.concatenate([[np.inf], harms[order]]))[:-1]
    return order[harms[order] < before]


# ------------------------------------------------------------------------------------ cost per byte


def damage_per_byte(ours: pd.DataFrame, published: pd.DataFrame) -> Figure:
    """What a byte saved costs, on attention and on the experts: here, and on Mixtral-8x7B.

    Both have the columns what ("attention", "experts"), bits, rise and saved. `ours` is of the
    small model: rise is the KL in nats per token, with rise_low and rise_high, and saved is in MiB.
    `published` is Table 1 of arXiv:2312.17238 (Eliseev and Mazur 2023): rise of the perplexity, and
    saved in GiB. The title has the ratios at the fewest bits that both have.
    """
    bits = min(set(ours.bits) & set(published.bits))
    figure = make_subplots(
        rows=1,
        cols=2,
        horizontal_spacing=0.16,
        subplot_titles=["this small model, simulated", "Mixtral-8x7B, arXiv:2312.17238, Table 1"],
    )
    ratios = []
    for column, table in ((1, ours), (2, published)):
        rates = {}
        for what, dash, symbol in (("attention", "dash", "square"), ("experts", "solid", "circle")):
            rows = table[table.what == what].sort_values("bits")
            rate = rows.rise / rows.saved
            figure.add_scatter(
                x=rows.bits,
                y=rate,
                name=what,
                legendgroup=what,
                showlegend=column == 1,
                mode="lines+markers",
                line={"color": COLORS[what], "width": 2.5, "dash": dash},
                marker={"symbol": symbol, "size": 11, "line": {"color": INK, "width": 1}},
                error_y=_rate_whiskers(rows),
                customdata=rows[["rise", "saved"]],
                hovertemplate="%{x} bits: %{y:.3g}, %{customdata[0]:.4g} for %{customdata[1]:.4g}"
                f"<extra>{what}</extra>",
                row=1,
                col=column,
            )
            rates[what] = rate[rows.bits == bits].item()
        ratios.append(rates["attention"] / rates["experts"])
        middle = math.sqrt(rates["attention"] * rates["experts"])
        figure.add_scatter(
            x=[bits] * 3,
            y=[rates["attention"], middle, rates["experts"]],
            text=["", f"{_times(ratios[-1])}  ", ""],
            mode="lines+text",
            textposition="middle left",
            textfont={"size": 14},
            line={"color": INK, "width": 1.5, "dash": "dot"},
            showlegend=False,
            hoverinfo="skip",
            row=1,
            col=column,
        )
    figure.update_layout(
        template=TEMPLATE,
        height=430,
        title={
            "text": f"At {bits} bits a byte saved in attention costs {_times(ratios[0])} one in "
            f"the experts",
            "subtitle": {
                "text": f"each part alone in fewer bits, all else in 16; published for "
                f"Mixtral-8x7B: {_times(ratios[1])}"
            },
        },
        margin={"t": 100},
    )
    figure.update_xaxes(title="bits of a weight", dtick=1, range=_beyond(ours, published))
    figure.update_yaxes(type="log", dtick=1, tickformat="~g")
    figure.update_annotations(font_size=13)
    figure.update_yaxes(title="KL for each MiB saved<br>(nats per token)", col=1)
    figure.update_yaxes(title="perplexity rise<br>for each GiB saved", col=2)
    return figure


def _beyond(*tables: pd.DataFrame) -> list[float]:
    """A little more than all bits, and on the left room for the ratio."""
    bits = pd.concat([table.bits for table in tables])
    return [bits.min() - 0.8, bits.max() + 0.3]


def _rate_whiskers(rows: pd.DataFrame) -> dict | None:
    if "rise_low" not in rows:
        return None
    return {
        "array": (rows.rise_high - rows.rise) / rows.saved,
        "arrayminus": (rows.rise - rows.rise_low) / rows.saved,
        "color": INK,
        "thickness": 1.5,
        "width": 4,
    }


# ---------------------------------------------------------------------------------- bits per expert


def allocations(table: pd.DataFrame, bits: np.ndarray, use: np.ndarray) -> Figure:
    """Ways of sharing bits among the experts at equal bytes, and the shares of the best one.

    `table` has a row for each method ("exact", "by use", "uniform", "random") and budget, with the
    columns bits_per_weight, kl (nats per token), kl_low and kl_high; ratio_low and ratio_high, if
    they are there, are the interval of the KL of "exact" over that of the row. `bits` (layers,
    experts) is what the exact method gave each expert at one budget, `use` (layers, experts) the
    share of its layer's choices that each gets. The title is of the budget of uniform bits, of
    several the one nearest to 3.5.
    """
    figure = make_subplots(
        rows=2,
        cols=2,
        specs=[[{"rowspan": 2}, {}], [None, {}]],
        column_widths=[0.52, 0.48],
        horizontal_spacing=0.13,
        vertical_spacing=0.2,
        subplot_titles=[
            "",
            f"bits of each expert, {bits.mean():.3g} on average",
            "share of its layer's choices (%)",
        ],
    )
    kl_axis = LogAxis.over(table[["kl", "kl_low", "kl_high"]], _LEAST_KL)
    for method, rows in table.sort_values("bits_per_weight").groupby("method", sort=False):
        color, dash, symbol = _METHODS[method]
        figure.add_scatter(
            x=rows.bits_per_weight,
            y=rows.kl.clip(lower=kl_axis.floor),
            error_y=_whiskers(rows, kl_axis.floor),
            name=method,
            mode="lines+markers",
            line={"color": color, "width": 2.5, "dash": dash},
            marker={"symbol": symbol, "size": 8, "line": {"color": INK, "width": 1}},
            customdata=rows[["kl", "kl_low", "kl_high"]],
            hovertemplate="%{x:.3f} bits: %{customdata[0]:.4g} nats "
            f"[%{{customdata[1]:.3g}}, %{{customdata[2]:.3g}}]<extra>{method}</extra>",
            row=1,
            col=1,
        )
    _add_cells(figure, 1, bits, bits.astype(str), _bits_scale(), (1.5, 8.5), "bits")
    shares = 100 * use
    _add_cells(figure, 2, shares, np.char.mod("%.0f", shares), "Greys", (0, 2 * shares.max()), "%")
    figure.update_layout(
        template=TEMPLATE, height=470, title=_allocation_title(table), margin={"t": 95}
    )
    figure.update_annotations(font_size=13)
    figure.update_xaxes(title="bits per weight of the experts, constants included", row=1, col=1)
    figure.update_yaxes(kl_axis.layout(_KL_TITLE), row=1, col=1)
    figure.update_xaxes(title="expert", row=2, col=2)
    return figure


def _add_cells(
    figure: Figure,
    row: int,
    values: np.ndarray,
    texts: np.ndarray,
    colorscale: str | list,
    ends: tuple[float, float],
    unit: str,
) -> None:
    figure.add_heatmap(
        z=values,
        x=[str(expert) for expert in range(values.shape[1])],
        y=[f"layer {layer}" for layer in range(values.shape[0])],
        text=texts,
        texttemplate="%{text}",
        textfont={"size": 12},
        colorscale=colorscale,
        zmin=ends[0],
        zmax=ends[1],
        showscale=False,
        xgap=2,
        ygap=2,
        hovertemplate=f"%{{y}}, expert %{{x}}: %{{z:.4g}} {unit}<extra></extra>",
        row=row,
        col=2,
    )
    figure.update_xaxes(type="category", ticks="", showgrid=False, row=row, col=2)
    figure.update_yaxes(
        autorange="reversed", ticks="", ticksuffix=" ", showgrid=False, row=row, col=2
    )


def _bits_scale() -> list[list]:
    """A colour for each of 2 to 8 bits, those of the integers."""
    colors = [COLORS[f"int{bits}"] for bits in range(2, 9)]
    return [
        [(place + side) / len(colors), color]
        for place, color in enumerate(colors)
        for side in (0, 1)
    ]


def _allocation_title(table: pd.DataFrame) -> dict:
    uniform = table[table.method == "uniform"]
    here = uniform.loc[(uniform.bits_per_weight - 3.5).abs().idxmin()]
    exact = table[(table.method == "exact") & (table.bits_per_weight == here.bits_per_weight)]
    share = exact.kl.iloc[0] / here.kl
    interval = ""
    if "ratio_low" in table:
        interval = f" [{here.ratio_low:.0%}, {here.ratio_high:.0%}]"
    return {
        "text": f"Bits shared out exactly lose {share:.0%}{interval} of the KL of "
        f"{here.bits_per_weight:.2f} bits for all",
        "subtitle": {"text": "KL at equal bytes; <i>simulated</i>; intervals are 95%, over pages"},
    }


def additivity(table: pd.DataFrame) -> Figure:
    """Whether costs add up: the sum of what each part costs alone, and what all cost together.

    `table` has the columns predicted, measured, measured_low, measured_high (KL in nats per token)
    and kind, which colours the points.
    """
    seen = table[["predicted", "measured", "measured_low", "measured_high"]]
    kl_axis = LogAxis.over(seen, _LEAST_KL)
    figure = Figure(layout={"template": TEMPLATE, "height": 470})
    ends = [kl_axis.floor, seen.to_numpy().max()]
    figure.add_scatter(
        x=ends,
        y=ends,
        name="costs add up",
        mode="lines",
        line={"color": INK, "width": 1.5, "dash": "dash"},
        hoverinfo="skip",
    )
    for (kind, rows), (color, symbol) in zip(
        table.groupby("kind", sort=False), _KINDS, strict=False
    ):
        figure.add_scatter(
            x=rows.predicted.clip(lower=kl_axis.floor),
            y=rows.measured.clip(lower=kl_axis.floor),
            error_y=_whiskers(rows, kl_axis.floor, "measured"),
            name=kind,
            mode="markers",
            marker={
                "color": color,
                "symbol": symbol,
                "size": 8,
                "line": {"color": "white", "width": 1},
            },
            customdata=rows[["predicted", "measured", "measured_low", "measured_high"]],
            hovertemplate="summed %{customdata[0]:.4g}, measured %{customdata[1]:.4g} "
            f"[%{{customdata[2]:.3g}}, %{{customdata[3]:.3g}}] nats<extra>{kind}</extra>",
        )
    factors = np.exp(np.abs(np.log(table.measured / table.predicted)))
    figure.update_layout(
        title={
            "text": f"Sums of single costs are right within a factor {factors.max():.2g}, half of "
            f"them within {factors.median():.2g}",
            "subtitle": {
                "text": f"{len(table)} mixtures; <i>simulated</i>; intervals are 95%, over pages"
            },
        }
    )
    figure.update_xaxes(kl_axis.layout("sum of the costs of each alone (nats)"))
    figure.update_yaxes(kl_axis.layout("measured together<br>(KL, nats per token)"))
    return figure


# ------------------------------------------------------------------------------------ drawing tools


def _whiskers(rows: pd.DataFrame, floor: float, of: str = "kl") -> dict | None:
    """Intervals as a trace draws them, none where the table has none."""
    if f"{of}_low" not in rows:
        return None
    middle, low, high = (
        rows[name].clip(lower=floor).to_numpy() for name in (of, f"{of}_low", f"{of}_high")
    )
    return {
        "array": high - middle,
        "arrayminus": middle - low,
        "color": INK,
        "thickness": 1.2,
        "width": 3,
    }


def _up(pixels: tuple[int, int]) -> list[float]:
    """A panel's part of the plot, from pixels above the lowest panel."""
    return [end / _PLOT for end in pixels]


def _amount(value: float) -> str:
    """With as many digits as are read easily: 2.84, 18.6, 384, 24,300."""
    return f"{value:,.{0 if value >= 100 else 1 if value >= 10 else 2}f}"


def _times(ratio: float) -> str:
    """Two significant digits: "5.4 times", "1,200 times"."""
    rounded = float(f"{ratio:.2g}")
    return f"{rounded:,.0f} times" if rounded >= 10 else f"{rounded:g} times"
