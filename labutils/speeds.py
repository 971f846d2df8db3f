"""What the peers took when they were last measured: loading, memory, prompts, tokens a second.

`benchmarks/peers.py` runs the same Mixtral in this lab and in other libraries, and `PATH` is what
its `--json` wrote. Figures of two peers are only worth comparing within a round, which measures
each of them once, one after the other; another machine has other ones.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from .meter import MIB

PATH = Path(__file__).parent / "data" / "peers.json"
OURS = "this lab, from bf16"


@dataclass(frozen=True)
class _Column:
    """A column of the table: a field of the file, in another unit."""

    field: str
    scale: float = 1


_COLUMNS = {
    "expert_bits": _Column("bits_in_memory"),
    "load_seconds": _Column("load_seconds"),
    "peak_mib": _Column("load_peak_bytes", 1 / MIB),
    "steady_mib": _Column("steady_bytes", 1 / MIB),
    "prefill_64_ms": _Column("prefill_64_seconds", 1000),
    "prefill_512_ms": _Column("prefill_512_seconds", 1000),
    "first_token_ms": _Column("first_token_seconds", 1000),
    "decode_1": _Column("decode_1_per_second"),
    "decode_4": _Column("decode_4_per_second"),
    "decode_16": _Column("decode_16_per_second"),
    "active_mb": _Column("active_bytes", 1e-6),
}


@dataclass(frozen=True, eq=False)
class Speeds:
    """Every peer in every round: `rounds` has a row for each (peer, turn), in the file's order.

    `expert_bits` are those of an expert's weight in memory, all constants counted. Memory is
    anonymous, above what the imports took: `peak_mib` while loading, `steady_mib` after the first
    prompt; pages of a mapped file are not in it. `first_token_ms` is the first prompt of 64 tokens
    after loading, the prefills are later ones. `decode_4` are the tokens a second of 4 sequences
    together. `active_mb` (10**6 bytes) is what one token must read. `date` is an ISO date.
    """

    date: str
    processor: str
    cores: int
    rounds: pd.DataFrame

    @property
    def table(self) -> pd.DataFrame:
        """A row for each peer: the medians over its rounds."""
        return self._by_peer.median()

    @property
    def lowest(self) -> pd.DataFrame:
        return self._by_peer.min()

    @property
    def highest(self) -> pd.DataFrame:
        return self._by_peer.max()

    def ratio(self, column: str, peer: str, to: str) -> float:
        """How many times `peer` has what `to` has: the median over the rounds that have both.

        Raises KeyError for a column or peer that is not there; NaN if no round has both.
        """
        figures = self.rounds[column]
        return float((figures.xs(peer) / figures.xs(to)).median())

    @property
    def _by_peer(self):
        return self.rounds.groupby(level="peer", sort=False)


def measured(path: Path = PATH) -> Speeds:
    """What `benchmarks/peers.py --json PATH` wrote."""
    kept = json.loads(Path(path).read_text())
    records = pd.DataFrame(kept["measured"]).set_index(["peer", "turn"])
    rounds = pd.DataFrame(
        {name: column.scale * records[column.field] for name, column in _COLUMNS.items()}
    )
    return Speeds(kept["date"], kept["processor"], kept["machine"]["cores"], rounds)
