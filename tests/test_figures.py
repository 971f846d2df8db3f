"""The memory chart shows what was recorded, and its labels, thinning and colours keep order."""

import itertools
from array import array
from dataclasses import replace

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest
from hypothesis import given
from hypothesis import strategies as st

from labutils.anatomy import Part
from labutils.budget import Budget
from labutils.checkpoints import Coverage, StoredWeight
from labutils.figures import (
    COLORS,
    budget_bars,
    cache_growth,
    coverage_bars,
    expert_use_map,
    memory_chart,
    thin,
)
from labutils.formats import FORMATS
from labutils.meter import MIB, Memory, Phase, Run, Samples

GIB = 2**30


def samples_of(**columns: list[float]) -> Samples:
    """Samples one tenth of a second apart; what is not named stays 0."""
    count = len(next(iter(columns.values())))
    empty = {name: [0] * count for name in vars(Samples.empty())}
    columns = empty | {"seconds": [index / 10 for index in range(count)]} | columns
    return Samples(
        **{name: array("d" if name == "seconds" else "q", c) for name, c in columns.items()}
    )


def run_of(label: str, began_seconds: float, seconds: float, *sizes_mib: int, **more) -> Run:
    """A run that starts, ends and peaks at these sizes of anonymous memory."""
    start, end, peak = (Memory(size * MIB, size * MIB) for size in sizes_mib)
    return Run(
        label, began_seconds, seconds, start, end, peak, peak.rss_bytes, True, (), 0.02, **more
    )


ONE = samples_of(
    anonymous_bytes=[100 * MIB, 109 * MIB, 104 * MIB],
    rss_bytes=[300 * MIB, 320 * MIB, 320 * MIB],
)
LOAD = run_of("load in NF4", 0, 0.2, 100, 104, 109, predicted_bytes=4 * MIB)


def trace(figure: go.Figure, name: str) -> go.Scatter:
    return next(trace for trace in figure.data if trace.name.startswith(name))


def texts(figure: go.Figure) -> list[str]:
    return [annotation.text for annotation in figure.layout.annotations]


# ------------------------------------------------------------------------------- the memory chart


def test_title_states_the_finding() -> None:
    title = memory_chart(ONE, [LOAD]).layout.title
    assert title.text == "load in NF4: 4.0 MiB predicted, 4.0 MiB kept, peak 9.0 MiB"
    assert title.subtitle.text == (
        "Above its start at 100.0 MiB. Longest time between two samples: 0.020 s."
    )


@pytest.mark.parametrize(
    ("run", "title"),
    [
        (replace(LOAD, recording=True), "4.0 MiB predicted, 4.0 MiB so far, peak 9.0 MiB"),
        (replace(LOAD, error="KeyError: 'w1'"), "peak 9.0 MiB, stopped by an error"),
        (run_of("del model", 0, 0.2, 109, 104, 109), "5.0 MiB freed, peak 0.0 MiB"),
        (replace(LOAD, label="<b>"), "&lt;b&gt;: 4.0 MiB predicted"),
        (replace(LOAD, label="x" * 70), f"{'x' * 39}…:<br>4.0 MiB predicted"),
    ],
)
def test_title_of_other_runs(run: Run, title: str) -> None:
    assert title in memory_chart(ONE, [run]).layout.title.text


def test_sampled_peak_is_called_one() -> None:
    subtitle = memory_chart(ONE, [replace(LOAD, peak_is_exact=False)]).layout.title.subtitle.text
    assert subtitle.endswith("The peak is the highest sample.")


def test_lines_are_above_the_start_and_hover_is_exact() -> None:
    figure = memory_chart(ONE, [LOAD])
    anonymous, rss = trace(figure, "anonymous"), trace(figure, "RSS")
    assert (list(anonymous.y), list(rss.y)) == ([0, 9, 4], [0, 20, 20])
    assert list(anonymous.customdata) == list(ONE.anonymous_bytes)
    assert anonymous.fill == "tozeroy" and rss.fill is None
    assert list(anonymous.text) == ["load in NF4"] * 3
    assert not trace(figure, "GPU, tensors").visible
    assert figure.layout.yaxis.title.text == "above the start (MiB)"


