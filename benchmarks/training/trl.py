"""TRL's trainers over given token ids and reference log-probs, in a given order.

What is timed and compared is their own `train`: only the dataset and its order are replaced, since
their constructors tokenise text and their samplers shuffle.
"""

import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from time import perf_counter
from types import SimpleNamespace
from typing import Any

from benchmarks.devices import synchronise
from pipeline.models import Checkpoint
from pipeline.plan import TrainingConfig
from pipeline.scoring.engines.torch_engine import torch_device
from pipeline.training.data.examples import Example

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "dpo": ("dpo", {"loss_type": "sigmoid"}),
    "ipo_mean": ("dpo", {"loss_type": "ipo"}),
    "hinge": ("dpo", {"loss_type": "hinge"}),
    "robust": ("dpo", {"loss_type": "robust"}),
    "simpo": ("cpo", {"loss_type": "simpo", "cpo_alpha": 0.0}),
    "kto": ("kto", {"loss_type": "kto"}),
}
"""Losses by our names: which trainer of TRL's has them, and its settings."""

_VALUES = {"gamma": "simpo_gamma"}


@dataclass
class TrlRun:
    """What TRL's training came to: losses of optimiser steps, and seconds each took."""

    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)


def trl_trainer(
    loss: str,
    values: dict[str, float],
    model: Any,
    checkpoint: Checkpoint,
    batches: Sequence[Sequence[Example]],
    config: TrainingConfig,
    *,
    micro: int,
    statistics: bool = True,
    bf16: bool = False,
) -> tuple[Any, TrlRun]:
    """A trainer of TRL's, and what its `train()` will fill.

    Args:
        loss: one of `KINDS`.
        values: the loss's parameters.
        model: what it trains, a model or a PEFT model.
        checkpoint: where its tokeniser is.
        batches: examples of every optimiser step, equally many in each.
        config: the optimiser and its schedule.
        micro: pairs at once; the rest is accumulated. For KTO all of a step must be at once.
        statistics: whether DPO's entropy, mean logits and token accuracy are computed; TRL has no
            switch for them, so they are left out of its fused head and zeros stand in.
        bf16: whether it computes under bfloat16 autocast.
    """
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    os.environ["TQDM_DISABLE"] = "1"
    from datasets import Dataset, disable_progress_bars
    from torch.utils.data import SequentialSampler
    from transformers import AutoTokenizer, TrainerCallback

    disable_progress_bars()
    which, settings = KINDS[loss]
    (n_pairs,) = {len(batch) for batch in batches}
    rows_per_pair = 2 if which == "kto" else 1
    n_steps = len(batches)
    arguments: dict[str, Any] = {
        "output_dir": tempfile.mkdtemp(),
        "use_cpu": torch_device().type == "cpu",
        "bf16": bf16,
        "report_to": [],
        "max_length": None,
        "disable_tqdm": True,
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "logging_strategy": "no",
        "per_device_train_batch_size": micro * rows_per_pair,
        "gradient_accumulation_steps": n_pairs // micro,
        "max_steps": n_steps,
        "learning_rate": config.learning_rate,
        "lr_scheduler_type": config.schedule,
        "warmup_steps": round(config.warmup_share * n_steps),
        "weight_decay": config.weight_decay,
        "adam_beta1": config.adam_beta1,
        "adam_beta2": config.adam_beta2,
        "adam_epsilon": config.adam_epsilon,
        "max_grad_norm": config.max_grad_norm,
        **settings,
        **{_VALUES.get(name, name): value for name, value in values.items()},
    }
    said = {
        role: [{"role": "user" if role == "prompt" else "assistant", "content": role}]
        for role in ("prompt", "chosen", "rejected")
    }
    tokenizer = AutoTokenizer.from_pretrained(checkpoint.path)
    if which == "dpo":
        from trl.trainer.dpo_config import DPOConfig
        from trl.trainer.dpo_trainer import DPOTrainer

        trainer: Any = DPOTrainer(
            model=model,
            args=DPOConfig(precompute_ref_log_probs=True, **arguments),
            train_dataset=Dataset.from_list([said]),
            processing_class=tokenizer,
        )
    elif which == "cpo":
        from trl.experimental.cpo import CPOConfig, CPOTrainer

        trainer = CPOTrainer(
            model=model,
            args=CPOConfig(**arguments),
            train_dataset=Dataset.from_list([{k: v[0]["content"] for k, v in said.items()}]),
            processing_class=tokenizer,
        )
    else:
        from trl.trainer.kto_config import KTOConfig
        from trl.trainer.kto_trainer import KTOTrainer

        rows = [
            {"prompt": said["prompt"], "completion": said["chosen"], "label": flag}
            for flag in (True, False) * (micro + 1)
        ]
        trainer = KTOTrainer(
            model=model,
            args=KTOConfig(precompute_ref_log_probs=True, **arguments),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
        )
    made = [row for i, batch in enumerate(batches) for row in _ROWS[which](batch, i + 1)]
    trainer.train_dataset = Dataset.from_list(made)
    trainer._get_train_sampler = lambda dataset=None: SequentialSampler(trainer.train_dataset)
    if which == "dpo" and not statistics:
        _leave_out_statistics(trainer.model)
    run = TrlRun()
    parts: list[Any] = []
    compute = trainer.compute_loss

    def watched(*given: Any, **named: Any) -> Any:
        found = compute(*given, **named)
        parts.append((found[0] if isinstance(found, tuple) else found).detach())
        return found

    trainer.compute_loss = watched

    class Watch(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            parts.clear()
            synchronise()
            self.began = perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            synchronise()
            run.seconds.append(perf_counter() - self.began)
            run.losses.append(sum(map(float, parts)) / len(parts))

    trainer.add_callback(Watch())
    return trainer, run


def _dpo_rows(batch: Sequence[Example], step: int) -> list[dict[str, Any]]:
    return [
        {
            "prompt_ids": example.prompt_ids.tolist(),
            "chosen_ids": example.replies[0].ids.tolist(),
            "rejected_ids": example.replies[1].ids.tolist(),
            "ref_chosen_logps": example.references[0],
            "ref_rejected_logps": example.references[1],
        }
        for example in batch
    ]


def _cpo_rows(batch: Sequence[Example], step: int) -> list[dict[str, Any]]:
    rows = []
    for example in batch:
        prompt = example.prompt_ids.tolist()
        row: dict[str, Any] = {
            "prompt": "",
            "prompt_input_ids": prompt,
            "prompt_attention_mask": [1] * len(prompt),
        }
        for side, reply in zip(example.sides, example.replies, strict=True):
            ids = reply.ids.tolist()
            row[f"{side}_input_ids"] = prompt + ids
            row[f"{side}_attention_mask"] = [1] * len(prompt + ids)
            row[f"{side}_labels"] = [-100] * len(prompt) + ids
        rows.append(row)
    return rows


def _kto_rows(batch: Sequence[Example], step: int) -> list[dict[str, Any]]:
    """The chosen sides, then the rejected ones, each with the reply of the row before."""
    sides = [(example, side) for side in (0, 1) for example in batch]
    rows = []
    for i, (example, side) in enumerate(sides):
        other, its_side = sides[i - 1]
        mismatched = example.mismatched_in(step)[side]
        if not (mismatched.completion.ids == other.replies[its_side].ids).all():
            raise ValueError(f"the mismatched reply of {example.example_id} is not TRL's")
        rows.append(
            {
                "prompt_ids": example.prompt_ids.tolist(),
                "completion_ids": example.replies[side].ids.tolist(),
                "KL_completion_ids": mismatched.completion.ids.tolist(),
                "label": side == 0,
                "ref_logps": example.references[side],
                "ref_KL_logps": mismatched.reference,
            }
        )
    return rows


_ROWS = {"dpo": _dpo_rows, "cpo": _cpo_rows, "kto": _kto_rows}


def _leave_out_statistics(model: Any) -> None:
    """Have TRL's fused head compute log-probs alone; what its metrics read are zeros."""
    import torch
    from trl.trainer.utils import add_fused_lm_head

    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    inner.forward = type(inner).forward.__get__(inner)
    add_fused_lm_head(inner, outputs=("log_probs",))
    fused = inner.forward

    def forward(*given: Any, **named: Any) -> Any:
        found = fused(*given, **named)
        if not named.get("fused_lm_head"):
            return found
        nothing = torch.zeros_like(found.log_probs.detach())
        return SimpleNamespace(
            log_probs=found.log_probs,
            entropy=nothing,
            mean_logits=nothing,
            is_top1=nothing.bool(),
            log_sum_sq_probs=nothing,
        )

    inner.forward = forward
