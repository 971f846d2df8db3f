"""Pictures of a layer hold their records, and their titles are the finding."""

import pandas as pd
import pytest
import torch
from families import FAMILIES

from labutils.layer_figures import (
    expert_use_map,
    family_shares,
    load_over_steps,
    parameter_tiles,
    parameters_by_experts,
    routing_map,
)
from labutils.ledger import Ledger, ledger_of
from labutils.moe import route
from labutils.style import COLORS


def test_the_map_of_experts_names_the_pair_that_stands_out():
    rows = pd.MultiIndex.from_product([[0, 1], ["sum", "sort"]], names=["layer", "language"])
    use = pd.DataFrame([[0.5, 0.5], [0.4, 0.6], [0.1, 0.9], [0.5, 0.5]], index=rows)
    figure = expert_use_map(use)
    assert "In layer 1, expert 1 gets 90% of the choices of \u201csum\u201d" in (
        figure.layout.title.text
    )
    assert [panel.z[0][1] for panel in figure.data] == [50, 90]


def test_a_dot_for_each_choice_and_a_bar_for_each_load():
    routing = route(torch.tensor([[2.0, 1.0, 0.0], [2.0, 0.0, 1.0], [2.0, 1.0, 0.0]]), top_k=2)
    lines, dots, load = routing_map(["a", " ", "<s>"], routing).data
    assert list(zip(dots.x, dots.y, strict=True)) == [
        (0, 0),
        (0, 1),
        (1, 0),
        (1, 2),
        (2, 0),
        (2, 1),
    ]
    assert list(load.x) == [3, 2, 1]
    areas = [size**2 for size in dots.marker.size]
    assert areas[0] / (areas[0] + areas[1]) == pytest.approx(routing.weights[0, 0].item())
    assert dots.marker.color[:2] == (COLORS["expert 0"], COLORS["expert 1"])
    assert list(lines.y) == [0, 1, None, 0, 2, None, 0, 1, None]


def test_the_routing_map_names_the_busiest_and_the_idlest_expert():
    routing = route(torch.tensor([[2.0, 1.0, 0.0], [2.0, 0.0, 1.0], [2.0, 1.0, 0.0]]), top_k=2)
    layout = routing_map(["a", " ", "<s>"], routing).layout
    assert layout.title.text == "Expert 0 gets 3 of 3 tokens, expert 2 gets 1; even would be 2"
    assert layout.xaxis.ticktext == ("a", "\u2423", "&lt;s&gt;"), "every token can be seen"
    assert layout.shapes[0].x0 == 2


def test_loads_add_up_and_the_title_counts_who_is_left():
    collapsed = [[0.5, 0.3, 0.2]] * 18 + [[1.0, 0.0, 0.0]] * 2
    figure = load_over_steps({"without": collapsed, "with": [[0.4, 0.3, 0.3]] * 20})
    assert figure.layout.title.text == "Experts still in use at the end: 1 and 3 of 3"
    assert len(figure.data) == 6 and figure.data[0].y[-1] == 100
    assert sum(band.y[0] for band in figure.data[:3]) == pytest.approx(100)
    assert [note.text for note in figure.layout.annotations] == ["without", "with"]


def test_long_trainings_are_thinned_and_keep_their_steps():
    rows = [[step / 1000, 1 - step / 1000] for step in range(1000)]
    band = load_over_steps({"rising": rows}).data[0]
    assert len(band.x) == len(band.y) == 50
    assert band.x[7] == 140 and band.y[7] == pytest.approx(14.0)


def small_ledger(name: str = "mixtral") -> Ledger:
    return ledger_of(FAMILIES[name])


def test_tiles_are_all_parameters_and_as_many_experts_in_colour_as_are_chosen():
    ledger = small_ledger()
    (tiles,) = parameter_tiles("small", ledger).data
    assert sum(tiles.values) == ledger.total
    assert tiles.marker.colors.count(COLORS["experts"]) == ledger.top_k
    assert len(tiles.labels) == ledger.experts + len(ledger.parameters) - 1
    assert f"{ledger.parameters['router']:,}" in (
        parameter_tiles("small", ledger).layout.title.subtitle.text
    )


def test_shares_of_a_family_add_up_and_are_ordered():
    ledgers = {name: small_ledger(name) for name in FAMILIES}
    figure = family_shares(ledgers)
    for row in range(len(ledgers)):
        assert sum(bar.x[row] for bar in figure.data) == pytest.approx(100)
    experts = figure.data[0]
    assert experts.name == "experts" and list(experts.x) == sorted(experts.x, reverse=True)
    least, most = round(min(experts.x)), round(max(experts.x))
    assert figure.layout.title.text == f"Experts hold {least}% to {most}% of the parameters"


def test_more_experts_keep_more_and_cost_a_token_only_the_router():
    ledger = small_ledger()
    grown = [ledger.with_experts(number, 2) for number in (2, 4, 8)]
    kept, met, here = parameters_by_experts(grown, grown[1]).data
    assert kept.y[0] == met.y[0] == grown[0].total / 1e9, "all are chosen"
    router = [ledger.parameters["router"] / 1e9 for ledger in grown]
    assert met.y[-1] - met.y[0] == pytest.approx(router[-1] - router[0])
    assert kept.y[-1] == grown[-1].total / 1e9
    assert list(here.y) == [kept.y[1], met.y[1]]
