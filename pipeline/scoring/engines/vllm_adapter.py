"""Adapters that vLLM applies right, and those it must not be given."""

from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import ModelError
from pipeline.models import read_adapter_config

MAX_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM takes for `max_lora_rank`."""

_PLAIN_FIELDS = {
    *("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("lora_dropout", "fan_in_fan_out", "inference_mode", "task_type", "auto_mapping"),
    *("base_model_name_or_path", "revision", "peft_type", "peft_version"),
    # Of how it began: `init_lora_weights` says whether they matter.
    *("init_lora_weights", "eva_config", "loftq_config", "corda_config", "lora_ga_config"),
    # These do nothing without another field, which would be noticed.
    *("qalora_group_size", "megatron_core", "ensure_weight_tying"),
}
"""Of an adapter's config: what leaves it a plain low-rank update, or has its own check."""

_PLAIN_INITS = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")
"""Beginnings that leave the base weights as they are; PiSSA and its like change them on loading."""

_HEAD_OR_EMBEDDING = ("lm_head", "embed_tokens", "wte", "embed_in", "embed_out")


@dataclass(frozen=True)
class LoraShape:
    """What vLLM must know of an adapter before it loads: its largest rank, the modules it is on."""

    max_rank: int
    modules: list[str]


def refuse_float32(dtype: str, device_class: str) -> None:
    """Refuse adapters where vLLM's kernels for them take half precision only.

    Raises:
        ModelError: the model is float32 on a GPU, where the engine would not start.
    """
    if dtype == "float32" and device_class != "cpu":
        raise ModelError(
            "vLLM applies adapters on a GPU in bfloat16 and float16 only: score them with engine: "
            "torch, give the model another dtype, or merge them into full weights"
        )


def lora_shape(adapter: Path) -> LoraShape:
    """Look into an adapter, read from its tensors rather than from what its config claims.

    vLLM drops or misplaces the delta of an output or embedding layer in prompt log-probs, without
    an error (vLLM issue 51594), and knows neither DoRA nor trained biases.

    Raises:
        ModelError: names what the adapter has that vLLM would get wrong.
    """
    from safetensors import safe_open

    config = read_adapter_config(adapter)
    faults = []
    if config.get("peft_type") != "LORA":
        faults.append(f"is of type {config.get('peft_type')}, not LORA")
    if config.get("use_dora"):
        faults.append("is a DoRA adapter")
    if config.get("bias", "none") != "none" or config.get("lora_bias"):
        faults.append("has trained biases")
    if config.get("modules_to_save"):
        faults.append(f"replaces whole modules ({', '.join(config['modules_to_save'])})")
    begun = config.get("init_lora_weights")
    if isinstance(begun, str) and begun.lower() not in _PLAIN_INITS:
        faults.append(f"changes the weights under it (init_lora_weights: {begun})")
    checked = _PLAIN_FIELDS | {"use_dora", "bias", "lora_bias", "modules_to_save"}
    for key in sorted(config.keys() - checked):
        if config[key]:
            faults.append(f"is more than a low-rank update ({key})")
    modules, ranks = set(), [1]
    with safe_open(adapter / "adapter_model.safetensors", framework="np") as tensors:
        for key in tensors.keys():  # noqa: SIM118 (not a dict, and has no iterator)
            parts = key.split(".")
            if any(name in parts for name in _HEAD_OR_EMBEDDING) or "lora_embedding" in key:
                faults.append(f"changes an output or embedding layer ({key})")
            elif parts[-2:] in (["lora_A", "weight"], ["lora_B", "weight"]):
                modules.add(parts[-3])
                if parts[-2] == "lora_A":
                    ranks.append(tensors.get_slice(key).get_shape()[0])
            else:
                faults.append(f"has a tensor that is no LoRA matrix ({key})")
    if max(ranks) > MAX_RANKS[-1]:
        faults.append(f"has rank {max(ranks)}, above {MAX_RANKS[-1]}")
    if faults:
        raise ModelError(
            f"adapter {adapter} {faults[0]}: vLLM would not apply it as trained; merge it into "
            "full weights, or score it with engine: torch"
        )
    return LoraShape(next(r for r in MAX_RANKS if r >= max(ranks)), sorted(modules))
