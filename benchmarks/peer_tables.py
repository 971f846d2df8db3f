"""What was measured of the peers, and tables of it: medians, ranges, ratios within a round."""

import statistics
from dataclasses import dataclass

from peer_models import GROUPED_MM, OURS, OURS_SAVED

from labutils.meter import MIB

QUANTIZED_SHAPE = (4096, 14336)


# -------------------------------------------------------------------------- what is written down


@dataclass(frozen=True)
class Measured:
    """What one peer took in one round; memory is anonymous and above the imports.

    `load_peak_bytes` and `loaded_bytes` are of the load, `first_peak_bytes` and `steady_bytes` of
    the first prompt and one token after it, `long_peak_bytes` of a prompt of 512 tokens later on.
    `mapped_bytes` are pages of the checkpoint's files that stay in memory. `active_bytes` is what a
    token must read. `logits_distance` is how far the median token's logits are from those of bf16,
    relative to these.
    """

    peer: str
    turn: int
    load_seconds: float
    load_peak_bytes: int
    loaded_bytes: int
    first_token_seconds: float
    first_peak_bytes: int
    steady_bytes: int
    long_peak_bytes: int
    mapped_bytes: int
    prefill_64_seconds: float
    prefill_512_seconds: float
    decode_1_per_second: float
    decode_4_per_second: float
    decode_16_per_second: float
    bits_on_disk: float
    bits_in_memory: float
    active_bytes: int
    logits_distance: float


@dataclass(frozen=True)
class Quantizing:
    """NF4 of a bf16 matrix of `QUANTIZED_SHAPE`, and how fast this machine reads memory."""

    turn: int
    ours_weights_per_second: float
    bitsandbytes_weights_per_second: float
    ours_temporary_bytes: int
    bitsandbytes_temporary_bytes: int
    equal: bool
    bytes_read_per_second: float


@dataclass(frozen=True)
class Grown:
    """Loading and decoding of one shape; `varied` is what differs from the base shape."""

    peer: str
    turn: int
    varied: str
    hidden: int
    ffn: int
    layers: int
    experts: int
    tokens: int
    load_seconds: float
    decode_seconds: float


@dataclass(frozen=True)
class Measure:
    """A column of the tables: a field of `Measured` in its printed unit."""

    heading: str
    field: str
    scale: float
    digits: int

    def of(self, measured: Measured) -> float:
        return getattr(measured, self.field) * self.scale


LOADING = (
    Measure("load s", "load_seconds", 1, 2),
    Measure("load peak", "load_peak_bytes", 1 / MIB, 0),
    Measure("loaded", "loaded_bytes", 1 / MIB, 0),
    Measure("first peak", "first_peak_bytes", 1 / MIB, 0),
    Measure("steady", "steady_bytes", 1 / MIB, 0),
    Measure("512 peak", "long_peak_bytes", 1 / MIB, 0),
    Measure("mapped", "mapped_bytes", 1 / MIB, 0),
)
RUNNING = (
    Measure("first 64 ms", "first_token_seconds", 1000, 0),
    Measure("64 ms", "prefill_64_seconds", 1000, 0),
    Measure("512 ms", "prefill_512_seconds", 1000, 0),
    Measure("x1 tok/s", "decode_1_per_second", 1, 1),
    Measure("x4 tok/s", "decode_4_per_second", 1, 1),
    Measure("x16 tok/s", "decode_16_per_second", 1, 1),
)
STORING = (
    Measure("bits on disk", "bits_on_disk", 1, 3),
    Measure("bits in memory", "bits_in_memory", 1, 3),
    Measure("active MB", "active_bytes", 1e-6, 1),
    Measure("logits from bf16", "logits_distance", 1, 3),
)


# ------------------------------------------------------------------------------------------- tables


def cell(values: list[float], digits: int) -> str:
    """The median, and the range unless that is a single number.

    >>> cell([3, 1, 2], 1)
    '2.0 (1.0..3.0)'
    """
    if not values:
        return "-"
    low, middle, high = (
        f"{value:,.{digits}f}" for value in (min(values), statistics.median(values), max(values))
    )
    return middle if low == high else f"{middle} ({low}..{high})"


