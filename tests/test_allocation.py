"""The allocation is the best there is: brute force agrees wherever it can."""

import itertools

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from labutils import allocation
from labutils.allocation import allocate

FORMATS = ("int2", "int3", "int4", "int8")


def table(rows) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=["path", "format", "bytes", "cost"])


def test_the_dearer_expert_gets_the_bits():
    options = table(
        [("a", "int2", 2, 9.0), ("a", "int4", 4, 1.0), ("b", "int2", 2, 3.0), ("b", "int4", 4, 1.0)]
    )
    best = allocate(options, 6)
    assert best.formats == {"a": "int4", "b": "int2"}
    assert (best.stored_bytes, best.cost) == (6, 4.0)
    assert allocate(options, 7) == best, "a byte that buys nothing changes nothing"
    assert allocate(options, 8).formats == {"a": "int4", "b": "int4"}
    assert allocate(options, 4).formats == {"a": "int2", "b": "int2"}


def brute_force(options: pd.DataFrame, budget_bytes: int) -> float:
    """The least cost of all combinations that fit."""
    menus = [list(rows.itertuples()) for _, rows in options.groupby("path")]
    return min(
        sum(row.cost for row in choice)
        for choice in itertools.product(*menus)
        if sum(row.bytes for row in choice) <= budget_bytes
    )


@st.composite
def problems(draw) -> tuple[pd.DataFrame, int]:
    """Up to six paths with up to four formats each, of any sizes and costs, and a budget."""
    scale = draw(st.sampled_from([1e-6, 1.0, 1e4]))
    rows = [
        (f"layers.0.experts.{index}", format, draw(st.integers(1, 10**4)), scale * cost)
        for index in range(draw(st.integers(1, 6)))
        for format in draw(st.lists(st.sampled_from(FORMATS), min_size=1, unique=True))
        for cost in [draw(st.floats(-1, 1))]
    ]
    options = table(rows)
    sizes = options.groupby("path").bytes
    return options, draw(st.integers(int(sizes.min().sum()), int(sizes.max().sum()) + 1))


@given(problems())
def test_brute_force_finds_nothing_cheaper(problem):
    options, budget_bytes = problem
    found = allocate(options, budget_bytes)
    chosen = options.set_index(["path", "format"]).loc[list(found.formats.items())]
    assert set(found.formats) == set(options.path)
    assert chosen.bytes.sum() == found.stored_bytes <= budget_bytes
    assert chosen.cost.sum() == pytest.approx(found.cost)
    least = brute_force(options, budget_bytes)
    assert found.cost == pytest.approx(least, rel=1e-6, abs=1e-6 * options.cost.abs().max())


def test_many_experts_are_no_trouble():
    """Qwen3's 6,144 experts, as many sizes of damage, and a budget of three bits for each."""
    options = table(
        [
            (f"layers.{index // 128}.experts.{index % 128}", f"int{bits}", bits, cost * 4.0**-bits)
            for index in range(48 * 128)
            for bits in (2, 3, 4)
            for cost in [1 + index % 97]
        ]
    )
    best = allocate(options, 3 * 48 * 128)
    uniform = options[options.format == "int3"].cost.sum()
    assert best.stored_bytes <= 3 * 48 * 128 and best.cost < 0.9 * uniform
    bits = {path: int(format[3:]) for path, format in best.formats.items()}
    assert bits["layers.0.experts.0"] < bits["layers.0.experts.96"]


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([("a", "int2", 5, 0.0), ("b", "int2", 6, 0.0)], "take 11 bytes, 1 more than the budget"),
        ([("a", "int2", 5, 0.0), ("a", "int2", 4, 0.0)], "a in int2 occurs twice"),
        ([("a", "int2", 5, float("nan"))], "The cost of a in int2 is nan"),
        ([("a", "int2", float("nan"), 0.0)], "The bytes of a in int2 are nan; .* whole number"),
        ([("a", "int2", 5, 0.0), ("b", "nf4", 0, 0.0)], "The bytes of b in nf4 are 0"),
        ([("a", "int2", -5, 0.0)], "The bytes of a in int2 are -5"),
        ([("a", "int2", 2.5, 0.0)], r"The bytes of a in int2 are 2\.5"),
        ([("a", "int2", float("inf"), 0.0)], "The bytes of a in int2 are inf"),
        ([("a", "int2", "many", 0.0)], "The bytes of a in int2 are many"),
        ([], "no options"),
    ],
)
def test_what_cannot_be_allocated_is_refused(rows, said):
    with pytest.raises(ValueError, match=said):
        allocate(table(rows), 10)


@pytest.mark.parametrize("budget", [float("nan"), float("inf"), -float("inf")])
def test_a_budget_is_a_finite_number(budget):
    with pytest.raises(ValueError, match=rf"The budget is {budget} bytes"):
        allocate(table([("a", "int2", 5, 0.0)]), budget)


def test_what_takes_too_long_is_given_up(monkeypatch):
    monkeypatch.setattr(allocation, "TIME_LIMIT_S", 0.0)
    rows = [
        (f"layers.0.experts.{index}", f"int{bits}", 10**6 * bits + index**2 % 101, 1 / bits)
        for index in range(300)
        for bits in (2, 3, 4, 8)
    ]
    with pytest.raises(TimeoutError, match=r"best of 1,200 options was not found in 0 s"):
        allocate(table(rows), 900_005_000)


def test_a_missing_column_is_named():
    with pytest.raises(ValueError, match="no column cost"):
        allocate(table([("a", "int2", 1, 0.0)]).drop(columns="cost"), 10)
