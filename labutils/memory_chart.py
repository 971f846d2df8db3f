"""Memory as it was recorded, drawn while it is still growing.

`memory_chart` takes what a `meter.Meter` has recorded and returns one figure: anonymous and
resident memory over time, a band for each run, what was predicted to stay, and the phases below.
Its title says what the last run kept and where it peaked.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import plotly.graph_objects as go
from plotly.graph_objects import Figure

from .meter import Memory, Run, Samples
from .style import COLORS, TEMPLATE

DRAWN_POINTS = 2000
_PLOT_PIXELS = 600
_CHARACTER_PIXELS = 7
_ROW_PIXELS = 19
_LABEL_ROWS = 4
_TITLE_CHARACTERS = 80
_TITLE_PAD_PIXELS = 14
_TITLE_LINE_PIXELS = 20
_PHASE_ROWS = 6


@dataclass(frozen=True)
class _Unit:
    name: str
    size_bytes: int
    decimals: int

    def text(self, amount_bytes: float) -> str:
        return f"{amount_bytes / self.size_bytes:,.{self.decimals}f} {self.name}"


@dataclass(frozen=True)
class _Line:
    """One quantity over time, above its first sample."""

    name: str
    color: str
    bytes: np.ndarray
    above_bytes: np.ndarray
    width: float
    fill: str | None = None


@dataclass(frozen=True)
class _Expectation:
    """What a run was expected to leave behind, as a height in the chart."""

    run: Run
    predicted_bytes: int
    above_bytes: int


@dataclass(frozen=True)
class _Label:
    """A run's name over its band, in the lowest row where it covers no other name."""

    run: Run
    text: str
    row: int
    at_right_edge: bool


def memory_chart(
    samples: Samples, runs: Sequence[Run], predicted_bytes: int | None = None
) -> Figure:
    """How memory rose and fell during these runs, above where the first sample stood.

    Anonymous memory is the filled line, RSS the thin one; GPU lines appear once a GPU is used.
    Runs are bands with their names on top, phases are bars below, and what a run was expected to
    leave behind is a dashed line that begins where the run did. `predicted_bytes` is such an
    expectation for the last of the runs, if it has none of its own; the title is about that run.
    Seconds count while something is recorded. The unit is MiB = 2**20 bytes, or GiB = 2**30 where
    the chart is 2 GiB high. Lines of more than 2000 samples are thinned; their peaks stay.

    Example: `memory_chart(meter.samples, meter.runs).show()`.
    """
    seconds = np.asarray(samples.seconds)
    lines = _memory_lines(samples)
    expectations = _expectations(samples, runs, predicted_bytes)
    unit = _unit(lines, expectations)
    end_seconds = seconds[-1] if len(seconds) else 1.0
    labels = _placed_labels(runs, end_seconds)
    title = _memory_title(runs, expectations, unit)
    strip = _phase_strip(runs)
    return Figure(
        data=[
            *(_memory_trace(line, seconds, runs, unit) for line in lines),
            _expectation_trace(expectations, unit),
            _kept_trace(samples, runs, unit),
            strip,
        ],
        layout={
            "template": TEMPLATE,
            "title": title,
            "margin": {"t": _top_pixels(title, labels)},
            "height": 460,
            "hovermode": "x unified",
            "shapes": [*_bands(runs), *_poles(labels)],
            "annotations": [
                *_label_annotations(labels),
                *_expectation_annotations(expectations, unit, end_seconds),
            ],
            **_memory_axes(end_seconds, unit, phase_rows=len(set(strip.y) - {None})),
        },
    )


