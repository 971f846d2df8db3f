"""Pictures of plans: what a model's bytes are, which machines have room for them, and which not.

Like `figures`: a record in, a `plotly.graph_objects.Figure` out, the finding in the title. A
verdict has a colour, a pattern and a mark of its own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd
from plotly.graph_objects import Figure

from .anatomy import COMPONENTS
from .meter import GIB
from .planner import FITS, OFFLOADED, SHORTER, TOO_LARGE, VERDICTS, Plan
from .style import COLORS, INK, TEMPLATE

_STACKED = (*COMPONENTS, "kv_cache", "activations")
_ACTIVATIONS = "#C9A9C4"  # in the manner of the KV cache: both come with the context


@dataclass(frozen=True)
class _Look:
    """How a verdict is drawn: its colour, a pattern to be told apart in grey, and its mark."""

    color: str
    pattern: str
    mark: str


_LOOKS = {
    FITS: _Look("#009E73", "", "\u2713"),
    SHORTER: _Look("#56B4E9", ".", "\u25d0"),
    OFFLOADED: _Look("#E69F00", "/", "\u21c4"),
    TOO_LARGE: _Look("#D55E00", "x", "\u2717"),
}
_PALE = {FITS: "#BFE7DC", SHORTER: "#D5ECF9", OFFLOADED: "#F9E7BF", TOO_LARGE: "#F5D7BF"}


# ------------------------------------------------------------------------ one model, many machines


def memory_of(plans: Sequence[Plan]) -> Figure:
    """One model's bytes, stacked, and below them what each machine has room for.

    `plans` are of the same model, recipe, context and batch, one for each machine. A machine is an
    outline as wide as its memory for the model, one box a card, filled as far as it is needed; what
    finds no room stands out behind it, and what is far larger than needed is cut off. The same
    machines give the same traces, whatever the model.
    """
    first = plans[0]
    names = [f"{_machine(plan)}  " for plan in plans]
    places = [1.6 + row for row in range(len(plans))]
    end = _end(plans)
    traces = [*_stack_bars(plans[0], end), *_machine_bars(plans, places)]
    fitting = Counter(plan.verdict for plan in plans)
    others = [
        f"{count} more {verdict.removeprefix('fits ')}"
        for verdict in (SHORTER, OFFLOADED)
        if (count := fitting[verdict])
    ]
    layout = {
        "template": TEMPLATE,
        "title": {
            "text": f"{_subject(first)}: {first.budget.total_bytes / GIB:,.1f} GiB, fits "
            f"{fitting[FITS]} of {len(plans)} machines",
            "subtitle": {
                "text": "; ".join(
                    [*others, "predicted: weights and KV cache exact, activations an allowance"]
                )
            },
        },
        "height": 227 + 27 * len(plans),
        "margin": {"l": 180, "r": 20, "t": 78, "b": 100},
        "barmode": "overlay",
        "legend": {"traceorder": "normal"},
        "annotations": [
            _end_note(f"<b>{first.budget.total_bytes / GIB:,.1f} GiB</b>", 0),
            *(_end_note(_said(plan), place) for plan, place in zip(plans, places, strict=True)),
        ],
        "xaxis": {
            "domain": [0, 0.66],
            "range": [0, end],
            "title": "memory for the model (GiB = 2\u00b3\u2070 bytes)",
        },
        "yaxis": {
            "range": [places[-1] + 0.6, -0.7],
            "tickvals": [0, *places],
            "ticktext": ["<b>needed</b>  ", *names],
            "ticks": "",
            "showgrid": False,
            "zeroline": False,
            "automargin": False,
        },
    }
    return Figure(traces, layout)


def _end(plans: Sequence[Plan]) -> float:
    """Where the axis ends, in GiB: behind all machines, or those of some three times the need.

    A machine with more memory has no right edge then.
    """
    needed = plans[0].budget.total_bytes / GIB
    steps = (digit * 10.0**power for power in range(-3, 7) for digit in (1, 2, 5))
    rounded = next(step for step in steps if step > 2 * needed)
    return min(rounded, 1.02 * max((_room(plan) + _short(plan)) / GIB for plan in plans))


def _stack_bars(plan: Plan, end: float) -> list[dict]:
    """A trace for each component that any model may have, empty where this one has none."""
    traces, start = [], 0.0
    for component in _STACKED:
        size_bytes = plan.budget.by_component.get(component, 0)
        size, name = size_bytes / GIB, component.replace("_", " ").replace("kv", "KV")
        text = f"{name} {size:,.1f}"
        traces.append(
            {
                "type": "bar",
                "orientation": "h",
                "x": [size],
                "y": [0],
                "base": [start],
                "width": 0.95,
                "name": name,
                "showlegend": size > 0.003 * end,
                "marker": {
                    "color": COLORS.get(component, _ACTIVATIONS),
                    "line": {"color": "white", "width": 1},
                },
                "text": [text if size > 0.017 * len(text) * end else ""],
                "textposition": "inside",
                "insidetextanchor": "middle",
                "textangle": 0,
                "hovertemplate": f"{name}: {size_bytes:,} bytes, {size:,.2f} GiB<extra></extra>",
            }
        )
        start += size
    return traces


def _machine_bars(plans: Sequence[Plan], places: Sequence[float]) -> list[dict]:
    """What is needed in each box and what is not there, a trace each, and the boxes around it."""
    boxes = [
        (plan, place, card)
        for plan, place in zip(plans, places, strict=True)
        for card in range(_boxes(plan))
    ]
    rooms = [plan.bytes_available / GIB for plan, _, _ in boxes]
    needs = [_needed(plan, card) / GIB for plan, _, card in boxes]
    shared = {
        "type": "bar",
        "orientation": "h",
        "y": [place for _, place, _ in boxes],
        "width": 0.62,
        "showlegend": False,
        "customdata": [_hover(plan) for plan, _, _ in boxes],
        "hovertemplate": "%{customdata}<extra></extra>",
    }
    starts = [card * room for (_, _, card), room in zip(boxes, rooms, strict=True)]
    filled = shared | {
        "x": [min(need, room) for need, room in zip(needs, rooms, strict=True)],
        "base": starts,
        "marker": {
            "color": [_LOOKS[plan.verdict].color for plan, _, _ in boxes],
            "pattern": {
                "shape": [_LOOKS[plan.verdict].pattern for plan, _, _ in boxes],
                "fillmode": "overlay",
                "fgcolor": "white",
                "size": 6,
            },
        },
    }
    short = shared | {
        "y": list(places),
        "x": [_short(plan) / GIB for plan in plans],
        "base": [_room(plan) / GIB for plan in plans],
        "customdata": [_hover(plan) for plan in plans],
        "marker": {"color": [_PALE[plan.verdict] for plan in plans]},
    }
    outlines = shared | {
        "x": rooms,
        "base": starts,
        "marker": {"color": "rgba(0, 0, 0, 0)", "line": {"color": INK, "width": 1.2}},
    }
    return [filled, short, outlines]


def _boxes(plan: Plan) -> int:
    return plan.machine.cards if plan.machine.card else 1


def _room(plan: Plan) -> int:
    return _boxes(plan) * plan.bytes_available


def _shares(plan: Plan) -> tuple[int, ...]:
    """The bytes on each card: with the experts elsewhere, as many as then lie on the fullest."""
    return (plan.offload.card_bytes,) * _boxes(plan) if plan.verdict == OFFLOADED else plan.shares


def _short(plan: Plan) -> int:
    """The bytes that find no room, over all cards."""
    return sum(max(0, share - plan.bytes_available) for share in _shares(plan))


def _needed(plan: Plan, card: int) -> int:
    shares = _shares(plan)
    return shares[card] if card < len(shares) else 0


def _machine(plan: Plan) -> str:
    """Its name with the memory of a card."""
    machine = plan.machine
    return machine.name if machine.card is None else f"{machine.name}, {machine.card.gib:.0f} GiB"


def _subject(plan: Plan) -> str:
    sequences = f"{plan.batch_size} x " if plan.batch_size > 1 else ""
    return (
        f"{plan.model}, experts in {plan.recipe.experts.upper()}, "
        f"{sequences}{plan.context_tokens:,} tokens"
    )


def _said(plan: Plan) -> str:
    """The verdict in a few words, with its mark and its number."""
    words = {
        FITS: f"fits, {(plan.bytes_available - plan.bytes_needed) / GIB:,.1f} GiB left",
        SHORTER: f"fits with {plan.longest_context_tokens:,} tokens",
        TOO_LARGE: f"short by {plan.short_bytes / GIB:,.1f} GiB",
    }
    if plan.verdict == OFFLOADED:
        said = f"experts in CPU memory, {plan.offload.host_bytes / GIB:,.1f} GiB"
    else:
        said = words[plan.verdict] + (
            " a card" if _boxes(plan) > 1 and plan.verdict != SHORTER else ""
        )
    look = _LOOKS[plan.verdict]
    return f'<span style="color: {look.color}">{look.mark}</span> {said}'


def _hover(plan: Plan) -> str:
    fullest = "the fullest card" if _boxes(plan) > 1 else "it"
    return (
        f"{plan.machine.name}: {plan.verdict}<br>needs {plan.bytes_needed / GIB:,.2f} GiB, "
        f"{fullest} has {plan.bytes_available / GIB:,.2f} GiB for a model"
    )


def _end_note(text: str, place: float) -> dict:
    return {
        "text": text,
        "x": 0.675,
        "xref": "paper",
        "xanchor": "left",
        "y": place,
        "yref": "y",
        "yanchor": "middle",
        "showarrow": False,
        "font": {"size": 12},
    }


# ------------------------------------------------------------------------ many models, many cards


def verdicts(table: pd.DataFrame, done: str) -> Figure:
    """Which models fit which machines: a row for each model and a column for each machine.

    `table` is that of `planner.plans_table`; `done` says what its plans have in common: "experts in
    NF4, 8,192 tokens". A cell says how many GiB are left on the fullest card with everything on the
    cards; below 0 is what is missing, and where a shorter context fits, how many tokens that is.
    """
    table = table.assign(
        place=[_column(row.machine, row.available_gib) for row in table.itertuples()],
        spare=table.available_gib - table.needed_gib,
    )
    models, places = table.model.unique(), table.place.unique()
    cells = table.set_index(["model", "place"])
    rows = [[cells.loc[(model, place)] for place in places] for model in models]
    figure = Figure(layout={"template": TEMPLATE, "height": 220 + 34 * len(models)})
    figure.add_heatmap(
        z=[[VERDICTS.index(cell.verdict) for cell in row] for row in rows],
        x=places,
        y=models,
        zmin=-0.5,
        zmax=len(VERDICTS) - 0.5,
        colorscale=[
            [(place + side) / len(VERDICTS), _PALE[verdict]]
            for place, verdict in enumerate(VERDICTS)
            for side in (0, 1)
        ],
        showscale=False,
        xgap=2,
        ygap=2,
        text=[[_cell(cell) for cell in row] for row in rows],
        texttemplate="%{text}",
        textfont={"size": 12, "color": INK},
        customdata=[
            [
                f"{cell.machine}: {cell.verdict}<br>needs {cell.needed_gib:,.2f} of "
                f"{cell.available_gib:,.2f} GiB; at most {cell.longest_context:,} tokens"
                for cell in row
            ]
            for row in rows
        ],
        hovertemplate="%{y}, %{customdata}<extra></extra>",
    )
    for verdict in VERDICTS:
        figure.add_scatter(
            x=[None],
            y=[None],
            mode="markers",
            marker={"symbol": "square", "size": 13, "color": _PALE[verdict]},
            name=f"{_LOOKS[verdict].mark} {verdict}",
        )
    found = Counter(table.verdict)
    figure.update_layout(
        title={
            "text": f"{done[0].upper()}{done[1:]}: {found[FITS]} of {len(table)} fit, "
            f"{found[SHORTER] + found[OFFLOADED]} more with a compromise",
            "subtitle": {
                "text": "GiB left, below 0 missing, with everything on the fullest card; by its "
                "name what it has for a model"
            },
        },
        legend={"traceorder": "normal"},
        margin={"t": 124, "b": 80},
    )
    figure.update_xaxes(side="top", ticks="", showgrid=False, tickangle=0, tickfont={"size": 11})
    figure.update_yaxes(autorange="reversed", ticks="", ticksuffix=" ", showgrid=False)
    return figure


def _column(machine: str, available_gib: float) -> str:
    name = machine.split(" with ")[0]
    return "<br>".join([*name.rsplit(" ", 1), f"{available_gib:.0f} GiB"])


def _cell(cell: pd.Series) -> str:
    """The mark and the GiB left; where a shorter context fits, also its tokens."""
    said = f"{_LOOKS[cell.verdict].mark} {_spare(cell.spare)}"
    if cell.verdict != SHORTER:
        return said
    return f"{said}<br><span style='font-size: 9px'>{cell.longest_context:,} tokens</span>"


def _spare(gib: float) -> str:
    return f"{gib:,.{0 if abs(gib) >= 100 else 1}f}".replace("-", "\u2212")
