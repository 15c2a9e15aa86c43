"""The pages of docs/ that are made from the code, or run it."""

import re
from pathlib import Path

import pytest
from support import PROJECT

from pipeline.losses import NOT_YET, REGISTRY
from pipeline.losses.document import page

BLOCK = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def run(text: str, name: str) -> int:
    """Run a page's Python in one go, its lines numbered as in the page."""
    namespace: dict[str, object] = {"__name__": name}
    blocks = list(BLOCK.finditer(text))
    for block in blocks:
        above = text[: block.start(1)].count("\n")
        exec(compile("\n" * above + block[1], name, "exec"), namespace)
    return len(blocks)


def test_the_code_of_the_theory_page_runs_and_what_it_asserts_holds() -> None:
    text = (PROJECT / "docs" / "theory.md").read_text()
    assert run(text, "theory.md") > 10
    order = [
        *("KL-regularised objective", "Bradley-Terry", "closed-form optimum"),
        *("reward re-parameterisation", "Z cancels", "DPO loss", "implicit reward"),
        *("gradient and its weight", "DPO beside RLHF", "IPO", "SimPO", "KTO"),
    ]
    headings = [line for line in text.splitlines() if line.startswith("## ")]
    assert [heading.partition(". ")[2].lower() for heading in headings[: len(order)]] == [
        heading.lower() for heading in order
    ]
    with pytest.raises(AssertionError):
        run(text.replace("dpo_beta = beta", "dpo_beta = 2 * beta"), "control")


def test_the_table_of_losses_is_the_registrys() -> None:
    text = (PROJECT / "docs" / "losses.md").read_text()
    assert text == page(), "python -m pipeline.losses.document docs/losses.md"
    for name, spec in REGISTRY.items():
        assert f"`{name}`" in text
        assert spec.paper.replace("|", "\\|") in text
    assert all(name in text for name in NOT_YET)


def test_the_table_follows_the_registry(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    before = page()
    monkeypatch.delitem(REGISTRY, "dpop")
    assert page() != before
    assert "`dpop`" not in page()
