"""Pictures of what quantized experts save and cost: bytes, errors, answers, time.

Like `figures`: a record in, a `plotly.graph_objects.Figure` out, the finding in the title.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from plotly.graph_objects import Figure
from plotly.subplots import make_subplots

from .budget import Budget
from .damage import Damage
from .formats import FORMATS
from .meter import MIB
from .recipes import Recipe
from .style import COLORS, INK, SOFT_INK, TEMPLATE

_TARGET_COLORS = {
    "experts": COLORS["experts"],
    "attention": COLORS["attention"],
    "everything": INK,
}
_TARGET_SYMBOLS = {"experts": "circle", "attention": "square", "everything": "diamond"}


# ------------------------------------------------------------------------------------------- bytes


def expert_footprint(stored_bytes: Mapping[str, int], weights: int) -> Figure:
    """One expert in each format, as it would be stored: its codes, and the constants beside them.

    `stored_bytes` has the bytes of all its matrices by format, constants included; `weights` is
    how many weights they hold. The title compares the first format with `nf4`.
    """
    codes = {name: weights * FORMATS[name].weight_bits // 8 for name in stored_bytes}
    names = list(stored_bytes)
    figure = Figure(
        layout={"template": TEMPLATE, "barmode": "stack", "height": 150 + 34 * len(names)}
    )
    for part, sizes, pattern in (
        ("codes", [codes[name] for name in names], ""),
        ("constants", [stored_bytes[name] - codes[name] for name in names], "/"),
    ):
        figure.add_bar(
            orientation="h",
            y=names,
            x=[size / MIB for size in sizes],
            name=part,
            marker={
                "color": [COLORS[name] for name in names],
                "pattern": {"shape": pattern, "fgcolor": INK, "bgcolor": "white", "size": 6},
                "line": {"color": [COLORS[name] for name in names], "width": 1},
            },
            text=[
                f"{stored_bytes[name] / MIB:,.1f}" if part == "constants" else "" for name in names
            ],
            textposition="outside",
            customdata=sizes,
            hovertemplate="%{customdata:,} bytes of " + part + "<extra>%{y}</extra>",
        )
    first, ratio = names[0], stored_bytes[names[0]] / stored_bytes["nf4"]
    bits = 8 * stored_bytes["nf4"] / weights
    figure.update_layout(
        title={
            "text": f"From {first} to NF4 an expert gets {ratio:.2f} times smaller, not "
            f"{FORMATS[first].weight_bits / 4:.0f}",
            "subtitle": {"text": f"{weights:,} weights; NF4 takes {bits:.3f} bits for each"},
        },
        legend={"traceorder": "normal"},
    )
    figure.update_xaxes(
        title="stored, constants included (MiB = 2\u00b2\u2070 bytes)",
        range=[0, 1.1 * max(stored_bytes.values()) / MIB],
    )
    figure.update_yaxes(autorange="reversed", ticks="", ticksuffix=" ", showgrid=False)
    return figure


def precision_flow(budget: Budget, recipe: Recipe, layers: int) -> Figure:
    """The way of a token through one mixed-precision MoE layer, and what is stored where.

    `budget` is the whole model's under `recipe`, and is divided by `layers`. Boxes with a thick
    edge are stored weights, in their format's colour; thin ones are computed and gone.
    """
    router, experts = (budget.by_component[name] / layers for name in ("router", "experts"))
    format = recipe.experts
    figure = Figure(layout={"template": TEMPLATE, "height": 430, "margin": {"b": 20, "l": 10}})
    for box in (
        _Box(6, 64, 11, "token", "bf16"),
        _Box(28, 86, 23, f"router<br>{router / MIB:,.2f} MiB", recipe.router, stored=True),
        _Box(58, 86, 20, "softmax, top 2", "fp32"),
        _Box(28, 37, 23, f"experts<br>{experts / MIB:,.0f} MiB", format, stored=True),
        _Box(28, 11, 23, "their block maxima", "8 bits" if recipe.double_quant else "fp32", True),
        _Box(54, 24, 18, "dequantize a tile<br>of the chosen", "bf16"),
        _Box(76, 42, 17, "multiply<br>and add", "bf16"),
        _Box(91, 66, 15, "weighted<br>sum", "bf16"),
    ):
        box.draw(figure)
    for tail, head in (
        ((11.5, 70), (16, 82)),
        ((39.5, 86), (48, 86)),
        ((68, 84), (83.5, 72)),
        ((11.5, 60), (67.5, 46)),
        ((39.5, 36), (45, 28)),
        ((39.5, 12), (45, 20)),
        ((63, 27), (67.5, 36)),
        ((81, 52), (87, 56)),
    ):
        figure.add_annotation(
            x=head[0], y=head[1], ax=tail[0], ay=tail[1], xref="x", yref="y", axref="x", ayref="y",
            showarrow=True, arrowhead=2, arrowwidth=1.5, arrowcolor=SOFT_INK, text="",
        )  # fmt: skip
    figure.update_layout(
        title={
            "text": f"Stored in {format.upper()}, computed in 16 bits: of a layer's "
            f"{(router + experts) / MIB:,.0f} MiB only {router / MIB:.2f} MiB are the router",
            "subtitle": {
                "text": "Thick edge: stored weights. Thin edge: made for a token and gone"
            },
        }
    )
    figure.update_xaxes(visible=False, range=[-3, 100])
    figure.update_yaxes(visible=False, range=[0, 98])
    return figure


@dataclass(frozen=True)
class _Box:
    """A labelled box of the flow: its centre and width, what it is, and the precision it is in."""

    x: float
    y: float
    width: float
    text: str
    precision: str
    stored: bool = False

    def draw(self, figure: Figure) -> None:
        color = COLORS.get(self.precision, SOFT_INK)
        figure.add_shape(
            type="rect",
            x0=self.x - self.width / 2,
            x1=self.x + self.width / 2,
            y0=self.y - 10,
            y1=self.y + 10,
            line={"color": color, "width": 5 if self.stored else 1.5},
            fillcolor="white",
        )
        figure.add_annotation(
            x=self.x,
            y=self.y,
            text=f"{self.text}<br><b>{self.precision}</b>",
            showarrow=False,
            font={"size": 12, "color": INK},
        )


# ------------------------------------------------------------------------------------------ errors


def expert_error_bars(errors: pd.DataFrame) -> Figure:
    """How far each expert's answers are off: a row for each expert, a column for each format."""
    figure = Figure(layout={"template": TEMPLATE, "barmode": "group", "height": 380})
    for format, column in errors.items():
        figure.add_bar(
            x=[f"expert {index}" for index in errors.index],
            y=100 * column,
            name=format,
            marker={"color": COLORS[format]},
            hovertemplate="%{y:.3f}%<extra>%{x} in " + format + "</extra>",
        )
    means = 100 * errors.mean()
    spread = errors.max(axis=0) / errors.min(axis=0)
    figure.update_layout(
        title={
            "text": "Answers move by "
            + " and ".join(f"{mean:.2g}% in {format}" for format, mean in means.items()),
            "subtitle": {
                "text": "Simulated: rounded, kept in 32 bits. The most and the least disturbed "
                f"expert differ by a factor {spread.max():.2f} at most"
            },
        }
    )
    figure.update_yaxes(title="change of answers (%)", rangemode="tozero")
    return figure


