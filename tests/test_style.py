"""One set of colours, which most eyes can tell apart."""

import itertools
import subprocess
import sys

import numpy as np
import pytest

from labutils.formats import FORMATS
from labutils.style import COLORS, LogAxis

EYES = {  # Machado, Oliveira and Fernandes 2009, severity 1, for linear RGB
    "usual": np.eye(3),
    "protan": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "deutan": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
}
TO_XYZ = [
    [0.4124564, 0.3575761, 0.1804375],
    [0.2126729, 0.7151522, 0.0721750],
    [0.0193339, 0.1191920, 0.9503041],
]


def lab(color: str, eyes: str) -> np.ndarray:
    """CIE L*a*b* as these eyes see it; a difference of 2 can just be told apart."""
    srgb = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    seen = np.clip(np.array(EYES[eyes]) @ linear, 0, 1)
    xyz = np.array(TO_XYZ) @ seen / [0.95047, 1, 1.08883]
    x, y, z = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("eyes", EYES)
@pytest.mark.parametrize(
    "group",
    [
        "fp32 bf16 int8 int4 nf4 fp4 fp8 nvfp4 mxfp4",
        "embeddings attention router experts shared_experts norms lm_head kv_cache",
        ",".join(f"expert {index}" for index in range(8)),
        "anonymous,rss,gpu allocated,gpu reserved,predicted",
    ],
    ids=["formats", "components", "experts", "memory"],
)
def test_colours_can_be_told_apart(group: str, eyes: str) -> None:
    names = group.split("," if "," in group else " ")
    for one, other in itertools.combinations(names, 2):
        distance = np.linalg.norm(lab(COLORS[one], eyes) - lab(COLORS[other], eyes))
        assert distance > 10, f"{one} and {other} look alike to {eyes} eyes: {distance:.1f}"


def test_every_format_has_a_colour() -> None:
    assert set(FORMATS) <= set(COLORS)


def test_a_logarithmic_axis_ends_with_its_values_or_is_cut_at_a_decade():
    plain = LogAxis.over([[0.003, 0.5], [0.02, float("nan")]], least=1e-5)
    assert (plain.floor, plain.top, plain.cut) == (0.003, 0.5, False)
    cut = LogAxis.over([0.0, 0.003, 0.5], least=1e-5)
    assert (cut.floor, cut.cut) == (0.001, True)
    assert cut.layout("KL")["ticktext"] == ["0.001<br>or less", "0.01", "0.1", "1"]
    nothing = LogAxis.over([0.0, 0.0], least=1e-5)
    assert nothing.cut and nothing.top == 10 * nothing.floor


def test_pictures_do_not_wait_for_a_grammar_of_web_addresses():
    code = "import sys; from labutils import apps; sys.exit('lark' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
