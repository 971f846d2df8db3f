"""Pictures of speed: this lab beside other libraries, and three ways to multiply one matrix.

Like `figures`: a record in, a `plotly.graph_objects.Figure` out, the finding in the title.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pandas as pd
from plotly.graph_objects import Figure
from plotly.subplots import make_subplots

from .meter import MIB
from .speeds import OURS, Speeds
from .style import COLORS, INK, SOFT_INK, TEMPLATE


@dataclass(frozen=True)
class _Look:
    """How a kind of peer, or a way to multiply, is drawn."""

    color: str
    pattern: str = ""
    symbol: str = "circle"
    dash: str = "solid"


@dataclass(frozen=True)
class _Panel:
    """A column of the table of speeds, and what stands above and below its bars."""

    column: str
    heading: str
    unit: str
    better: str = "less is better"


_PANELS = (
    _Panel("decode_1", "decoding", "tokens/s", "more is better"),
    _Panel("prefill_512_ms", "prompt of 512", "ms"),
    _Panel("load_seconds", "loading", "s"),
    _Panel("steady_mib", "memory", "MiB, anonymous"),
)
_KINDS = {
    "this lab, 4 bits": _Look(COLORS["nf4"]),
    "experts in 16 bits": _Look(COLORS["bf16"]),
    "other Python libraries, 4 bits": _Look(COLORS["int4"], "."),
    "llama.cpp, 4 bits, no Python": _Look(COLORS["expert 2"], "/"),
}
_SQUASHED = 8  # from how many times the median on the longest bar squashes the others
_LETTERS = 20  # so many go into a panel's width
_WAYS = {
    "straight from the codes": _Look(COLORS["nf4"]),
    "dequantized, then multiplied": _Look(COLORS["expert 0"], symbol="square", dash="dash"),
    "bf16": _Look(COLORS["bf16"], symbol="diamond", dash="dot"),
}


# --------------------------------------------------------------------------------------- the peers


def peers(speeds: Speeds) -> Figure:
    """Every peer's tokens a second, prompt, load and memory, the first at the top.

    Bars are medians over rounds, lines their range. The title holds this lab against the fastest
    of transformers' peers in 16 bits. Where the weights of a peer are in a mapped file its memory
    says so: it is less than what one token reads.

    Raises KeyError without this lab, and ValueError without a peer of transformers'.
    """
    table = speeds.table
    names = list(table.index)
    figure = make_subplots(
        rows=1,
        cols=len(_PANELS),
        shared_yaxes=True,
        horizontal_spacing=0.025,
        subplot_titles=[f"<b>{panel.heading}</b>" for panel in _PANELS],
    )
    for place, panel in enumerate(_PANELS, start=1):
        _add_bars(figure, speeds, panel, place)
    figure.update_layout(
        template=TEMPLATE,
        title=_peers_title(speeds),
        height=240 + 26 * len(names),
        barmode="overlay",
        margin={"t": 100, "r": 10, "b": 105},
        legend={"traceorder": "normal"},
    )
    figure.update_annotations(font={"size": 13})
    figure.update_yaxes(
        type="category",
        categoryarray=names,
        range=[len(names) - 0.5, -0.5],
        tickvals=names,
        ticktext=[f"<b>{name}</b>  " if _is_ours(name) else f"{name}  " for name in names],
        ticks="",
        showgrid=False,
    )
    return figure


def _add_bars(figure: Figure, speeds: Speeds, panel: _Panel, place: int) -> None:
    """The bars of a panel, a trace for each kind of peer, and the value at the end of each."""
    values = speeds.table[panel.column]
    low, high = speeds.lowest[panel.column], speeds.highest[panel.column]
    kinds = pd.Series([_kind(*row) for row in speeds.table["expert_bits"].items()], values.index)
    for kind, look in _KINDS.items():
        own = values.index[kinds == kind]
        figure.add_bar(
            orientation="h",
            x=values[own],
            y=own,
            name=kind,
            legendgroup=kind,
            showlegend=place == 1,
            width=0.72,
            marker={
                "color": look.color,
                "pattern": {
                    "shape": look.pattern,
                    "fillmode": "overlay",
                    "fgcolor": "white",
                    "size": 6,
                },
            },
            error_x={
                "array": high[own] - values[own],
                "arrayminus": values[own] - low[own],
                "color": INK,
                "thickness": 1.5,
                "width": 0,
            },
            customdata=[
                f"{peer}: {values[peer]:,.3f} {panel.unit} "
                f"({low[peer]:,.3f} to {high[peer]:,.3f})<br>"
                f"{speeds.table.expert_bits[peer]:.3f} bits an expert weight"
                for peer in own
            ],
            hovertemplate="%{customdata}<extra></extra>",
            row=1,
            col=place,
        )
    texts = [_value(row, panel) for _, row in speeds.table.iterrows()]
    figure.add_scatter(
        x=high,
        y=values.index,
        mode="text",
        text=[f"\u00a0{text}" for text in texts],
        textposition="middle right",
        textfont={"size": 12, "color": INK},
        cliponaxis=False,
        showlegend=False,
        hoverinfo="skip",
        row=1,
        col=place,
    )
    squashed = values.max() > _SQUASHED * values.median()
    axis = _log_axis(low.min() / 2, high, texts) if squashed else _linear_axis(high, texts)
    unit = f"{panel.unit}, log scale" if squashed else panel.unit
    title = f"{unit}<br>{panel.better}"
    figure.update_xaxes(axis, title=title, tickangle=0, row=1, col=place)


def _is_ours(peer: str) -> bool:
    return peer.startswith("this lab")


def _kind(peer: str, expert_bits: float) -> str:
    ours, wide, python, llama_cpp = _KINDS
    if _is_ours(peer):
        return ours
    if peer.startswith("llama.cpp"):
        return llama_cpp
    return wide if expert_bits > 8 else python


def _value(row: pd.Series, panel: _Panel) -> str:
    mapped = panel.column == "steady_mib" and row.steady_mib * MIB < row.active_mb * 1e6
    return f"{_rounded(row[panel.column])}{' + file' if mapped else ''}"


def _rounded(number: float) -> str:
    """Two digits, or all before the point.

    >>> _rounded(0.7954), _rounded(2.24), _rounded(1288.3)
    ('0.80', '2.2', '1,288')
    """
    return f"{number:,.0f}" if number >= 9.95 else f"{number:#.2g}"


def _linear_axis(high: pd.Series, texts: list[str]) -> dict:
    """From 0 to behind the last of the texts, which begin at `high`."""
    step = next(step for step in _round_numbers(-9, 9) if 2 * step >= high.max())
    return {
        "range": [0, max(high / _room_before(texts))],
        "tickvals": [step * count for count in range(3) if step * count <= 1.05 * high.max()],
        "tickformat": ",~r",
    }


def _log_axis(low: float, high: pd.Series, texts: list[str]) -> dict:
    """From `low` to behind the last of the texts, with two ticks at most."""
    first, lengths = math.log10(low), np.log10(high) - math.log10(low)
    powers = range(math.ceil(first), math.floor(first + lengths.max()) + 1)
    ticks = [10.0**power for power in powers[:: max(1, len(powers) - 1)]]
    return {
        "type": "log",
        "range": [first, first + max(lengths / _room_before(texts))],
        "tickvals": ticks,
        "ticktext": [_tick(tick) for tick in ticks],
    }


def _room_before(texts: list[str]) -> np.ndarray:
    """The share of a panel that each text leaves to its bar."""
    return 1 - np.array([len(text) + 2 for text in texts]) / _LETTERS


def _round_numbers(first: int, last: int, digits: tuple[int, ...] = (1, 2, 5)) -> list[float]:
    return [digit * 10.0**power for power in range(first, last + 1) for digit in digits]


def _tick(number: float) -> str:
    return f"{number:,.0f}" if number >= 1 else f"{number:g}"


def _peers_title(speeds: Speeds) -> dict:
    table = speeds.table
    in_16_bits = table.index[table.index.str.startswith("transformers bf16")]
    bf16 = table.decode_1[in_16_bits].idxmax()
    faster = speeds.ratio("decode_1", OURS, to=bf16)
    less = speeds.ratio("steady_mib", OURS, to=bf16)
    rounds = speeds.rounds.index.get_level_values("turn").nunique()
    return {
        "text": f"In 4 bits a token comes {_rounded(faster)} times as fast as in 16, from "
        f"{_rounded(100 * less)}% of the memory",
        "subtitle": {
            "text": f"A Mixtral reading {_rounded(table.active_mb[bf16])} MB a token in bf16, "
            f"{_rounded(table.active_mb[OURS])} here; {speeds.cores} cores, {speeds.date}; "
            + (f"median and range of {rounds} rounds" if rounds > 1 else "one round")
        },
    }


# -------------------------------------------------------------------------- three ways to multiply


def crossover(table: pd.DataFrame, switch: int) -> Figure:
    """How long one expert matrix takes for a number of tokens, multiplied in three ways.

    `table` has a row for each number of tokens, rising, and milliseconds in the columns "straight
    from the codes", "dequantized, then multiplied" and "bf16". Up to `switch` tokens the lab
    multiplies straight from the codes.
    """
    figure = Figure(layout={"template": TEMPLATE, "height": 430})
    for way, look in _WAYS.items():
        figure.add_scatter(
            x=table.index,
            y=table[way],
            name=way,
            mode="lines+markers",
            line={"color": look.color, "width": 2.5, "dash": look.dash},
            marker={"symbol": look.symbol, "size": 9},
            customdata=table[way] / table.index,
            hovertemplate="%{x} tokens: %{y:,.3f} ms, %{customdata:,.3f} ms each<extra>"
            + way
            + "</extra>",
        )
    figure.add_shape(
        type="line",
        x0=switch,
        x1=switch,
        y0=0,
        y1=1,
        yref="paper",
        line={"color": INK, "width": 1.5, "dash": "dashdot"},
    )
    side = "left" if switch**2 < table.index[0] * table.index[-1] else "right"
    figure.add_annotation(
        text=f"the lab switches<br>after {switch:,}",
        x=math.log10(switch),
        xanchor=side,
        xshift=5 if side == "left" else -5,
        y=1,
        yref="paper",
        yanchor="top",
        align=side,
        showarrow=False,
        font={"size": 12, "color": SOFT_INK},
    )
    figure.update_layout(title=_crossover_title(table, switch))
    figure.update_xaxes(title="tokens that the expert gets", type="log", tickvals=table.index)
    figure.update_yaxes(title="time for all of them (ms)", **_log_ticks(table))
    return figure


def _log_ticks(table: pd.DataFrame) -> dict:
    """Logarithmic, with ticks at 1, 2 and 5, or at powers of ten; room above for a note."""
    ways = table[list(_WAYS)]
    first, last = math.log10(ways.min(axis=None)), math.log10(ways.max(axis=None))
    digits = (1,) if last - first > 3 else (1, 2, 5)
    ticks = _round_numbers(math.floor(first), math.ceil(last), digits)
    return {
        "type": "log",
        "range": [first - 0.05 * (last - first), last + 0.2 * (last - first)],
        "tickvals": ticks,
        "ticktext": [_tick(tick) for tick in ticks],
    }


def _crossover_title(table: pd.DataFrame, switch: int) -> dict:
    codes, dequantized, bf16 = (table[way] for way in _WAYS)
    return {
        "text": f"Straight from the codes beats dequantizing {_wins(codes, dequantized)}, bf16 "
        f"{_wins(codes, bf16)}",
        "subtitle": {
            "text": f"One expert matrix, {table.index[0]:,} to {table.index[-1]:,} tokens at once; "
            f"the lab goes straight from the codes up to {switch:,}"
        },
    }


def _wins(way: pd.Series, other: pd.Series) -> str:
    """From the fewest tokens up to how many, without a gap, `way` takes less time than `other`."""
    faster = (way < other).cummin()
    if not faster.any():
        return "at no count" if (way >= other).all() else "only later"
    if faster.all():
        return "at all counts"
    last = faster.index[faster][-1]
    return f"up to {last:,} {'token' if last == 1 else 'tokens'}"