def loss_by_bits(sweep: Mapping[str, Mapping[int, Damage]], undisturbed: Damage) -> Figure:
    """How much cross-entropy rises with fewer bits, a line for each part that is quantized.

    `sweep` has for each target the damage by bit width. Rises below a ten-thousandth of a nat are
    drawn there: they are noise.
    """
    figure = Figure(layout={"template": TEMPLATE, "height": 420})
    for target, by_bits in sweep.items():
        rises = np.array(
            [damage.nats_per_token - undisturbed.nats_per_token for damage in by_bits.values()]
        )
        figure.add_scatter(
            x=list(by_bits),
            y=np.maximum(rises, 1e-4),
            name=target,
            mode="lines+markers",
            line={"color": _TARGET_COLORS[target], "width": 2.5},
            marker={"symbol": _TARGET_SYMBOLS[target], "size": 9},
            customdata=rises,
            hovertemplate="%{x} bits: %{customdata:+.5f} nats per token<extra>"
            + target
            + "</extra>",
        )
    figure.update_layout(title=_loss_title(sweep, undisturbed))
    figure.update_xaxes(title="bits of a code", dtick=1)
    figure.update_yaxes(
        title="rise of cross-entropy<br>(nats per token)",
        type="log",
        tickvals=[1e-4, 1e-3, 1e-2, 1e-1, 1, 10],
        ticktext=["0.0001 or less", "0.001", "0.01", "0.1", "1", "10"],
    )
    return figure


