"""A JupyterLab page driven by a real browser, on a throw-away copy of the notebooks."""

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Locator, Page, Route, sync_playwright

ROOT = Path(__file__).resolve().parents[2]
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
PATIENCE_SECONDS = 180  # a busy machine is slow, not broken

PANEL = "window.jupyterapp.shell.currentWidget"
KERNEL_STATUS = "window.jupyterapp?.shell?.currentWidget?.sessionContext?.session?.kernel?.status"

# Every cell stays in the page, however far it is scrolled away, so that tests can look at it.
SETTINGS = {"@jupyterlab/notebook-extension/tracker": {"windowingMode": "none"}}


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """Chromium; without one the tests are skipped, but on CI that is a failure."""
    found = filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome")))
    chromium = os.environ.get("CHROMIUM") or next(found, None)
    if chromium is None:
        give_up = pytest.fail if os.environ.get("CI") == "true" else pytest.skip
        give_up("no Chromium: `sudo apt-get install chromium`, or set CHROMIUM=/path/to/it")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """The address and the token of a JupyterLab on loopback that holds copies of the notebooks."""
    folder = tmp_path_factory.mktemp("lab")
    shutil.copytree(ROOT / "notebooks", folder / "notebooks")
    for plugin, values in SETTINGS.items():
        file = folder / "settings" / f"{plugin}.jupyterlab-settings"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(values))
    token, port = secrets.token_hex(16), free_port()
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root"]
    command += ["--ip=127.0.0.1", f"--port={port}", "--ServerApp.port_retries=0"]
    command += [f"--ServerApp.root_dir={folder}", f"--LabApp.user_settings_dir={folder}/settings"]
    command += ["--LanguageServerManager.autodetect=False", "--LabApp.news_url=None"]
    command += ["--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate"]
    command += ["--expose-app-in-browser"]
    places = ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR")
    environment = os.environ | {place: str(folder / place) for place in places}
    environment["JUPYTER_TOKEN"] = token
    log = folder / "lab.log"
    with log.open("w") as stream:
        server = subprocess.Popen(command, env=environment, stdout=stream, stderr=stream)
    url = f"http://127.0.0.1:{port}"
    try:
        wait_until_it_answers(f"{url}/api/status?token={token}", server, log)
        yield url, token
    finally:
        server.terminate()
        server.wait(PATIENCE_SECONDS)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_until_it_answers(address: str, server: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < deadline and server.poll() is None:
        try:
            urllib.request.urlopen(address, timeout=2).close()
            return
        except OSError:
            time.sleep(0.2)
    pytest.fail(f"JupyterLab did not start:\n{log.read_text()[-3000:]}")


class NotebookPage:
    """One notebook, open in the page with its kernel running; cells are named by their index.

    `outside` records requests that would have left the machine, all of them refused, and `errors`
    what the page itself complains about.
    """

    def __init__(self, page: Page, url: str, token: str, name: str) -> None:
        self.page, self.host = page, url.removeprefix("http")
        self.outside: list[str] = []
        self.errors: list[str] = []
        page.route("**/*", self._let_stay)
        page.on("websocket", lambda socket: self._is_outside(socket.url))
        page.on("console", lambda line: line.type == "error" and self.errors.append(line.text))
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.goto(f"{url}/lab/tree/notebooks/{name}.ipynb?token={token}&reset")
        page.wait_for_function(f"() => {KERNEL_STATUS} === 'idle'")

    def _is_outside(self, address: str) -> bool:
        scheme, rest = address.split(":", 1)
        outside = scheme not in ("data", "blob") and not f":{rest}".startswith(self.host)
        if outside:
            self.outside.append(address)
        return outside

    def _let_stay(self, route: Route) -> None:
        route.abort() if self._is_outside(route.request.url) else route.continue_()

    def tagged(self, tag: str) -> int:
        """The only cell with this tag."""
        tags = self.page.evaluate(
            f"() => {PANEL}.content.widgets.map(cell => cell.model.getMetadata('tags') ?? [])"
        )
        (index,) = [index for index, names in enumerate(tags) if tag in names]
        return index

    def start(self, index: int) -> None:
        """Run one cell without waiting for its end."""
        self.page.evaluate(
            f"""index => {{
                {PANEL}.content.activeCellIndex = index;
                window.running = true;
                window.jupyterapp.commands.execute('notebook:run-cell')
                    .finally(() => {{ window.running = false; }});
            }}""",
            index,
        )

    def running(self) -> bool:
        return self.page.evaluate("() => window.running")

    def run(self, index: int) -> None:
        self.start(index)
        self.page.wait_for_function("() => !window.running")

    def run_all(self) -> None:
        for index in range(self.page.evaluate(f"() => {PANEL}.content.widgets.length")):
            self.run(index)

    def failures(self) -> list[str]:
        """The source of each cell that ended in an error."""
        return self.page.evaluate(
            f"""() => {PANEL}.content.widgets
                .filter(cell => cell.model.type === 'code' && cell.model.outputs.toJSON()
                    .some(output => output.output_type === 'error'))
                .map(cell => cell.model.sharedModel.source)"""
        )

    def cell(self, index: int) -> Locator:
        """One cell as it stands in the page, with its outputs."""
        cells = self.page.locator(".jp-NotebookPanel:not(.lm-mod-hidden) .jp-Notebook .jp-Cell")
        return cells.nth(index)

    def plot(self, index: int) -> Locator:
        """The plotly chart that a cell shows."""
        return self.cell(index).locator(".js-plotly-plot")

    def points(self, index: int) -> int:
        """How many points the chart of a cell has now, over all its traces."""
        return self.plot(index).evaluate(
            "chart => chart.data.reduce((sum, trace) => sum + (trace.x ?? []).length, 0)"
        )


@pytest.fixture
def open_notebook(
    browser: Browser, lab: tuple[str, str]
) -> Iterator[Callable[[str], NotebookPage]]:
    """Opens a notebook by its name, without folder and suffix."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    context.set_default_timeout(PATIENCE_SECONDS * 1000)
    yield lambda name: NotebookPage(context.new_page(), *lab, name)
    context.close()
