"""Pictures of rounding hold their records, and their titles are the finding."""

import re

import pandas as pd
import pytest
import torch

from labutils.calibrated import Rounder, Statistics, expert_statistics, round_expert
from labutils.moe import MoELayer
from labutils.rounding_figures import (
    calibration_view,
    damping_curves,
    error_by_tokens,
    methods_compared,
    own_or_all,
    pushed_errors,
    two_weights,
)
from labutils.style import COLORS


def test_two_weights_end_where_the_outputs_mind_least():
    """Inputs that are equal: only the sum of the weights matters, 0.8 is 0.13 from 0.67."""
    seen = Statistics.of(torch.ones(10, 2) + 1e-3 * torch.eye(10, 2))
    weight = torch.tensor([0.48, 0.48])
    path = torch.stack([weight, torch.tensor([1 / 3, 0.48]), torch.tensor([1 / 3, 2 / 3])])
    figure = two_weights(seen, weight, torch.arange(-1, 4) / 3, path)
    assert figure.layout.title.text == "The farther point costs the outputs 86% less"
    plain, mine = figure.data[-2:]
    assert (plain.x[-1], plain.y[-1]) == pytest.approx((1 / 3, 1 / 3))
    assert (mine.x[-1], mine.y[-1]) == pytest.approx((1 / 3, 2 / 3))
    assert figure.data[0].z.min() == pytest.approx(0, abs=0.05)


def test_pushed_errors_are_measured_right_of_the_line():
    late = torch.zeros(4, 8)
    late[:, 4:] = 0.25
    figure = pushed_errors({2: 0 * late, 4: late, 8: torch.ones(4, 8)})
    assert figure.layout.title.text.endswith("move by 0.000 at first and 0.250 later")
    assert [panel.z[0][-1] for panel in figure.data] == [0, 0.25, 1]
    assert [line.x0 for line in figure.layout.shapes] == [1.5, 3.5]


def test_the_worst_growth_and_the_best_damping_are_named():
    rows = [("int2", 0.01, 1.4, 6.0), ("int2", 0.1, 0.5, 1.5), ("int4", 0.01, 0.4, 1.0)]
    columns = ["format", "damping", "ratio", "growth"]
    figure = damping_curves(pd.DataFrame(rows, columns=columns))
    assert figure.layout.title.text.endswith("the last blocks of int2 become 6.0 times as large")
    assert "best damping for int2: 0.1, with 50% less error" in figure.layout.title.subtitle.text
    assert [list(line.y) for line in figure.data[:2]] == [[1.4, 0.5], [6.0, 1.5]]


def test_methods_are_compared_by_the_best_of_each_format():
    columns = ["format", "method", "damping", "bits_per_weight", "output_error", "kl"]
    rows = [
        ("int2", "rtn", float("nan"), 2.5, 0.4, 0.2),
        ("int2", "gptq", 0.01, 2.5, 0.3, 0.25),
        ("int2", "gptq", 0.1, 2.5, 0.2, 0.05),
        ("int3", "rtn", float("nan"), 3.5, 0.1, 0.02),
        ("int3", "awq", float("nan"), 3.53, 0.1, 0.01),
    ]
    table = pd.DataFrame(rows, columns=columns)
    figure = methods_compared(table.assign(kl_low=table.kl * 0.9, kl_high=table.kl * 1.2))
    assert figure.layout.title.text.endswith("a factor of 4.0 at int2, 2.0 at int3")
    assert "simulated" in figure.layout.title.subtitle.text
    assert [bar.name for bar in figure.data[::2]] == [
        "RTN",
        "GPTQ, damping 0.01",
        "GPTQ, damping 0.1",
        "AWQ",
    ]
    awq = figure.data[-1]
    assert list(awq.x) == ["int3<br>3.50 bits"] and list(awq.y) == [0.01]
    assert awq.error_y.array[0] == pytest.approx(0.002)


def test_the_largest_number_of_tokens_that_did_harm_is_named():
    rows = [(0, "up_proj", 5, 1.5), (1, "up_proj", 40, 1.01), (2, "down_proj", 300, 0.6)]
    table = pd.DataFrame(rows, columns=["expert", "projection", "tokens", "ratio"])
    figure = error_by_tokens(table)
    assert figure.layout.title.text == "Up to 40 tokens, calibrating an expert can do harm"
    assert list(figure.data[1].x) == [5, 40]
    assert list(figure.data[1].marker.color) == [COLORS["expert 0"], COLORS["expert 1"]]
    figure = error_by_tokens(table[table.ratio < 1])
    assert figure.layout.title.text == "Calibrating helps every expert here"


def test_where_own_tokens_take_over_is_named():
    rows = [(64, "its own", 1.0), (64, "all", 0.9), (1024, "its own", 0.5), (1024, "all", 0.6)]
    table = pd.DataFrame(rows, columns=["drawn", "whose", "ratio"])
    assert (
        own_or_all(table).layout.title.text
        == "Up to 64 tokens for all experts, those of others help"
    )
    own = own_or_all(table[table.drawn > 64])
    assert own.layout.title.text == "An expert's own tokens are better at every number"
    assert [line.name for line in own.data] == [
        "each expert on its own tokens",
        "each expert on all tokens",
    ]


@pytest.mark.parametrize(
    ("method", "tokens", "title"),
    [
        ("gptq", 500, r"GPTQ on 500 tokens of expert 0: \d+% less error than plain rounding"),
        ("awq", 0, "Expert 0 got no token and is rounded plainly"),
    ],
)
def test_a_calibrated_expert_is_held_against_plain_rounding(method, tokens, title):
    layer, generator = MoELayer(64, 128, 1, 1), torch.Generator().manual_seed(0)
    x = torch.randn(1000, 16, generator=generator) @ torch.randn(16, 64, generator=generator)
    seen, judged = (expert_statistics(layer, part)[0] for part in (x[:tokens], x[500:]))
    plain, calibrated = (
        round_expert(layer.experts[0], Rounder(name, "int3"), seen, judged)
        for name in ("rtn", method)
    )
    figure = calibration_view(plain, calibrated)
    assert re.fullmatch(title, figure.layout.title.text)
    assert "int3, 3.50 bits per weight; simulated" in figure.layout.title.subtitle.text
    assert list(figure.data[0].x) == ["gate_proj", "up_proj", "down_proj"]
    assert list(figure.data[2].y) == [matrix.held_out_error for matrix in calibrated]
