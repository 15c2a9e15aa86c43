"""The command that checks vLLM on a GPU, run where there is none: what a CPU can show of it."""

import json
import os
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from support import PROJECT, build_tiny_model

PARTS = [
    *("environment", "v2_path", "parity", "null_test"),
    *("prefix_reuse", "throughput", "lora", "batch_invariant"),
]


def gpu_check(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The command, with whatever GPUs there are hidden from it."""
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu_check", *arguments],
        cwd=PROJECT,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )


def test_without_a_gpu_it_refuses_at_once_with_a_sentence(tmp_path: Path) -> None:
    ran = gpu_check("--output", str(tmp_path / "out.json"))
    assert ran.returncode == 2
    assert ran.stdout == ""
    assert ran.stderr == (
        "gpu-check: torch finds no CUDA device; --allow-cpu runs what a CPU can.\n"
    )
    assert not list(tmp_path.iterdir())


def test_a_failing_part_hides_no_other_and_fails_the_whole(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    write_sequences: pl.DataFrame,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from benchmarks.gpu_check import __main__ as command
    from benchmarks.gpu_check.lab import Lab
    from benchmarks.gpu_check.parts import NotRun
    from pipeline.models import Checkpoint

    def broken(lab: Lab) -> dict[str, object]:
        raise RuntimeError("out of memory")

    def elsewhere_only(lab: Lab) -> dict[str, object]:
        raise NotRun("not here")

    def good(lab: Lab) -> dict[str, object]:
        return {"passed": True, "summary": f"{lab.n_scored} tokens"}

    lab = Lab(tmp_path, Checkpoint(tmp_path), write_sequences, ["float32"], on_cuda=False)
    options = Namespace(model="m", pairs=Path("p.jsonl"), output=tmp_path / "out.json")
    for parts, code in (({"a": broken, "b": elsewhere_only, "c": good}, 1), ({"c": good}, 0)):
        monkeypatch.setattr(command, "PARTS", parts)
        assert command.check(lab, options) == code
        report = json.loads(options.output.read_text())
        assert report["passed"] is (code == 0)
        assert list(report["parts"]) == list(parts)
        if code:
            assert report["parts"]["a"]["error"] == "RuntimeError: out of memory"
            assert report["parts"]["b"]["passed"] is None
            assert report["parts"]["b"]["why_not"] == "not here"
        assert report["parts"]["c"]["passed"] is True
        assert ("FAILED" in capsys.readouterr().out) is bool(code)


def test_what_happens_elsewhere_is_told_here() -> None:
    from benchmarks.gpu_check.processes import Elsewhere, ElsewhereError, elsewhere

    with Elsewhere({"LOGRATIO_TOLD": "yes"}) as process:
        assert process.call(os.getenv, "LOGRATIO_TOLD") == "yes"
        with pytest.raises(ElsewhereError, match="ValueError: invalid literal"):
            process.call(int, "x")
        assert process.call(int, "2") == 2, "it lives on"
    with pytest.raises(ElsewhereError, match="_exit: its process died with code 3"):
        elsewhere({}, os._exit, 3)


def test_differences_are_those_of_sums_and_of_tokens() -> None:
    from benchmarks.gpu_check.lab import difference

    first = {"a": np.array([-1, -2], np.float32), "b": np.array([-3], np.float32)}
    second = {"a": np.array([-2, -1], np.float32), "b": np.array([-5], np.float32)}
    apart = difference(first, second)
    assert (apart.sequence_max, apart.sequence_mean) == (2.0, 1.0)
    assert apart.token_max == 2.0
    assert apart.token_mean == pytest.approx(4 / 3)
    assert apart.token_bias == pytest.approx(2 / 3)
    assert apart.token_rms == pytest.approx(2**0.5)
    with pytest.raises(ValueError, match="different sequences"):
        difference(first, {"a": first["a"]})


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_on_a_cpu_what_it_can_run_passes_and_the_rest_says_why_not(
    tmp_path: Path, write_pairs: Callable[..., Path]
) -> None:
    model = build_tiny_model(tmp_path / "model", hidden_size=128, initializer_range=0.15)
    output, store = tmp_path / "out.json", tmp_path / "store"
    ran = gpu_check(
        *("--model", str(model), "--pairs", str(write_pairs(4)), "--store", str(store)),
        *("--output", str(output), "--allow-cpu"),
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr[-4000:]
    report = json.loads(output.read_text())
    parts = report["parts"]
    assert list(parts) == PARTS
    assert report["passed"]
    assert report["n_sequences"] == 8
    reasons = {name: part["why_not"] for name, part in parts.items() if not part["ran"]}
    assert list(reasons) == ["v2_path", "batch_invariant"]
    assert "V2 model runner" in reasons["v2_path"]
    assert "VLLM_BATCH_INVARIANT" in reasons["batch_invariant"]
    assert all(part["passed"] for part in parts.values() if part["ran"])
    for dtype in ("bfloat16", "float32"):
        figures = parts["parity"]["by_dtype"][dtype]
        assert figures["control"]["failed_as_it_must"]
        apart = figures["vllm_against_torch_float32"]
        assert 0 < apart["sequence_max"] <= figures["allowed"]
        assert parts["null_test"]["by_dtype"][dtype]["repeat"] == 0.0
    assert parts["lora"]["control"]["failed_as_it_must"]
    assert parts["prefix_reuse"]["times_as_long"]["turns"] >= 3
    assert min(parts["throughput"]["tokens_per_second"].values()) > 0
    assert parts["environment"]["runner"] == "v1 flat eager"
    assert all(name in ran.stdout for name in PARTS)
