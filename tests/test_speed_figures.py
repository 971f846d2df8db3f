"""Pictures of speed hold their records, and what their titles say follows from them."""

import numpy as np
import pandas as pd
import pytest

from labutils import speeds
from labutils.meter import MIB
from labutils.speed_figures import crossover, peers
from labutils.speeds import Speeds
from labutils.style import COLORS

LAB, SAVED = speeds.OURS, "this lab, saved in 4 bits"
EAGER, GROUPED = "transformers bf16, eager", "transformers bf16, grouped_mm"
STOCK, OTHER, LLAMA = "bitsandbytes, stock", "torchao int4", "llama.cpp Q4_0"
COLUMNS = list(speeds.measured().table)
COUNTS = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512]
WAYS = ["straight from the codes", "dequantized, then multiplied", "bf16"]


def row(peer: str, turn: int = 0, **fields: float) -> dict:
    bits = 16.0 if peer in (EAGER, GROUPED, STOCK) else 4.5
    same = dict.fromkeys(COLUMNS, 100.0) | {"expert_bits": bits, "active_mb": 10.0}
    return {"peer": peer, "turn": turn} | same | fields


def found(*rows: dict, cores: int = 2) -> Speeds:
    return Speeds("2020-02-29", "One", cores, pd.DataFrame(rows).set_index(["peer", "turn"]))


def bars(figure, panel: int) -> dict[str, float]:
    """The bars of a panel, the first is 0, by their peers."""
    axis = f"x{panel + 1}" if panel else "x"
    own = [trace for trace in figure.data if trace.type == "bar" and trace.xaxis == axis]
    return {peer: x for trace in own for peer, x in zip(trace.y, trace.x, strict=True)}


def texts(figure, panel: int) -> list[str]:
    written = [trace for trace in figure.data if trace.type == "scatter"]
    return [text.strip("\u00a0") for text in written[panel].text]


def axis(figure, panel: int):
    return figure.layout[f"xaxis{panel + 1}" if panel else "xaxis"]


def test_this_lab_is_held_against_the_fastest_in_16_bits():
    read = found(
        row(LAB, decode_1=60, steady_mib=300, active_mb=113),
        row(EAGER, decode_1=20, steady_mib=10, active_mb=411),
        row(GROUPED, decode_1=24, steady_mib=1200, active_mb=411),
        row(LLAMA, decode_1=200, steady_mib=1),
    )
    title = peers(read).layout.title
    assert (
        title.text == "In 4 bits a token comes 2.5 times as fast as in 16, from 25% of the memory"
    )
    assert title.subtitle.text == (
        "A Mixtral reading 411 MB a token in bf16, 113 here; 2 cores, 2020-02-29; one round"
    )


def test_the_title_takes_its_ratios_within_rounds():
    rounds = [(10, 10), (30, 10), (1000, 200)]
    read = found(
        *(row(LAB, turn, decode_1=ours) for turn, (ours, _) in enumerate(rounds)),
        *(row(EAGER, turn, decode_1=theirs) for turn, (_, theirs) in enumerate(rounds)),
    )
    title = peers(read).layout.title
    assert "comes 3.0 times as fast" in title.text
    assert title.subtitle.text.endswith("median and range of 3 rounds")


@pytest.mark.parametrize(
    ("decode", "memory", "said"),
    [
        (50, 110, "comes 0.50 times as fast as in 16, from 110% of the memory"),
        (123_456, 0.1, "comes 1,235 times as fast as in 16, from 0.10% of the memory"),
    ],
)
def test_the_title_stays_true_if_this_lab_is_slow_or_far_ahead(decode, memory, said):
    read = found(row(LAB, decode_1=decode, steady_mib=memory), row(EAGER))
    assert peers(read).layout.title.text.endswith(said)


def test_titles_fit_their_line():
    rows = [row(name, t, active_mb=25_760) for t in range(10) for name in (LAB, EAGER)]
    title = peers(found(*rows, cores=128)).layout.title
    assert len(title.text) <= 86 and len(title.subtitle.text) <= 110


def test_bars_are_medians_and_their_lines_the_range():
    read = found(*(row(LAB, turn, load_seconds=s) for turn, s in enumerate([2, 3, 7])), row(EAGER))
    figure = peers(read)
    assert bars(figure, 2) == {LAB: 3, EAGER: 100}
    (bar,) = (trace for trace in figure.data if trace.xaxis == "x3" and trace.name == WHO[LAB])
    assert list(bar.error_x.array) == [4] and list(bar.error_x.arrayminus) == [1]
    assert f"{LAB}: 3.000 s (2.000 to 7.000)<br>4.500 bits" in bar.customdata[0]


WHO = {
    LAB: "this lab, 4 bits",
    SAVED: "this lab, 4 bits",
    EAGER: "experts in 16 bits",
    STOCK: "experts in 16 bits",
    OTHER: "other Python libraries, 4 bits",
    LLAMA: "llama.cpp, 4 bits, no Python",
}


def test_peers_stand_in_their_order_and_each_in_the_colour_of_its_kind():
    figure = peers(found(*map(row, WHO)))
    assert figure.layout.yaxis.categoryarray == figure.layout.yaxis.tickvals == tuple(WHO)
    first, last = figure.layout.yaxis.range
    assert first > last, "the first at the top"
    drawn = {peer: bar.name for bar in figure.data if bar.type == "bar" for peer in bar.y}
    assert drawn == WHO
    looks = {bar.name: bar.marker for bar in figure.data if bar.type == "bar"}
    assert looks[WHO[LAB]].color == COLORS["nf4"] and looks[WHO[STOCK]].color == COLORS["bf16"]
    patterns = [looks[name].pattern.shape for name in (WHO[OTHER], WHO[LLAMA], WHO[LAB])]
    assert len(set(patterns)) == 3, "legible in grey"
    shown = [bar.name for bar in figure.data if bar.type == "bar" and bar.showlegend]
    assert sorted(shown) == sorted(set(WHO.values()))


