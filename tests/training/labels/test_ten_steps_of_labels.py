"""Ten optimiser steps on labels: KTO against TRL's KTOTrainer, BCO against a float64 trainer."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from support import measured, prepared
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.plan import Plan
from pipeline.stages import train
from pipeline.store import Store, read
from pipeline.training.data.schedule import step_ids

WritePlan = Any
WriteLabels = Callable[..., dict[str, str]]
STEPS, BATCH, RATE = 10, 4, 3e-3
KTO = {"loss": "kto", "beta": 0.1, "undesirable_weight": 1.6, "kl_partner": "batch_rotation"}
BCO = {"loss": "bco_unpaired", "beta": 0.1, "undesirable_weight": 1.6}


def trained(
    write_plan: WritePlan, write_labels: WriteLabels, objective: dict[str, object]
) -> tuple[Plan, Store]:
    """A plan of 20 labels and no pair, ready to be trained for two epochs of five steps."""
    path = write_plan(
        sources={"labels": write_labels(20)},
        split={"test_share": 0.0},
        objectives={"it": {**objective, "reference": "base", "start": "base"}},
        training={
            **{"method": "full", "epochs": 2, "batch_pairs": BATCH, "learning_rate": RATE},
            "warmup_share": 0.1,
        },
    )
    return prepared(path)


def in_order(plan: Plan, store: Store) -> list[dict[str, Any]]:
    """The labels of all steps, one after the other, with their token ids."""
    ways = dict(read(store, "label_sequences").select("label_id", "sequence_id").iter_rows())
    sequences = {row["sequence_id"]: row for row in read(store, "sequences").to_dicts()}
    labels = {
        row["label_id"]: {**row, **sequences[ways[row["label_id"]]]}
        for row in read(store, "labels").to_dicts()
    }
    steps = step_ids(dict.fromkeys(labels, 1), plan.training)
    assert [len(batch) for batch in steps] == [BATCH] * STEPS
    return [labels[i] for batch in steps for i in batch]


class Theirs(NamedTuple):
    """What TRL's own training came to: losses, KL terms (nats) and the model."""

    losses: list[float]
    kl: list[float]
    model: Any


def trl_training(plan: Plan, rows: list[dict[str, Any]], out: Path, **changes: Any) -> Theirs:
    """TRL's own training over these rows, in this order."""
    from datasets import Dataset
    from trl.trainer.kto_config import KTOConfig
    from trl.trainer.kto_trainer import KTOTrainer

    seen: list[float] = []
    kl: list[float] = []

    class Recorded(KTOTrainer):
        def compute_loss(self, *arguments: Any, **keywords: Any) -> Any:
            loss: torch.Tensor = super().compute_loss(*arguments, **keywords)  # type: ignore[no-untyped-call]
            seen.append(loss.item())
            kl.append(self._metrics["train"]["kl"][-1])
            return loss

    checkpoint = plan.models["base"].checkpoint
    settings = {
        **{"beta": 0.1, "desirable_weight": 1.0, "undesirable_weight": 1.6},
        **{"per_device_train_batch_size": BATCH, "num_train_epochs": 1, "learning_rate": RATE},
        **{"lr_scheduler_type": "linear", "warmup_steps": 1, "max_grad_norm": 1.0},
        **{"bf16": False, "gradient_checkpointing": False, "use_cpu": True, "max_length": None},
        **{"report_to": [], "save_strategy": "no", "logging_steps": 1, "disable_tqdm": True},
    }
    dataset = Dataset.from_list(
        [
            {
                "prompt": row["prompt"],
                "completion": [{"role": "assistant", "content": row["completion"]}],
                "label": row["desirable"],
            }
            for row in rows
        ]
    )
    trainer = Recorded(
        model=AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32),
        args=KTOConfig(output_dir=str(out), **{**settings, **changes}),
        train_dataset=dataset,
        processing_class=AutoTokenizer.from_pretrained(checkpoint),
    )
    for theirs, ours in zip(trainer.train_dataset, rows, strict=True):
        assert theirs["prompt_ids"] == ours["prompt_ids"]
        assert theirs["completion_ids"] == ours["completion_ids"]
    trainer.train()
    return Theirs(seen, kl, trainer.model)


def apart(mine: list[float], theirs: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(mine, theirs, strict=True))


