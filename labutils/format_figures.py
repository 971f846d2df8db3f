"""Pictures of number formats: their levels, what becomes of weights, and what that costs.

Like `figures`: a record in, a `plotly.graph_objects.Figure` out, the finding in the title.
"""

import math
from collections.abc import Mapping, Sequence
from statistics import NormalDist

import numpy as np
import pandas as pd
import torch
from plotly.graph_objects import Figure
from plotly.subplots import make_subplots

from .codebooks import Codebook
from .formats import FORMATS, NestedMaxima, Quantized, Rounding
from .style import COLORS, INK, TEMPLATE


def outlier_damage(damage: Mapping[str, torch.Tensor]) -> Figure:
    """Where one outlier's error lands, one map for each way of sharing scales.

    `damage` holds matrices of equal shape: by how much each weight moved, in units of the typical
    weight (the root of the mean square of all others). The title says what the others lost.
    """
    lost = {name: moved.square().mean().sqrt().item() for name, moved in damage.items()}
    figure = make_subplots(
        rows=len(damage),
        cols=1,
        shared_xaxes=True,
        vertical_spacing=0.09,
        subplot_titles=[f"{name}: {100 * share:.0f}% lost" for name, share in lost.items()],
    )
    for row, moved in enumerate(damage.values(), start=1):
        figure.add_heatmap(
            z=(100 * moved).round().short().numpy(),
            coloraxis="coloraxis",
            hovertemplate="row %{y}, column %{x}: moved by %{z}%<extra></extra>",
            row=row,
            col=1,
        )
    weights = next(iter(damage.values())).numel()
    *first, last = [f"{100 * share:.0f}%" for share in lost.values()]
    figure.update_layout(
        template=TEMPLATE,
        height=150 + 150 * len(damage),
        title={
            "text": f"One outlier among {weights:,} weights costs the others {', '.join(first)} "
            f"or {last}",
            "subtitle": {"text": "it depends on who shares its scale (INT4, simulated)"},
        },
        coloraxis={
            "colorscale": "Blues",
            "cmin": 0,
            "cmax": 200,
            "colorbar": {"title": "moved by<br>(% of a<br>typical<br>weight)", "thickness": 12},
        },
        margin={"t": 95, "b": 55},
    )
    figure.update_yaxes(autorange="reversed", showgrid=False, ticks="", title="row")
    figure.update_xaxes(showgrid=False, ticks="")
    figure.update_xaxes(title="column", row=len(damage), col=1)
    return figure


def normal_levels(quantiles: Sequence[float]) -> Figure:
    """The normal distribution cut where the levels of a normal float stand, before they are scaled.

    `quantiles` are the levels in rising order, in standard deviations, zero among them.
    """
    normal = NormalDist()
    edges = np.array(quantiles)
    shares = 100 * np.diff([normal.cdf(edge) for edge in edges])
    figure = Figure(layout={"template": TEMPLATE, "height": 430, "showlegend": False})
    for part, (left, right, share) in enumerate(zip(edges[:-1], edges[1:], shares, strict=True)):
        across = np.linspace(left, right, 12)
        figure.add_scatter(
            x=across,
            y=[normal.pdf(x) for x in across],
            fill="tozeroy",
            mode="lines",
            line={"width": 0},
            fillcolor=(COLORS["nf2"], COLORS["nf3"])[part % 2],
            hoveron="fills",
            text=f"{share:.2f}% of the distribution",
            hoverinfo="text",
        )
    across = np.linspace(-2.8, 2.8, 113)
    figure.add_scatter(
        x=across,
        y=[normal.pdf(x) for x in across],
        mode="lines",
        line={"color": INK, "width": 1.5},
        hoverinfo="skip",
    )
    levels = edges / edges[-1]
    figure.add_scatter(
        x=edges,
        y=np.full(len(edges), -0.01),
        mode="markers+text",
        marker={"symbol": "triangle-up", "size": 10, "color": COLORS["nf4"]},
        text=[f"{'<br>' * (place % 2)}{level:.2f}" for place, level in enumerate(levels)],
        textposition="bottom center",
        textfont={"size": 10},
        customdata=levels,
        hovertemplate="%{x:.4f} standard deviations<br>level %{customdata:.4f}<extra></extra>",
    )
    below, above = shares[edges[:-1] < 0], shares[edges[:-1] >= 0]
    figure.add_annotation(
        x=2.3,
        y=0.1,
        text=f"{100 * normal.cdf(edges[0]):.1f}% lie beyond,<br>on each side",
        showarrow=False,
        align="left",
    )
    figure.update_layout(
        title={
            "text": f"Between two levels of NF{len(edges).bit_length() - 1} lie "
            f"{below.mean():.1f}% of a normal distribution below zero, {above.mean():.1f}% above",
            "subtitle": {"text": "the triangles are the levels, labelled as they are stored"},
        },
    )
    figure.update_xaxes(title="weight (standard deviations)", range=[-2.8, 2.8])
    figure.update_yaxes(title="density", range=[-0.06, 0.42], zeroline=True)
    return figure


