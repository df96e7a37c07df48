"""A real JupyterLab in a subprocess and a headless Chromium that may talk to it and to nothing else."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest

ROOT = Path(__file__).parents[2]
CHROMIUM = os.environ.get("NBDYN_CHROMIUM") or shutil.which("chromium") or "/usr/bin/chromium"
# Without these the browser itself asks the network for updates, lists and time.
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--no-first-run",
]  # fmt: skip
KERNELSPEC = {"name": "python3", "display_name": "Python 3 (ipykernel)", "language": "python"}


def poll(ask: Callable[[], Any], what: str, seconds: float = 60) -> Any:
    """The first true answer of `ask`; fails, naming what was awaited, when there is none in time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        answer = ask()
        if answer:
            return answer
        time.sleep(0.03)
    pytest.fail(f"waited {seconds} s in vain for: {what}")


class Lab:
    """One JupyterLab server with its own folder, configuration and runtime files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "work"
        self.folder.mkdir()
        news = folder / "settings" / "@jupyterlab" / "apputils-extension" / "notification.jupyterlab-settings"
        news.parent.mkdir(parents=True)
        news.write_text('{"fetchNews": "false", "checkForUpdates": false}')  # else a question lies over the page
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.url = f"http://127.0.0.1:{free.getsockname()[1]}"
        env = os.environ | {
            "JUPYTER_CONFIG_DIR": str(folder / "config"),
            "JUPYTER_DATA_DIR": str(folder / "data"),
            "JUPYTER_RUNTIME_DIR": str(folder / "runtime"),
            "JUPYTERLAB_SETTINGS_DIR": str(folder / "settings"),
            "JUPYTERLAB_WORKSPACES_DIR": str(folder / "workspaces"),
            "IPYTHONDIR": str(folder / "ipython"),
            "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
        }
        self.log = (folder / "lab.log").open("w")
        self.process = subprocess.Popen(
            [
                sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--expose-app-in-browser",
                f"--ServerApp.port={self.url.rpartition(':')[2]}", "--ServerApp.port_retries=0",
                "--ServerApp.ip=127.0.0.1", f"--ServerApp.root_dir={self.folder}",
                "--IdentityProvider.token=", "--PasswordIdentityProvider.hashed_password=",
                "--LabApp.news_url=None",
                "--LabApp.check_for_updates_class=jupyterlab.handlers.announcements.NeverCheckForUpdate",
            ],
            env=env, stdout=self.log, stderr=subprocess.STDOUT,
        )  # fmt: skip
        poll(self._answers, "JupyterLab to answer")

    def _answers(self) -> bool:
        if self.process.poll() is not None:
            pytest.fail(f"JupyterLab ended:\n{Path(self.log.name).read_text()}")
        try:
            with urllib.request.urlopen(f"{self.url}/api/status", timeout=5) as reply:
                return reply.status == 200
        except (urllib.error.URLError, ConnectionError):
            return False

    def write(self, name: str, *cells: str) -> None:
        """Put a notebook of code cells into the server's folder."""
        notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
        notebook.metadata["kernelspec"] = KERNELSPEC
        nbformat.write(notebook, self.folder / name)

    def read(self, name: str) -> nbformat.NotebookNode:
        """A notebook as it lies on disk."""
        return nbformat.read(self.folder / name, as_version=4)

    def stop(self) -> None:
        """End the server and its kernels."""
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.log.close()


