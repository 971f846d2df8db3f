"""The levels are the published ones, and the nearest of them is found."""

import pytest
import torch
from bitsandbytes import functional as bnb_functional
from hypothesis import given
from hypothesis import strategies as st

from labutils.codebooks import CODEBOOKS, dynamic_map, normal_float, unsigned

ALL = {**CODEBOOKS, "unsigned 4": unsigned(4), "dynamic map": dynamic_map()}


def test_nf4_is_the_published_one():
    """arXiv:2305.14314, appendix E."""
    published = [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ]
    assert normal_float(4).values.tolist() == published


def test_e2m1_is_the_published_one():
    """OCP Microscaling Formats 1.0, table 5."""
    assert CODEBOOKS["e2m1"].values.tolist()[:8] == [0, 0.5, 1, 1.5, 2, 3, 4, 6]


@pytest.mark.parametrize("name", ["nf4", "fp4"])
def test_4_bit_values_equal_those_of_bitsandbytes(name):
    assert torch.equal(CODEBOOKS[name].values, bnb_functional.get_4bit_type(name, "cpu"))


def test_dynamic_map_equals_that_of_bitsandbytes():
    assert torch.equal(dynamic_map().values, bnb_functional.create_dynamic_map())


def test_e4m3_equals_that_of_torch():
    every_code = torch.arange(256, dtype=torch.uint8)
    theirs = every_code.view(torch.float8_e4m3fn).float()
    torch.testing.assert_close(CODEBOOKS["e4m3"].values, theirs, rtol=0, atol=0, equal_nan=True)
    numbers = torch.linspace(-448, 448, 100_001)
    cast = numbers.to(torch.float8_e4m3fn).view(torch.uint8)
    assert torch.equal(CODEBOOKS["e4m3"].nearest(numbers), cast)


@pytest.mark.parametrize("bits", range(2, 9))
def test_levels_of_every_bit_width(bits):
    assert CODEBOOKS[f"int{bits}"].levels.tolist() == list(
        range(-(2 ** (bits - 1)) + 1, 2 ** (bits - 1))
    )
    levels = CODEBOOKS[f"nf{bits}"].levels
    assert len(levels) == 2**bits
    assert levels[0] == -1 and levels[-1] == 1 and 0 in levels


@pytest.mark.parametrize("name", ALL)
def test_bits_peak_and_codes_agree(name):
    codebook = ALL[name]
    assert len(codebook.values) == 2**codebook.bits
    assert codebook.peak == codebook.levels[-1]
    used = codebook.values.isfinite()
    found = codebook.values[codebook.nearest(codebook.values[used]).long()]
    assert torch.equal(found, codebook.values[used]), "a level is its own nearest"


@pytest.mark.parametrize("name", ALL)
@given(numbers=st.lists(st.floats(-600, 600, width=32), min_size=1, max_size=40))
def test_nearest_is_nearest(name, numbers):
    codebook, numbers = ALL[name], torch.tensor(numbers)
    distance = (codebook.values[codebook.nearest(numbers).long()] - numbers).abs()
    brute_force = (codebook.levels - numbers[:, None]).abs().amin(dim=1)
    torch.testing.assert_close(distance, brute_force, rtol=1e-6, atol=1e-7)