def thin(values: np.ndarray, points: int = DRAWN_POINTS) -> np.ndarray:
    """The indices of at most `points` of these values, in order, with every peak still there.

    The values are cut into equal stretches, and each keeps its smallest and its largest; the first
    and the last value stay too. `points` is at least 4.

    Example: 0 1 9 1 0 2 -3 2 thinned to 4 keeps 0, 9, -3 and 2.
    """
    count = len(values)
    if count <= points:
        return np.arange(count)
    stretches = points // 2 - 1
    length = -(-count // stretches)
    padded = np.pad(np.asarray(values), (0, length * stretches - count), mode="edge")
    rows = padded.reshape(stretches, length)
    begins = np.arange(stretches) * length
    kept = [[0, count - 1], begins + rows.argmin(axis=1), begins + rows.argmax(axis=1)]
    return np.unique(np.minimum(np.concatenate(kept), count - 1))


def _memory_lines(samples: Samples) -> list[_Line]:
    def line(name: str, color: str, column: Sequence[int], width: float, fill: str | None = None):
        values = np.asarray(column)
        return _Line(name, COLORS[color], values, values - values[:1], width, fill)

    return [
        line("anonymous memory", "anonymous", samples.anonymous_bytes, 2.5, "tozeroy"),
        line("RSS, mapped files included", "rss", samples.rss_bytes, 1.2),
        line("GPU, tensors", "gpu allocated", samples.gpu_allocated_bytes, 2.5),
        line("GPU, reserved by PyTorch", "gpu reserved", samples.gpu_reserved_bytes, 1.2),
    ]


def _expectations(
    samples: Samples, runs: Sequence[Run], predicted_bytes: int | None
) -> list[_Expectation]:
    found = []
    for run in runs:
        own_bytes = run.predicted_bytes
        if own_bytes is None and run is runs[-1]:
            own_bytes = predicted_bytes
        if own_bytes is not None:
            above_bytes = _above_bytes(run, run.start, samples) + own_bytes
            found.append(_Expectation(run, own_bytes, above_bytes))
    return found


def _above_bytes(run: Run, memory: Memory, samples: Samples) -> int:
    """How far above the first sample this is, on the line that tells about the run."""
    column = "gpu_allocated_bytes" if run.on_gpu else "anonymous_bytes"
    return getattr(memory, column) - getattr(samples, column)[0]


def _unit(lines: Sequence[_Line], expectations: Sequence[_Expectation]) -> _Unit:
    heights = [line.above_bytes.max(initial=0) for line in lines]
    heights += [expectation.above_bytes for expectation in expectations]
    return _Unit("GiB", 2**30, 2) if max(heights) >= 2 * 2**30 else _Unit("MiB", 2**20, 1)


def _memory_trace(line: _Line, seconds: np.ndarray, runs: Sequence[Run], unit: _Unit) -> go.Scatter:
    drawn = thin(line.above_bytes)
    is_main = line.fill is not None
    where = "<b>%{text}</b><br>" if is_main else ""
    return go.Scatter(
        name=line.name,
        x=seconds[drawn],
        y=line.above_bytes[drawn] / unit.size_bytes,
        customdata=line.bytes[drawn],
        text=_whereabouts(seconds[drawn], runs) if is_main else None,
        hovertemplate=f"{where}%{{y:,.{unit.decimals + 1}f}} {unit.name} above the start<br>"
        "%{customdata:,} bytes in all<extra></extra>",
        mode="lines",
        line={"color": line.color, "width": line.width},
        zorder=int(is_main),
        fill=line.fill,
        fillcolor=_faded(line.color),
        visible=is_main or bool(line.bytes.any()),
    )


def _whereabouts(seconds: np.ndarray, runs: Sequence[Run]) -> list[str]:
    """The innermost run, and its phase, at each of these moments."""
    names = np.full(len(seconds), "", dtype=object)
    for run in sorted(runs, key=lambda run: run.began_seconds):
        label = html.escape(run.label)
        names[(seconds >= run.began_seconds) & (seconds <= run.ended_seconds)] = label
        for phase in run.phases:
            inside = (seconds >= phase.began_seconds) & (seconds <= phase.ended_seconds)
            names[inside] = f"{label}, {html.escape(phase.name)}"
    return names.tolist()


def _faded(color: str) -> str:
    red, green, blue = (int(color[start : start + 2], 16) for start in (1, 3, 5))
    return f"rgba({red}, {green}, {blue}, 0.18)"


def _expectation_trace(expectations: Sequence[_Expectation], unit: _Unit) -> go.Scatter:
    x, y, text = [], [], []
    for expectation in expectations:
        run, height = expectation.run, expectation.above_bytes / unit.size_bytes
        x += [run.began_seconds, run.ended_seconds, None]
        y += [height, height, None]
        text += [f"{html.escape(run.label)}: {expectation.predicted_bytes:,} bytes"] * 2 + [""]
    return go.Scatter(
        name="predicted to stay",
        x=x,
        y=y,
        text=text,
        hovertemplate="predicted to stay after %{text}<extra></extra>",
        mode="lines",
        line={"color": COLORS["predicted"], "width": 1.8, "dash": "dash"},
        visible=bool(expectations),
    )


def _kept_trace(samples: Samples, runs: Sequence[Run], unit: _Unit) -> go.Scatter:
    ended = [run for run in runs if not run.recording]
    heights = [_above_bytes(run, run.end, samples) / unit.size_bytes for run in ended]
    return go.Scatter(
        name="after the run",
        x=[run.ended_seconds for run in ended],
        y=heights,
        text=[
            f"{html.escape(run.label)}: "
            f"{run.gpu_kept_bytes if run.on_gpu else run.kept_bytes:,} bytes more than at its start"
            for run in ended
        ],
        hovertemplate="%{text}<extra></extra>",
        mode="markers",
        cliponaxis=False,
        zorder=2,
        marker={"color": "white", "size": 8, "line": {"width": 2, "color": COLORS["predicted"]}},
        visible=bool(ended),
    )


def _expectation_annotations(
    expectations: Sequence[_Expectation], unit: _Unit, end_seconds: float
) -> list[dict]:
    """The predicted sizes, where a run is wide enough for it, and always for the last one."""
    annotations = []
    for expectation in expectations:
        run, text = expectation.run, f"predicted {unit.text(expectation.predicted_bytes)}"
        fits = _PLOT_PIXELS * run.seconds / end_seconds >= _text_pixels(text)
        if fits or expectation is expectations[-1]:
            annotations.append(
                {
                    "text": text,
                    "x": run.began_seconds if fits else run.ended_seconds,
                    "y": expectation.above_bytes / unit.size_bytes,
                    "xanchor": "left" if fits else "right",
                    "yanchor": "bottom",
                    "showarrow": False,
                    "font": {"size": 12},
                }
            )
    return annotations


def _phase_strip(runs: Sequence[Run]) -> go.Scatter:
    phases = [phase for run in runs for phase in run.phases]
    one_row = len({phase.name for phase in phases}) > _PHASE_ROWS
    x, y, text = [], [], []
    for phase in phases:
        row = "phases" if one_row else phase.name
        x += [phase.began_seconds, phase.ended_seconds, None]
        y += [html.escape(row)] * 2 + [None]
        text += [html.escape(phase.name)] * 2 + [""]
    return go.Scatter(
        name="phases",
        x=x,
        y=y,
        text=text,
        yaxis="y2",
        mode="lines+markers",
        line={"color": "#8FA3B0", "width": 9},
        marker={"symbol": "line-ns", "size": 10, "line": {"width": 1.5, "color": "#4A5A65"}},
        hovertemplate="%{text}<extra></extra>",
        showlegend=False,
        visible=bool(phases),
    )


def _placed_labels(runs: Sequence[Run], end_seconds: float) -> list[_Label]:
    """Names that do not overlap on a plot of ordinary width; the oldest give way."""
    labels = []
    taken: list[list[tuple[float, float]]] = [[] for _ in range(_LABEL_ROWS)]
    for run in sorted(runs, key=lambda run: run.began_seconds, reverse=True):
        text = _shortened(run.label)
        width = _text_pixels(text)
        left = _PLOT_PIXELS * run.began_seconds / end_seconds
        at_right_edge = left + width > _PLOT_PIXELS
        left = _PLOT_PIXELS - width if at_right_edge else left
        for row, spans in enumerate(taken):
            if all(left >= end or left + width <= begin for begin, end in spans):
                spans.append((left, left + width))
                labels.append(_Label(run, html.escape(text), row, at_right_edge))
                break
    return labels


def _text_pixels(text: str) -> float:
    return _CHARACTER_PIXELS * (len(text) + 1)


def _top_pixels(title: dict[str, object], labels: Sequence[_Label]) -> int:
    label_rows = max((label.row + 1 for label in labels), default=0)
    return 56 + title["pad"]["t"] + _ROW_PIXELS * label_rows


def _label_annotations(labels: Sequence[_Label]) -> list[dict]:
    return [
        {
            "text": label.text,
            "x": 1 if label.at_right_edge else label.run.began_seconds,
            "xref": "paper" if label.at_right_edge else "x",
            "xanchor": "right" if label.at_right_edge else "left",
            "xshift": 0 if label.at_right_edge else 2,
            "y": 1,
            "yref": "paper",
            "yanchor": "bottom",
            "yshift": _ROW_PIXELS * label.row,
            "showarrow": False,
            "borderpad": 1,
            "bgcolor": "white",
        }
        for label in labels
    ]


def _bands(runs: Sequence[Run]) -> list[dict]:
    return [
        {
            "type": "rect",
            "layer": "below",
            "x0": run.began_seconds,
            "x1": run.ended_seconds,
            "yref": "paper",
            "y0": 0,
            "y1": 1,
            "fillcolor": "rgba(60, 80, 95, 0.05)",
            "line": {"color": "#B8C2C9", "width": 1},
        }
        for run in runs
    ]


def _poles(labels: Sequence[_Label]) -> list[dict]:
    """Thin lines that lead from a band up to its name."""
    return [
        {
            "type": "line",
            "layer": "below",
            "x0": label.run.began_seconds,
            "x1": label.run.began_seconds,
            "yref": "paper",
            "ysizemode": "pixel",
            "yanchor": 1,
            "y0": 0,
            "y1": _ROW_PIXELS * (label.row + (not label.at_right_edge)),
            "line": {"color": "#B8C2C9", "width": 1},
        }
        for label in labels
    ]


def _memory_axes(end_seconds: float, unit: _Unit, phase_rows: int) -> dict[str, dict]:
    strip_share = 0.07 * phase_rows
    return {
        "xaxis": {
            "title": {"text": "seconds recorded"},
            "range": [0, 1.01 * end_seconds],
            "hoverformat": ".2f",
            "anchor": "y2" if phase_rows else "y",
        },
        "yaxis": {
            "title": {"text": f"above the start ({unit.name})"},
            "rangemode": "tozero",
            "domain": [strip_share + 0.03 * bool(phase_rows), 1],
        },
        "yaxis2": {
            "domain": [0, max(strip_share, 0.01)],
            "type": "category",
            "autorange": "reversed",
            "showgrid": False,
            "ticks": "",
            "dtick": 1,
            "ticklabelstandoff": 8,
            "visible": bool(phase_rows),
        },
    }


def _memory_title(
    runs: Sequence[Run], expectations: Sequence[_Expectation], unit: _Unit
) -> dict[str, object]:
    """The finding about the last run, and below it how well it was measured."""
    if not runs:
        return {
            "text": "Nothing recorded yet",
            "subtitle": {"text": 'Waiting for a cell with <b>with meter("what it does"):</b>'},
            "pad": {"t": _TITLE_PAD_PIXELS},
        }
    run = runs[-1]
    start_bytes, kept_bytes, peak_bytes, where = (
        (
            run.start.gpu_allocated_bytes,
            run.gpu_kept_bytes,
            run.gpu_peak_above_start_bytes,
            " on the GPU",
        )
        if run.on_gpu
        else (run.start_bytes, run.kept_bytes, run.peak_above_start_bytes, "")
    )
    if run.recording:
        change = f"{unit.text(kept_bytes)}{where} so far"
    elif kept_bytes < 0:
        change = f"{unit.text(-kept_bytes)} freed"
    else:
        change = f"{unit.text(kept_bytes)} kept{where}"
    findings = [
        *(f"{unit.text(e.predicted_bytes)} predicted" for e in expectations if e.run is run),
        change,
        f"peak {unit.text(peak_bytes)}",
        *(["stopped by an error"] if run.error else []),
    ]
    text = f"{html.escape(_shortened(run.label))}: {', '.join(findings)}"
    is_long = len(text) > _TITLE_CHARACTERS
    precision = "" if run.peak_is_exact else " The peak is the highest sample."
    return {
        "text": text.replace(": ", ":<br>", 1) if is_long else text,
        "subtitle": {
            "text": f"Above its start at {unit.text(start_bytes)}{where}. Longest time between "
            f"two samples: {run.largest_gap_seconds:.3f} s.{precision}"
        },
        "pad": {"t": _TITLE_PAD_PIXELS + is_long * _TITLE_LINE_PIXELS},
    }


def _shortened(label: str) -> str:
    return label if len(label) <= 40 else f"{label[:39]}…"
