"""The live chart holds what was recorded, and its title is the finding."""

import itertools
from array import array
from dataclasses import replace

import numpy as np
import plotly.graph_objects as go
import pytest
from hypothesis import given
from hypothesis import strategies as st

from labutils.memory_chart import memory_chart, thin
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