def test_a_long_bar_makes_its_axis_logarithmic_and_no_other():
    figure = peers(found(*map(row, (LAB, SAVED, EAGER)), row(LLAMA, load_seconds=801)))
    kinds = [axis(figure, panel).type == "log" for panel in range(4)]
    assert kinds == [False, False, True, False]
    assert ["log scale" in axis(figure, panel).title.text for panel in range(4)] == kinds
    even = peers(found(*map(row, (LAB, SAVED, EAGER)), row(LLAMA, load_seconds=799)))
    assert axis(even, 2).type != "log"


@pytest.mark.parametrize("slowest", [1e-3, 150.0, 1e7])
def test_every_bar_ends_inside_its_panel(slowest):
    read = found(*map(row, (LAB, SAVED, EAGER)), row(LLAMA, prefill_512_ms=slowest))
    shown = axis(peers(read), 1)
    low, high = shown.range
    ends = np.array([100, slowest])
    ends = np.log10(ends) if shown.type == "log" else ends
    assert (ends < high).all() and (ends > low).all()


def test_weights_in_a_mapped_file_are_said_to_be_there():
    mapped = row(SAVED, steady_mib=40, active_mb=41 * MIB / 1e6)
    figure = peers(found(row(LAB), mapped, row(EAGER)))
    assert texts(figure, 3) == ["100", "40 + file", "100"]
    assert texts(figure, 0) == ["100", "100", "100"]


def test_without_the_two_that_are_compared_there_is_no_picture():
    with pytest.raises(KeyError, match="this lab"):
        peers(found(row(EAGER)))
    with pytest.raises(ValueError, match="empty"):
        peers(found(row(LAB)))


def test_the_shipped_speeds_are_drawn():
    shipped = speeds.measured()
    figure = peers(shipped)
    assert bars(figure, 0) == shipped.table.decode_1.to_dict()
    assert bars(figure, 3) == shipped.table.steady_mib.to_dict()
    assert len(figure.layout.title.text) <= 86 and len(figure.layout.title.subtitle.text) <= 110


# -------------------------------------------------------------------------- three ways to multiply


def times(codes, dequantized, bf16) -> pd.DataFrame:
    """Milliseconds for `COUNTS`, each way by what it does with that many tokens."""
    tokens = np.array(COUNTS)
    return pd.DataFrame(
        {way: times(tokens) for way, times in zip(WAYS, (codes, dequantized, bf16), strict=True)},
        index=COUNTS,
    )


def level(ms: float):
    return lambda tokens: np.full(len(tokens), ms)


@pytest.mark.parametrize(
    ("dequantized", "bf16", "said"),
    [
        (20.0, 1.5, "dequantizing up to 16 tokens, bf16 up to 1 token"),
        (16.0, 32.5, "dequantizing up to 8 tokens, bf16 up to 32 tokens"),
        (1e6, 1e-6, "dequantizing at all counts, bf16 at no count"),
    ],
)
def test_the_title_says_where_the_ways_cross(dequantized, bf16, said):
    table = times(lambda tokens: tokens * 1.0, level(dequantized), level(bf16))
    title = crossover(table, switch=16).layout.title
    assert title.text == f"Straight from the codes beats {said}"
    assert title.subtitle.text == (
        "One expert matrix, 1 to 512 tokens at once; the lab goes straight from the codes up to 16"
    )
    assert len(title.text) <= 86 and len(title.subtitle.text) <= 110


def test_the_title_claims_nothing_beyond_a_gap():
    humped = times(level(5.0), lambda tokens: np.where(tokens == 4, 4.0, 6.0), level(6.0))
    assert "dequantizing up to 2 tokens" in crossover(humped, 1).layout.title.text
    late = times(level(5.0), lambda tokens: tokens * 1.0, level(6.0))
    assert "dequantizing only later" in crossover(late, 1).layout.title.text


def test_lines_are_the_table_and_can_be_told_apart():
    table = times(lambda tokens: tokens * 0.5, level(9.0), lambda tokens: 2 + tokens / 10)
    figure = crossover(table, switch=16)
    assert [line.name for line in figure.data] == WAYS
    for line in figure.data:
        assert list(line.x) == COUNTS and list(line.y) == list(table[line.name])
        assert list(line.customdata) == list(table[line.name] / COUNTS)
    assert len({line.line.dash for line in figure.data}) == 3
    assert len({line.marker.symbol for line in figure.data}) == 3
    assert figure.layout.xaxis.type == figure.layout.yaxis.type == "log"


@pytest.mark.parametrize("switch", [1, 16, 512])
def test_the_switch_is_marked_and_its_note_stays_inside(switch):
    figure = crossover(times(level(1.0), level(2.0), level(3.0)), switch)
    (line,), (note,) = figure.layout.shapes, figure.layout.annotations
    assert line.x0 == line.x1 == switch
    assert note.x == np.log10(switch) and note.text.endswith(f"after {switch}")
    assert note.xanchor == ("left" if switch < 23 else "right")


@pytest.mark.parametrize("factor", [1e-4, 1.0, 1e4])
def test_ticks_are_few_and_all_is_inside(factor):
    figure = crossover(times(level(2.0), level(30.0), lambda tokens: tokens * factor), 16)
    shown = figure.layout.yaxis
    low, high = shown.range
    ends = np.log10([2, 30, factor, 512 * factor])
    assert low < ends.min() and ends.max() < high
    ticks = [tick for tick in shown.tickvals if low < np.log10(tick) < high]
    assert 2 <= len(ticks) <= 10
