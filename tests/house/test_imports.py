"""Who may import whom, read from the source; and that the code location loads without the heavy
libraries."""

import ast
import importlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import PROJECT

OURS = {"schemas", "pipeline", "assets"}
HEAVY = {"torch", "vllm", "transformers", "peft"}


def modules(package: str) -> dict[str, Path]:
    """Dotted names of a package's modules and their files."""
    names = {}
    for path in sorted((PROJECT / package).rglob("*.py")):
        parts = path.relative_to(PROJECT).with_suffix("").parts
        names[".".join(part for part in parts if part != "__init__")] = path
    return names


def imported(tree: ast.AST) -> Iterator[str]:
    """Top-level packages a tree imports, wherever in it; a relative import is ''."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield "" if node.level else (node.module or "").partition(".")[0]


def run_at_import(tree: ast.AST) -> Iterator[ast.stmt]:
    """The statements that importing a module runs: all but functions' and TYPE_CHECKING's."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for otherwise in node.orelse:
                yield otherwise
                yield from run_at_import(otherwise)
            continue
        if isinstance(node, ast.stmt):
            yield node
        yield from run_at_import(node)


def forbidden_arrows(package: str, source: str) -> set[str]:
    """What a module of `package` imports and may not."""
    allowed = {"schemas": {"schemas"}, "pipeline": {"schemas", "pipeline"}, "assets": OURS}
    forbidden = OURS - allowed[package]
    if package != "assets":
        forbidden |= {"dagster", "dagster_webserver"}
    return forbidden & set(imported(ast.parse(source)))


def heavy_at_import(source: str) -> set[str]:
    return {
        name
        for node in run_at_import(ast.parse(source))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in imported(node)
    } & HEAVY


def postpones_annotations(source: str) -> bool:
    return any(
        isinstance(node, ast.ImportFrom)
        and node.module == "__future__"
        and any(alias.name == "annotations" for alias in node.names)
        for node in ast.walk(ast.parse(source))
    )


ALL = {name: path for package in sorted(OURS) for name, path in modules(package).items()}


def test_every_package_was_found() -> None:
    assert {
        "schemas.base",
        "pipeline.store",
        "pipeline.sources.shapes.hh",
        "assets.definitions",
    } <= set(ALL)


@pytest.mark.parametrize("name", ALL)
def test_module_imports_only_what_its_room_may(name: str) -> None:
    assert forbidden_arrows(name.partition(".")[0], ALL[name].read_text()) == set()


@pytest.mark.parametrize("name", modules("assets"))
def test_assets_load_nothing_heavy_and_keep_annotations(name: str) -> None:
    source = ALL[name].read_text()
    assert heavy_at_import(source) == set()
    assert not postpones_annotations(source)


@pytest.mark.parametrize("name", ALL)
def test_module_imports(name: str) -> None:
    assert importlib.import_module(name).__doc__, f"{name} says nothing about itself"


def test_no_relative_imports() -> None:
    assert [name for name, path in ALL.items() if "" in imported(ast.parse(path.read_text()))] == []


OFFENDERS = """
from __future__ import annotations
import os
from typing import TYPE_CHECKING
if TYPE_CHECKING:
    import vllm
else:
    import peft
try:
    import torch.nn as nn
except ImportError:
    pass
class A:
    from transformers import AutoModel
def f():
    import dagster as dg
    from assets.scoring import logprobs
    from pipeline import store
    def g():
        import torch
"""


def test_the_checkers_catch_offenders() -> None:
    assert forbidden_arrows("schemas", OFFENDERS) == {"dagster", "assets", "pipeline"}
    assert forbidden_arrows("pipeline", OFFENDERS) == {"dagster", "assets"}
    assert forbidden_arrows("assets", OFFENDERS) == set()
    assert heavy_at_import(OFFENDERS) == {"peft", "torch", "transformers"}
    assert heavy_at_import("def f():\n    import torch") == set()
    assert postpones_annotations(OFFENDERS)
    assert not postpones_annotations("from __future__ import division")
    assert set(imported(ast.parse("from . import x"))) == {""}


LOAD = """
import json, sys
from assets.definitions import defs
location = defs()
location = location() if callable(location) else location
keys = [key.to_user_string() for key in location.resolve_all_asset_keys()]
heavy = sorted({name.partition('.')[0] for name in sys.modules} & set(sys.argv[1:]))
print(json.dumps([keys, heavy]))
"""


def test_the_code_location_loads_nothing_heavy(write_plan_file: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LOAD, *sorted(HEAVY)],
        cwd=PROJECT,
        env={
            "PATH": "/usr/bin:/bin",
            "LOGRATIO_PLANS": str(write_plan_file),
            "DAGSTER_DISABLE_TELEMETRY": "1",
        },
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    keys, heavy = json.loads(done.stdout.splitlines()[-1])
    assert heavy == []
    assert "imports/preference_pairs" in keys
    assert len([key for key in keys if "dpo" in key]) >= 3, keys


@pytest.fixture
def write_plan_file(tmp_path: Path) -> Path:
    """A plan whose files need not be there: loading a code location reads plans only."""
    path = tmp_path / "plan.yaml"
    path.write_text(
        "name: imports\n"
        "sources: {pairs: {path: none.jsonl, shape: conversational}}\n"
        "models: {base: {checkpoint: ./none}}\n"
        "objectives: {dpo: {loss: dpo, reference: base, start: base}}\n"
    )
    return path