def level_rulers(codebooks: Mapping[str, Codebook]) -> Figure:
    """The levels of each format on a line of its own, all of them stretched to -1 ... 1."""
    scaled = {name: (book.levels / book.peak).numpy() for name, book in codebooks.items()}
    gaps = {name: np.diff(levels).max() for name, levels in scaled.items()}
    widest, narrowest = max(gaps, key=gaps.get), min(gaps, key=gaps.get)
    figure = Figure(
        layout={"template": TEMPLATE, "height": 150 + 58 * len(scaled), "showlegend": False}
    )
    for name, levels in scaled.items():
        figure.add_scatter(
            x=levels,
            y=[name] * len(levels),
            mode="lines+markers",
            line={"color": "#B8B8B8", "width": 1},
            marker={
                "symbol": "line-ns",
                "size": 24,
                "line": {"width": 2.5, "color": COLORS.get(name.lower(), COLORS["nvfp4"])},
            },
            hovertemplate="%{x:.4f}<extra>%{y}</extra>",
        )
    figure.update_layout(
        title={
            "text": f"Where the levels lie: gaps of {gaps[narrowest]:.2f} at most in {narrowest}, "
            f"of {gaps[widest]:.2f} in {widest}",
            "subtitle": {"text": "each list of levels is stretched to its block\u2019s largest"},
        },
        margin={"l": 130, "b": 60},
    )
    figure.update_xaxes(title="weight / largest magnitude of its block", range=[-1.04, 1.04])
    figure.update_yaxes(autorange="reversed", ticks="", showgrid=False)
    return figure