def test_tall_chart_is_in_gib_and_gpu_runs_are_judged_on_the_gpu() -> None:
    samples = samples_of(anonymous_bytes=[GIB, GIB], gpu_allocated_bytes=[0, 22 * GIB])
    end = Memory(GIB, GIB, 22 * GIB)
    run = Run("load", 0, 0.1, Memory(GIB, GIB), end, end, GIB, True, (), 0.02, 23 * GIB)
    figure = memory_chart(samples, [run])
    assert figure.layout.title.text == (
        "load: 23.00 GiB predicted, 22.00 GiB kept on the GPU, peak 22.00 GiB"
    )
    assert figure.layout.yaxis.title.text == "above the start (GiB)"
    assert trace(figure, "GPU, tensors").visible
    assert list(trace(figure, "predicted").y) == [23, 23, None]
    assert list(trace(figure, "after").y) == [22]


def test_prediction_begins_where_its_run_did() -> None:
    second = run_of("second", 0.1, 0.1, 109, 104, 109)
    figure = memory_chart(ONE, [replace(LOAD, seconds=0.1), second], predicted_bytes=2 * MIB)
    assert list(trace(figure, "predicted").y) == [4, 4, None, 11, 11, None]
    assert list(trace(figure, "after").y) == [4, 4]
    assert "predicted 2.0 MiB" in texts(figure)


def test_phases_are_rows_below() -> None:
    phases = (Phase("read", 0, 0.1), Phase("quantize", 0.1, 0.15), Phase("read", 0.15, 0.2))
    figure = memory_chart(ONE, [replace(LOAD, phases=phases)])
    strip = trace(figure, "phases")
    assert list(strip.x) == [0, 0.1, None, 0.1, 0.15, None, 0.15, 0.2, None]
    assert list(dict.fromkeys(filter(None, strip.y))) == ["read", "quantize"]
    assert figure.layout.yaxis.domain[0] > figure.layout.yaxis2.domain[1]
    assert list(trace(figure, "anonymous").text) == [
        "load in NF4, read",
        "load in NF4, quantize",
        "load in NF4, read",
    ]


def test_many_phases_share_a_row() -> None:
    phases = tuple(Phase(f"layer {i}", i / 100, (i + 1) / 100) for i in range(20))
    strip = trace(memory_chart(ONE, [replace(LOAD, phases=phases)]), "phases")
    assert set(strip.y) == {"phases", None} and "layer 7" in strip.text


def test_labels_of_many_short_runs_do_not_overlap() -> None:
    runs = [run_of("a long run over the corpus", 0, 9, 100, 104, 109)]
    runs += [run_of(f"short run {i}", 9 + i / 10, 0.1, 100, 104, 109) for i in range(10)]
    samples = samples_of(seconds=[0, 10], anonymous_bytes=[100 * MIB, 104 * MIB])
    figure = memory_chart(samples, runs)
    spans: dict[float, list[tuple[float, float]]] = {}
    for label in figure.layout.annotations:
        width = 7 * (len(label.text) + 1)
        left = 600 - width if label.xanchor == "right" else 600 * label.x / 10
        spans.setdefault(label.yshift, []).append((left, left + width))
    for row in spans.values():
        assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(sorted(row)))
    assert "a long run over the corpus" in texts(figure)
    assert "short run 9" in texts(figure), "the title is about this one"
    assert len(figure.layout.shapes) >= len(runs), "each has its band"


def test_nothing_recorded_is_said() -> None:
    figure = memory_chart(Samples.empty(), [])
    assert figure.layout.title.text == "Nothing recorded yet"
    assert len(figure.data) == len(memory_chart(ONE, [LOAD]).data)


