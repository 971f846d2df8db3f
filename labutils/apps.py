"""Controls wired to computations and figures: what moves under the reader's hand, or by itself.

An app is a box with its controls on top, one figure, and a line that says what went wrong. The
figure is a widget that is made once and then changed in place, since each new one ships its own
copy of plotly to the page. A module below computes, `figures` draws, `redraw` carries the picture
into the widget, and an `ErrorLine` shows what Jupyter would swallow, while the last good picture
stays. An app can be driven without a browser: set a control's `.value`, read the figure's `.data`.
"""

from __future__ import annotations

import html
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import ipywidgets as widgets

from .figures import cache_growth
from .memory_chart import memory_chart
from .meter import Meter, Record
from .style import Figure, FigureWidget, changeable

_DRAWING = threading.Lock()


class ErrorLine(widgets.HTML):
    """The place under an app that says what went wrong, and is empty while all is well.

    >>> line = ErrorLine()
    >>> with line.shown():
    ...     int("seven")
    >>> "invalid literal" in line.value
    True
    """

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Shows here what the block raises, instead of raising it; without that, clears the line.

        KeyboardInterrupt and its like still go through.
        """
        try:
            yield
        except Exception as error:
            message = html.escape(f"{type(error).__name__}: {error}")
            self.value = f'<pre style="color: #A4262C; white-space: pre-wrap">{message}</pre>'
        else:
            self.value = ""


def redraw(shown: FigureWidget, figure: Figure) -> None:
    """Changes the shown figure into `figure`, which has the same traces, in one step.

    The reader's zoom stays where `figure` sets no range. Threads may call this at the same time:
    without taking turns they would lose each other's changes. The template is left as it is, since
    comparing it costs a quarter of a second.

    Raises ValueError if the number of traces differs.
    """
    layout = figure.layout.to_plotly_json()
    lists = {name: layout.pop(name, ()) for name in ("shapes", "annotations")}
    layout.pop("template", None)
    with _DRAWING, shown.batch_update():
        for old, new in zip(shown.data, figure.data, strict=True):
            old.update(new.to_plotly_json())
        shown.layout.update(layout)
        for name, items in lists.items():
            shown.layout[name] = items


def live_memory(meter: Meter) -> widgets.VBox:
    """A chart of what `meter` records, which grows while other cells run.

    Show it in one cell and record in later ones: a page redraws during a cell only what an earlier
    cell has shown. It is redrawn at most 5 times a second and at the end of each run; see
    `figures.memory_chart` for what it shows. What goes wrong in drawing stands below the chart,
    and the recording goes on. The chart's own data counts too: about 1 MiB in the first run, a
    quarter of it in later ones.

    Example, two cells:

        meter = Meter()
        live_memory(meter)

        with meter("load in NF4", predicted_bytes=budget.total_bytes):
            model = load(path, recipe)
    """
    chart = changeable(_chart_of(meter.record()))
    errors = ErrorLine()

    def draw(record: Record) -> None:
        with errors.shown():
            redraw(chart, _chart_of(record))

    meter.listen(draw)
    return widgets.VBox([chart, errors])


def _chart_of(record: Record) -> Figure:
    return memory_chart(record.samples, record.runs)


def kv_cache(weights_bytes: int, token_bytes: int, rooms: dict[str, int]) -> widgets.VBox:
    """Weights and KV cache under the reader's hand: how long a context, how many sequences.

    `token_bytes` is what one token of one sequence adds; `rooms` are the memories to hold it
    against, in bytes by name. It starts with one sequence of 32,768 tokens.

    Example: `kv_cache(budget.weights_bytes, kv_cache_bytes(config, 1), {"24 GiB": 24 * 2**30})`.
    """
    context = widgets.SelectionSlider(
        options=[(f"{2**power:,}", 2**power) for power in range(9, 18)],
        value=2**15,
        description="context",
        continuous_update=False,
    )
    batch = widgets.IntSlider(1, 1, 32, description="sequences", continuous_update=False)

    def picture() -> Figure:
        return cache_growth(weights_bytes, token_bytes * batch.value, context.value, rooms)

    chart, errors = changeable(picture()), ErrorLine()

    def draw(_change) -> None:
        with errors.shown():
            redraw(chart, picture())

    for control in (context, batch):
        control.observe(draw, names="value")
    return widgets.VBox([widgets.HBox([context, batch]), chart, errors])