def rounding_chart(rounding: Rounding, name: str) -> Figure:
    """What one format does to one matrix: before and after, the error, and where the bits go.

    `name` says what was rounded, "64 x 1,024 normal weights". The bytes are really counted; the
    rounded weights are kept in 32 bits to look at (simulated).
    """
    quantized, color = rounding.quantized, COLORS[rounding.quantized.format]
    code_bits = quantized.codebook.bits
    scale_bits = quantized.bits_per_weight - code_bits
    figure = make_subplots(
        rows=2,
        cols=2,
        specs=[[{"colspan": 2}, None], [{}, {}]],
        column_widths=[0.6, 0.4],
        row_heights=[0.62, 0.38],
        vertical_spacing=0.23,
        horizontal_spacing=0.1,
        subplot_titles=[
            f"the weights, and the {len(rounding.levels)} levels they go to",
            f"what is lost: {100 * rounding.relative_error:.2g}% of the typical weight",
            f"its bits: {code_bits} + {scale_bits:.3f} of scales",
        ],
    )
    shares, edges = _shares(rounding.positions, 1.05, 140)
    top = shares.max()
    figure.add_bar(
        x=edges[:-1] + np.diff(edges) / 2,
        y=shares,
        marker={"color": "#C9C9C9", "line": {"width": 0}},
        hovertemplate="%{y:.2f}% of the weights at %{x:.2f}<extra></extra>",
        row=1,
        col=1,
    )
    levels = rounding.levels.numpy()
    figure.add_scatter(
        x=np.repeat(levels, 3),
        y=np.tile([-0.12 * top, (top if len(levels) <= 16 else 0), np.nan], len(levels)),
        mode="lines",
        line={"color": color, "width": 1.5 if len(levels) <= 32 else 0.7},
        hovertemplate="level %{x:.4f}<extra></extra>",
        row=1,
        col=1,
    )
    typical = rounding.weight.float().square().mean().sqrt()
    shares, edges = _shares(rounding.error / typical, 1, 101)
    figure.add_bar(
        x=edges[:-1] + np.diff(edges) / 2,
        y=shares,
        marker={"color": color, "line": {"width": 0}},
        hovertemplate="%{y:.2f}% of the weights moved by %{x:.2f}<extra></extra>",
        row=2,
        col=1,
    )
    for part, bits, fill in (("codes", code_bits, color), ("scales", scale_bits, "#8A8A8A")):
        figure.add_bar(
            orientation="h",
            x=[bits],
            y=[""],
            marker={"color": fill},
            hovertemplate=f"{bits:.4f} bits of {part}<extra></extra>",
            row=2,
            col=2,
        )
    figure.update_layout(
        template=TEMPLATE,
        height=520,
        showlegend=False,
        barmode="stack",
        bargap=0,
        margin={"t": 105, "b": 60},
        title=_rounding_title(rounding, name),
    )
    figure.update_xaxes(title=_position_axis(quantized), range=[-1.06, 1.06], row=1, col=1)
    figure.update_xaxes(title="error (typical weights)", range=[-1.02, 1.02], row=2, col=1)
    figure.update_xaxes(title="bits per weight", range=[0, 10.5], row=2, col=2)
    figure.update_yaxes(title="% of the weights", range=[-0.13 * top, 1.03 * top], row=1, col=1)
    figure.update_yaxes(title="%", row=2, col=1)
    figure.update_yaxes(ticks="", showgrid=False, row=2, col=2)
    return figure


def _shares(numbers: torch.Tensor, reach: float, bins: int) -> tuple[np.ndarray, np.ndarray]:
    """Percentages in equal bins from -reach to reach; the last ones hold all that lies beyond."""
    within = numbers.flatten().clamp(-reach, reach).numpy()
    counts, edges = np.histogram(within, bins, range=(-reach, reach))
    return 100 * counts / len(within), edges


def _position_axis(quantized: Quantized) -> str:
    if quantized.minima is None:
        return "weight / largest magnitude of its block"
    return "weight between the smallest (-1) and the largest (1) of its block"


def _rounding_title(rounding: Rounding, name: str) -> dict:
    quantized = rounding.quantized
    weights = rounding.weight.numel()
    shared = "one block" if quantized.block_size >= weights else f"blocks of {quantized.block_size}"
    decibels = -20 * math.log10(max(rounding.relative_error, 1e-12))
    return {
        "text": f"{_spelled(quantized)}, {shared}: {quantized.bits_per_weight:.3f} bits per weight,"
        f" error {100 * rounding.relative_error:.2g}%",
        "subtitle": {
            "text": f"{name}: {2 * weights:,} bytes in 16 bits, {quantized.stored_bytes:,} here "
            f"(counted); noise {decibels:.1f} dB down (simulated)"
        },
    }


def _spelled(quantized: Quantized) -> str:
    name = quantized.format.upper().replace("_", " ")
    if quantized.minima is not None:
        return f"{name} from minimum to maximum"
    return f"{name}, double quantization" if isinstance(quantized.scales, NestedMaxima) else name


def code_use(use: Mapping[str, Sequence[float]], levels: Sequence[float]) -> Figure:
    """How often each level of NF4 is used, in percent, for up to three kinds of weights."""
    even = 100 / len(levels)
    ratios = {name: max(shares) / min(shares) for name, shares in use.items()}
    said = ", ".join(f"{ratio:.0f} on {name} weights" for name, ratio in ratios.items())
    figure = Figure(layout={"template": TEMPLATE, "height": 420, "bargap": 0.25})
    fills = (COLORS["bf16"], COLORS["nf4"], COLORS["nf8"])
    for (name, shares), fill in zip(use.items(), fills, strict=False):
        figure.add_bar(
            x=[f"{level:.2f}" for level in levels],
            y=shares,
            name=name,
            marker={"color": fill},
            hovertemplate="%{y:.1f}% of the weights<extra>" + name + "</extra>",
        )
    figure.add_hline(y=even, line={"color": INK, "width": 1.5, "dash": "dash"})
    figure.add_annotation(
        text=f"even use: {even:.2f}%",
        x=0.995,
        xref="paper",
        xanchor="right",
        y=even,
        yanchor="bottom",
        showarrow=False,
    )
    figure.update_layout(
        title={
            "text": f"NF4 uses its busiest level {min(ratios.values()):.0f} to "
            f"{max(ratios.values()):.0f} times as often as its rarest",
            "subtitle": {"text": f"busiest over rarest: {said}"},
        }
    )
    figure.update_xaxes(title="level (weight / largest magnitude of its block)", type="category")
    figure.update_yaxes(title="% of the weights")
    return figure


