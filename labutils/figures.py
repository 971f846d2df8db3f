"""Records in, pictures out: what a model's bytes are, were predicted to be, and have room for.

A figure computes nothing that matters and shows nothing: it takes a record from a module below and
returns a `plotly.graph_objects.Figure`. Its title states the finding, its axes carry units, and
hovering gives the exact values. So do the figures of `layer_figures`, `format_figures`,
`cost_figures` and `rounding_figures`, a module for each notebook.
"""

from collections.abc import Mapping

import numpy as np
from plotly.graph_objects import Figure

from .budget import Budget
from .checkpoints import Coverage
from .meter import GIB, MIB
from .style import COLORS, INK, TEMPLATE


def coverage_bars(coverages: Mapping[str, Coverage]) -> Figure:
    """What each part of a model is stored in, one bar for each way of loading it.

    A bar is as long as the bytes that are really stored, constants included, and cut by component;
    the colour is the format. The title compares the first way with the last.
    """
    tables = {way: covered.table for way, covered in coverages.items()}
    largest = max(covered.total_bytes for covered in coverages.values())
    figure = Figure(
        layout={"template": TEMPLATE, "barmode": "stack", "height": 130 + 75 * len(tables)}
    )
    named = set()
    for way, table in tables.items():
        for row in table.itertuples():
            figure.add_bar(
                orientation="h",
                y=[way],
                x=[row.bytes / MIB],
                name=row.stored_as,
                legendgroup=row.stored_as,
                showlegend=row.stored_as not in named,
                marker={"color": COLORS[row.stored_as], "line": {"color": "white", "width": 1}},
                text=row.component if row.bytes > largest / 12 else "",
                textposition="inside",
                insidetextanchor="middle",
                hovertemplate=f"{row.component}: {row.parameters:,} parameters in {row.stored_as}"
                f"<br>{row.bits_per_weight:.3f} bits per weight, {row.bytes:,} bytes"
                f"<extra>{way}</extra>",
            )
            named.add(row.stored_as)
    figure.update_layout(title=_coverage_title(coverages))
    figure.update_xaxes(title="stored, constants included (MiB = 2\u00b2\u2070 bytes)")
    figure.update_yaxes(autorange="reversed", ticks="", showgrid=False)
    return figure


def _coverage_title(coverages: Mapping[str, Coverage]) -> dict:
    (first, before), *_, (last, after) = coverages.items()
    bits = [covered.bits_per_weight("experts") for covered in (before, after)]
    return {
        "text": f"Experts: {bits[0]:.2f} bits per weight {first}, {bits[1]:.2f} {last}",
        "subtitle": {
            "text": f"{before.total_bytes / MIB:,.1f} and {after.total_bytes / MIB:,.1f} MiB in all"
        },
    }


def budget_bars(budgets: Mapping[str, Budget], rooms: Mapping[str, int], title: str = "") -> Figure:
    """Predicted bytes by component, one bar for each budget, and how much room there is.

    `rooms` are upright lines: a card's or a machine's memory in bytes. Without a title of its own
    the figure says how many of the budgets fit the first of them.
    """
    figure = Figure(
        layout={"template": TEMPLATE, "barmode": "stack", "height": 220 + 42 * len(budgets)}
    )
    for component in dict.fromkeys(name for b in budgets.values() for name in b.by_component):
        sizes = [budget.by_component.get(component, 0) for budget in budgets.values()]
        figure.add_bar(
            orientation="h",
            y=list(budgets),
            x=[size / GIB for size in sizes],
            name=component.replace("_", " "),
            marker={"color": COLORS.get(component, COLORS["other"])},
            customdata=sizes,
            hovertemplate="%{customdata:,} bytes<extra>%{y}<br>" + component + "</extra>",
        )
    for row, (name, room_bytes) in enumerate(rooms.items()):
        figure.add_vline(x=room_bytes / GIB, line={"color": INK, "width": 1.5, "dash": "dash"})
        figure.add_annotation(
            x=room_bytes / GIB,
            y=1.02,
            yref="paper",
            yanchor="bottom",
            yshift=18 * (row % 2),
            text=name,
            showarrow=False,
        )
    figure.update_layout(
        title=title or _room_title(budgets, rooms),
        margin={"t": 100},
        legend={"traceorder": "normal"},
    )
    figure.update_xaxes(title="predicted (GiB = 2\u00b3\u2070 bytes)", rangemode="tozero")
    figure.update_yaxes(autorange="reversed", ticks="", showgrid=False)
    return figure


def _room_title(budgets: Mapping[str, Budget], rooms: Mapping[str, int]) -> str:
    (room, room_bytes), *_ = rooms.items()
    fitting = [name for name, budget in budgets.items() if budget.total_bytes <= room_bytes]
    if not fitting:
        return f"None of these {len(budgets)} fits {room}"
    if len(fitting) == len(budgets):
        return f"All {len(budgets)} of these fit {room}"
    return f"Of these {len(budgets)}, {' and '.join(fitting)} fit {room}"


def cache_growth(
    weights_bytes: int, token_bytes: int, tokens: int, rooms: Mapping[str, int]
) -> Figure:
    """Weights and KV cache as the context grows to `tokens`, all sequences of a batch together.

    `token_bytes` is what one token position adds, for the whole batch. `rooms` are level lines: a
    card's memory in bytes. The title says which of them holds how long a context.
    """
    positions = np.linspace(0, tokens, 65)
    weights = np.full(len(positions), weights_bytes / GIB)
    figure = Figure(
        layout={
            "template": TEMPLATE,
            "title": _context_title(weights_bytes, token_bytes, tokens, rooms),
        }
    )
    for name, heights, color in (
        ("weights", weights, COLORS["experts"]),
        ("KV cache", positions * token_bytes / GIB, COLORS["kv_cache"]),
    ):
        figure.add_scatter(
            x=positions,
            y=heights,
            name=name,
            stackgroup="memory",
            line={"color": color, "width": 0.5},
            hovertemplate="%{y:.2f} GiB<extra>" + name + "</extra>",
        )
    for room, room_bytes in rooms.items():
        figure.add_scatter(
            x=[0, tokens],
            y=[room_bytes / GIB] * 2,
            mode="lines+text",
            text=["", room],
            textposition="top left",
            line={"color": INK, "width": 1.5, "dash": "dash"},
            showlegend=False,
            hoverinfo="skip",
        )
    top = max(
        *(room / GIB for room in rooms.values()), (weights_bytes + tokens * token_bytes) / GIB
    )
    figure.update_xaxes(title="context (tokens)", range=[0, tokens])
    figure.update_yaxes(title="memory (GiB = 2\u00b3\u2070 bytes)", range=[0, 1.1 * top])
    return figure


def _context_title(
    weights_bytes: int, token_bytes: int, tokens: int, rooms: Mapping[str, int]
) -> str:
    said = []
    for room, room_bytes in rooms.items():
        held = (room_bytes - weights_bytes) // token_bytes
        if held <= 0:
            said.append(f"the weights alone do not fit {room}")
        elif held >= tokens:
            said.append(f"{room} has room for all {tokens:,} tokens")
        else:
            said.append(f"{room} is full after {held:,} tokens")
    return "; ".join(said)
