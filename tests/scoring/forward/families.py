"""Tiny random models of many decoder families, far from uniform so that a wrong position shows."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from pipeline.models import Checkpoint, load_model
from pipeline.scoring.engines.base import Group
from pipeline.scoring.engines.forward.blocks import blocks_of
from pipeline.scoring.engines.forward.tiles import tiles_of
from scoring.oracle import completion, random_ids

LAYOUTS: dict[str, Any] = {"tiles": tiles_of, "blocks": blocks_of}
"""A CPU's and a GPU's, on a CPU."""

SIZES = {
    "vocab_size": 400, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "max_position_embeddings": 512, "initializer_range": 0.3, "pad_token_id": 2,
}  # fmt: skip
CAPS = {
    "sliding_window": 8, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 3.0,
    "final_logit_softcapping": 6.0, "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_hidden_layers": 4,
}  # fmt: skip


@dataclass(frozen=True)
class Family:
    """A kind of model: its type in transformers, what its config says, and whether it shares.

    A value of None takes a setting away. `oracle` is the attention that computes what the model is.
    """

    kind: str
    config: dict[str, Any] = field(default_factory=dict)
    shares: bool = True
    oracle: str = "eager"


FAMILIES = {
    "llama": Family("llama"),
    "qwen2": Family("qwen2"),
    "qwen3": Family("qwen3"),
    "qwen2 with windows in some layers": Family(
        "qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}
    ),
    "mistral with a window shorter than the text": Family("mistral", {"sliding_window": 8}),
    "gemma2": Family("gemma2", CAPS),
    "gemma3": Family("gemma3_text", CAPS),
    "phi": Family("phi", {"num_key_value_heads": 4}),
    "phi3 with a window": Family("phi3", {"sliding_window": 8}),
    "gpt2": Family("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512}),
    "gpt_neox": Family("gpt_neox", {"num_key_value_heads": 4}),
    "olmo2": Family("olmo2"),
    "cohere with scaled logits": Family("cohere", {"logit_scale": 0.25}),
    "granite with scaled logits": Family("granite", {"logits_scaling": 4.0}),
    "mixtral": Family("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "falcon with rotary positions": Family(
        "falcon",
        {"alibi": False, "new_decoder_architecture": True, "num_kv_heads": 2, "head_dim": None},
        False,
    ),
    "falcon with alibi": Family(
        "falcon",
        {"alibi": True, "new_decoder_architecture": False, "multi_query": True, "head_dim": None},
        False,
        "sdpa",  # transformers' eager attention adds alibi to its scores twice
    ),
    "recurrent_gemma": Family(
        "recurrent_gemma",
        {"lru_width": 32, "attention_window_size": 32, "block_types": ["recurrent", "attention"]},
        False,
    ),
    "jamba": Family(
        "jamba",
        {
            "num_experts": 2, "use_mamba_kernels": False, "attn_layer_period": 2,
            "attn_layer_offset": 1, "mamba_d_state": 4, "num_hidden_layers": 4,
        },
        False,
    ),
}  # fmt: skip


def build(directory: Path, family: Family, **config: Any) -> Checkpoint:
    """Write a family's model out as float32 safetensors."""
    torch.manual_seed(3)
    said = {**SIZES, **family.config, **config}
    values = {key: value for key, value in said.items() if value is not None}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family.kind, **values))
    with torch.no_grad():  # biases and norms too, which begin as zeros and ones
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(directory)
    return Checkpoint(directory)


def loaded(checkpoint: Checkpoint, attention: str = "sdpa", dtype: str = "float32") -> Any:
    return load_model(checkpoint, dtype=dtype, attention=attention, device="cpu")


def some_groups(seed: int, n: int = 3) -> list[Group]:
    """Groups under prompts with a common opening, one prompt going on from another's reply."""
    draw = np.random.default_rng(seed)

    def ids(most: int) -> list[int]:
        return random_ids(int(draw.integers(2, most)), int(draw.integers(1 << 30)))

    opening = random_ids(12, seed)
    groups = []
    for g in range(n):
        prompt, first, second = [*opening, *ids(40)], ids(30), ids(90)
        replies = [
            completion(f"{g} a", first),
            # Only a part of it counts, as in a conversation with several turns.
            completion(f"{g} b", second, (0, 1), (len(second) - 1, len(second))),
        ]
        groups.append(Group(np.array(prompt, np.int32), tuple(replies)))
        opening = [*prompt, *first] if g == 0 else random_ids(12, seed)
    return groups
