"""What several tests of exports and rounds build and compare."""

import shutil
from pathlib import Path
from typing import Any

import polars as pl
import torch
from peft import PeftModel
from scoring.oracle import build_adapter
from support import prepared
from transformers import AutoModelForCausalLM

from pipeline.models import Checkpoint, identify
from pipeline.plan import Plan
from pipeline.stages import compute_rewards, score, train
from pipeline.store import Store, file_digest, read
from pipeline.training.record import write_record

DPO = {"loss": "dpo", "beta": 0.1}
LEARNS = ["training.epochs=4", "training.learning_rate=1e-2"]
"""Enough for a tiny model to be far from its start."""


def chain(*names: str, **values: Any) -> dict[str, Any]:
    """Objectives that each start from the one before and are measured against it."""
    before = ["base", *names]
    return {
        name: {**DPO, **values, "start": base, "reference": base}
        for name, base in zip(names, before, strict=False)
    }


def ran(path: Path, *overrides: str) -> tuple[Plan, Store, dict[str, Any]]:
    """A plan run to its rewards; what each objective's training gave."""
    plan, store = prepared(path, *overrides)
    trained = {}
    for name in plan.policies:
        trained[name] = train(plan, store, name)
        score(plan, store, name)
        compute_rewards(plan, store, name)
    return plan, store, trained


def loaded(directory: Path, *adapters: Path) -> Any:
    """A model in float64 as transformers loads it, adapters applied one over the other by PEFT."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float64)
    for adapter in adapters:
        wrapped = PeftModel.from_pretrained(model, adapter).to(torch.float64)
        # The last one stays applied.
        model = wrapped if adapter == adapters[-1] else wrapped.merge_and_unload()
    return model.eval()


def sums(model: Any, sequences: pl.DataFrame) -> dict[str, float]:
    """Log-probs of a table's sequences in plain float64, nats."""
    found = {}
    for row in sequences.iter_rows(named=True):
        ids = torch.tensor([[*row["prompt_ids"], *row["completion_ids"]]])
        with torch.inference_mode():
            logits = model(input_ids=ids).logits[0, :-1]
        assert logits.dtype == torch.float64
        logprobs = torch.log_softmax(logits, -1).gather(1, ids[0, 1:, None])[:, 0]
        scored = logprobs[row["n_prompt"] - 1 :].tolist()
        found[row["sequence_id"]] = sum(sum(scored[s["start"] : s["end"]]) for s in row["spans"])
    return found


def apart(a: dict[str, float], b: dict[str, float]) -> list[float]:
    """Absolute differences, the smallest first."""
    assert a.keys() == b.keys()
    return sorted(abs(a[i] - b[i]) for i in a)


def made_by_hand(
    store: Store, start: Path, *, dtype: str = "float32", std: float = 0.2, **adapter: Any
) -> Path:
    """The directory of a policy that nobody trained, its adapter random."""
    directory = build_adapter(start, store.policies / "by_hand", std=std, **adapter)
    for file in (*start.glob("*token*"), *start.glob("chat_template*")):
        shutil.copy(file, directory)  # as training does
    weights = "adapter_model.safetensors"
    record = {
        "policy_id": "by_hand",
        "start": str(start),
        "start_model_id": identify(Checkpoint(start), store).model_id,
        "dtype": dtype,
        "blake3": {weights: file_digest(directory / weights)},
    }
    write_record(directory, record)
    return directory


def sequences_in(store: Store, n: int = 8) -> pl.DataFrame:
    """Some of a plan's sequences."""
    return read(store, "sequences").head(n)


def paths_in(directory: Path, *places: Path) -> list[str]:
    """Files that name one of some places."""
    return [
        file.name
        for file in directory.iterdir()
        if any(str(place).encode() in file.read_bytes() for place in places)
    ]
