"""Pictures of bytes hold their records, and their titles are the finding."""

import pytest

from labutils.anatomy import Part
from labutils.budget import Budget
from labutils.checkpoints import Coverage, StoredWeight
from labutils.figures import (
    budget_bars,
    cache_growth,
    coverage_bars,
)
from labutils.meter import MIB
from labutils.style import COLORS

GIB = 2**30


def coverage_of(format: str, bits: int) -> Coverage:
    """Sixteen experts' weights stored in so many bits, and eight of attention in 16."""
    return Coverage(
        (
            StoredWeight(Part("experts", 0, 0, "up_proj"), (16, MIB), format, bits * 2 * MIB),
            StoredWeight(Part("attention", 0), (8, MIB), "bf16", 16 * MIB),
        )
    )


def test_coverage_bars_are_as_long_as_the_stored_bytes():
    figure = coverage_bars({"usual": coverage_of("bf16", 16), "ours": coverage_of("nf4", 4)})
    lengths = {(bar.y[0], bar.name): bar.x[0] for bar in figure.data}
    assert lengths[("ours", "nf4")] == 8
    assert lengths[("usual", "bf16")] == 32
    assert figure.layout.title.text == "Experts: 16.00 bits per weight usual, 4.00 ours"
    assert {bar.marker.color for bar in figure.data} == {COLORS["bf16"], COLORS["nf4"]}


@pytest.mark.parametrize(
    ("room", "title"),
    [
        (1, "None of these 2 fits a card"),
        (5, "Of these 2, small fit a card"),
        (50, "All 2 of these fit a card"),
    ],
)
def test_the_title_of_a_budget_says_what_fits(room, title):
    budgets = {
        "large": Budget(1, {"experts": 10 * GIB}),
        "small": Budget(1, {"experts": 2 * GIB, "kv_cache": GIB}),
    }
    figure = budget_bars(budgets, {"a card": room * GIB})
    assert figure.layout.title.text == title
    assert [bar.x for bar in figure.data] == [(10.0, 2.0), (0.0, 1.0)]


def test_the_cache_grows_until_the_room_is_full():
    figure = cache_growth(2 * GIB, 2**20, 4096, {"a 3 GiB card": 3 * GIB, "a 1 GiB card": GIB})
    said = "a 3 GiB card is full after 1,024 tokens; the weights alone do not fit a 1 GiB card"
    assert figure.layout.title.text == said
    weights, cache, *_ = figure.data
    assert set(weights.y) == {2.0}
    assert cache.y[-1] == 4.0
