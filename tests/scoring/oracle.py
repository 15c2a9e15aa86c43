"""What engines are compared with: transformers in float64, PEFT adapters merged into it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from support import PROJECT, build_tiny_model
from transformers import AutoModelForCausalLM

from pipeline.intake import run_intake
from pipeline.models import Checkpoint, load_tokenizer
from pipeline.plan import ModelConfig, Plan, SourceConfig, TokenizationConfig
from pipeline.scoring.engines.base import Completion, Engine, Group, groups_of
from pipeline.scoring.null_test import sums
from pipeline.store import Store, read
from pipeline.tokenization import Encoder, sequence_id, tokenize_pairs
from schemas import Sequence as SequenceTable
from schemas import polars_schema

ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def build_model_for_vllm(directory: Path, seed: int = 0, **config: Any) -> Path:
    """A tiny model with heads as wide as vLLM's attention on a CPU wants them (32)."""
    return build_tiny_model(
        directory, seed, **{"hidden_size": 128, "intermediate_size": 96, **config}
    )


def build_adapter(
    base: Path, directory: Path, seed: int = 0, std: float = 0.2, **config: Any
) -> Path:
    """A LoRA adapter over `base` with random matrices, far from doing nothing."""
    from peft import LoraConfig, get_peft_model

    values: dict[str, Any] = {"r": 8, "lora_alpha": 16, "target_modules": ALL_LINEAR, **config}
    torch.manual_seed(seed)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(**values))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=std)
    model.save_pretrained(directory)
    return directory


def change_json(path: Path, **fields: Any) -> None:
    """Write other values into a JSON file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


class Oracle:
    """A model in float64, its adapter merged; plain `log_softmax`, one sequence at a time."""

    def __init__(self, checkpoint: Checkpoint, attention: str = "eager") -> None:
        # Eager: sdpa leaves soft-capping out, and experts' grouped products know no float64.
        model = AutoModelForCausalLM.from_pretrained(
            checkpoint.path,
            dtype=torch.float64,
            attn_implementation=attention,
            experts_implementation="eager",
        )
        if checkpoint.adapter is not None:
            from peft import PeftModel

            wrapped = PeftModel.from_pretrained(model, checkpoint.adapter).to(torch.float64)
            model = wrapped.merge_and_unload()
        self.model: Any = model.eval()

    def untrained(self) -> "Oracle":
        """The same architecture with fresh random weights: a control, which must disagree."""
        other = object.__new__(Oracle)
        torch.manual_seed(1)
        other.model = AutoModelForCausalLM.from_config(self.model.config).to(torch.float64).eval()
        return other

    def logprobs(self, prompt: np.ndarray, ids: np.ndarray) -> np.ndarray:
        """Of every token of a completion: float64 [n], nats."""
        row = torch.tensor([[*prompt.tolist(), *ids.tolist()]])
        with torch.inference_mode():
            logits = self.model(input_ids=row).logits[0]
        assert logits.dtype == torch.float64
        logprobs = torch.log_softmax(logits[:-1], dim=-1).gather(1, row[0, 1:, None])[:, 0]
        values: np.ndarray = logprobs[len(prompt) - 1 :].numpy()
        return values

    def sums(self, groups: list[Group]) -> dict[str, float]:
        """Of the tokens that count, by sequence."""
        return {
            c.sequence_id: float(self.logprobs(group.prompt_ids, c.ids)[c.scored].sum())
            for group in groups
            for c in group.completions
        }


def largest_difference(a: dict[str, float], b: dict[str, float]) -> float:
    """Over the sequences of both, which must be the same."""
    assert a.keys() == b.keys()
    return max(abs(a[i] - b[i]) for i in a)


def smallest_difference(a: dict[str, float], b: dict[str, float]) -> float:
    """The same for a control: how near the nearest sequence comes."""
    assert a.keys() == b.keys()
    return min(abs(a[i] - b[i]) for i in a)


def scored(engine: Engine, groups: list[Group], batch_tokens: int = 8192) -> dict[str, float]:
    """The engine's sums by sequence."""
    return sums(engine, groups, batch_tokens)


def completion(name: str, ids: list[int], *spans: tuple[int, int]) -> Completion:
    """A completion of which everything counts, or the spans given."""
    return Completion(name, np.array(ids, np.int32), spans or ((0, len(ids)),))


def group(prompt: list[int], *completions: Completion) -> Group:
    """A prompt with its completions."""
    return Group(np.array(prompt, np.int32), completions)


def random_ids(n: int, seed: int, below: int = 300) -> list[int]:
    """Token ids of the tiny vocabulary."""
    ids: list[int] = np.random.default_rng(seed).integers(3, below, n).tolist()
    return ids


def random_groups(seed: int, n: int, longest_prompt: int = 90, longest: int = 40) -> list[Group]:
    """Groups of two completions of any lengths, among them ones that share their opening."""
    draw = np.random.default_rng(seed)
    groups = []
    for g in range(n):
        opening = draw.integers(3, 300, draw.integers(0, longest)) if g % 2 else np.array([], int)
        completions = [
            completion(
                f"{g}-{c}",
                [*opening.tolist(), *draw.integers(3, 300, draw.integers(1, longest)).tolist()],
            )
            for c in range(2)
        ]
        prompt = draw.integers(3, 300, draw.integers(1, longest_prompt)).tolist()
        groups.append(group(prompt, *completions))
    return groups


def sample_groups(checkpoint: Checkpoint, store: Store, n: int) -> list[Group]:
    """The first sequences of the embedded sample, real text in the model's own template."""
    source = SourceConfig(path=PROJECT / "sample" / "preferences.jsonl", shape="conversational")
    plan = Plan(name="t", sources={"s": source}, models={"m": ModelConfig(checkpoint="x")})
    run_intake(plan, store)
    encoder = Encoder(load_tokenizer(checkpoint), TokenizationConfig())
    return groups_of(tokenize_pairs(read(store, "pairs"), encoder).sequences.head(n))


def sequences_of(groups: list[Group]) -> pl.DataFrame:
    """Groups as a `sequences` table; ids are made anew, of the contents."""
    rows = []
    for one in groups:
        for c in one.completions:
            spans = list(c.spans)
            rows.append(
                {
                    "sequence_id": sequence_id(one.prompt_ids, c.ids, spans),
                    "prompt_ids": one.prompt_ids,
                    "completion_ids": c.ids,
                    "spans": [{"start": start, "end": end} for start, end in spans],
                    "n_prompt": len(one.prompt_ids),
                    "n_scored": len(c.scored),
                    "truncated": False,
                }
            )
    schema = polars_schema(SequenceTable)
    return pl.DataFrame(rows, schema=schema).unique("sequence_id").sort("sequence_id")