def _loss_title(sweep: Mapping[str, Mapping[int, Damage]], undisturbed: Damage) -> dict:
    rises = {
        target: {bits: d.nats_per_token - undisturbed.nats_per_token for bits, d in by_bits.items()}
        for target, by_bits in sweep.items()
    }
    widths = sorted(rises["experts"])
    fewest = {target: rises[target][widths[0]] for target in ("experts", "attention")}
    less, more = sorted(fewest, key=fewest.get)
    harmless = [
        width
        for width in widths
        if all(rises[t][w] < 1e-3 for t in fewest for w in widths if w >= width)
    ]
    return {
        "text": f"{widths[0]}-bit {more} costs {fewest[more] / fewest[less]:.0f} times the loss of "
        f"{widths[0]}-bit {less}",
        "subtitle": {
            "text": f"from {harmless[0]} bits on neither costs 0.001 nats; simulated: weights "
            "rounded, kept in 32 bits"
        },
    }


def damage_view(damage: Damage, undisturbed: Damage, label: str) -> Figure:
    """One recipe's damage: the answers of each language, and the error of every expert."""
    figure = make_subplots(
        rows=1,
        cols=2,
        column_widths=[0.5, 0.5],
        horizontal_spacing=0.14,
        subplot_titles=["right answers by language", "change of each expert's answers"],
    )
    for name, accuracy, color in (
        ("in 32 bits", undisturbed.accuracy, COLORS["bf16"]),
        ("quantized, simulated", damage.accuracy, COLORS["expert 0"]),
    ):
        figure.add_bar(
            x=100 * accuracy.to_numpy(),
            y=list(accuracy.index),
            name=name,
            orientation="h",
            marker={"color": color},
            hovertemplate="%{y}: %{x:.0f}%<extra>" + name + "</extra>",
            row=1,
            col=1,
        )
    errors = 100 * damage.expert_errors
    figure.add_heatmap(
        z=errors,
        x=[str(expert) for expert in range(errors.shape[1])],
        y=[f"layer {layer}" for layer in range(errors.shape[0])],
        colorscale="Oranges",
        zmin=0,
        zmax=60,
        text=np.where(errors > 0, np.char.mod("%.2g", errors), ""),
        texttemplate="%{text}",
        colorbar={"title": "%", "thickness": 12},
        hovertemplate="%{y}, expert %{x}: %{z:.2f}%<extra></extra>",
        row=1,
        col=2,
    )
    rise = round(damage.nats_per_token - undisturbed.nats_per_token, 4) + 0.0
    kept = undisturbed.accuracy[undisturbed.accuracy > 0.95].index
    still = int((damage.accuracy[kept] > 0.95).sum())
    figure.update_layout(
        template=TEMPLATE,
        height=430,
        barmode="group",
        title={
            "text": f"{label}: {still} of {len(kept)} mastered languages still are; "
            f"loss {rise:+.4f} nats",
            "subtitle": {
                "text": f"Simulated. Were it stored: {damage.bits_per_weight:.2f} bits per "
                "quantized weight, all constants counted"
            },
        },
        margin={"t": 100},
        legend={"traceorder": "normal"},
    )
    figure.update_xaxes(title="% right", range=[0, 103], row=1, col=1)
    figure.update_xaxes(title="expert", ticks="", showgrid=False, row=1, col=2)
    figure.update_yaxes(autorange="reversed", ticks="", ticksuffix=" ", showgrid=False)
    return figure


# ---------------------------------------------------------------------------------------- outliers


def column_maxima(maxima: Mapping[str, torch.Tensor], threshold: float) -> Figure:
    """The largest magnitude of each input column, in falling order, one line for each input.

    `threshold` is the level line above which LLM.int8() takes a column out.
    """
    figure = Figure(layout={"template": TEMPLATE, "height": 400})
    for index, (name, columns) in enumerate(maxima.items()):
        figure.add_scatter(
            x=100 * np.arange(1, len(columns) + 1) / len(columns),
            y=columns.sort(descending=True).values.numpy(),
            name=name,
            mode="lines+markers",
            marker={"size": 4},
            line={"color": COLORS[f"expert {index}"], "width": 2},
            hovertemplate="%{y:.2f}<extra>" + name + "</extra>",
        )
    figure.add_scatter(
        x=[-1, 100],
        y=[threshold, threshold],
        name=f"threshold {threshold:g}",
        mode="lines",
        line={"color": INK, "width": 1.5, "dash": "dash"},
        hoverinfo="skip",
    )
    above = {name: int((columns >= threshold).sum()) for name, columns in maxima.items()}
    most = max(above, key=above.get)
    others = max(count for name, count in above.items() if name != most)
    figure.update_layout(
        title=f"In {most}, {above[most]} of {len(maxima[most])} columns reach {threshold:g}; in "
        f"the others at most {others}"
    )
    figure.update_xaxes(title="columns, the largest first (%)", range=[-1, 100])
    figure.update_yaxes(
        title="largest magnitude in the column",
        type="log",
        tickvals=[0.01, 0.1, 1, 10, 100],
        ticktext=["0.01", "0.1", "1", "10", "100"],
    )
    return figure


