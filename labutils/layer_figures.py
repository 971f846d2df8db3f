"""Pictures of a Mixture-of-Experts layer: who goes where, who is busy, where parameters are.

Like `figures`: a record in, a `plotly.graph_objects.Figure` out, the finding in the title.
"""

import html
import math
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from plotly.graph_objects import Figure
from plotly.subplots import make_subplots

from .anatomy import COMPONENTS
from .ledger import Ledger
from .moe import Routing
from .style import COLORS, INK, TEMPLATE


def expert_use_map(use: pd.DataFrame) -> Figure:
    """Which expert serves which language: one panel a layer, from `standin.expert_use`.

    `use` has a row for each (layer, language) and a column for each expert; a row adds up to 1. The
    title names the pair that stands out most.
    """
    layers = use.index.get_level_values(0).unique()
    languages = use.index.get_level_values(1).unique()
    figure = make_subplots(
        rows=1,
        cols=len(layers),
        shared_yaxes=True,
        subplot_titles=[f"layer {layer}" for layer in layers],
        horizontal_spacing=0.02,
    )
    for column, layer in enumerate(layers, start=1):
        shares = use.loc[layer]
        figure.add_heatmap(
            z=100 * shares.to_numpy(),
            x=[str(expert) for expert in shares.columns],
            y=list(shares.index),
            coloraxis="coloraxis",
            hovertemplate="%{y}, expert %{x}: %{z:.1f}% of the choices<extra></extra>",
            row=1,
            col=column,
        )
    layer, language = use.max(axis=1).idxmax()
    share, expert = use.loc[(layer, language)].max(), use.loc[(layer, language)].idxmax()
    figure.update_layout(
        template=TEMPLATE,
        height=170 + 26 * len(languages),
        title=f"In layer {layer}, expert {expert} gets {100 * share:.0f}% of the choices of "
        f"\u201c{language}\u201d; even use would be {100 / use.shape[1]:.3g}%",
        coloraxis={
            "colorscale": "Blues",
            "cmin": 0,
            "colorbar": {"title": "% of choices", "thickness": 12},
        },
        margin={"t": 90},
    )
    figure.update_yaxes(autorange="reversed", showgrid=False, ticks="")
    figure.update_xaxes(showgrid=False, ticks="", title="expert")
    return figure


_IDLE = "#F1EBCB"  # the experts' own colour, pale
_WHITE_SPACE = {" ": "\u2423", "\n": "\u21b5"}


def routing_map(tokens: Sequence[str], routing: Routing) -> Figure:
    """Which token goes to which experts, with what weight, and the load that adds up for each.

    A dot for each choice: its column is the token, its row the expert, its area the weight. At the
    right how many tokens each expert got, against an even share. `tokens` are the labels.
    """
    chosen, weights, counts = (
        values.tolist() for values in (routing.chosen, routing.weights, routing.counts)
    )
    colors = [COLORS[f"expert {expert % 16}"] for expert in range(routing.experts)]
    labels = [_WHITE_SPACE.get(token, html.escape(token)) for token in tokens]
    choices = [
        (place, expert, weight)
        for place in range(len(tokens))
        for expert, weight in zip(chosen[place], weights[place], strict=True)
    ]
    between_choices = {
        "type": "scatter",
        "x": [x for place in range(len(tokens)) for x in (place, place, None)],
        "y": [y for experts in chosen for y in (min(experts), max(experts), None)],
        "mode": "lines",
        "line": {"color": "#D0D0D0", "width": 1},
        "hoverinfo": "skip",
    }
    dots = {
        "type": "scatter",
        "x": [place for place, _, _ in choices],
        "y": [expert for _, expert, _ in choices],
        "mode": "markers",
        "marker": {
            "color": [colors[expert] for _, expert, _ in choices],
            "size": [20 * weight**0.5 for _, _, weight in choices],
            "opacity": 1,
        },
        "customdata": [(labels[place], weight) for place, _, weight in choices],
        "hovertemplate": "\u201c%{customdata[0]}\u201d to expert %{y}, "
        "weight %{customdata[1]:.3f}<extra></extra>",
    }
    load = {
        "type": "bar",
        "x": counts,
        "y": list(range(routing.experts)),
        "xaxis": "x2",
        "orientation": "h",
        "marker": {"color": colors},
        "hovertemplate": "expert %{y}: %{x} tokens<extra></extra>",
    }
    even = len(choices) / routing.experts
    even_line = {"x0": even, "x1": even, "xref": "x2", "y0": 0, "y1": 1, "yref": "paper"}
    layout = {
        "template": TEMPLATE,
        "title": _load_title(routing, even),
        "height": 190 + 34 * routing.experts,
        "showlegend": False,
        "margin": {"b": 60},
        "xaxis": {
            "domain": [0, 0.83],
            "title": "token, in order",
            "tickvals": list(range(len(tokens))),
            "ticktext": labels,
            "tickangle": 0,
            "range": [-0.7, len(tokens) - 0.3],
            "showgrid": False,
            "zeroline": False,
        },
        "xaxis2": {
            "domain": [0.85, 1],
            "title": "tokens",
            "range": [0, 1.08 * max(*counts, even)],
            "showgrid": False,
        },
        "yaxis": {
            "tickvals": list(range(routing.experts)),
            "ticktext": [f"expert {expert}" for expert in range(routing.experts)],
            "range": [routing.experts - 0.4, -0.6],
            "ticks": "",
            "zeroline": False,
        },
        "shapes": [
            {"type": "line", "line": {"color": INK, "width": 1.5, "dash": "dash"}} | even_line
        ],
    }
    return Figure([between_choices, dots, load], layout)


