"""What the scorers do, each in a process of its own; all get the same token ids."""

import contextlib
import math
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import numpy as np

from benchmarks.devices import peak_mib, synchronise
from pipeline.models import Checkpoint
from pipeline.plan import ModelConfig, ScoringConfig
from pipeline.scoring.engines import batching_of, numerics_of, open_engine
from pipeline.scoring.engines.base import Group, longest, sequence_sum
from pipeline.scoring.engines.torch_engine import torch_device

Sums = dict[str, float]
"""Log-probs by sequence id, nats."""


@dataclass(frozen=True)
class Pair:
    """A pair as token ids, with the ids of its two sequences."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    chosen_id: str
    rejected_id: str

    @property
    def n_tokens(self) -> int:
        """Tokens of both sequences, the prompt counted twice."""
        return 2 * len(self.prompt) + len(self.chosen) + len(self.rejected)


@dataclass(frozen=True)
class Timed:
    """One pass over the work: seconds, what came out, and the most memory so far."""

    seconds: float
    sums: Sums
    peak_mib: float


@dataclass(frozen=True)
class TrlSetting:
    """How TRL's precompute is set up.

    Attributes:
        separate: a reference model of its own is given; by default the policy is the reference.
        by_length: pairs come sorted by their longer sequence, the longest first.
        batch: pairs per batch.
    """

    separate: bool
    by_length: bool
    batch: int

    def __str__(self) -> str:
        """As it is printed."""
        model = "separate reference" if self.separate else "default reference"
        return f"{model}, {'sorted' if self.by_length else 'as given'}, batch {self.batch}"


_score: list[Callable[..., Sums]] = []
"""In a scorer's process: what scores."""


def timed(*arguments: Any) -> Timed:
    """One pass of the scorer of this process."""
    started = perf_counter()
    sums = _score[0](*arguments)
    synchronise()
    seconds = perf_counter() - started
    return Timed(seconds, sums, peak_mib())


def open_ours(config: ModelConfig, checkpoint: Checkpoint, groups: list[Group]) -> str:
    """Load an engine as a plan does, and say what it found."""
    batching = batching_of(ScoringConfig(), numerics_of(config, checkpoint))
    engine = open_engine(config, checkpoint, longest(groups))

    def score(work: list[Group], how: dict[str, Any]) -> Sums:
        for name, value in how.items():
            setattr(engine, name, value)
        sums: Sums = {}
        for part in _calls(work, batching.call_tokens):
            for group, rows in zip(part, engine.score(part, batching.batch_tokens), strict=True):
                for completion, row in zip(group.completions, rows, strict=True):
                    sums[completion.sequence_id] = sequence_sum(row)
        return sums

    _score.append(score)
    return str(engine.sharing)


def open_trl(checkpoint: Checkpoint, dtype: str = "float32") -> None:
    """Build both of TRL's trainers, for `timed(pairs, setting)`."""
    os.environ["TQDM_DISABLE"] = "1"
    from datasets import Dataset, disable_progress_bars
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl.trainer.dpo_config import DPOConfig
    from trl.trainer.dpo_trainer import DPOTrainer

    disable_progress_bars()
    place = tempfile.mkdtemp()
    said: dict[str, Any] = {
        role: [{"role": "user" if role == "prompt" else "assistant", "content": role}]
        for role in ("prompt", "chosen", "rejected")
    }

    def model() -> Any:
        return AutoModelForCausalLM.from_pretrained(checkpoint.path, dtype=dtype)

    def trainer(reference: Any) -> Any:
        # What is asked of it here is `_precompute_ref_logps`, which its constructor calls.
        return DPOTrainer(
            model=model(),
            ref_model=reference,
            args=DPOConfig(
                output_dir=place,
                use_cpu=torch_device().type == "cpu",
                bf16=False,
                report_to=[],
                max_length=None,
                precompute_ref_log_probs=True,
                disable_tqdm=True,
            ),
            train_dataset=Dataset.from_list([said]),
            processing_class=AutoTokenizer.from_pretrained(checkpoint.path),
        )

    trainers = {False: trainer(None), True: trainer(model())}
    passes = iter(range(1 << 30))

    def score(pairs: list[Pair], setting: TrlSetting) -> Sums:
        if setting.by_length:
            pairs = sorted(
                pairs, key=lambda p: -max(len(p.chosen), len(p.rejected)) - len(p.prompt)
            )
        rows = [
            {"prompt_ids": p.prompt, "chosen_ids": p.chosen, "rejected_ids": p.rejected}
            for p in pairs
        ]
        asked = trainers[setting.separate]
        asked._precompute_model_hash = f"pass {next(passes)}"  # else it reads its cache
        scored = asked._precompute_ref_logps(Dataset.from_list(rows), "train", setting.batch)
        sums: Sums = {}
        for pair, row in zip(pairs, scored, strict=True):
            sums[pair.chosen_id] = float(row["ref_chosen_logps"])
            sums[pair.rejected_id] = float(row["ref_rejected_logps"])
        return sums

    _score.append(score)


def float64_sums(checkpoint: Checkpoint, groups: list[Group]) -> Sums:
    """The yardstick: transformers in float64, one sequence at a time."""
    import torch
    from transformers import AutoModelForCausalLM

    device = torch_device()
    model: Any = AutoModelForCausalLM.from_pretrained(
        checkpoint.path, dtype=torch.float64, attn_implementation="eager"
    )
    model.to(device).eval()
    sums = {}
    with torch.inference_mode():
        for group in groups:
            for completion in group.completions:
                row = np.concatenate([group.prompt_ids, completion.ids]).astype(np.int64)
                first = len(group.prompt_ids) - 1
                ids = torch.from_numpy(row)[None].to(device)
                kept = torch.arange(first, len(row) - 1, device=device)
                logits = model(input_ids=ids, logits_to_keep=kept).logits[0]
                logprobs = torch.log_softmax(logits, -1).gather(1, ids[0, first + 1 :, None])
                scored = logprobs.cpu()[torch.from_numpy(completion.scored), 0]
                sums[completion.sequence_id] = math.fsum(scored.tolist())
    return sums


def _calls(groups: list[Group], enough: int) -> list[list[Group]]:
    """Groups in the calls that scoring makes of them (`pipeline.scoring.run`)."""
    calls: list[list[Group]] = [[]]
    total = 0
    for group in groups:
        if total >= enough:
            calls.append([])
            total = 0
        calls[-1].append(group)
        total += group.n_tokens
    return calls


def quiet() -> None:
    """In a scorer's process: nothing but errors on its output."""
    import logging
    import warnings

    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    with contextlib.suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
