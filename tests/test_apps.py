"""Apps are driven without a browser: record, and read the figure's data."""

import threading
import time
from collections.abc import Callable

import plotly.graph_objects as go
import pytest

from labutils import apps
from labutils.apps import ErrorLine, live_memory, redraw
from labutils.meter import MIB, Meter, mark
from labutils.style import changeable

GIB = 2**30


def eventually(holds: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 10
    while not holds() and time.monotonic() < deadline:
        time.sleep(0.02)
    return holds()


# ------------------------------------------------------------------------------------ live memory


def test_chart_grows_while_a_run_records() -> None:
    meter = Meter()
    chart, errors = live_memory(meter).children
    assert chart.layout.title.text == "Nothing recorded yet"
    with meter("load in NF4", predicted_bytes=MIB):
        assert eventually(lambda: len(chart.data[0].x) > 0)
        during = len(chart.data[0].x)
        assert "so far" in chart.layout.title.text
        mark("quantize")
        assert eventually(lambda: len(chart.data[0].x) > during)
        assert eventually(lambda: "quantize" in (chart.data[-1].y or ()))
    assert len(chart.data[0].x) == len(meter.samples), "the end of a run is drawn too"
    assert "kept" in chart.layout.title.text
    assert errors.value == "" and meter.listener_error is None


def test_second_run_is_drawn_in_the_same_chart() -> None:
    meter = Meter()
    chart, _ = live_memory(meter).children
    bands = []
    for label in ("first", "second"):
        with meter(label):
            pass
        bands.append([shape.type for shape in chart.layout.shapes].count("rect"))
        assert chart.layout.title.text.startswith(label)
    assert bands == [1, 2]
    assert [note.text for note in chart.layout.annotations] == ["second", "first"]


def test_chart_made_later_shows_what_was_recorded_before() -> None:
    meter = Meter()
    with meter("before"):
        pass
    chart, _ = live_memory(meter).children
    assert chart.layout.title.text.startswith("before")


def test_failed_drawing_is_shown_and_keeps_the_last_good_picture(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*arguments: object) -> None:
        raise ValueError("no <paint> left")

    meter = Meter()
    chart, errors = live_memory(meter).children
    with meter("good"):
        pass
    points = len(chart.data[0].x)
    with monkeypatch.context() as patched:
        patched.setattr(apps, "memory_chart", fail)
        with meter("not drawn"):
            pass
    assert "ValueError: no &lt;paint&gt; left" in errors.value
    assert chart.layout.title.text.startswith("good") and len(chart.data[0].x) == points
    with meter("drawn again"):
        pass
    assert errors.value == "" and len(meter.runs) == 3


# -------------------------------------------------------------------------------------- the parts


def test_error_line_lets_an_interrupt_through() -> None:
    line = ErrorLine()
    with pytest.raises(KeyboardInterrupt), line.shown():
        raise KeyboardInterrupt
    assert line.value == ""


def points(count: int) -> go.Figure:
    shapes = [{"type": "line", "x0": i, "x1": i, "y0": 0, "y1": 1} for i in range(count)]
    return go.Figure(
        [go.Scatter(y=list(range(count)))], {"title": {"text": str(count)}, "shapes": shapes}
    )


def test_redraw_takes_over_data_and_layout_and_leaves_the_zoom() -> None:
    shown = changeable(points(3))
    shown.layout.xaxis.range = [0, 1]
    redraw(shown, points(2))
    assert list(shown.data[0].y) == [0, 1] and shown.layout.title.text == "2"
    assert len(shown.layout.shapes) == 2
    assert shown.layout.xaxis.range == (0, 1)


def test_redraw_of_another_figure_is_refused() -> None:
    with pytest.raises(ValueError, match="shorter"):
        redraw(changeable(points(2)), go.Figure())


def test_redraws_from_several_threads_are_each_whole() -> None:
    shown, broken = changeable(points(1)), []

    def draw(offset: int) -> None:
        for count in range(1 + offset, 60, 4):
            redraw(shown, points(count))
            with apps._DRAWING:
                if len(shown.data[0].y) != int(shown.layout.title.text):
                    broken.append(count)

    threads = [threading.Thread(target=draw, args=(offset,)) for offset in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not broken


def test_the_cache_app_follows_its_controls():
    box = apps.kv_cache(2 * GIB, 2**17, {"a card": 8 * GIB})
    controls, chart, errors = box.children
    context, batch = controls.children
    assert chart.layout.title.text == "a card has room for all 32,768 tokens"
    batch.value = 4
    assert chart.layout.title.text == "a card is full after 12,288 tokens"
    context.value = 2**12
    assert chart.data[1].y[-1] == 2.0
    assert errors.value == ""