def table(headings: list[str], rows: list[list[str]]) -> str:
    """Aligned columns, the first to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(headings, *rows, strict=True)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])])
        for row in (headings, *rows)
    )


def by_peer(measured: list[Measured]) -> dict[str, list[Measured]]:
    peers = dict.fromkeys(each.peer for each in measured)
    return {peer: [each for each in measured if each.peer == peer] for peer in peers}


def measures_table(measured: list[Measured], columns: tuple[Measure, ...]) -> str:
    rows = [
        [peer, *(cell([column.of(each) for each in own], column.digits) for column in columns)]
        for peer, own in by_peer(measured).items()
    ]
    return table(["", *(column.heading for column in columns)], rows)


def ratios(measured: list[Measured], ours: str, peer: str, column: Measure) -> list[float]:
    """Ours by the peer's in each round that has both."""
    by_round = {(each.peer, each.turn): column.of(each) for each in measured}
    return [
        by_round[ours, turn] / theirs
        for (name, turn), theirs in by_round.items()
        if name == peer and theirs > 0 and (ours, turn) in by_round
    ]


def ratios_table(measured: list[Measured], ours: str, columns: tuple[Measure, ...]) -> str:
    rows = [
        [peer, *(cell(ratios(measured, ours, peer, column), 2) for column in columns)]
        for peer in by_peer(measured)
        if peer != ours
    ]
    return table(["", *(column.heading for column in columns)], rows)


def floors_table(measured: list[Measured], bytes_per_second: float) -> str:
    """How near decoding one sequence comes to reading its active bytes once a token."""
    rows = []
    for peer, own in by_peer(measured).items():
        most = bytes_per_second / own[0].active_bytes
        reached = cell([100 * each.decode_1_per_second / most for each in own], 0)
        rows.append([peer, f"{own[0].active_bytes / 1e6:.1f}", f"{most:,.0f}", reached])
    return table(["", "active MB", "at most tok/s", "reached %"], rows)


def quantizing_table(quantizing: list[Quantizing]) -> str:
    rows = []
    for prefix, name in (("ours", "this lab"), ("bitsandbytes", "bitsandbytes")):
        rates = [getattr(each, f"{prefix}_weights_per_second") / 1e6 for each in quantizing]
        peaks = [getattr(each, f"{prefix}_temporary_bytes") / MIB for each in quantizing]
        rows.append([name, cell(rates, 0), cell(peaks, 0)])
    return table(["", "M weights/s", "temporary MiB"], rows)


def grown_table(grown: list[Grown]) -> str:
    """A row for each shape: both peers' milliseconds, and the ratio of each round's."""
    shapes = {}
    for each in grown:
        shape = (each.varied, each.hidden, each.layers, each.experts, each.tokens)
        shapes.setdefault(shape, {}).setdefault(each.peer, []).append(each)
    rows = []
    for shape, both in shapes.items():
        row = list(map(str, shape))
        for field in ("load_seconds", "decode_seconds"):
            ours, theirs = (
                [1000 * getattr(each, field) for each in both[peer.name]]
                for peer in (OURS, GROUPED_MM)
            )
            by_round = [mine / other for mine, other in zip(ours, theirs, strict=True)]
            row += [cell(ours, 1), cell(theirs, 1), cell(by_round, 2)]
        rows.append(row)
    shape = ["varied", "width", "layers", "experts", "tokens"]
    return table([*shape, "load ms", "bf16", "ratio", "token ms", "bf16", "ratio"], rows)


def print_comparison(measured: list[Measured], quantizing: list[Quantizing]) -> None:
    speed = statistics.median(each.bytes_read_per_second for each in quantizing)
    print("\nLoading: seconds, and anonymous memory in MiB above the imports")
    print(measures_table(measured, LOADING))
    print("\nRunning: the first prompt of 64 tokens; later ones, and of 512; then tokens a second")
    print("of 1, 4 and 16 sequences, after 64 tokens each")
    print(measures_table(measured, RUNNING))
    print("\nStored: bits of an expert weight, all constants counted; what a token reads")
    print(measures_table(measured, STORING))
    print(f"\n{OURS.name}, divided by each peer: below 1 is better, but for tok/s")
    print(ratios_table(measured, OURS.name, LOADING[:-1]))
    print(ratios_table(measured, OURS.name, RUNNING))
    print(f"\n{OURS_SAVED.name}, whose weights stay mapped, divided by each peer")
    print(ratios_table(measured, OURS_SAVED.name, (LOADING[0], *RUNNING)))
    print(f"\nDecoding one sequence, where {speed / 1e9:.1f} GB/s are read at best")
    print(floors_table(measured, speed))
    print(
        f"\nNF4 of a matrix of {' x '.join(map(str, QUANTIZED_SHAPE))}, in the same bytes: "
        f"{all(each.equal for each in quantizing)}"
    )
    print(quantizing_table(quantizing))
    print(
        "\nllama.cpp's files are made before, which is not counted; they have embeddings and head"
    )
    print("in 4 to 6 bits too. What is mapped is not anonymous: the system may drop it.")
