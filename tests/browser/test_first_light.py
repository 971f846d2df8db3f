"""What a reader sees in JupyterLab: the first notebook runs, and memory is drawn while it grows."""

import time
from collections.abc import Callable

from conftest import NotebookPage


def test_first_notebook_runs_in_the_page(open_notebook: Callable[[str], NotebookPage]) -> None:
    notebook = open_notebook("00_start_here")
    notebook.run_all()
    assert notebook.failures() == []
    assert notebook.outside == [] and notebook.errors == []


def test_memory_chart_grows_while_mixtral_loads(
    open_notebook: Callable[[str], NotebookPage],
) -> None:
    notebook = open_notebook("07_mixtral_in_4bit")
    chart, load = notebook.tagged("memory-chart"), notebook.tagged("load")
    assert chart < load, "a chart is redrawn during a cell only if an earlier cell shows it"
    for index in range(load):
        notebook.run(index)
    notebook.plot(chart).locator(".main-svg").first.wait_for()

    points = []
    notebook.start(load)
    while notebook.running():
        points.append(notebook.points(chart))
        time.sleep(0.05)
    assert notebook.failures() == []
    assert points == sorted(points) and len(set(points)) >= 3, f"did not grow: {points}"
    assert notebook.outside == [] and notebook.errors == []


def test_sliders_move_the_cache(open_notebook: Callable[[str], NotebookPage]) -> None:
    notebook = open_notebook("07_mixtral_in_4bit")
    controls = notebook.tagged("kv-cache")
    imports, recipe, weights = 1, 3, controls - 2
    for index in (imports, recipe, weights, controls):
        notebook.run(index)
    chart = notebook.plot(controls)
    chart.locator(".main-svg").first.wait_for()

    def title() -> str:
        return chart.evaluate("chart => chart.layout.title.text")

    seen = [title()]
    for slider in (0, 1):
        notebook.cell(controls).locator(".noUi-handle").nth(slider).press("ArrowRight")
        notebook.page.wait_for_function(
            "([chart, before]) => chart.layout.title.text !== before",
            arg=[chart.element_handle(), seen[-1]],
        )
        seen.append(title())
    assert seen[0].startswith("a 24 GiB card is full after 9,805 tokens")
    assert "65,536 tokens" in seen[1]
    assert "a 24 GiB card is full after 4,902 tokens" in seen[2]
    assert notebook.outside == [] and notebook.errors == []
