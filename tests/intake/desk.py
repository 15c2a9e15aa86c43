"""A desk to take preference data in at: sources, a plan over them, and the tables that came out."""

import json
from pathlib import Path
from typing import Any

from pipeline.intake import IntakeResult, run_intake
from pipeline.plan import Plan
from pipeline.sources import READERS
from pipeline.store import Store

Row = dict[str, Any]


def row(prompt: str, chosen: str, rejected: str, **more: Any) -> Row:
    return {
        "prompt": [{"role": "user", "content": prompt}],
        "chosen": [{"role": "assistant", "content": chosen}],
        "rejected": [{"role": "assistant", "content": rejected}],
        **more,
    }


def lines(*rows: Row | bytes) -> bytes:
    packed = (
        r if isinstance(r, bytes) else json.dumps(r, ensure_ascii=False).encode() for r in rows
    )
    return b"".join(r + b"\n" for r in packed)


class Desk:
    """A folder of sources and a store."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.store = Store(folder / "store", "test")

    def write(self, name: str, data: bytes) -> Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        return path

    def plan(self, *sources: str, evaluation: tuple[str, ...] = (), **more: Any) -> Plan:
        """A plan over files `<source>.jsonl`, or folders of the source's name.

        A name that begins with a shape's is of that shape, others are conversational.
        """

        def config(name: str) -> Row:
            folder = self.folder / name
            shape = next((s for s in READERS if name.startswith(s)), "conversational")
            path = folder if folder.is_dir() else self.folder / f"{name}.jsonl"
            return {"path": path, "shape": shape}

        return Plan.model_validate(
            {
                "name": "test",
                "sources": {name: config(name) for name in sources},
                "evaluation": {name: config(name) for name in evaluation},
                "models": {"m": {"checkpoint": "none"}},
                **more,
            }
        )

    def run(self, *sources: str, **more: Any) -> IntakeResult:
        return run_intake(self.plan(*sources, **more), self.store)

    def ask(self, query: str) -> list[tuple[Any, ...]]:
        """The published tables, by an engine that is not ours."""
        import duckdb

        with duckdb.connect() as connection:
            for name in ("rows", "pairs", "quarantine"):
                file = str(self.store.current(name)).replace("'", "''")
                connection.execute(f"create view {name} as from read_parquet('{file}')")
            return connection.execute(query).fetchall()


GOOD = [row(f"question {i}?", f"yes {i}", f"no {i}", kind="good") for i in range(5)]
