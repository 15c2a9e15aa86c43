"""A real browser over Dagster's UI and the report; run as a script, it takes the docs' pictures.

python tests/browser.py PLAN PICTURES
"""

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from playwright.sync_api import Browser, Page, sync_playwright

from pipeline.names import store_of
from pipeline.plan import load_plan
from pipeline.store import current_snapshot

PROJECT = Path(__file__).resolve().parent.parent

_QUIET = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--hide-scrollbars"),
]


@contextlib.contextmanager
def chromium() -> Iterator[Browser]:
    """Debian's Chromium, headless.

    Raises:
        FileNotFoundError: it is not installed; names the package.
    """
    executable = shutil.which("chromium")
    if executable is None:
        raise FileNotFoundError("the Debian package 'chromium' is missing: make system-deps")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=_QUIET)
        try:
            yield browser
        finally:
            browser.close()


@contextlib.contextmanager
def dagster_ui(plan: Path) -> Iterator[str]:
    """Dagster's web server over the plan's own instance; yields its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    home = load_plan(plan).store / "dagster"
    server = subprocess.Popen(
        [
            *(sys.executable, "-m", "dagster_webserver", "-h", "127.0.0.1", "-p", str(port)),
            *("-w", str(PROJECT / "workspace.yaml")),
        ],
        env={**os.environ, "DAGSTER_HOME": str(home), "LOGRATIO_PLANS": str(plan)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(240):
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"{address}/server_info", timeout=2)
                break
            time.sleep(0.5)
        yield address
    finally:
        server.terminate()
        server.wait(30)


def show_graph(page: Page, address: str, zoom_out: int = 2) -> None:
    """The lineage page with every group opened."""
    groups = ",".join(f"global@global:{g}" for g in ("intake", "scoring", "training", "report"))
    page.goto(f"{address}/asset-groups?expanded={groups}", wait_until="networkidle")
    page.wait_for_timeout(2000)  # it flies into place
    for _ in range(zoom_out):
        page.get_by_role("button", name="zoom_out", exact=True).last.click()
        page.wait_for_timeout(700)


def take_pictures(plan: Path, pictures: Path) -> None:
    """The graph and the report, as the README shows them."""
    store = store_of(load_plan(plan))
    name = next(iter(load_plan(plan).objectives))
    report = current_snapshot(store, f"reports/{name}", ".html").path
    pictures.mkdir(parents=True, exist_ok=True)
    with chromium() as browser, dagster_ui(plan) as address:
        page = browser.new_page(viewport={"width": 1900, "height": 1500})
        show_graph(page, address, zoom_out=3)
        page.screenshot(path=pictures / "graph.png")
        page = browser.new_page(viewport={"width": 1100, "height": 1500})
        page.goto(report.as_uri())
        page.screenshot(path=pictures / "report.png")


if __name__ == "__main__":
    take_pictures(Path(sys.argv[1]), Path(sys.argv[2]))
