"""The notebooks as they are stored: run, complete, small, and of a kind that nbval can compare.

nbval itself runs them, beside these tests. What it does not say is how little it may have looked
at: it passes over a cell without an execution count, over pictures, and over every cell tagged
`nbval-ignore-output`. So these guards count what is left, and plant a wrong digit to see it found.
"""

import copy
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from execute import LARGEST_BYTES, PLOTLY, WIDGET, WIDGET_STOOD_HERE
from nbclient import NotebookClient
from nbformat import NotebookNode

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
FEWEST_COMPARED = 3
DIGIT = re.compile(r"\d")


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def tags(cell: NotebookNode) -> list[str]:
    return cell.metadata.get("tags", [])


def printed(cell: NotebookNode) -> str:
    """The text that a cell shows: what it prints and the value of its last line."""
    texts = (out.get("text", out.get("data", {}).get("text/plain", "")) for out in cell.outputs)
    return "".join(texts)


def shows_a_view(cell: NotebookNode) -> bool:
    kinds = {kind for output in cell.outputs for kind in output.get("data", {})}
    return bool(kinds & {PLOTLY, WIDGET}) or WIDGET_STOOD_HERE in printed(cell)


def compared(cell: NotebookNode) -> bool:
    """Whether nbval compares the text of this cell."""
    return bool(cell.execution_count and printed(cell)) and "nbval-ignore-output" not in tags(cell)


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def path(request: pytest.FixtureRequest) -> Path:
    return request.param


@pytest.fixture
def notebook(path: Path) -> NotebookNode:
    return nbformat.read(path, as_version=4)


def test_title_is_a_question(notebook: NotebookNode) -> None:
    title = notebook.cells[0].source.splitlines()[0]
    assert title.startswith("# ") and title.endswith("?")


def test_was_run_whole_and_in_order(notebook: NotebookNode) -> None:
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert not [out for cell in cells for out in cell.outputs if out.output_type == "error"]


def test_stores_nothing_that_changes_from_run_to_run(path: Path, notebook: NotebookNode) -> None:
    assert path.stat().st_size < LARGEST_BYTES
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    assert notebook.metadata.kernelspec.name == "python3"
    assert not [cell.id for cell in code_cells(notebook) if "execution" in cell.metadata]


def test_views_are_not_compared_and_enough_text_is(notebook: NotebookNode) -> None:
    cells = code_cells(notebook)
    untagged = [cell for cell in cells if shows_a_view(cell) and compared(cell)]
    assert not [cell.source for cell in untagged], "tag these cells nbval-ignore-output"
    assert sum(map(compared, cells)) >= FEWEST_COMPARED


def test_titles_are_not_cut_off(notebook: NotebookNode) -> None:
    """A figure 700 pixels wide, as a narrow window or a stored picture, holds so many letters."""
    for cell in code_cells(notebook):
        for output in cell.outputs:
            title = output.get("data", {}).get(PLOTLY, {}).get("layout", {}).get("title", {})
            subtitle = title.get("subtitle", {})
            assert max(map(len, title.get("text", "").split("<br>"))) <= 86, title["text"]
            assert max(map(len, subtitle.get("text", "").split("<br>"))) <= 110, subtitle["text"]


def test_hides_nothing_from_nbval(notebook: NotebookNode) -> None:
    for cell in code_cells(notebook):
        assert "NBVAL_" not in cell.source
        assert not {"nbval-skip", "skip-execution", "raises-exception"} & set(tags(cell))


def test_installs_nothing_and_names_no_folder_of_its_author(notebook: NotebookNode) -> None:
    for cell in code_cells(notebook):
        assert not re.search(r"[!%]\s*pip|sys\.path", cell.source)
        shown = copy.deepcopy(cell.outputs)
        for output in shown:
            output.get("data", {}).pop("image/png", None)
        assert not re.search(r"/(home|root|work|tmp|Users)/", json.dumps(shown))


@pytest.mark.parametrize(
    ("name", "writes"), [("06_recipes_and_budget", "work /"), ("07_mixtral_in_4bit", "widen(")]
)
def test_what_it_writes_goes_when_its_kernel_goes(
    name: str, writes: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    notebook = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)
    sources = [cell.source if cell.cell_type == "code" else "" for cell in notebook.cells]
    first = next(index for index, source in enumerate(sources) if writes in source)
    look = nbformat.v4.new_code_cell(
        "from pathlib import Path; print(any(map(Path.is_file, work.rglob('*'))))"
    )
    notebook.cells = [*notebook.cells[: first + 1], look]
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    NotebookClient(notebook, kernel_name="python3").execute()
    assert printed(look) == "True\n"
    assert list(tmp_path.iterdir()) == []


def test_no_notebook_makes_a_folder_that_stays(notebook: NotebookNode) -> None:
    assert not [cell.source for cell in code_cells(notebook) if "tempfile" in cell.source]


def test_nbval_finds_a_planted_digit(notebook: NotebookNode, tmp_path: Path) -> None:
    cells = code_cells(notebook)
    stating = [i for i, cell in enumerate(cells) if compared(cell) and DIGIT.search(printed(cell))]
    assert stating, "no compared cell states a number"
    where = stating[0]
    notebook.cells = cells[: where + 1]  # what follows would only cost time
    nbformat.write(notebook, tmp_path / "untouched.ipynb")
    plant_digit(cells[where])
    nbformat.write(notebook, tmp_path / "planted.ipynb")

    command = [sys.executable, "-m", "pytest", "-c", ROOT / "pyproject.toml", "--rootdir", tmp_path]
    command += ["-p", "no:cacheprovider", "untouched.ipynb", "planted.ipynb"]
    report = subprocess.run(
        command,
        cwd=tmp_path,
        env=os.environ | {"TMPDIR": str(tmp_path)},  # the kernels are killed: what is left goes too
        capture_output=True,
        text=True,
    ).stdout
    failed = re.findall(r"^FAILED (\S+::Cell \d+)", report, re.M)
    assert failed == [f"planted.ipynb::Cell {where}"], report
    assert f"1 failed, {2 * where + 1} passed" in report, report


def plant_digit(cell: NotebookNode) -> None:
    """Raise one digit of what a cell shows by one: 0.37 becomes 0.38."""
    for output in cell.outputs:
        holder, key = (output, "text") if "text" in output else (output.data, "text/plain")
        holder[key], planted = DIGIT.subn(
            lambda digit: str((int(digit[0]) + 1) % 10), holder.get(key, ""), count=1
        )
        if planted:
            return
