"""Pictures of recipes hold their tables, and their titles follow them."""

import math

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from labutils.apps import redraw
from labutils.budget import Budget
from labutils.evaluate import Answer, Exam
from labutils.flips import compare
from labutils.moe import route
from labutils.recipe_figures import (
    additivity,
    allocations,
    damage_per_byte,
    front,
    mixture_view,
    unbeaten,
)
from labutils.recipes import Recipe
from labutils.shaker import Shaken
from labutils.style import COLORS, changeable

PAGES, TOKENS = 3, 6
MIB = 2**20
WHOLE = Budget(
    9 * MIB // 2, {"router": 8192, "experts": 8 * MIB, "attention": MIB - 9216, "norms": 1024}
)
NF4 = Budget(9 * MIB // 2, WHOLE.by_component | {"experts": 2 * MIB + 200_000})


def shaken(recipe: Recipe, kl: float = 0.0, right: tuple[bool, ...] = (True, True, False)):
    """One layer; under NF4 or less a third of the tokens flip."""
    before = torch.tensor([4.0, 3.0, 2.0, 1.0]).repeat(PAGES * TOKENS, 1)
    after = before.clone()
    if kl:
        after[::3] = torch.tensor([4.0, 2.0, 3.0, 1.0])
    answers = tuple(Answer("sum", page, 1, 2) for page in range(PAGES))
    nats = torch.ones(PAGES, TOKENS - 1, dtype=torch.float64)
    return Shaken(
        recipe,
        Exam(
            torch.zeros(PAGES, TOKENS, dtype=torch.long),
            np.full((PAGES, TOKENS), "sum", dtype=object),
            answers,
        ),
        (compare(route(before, 2), route(after, 2)),),
        torch.full((PAGES, TOKENS), kl),
        nats + kl,
        nats,
        np.array(right),
        np.array([True, True, False]),
    )


def tried(*rows: tuple[float, float, bool]) -> pd.DataFrame:
    table = pd.DataFrame(rows, columns=["mib", "kl", "answers_kept"])
    return table.assign(label=[f"recipe {row}" for row in range(len(rows))])


def view(budget=NF4, recipe=None, table=None, **found):
    recipe = recipe or Recipe()
    table = tried((9, 0, True), (2.2, 0.01, True)) if table is None else table
    return mixture_view(budget, WHOLE, recipe, shaken(recipe, **found), table)


def tried_traces(figure):
    names = ("line", "lost", "kept", "star", "now")
    return dict(zip(names, figure.data[-5:], strict=True))


def test_a_mixture_says_what_it_takes_and_what_it_costs():
    figure = view(kl=0.02, right=(True, False, True))
    assert figure.layout.title.text == (
        "3.19 of 9.00 MiB: KL 0.020 nats, 1 of 2 answers still right, 33.3% of tokens flip"
    )
    assert "<i>Simulated</i>" in figure.layout.title.subtitle.text
    assert "3 pages of 6 tokens" in figure.layout.title.subtitle.text
    in_16_bits, here, texts = figure.data[4:7]
    assert list(in_16_bits.x) == pytest.approx([8, 1 - 9 / 1024, 8 / 1024, 1 / 1024, 9])
    assert here.x[0] == pytest.approx(2 + 200_000 / MIB) and here.x[1:4] == in_16_bits.x[1:4]
    assert here.marker.color[:2] == (COLORS["nf4"], COLORS["bf16"])
    lines = [texts.text[start : start + 3] for start in range(0, 15, 3)]
    assert lines[0] == ("<b>experts</b>", "nf4, 4.38 bits", "2.19 of 8.00 MiB")
    assert lines[2] == ("<b>router</b>", "bf16, 16 bits", "8.00 of 8.00 KiB")
    assert lines[4] == ("<b>all</b>", "5.67 bits", "3.19 of 9.00 MiB")


def test_a_mixture_of_formats_in_one_component_is_called_mixed():
    recipe = Recipe(experts="int4", overrides={"layers.0.experts.1": "int2"})
    figure = view(recipe=recipe)
    _, here, texts = figure.data[4:7]
    assert texts.text[1].startswith("mixed, ")
    assert here.marker.pattern.shape[:2] == ("/", "")
    assert here.marker.color[0] == COLORS["int2"]


def test_the_best_of_what_was_tried_keeps_its_star():
    best, worse = (3.0, 0.01, True), (2.0, 0.5, False)
    shown = tried_traces(view(table=tried((9, 0, True), best, worse)))
    assert (list(shown["star"].x), list(shown["star"].y)) == ([3.0], [0.01])
    assert (list(shown["now"].x), list(shown["lost"].x)) == ([2.0], [2.0])
    assert sorted(shown["kept"].x) == [3, 9]
    assert list(shown["line"].x) == [2, 3, 9] and shown["line"].y[-1] == 1e-5
    assert "KL 0 nats" in shown["kept"].customdata[0], "the hover has what the axis cuts"
    assert tried_traces(view(table=tried(worse)))["star"].x == ()


def test_any_recipe_is_drawn_into_the_same_widget():
    shown = changeable(view())
    ranges = [axis.range for axis in (shown.layout.xaxis2, shown.layout.yaxis2)]
    for table in (tried((1, 0.5, False)), tried(*[(9, 0, True)] * 30, (0.5, 80, False))):
        figure = view(WHOLE, Recipe(experts="bf16"), table, kl=1.0, right=(False,) * 3)
        redraw(shown, figure)
        assert shown.layout.title.text.startswith("9.00 of 9.00 MiB: KL 1.0 nats, 0 of 2")
        assert [axis.range for axis in (figure.layout.xaxis2, figure.layout.yaxis2)] == ranges
        for trace in tried_traces(figure).values():
            assert all(1e-5 <= kl <= 10 for kl in trace.y)


recipes = st.lists(st.tuples(st.integers(1, 5), st.integers(0, 5)), min_size=1, max_size=12)


@given(recipes)
def test_the_front_is_that_of_brute_force(pairs):
    sizes, harms = zip(*pairs, strict=True)
    found = unbeaten(sizes, harms)
    beaten = {
        place
        for place, (size, harm) in enumerate(pairs)
        for other, (s, h) in enumerate(pairs)
        if s <= size and h <= harm and ((s, h) != (size, harm) or other < place)
    }
    assert set(found) == set(range(len(pairs))) - beaten
    assert [sizes[place] for place in found] == sorted(sizes[place] for place in found)


def many() -> pd.DataFrame:
    return pd.DataFrame(
        {
            "mib": [1.0, 2.0, 3.0, 3.5],
            "kl": [1.0, 0.1, 0.2, 0.0],
            "kl_low": [0.9, 0.05, 0.1, 0.0],
            "kl_high": [1.2, 0.15, 0.3, 0.0],
            "accuracy": [0.1, 0.8, 0.9, 0.9],
            "router_kept": [False, True, True, True],
            "label": ["a", "b", "c", "d"],
        }
    )


def test_the_front_counts_those_that_keep_the_router():
    figure = front(many())
    assert figure.layout.title.text == (
        "3 of 4 recipes are on the front of KL; 2 of these keep the router in 16 bits"
    )
    assert figure.layout.title.subtitle.text.startswith("of all 4, 3 keep it; <i>simulated</i>")
    fewer, kept, line, *answers = figure.data
    assert list(kept.x) == [2, 3, 3.5] and list(fewer.x) == [1]
    assert list(kept.marker.size) == [14, 11, 14], "those on the front are larger"
    assert list(line.x) == [1, 2, 3.5]
    assert list(line.error_y.array[:2]) == pytest.approx([0.2, 0.05])
    assert figure.layout.yaxis.ticktext[0].endswith("<br>or less"), "a KL of 0 is drawn there"
    assert list(answers[2].x) == [1, 2, 3] and list(answers[2].y) == pytest.approx([10, 80, 90])


def test_a_front_without_intervals_draws_none():
    figure = front(many().drop(columns=["kl_low", "kl_high"]))
    assert figure.data[2].error_y.array is None
    assert "intervals" not in figure.layout.title.subtitle.text


def published() -> pd.DataFrame:
    """arXiv:2312.17238, Table 1: GiB and perplexity, from 86.99 and 3.59 in 16 bits."""
    rows = [("experts", 4, 25.82, 3.67), ("experts", 3, 23.21, 3.96), ("experts", 2, 19.33, 4.52)]
    rows += [("attention", 4, 85.16, 3.68), ("attention", 2, 84.96, 4.98)]
    table = pd.DataFrame(rows, columns=["what", "bits", "gib", "perplexity"])
    return table.assign(rise=table.perplexity - 3.59, saved=86.99 - table.gib)


def test_damage_per_byte_names_both_ratios_at_the_fewest_bits():
    rows = [("experts", bits, rise, saved) for bits, rise, saved in ((2, 0.1, 8), (3, 0.01, 7))] + [
        ("attention", bits, rise, saved) for bits, rise, saved in ((2, 0.5, 0.4), (3, 0.02, 0.3))
    ]
    ours = pd.DataFrame(rows, columns=["what", "bits", "rise", "saved"])
    ours = ours.assign(rise_low=ours.rise / 2, rise_high=ours.rise * 2)
    figure = damage_per_byte(ours, published())
    assert figure.layout.title.text == (
        "At 2 bits a byte saved in attention costs 100 times one in the experts"
    )
    assert figure.layout.title.subtitle.text.endswith("published for Mixtral-8x7B: 50 times")
    attention, experts, ratio, theirs, *_ = figure.data
    assert list(experts.y) == pytest.approx([0.1 / 8, 0.01 / 7])
    assert list(attention.error_y.array) == pytest.approx([0.5 / 0.4, 0.02 / 0.3])
    assert theirs.error_y.array is None and list(theirs.x) == [2, 4]
    assert ratio.text[1].strip() == "100 times"
    assert ratio.y[0] == attention.y[0] and ratio.y[2] == experts.y[0]


def methods(exact: float = 1.0) -> pd.DataFrame:
    rows = [
        ("exact", 3.0, 9.0), ("exact", 3.5, exact), ("by use", 3.5, 2.0), ("random", 3.5, 4.0),
        ("uniform", 3.5, 3.0), ("uniform", 2.5, 30.0),
    ]  # fmt: skip
    table = pd.DataFrame(rows, columns=["method", "bits_per_weight", "kl"])
    return table.assign(kl_low=table.kl / 2, kl_high=2 * table.kl)


BITS, USE = np.array([[2, 4], [3, 3]]), np.array([[0.25, 0.75], [0.5, 0.5]])


def test_allocations_are_held_against_uniform_bits():
    figure = allocations(methods(), BITS, USE)
    assert figure.layout.title.text == (
        "Bits shared out exactly lose 33% of the KL of 3.50 bits for all"
    )
    bits, use = figure.data[-2:]
    assert bits.text.tolist() == [["2", "4"], ["3", "3"]]
    assert use.text.tolist() == [["25", "75"], ["50", "50"]]
    assert "lose 120% of" in allocations(methods(3.6), BITS, USE).layout.title.text


def test_an_interval_of_the_ratio_stands_in_the_title():
    table = methods().assign(ratio_low=0.25, ratio_high=1.1)
    assert "lose 33% [25%, 110%] of" in allocations(table, BITS, USE).layout.title.text


def test_each_width_has_the_colour_of_its_integers():
    (bits,) = allocations(methods(), BITS, USE).data[-2:-1]
    for width in range(2, 9):
        share = (width - bits.zmin) / (bits.zmax - bits.zmin)
        below = [color for place, color in bits.colorscale if place <= share]
        assert below[-1] == COLORS[f"int{width}"]


def test_additivity_names_the_largest_factor_either_way():
    table = pd.DataFrame(
        {
            "predicted": [0.01, 0.02, 0.001],
            "measured": [0.02, 0.02, 0.00025],
            "kind": ["exact", "exact", "uniform"],
        }
    )
    table = table.assign(measured_low=table.measured / 2, measured_high=2 * table.measured)
    figure = additivity(table)
    assert figure.layout.title.text == (
        "Sums of single costs are right within a factor 4, half of them within 2"
    )
    diagonal, exact, uniform = figure.data
    assert diagonal.x == diagonal.y
    assert list(exact.x) == [0.01, 0.02] and list(uniform.y) == [0.00025]
    assert math.isclose(exact.error_y.arrayminus[0], 0.01)
