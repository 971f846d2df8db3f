"""Run the notebooks and store what they print: what a reader sees before running anything.

    python notebooks/execute.py                       every notebook
    python notebooks/execute.py notebooks/07_*.ipynb  these

What is stored must be the same on every machine and after every run, or `git diff` and nbval would
report differences that mean nothing. So times, versions and widget state are left out. A widget
lives only with its kernel: where one stood, the file says so. A cell tagged `store-png` keeps a
picture of its plotly figure beside the figure's JSON, for pages that run no JavaScript.
"""

import base64
import os
import sys
import time
from pathlib import Path

import kaleido
import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

FOLDER = Path(__file__).resolve().parent
PLOTLY = "application/vnd.plotly.v1+json"
WIDGET = "application/vnd.jupyter.widget-view+json"
WIDGET_STOOD_HERE = "(Controls or a live chart: run this cell to see them.)"
LARGEST_BYTES = 400_000


def execute(path: Path) -> None:
    """Run one notebook from top to bottom in its own folder and replace it by the result.

    Raises `nbclient.exceptions.CellExecutionError` when a cell fails and ValueError when the
    result is too large; the notebook is then left as it was.
    """
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(
        notebook,
        timeout=600,
        kernel_name="python3",
        resources={"metadata": {"path": path.parent}},
        record_timing=False,
        coalesce_streams=True,
        store_widget_state=False,
    ).execute()
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    for cell in notebook.cells:
        settle(cell)
    written = nbformat.writes(notebook) + "\n"
    if len(written.encode()) >= LARGEST_BYTES:
        raise ValueError(f"{path.name} would hold {len(written):,} bytes: show fewer points")
    beside = path.with_suffix(".running")
    beside.write_text(written, encoding="utf-8")
    beside.replace(path)


def settle(cell: NotebookNode) -> None:
    """Leave only what stays true once the kernel is gone."""
    cell.metadata = {
        key: value for key, value in cell.metadata.items() if key in ("tags", "jupyter")
    }
    tags = cell.metadata.get("tags", [])
    for output in cell.get("outputs", []):
        data = output.get("data", {})
        if WIDGET in data:
            output.data = {"text/plain": WIDGET_STOOD_HERE}
        if PLOTLY in data:
            data.pop("text/html", None)
            if "store-png" in tags:
                data["image/png"] = picture(data[PLOTLY])


def picture(figure: dict) -> str:
    """A plotly figure's JSON as a PNG in base64, drawn by the Chromium that kaleido finds."""
    png = kaleido.calc_fig_sync({key: figure[key] for key in ("data", "layout")})
    return base64.b64encode(png).decode()


def main(names: list[str]) -> None:
    os.environ["HF_HUB_OFFLINE"] = "1"
    paths = [Path(name).resolve() for name in names] or sorted(FOLDER.glob("*.ipynb"))
    kaleido.start_sync_server(silence_warnings=True)
    for path in paths:
        began = time.perf_counter()
        execute(path)
        seconds, kilobytes = time.perf_counter() - began, path.stat().st_size / 1000
        print(f"{path.name:44}{seconds:6.1f} s{kilobytes:7.0f} KB", flush=True)
    kaleido.stop_sync_server()


if __name__ == "__main__":
    main(sys.argv[1:])