def bits_against_error(table: pd.DataFrame, budget_bits: float) -> Figure:
    """True bits per weight against what is lost, one panel for each kind of weights.

    `table` has the columns weights, series, format, block, bits and error (relative). A series is
    a line; one whose name ends in "double" is dotted, with hollow markers. Where there are no more
    than two, their blocks are written beside them. The title says who loses least with at most
    `budget_bits`, where an upright line stands. Each panel has an error axis of its own.
    """
    kinds = list(table["weights"].unique())
    written = table["series"].nunique() <= 2
    figure = make_subplots(
        rows=1,
        cols=len(kinds),
        subplot_titles=[f"{kind} weights" for kind in kinds],
        horizontal_spacing=0.07,
    )
    for column, kind in enumerate(kinds, start=1):
        for series, points in table[table["weights"] == kind].groupby("series", sort=False):
            figure.add_scatter(
                x=points["bits"],
                y=100 * points["error"],
                name=series,
                legendgroup=series,
                showlegend=column == 1,
                mode="lines+markers+text" if written else "lines+markers",
                text=points["block"],
                textposition=f"middle {'left' if series.endswith('double') else 'right'}",
                hovertemplate="blocks of %{text}<br>%{x:.3f} bits per weight, error %{y:.2f}%"
                f"<extra>{series}</extra>",
                row=1,
                col=column,
                **_series_style(series, points["format"].iloc[-1]),
            )
    figure.add_vline(x=budget_bits, line={"color": INK, "width": 1, "dash": "dot"})
    figure.update_layout(
        template=TEMPLATE,
        height=520,
        margin={"b": 95 if written else 135, "t": 105},
        title=_budget_title(table, budget_bits),
    )
    room = (table["bits"].max() - table["bits"].min()) / (6 if written else 20)
    reach = [table["bits"].min() - room, table["bits"].max() + room]
    figure.update_xaxes(title="bits per weight", range=reach)
    figure.update_yaxes(title="error (% of the typical weight)", row=1, col=1)
    return figure


def _series_style(series: str, format: str) -> dict:
    """Line and marker of a series: its format's colour, and a mark that says what is special."""
    marker = {"size": 8, "color": COLORS[format], "symbol": "circle"}
    line = {"color": COLORS[format], "width": 2}
    if series.endswith("double"):
        marker |= {"symbol": "circle-open", "line": {"width": 2}}
        line["dash"] = "dot"
    elif series.endswith("asymmetric"):
        marker["symbol"] = "square"
        line["dash"] = "dash"
    elif FORMATS[format].scaled == "own":
        marker |= {"symbol": "diamond", "size": 13, "line": {"width": 1, "color": INK}}
    return {"marker": marker, "line": line}


def _budget_title(table: pd.DataFrame, budget_bits: float) -> dict:
    affordable = table[table["bits"] < budget_bits + 0.005]
    best = affordable.loc[affordable.groupby("weights", sort=False)["error"].idxmin()]
    said = [
        f"{series} ({', '.join(rows['weights'])})"
        for series, rows in best.groupby("series", sort=False)
    ]
    lost = [f"{row.weights} {100 * row.error:.1f}%" for row in best.itertuples()]
    return {
        "text": f"Least lost within {budget_bits:g} bits: {'; '.join(said)}",
        "subtitle": {"text": f"{', '.join(lost)} (simulated; bits with every constant)"},
    }