def _load_title(routing: Routing, even: float) -> dict:
    counts = routing.counts.tolist()
    tokens, top_k = routing.chosen.shape
    busiest, idlest = counts.index(max(counts)), counts.index(min(counts))
    finding = (
        f"Expert {busiest} gets {counts[busiest]} of {tokens} tokens, expert {idlest} gets "
        f"{counts[idlest]}; even would be {even:.3g}"
    )
    return {
        "text": finding
        if busiest != idlest
        else f"Every expert gets {even:.3g} of {tokens} tokens",
        "subtitle": {
            "text": f"each token goes to {top_k} of {routing.experts} experts; the area of a dot "
            "is the weight of the expert's answer"
        },
    }


def load_over_steps(loads: Mapping[str, Sequence[Sequence[float]]]) -> Figure:
    """Each expert's share of the choices while layers are trained, one panel for each training.

    `loads` has for each training a row a step, (steps, experts), which adds up to 1; some fifty of
    them are drawn. The title counts the experts that still get more than 1% over the last tenth of
    the steps.
    """
    figure = make_subplots(
        rows=1,
        cols=len(loads),
        shared_yaxes=True,
        subplot_titles=list(loads),
        horizontal_spacing=0.03,
    )
    alive = []
    for column, shares in enumerate(map(np.asarray, loads.values()), start=1):
        steps, experts = shares.shape
        alive.append(int((shares[-max(1, steps // 10) :].mean(axis=0) > 0.01).sum()))
        drawn = range(0, steps, max(1, steps // 50))
        for expert in range(experts):
            figure.add_scatter(
                x=list(drawn),
                y=100 * shares[drawn, expert],
                name=f"expert {expert}",
                legendgroup=f"expert {expert}",
                showlegend=column == 1,
                stackgroup="load",
                line={"color": COLORS[f"expert {expert % 16}"], "width": 0.5},
                fillcolor=COLORS[f"expert {expert % 16}"],
                hovertemplate="step %{x}: %{y:.1f}%",
                row=1,
                col=column,
            )
    said = ", ".join(map(str, alive[:-1])) + f" and {alive[-1]}" if alive[1:] else str(alive[0])
    figure.update_layout(
        template=TEMPLATE,
        height=450,
        margin={"t": 125, "b": 110},
        title={
            "text": f"Experts still in use at the end: {said} of {experts}",
            "subtitle": {"text": "in use: more than 1% of the choices over the last tenth"},
        },
    )
    figure.update_xaxes(title="step", showgrid=False)
    figure.update_yaxes(range=[0, 100], showgrid=False)
    figure.update_yaxes(title="share of the choices (%)", col=1)
    return figure


def parameter_tiles(name: str, ledger: Ledger) -> Figure:
    """A model's parameters as areas: what one token meets in full colour, idle experts pale.

    One tile for each expert (its matrices of all layers together) and for each other component;
    the `top_k` experts in colour stand for whichever are chosen. What is not an expert may be too
    small for a label and stands in the subtitle too.
    """
    one_expert = ledger.parameters["experts"] // ledger.experts
    others = [
        (component.replace("_", " "), size, COLORS[component])
        for component, size in sorted(ledger.parameters.items(), key=lambda item: -item[1])
        if component != "experts"
    ]
    tiles = [
        (f"expert {expert}", one_expert, COLORS["experts"] if expert < ledger.top_k else _IDLE)
        for expert in range(ledger.experts)
    ] + others
    labels, sizes, colors = zip(*tiles, strict=True)
    figure = Figure(
        layout={"template": TEMPLATE, "height": 450, "margin": {"t": 95, "b": 20, "l": 20}}
    )
    figure.add_treemap(
        labels=labels,
        parents=[""] * len(tiles),
        values=sizes,
        marker={"colors": colors, "line": {"color": "white", "width": 2}},
        text=[f"{size:,}" if size == one_expert else "" for size in sizes],
        textinfo="label+text",
        hovertemplate="%{label}: %{value:,} parameters, %{percentRoot:.4%}<extra></extra>",
        tiling={"pad": 1},
    )
    figure.update_layout(
        uniformtext={"minsize": 8, "mode": "hide"},
        title={
            "text": f"{name} keeps {ledger.total / 1e9:.1f} billion parameters and meets "
            f"{ledger.active / 1e9:.1f} billion for a token",
            "subtitle": {
                "text": f"the experts hold {100 * ledger.experts_share:.2f}%, "
                f"{ledger.experts - ledger.top_k} of {ledger.experts} of them idle (pale); "
                "the rest, lower right:<br>"
                + ", ".join(f"{label} {size:,}" for label, size, _ in others)
            },
        },
    )
    return figure


def family_shares(ledgers: Mapping[str, Ledger]) -> Figure:
    """Each component's share of the parameters, one bar a model, the most lopsided first."""
    ordered = sorted(ledgers.items(), key=lambda item: -item[1].experts_share)
    labels = [
        f"{name}<br>{ledger.total / 1e9:.1f} B, {ledger.active / 1e9:.1f} B active"
        for name, ledger in ordered
    ]
    figure = Figure(
        layout={"template": TEMPLATE, "barmode": "stack", "height": 190 + 48 * len(ledgers)}
    )
    present = {component for ledger in ledgers.values() for component in ledger.parameters}
    for component in sorted(present, key=lambda name: (name != "experts", COMPONENTS.index(name))):
        sizes = [ledger.parameters.get(component, 0) for _, ledger in ordered]
        shares = [
            100 * size / ledger.total for size, (_, ledger) in zip(sizes, ordered, strict=True)
        ]
        figure.add_bar(
            orientation="h",
            y=labels,
            x=shares,
            name=component.replace("_", " "),
            marker={"color": COLORS[component], "line": {"color": "white", "width": 0.5}},
            text=[f"{share:.1f}%" if component == "experts" else "" for share in shares],
            textposition="inside",
            insidetextanchor="middle",
            customdata=sizes,
            hovertemplate="%{customdata:,} parameters, %{x:.3f}%<extra>"
            + component.replace("_", " ")
            + "</extra>",
        )
    most, least = (ordered[place][1].experts_share for place in (0, -1))
    figure.update_layout(
        title=f"Experts hold {100 * least:.0f}% to {100 * most:.0f}% of the parameters",
        legend={"traceorder": "normal"},
    )
    figure.update_xaxes(title="share of all parameters (%)", range=[0, 100])
    figure.update_yaxes(autorange="reversed", ticks="", showgrid=False)
    return figure


def parameters_by_experts(grown: Sequence[Ledger], here: Ledger) -> Figure:
    """What is kept and what a token meets as the number of experts grows, and one point of it.

    `grown` are ledgers of one model with ever more experts and the same `top_k`; `here` is the one
    that the title speaks of. Bytes are those of 16-bit weights.
    """
    figure = Figure(layout={"template": TEMPLATE, "height": 430, "hovermode": "x"})
    for name, size, color in (
        ("kept", "total", COLORS["experts"]),
        ("met by a token", "active", COLORS["attention"]),
    ):
        figure.add_scatter(
            x=[ledger.experts for ledger in grown],
            y=[getattr(ledger, size) / 1e9 for ledger in grown],
            name=name,
            mode="lines+markers",
            line={"color": color, "width": 3, "dash": "solid" if size == "total" else "dash"},
            hovertemplate="%{y:.2f} B<extra>" + name + "</extra>",
        )
    figure.add_scatter(
        x=[here.experts] * 2,
        y=[here.total / 1e9, here.active / 1e9],
        mode="markers+text",
        marker={"color": INK, "size": 11},
        text=[f"{here.total / 1e9:.1f} B", f"{here.active / 1e9:.1f} B"],
        textposition=["top center", "bottom center"],
        showlegend=False,
        hoverinfo="skip",
    )
    figure.update_layout(
        title={
            "text": f"{here.experts} expert{'s' * (here.experts > 1)}, {here.top_k} for a token: "
            f"{here.total / 1e9:.1f} billion parameters kept, {here.active / 1e9:.1f} met",
            "subtitle": {
                "text": f"in 16 bits {2 * here.total / 1e9:,.1f} GB are stored, of which a token "
                f"reads {2 * here.active / 1e9:,.1f} GB: {100 * here.active / here.total:.0f}%"
            },
        }
    )
    experts = [ledger.experts for ledger in grown]
    smallest, largest = grown[0].active / 1e9, grown[-1].total / 1e9
    figure.update_xaxes(
        title="experts in each layer",
        type="log",
        tickvals=experts,
        range=[math.log10(experts[0] / 1.3), math.log10(experts[-1] * 1.3)],
    )
    figure.update_yaxes(
        title="parameters (billions)",
        type="log",
        dtick="D2",
        range=[math.log10(smallest / 2), math.log10(largest * 2)],
    )
    return figure
