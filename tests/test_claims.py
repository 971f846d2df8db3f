"""A verdict follows from what was measured."""

import pytest

from labutils.claims import CLAIMS, Verdict


def test_claims_are_numbered_without_a_gap():
    assert list(CLAIMS) == [f"C{number}" for number in range(1, 16)]


@pytest.mark.parametrize(
    "holds, limit, verdict",
    [
        (True, "", "holds"),
        (True, "on white inputs not at all", "holds, with a limit"),
        (False, "", "does not hold today"),
        (False, "on white inputs not at all", "does not hold today"),
    ],
)
def test_verdict_is_one_of_three(holds, limit, verdict):
    assert Verdict("C3", holds, "a number", limit).verdict == verdict


def test_it_prints_the_claim_the_number_and_the_limit():
    lines = str(Verdict("C1", True, "3.88 times smaller", "constants take 0.13 bit")).splitlines()
    assert lines[0] == "C1 holds, with a limit"
    assert CLAIMS["C1"] in lines[1] and "3.88" in lines[2] and "0.13" in lines[3]


def test_an_unknown_claim_is_refused():
    with pytest.raises(KeyError, match="C99"):
        Verdict("C99", True, "")
