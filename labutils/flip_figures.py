"""Pictures of tokens that change their experts: how near they are to it, how often, at what cost.

Like `figures`: a record in, a `plotly.graph_objects.Figure` out, the finding in the title. The
records are tables. Their `low` and `high` are the 95% interval around the estimate before them, and
always drawn. What is too small for a logarithmic axis is drawn at its lower end, marked "or
less"; the hover has the exact value.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import pandas as pd
import torch
from plotly.colors import sample_colorscale
from plotly.graph_objects import Figure
from plotly.subplots import make_subplots

from .flips import margins
from .meter import MIB
from .moe import Routing
from .style import COLORS, INK, SOFT_INK, TEMPLATE, LogAxis

_SERIES = ("#56B4E9", "#0072B2", "#E69F00", "#B0006D", "#009E73", INK)
_DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
_SYMBOLS = ("circle", "square", "diamond", "x", "triangle-up", "cross")
_SHAKEN_COLORS = {
    "router": COLORS["router"],
    "experts": COLORS["experts"],
    "attention": COLORS["attention"],
    "router logits": "#7B1E4B",
    "hidden states": "#66C2E0",
    "as many expert weights": "#8A7A2E",
}
_CELL_COLORS = {"routing only": "router", "weights only": "experts"}
_CELL_PATTERNS = {"routing only": "/", "weights only": ""}
_LEAST_KL = 1e-7  # nats; what 32-bit logits can tell apart
_RANGE = " [%{customdata[1]:.3g}, %{customdata[2]:.3g}]"
_PERCENT_RANGE = " [%{customdata[1]:.3g}%, %{customdata[2]:.3g}%]"


# ------------------------------------------------------------------------------------------ margins


def margin_under_noise(margin: float, noise: float, drawn: torch.Tensor) -> Figure:
    """One token between two experts: its margin as noise finds it, and the part that flips.

    `drawn` (draws) are margins after Gaussian noise of standard deviation `noise`, above 0, on each
    of the two logits. Over them stands the density N(margin, sqrt(2) noise).
    """
    expected = NormalDist(margin, 2**0.5 * noise)
    width = expected.stdev / 6
    first, last = (drawn.aminmax()[side].item() for side in (0, 1))
    edges = width * np.arange(math.floor(first / width), math.ceil(last / width) + 1)
    density, _ = np.histogram(drawn.numpy(), bins=edges, density=True)
    middles = edges[:-1] + width / 2
    figure = Figure(layout={"template": TEMPLATE, "height": 400, "bargap": 0})
    for name, inside, color, pattern in (
        ("flipped: the other expert is ahead", middles < 0, "#D55E00", "/"),
        ("the same expert", middles > 0, "#9CC8E3", ""),
    ):
        figure.add_bar(
            x=middles[inside],
            y=density[inside],
            width=width,
            name=name,
            marker={
                "color": color,
                "pattern": {"shape": pattern, "fillmode": "overlay", "fgcolor": "white"},
                "line": {"width": 0},
            },
            hovertemplate="margin %{x:.2f}: density %{y:.3f}<extra></extra>",
        )
    x = np.linspace(margin - 4 * expected.stdev, margin + 4 * expected.stdev, 161)
    figure.add_scatter(
        x=x,
        y=[expected.pdf(place) for place in x],
        name="Gaussian, \u221a2 times the noise",
        mode="lines",
        line={"color": INK, "width": 2},
        hovertemplate="margin %{x:.2f}: density %{y:.3f}<extra></extra>",
    )
    for place, text, dash, side in (
        (0, "a tie", "solid", "right"),
        (margin, f"without noise: {margin:.2f}", "dash", "left"),
    ):
        figure.add_vline(
            x=place,
            line={"color": INK, "width": 1.5, "dash": dash},
            annotation={"text": text, "y": 1.02, "yanchor": "bottom", "xanchor": side},
        )
    flipped = (drawn < 0).double().mean().item()
    figure.update_layout(
        title={
            "text": f"A margin of {margin:.2f} under noise of {noise:.2f} flips "
            f"{flipped:.1%} of the time",
            "subtitle": {
                "text": "predicted: \u03a6(\u2212margin / (\u221a2 noise)) = "
                f"{expected.cdf(0):.1%}; drawn {len(drawn):,} times"
            },
        },
        margin={"t": 95},
        legend={"traceorder": "normal"},
    )
    figure.update_xaxes(title="margin after noise (difference of two logits)", showgrid=False)
    figure.update_yaxes(title="density (per unit of the logits)")
    return figure


def margins_by_layer(routings: Sequence[Routing]) -> Figure:
    """Which share of each layer's tokens is nearer than x to another set of experts.

    Margins are divided by the standard deviation of all logits of their layer, so that layers can
    be compared.
    """
    x = np.geomspace(1e-3, 10, 201)
    shares = []
    figure = Figure(layout={"template": TEMPLATE, "height": 420})
    for layer, (routing, look) in enumerate(
        zip(routings, _layer_looks(len(routings)), strict=True)
    ):
        scaled = (margins(routing) / routing.logits.std()).sort().values.numpy()
        shares.append(np.searchsorted(scaled, 0.1) / len(scaled))
        figure.add_scatter(
            x=x,
            y=100 * np.searchsorted(scaled, x) / len(scaled),
            name=f"layer {layer}",
            mode="lines",
            line=look["line"],
            hovertemplate="%{y:.2f}% of the tokens are nearer than %{x:.3g}"
            f"<extra>layer {layer}</extra>",
        )
    figure.add_vline(x=0.1, line={"color": SOFT_INK, "width": 1.5, "dash": "dot"})
    figure.update_layout(
        title={
            "text": f"{_span([100 * share for share in shares])}% of the tokens are nearer than a "
            "tenth of a standard deviation to a flip",
            "subtitle": {
                "text": f"margin: the smallest chosen logit minus the largest not chosen; "
                f"{len(routings[0].chosen):,} tokens in each layer"
            },
        }
    )
    figure.update_xaxes(
        title="margin (standard deviations of the layer's logits)",
        type="log",
        tickvals=[0.001, 0.01, 0.1, 1, 10],
    )
    figure.update_yaxes(title="tokens with a smaller margin (%)", rangemode="tozero")
    return figure


# -------------------------------------------------------------------------------------------- flips


def flip_curves(table: pd.DataFrame) -> Figure:
    """How many tokens noise on the logits flips, predicted and measured; one panel a place.

    `table` has the columns where, noise (the standard deviation on each logit; 0 is not drawn),
    predicted, nearest_pair (predicted from the two experts at the boundary alone), measured, low
    and high (shares of the tokens).
    """
    table = table[table.noise > 0]
    places = list(table["where"].unique())
    wide = min(3, len(places))
    rows = math.ceil(len(places) / wide)
    figure = make_subplots(
        rows=rows,
        cols=wide,
        shared_yaxes=True,
        horizontal_spacing=0.04,
        vertical_spacing=0.4 / rows,
        subplot_titles=places,
    )
    for index, place in enumerate(places):
        lines = table[table["where"] == place].sort_values("noise")
        where = {"row": index // wide + 1, "col": index % wide + 1, "showlegend": index == 0}
        for name, column, dash, color in (
            ("predicted from all experts", "predicted", "solid", "#0072B2"),
            ("predicted from the nearest pair alone", "nearest_pair", "dash", "#D55E00"),
        ):
            figure.add_scatter(
                x=lines.noise,
                y=100 * lines[column],
                name=name,
                legendgroup=name,
                mode="lines",
                line={"color": color, "width": 2.5, "dash": dash},
                hovertemplate=f"noise %{{x:.3g}}: %{{y:.2f}}%<extra>{name}</extra>",
                **where,
            )
        figure.add_scatter(
            x=lines.noise,
            name="measured",
            legendgroup="measured",
            mode="markers",
            marker={"color": INK, "size": 5},
            **_with_interval(100 * lines[["measured", "low", "high"]]),
            hovertemplate="noise %{x:.3g}: %{y:.2f}%" + _PERCENT_RANGE + "<extra>measured</extra>",
            **where,
        )
    hits = {
        column: int(table[column].between(table.low, table.high).sum())
        for column in ("predicted", "nearest_pair")
    }
    figure.update_layout(
        template=TEMPLATE,
        height=170 + 260 * rows,
        title={
            "text": f"Predicted within the interval at {hits['predicted']} of {len(table)} noise "
            f"levels, from one pair alone at {hits['nearest_pair']}",
            "subtitle": {
                "text": "share of tokens whose set of experts changes; intervals are 95%, so one "
                "in twenty may miss"
            },
        },
        margin={"t": 100},
    )
    figure.update_xaxes(type="log", dtick=1, tickformat="~g", title="noise on each logit (sd)")
    figure.update_yaxes(range=[0, 103])
    figure.update_yaxes(title="flipped tokens (%)", col=1)
    return figure


def drift_by_layer(table: pd.DataFrame) -> Figure:
    """Which share of each layer's tokens flips, and for what cause; one panel a bit width.

    `table` has the columns bits, layer, cause, flips, low and high (shares of the tokens). The
    title names the largest drift of a cause that begins with "activations", or of any cause if
    there is none.
    """
    widths = sorted(table.bits.unique())
    figure = make_subplots(
        rows=1,
        cols=len(widths),
        shared_yaxes=True,
        horizontal_spacing=0.03,
        subplot_titles=[f"{bits} bits" for bits in widths],
    )
    for column, bits in enumerate(widths, start=1):
        for place, cause in enumerate(table.cause.unique()):
            rows = table[(table.bits == bits) & (table.cause == cause)]
            color = COLORS["router"] if cause.startswith("router") else _SERIES[place % 6]
            figure.add_scatter(
                x=[str(layer) for layer in rows.layer],
                name=cause,
                legendgroup=cause,
                showlegend=column == 1,
                mode="lines+markers",
                **_look(place, color),
                **_with_interval(100 * rows[["flips", "low", "high"]]),
                hovertemplate="layer %{x}: %{y:.2f}%" + _PERCENT_RANGE + f"<extra>{cause}</extra>",
                row=1,
                col=column,
            )
    figure.update_layout(
        template=TEMPLATE,
        height=430,
        title=_drift_title(table),
        margin={"t": 100, "b": 125},
    )
    figure.update_xaxes(title="layer", type="category", showgrid=False)
    figure.update_yaxes(rangemode="tozero")
    figure.update_yaxes(title="flipped tokens (%)", col=1)
    return figure


def _drift_title(table: pd.DataFrame) -> dict:
    drifted = table[table.cause.str.startswith("activations")]
    largest = (table if drifted.empty else drifted).set_index("cause").nlargest(1, "flips")
    ((cause, row),) = largest.iterrows()
    through = f" ({cause})" if drifted.empty else " with its router untouched"
    return {
        "text": f"In {row.bits:.0f} bits {row.flips:.0%} of the tokens flip in layer "
        f"{row.layer:.0f}{through}",
        "subtitle": {
            "text": f"{cause}; " * (not drifted.empty)
            + "share of tokens whose set of experts changes, with 95% intervals"
        },
    }


# --------------------------------------------------------------------------------- flips and damage


def noise_curves(table: pd.DataFrame) -> Figure:
    """How many tokens flip under noise on each part of a model, and what the noise costs.

    `table` has the columns what, noise (relative; 0 is not drawn), flips, flips_low, flips_high
    (shares of the tokens), kl, kl_low and kl_high (nats per token). The title compares the router
    with the experts where the noise is nearest to 10% and both flip tokens.
    """
    table = table[table.noise > 0]
    percent = 100 * table.noise
    said = percent.map("{:g}% noise".format)
    flips, kl = (table[[value, f"{value}_low", f"{value}_high"]] for value in ("flips", "kl"))
    figure = make_subplots(rows=1, cols=2, horizontal_spacing=0.2)
    curves = _Curves(table.what, percent, said, _SHAKEN_COLORS)
    curves.add(figure, 1, 100 * flips, 0, "flipped tokens (%)", "%")
    title = "KL from the undisturbed model<br>(nats per token)"
    curves.add(figure, 2, kl, _LEAST_KL, title, " nats")
    figure.update_layout(
        template=TEMPLATE, height=460, title=_noise_title(table), margin={"b": 105}
    )
    levels = [100 * noise for noise in sorted(table.noise.unique())]
    figure.update_xaxes(
        title="relative noise (%)",
        type="log",
        tickvals=levels,
        ticktext=[f"{level:.3g}" for level in levels],
    )
    return figure


def _noise_title(table: pd.DataFrame) -> dict:
    both = table.pivot(index="noise", columns="what", values=["flips", "kl"])
    router, experts = (both.xs(what, axis=1, level="what") for what in ("router", "experts"))
    usable = both.index[(router > 0).all(axis=1) & (experts > 0).all(axis=1)]
    noise = min(usable, key=lambda level: abs(math.log(level / 0.1)))
    ratio = router.loc[noise] / experts.loc[noise]
    numbers = [
        f"{what} {row.flips:.2%} and {_plain(row.kl)} nats"
        for what, row in (("router", router.loc[noise]), ("experts", experts.loc[noise]))
    ]
    return {
        "text": f"At {100 * noise:.3g}% noise the router flips {_of(ratio.flips)} what the "
        f"experts flip, at {_of(ratio.kl)} the KL",
        "subtitle": {"text": "; ".join(numbers) + "; flips are of sets, mean over the layers"},
    }


def bits_and_bytes(table: pd.DataFrame) -> Figure:
    """What rounding each component costs, in KL and in KL for each MiB that it saves.

    `table` has the columns what, bits, kl, kl_low, kl_high (nats per token) and bytes_saved (of
    those in 16 bits). The title speaks of 3 bits, or of the fewest there are.
    """
    saved = table.bytes_saved / MIB
    said = table.bits.map("{} bits, ".format) + saved.map("{:.3g} MiB saved".format)
    kl = table[["kl", "kl_low", "kl_high"]]
    figure = make_subplots(rows=1, cols=2, horizontal_spacing=0.2)
    curves = _Curves(table.what, table.bits.astype(str), said, COLORS)
    title = "KL from the unrounded model<br>(nats per token)"
    curves.add(figure, 1, kl, _LEAST_KL, title, " nats")
    least, title = _LEAST_KL / saved.max(), "KL for each MiB saved<br>(nats per token)"
    curves.add(figure, 2, kl.div(saved, axis=0), least, title, " nats per MiB")
    figure.update_layout(template=TEMPLATE, height=430, title=_bytes_title(table))
    widths = [str(bits) for bits in sorted(table.bits.unique())]
    figure.update_xaxes(
        title="bits of a code",
        type="category",
        categoryorder="array",
        categoryarray=widths,
        showgrid=False,
    )
    return figure


def _bytes_title(table: pd.DataFrame) -> dict:
    bits = 3 if 3 in set(table.bits) else table.bits.min()
    router, experts = (
        table[(table.bits == bits) & (table.what == what)].iloc[0] for what in ("router", "experts")
    )
    ratio = max(router.kl, _LEAST_KL) / max(experts.kl, _LEAST_KL)
    per_byte = ratio * experts.bytes_saved / router.bytes_saved
    return {
        "text": f"In {bits} bits the router costs {_of(ratio)} the experts' KL, and "
        f"{_of(per_byte)} it per byte saved",
        "subtitle": {
            "text": "Simulated: weights rounded, kept in 32 bits; bytes saved against 16 bits; "
            "95% intervals"
        },
    }


def forced_exchanges(table: pd.DataFrame) -> Figure:
    """What it costs to exchange experts in one layer, for every token; grouped by layer.

    `table` has the columns layer, exchange, kl, low and high (nats per token). The title compares
    the exchange that begins with "first expert" with that of the "second expert" for the same
    other.
    """
    names = table.exchange.unique()
    colors = dict(zip(names, _SERIES, strict=False))
    figure = _grouped_dots(table, [f"layer {layer}" for layer in table.layer], "exchange", colors)
    kl = table.pivot(index="layer", columns="exchange", values="kl").clip(lower=_LEAST_KL)
    first = next(name for name in kl if name.startswith("first expert"))
    ratios = kl[first] / kl[first.replace("first", "second", 1)]
    return figure.update_layout(
        title={
            "text": f"Exchanging the first expert costs {_span(ratios)} times as much as "
            "exchanging the second",
            "subtitle": {
                "text": f"each{first.removeprefix('first expert')}, in one layer at a time; the "
                "range is that of the layers; 95% intervals"
            },
        },
        margin={"b": 105},
    )


def damage_by_text(table: pd.DataFrame) -> Figure:
    """What the same disturbances cost on different texts; grouped by text.

    `table` has the columns text, what, flips (share of tokens), kl, low and high (nats per token),
    the text that the model knows best first. The title compares the router with the experts on the
    first and on the last.
    """
    figure = _grouped_dots(table, list(table.text), "what", _SHAKEN_COLORS)
    texts = table.text.unique()
    kl = table.pivot(index="text", columns="what", values="kl")
    ratio = (kl.router / kl.experts).loc[texts]
    flips = 100 * table[table.what == "router"].flips
    return figure.update_layout(
        title={
            "text": f"Router: {_of(ratio.iloc[0])} the experts' KL on {texts[0]}, "
            f"{_of(ratio.iloc[-1]).removesuffix(' of')} on {texts[-1]}",
            "subtitle": {
                "text": f"noise on the router flips {flips.min():.0f} to {flips.max():.0f}% of the "
                "tokens on each; 95% intervals"
            },
        }
    )


def cost_by_margin(table: pd.DataFrame) -> Figure:
    """What exchanging the second expert for the next best costs, by how far apart the two are.

    `table` has the columns layer, margin (the middle of a fifth of the tokens, in logits), kl, low
    and high (nats per token of that fifth).
    """
    estimates = table[["kl", "low", "high"]]
    axis = LogAxis.over(estimates, _LEAST_KL)
    figure = Figure(layout={"template": TEMPLATE, "height": 430})
    by_layer = table.groupby("layer")
    for (layer, rows), look in zip(by_layer, _layer_looks(by_layer.ngroups), strict=True):
        figure.add_scatter(
            x=rows.margin,
            name=f"layer {layer}",
            mode="lines+markers",
            **look,
            **_with_interval(estimates.loc[rows.index], axis.floor),
            hovertemplate="margin %{x:.3g}: %{customdata[0]:.3g} nats"
            + _RANGE
            + f"<extra>layer {layer}</extra>",
        )
    figure.update_layout(title=_margin_title(table))
    figure.update_xaxes(
        title="margin (logits): middle of a fifth of the tokens",
        type="log",
        dtick="D2",
        tickformat="~g",
    )
    figure.update_yaxes(axis.layout("KL of these tokens<br>(nats per token)"))
    return figure


def _margin_title(table: pd.DataFrame) -> dict:
    ordered = table.sort_values("margin").groupby("layer")
    nearest, farthest = ordered.first(), ordered.last()
    apart = farthest.low > nearest.high
    ratio = (farthest.kl / nearest.kl.clip(lower=_LEAST_KL))[apart]
    times = f", {_span(ratio)} times" if apart.any() else ""
    return {
        "text": "Far from a tie another second expert costs more in "
        f"{apart.sum()} of {len(apart)} layers{times}",
        "subtitle": {
            "text": "the farthest fifth of the tokens over the nearest, where their 95% intervals "
            "do not meet"
        },
    }


def two_by_two(table: pd.DataFrame) -> Figure:
    """What changed routing and changed weights cost, each alone, as shares of what both cost.

    `table` has the columns where (a text or a model), bits, cell ("routing only", "weights only"),
    share (of what both cost), low and high, nats (of the cell) and both (what both cost), in nats
    per token. What is published has no interval: NaN. What "weights only" leaves to 100% is the
    damage that a replay of the old routing takes away; the title says how much that is.
    """
    cells = table.set_index(["where", "bits", "cell"])
    places = cells.xs("weights only", level="cell")
    labels = [
        f"{where}, {bits} bits<br>both: {_plain(nats)} nats"
        for (where, bits), nats in places.both.items()
    ]
    figure = Figure(
        layout={"template": TEMPLATE, "barmode": "group", "height": 190 + 52 * len(places)}
    )
    for cell, color in _CELL_COLORS.items():
        rows = cells.xs(cell, level="cell").loc[places.index]
        interval = _with_interval(100 * rows[["share", "low", "high"]])
        figure.add_bar(
            orientation="h",
            y=labels,
            x=interval["y"],
            error_x=interval["error_y"] | {"color": INK},
            name=cell,
            marker={
                "color": COLORS[color],
                "pattern": {
                    "shape": _CELL_PATTERNS[cell],
                    "fillmode": "overlay",
                    "fgcolor": "white",
                    "size": 6,
                },
            },
            customdata=[
                (f" [{100 * row.low:.1f}%, {100 * row.high:.1f}%]" * (not np.isnan(row.low)))
                + f": {row.nats:.4g} of {row.both:.4g} nats"
                for row in rows.itertuples()
            ],
            hovertemplate=f"%{{x:.1f}}%%{{customdata}}<extra>{cell}</extra>",
        )
    figure.add_vline(x=100, line={"color": INK, "width": 1.5})
    figure.update_layout(
        title=_replay_title(places), legend={"traceorder": "normal"}, margin={"t": 80}
    )
    figure.update_xaxes(title="share of what both cost (%)", rangemode="tozero")
    figure.update_yaxes(
        categoryorder="array",
        categoryarray=labels,
        range=[len(labels) - 0.5, -0.5],
        ticks="",
        ticksuffix=" ",
        showgrid=False,
    )
    return figure


def _replay_title(weights_only: pd.DataFrame) -> dict:
    regained = 100 * (1 - weights_only[["share", "low", "high"]])
    published = regained.low.isna()
    places = []
    for where, rows in regained[~published].groupby("where", sort=False):
        from_nothing = rows.high.min() <= 0  # the shares' upper ends are the lower ends here
        span = f"up to {_number(rows.share.max())}" if from_nothing else _span(rows.share)
        places.append(f"{span}% on {where}")
    sources = [f"{row.share:.0f}% on {row.Index[0]}" for row in regained[published].itertuples()]
    return {
        "text": f"The old routing regains {', '.join(places)}",
        "subtitle": {
            "text": 'of the KL: what "weights only" leaves to 100%; 95% intervals of the shares'
            + "".join(f"; published: {source}" for source in sources)
        },
    }


def expert_map(kl: pd.DataFrame, use: pd.DataFrame, done: str = "in 2 bits") -> Figure:
    """What it costs to damage one expert, for each expert of each layer.

    `kl` has a row for each layer and a column for each expert, in nats per token; `use`, of the
    same shape, the share of its layer's choices that an expert gets. `done` says what was done to
    it: "in 2 bits", "removed".
    """
    values = kl.to_numpy()
    drawn = np.log10(values.clip(min=_LEAST_KL))
    decades = range(math.floor(drawn.min()), math.ceil(drawn.max()) + 1)
    layers, experts = ([str(name) for name in axis] for axis in (kl.index, kl.columns))
    figure = Figure(layout={"template": TEMPLATE, "height": 170 + 52 * len(layers)})
    figure.add_heatmap(
        z=drawn,
        x=experts,
        y=[f"layer {layer}" for layer in layers],
        text=[[_plain(value) for value in row] for row in values],
        texttemplate="%{text}",
        textfont={"size": 11},
        customdata=np.stack([values, 100 * use.to_numpy()], axis=-1),
        colorscale="Oranges",
        xgap=2,
        ygap=2,
        colorbar={
            "title": {"text": f"KL, {done}<br>(nats per token)", "font": {"size": 13}},
            "thickness": 12,
            "tickvals": list(decades),
            "ticktext": [f"10<sup>{decade}</sup>" for decade in decades],
        },
        hovertemplate="%{y}, expert %{x}: %{customdata[0]:.4g} nats<br>"
        "gets %{customdata[1]:.1f}% of its layer's choices<extra></extra>",
    )
    row, column = np.unravel_index(values.argmax(), values.shape)
    ratio = values.max() / max(np.median(values), _LEAST_KL)
    figure.update_layout(
        title={
            "text": f"{done[0].upper()}{done[1:]}, expert {experts[column]} of layer {layers[row]} "
            f"costs most: {_number(ratio)} times what the median expert costs",
            "subtitle": {
                "text": f"one expert at a time; it gets {use.to_numpy()[row, column]:.0%} of its "
                f"layer's choices, even use would be {100 / len(experts):.3g}%"
            },
        },
        margin={"b": 60},
    )
    figure.update_xaxes(title="expert", type="category", ticks="", showgrid=False)
    figure.update_yaxes(autorange="reversed", ticks="", ticksuffix=" ", showgrid=False)
    return figure


# ------------------------------------------------------------------------------------ drawing tools


def _grouped_dots(table: pd.DataFrame, x: list[str], by: str, colors: dict[str, str]) -> Figure:
    """KL with its intervals over the groups `x`, the series of the column `by` side by side."""
    estimates = table[["kl", "low", "high"]]
    axis = LogAxis.over(estimates, _LEAST_KL)
    figure = Figure(
        layout={"template": TEMPLATE, "height": 440, "scattermode": "group", "scattergap": 0.4}
    )
    places = pd.Series(x, index=table.index)
    for place, (name, rows) in enumerate(table.groupby(by, sort=False)):
        figure.add_scatter(
            x=places[rows.index],
            name=name,
            mode="markers",
            **_look(place, colors[name]),
            **_with_interval(estimates.loc[rows.index], axis.floor),
            hovertemplate="%{x}: %{customdata[0]:.4g} nats" + _RANGE + f"<extra>{name}</extra>",
        )
    figure.update_xaxes(showgrid=False)
    figure.update_yaxes(axis.layout("KL from the undisturbed model<br>(nats per token)"))
    return figure


@dataclass(frozen=True, eq=False)
class _Curves:
    """A curve for each of the values of `what`, in panels with a logarithmic axis each.

    `x`, and what hovering `said` of it, are of the same rows; `colors` are by what.
    """

    what: pd.Series
    x: pd.Series
    said: pd.Series
    colors: Mapping[str, str]

    def add(
        self,
        figure: Figure,
        column: int,
        estimates: pd.DataFrame,
        least: float,
        title: str,
        unit: str,
    ) -> None:
        """The panel of `column`: `estimates` (estimate, low, high), down to `least`."""
        axis = LogAxis.over(estimates, least)
        for place, (what, rows) in enumerate(self.what.groupby(self.what, sort=False)):
            figure.add_scatter(
                x=self.x[rows.index],
                name=what,
                legendgroup=what,
                showlegend=column == 1,
                mode="lines+markers",
                **_look(place, self.colors[what]),
                **_with_interval(estimates.loc[rows.index], axis.floor),
                text=self.said[rows.index],
                hovertemplate=f"%{{text}}: %{{customdata[0]:.3g}}{unit}{_RANGE}"
                f"<extra>{what}</extra>",
                row=1,
                col=column,
            )
        figure.update_yaxes(axis.layout(title), col=column)


def _with_interval(estimates: pd.DataFrame, floor: float = -math.inf) -> dict:
    """What a trace needs to draw three columns, estimate, low and high: not below `floor`."""
    middle, low, high = estimates.clip(lower=floor).to_numpy().T
    return {
        "y": middle,
        "error_y": {
            "array": high - middle,
            "arrayminus": middle - low,
            "thickness": 1.5,
            "width": 4,
        },
        "customdata": estimates,
    }


def _look(place: int, color: str) -> dict:
    """The line and the marker of the series at `place`: to be told apart without colours too."""
    return {
        "line": {"color": color, "width": 2.5, "dash": _DASHES[place % 6]},
        "marker": {
            "color": color,
            "symbol": _SYMBOLS[place % 6],
            "size": 8,
            "line": {"color": INK, "width": 1},
        },
    }


def _layer_looks(layers: int) -> list[dict]:
    """One for each layer, the first the darkest."""
    colors = sample_colorscale("Viridis", np.linspace(0, 0.85, layers))
    return [_look(layer, color) for layer, color in enumerate(colors)]


def _number(value: float) -> str:
    """Two significant digits, thousands apart: 0.19, 5.4, 640, 1,200."""
    rounded = float(f"{value:.2g}")
    return f"{rounded:,.0f}" if rounded >= 10 else f"{rounded:g}"


def _plain(nats: float) -> str:
    """Two significant digits, without an exponent: 0.000012."""
    return np.format_float_positional(nats, precision=2, fractional=False, trim="-")


def _of(ratio: float) -> str:
    """A ratio to stand before a noun: "5.4 times", "a sixth of", "1/16 of"."""
    names = "half, a third, a quarter, a fifth, a sixth, a seventh, an eighth, a ninth, a tenth"
    if ratio > 2 / 3:
        return f"{_number(ratio)} times"
    parts = round(1 / ratio)
    return f"{names.split(', ')[parts - 2] if parts <= 10 else f'1/{_number(parts)}'} of"


def _span(values: Sequence[float]) -> str:
    """From the smallest to the largest, where they differ: "4 to 30", "4"."""
    low, high = _number(min(values)), _number(max(values))
    return low if low == high else f"{low} to {high}"
