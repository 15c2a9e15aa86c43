"""The merged export: a policy's adapter added to its start, as a model of its own."""

import json
import logging
import shutil
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import ModelError, StoreError
from pipeline.models import Checkpoint, load_model, publish_directory, quantisation
from pipeline.store import Store, file_digest, verify

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MERGE_VERSION = 1
"""Raised when the same policy would be merged into other weights."""

_log = logging.getLogger(__name__)

_LITTLE = 0.9
"""A smaller share of the update that is left after rounding is worth a warning."""


def merged_policy(store: Store, directory: Path, start: Path) -> Path:
    """Where a policy is as a model of its own, in Hugging Face form; made once.

    The adapter is added in float32 to the start's weights as the trainer had them, and every
    weight is rounded once to the dtype it had there. Beside the weights are config, generation
    config, tokeniser and chat template, and `policy.json` with what the policy came from; no file
    names a place on this machine. The directory stands beside the policy's under the policy's id,
    and appears whole or not at all. A policy that is a model already is its own.

    Args:
        store: where policies are.
        directory: the policy's.
        start: the model the policy was trained from.

    Raises:
        ModelError: the start is quantised, or the adapter cannot be added to it.
        StoreError: the policy is damaged, or the disk is full or failed.
    """
    if not (directory / "adapter_config.json").exists():
        return directory
    final = store.policies / f"{directory.name}-merged-{MERGE_VERSION}"
    if final.exists():
        return final
    if (method := quantisation(Checkpoint(start))) != "none":
        raise ModelError(f"checkpoint {start}: is quantised ({method}); nothing is merged into it")
    from safetensors import SafetensorError

    record = intact_record(directory)
    temporary = store.policies / f".{uuid.uuid4().hex}.tmp"
    try:
        temporary.mkdir()
        model, kept = _merge(start, directory, record["dtype"])
        _save(model, start, temporary)
        for pattern in ("*token*", "chat_template*"):
            for file in directory.glob(pattern):
                shutil.copy(file, temporary)
        said = {key: value for key, value in record.items() if key not in ("start", "blake3")}
        said["merged"] = {"version": MERGE_VERSION, "dtype": record["dtype"], "update_kept": kept}
        said["blake3"] = {f.name: file_digest(f) for f in temporary.glob("*.safetensors")}
        write_record(temporary, said)
        publish_directory(temporary, final)
    except (OSError, SafetensorError) as error:  # the latter where the disk is full
        raise StoreError(f"{final}: cannot be written: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    if kept < _LITTLE:
        _log.warning(
            "%s: rounding to %s left %.0f %% of the policy's update; training in float32 would "
            "keep it all",
            final,
            record["dtype"],
            100 * kept,
        )
    return final


def read_record(directory: Path) -> dict[str, Any]:
    """A policy's `policy.json`.

    Raises:
        StoreError: it cannot be read, or an earlier version wrote it.
    """
    path = directory / "policy.json"
    try:
        record: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise StoreError(f"{path}: cannot be read: {error}") from error
    if "start_model_id" not in record:
        raise StoreError(f"{path}: an earlier version wrote this policy; train it again")
    return record


def intact_record(directory: Path) -> dict[str, Any]:
    """`read_record`, after a look at the bytes of the policy's weights.

    Raises:
        StoreError: see `read_record`, or a file is missing or damaged.
    """
    record = read_record(directory)
    for name, digest in record["blake3"].items():
        if name.endswith(".safetensors"):
            verify(directory / name, digest)
    return record


def write_record(directory: Path, record: dict[str, Any]) -> None:
    """Write `policy.json`."""
    (directory / "policy.json").write_text(json.dumps(record, indent=2, sort_keys=True))


def _merge(start: Path, adapter: Path, dtype: str) -> tuple["PreTrainedModel", float]:
    """The start with the adapter added, and how much of the update is left after rounding.

    Raises:
        ModelError: PEFT cannot load the adapter over it or add it to it.
    """
    from peft import PeftModel

    model = load_model(Checkpoint(start), dtype=dtype, attention="eager", device="cpu")
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
    try:
        adapted = PeftModel.from_pretrained(model.float(), adapter)
        _refuse_tied(adapted, adapter)
        kept = _share_kept(adapted, dtype)
        merged: PreTrainedModel = adapted.merge_and_unload(safe_merge=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelError(f"adapter {adapter}: cannot be merged into {start}: {error}") from error
    for name, parameter in merged.named_parameters():
        parameter.data = parameter.data.to(dtypes[name])
    return merged, kept


def _save(model: "PreTrainedModel", start: Path, target: Path) -> None:
    from transformers import GenerationConfig

    generation = start / "generation_config.json"
    if generation.exists():
        # The start's own is taken as it is; not every one passes transformers' checks on saving.
        model.generation_config = GenerationConfig()
    model.save_pretrained(target)
    if generation.exists():
        shutil.copy(generation, target)


def _refuse_tied(model: Any, adapter: Path) -> None:
    """An adapter on a weight that two modules share: added to it, both would change.

    Raises:
        ModelError: names the module.
    """
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name.removesuffix(".weight"))
    for layer in _lora_layers(model):
        sharing = owners[id(layer.get_base_layer().weight)]
        if len(sharing) > 1:
            raise ModelError(
                f"adapter {adapter}: is on a weight that {' and '.join(sharing)} share; merged, "
                "it would change both"
            )


def _share_kept(model: Any, dtype: str) -> float:
    """What rounding leaves of the update: its part along the update, 1 for all of it."""
    import torch

    kept = whole = 0.0
    for layer in _lora_layers(model):
        weight: torch.Tensor = layer.get_base_layer().weight.detach()
        for name in layer.active_adapters:
            update = layer.get_delta_weight(name).detach()
            rounded = (weight + update).to(getattr(torch, dtype)).float() - weight
            kept += float((rounded.double() * update.double()).sum())
            whole += float(update.double().square().sum())
    return kept / whole if whole else 1.0


def _lora_layers(model: Any) -> list[Any]:
    from peft.tuners.lora import LoraLayer

    return [module for module in model.modules() if isinstance(module, LoraLayer)]
