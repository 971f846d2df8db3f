"""Pictures of savings and costs hold their records, and their titles are the finding."""

import math

import numpy as np
import pandas as pd
import pytest
import torch

from labutils import cost_figures
from labutils.budget import Budget
from labutils.damage import Damage
from labutils.meter import MIB
from labutils.recipes import Recipe
from labutils.style import COLORS


def damage_of(nats: float, right: float = 1.0, error: float = 0.0, bits: float = 4.5) -> Damage:
    accuracy = pd.Series({"sum": right, "sort": 1.0, "count": 0.5})
    return Damage(bits, nats, accuracy, np.full((2, 4), error))


WHOLE = damage_of(0.5, bits=32)


def texts(figure) -> str:
    return " ".join(note.text for note in figure.layout.annotations)


def test_footprint_is_cut_into_codes_and_constants():
    figure = cost_figures.expert_footprint({"bf16": 32 * MIB, "nf4": 9 * MIB}, 16 * MIB)
    codes, constants = figure.data
    assert list(codes.x) == [32, 8] and list(constants.x) == [0, 1]
    assert list(codes.marker.color) == [COLORS["bf16"], COLORS["nf4"]]
    assert "3.56 times smaller, not 4" in figure.layout.title.text
    assert "4.500 bits" in figure.layout.title.subtitle.text


@pytest.mark.parametrize(("double_quant", "maxima"), [(True, "8 bits"), (False, "fp32")])
def test_flow_says_what_is_stored_in_what(double_quant, maxima):
    budget = Budget(10, {"router": 2 * MIB, "experts": 64 * MIB})
    figure = cost_figures.precision_flow(budget, Recipe(double_quant=double_quant), layers=2)
    assert "33 MiB only 1.00 MiB are the router" in figure.layout.title.text
    assert f"block maxima<br><b>{maxima}</b>" in texts(figure)
    assert "32 MiB<br><b>nf4</b>" in texts(figure)


def test_error_bars_are_the_errors():
    errors = pd.DataFrame({"nf4": [0.1, 0.2], "int8": [0.01, 0.01]})
    figure = cost_figures.expert_error_bars(errors)
    assert [list(bar.y) for bar in figure.data] == [[10, 20], [1, 1]]
    assert "15% in nf4 and 1% in int8" in figure.layout.title.text
    assert "factor 2.00" in figure.layout.title.subtitle.text


def sweep_of(**rises: tuple[float, ...]) -> dict:
    return {
        target: {bits: damage_of(0.5 + rise) for bits, rise in enumerate(by_bits, start=2)}
        for target, by_bits in rises.items()
    }


@pytest.mark.parametrize(
    ("experts", "attention", "said"),
    [
        (
            (0.1, 0.002, 0.0),
            (1.0, 0.0, 0.0),
            "2-bit attention costs 10 times the loss of 2-bit experts",
        ),
        (
            (0.6, 0.002, 0.0),
            (0.2, 0.0, 0.0),
            "2-bit experts costs 3 times the loss of 2-bit attention",
        ),
    ],
)
def test_loss_curves_name_what_suffers_and_until_when(experts, attention, said):
    sweep = sweep_of(experts=experts, attention=attention)
    figure = cost_figures.loss_by_bits(sweep, WHOLE)
    assert said in figure.layout.title.text
    assert "from 4 bits on neither costs" in figure.layout.title.subtitle.text
    assert [line.name for line in figure.data] == ["experts", "attention"]
    np.testing.assert_allclose(figure.data[0].customdata, experts, atol=1e-9)
    assert min(figure.data[1].y) == pytest.approx(1e-4), "noise is drawn at the lower edge"


def test_damage_is_held_against_the_undisturbed():
    figure = cost_figures.damage_view(damage_of(0.625, right=0.25, error=0.1), WHOLE, "Experts")
    before, after, errors = figure.data
    assert list(before.x) == [100, 100, 50] and list(after.x) == [25, 100, 50]
    assert errors.z.shape == (2, 4) and errors.z[0][0] == 10
    assert (
        figure.layout.title.text
        == "Experts: 1 of 2 mastered languages still are; loss +0.1250 nats"
    )
    assert "4.50 bits" in figure.layout.title.subtitle.text


def test_columns_are_counted_above_the_threshold():
    maxima = {"layer 0": torch.tensor([1.0, 7.0, 2.0]), "layer 1": torch.tensor([9.0, 8.0, 0.5])}
    figure = cost_figures.column_maxima(maxima, threshold=6.0)
    assert figure.layout.title.text == (
        "In layer 1, 2 of 3 columns reach 6; in the others at most 1"
    )
    assert list(figure.data[0].y) == [7, 2, 1]
    assert list(figure.data[-1].y) == [6, 6]


@pytest.mark.parametrize(
    ("threshold", "said"),
    [
        (6.0, "10.0% of the columns in 16 bits: an error of 1.00%, 0.25"),
        (math.inf, "Plain INT8, no column"),
    ],
)
def test_threshold_marks_where_it_stands(threshold, said):
    trials = pd.DataFrame(
        {"threshold": [6.0, math.inf], "in_16_bits": [0.1, 0.0], "error": [0.01, 0.04]}
    )
    figure = cost_figures.threshold_view(trials, threshold)
    assert figure.layout.title.text.startswith(said)
    assert list(figure.data[0].x) == ["6", "none"] and list(figure.data[0].y) == [1, 4]
    sizes = list(figure.data[0].marker.size)
    assert sizes.index(max(sizes)) == (0 if threshold == 6.0 else 1)


def test_times_are_per_token_and_held_against_the_first_format():
    times = pd.DataFrame({"bf16": [0.02, 0.1], "nf4": [0.01, 0.4]}, index=[1, 100])
    figure = cost_figures.product_times(times)
    assert "2.0x nf4 at 1 token, 0.2x nf4 at 100" in figure.layout.title.text
    np.testing.assert_allclose(figure.data[1].y, [10, 4])
