"""Files of labelled completions."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def write_labels(tmp_path: Path) -> Callable[..., dict[str, str]]:
    """Write n labels (or the given rows), two of three desirable; returns the plan's source."""

    def write(
        n: int = 20, rows: list[dict[str, Any]] | None = None, name: str = "labels.jsonl"
    ) -> dict[str, str]:
        rows = rows or [
            label(f"why is it {i}?", f"it is {i} because" if i % 2 else f"that depends: {i}", i % 3)
            for i in range(n)
        ]
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return {"path": str(path), "shape": "unpaired"}

    return write


def label(prompt: str, completion: str, desirable: object) -> dict[str, Any]:
    return {
        "prompt": [{"role": "user", "content": prompt}],
        "completion": [{"role": "assistant", "content": completion}],
        "label": bool(desirable),
    }