def threshold_view(trials: pd.DataFrame, threshold: float) -> Figure:
    """LLM.int8() by its threshold: columns in 16 bits, and the error of the product.

    `trials` has the columns `threshold`, `in_16_bits` (a share) and `error` (relative); the row of
    `threshold` is marked. An infinite threshold, plain INT8, stands at the right end.
    """
    figure = make_subplots(specs=[[{"secondary_y": True}]])
    places = [f"{value:g}" if np.isfinite(value) else "none" for value in trials["threshold"]]
    here = trials.index[trials["threshold"] == threshold][0]
    marker_sizes = np.where(trials.index == here, 16, 7)
    for column, name, color, secondary in (
        ("error", "error of the product", COLORS["int8"], False),
        ("in_16_bits", "columns in 16 bits", COLORS["bf16"], True),
    ):
        figure.add_scatter(
            x=places,
            y=100 * trials[column],
            name=name,
            mode="lines+markers",
            line={"color": color, "width": 2.5, "dash": "dot" if secondary else "solid"},
            marker={"size": marker_sizes, "symbol": "square" if secondary else "circle"},
            hovertemplate="%{y:.2f}%<extra>" + name + "</extra>",
            secondary_y=secondary,
        )
    row, plain = trials.loc[here], trials.iloc[-1]
    found = f"{100 * row['in_16_bits']:.1f}% of the columns in 16 bits: an error of "
    ratio = row["error"] / plain["error"]
    title = (
        f"{found}{100 * row['error']:.2f}%, {ratio:.2f} of plain INT8's"
        if row["in_16_bits"]
        else f"Plain INT8, no column in 16 bits: the error is {100 * row['error']:.2f}%"
    )
    figure.update_layout(
        template=TEMPLATE,
        height=400,
        title=title,
        margin={"r": 70},
    )
    figure.update_xaxes(title="threshold for a column's largest magnitude", type="category")
    figure.update_yaxes(title="error of the product (%)", rangemode="tozero", secondary_y=False)
    figure.update_yaxes(
        title="columns in 16 bits (%)",
        range=[0, 105],
        dtick=25,
        showgrid=False,
        secondary_y=True,
    )
    return figure


# -------------------------------------------------------------------------------------------- time


def product_times(times: pd.DataFrame) -> Figure:
    """How long one expert matrix takes for a number of tokens, a line for each storage format.

    `times` has a row for each number of tokens and a column of seconds for each format; the first
    column is what the others are held against.
    """
    figure = Figure(layout={"template": TEMPLATE, "height": 420})
    for format, seconds in times.items():
        figure.add_scatter(
            x=list(times.index),
            y=1000 * seconds / times.index,
            name=format,
            mode="lines+markers",
            line={"color": COLORS[format], "width": 2.5},
            marker={"size": 8},
            customdata=1000 * seconds,
            hovertemplate="%{x} tokens: %{y:.3f} ms each, %{customdata:.2f} ms in all<extra>"
            + format
            + "</extra>",
        )
    figure.update_layout(title=_times_title(times))
    figure.update_xaxes(title="tokens at once", type="log", tickvals=list(times.index))
    figure.update_yaxes(
        title="time per token (ms)",
        type="log",
        tickvals=[0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50],
    )
    return figure


def _times_title(times: pd.DataFrame) -> dict:
    base, *others = times.columns
    one, many = times.index[0], times.index[-1]
    ratios = {
        tokens: " and ".join(
            f"{times.loc[tokens, base] / times.loc[tokens, format]:.1f}x {format}"
            for format in others
        )
        for tokens in (one, many)
    }
    return {
        "text": f"Pace against {base}: {ratios[one]} at {one} token, {ratios[many]} at {many}",
        "subtitle": {"text": "Really stored in these formats, on this machine; above 1x is faster"},
    }
