"""What is done in the other processes: scoring, timing, and making models to score."""

import os
import platform
import subprocess
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from time import monotonic
from typing import Any

import numpy as np
import polars as pl

from pipeline.models import Checkpoint, load_model, load_tokenizer
from pipeline.plan import ModelConfig, ScoringConfig
from pipeline.scoring.engines import batching_of, numerics_of, open_engine
from pipeline.scoring.engines.base import Engine, Group, Numerics, check_logprobs, longest
from pipeline.scoring.engines.vllm_engine import vllm_package
from pipeline.scoring.ledger import read_token_logprobs
from pipeline.scoring.null_test import NullTest
from pipeline.scoring.run import score_sequences, scorer_key
from pipeline.store import Store

LogProbs = dict[str, np.ndarray]
"""By sequence id, float32 [n_scored], nats."""

_DELTA_SHARE = 0.1
_PACKAGES = ("logratio", "torch", "transformers", "peft", "triton", "flashinfer-python", "numpy")


@dataclass(frozen=True)
class Pass:
    """One scoring of the whole workload, with its null test."""

    numerics: Numerics
    null_test: NullTest
    logprobs: LogProbs


def score_all(
    store: Store,
    ledger: Path,
    config: ModelConfig,
    checkpoint: Checkpoint,
    sequences: pl.DataFrame,
    null_test_rows: int,
) -> Pass:
    """Score everything into an empty ledger, as a plan's scoring stage does."""
    key = replace(scorer_key(store, config, checkpoint), ledger=ledger)
    # One worker, on the first device: several would measure the machine, not the engine.
    settings = ScoringConfig(workers=1, null_test="always", null_test_rows=null_test_rows)
    result = score_sequences(ledger.name, key, config, checkpoint, sequences, settings)
    if result.n_scored != sequences.height:
        raise RuntimeError(f"{ledger}: {result.n_scored} of {sequences.height} were scored anew")
    rows = read_token_logprobs(key).select("sequence_id", "logprobs").iter_rows()
    tokens = {sequence: np.asarray(values, dtype=np.float32) for sequence, values in rows}
    return Pass(key.numerics, result.null_test, tokens)


_opened: list[tuple[Engine, int]] = []
"""In a process that is timed: its engine and the `batch_tokens` that suit it."""


def open_here(config: ModelConfig, checkpoint: Checkpoint, groups: list[Group]) -> None:
    """Load a model into this process, for calls of the next two."""
    batching = batching_of(ScoringConfig(), numerics_of(config, checkpoint))
    engine = open_engine(config, checkpoint, longest(groups))
    _opened.append((engine, batching.batch_tokens))


def score_here(groups: list[Group]) -> LogProbs:
    """Score with the loaded engine."""
    engine, batch_tokens = _opened[0]
    scored: LogProbs = {}
    for group, values in zip(groups, engine.score(groups, batch_tokens), strict=True):
        for completion, logprobs in zip(group.completions, values, strict=True):
            check_logprobs(completion, logprobs)
            scored[completion.sequence_id] = logprobs
    return scored


def time_here(groups: list[Group], calls: int) -> float:
    """Seconds per call of the loaded engine, over `calls` of them."""
    engine, batch_tokens = _opened[0]
    started = monotonic()
    for _ in range(calls):
        engine.score(groups, batch_tokens)
    return (monotonic() - started) / calls


def make_untrained(checkpoint: Checkpoint, directory: Path) -> Checkpoint:
    """A model of the same config whose weights were never trained."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    # Nobody's usual seed: an untrained model under test must not be its own control.
    torch.manual_seed(7_340_033)
    config = AutoConfig.from_pretrained(checkpoint.path, local_files_only=True)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(directory)
    return Checkpoint(directory)


def make_adapter(checkpoint: Checkpoint, directory: Path) -> tuple[Checkpoint, Checkpoint]:
    """The model with a random adapter over it, and with the same adapter merged into it.

    Each delta is a tenth of its weight in Frobenius norm: PEFT's own start is no delta at all.
    """
    import torch
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora import LoraLayer

    torch.manual_seed(0)
    model = load_model(checkpoint, dtype="float32", attention="sdpa", device="cpu")
    shape = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    adapted = get_peft_model(model, shape)
    with torch.no_grad():
        for layer in adapted.modules():
            if isinstance(layer, LoraLayer):
                up, down = layer.lora_B["default"].weight, layer.lora_A["default"].weight
                up.normal_()
                delta = layer.scaling["default"] * (up @ down)
                up *= _DELTA_SHARE * layer.get_base_layer().weight.norm() / delta.norm()
    adapted.save_pretrained(directory / "adapter")
    adapted.merge_and_unload().save_pretrained(directory / "merged")
    load_tokenizer(checkpoint).save_pretrained(directory / "merged")
    return (
        Checkpoint(checkpoint.path, directory / "adapter"),
        Checkpoint(directory / "merged"),
    )


def describe_machine(config: ModelConfig, checkpoint: Checkpoint) -> dict[str, Any]:
    """Versions, device and driver, and the numerics vLLM would have here."""
    import torch

    numerics = numerics_of(config, checkpoint)
    vllm = vllm_package()
    described: dict[str, Any] = {
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in (vllm, *_PACKAGES)},
        "runner": numerics.runner,
        "device_class": numerics.device_class,
        "cuda": torch.version.cuda,
        "driver": _driver(),
        "cpus": os.cpu_count(),
    }
    if torch.cuda.is_available():
        device = torch.cuda.get_device_properties(0)
        described |= {
            "gpu": device.name,
            "capability": f"{device.major}.{device.minor}",
            "gpu_memory_gib": round(device.total_memory / 2**30, 1),
            "gpus": torch.cuda.device_count(),
        }
    return described


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _driver() -> str | None:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        said = subprocess.run(query, capture_output=True, text=True, timeout=60, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return said.split("\n")[0].strip()
