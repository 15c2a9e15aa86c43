"""What a person sees, in a real browser: the graph and the run in Dagster, and the report."""

from pathlib import Path
from typing import Any

import pytest
from browser import chromium, dagster_ui, show_graph

from assets.cli import main
from pipeline.names import store_of
from pipeline.plan import load_plan
from pipeline.store import current_snapshot

pytestmark = pytest.mark.slow


@pytest.fixture
def ran(write_plan: Any, write_pairs: Any) -> Path:
    """A plan that was run; one of its prompts is an attack on whoever opens the report."""
    hostile = (
        "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>"
    )
    pairs = write_pairs()
    text = pairs.read_text().replace("what is the answer", hostile.replace('"', '\\"'))
    pairs.write_text(text)
    path: Path = write_plan()
    pairs.write_text(text)  # writing the plan wrote the harmless rows again
    assert main(["run", str(path)]) == 0
    return path


def test_dagster_shows_the_graph_and_the_run(ran: Path) -> None:
    with chromium() as browser, dagster_ui(ran) as address:
        page = browser.new_page(viewport={"width": 1900, "height": 1000})
        show_graph(page, address)
        shown = page.locator("body").inner_text()
        for asset in (
            *("raw_preferences", "preference_pairs", "quarantined_rows", "sequences"),
            *("logprobs_base", "policy_dpo", "logprobs_dpo", "reward_report_dpo"),
        ):
            assert asset in shown
        assert "reward_report_simpo" not in shown, "control: an asset that is not there"
        page.goto(f"{address}/runs", wait_until="networkidle")
        page.get_by_text("tiny_job").first.wait_for()
        assert "Success" in page.locator("body").inner_text()
        page.goto(f"{address}/assets/tiny/reward_report_dpo", wait_until="networkidle")
        page.get_by_text("splits/test/accuracy", exact=True).wait_for()


def test_the_report_opens_alone_and_runs_nothing(ran: Path) -> None:
    report = current_snapshot(store_of(load_plan(ran)), "reports/dpo", ".html").path
    with chromium() as browser:
        page = browser.new_page(viewport={"width": 390, "height": 844})
        requested: list[str] = []
        page.on("request", lambda request: requested.append(request.url))
        page.goto(report.as_uri(), wait_until="networkidle")
        assert requested == [report.as_uri()], "one file, no network"
        assert page.title() != "owned"
        assert page.locator("script").count() == 0
        assert "<script>document.title='owned'</script>" in page.locator("body").inner_text()
        assert page.get_by_role("img").count() >= 2
        width = page.evaluate("document.documentElement.scrollWidth")
        assert width <= 390, "nothing sticks out on a phone"