def test_kto_on_labels_makes_trls_steps(
    write_plan: WritePlan, write_labels: WriteLabels, tmp_path: Path
) -> None:
    plan, store = trained(write_plan, write_labels, KTO)
    result = train(plan, store, "it")
    assert (result.first_step.difference, result.first_step.accuracy) == (0.0, None)
    mine, kl = result.steps["loss"].to_list(), result.steps["kl"].to_list()
    rows = in_order(plan, store)
    theirs = trl_training(plan, rows, tmp_path)
    moved = max(theirs.losses) - min(theirs.losses)
    turned = [{**row, "desirable": not row["desirable"]} for row in rows]
    controls = {
        "shuffled": trl_training(plan, rows[::-1], tmp_path),
        "flags turned": trl_training(plan, turned, tmp_path),
        "beta": trl_training(plan, rows, tmp_path, beta=0.15),
        "weights": trl_training(plan, rows, tmp_path, undesirable_weight=1.5),
    }
    start = AutoModelForCausalLM.from_pretrained(plan.models["base"].checkpoint).state_dict()
    ours = AutoModelForCausalLM.from_pretrained(result.directory).state_dict()

    def update_error(one: Theirs) -> float:
        """||dW - dW_TRL|| / ||dW_TRL|| over all weights."""
        updates = [
            torch.cat([(state[key] - start[key]).double().flatten() for key in start])
            for state in (ours, one.model.state_dict())
        ]
        return float((updates[0] - updates[1]).norm() / updates[1].norm())

    errors = {name: update_error(other) for name, other in controls.items()}
    said = ", ".join(
        f"{name} {apart(mine, other.losses):.1e} and {errors[name]:.1e}"
        for name, other in controls.items()
    )
    measured(
        f"KTO on labels against TRL: ten losses at most {apart(mine, theirs.losses):.1e} apart, "
        f"KL terms {apart(kl, theirs.kl):.1e} nats, the update {update_error(theirs):.1e}; TRL's "
        f"loss moves by {moved:.2g}; controls: {said}"
    )
    assert len(mine) == STEPS
    assert apart(mine, theirs.losses) < 1e-5
    assert apart(kl, theirs.kl) < 1e-3
    assert update_error(theirs) < 2e-3
    assert max(theirs.kl) > 0.1
    assert moved > 1e-2
    for name, other in controls.items():
        assert apart(mine, other.losses) > 1e-4, name
        assert errors[name] > 1e-2, name


def logprob(model: torch.nn.Module, row: dict[str, Any]) -> torch.Tensor:
    ids = torch.tensor([row["prompt_ids"] + row["completion_ids"]])
    logprobs = torch.log_softmax(model(input_ids=ids).logits[0, :-1], -1)
    picked: torch.Tensor = logprobs.gather(1, ids[0, 1:, None])[row["n_prompt"] - 1 :, 0].sum()
    return picked


def bco(rewards: list[torch.Tensor], liked: list[bool], weight: float) -> torch.Tensor:
    """Jung et al. 2024, section 4: delta is the mean of the two classes' mean rewards."""
    classes = [
        [reward.item() for reward, of in zip(rewards, liked, strict=True) if of is one]
        for one in (True, False)
    ]
    means = [sum(rewards) / len(rewards) for rewards in classes if rewards]
    delta = sum(means) / len(means)
    rows = [
        torch.log1p(torch.exp(delta - r)) if one else weight * torch.log1p(torch.exp(r - delta))
        for r, one in zip(rewards, liked, strict=True)
    ]
    return torch.stack(rows).mean()


def second_trainer(
    plan: Plan, rows: list[dict[str, Any]], weight: float = 1.6, beta: float = 0.1
) -> list[float]:
    """BCO in float64, all weights, with AdamW, clipping and a schedule of its own."""
    checkpoint = plan.models["base"].checkpoint
    model, reference = (
        AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float64) for _ in range(2)
    )
    parameters = list(model.parameters())
    optimiser = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.0)
    losses = []
    for step in range(STEPS):
        batch = rows[BATCH * step : BATCH * (step + 1)]
        with torch.no_grad():
            known = [logprob(reference, row) for row in batch]
        rewards = [beta * (logprob(model, row) - q) for row, q in zip(batch, known, strict=True)]
        loss = bco(rewards, [row["desirable"] for row in batch], weight)
        optimiser.zero_grad()
        torch.autograd.backward(loss)
        norm = math.sqrt(sum(float((p.grad**2).sum()) for p in parameters if p.grad is not None))
        for p in parameters:
            if p.grad is not None and norm > 1:
                p.grad /= norm
        # Linear: up over one step, then down to 0 after the last.
        share = 0.0 if step == 0 else (STEPS - step) / (STEPS - 1)
        for group in optimiser.param_groups:
            group["lr"] = RATE * share
        optimiser.step()
        losses.append(loss.item())
    return losses


def test_bco_on_labels_equals_a_float64_trainer(
    write_plan: WritePlan, write_labels: WriteLabels
) -> None:
    plan, store = trained(write_plan, write_labels, BCO)
    mine = train(plan, store, "it").steps["loss"].to_list()
    rows = in_order(plan, store)
    oracle = second_trainer(plan, rows)
    controls = {
        "shuffled": second_trainer(plan, rows[::-1]),
        "flags turned": second_trainer(
            plan, [{**row, "desirable": not row["desirable"]} for row in rows]
        ),
        "beta": second_trainer(plan, rows, beta=0.15),
        "weight": second_trainer(plan, rows, weight=1.5),
    }
    said = ", ".join(f"{name} {apart(mine, other):.1e}" for name, other in controls.items())
    measured(f"BCO on labels: ten losses at most {apart(mine, oracle):.1e} apart; controls: {said}")
    assert len(mine) == STEPS
    assert apart(mine, oracle) < 1e-5
    assert max(oracle) - min(oracle) > 1e-2, "something was learnt"
    assert all(apart(mine, other) > 1e-4 for other in controls.values())