def test_long_recording_is_thinned_and_keeps_its_peak() -> None:
    sizes = [100 * MIB] * 50_000
    sizes[12_345] = 300 * MIB
    figure = memory_chart(samples_of(anonymous_bytes=sizes), [])
    drawn = trace(figure, "anonymous")
    assert len(drawn.x) <= 2000 and max(drawn.y) == 200
    assert drawn.x[np.argmax(drawn.y)] == pytest.approx(1234.5)


# --------------------------------------------------------------------------------------- thinning


def test_thinning_as_in_the_docstring() -> None:
    assert thin(np.array([0, 1, 9, 1, 0, 2, -3, 2]), 4).tolist() == [0, 2, 6, 7]


@given(
    values=st.lists(st.integers(-5, 5), min_size=1, max_size=200).map(np.array),
    points=st.integers(4, 60),
)
def test_thinning_keeps_first_last_smallest_and_largest(values: np.ndarray, points: int) -> None:
    kept = thin(values, points)
    assert len(kept) <= points
    assert kept[0] == 0 and kept[-1] == len(values) - 1
    assert (np.diff(kept) > 0).all()
    assert values[kept].min() == values.min() and values[kept].max() == values.max()
    if len(values) <= points:
        assert len(kept) == len(values)


# ---------------------------------------------------------------------------------------- colours

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


# ---------------------------------------------------------------------------- bytes and experts


def coverage_of(format: str, bits: int) -> Coverage:
    """Sixteen experts' weights stored in so many bits, and eight of attention in 16."""
    return Coverage(
        (
            StoredWeight(Part("experts", 0, 0, "up_proj"), 16 * MIB, format, bits * 2 * MIB),
            StoredWeight(Part("attention", 0), 8 * MIB, "bf16", 16 * MIB),
        )
    )


def test_coverage_bars_are_as_long_as_the_stored_bytes():
    figure = coverage_bars({"usual": coverage_of("bf16", 16), "ours": coverage_of("nf4", 4)})
    lengths = {(bar.y[0], bar.name): bar.x[0] for bar in figure.data}
    assert lengths[("ours", "nf4")] == 8
    assert lengths[("usual", "bf16")] == 32
    assert figure.layout.title.text == "Experts: 16.00 bits per weight usual, 4.00 ours"
    assert {bar.marker.color for bar in figure.data} == {COLORS["bf16"], COLORS["nf4"]}


@pytest.mark.parametrize(
    ("room", "title"),
    [
        (1, "None of these 2 fits a card"),
        (5, "Of these 2, small fit a card"),
        (50, "All 2 of these fit a card"),
    ],
)
def test_the_title_of_a_budget_says_what_fits(room, title):
    budgets = {
        "large": Budget(1, {"experts": 10 * GIB}),
        "small": Budget(1, {"experts": 2 * GIB, "kv_cache": GIB}),
    }
    figure = budget_bars(budgets, {"a card": room * GIB})
    assert figure.layout.title.text == title
    assert [bar.x for bar in figure.data] == [(10.0, 2.0), (0.0, 1.0)]


def test_the_cache_grows_until_the_room_is_full():
    figure = cache_growth(2 * GIB, 2**20, 4096, {"a 3 GiB card": 3 * GIB, "a 1 GiB card": GIB})
    said = "a 3 GiB card is full after 1,024 tokens; the weights alone do not fit a 1 GiB card"
    assert figure.layout.title.text == said
    weights, cache, *_ = figure.data
    assert set(weights.y) == {2.0}
    assert cache.y[-1] == 4.0


def test_the_map_of_experts_names_the_pair_that_stands_out():
    rows = pd.MultiIndex.from_product([[0, 1], ["sum", "sort"]], names=["layer", "language"])
    use = pd.DataFrame([[0.5, 0.5], [0.4, 0.6], [0.1, 0.9], [0.5, 0.5]], index=rows)
    figure = expert_use_map(use)
    assert "In layer 1, expert 1 gets 90% of the choices of \u201csum\u201d" in (
        figure.layout.title.text
    )
    assert [panel.z[0][1] for panel in figure.data] == [50, 90]
