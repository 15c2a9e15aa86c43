"""Fixtures: stores, a tiny random model and its tokeniser, the packaged model, plans over them."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

# Two cores are there; more threads than that only get into each other's way.
os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from desk import Desk
from fake_engine import FakeEngine
from support import PROJECT, build_tiny_model
from tokens import load

from pipeline.models import Checkpoint, resolve
from pipeline.plan import ModelConfig
from pipeline.store import Store
from pipeline.tokenization import sequence_id
from schemas import Sequence as SequenceTable
from schemas import polars_schema


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A file's tests go to one process, which makes its fixtures once; all of vLLM's to the same.

    Two engines at once would take each other's cores and memory.
    """
    for item in items:
        engine = item.path.name.startswith("test_vllm")
        item.add_marker(pytest.mark.xdist_group("vllm" if engine else str(item.path)))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store", "test")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def packaged_model(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """The packaged small model; the demo's copy is taken when it is there."""
    made = Store(PROJECT / "store", "test")
    if not made.models.exists():
        made = Store(tmp_path_factory.mktemp("packaged"), "test")
    return resolve(ModelConfig(checkpoint="packaged:smollm2-135m-instruct"), made)


@pytest.fixture
def tokenizer(tiny_model: Path) -> Any:
    return load(tiny_model)


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path)


@pytest.fixture
def fake_engine() -> FakeEngine:
    return FakeEngine()


WritePlan = Callable[..., Path]


@pytest.fixture
def write_pairs(tmp_path: Path) -> Callable[..., Path]:
    """Write conversational pairs: `n` of them, or the given rows, to a JSON-lines file."""

    def write(n: int = 12, rows: list[dict[str, Any]] | None = None, name: str = "p.jsonl") -> Path:
        rows = rows or [
            {
                "prompt": [{"role": "user", "content": f"what is {i}, and what is {i}?"}],
                "chosen": [{"role": "assistant", "content": f"the answer is {i}"}],
                "rejected": [{"role": "assistant", "content": f"it depends on what was asked {i}"}],
                "category": "even" if i % 2 == 0 else "odd",
            }
            for i in range(n)
        ]
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return write


@pytest.fixture
def write_labels(tmp_path: Path) -> Callable[..., dict[str, str]]:
    """Write n labels (or the given rows), two of three desirable; returns the plan's source."""

    def label(i: int) -> dict[str, Any]:
        said = f"it is {i} because" if i % 2 else f"that depends: {i}"
        return {
            "prompt": [{"role": "user", "content": f"why is it {i}?"}],
            "completion": [{"role": "assistant", "content": said}],
            "label": i % 3 > 0,
        }

    def write(
        n: int = 20, rows: list[dict[str, Any]] | None = None, name: str = "labels.jsonl"
    ) -> dict[str, str]:
        path = tmp_path / name
        rows = rows or [label(i) for i in range(n)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return {"path": str(path), "shape": "unpaired"}

    return write


@pytest.fixture
def write_plan(tmp_path: Path, tiny_model: Path, write_pairs: Callable[..., Path]) -> WritePlan:
    """Write a plan over the tiny model; keyword arguments replace its top-level sections."""
    import yaml

    def write(**sections: Any) -> Path:
        plan = {
            "name": "tiny",
            "store": str(tmp_path / "store"),
            "sources": {"pairs": {"path": str(write_pairs()), "shape": "conversational"}},
            "split": {"test_share": 0.25},
            "models": {"base": {"checkpoint": str(tiny_model)}},
            "objectives": {
                "dpo": {"loss": "dpo", "beta": 0.1, "reference": "base", "start": "base"}
            },
            "training": {"epochs": 1, "batch_pairs": 4, "learning_rate": 1e-3},
            **sections,
        }
        path = tmp_path / "plan.yaml"
        path.write_text(yaml.safe_dump(plan))
        return path

    return write


@pytest.fixture(scope="session")
def write_sequences() -> pl.DataFrame:
    """A `sequences` table of twelve sequences under six prompts, over the tiny vocabulary."""
    generator = np.random.default_rng(7)
    rows = []
    for _ in range(6):
        prompt = generator.integers(3, 300, generator.integers(3, 20)).astype(np.int32)
        for _ in range(2):
            ids = generator.integers(3, 300, generator.integers(1, 12)).astype(np.int32)
            spans = [(0, len(ids))]
            rows.append(
                {
                    "sequence_id": sequence_id(prompt, ids, spans),
                    "prompt_ids": prompt,
                    "completion_ids": ids,
                    "spans": [{"start": 0, "end": len(ids)}],
                    "n_prompt": len(prompt),
                    "n_scored": len(ids),
                    "truncated": False,
                }
            )
    return pl.DataFrame(rows, schema=polars_schema(SequenceTable)).sort("sequence_id")
