"""The controls of the notebooks: a reader moves one, and the picture changes."""

from collections.abc import Callable

import pytest
from conftest import NotebookPage

MOVES = {
    "app-routing": ("01_toy_moe", ".noUi-handle", "ArrowRight"),
    "app-parameters": ("01_toy_moe", ".noUi-handle", "ArrowRight"),
    "app-formats": ("02_number_formats", ".noUi-handle", "ArrowLeft"),
    "app-damage": ("03_quantize_the_experts", ".noUi-handle", "ArrowRight"),
    "app-threshold": ("03_quantize_the_experts", ".noUi-handle", "ArrowLeft"),
    "app-calibrated": ("04_calibrated_rounding", ".noUi-handle", "ArrowRight"),
}
TITLE = "chart => chart.layout.title.text"


@pytest.mark.parametrize("name", sorted({notebook for notebook, *_ in MOVES.values()}))
def test_moving_a_control_changes_the_picture(
    name: str, open_notebook: Callable[[str], NotebookPage]
) -> None:
    notebook = open_notebook(name)
    cells = {notebook.tagged(tag): tag for tag, (where, *_) in MOVES.items() if where == name}
    for index in range(max(cells) + 1):
        notebook.run(index)
    assert notebook.failures() == []
    for index, tag in cells.items():
        _, handle, key = MOVES[tag]
        chart = notebook.plot(index)
        chart.locator(".main-svg").first.wait_for()
        before = chart.evaluate(TITLE)
        notebook.cell(index).locator(handle).first.press(key)
        notebook.page.wait_for_function(
            f"([chart, before]) => ({TITLE})(chart) !== before",
            arg=[chart.element_handle(), before],
        )
    assert notebook.outside == [] and notebook.errors == []
