"""Which expert gets how many bits: the best choice under a budget of bytes, found exactly.

Not all experts are worth the same bits. If it is known what each costs in each format, by itself,
and costs add up, the best mixture is a *multiple-choice knapsack*: choose one format for each
expert, so that the bytes stay within the budget and the sum of the costs is the least there is.
With x[e, f] = 1 if expert e is stored in format f:

    minimise    sum over e, f of cost[e, f] x[e, f]
    subject to  sum over f of x[e, f] = 1                        for each e
                sum over e, f of bytes[e, f] x[e, f] <= budget

It is solved to the end by HiGHS (Huangfu and Hall 2018), the solver of mixed-integer programs that
comes with SciPy. That costs add up is an assumption: each expert is measured alone, and together
they meet each other's errors. Measure what comes out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

TIME_LIMIT_S = 60.0
COLUMNS = ("path", "format", "bytes", "cost")
_OUT_OF_TIME = 1  # a status of scipy.optimize.milp


@dataclass(frozen=True)
class Allocation:
    """A format for each path, the bytes that they take, and the sum of their costs.

    `formats` are overrides as a `Recipe` takes them.
    """

    formats: Mapping[str, str]
    stored_bytes: int
    cost: float


def allocate(options: pd.DataFrame, budget_bytes: int) -> Allocation:
    """The cheapest choice of one format for each path that takes at most `budget_bytes`.

    `options` has a row for each path and format it may have: path, format, bytes, cost. Costs may
    be of any unit and sign, as long as they can be added up.

    With two experts that lose 9 and 3 in int2 (2 bytes), and 1 each in int4 (4 bytes):

    >>> allocate(options, budget_bytes=6).formats
    {'a': 'int4', 'b': 'int2'}

    That takes milliseconds where there are few sizes, such as those of three formats for experts
    of one shape. Where sizes differ by a few bytes over thousands of paths it may take longer than
    anyone waits: it is given up after 60 seconds.

    Raises ValueError for a path and format that occur twice, for costs that are not finite, for
    bytes that are not whole and positive, for a budget that is not finite, and if even the smallest
    formats take more than the budget; TimeoutError after those 60 seconds.
    """
    _check(options, budget_bytes)
    paths, which = np.unique(options.path, return_inverse=True)
    rows = np.arange(len(options))
    one_each = csr_array((np.ones(len(options)), (which, rows)), shape=(len(paths), len(options)))
    sizes = options.bytes.to_numpy(dtype=int)
    unit = int(np.gcd.reduce(sizes))  # small whole numbers are exact in the solver's arithmetic
    solved = milp(
        options.cost.to_numpy(dtype=float) / _unit(options.cost),
        integrality=np.ones(len(options)),
        bounds=Bounds(0, 1),
        constraints=[
            LinearConstraint(one_each, 1, 1),
            LinearConstraint(sizes[None] // unit, ub=budget_bytes // unit),
        ],
        options={"mip_rel_gap": 0, "time_limit": TIME_LIMIT_S},
    )
    if solved.status == _OUT_OF_TIME:
        raise TimeoutError(
            f"The best of {len(options):,} options was not found in {TIME_LIMIT_S:g} s: many sizes "
            "that differ by little are hard. Round the bytes up to multiples of a larger number, "
            "or offer fewer formats."
        )
    if not solved.success:
        raise RuntimeError(f"HiGHS found no allocation: {solved.message}")
    chosen = options[solved.x > 0.5]
    formats = dict(zip(chosen.path, chosen.format, strict=True))
    return Allocation(formats, int(chosen.bytes.sum()), float(chosen.cost.sum()))


def _unit(costs: pd.Series) -> float:
    """What costs are divided by: a solver's tolerances are absolute."""
    return float(costs.abs().max()) or 1.0


def _whole(sizes: pd.Series) -> pd.Series:
    """Whether each is a whole number above zero."""
    numbers = pd.to_numeric(sizes, errors="coerce")
    return np.isfinite(numbers) & (numbers > 0) & (numbers % 1 == 0)


def _check(options: pd.DataFrame, budget_bytes: int) -> None:
    if missing := [column for column in COLUMNS if column not in options]:
        raise ValueError(f"The options have no column {', '.join(missing)}.")
    if options.empty:
        raise ValueError("There are no options to choose from.")
    twice = options[options.duplicated(["path", "format"])]
    if len(twice):
        path, format = twice.iloc[0][["path", "format"]]
        raise ValueError(f"{path} in {format} occurs twice; give one cost for it.")
    if not np.isfinite(options.cost).all():
        worst = options[~np.isfinite(options.cost)].iloc[0]
        raise ValueError(f"The cost of {worst.path} in {worst.format} is {worst.cost}.")
    if not (whole := _whole(options.bytes)).all():
        worst = options[~whole].iloc[0]
        raise ValueError(
            f"The bytes of {worst.path} in {worst.format} are {worst.bytes}; they are to be a "
            "whole number above zero."
        )
    if not np.isfinite(budget_bytes):
        raise ValueError(f"The budget is {budget_bytes} bytes; it is to be a finite number.")
    least = int(options.groupby("path").bytes.min().sum())
    if least > budget_bytes:
        raise ValueError(
            f"The smallest formats take {least:,} bytes, {least - budget_bytes:,} more than the "
            f"budget of {budget_bytes:,}; allow more, or offer smaller formats."
        )
