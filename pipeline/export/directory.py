"""A policy out of the store, as a directory that other programs load."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pipeline.errors import PlanError, StoreError
from pipeline.export.merged import merged_policy
from pipeline.models import read_adapter_config
from pipeline.names import described, policy_of
from pipeline.plan import Plan
from pipeline.store import Store, whole_directory
from pipeline.training.record import RECORD, intact_record, write_record

Form = Literal["merged", "adapter"]


@dataclass(frozen=True)
class Exported:
    """What an export wrote: whose policy, and whether it needs its start beside it."""

    directory: Path
    policy_id: str
    start: str
    needs_start: bool


def export_policy(
    plan: Plan,
    store: Store,
    name: str,
    target: Path,
    form: Form = "merged",
    base: str | None = None,
) -> Exported:
    """Write an objective's policy to a directory of its own, which appears whole or not at all.

    `merged` is a model in Hugging Face form, which transformers and vLLM load; `adapter` is what
    PEFT and vLLM put over the start. With either come tokeniser, chat template and `policy.json`.
    No file names a place on this machine: the adapter's `base_model_name_or_path` is the start's
    hub id where the plan has one and empty otherwise, since the name of a folder here may be the
    name of another model there.

    Args:
        plan: with the objective.
        store: with its policy.
        name: the objective's.
        target: a directory that is not there yet, or is empty.
        form: which of the two.
        base: what the adapter is to call its start instead.

    Raises:
        PlanError: the plan has no such objective, or its policy has no adapter.
        StoreError: the policy is not trained or damaged, or the target cannot be written.
        ModelError: the policy cannot be merged.
    """
    if name not in plan.objectives:
        known = ", ".join(plan.objectives) or "none"
        raise PlanError(f"'{name}' is not one of the plan's objectives: {known}")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise StoreError(f"{target}: is there already; an export makes a directory of its own")
    directory, start = policy_of(plan, store, name)
    named = plan.objectives[name].start
    source = merged_policy(store, directory, start.path) if form == "merged" else directory
    adapted = (source / "adapter_config.json").exists()
    if form == "adapter" and not adapted:
        raise PlanError(
            f"objective '{name}': its policy is a whole model (training.method: full), and there "
            "is no adapter to export"
        )
    record = intact_record(source)
    record["start"] = described(plan, store, named)
    record["blake3"] = {k: v for k, v in record["blake3"].items() if k.endswith(".safetensors")}
    written: dict[str, dict[str, Any]] = {}
    if adapted:
        config = read_adapter_config(source)
        written["adapter_config.json"] = config | {
            "base_model_name_or_path": base or _hub_id(plan, named)
        }
    _write(source, target, record, written)
    return Exported(target, record["policy_id"], record["start"], adapted)


def _write(
    source: Path, target: Path, record: dict[str, Any], written: dict[str, dict[str, Any]]
) -> None:
    """Copy a policy's files without its tables, some of them written anew."""
    try:
        with whole_directory(target, exclusive=True) as temporary:
            for file in source.iterdir():
                if file.suffix != ".parquet" and file.name not in (RECORD, *written):
                    shutil.copyfile(file, temporary / file.name)
            for name, config in written.items():
                (temporary / name).write_text(json.dumps(config, indent=2, sort_keys=True))
            write_record(temporary, record)
    except OSError as error:
        raise StoreError(f"{target}: cannot be written: {error.strerror or error}") from error


def _hub_id(plan: Plan, start: str) -> str | None:
    """The start's name for everyone, if it has one."""
    if start in plan.objectives:
        return None
    checkpoint = plan.models[start].checkpoint
    local = Path(checkpoint).is_absolute() or Path(checkpoint).exists()
    return None if local or checkpoint.startswith("packaged:") else checkpoint
