"""The controls of the notebooks: a reader moves one, and the picture changes."""

import re
from collections.abc import Callable

import pytest
from conftest import NotebookPage
from playwright.sync_api import Locator

MOVES = {
    "app-routing": ("01_toy_moe", ".noUi-handle", "ArrowRight"),
    "app-parameters": ("01_toy_moe", ".noUi-handle", "ArrowRight"),
    "app-formats": ("02_number_formats", ".noUi-handle", "ArrowLeft"),
    "app-damage": ("03_quantize_the_experts", ".noUi-handle", "ArrowRight"),
    "app-threshold": ("03_quantize_the_experts", ".noUi-handle", "ArrowLeft"),
    "app-calibrated": ("04_calibrated_rounding", ".noUi-handle", "ArrowRight"),
    "app-shaker": ("05_expert_flips", ".noUi-handle", "ArrowRight"),
    "app-mixture": ("06_recipes_and_budget", "select", "int3"),
    "app-planner": ("06_recipes_and_budget", ".noUi-handle", "ArrowRight"),
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
        control = notebook.cell(index).locator(handle).first
        control.select_option(label=key) if handle == "select" else control.press(key)
        wait_for_another_title(chart, before)
    assert notebook.outside == [] and notebook.errors == []


def test_more_noise_flips_more_and_no_noise_nothing(
    open_notebook: Callable[[str], NotebookPage],
) -> None:
    notebook = open_notebook("05_expert_flips")
    index = notebook.tagged("app-shaker")
    for earlier in range(index + 1):
        notebook.run(earlier)
    chart = notebook.plot(index)
    chart.locator(".main-svg").first.wait_for()
    control = notebook.cell(index).locator(".widget-slider")

    def press(name: str, key: str) -> str:
        before = chart.evaluate(TITLE)
        slider = control.filter(has=notebook.page.get_by_text(name, exact=True))
        slider.locator(".noUi-handle").press(key)
        wait_for_another_title(chart, before)
        return chart.evaluate(TITLE)

    def flips(title: str) -> float:
        return float(re.search(r"([\d.]+)% of tokens flip", title)[1])

    at_first, more = flips(chart.evaluate(TITLE)), flips(press("noise", "ArrowRight"))
    one_layer = press("in layer", "ArrowRight")
    assert 0 < at_first < more and 0 < flips(one_layer) < more and "of layer 0" in one_layer
    nothing = press("noise", "Home")
    assert nothing.startswith("0% noise on router of layer 0: 0% of tokens flip, KL 0, ")
    links = chart.evaluate("chart => chart.data.find(trace => trace.type === 'sankey').link")
    assert len(links["value"]) == 8, "all choices stay with their eight experts"
    assert notebook.outside == [] and notebook.errors == []


def wait_for_another_title(chart: Locator, before: str) -> None:
    chart.page.wait_for_function(
        f"([chart, before]) => ({TITLE})(chart) !== before",
        arg=[chart.element_handle(), before],
    )
