"""Pictures of rounding that looks at data: errors pushed on, and methods compared.

Like `figures`: a record in, a `plotly.graph_objects.Figure` out, the finding in the title.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import torch
from plotly.graph_objects import Figure
from plotly.subplots import make_subplots

from .calibrated import RoundedMatrix, Statistics
from .style import COLORS, INK, TEMPLATE

_METHOD_COLORS = {"rtn": "#7A7A7A", "gptq": "#0072B2", "awq": "#D55E00"}
_METHOD_DASHES = {"rtn": "dot", "gptq": "solid", "awq": "dash"}
_DASHES = {"2": "solid", "3": "dash", "4": "dot"}
_SIMULATED = "simulated: rounded, then kept in 32 bits"


def two_weights(
    seen: Statistics, weight: torch.Tensor, levels: torch.Tensor, path: torch.Tensor
) -> Figure:
    """One row of two weights, the grid it may go to, and where plain rounding and GPTQ take it.

    `seen` are the statistics of their two inputs, `levels` the values that each can take, `path`
    (points, 2) the way GPTQ goes from `weight`. Contours join what costs the same output error.
    """
    plain = levels[(weight[:, None] - levels).abs().argmin(dim=1)]
    reach = 1.2 * (levels[1] - levels[0]).item()
    centre = ((plain + path[-1]) / 2).tolist()
    axes = [np.linspace(middle - reach, middle + reach, 41) for middle in centre]
    across, up = np.meshgrid(axes[0] - weight[0].item(), axes[1] - weight[1].item())
    gram = seen.gram.tolist()
    squared = gram[0][0] * across**2 + 2 * gram[0][1] * across * up + gram[1][1] * up**2
    lost = [
        ((point - weight) @ seen.gram @ (point - weight)).sqrt().item()
        for point in (plain, path[-1])
    ]
    figure = Figure(layout={"template": TEMPLATE, "height": 520})
    figure.add_contour(
        x=axes[0],
        y=axes[1],
        z=(np.sqrt(squared.clip(0)) / lost[0]).round(3),
        zmin=0,
        zmax=3,
        contours={"start": 0.25, "end": 3, "size": 0.25, "coloring": "fill"},
        colorscale=[[0, "#FFFFFF"], [1, "#9A9A9A"]],
        line={"color": "#8A8A8A", "width": 0.7},
        colorbar={"title": "output error,<br>plain = 1", "thickness": 12},
        hovertemplate="%{x:.2f}, %{y:.2f}: %{z:.2f} times the error of plain rounding"
        "<extra></extra>",
    )
    figure.add_scatter(
        x=levels.repeat_interleave(len(levels)).tolist(),
        y=levels.repeat(len(levels)).tolist(),
        mode="markers",
        name="what the format can hold",
        marker={"color": "white", "size": 11, "line": {"color": INK, "width": 2}},
        hovertemplate="level %{x:.2f}, %{y:.2f}<extra></extra>",
    )
    for name, points, key in (
        ("plain rounding", torch.stack([weight, plain]), "rtn"),
        ("GPTQ: round the first, push on, round the second", path, "gptq"),
    ):
        figure.add_scatter(
            x=points[:, 0].tolist(),
            y=points[:, 1].tolist(),
            mode="lines+markers",
            name=name,
            line={"color": _METHOD_COLORS[key], "width": 3, "dash": _METHOD_DASHES[key]},
            marker={"size": 11, "symbol": "arrow", "angleref": "previous"},
            hovertemplate="%{x:.3f}, %{y:.3f}<extra>" + key.upper() + "</extra>",
        )
    figure.add_annotation(
        x=weight[0].item(),
        y=weight[1].item(),
        text="the weights",
        xanchor="left",
        xshift=8,
        showarrow=False,
    )
    figure.update_layout(
        title={
            "text": f"The farther point costs the outputs {1 - lost[1] / lost[0]:.0%} less",
            "subtitle": {"text": "both weights see nearly the same input: only their sum matters"},
        },
        margin={"b": 125},
    )
    for update, axis, name in (
        (figure.update_xaxes, axes[0], "first"),
        (figure.update_yaxes, axes[1], "second"),
    ):
        update(title=f"{name} weight", range=[axis[0], axis[-1]], showgrid=False)
    return figure


def pushed_errors(changes: Mapping[int, torch.Tensor]) -> Figure:
    """How far each weight of a matrix is from where it began, after so many rounded columns.

    `changes` maps the number of columns rounded to W_now - W (rows, columns), the last of them all.
    Left of the line stands what rounding did, right of it what was pushed on.
    """
    figure = make_subplots(
        rows=1,
        cols=len(changes),
        shared_yaxes=True,
        horizontal_spacing=0.02,
        subplot_titles=[f"{columns} rounded" for columns in changes],
    )
    largest = max(change.abs().quantile(0.99).item() for change in changes.values())
    for place, (columns, change) in enumerate(changes.items(), start=1):
        figure.add_heatmap(
            z=change.double().numpy().round(4).tolist(),
            coloraxis="coloraxis",
            hovertemplate="row %{y}, column %{x}: %{z:+.3f}<extra></extra>",
            row=1,
            col=place,
        )
        if columns < change.shape[1]:
            figure.add_vline(x=columns - 0.5, line={"color": INK, "width": 2}, row=1, col=place)
    moved = [
        change[:, columns:].square().mean().sqrt().item()
        for columns, change in changes.items()
        if columns < change.shape[1]
    ]
    figure.update_layout(
        template=TEMPLATE,
        height=330,
        title={
            "text": f"Before its turn comes, a weight is moved by up to {moved[-1]:.2f}"
            if len(moved) == 1
            else f"Weights still to come move by {moved[0]:.3f} at first and {moved[-1]:.3f} later",
            "subtitle": {"text": "root mean square right of the line; red is down, blue is up"},
        },
        coloraxis={
            "colorscale": "RdBu",
            "cmin": -largest,
            "cmax": largest,
            "colorbar": {"title": "change", "thickness": 12},
        },
        margin={"t": 100, "b": 60},
    )
    figure.update_xaxes(title="column", showgrid=False)
    figure.update_yaxes(autorange="reversed", showgrid=False, ticks="")
    figure.update_yaxes(title="row", col=1)
    return figure


def damping_curves(table: pd.DataFrame) -> Figure:
    """Output error of GPTQ, and how much the last blocks grew, by damping: one line a format.

    `table` has the columns format, damping, ratio (held-out error over that of plain rounding) and
    growth (mean block maximum of the last block over what it was).
    """
    figure = make_subplots(rows=1, cols=2, horizontal_spacing=0.12)
    for format, lines in table.groupby("format", sort=False):
        for column, values in ((1, lines.ratio), (2, lines.growth)):
            figure.add_scatter(
                x=lines.damping,
                y=values,
                name=format,
                legendgroup=format,
                showlegend=column == 1,
                mode="lines+markers",
                line={"color": COLORS[format], "width": 3, "dash": _DASHES[format[-1]]},
                marker={"size": 9, "line": {"color": INK, "width": 1}},
                hovertemplate="damping %{x:g}: %{y:.3f}<extra>" + format + "</extra>",
                row=1,
                col=column,
            )
    figure.add_hline(y=1, line={"color": _METHOD_COLORS["rtn"], "dash": "dot"})
    worst = table.loc[table.growth.idxmax()]
    best = table.loc[table[table.format == worst.format].ratio.idxmin()]
    figure.update_layout(
        template=TEMPLATE,
        height=400,
        title={
            "text": f"Damped by {worst.damping:g}, the last blocks of {worst.format} become "
            f"{worst.growth:.1f} times as large",
            "subtitle": {
                "text": f"best damping for {best.format}: {best.damping:g}, with "
                f"{1 - best.ratio:.0%} less error than plain rounding (dotted)"
            },
        },
    )
    figure.update_xaxes(
        type="log", title="damping (share of the mean diagonal)", dtick=1, tickformat="~g"
    )
    figure.update_yaxes(
        title="held-out output error<br>plain rounding = 1", col=1, rangemode="tozero"
    )
    figure.update_yaxes(title="maximum of the last block<br>before = 1", col=2)
    return figure


def methods_compared(table: pd.DataFrame) -> Figure:
    """What each method costs a model at each format: output error of the matrices, and KL.

    `table` has the columns format, method, damping, output_error, kl, kl_low and kl_high (nats per
    token, an interval around them) and bits_per_weight.
    """
    figure = make_subplots(rows=1, cols=2, horizontal_spacing=0.18)
    plain = table[table.method == "rtn"].set_index("format").bits_per_weight
    labels = table.format.map(lambda format: f"{format}<br>{plain[format]:.2f} bits")
    ordered = table.assign(order=table.method.map(list(_METHOD_COLORS).index))
    by_method = ordered.groupby(["order", "method", "damping"], dropna=False)
    for (_, method, damping), rows in by_method:
        name = method.upper() + (f", damping {damping:g}" if method == "gptq" else "")
        shared = {
            "x": labels[rows.index],
            "name": name,
            "legendgroup": name,
            "offsetgroup": name,
            "customdata": rows.bits_per_weight,
            "hovertemplate": "%{y:.5f}, %{customdata:.3f} bits per weight<extra>"
            + name
            + "</extra>",
        }
        color = _METHOD_COLORS[method] if damping != 0.01 else "#9CC8E3"
        figure.add_bar(y=rows.output_error, marker={"color": color}, **shared, row=1, col=1)
        figure.add_scatter(
            y=rows.kl,
            mode="markers",
            marker={"color": color, "size": 10},
            error_y={
                "array": rows.kl_high - rows.kl,
                "arrayminus": rows.kl - rows.kl_low,
                "visible": method != "rtn",
                "thickness": 1.5,
                "width": 4,
            },
            showlegend=False,
            **shared,
            row=1,
            col=2,
        )
    figure.update_layout(
        template=TEMPLATE,
        height=430,
        barmode="group",
        scattermode="group",
        title=_methods_title(table),
    )
    figure.update_xaxes(tickangle=0, showgrid=False)
    figure.update_yaxes(title="output error (share of the output)", col=1)
    figure.update_yaxes(
        title="KL from the unrounded model<br>(nats per token)",
        type="log",
        col=2,
        dtick=1,
        tickformat="~g",
    )
    return figure


def _methods_title(table: pd.DataFrame) -> dict:
    said = []
    for format, rows in table.groupby("format", sort=False):
        best = rows.loc[rows.kl.idxmin()]
        plain = rows[rows.method == "rtn"].kl.item()
        said.append(f"{plain / best.kl:.1f} at {format}")
    return {
        "text": f"The best method has a KL smaller by a factor of {', '.join(said)}",
        "subtitle": {
            "text": f"plain rounding over the best; 95% intervals over pages; {_SIMULATED}"
        },
    }


def error_by_tokens(table: pd.DataFrame) -> Figure:
    """Held-out error of each expert against how many tokens it was calibrated on.

    `table` has the columns expert, projection, tokens and ratio (error over that of plain rounding)
    for experts calibrated on their own tokens.
    """
    figure = Figure(layout={"template": TEMPLATE, "height": 420})
    for projection, symbol in (("gate_proj", "circle"), ("up_proj", "cross"), ("down_proj", "x")):
        rows = table[table.projection == projection]
        figure.add_scatter(
            x=rows.tokens,
            y=rows.ratio,
            mode="markers",
            name=projection,
            marker={
                "color": [COLORS[f"expert {expert}"] for expert in rows.expert],
                "symbol": symbol,
                "size": 8,
                "line": {"color": INK, "width": 0.5},
            },
            customdata=rows.expert,
            hovertemplate="expert %{customdata}, %{x} tokens: %{y:.2f}<extra>"
            + projection
            + "</extra>",
        )
    worse = table[table.ratio > 1]
    figure.add_hline(y=1, line={"color": _METHOD_COLORS["rtn"], "dash": "dot"})
    figure.update_layout(
        title={
            "text": f"Up to {worse.tokens.max()} tokens, calibrating an expert can do harm"
            if len(worse)
            else "Calibrating helps every expert here",
            "subtitle": {
                "text": "one mark for each matrix; above the line plain rounding is better; "
                "colour is the expert"
            },
        }
    )
    figure.update_xaxes(type="log", title="calibration tokens that the expert got")
    figure.update_yaxes(title="held-out output error<br>plain rounding = 1", rangemode="tozero")
    return figure


def own_or_all(table: pd.DataFrame) -> Figure:
    """Calibrating each expert on its own tokens or on all: mean held-out error by tokens drawn.

    `table` has the columns drawn (tokens of the layer), whose ("its own" or "all") and ratio (error
    over that of plain rounding).
    """
    figure = Figure(layout={"template": TEMPLATE, "height": 400})
    for whose, color, dash in (("its own", "#0072B2", "solid"), ("all", "#D55E00", "dash")):
        rows = table[table.whose == whose]
        figure.add_scatter(
            x=rows.drawn,
            y=rows.ratio,
            mode="lines+markers",
            name=f"each expert on {whose} tokens",
            line={"color": color, "dash": dash, "width": 2.5},
            hovertemplate="%{x:,} tokens: %{y:.3f}<extra>" + whose + "</extra>",
        )
    figure.add_hline(y=1, line={"color": _METHOD_COLORS["rtn"], "dash": "dot"})
    ratio = table.set_index(["drawn", "whose"]).ratio.unstack()
    others_win = ratio.index[ratio["its own"] >= ratio["all"]]
    figure.update_layout(
        title={
            "text": f"Up to {others_win[-1]:,} tokens for all experts, those of others help"
            if len(others_win)
            else "An expert's own tokens are better at every number",
            "subtitle": {"text": "mean over the matrices of one layer; below 1 calibration helps"},
        }
    )
    figure.update_xaxes(type="log", title="calibration tokens, all experts together", dtick=1)
    figure.update_yaxes(title="held-out output error<br>plain rounding = 1", rangemode="tozero")
    return figure


def calibration_view(plain: Sequence[RoundedMatrix], calibrated: Sequence[RoundedMatrix]) -> Figure:
    """The matrices of one expert, rounded plainly and with a method: output errors on both texts.

    Where no token was seen, the calibration tokens have no bar.
    """
    names = [matrix.projection for matrix in plain]
    judged, unjudged = (
        [matrix.held_out_error for matrix in matrices] for matrices in (calibrated, plain)
    )
    bars = [
        {
            "type": "bar",
            "x": names,
            "y": errors,
            "name": name,
            "marker": {"color": color, "pattern": {"shape": pattern}},
            "hovertemplate": "%{x}: %{y:.2%} of the output lost<extra>" + name + "</extra>",
        }
        for name, errors, color, pattern in (
            ("plain rounding, held-out tokens", unjudged, _METHOD_COLORS["rtn"], ""),
            (
                "calibrated, its calibration tokens",
                [matrix.calibration_error for matrix in calibrated],
                "#9CC8E3",
                "/",
            ),
            ("calibrated, held-out tokens", judged, _METHOD_COLORS["gptq"], ""),
        )
    ]
    return Figure(
        bars,
        {
            "template": TEMPLATE,
            "height": 400,
            "barmode": "group",
            "title": _calibration_title(plain, calibrated),
            "yaxis": {"title": "output error (share of the output)", "rangemode": "tozero"},
            "xaxis": {"showgrid": False},
        },
    )


def _calibration_title(plain: Sequence[RoundedMatrix], calibrated: Sequence[RoundedMatrix]) -> dict:
    first = calibrated[0]
    pairs = zip(plain, calibrated, strict=True)
    change = np.mean([after.held_out_error / before.held_out_error for before, after in pairs]) - 1
    if first.rounded.method == "rtn":
        text = f"Expert {first.expert} got no token and is rounded plainly"
    else:
        text = (
            f"{first.rounded.method.upper()} on {first.tokens:,} "
            f"token{'s' * (first.tokens > 1)} of expert {first.expert}: "
            f"{abs(change):.0%} {'more' if change > 0 else 'less'} error than plain rounding"
        )
    bits = np.mean([matrix.rounded.bits_per_weight for matrix in calibrated])
    format = first.rounded.quantized.format
    return {
        "text": text,
        "subtitle": {
            "text": f"held-out output error, mean of three matrices; {format}, {bits:.2f} bits per "
            f"weight; {_SIMULATED}"
        },
    }
