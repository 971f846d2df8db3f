"""What the peers took is read as it was written, and compared within rounds."""

import json
import math

import pandas as pd
import pytest
from peer_models import OURS, OURS_SAVED, PEERS
from peer_tables import Measured

from labutils import speeds
from labutils.meter import MIB

COLUMNS = """
expert_bits load_seconds peak_mib steady_mib prefill_64_ms prefill_512_ms first_token_ms decode_1
decode_4 decode_16 active_mb
""".split()


def record(peer: str, turn: int, **fields: float) -> dict:
    assert fields.keys() <= Measured.__dataclass_fields__.keys()
    return dict.fromkeys(Measured.__dataclass_fields__, 1.0) | {"peer": peer, "turn": turn} | fields


@pytest.fixture
def found(tmp_path):
    """Two peers in two rounds, the second twice as slow, and a third that failed in it."""

    def read(*measured: dict) -> speeds.Speeds:
        file = tmp_path / "peers.json"
        kept = {"date": "2020-02-29", "processor": "One", "machine": {"cores": 3}}
        file.write_text(json.dumps(kept | {"measured": measured}))
        return speeds.measured(file)

    return read


TWO_ROUNDS = (
    record("slow", 0, load_seconds=4.0, steady_bytes=3 * MIB, prefill_64_seconds=0.5),
    record("fast", 0, load_seconds=1.0, active_bytes=2_500_000, bits_in_memory=4.5),
    record("failed", 0, load_seconds=2.0),
    record("slow", 1, load_seconds=8.0, steady_bytes=5 * MIB, prefill_64_seconds=0.5),
    record("fast", 1, load_seconds=4.0, active_bytes=2_500_000, bits_in_memory=4.5),
)


def test_the_table_has_medians_in_its_units_in_the_order_of_the_file(found):
    table = found(*TWO_ROUNDS).table
    assert list(table.index) == ["slow", "fast", "failed"] and list(table) == COLUMNS
    assert table.loc["slow", ["load_seconds", "steady_mib", "prefill_64_ms"]].tolist() == [
        6,
        4,
        500,
    ]
    assert table.loc["fast", ["load_seconds", "active_mb", "expert_bits"]].tolist() == [
        2.5,
        2.5,
        4.5,
    ]


def test_the_spread_is_half_the_range_by_the_median(found):
    read = found(*TWO_ROUNDS)
    assert read.lowest.shape == read.highest.shape == read.table.shape
    half = (read.highest - read.lowest) / 2
    assert (half["load_seconds"] / read.table["load_seconds"]).tolist() == [2 / 6, 1.5 / 2.5, 0]
    assert (half["prefill_64_ms"] == 0).all()


def test_ratios_are_taken_within_a_round(found):
    read = found(*TWO_ROUNDS)
    assert read.ratio("load_seconds", "slow", to="fast") == 3, "not 6 / 2.5"
    assert read.ratio("load_seconds", "failed", to="fast") == 2, "in the one round that has both"
    with pytest.raises(KeyError, match="none"):
        read.ratio("load_seconds", "none", to="fast")
    with pytest.raises(KeyError, match="mass"):
        read.ratio("mass", "slow", to="fast")


def test_without_a_round_in_common_there_is_no_ratio(found):
    read = found(record("one", 0), record("other", 1))
    assert math.isnan(read.ratio("load_seconds", "one", to="other"))


def test_it_says_when_and_where(found):
    read = found(*TWO_ROUNDS)
    assert (read.date, read.processor, read.cores) == ("2020-02-29", "One", 3)


def test_what_is_shipped_is_whole():
    """Known peers, every one of them in every round, nothing missing."""
    shipped = speeds.measured()
    assert shipped.table.index[:2].tolist() == [OURS.name, OURS_SAVED.name]
    assert set(shipped.table.index) <= {peer.name for peer in PEERS}
    turns = shipped.rounds.reset_index().groupby("peer")["turn"].apply(sorted)
    assert all(each == turns.iloc[0] for each in turns)
    assert (shipped.rounds > 0).all(axis=None)
    assert pd.Timestamp(shipped.date) and shipped.cores > 0 and shipped.processor