class Page:
    """A browser page on one notebook."""

    def __init__(self, lab: Lab, page: Any) -> None:
        self.lab, self.page, self.name = lab, page, ""

    def open(self, name: str) -> None:
        """Open a notebook and wait until its kernel is idle."""
        self.name = name
        self.page.goto(f"{self.lab.url}/lab/tree/{name}?reset")
        idle = "() => window.jupyterapp?.shell.currentWidget?.sessionContext?.session?.kernel?.status === 'idle'"
        poll(lambda: self.page.evaluate(idle), f"an idle kernel for {name}")

    def command(self, name: str, **arguments: Any) -> None:
        """Start a command of JupyterLab without waiting for its end."""
        self.page.evaluate("([name, args]) => { window.jupyterapp.commands.execute(name, args) }", [name, arguments])

    def select(self, index: int) -> None:
        """Make a cell the active one."""
        self.page.evaluate("(i) => { window.jupyterapp.shell.currentWidget.content.activeCellIndex = i }", index)

    def counts(self) -> list[int | None]:
        """The execution counts of the code cells; None for one that has not ended."""
        return self.page.evaluate(
            "() => [...window.jupyterapp.shell.currentWidget.content.model.cells]"
            ".filter((c) => c.type === 'code')"
            ".map((c) => (c.executionState ?? 'idle') === 'idle' ? c.executionCount : null)"
        )

    def trouble(self) -> str:
        """The errors that the cells of the notebook show."""
        return self.page.evaluate(
            "() => [...window.jupyterapp.shell.currentWidget.content.model.cells]"
            ".flatMap((c) => c.toJSON().outputs ?? []).filter((o) => o.output_type === 'error')"
            ".map((o) => o.traceback.join('\\n')).join('\\n')"
        )

    def digests(self) -> list[dict[str, Any] | None]:
        """What each cockpit on the page says that it has drawn."""
        texts = self.page.evaluate(
            "() => [...document.querySelectorAll('.nbdyn-cockpit')].map((c) => c.dataset.digest)"
        )
        return [json.loads(text) if text else None for text in texts]

    def digest(self) -> dict[str, Any] | None:
        """The last of them."""
        return (self.digests() or [None])[-1]

    def theme(self, name: str) -> None:
        """Change JupyterLab's theme and wait until the page has it."""
        self.command("apputils:change-theme", theme=name)
        poll(lambda: self.page.evaluate("() => document.body.dataset.jpThemeName") == name, f"the theme {name}")
        poll(lambda: self.page.locator("#jupyterlab-splash").count() == 0, "the splash screen to go")

    def save(self) -> nbformat.NotebookNode:
        """Save the notebook and read it from disk."""
        self.page.evaluate("() => window.jupyterapp.commands.execute('docmanager:save')")
        clean = "() => !window.jupyterapp.shell.currentWidget.context.model.dirty"
        poll(lambda: self.page.evaluate(clean), "the notebook to be saved")
        return self.lab.read(self.name)

    def picture(self, path: Path) -> None:
        """A screenshot of the last cockpit."""
        self.page.locator(".nbdyn-cockpit").last.screenshot(path=path)


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    pytest.importorskip("jupyterlab", reason="needs the extra `browser`: jupyterlab")
    server = Lab(tmp_path_factory.mktemp("lab"))
    yield server
    server.stop()


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    if not Path(CHROMIUM).exists():
        pytest.skip(f"no browser at {CHROMIUM}; install chromium or name one in NBDYN_CHROMIUM")
    playwright = pytest.importorskip("playwright.sync_api", reason="needs the extra `browser`: playwright")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def page(lab: Lab, chromium: Any) -> Iterator[Page]:
    """A page whose requests to anything but the server are stopped; that there was none is checked at the end."""
    strangers: list[str] = []

    def gate(route: Any) -> None:
        if route.request.url.startswith(lab.url):
            route.continue_()
        else:
            strangers.append(route.request.url)
            route.abort()

    context = chromium.new_context(viewport={"width": 1200, "height": 1400}, device_scale_factor=2)

    def socket_opened(opened: Any) -> None:  # web sockets pass no route
        if not opened.url.startswith(lab.url.replace("http", "ws", 1)):
            strangers.append(opened.url)

    context.route(lambda url: not url.startswith(("data:", "blob:")), gate)
    tab = context.new_page()
    tab.on("websocket", socket_opened)
    yield Page(lab, tab)
    context.close()
    assert strangers == []


@pytest.fixture
def screenshots(tmp_path: Path) -> Path:
    folder = Path(os.environ.get("NBDYN_SCREENSHOTS") or tmp_path)
    folder.mkdir(parents=True, exist_ok=True)
    return folder
