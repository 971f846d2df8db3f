"""Pictures of formats hold their records, and their titles are the finding."""

import pandas as pd
import pytest
import torch

from labutils.codebooks import CODEBOOKS
from labutils.format_figures import (
    bits_against_error,
    code_use,
    level_rulers,
    normal_levels,
    outlier_damage,
    rounding_chart,
)
from labutils.formats import Rounding, quantize
from labutils.style import COLORS


def test_the_damage_of_an_outlier_is_counted_in_its_title():
    damage = {"one scale": torch.ones(2, 8), "blocks": torch.zeros(2, 8)}
    damage["blocks"][1, :4] = 0.5
    figure = outlier_damage(damage)
    assert figure.layout.title.text == "One outlier among 16 weights costs the others 100% or 25%"
    assert [panel.z.sum() for panel in figure.data] == [1600, 200]
    assert [note.text for note in figure.layout.annotations] == [
        "one scale: 100% lost",
        "blocks: 25% lost",
    ]


def test_normal_levels_shade_the_parts_between_them():
    figure = normal_levels([-1.5, -0.5, 0.0, 0.6, 1.5])
    *parts, _, levels = figure.data
    assert len(parts) == 4
    shares = [float(part.text.split("%")[0]) for part in parts]
    assert shares == pytest.approx([24.17, 19.15, 22.57, 20.74])
    assert levels.customdata.tolist() == [-1, *[x / 1.5 for x in (-0.5, 0, 0.6)], 1]
    assert "lie 21.7% of a normal distribution below zero, 21.7% above" in figure.layout.title.text


def test_rulers_stretch_every_codebook_to_one():
    figure = level_rulers({"INT4": CODEBOOKS["int4"], "FP4": CODEBOOKS["fp4"]})
    for ruler in figure.data:
        assert (ruler.x.min(), ruler.x.max()) == (-1, 1)
    assert "0.14 at most in INT4, of 0.33 in FP4" in figure.layout.title.text
    assert [ruler.marker.line.color for ruler in figure.data] == [COLORS["int4"], COLORS["fp4"]]


@pytest.mark.parametrize(
    ("format", "settings", "title"),
    [
        ("nf4", {}, "NF4, blocks of 64: 4.500 bits per weight"),
        ("nf4", {"double_quant": True}, "NF4, double quantization, blocks of 64: 4.133 bits"),
        ("int3", {"asymmetric": True}, "INT3 from minimum to maximum, blocks of 64: 4.000 bits"),
        ("fp8_e4m3", {"block_size": "tensor"}, "FP8 E4M3, one block: 8.004 bits"),
        ("mxfp4", {}, "MXFP4, blocks of 32: 4.250 bits"),
    ],
)
def test_a_rounding_is_drawn_with_all_its_weights_levels_and_bits(format, settings, title):
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    rounding = Rounding(weight, quantize(weight, format, **settings))
    figure = rounding_chart(rounding, "64 x 128")
    weights, levels, errors, codes, scales = figure.data
    assert figure.layout.title.text.startswith(title)
    assert f"error {100 * rounding.relative_error:.2g}%" in figure.layout.title.text
    assert f"16,384 bytes in 16 bits, {rounding.quantized.stored_bytes:,} here" in (
        figure.layout.title.subtitle.text
    )
    assert sum(weights.y) == pytest.approx(100) and sum(errors.y) == pytest.approx(100)
    assert levels.x[::3] == pytest.approx(rounding.levels.numpy())
    assert codes.x[0] + scales.x[0] == rounding.quantized.bits_per_weight


def test_a_rounding_without_error_is_drawn_too():
    weight = torch.ones(2, 64)
    figure = rounding_chart(Rounding(weight, quantize(weight, "int4")), "ones")
    assert "error 0%" in figure.layout.title.text


def test_use_of_codes_is_compared_with_even_use():
    figure = code_use({"normal": [25, 50, 20, 5], "other": [25, 25, 25, 25]}, [-1, 0, 0.5, 1])
    assert figure.layout.title.text == (
        "NF4 uses its busiest level 1 to 10 times as often as its rarest"
    )
    assert figure.layout.annotations[0].text == "even use: 25.00%"


def test_the_best_within_a_budget_is_named_for_each_kind_of_weights():
    columns = ["weights", "series", "format", "block", "bits", "error"]
    rows = [
        ("normal", "NF4", "nf4", 64, 4.5, 0.09),
        ("normal", "NF4", "nf4", 32, 5.0, 0.08),
        ("normal", "NVFP4", "nvfp4", 16, 4.5, 0.10),
        ("heavy", "NF4", "nf4", 64, 4.5, 0.15),
        ("heavy", "NVFP4", "nvfp4", 16, 4.5001, 0.12),
    ]
    figure = bits_against_error(pd.DataFrame(rows, columns=columns), 4.5)
    assert figure.layout.title.text == "Least lost within 4.5 bits: NF4 (normal); NVFP4 (heavy)"
    assert figure.layout.title.subtitle.text.startswith("normal 9.0%, heavy 12.0%")
    assert [line.name for line in figure.data] == ["NF4", "NVFP4", "NF4", "NVFP4"]
    assert list(figure.data[0].x) == [4.5, 5.0]
