"""The merged export: a policy's adapter added to its start, as a model of its own."""

import logging
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import ModelError, StoreError
from pipeline.models import Checkpoint, copy_tokeniser, load_model, quantisation
from pipeline.store import Store, file_digest, whole_directory
from pipeline.training.record import intact_record, write_record

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
    try:
        with whole_directory(final) as temporary:
            model, kept = _merge(start, directory, record["dtype"])
            _save(model, start, temporary)
            copy_tokeniser(directory, temporary)
            said = {key: value for key, value in record.items() if key not in ("start", "blake3")}
            said["merged"] = {
                "version": MERGE_VERSION,
                "dtype": record["dtype"],
                "update_kept": kept,
            }
            said["blake3"] = {f.name: file_digest(f) for f in temporary.glob("*.safetensors")}
            write_record(temporary, said)
    except (OSError, SafetensorError) as error:  # the latter where the disk is full
        raise StoreError(f"{final}: cannot be written: {error}") from error
    if kept < _LITTLE:
        _log.warning(
            "%s: rounding to %s left %.0f %% of the policy's update; training in float32 would "
            "keep it all",
            final,
            record["dtype"],
            100 * kept,
        )
    return final


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
