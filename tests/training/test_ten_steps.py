"""Ten optimiser steps of several losses against a second trainer: plain float64, its own log-probs,
its own schedule, and the losses written from the papers."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from support import measured, prepared

from pipeline.models import Checkpoint
from pipeline.names import wanted_sequences
from pipeline.plan import Plan
from pipeline.stages import train
from pipeline.store import Store, read
from pipeline.training.data.schedule import step_ids
from pipeline.training.run.model import trainable_model

WritePlan = Any
STEPS, RATE, WARMUP = 10, 4e-3, 1

Side = tuple[torch.Tensor, torch.Tensor, int]
"""(policy log-prob, reference log-prob, tokens) of a reply."""


def h(c: Side, r: Side) -> torch.Tensor:
    return (c[0] - c[1]) - (r[0] - r[1])


def sigmoid(x: torch.Tensor) -> torch.Tensor:
    return 1 / (1 + torch.exp(-x))


PAPERS: dict[str, Callable[[Side, Side, float], torch.Tensor]] = {
    # Rafailov et al. 2023, eq. 7
    "dpo": lambda c, r, kl: torch.log1p(torch.exp(-0.1 * h(c, r))),
    # Azar et al. 2023, eq. 17, tau = 0.1
    "ipo": lambda c, r, kl: (h(c, r) - 1 / (2 * 0.1)) ** 2,
    # the same over means, as its authors confirmed to TRL
    "ipo_mean": lambda c, r, kl: ((c[0] - c[1]) / c[2] - (r[0] - r[1]) / r[2] - 1 / (2 * 0.1)) ** 2,
    # Meng et al. 2024, eq. 6, beta 2, gamma 1
    "simpo": lambda c, r, kl: torch.log1p(torch.exp(-(2 * c[0] / c[2] - 2 * r[0] / r[2] - 1))),
    # Ethayarajh et al. 2024, eq. 8, lambda 1; the mean over the pair's two rows
    "kto": lambda c, r, kl: (
        ((1 - sigmoid(0.1 * (c[0] - c[1] - kl))) + (1 - sigmoid(0.1 * (kl - (r[0] - r[1]))))) / 2
    ),
    # the lecture, sections 8.2 and 8.4
    "lecture_ipo": lambda c, r, kl: (0.1 * (c[0] - c[1]) - 0.1 * (r[0] - r[1]) - 1 / 0.1) ** 2,
    "lecture_kto": lambda c, r, kl: (
        (1 - sigmoid(0.1 * (c[0] - c[1]))) + sigmoid(0.1 * (r[0] - r[1]))
    ),
}


def logprob(model: torch.nn.Module, row: dict[str, Any]) -> torch.Tensor:
    ids = torch.tensor([row["prompt_ids"] + row["completion_ids"]])
    logprobs = torch.log_softmax(model(input_ids=ids).logits[0, :-1], -1)
    picked: torch.Tensor = logprobs.gather(1, ids[0, 1:, None])[row["n_prompt"] - 1 :, 0].sum()
    return picked


def second_trainer(
    plan: Plan, store: Store, loss: Callable[[Side, Side, float], torch.Tensor]
) -> list[float]:
    """The mean losses of ten steps, from the adapter the first trainer starts with."""
    config, start = plan.models["base"], Checkpoint(Path(plan.models["base"].checkpoint))
    cpu = torch.device("cpu")
    single = trainable_model(start, config, plan.training, cpu)
    wide = config.model_copy(update={"dtype": "float64"})
    model = trainable_model(start, wide, plan.training, cpu)
    twins = dict(model.named_parameters())
    for name, parameter in single.named_parameters():
        twins[name].data = parameter.data.double()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.0)

    rows = {r["sequence_id"]: r for r in wanted_sequences(plan, store, "base").to_dicts()}
    ways = {r["pair_id"]: r for r in read(store, "pair_sequences").to_dicts()}
    mismatched: dict[str, list[str]] = {}
    if (store.directory / "kl_sequences").exists():
        for row in read(store, "kl_sequences/it").to_dicts():
            mismatched.setdefault(row["pair_id"], []).append(row["sequence_id"])
    with torch.no_grad(), model.disable_adapter():
        reference = {i: logprob(model, row) for i, row in rows.items()}
    train_ids = sorted(read(store, "pairs").filter(pl.col("split") == "train")["pair_id"])
    losses = []
    for step, batch in enumerate(step_ids(dict.fromkeys(train_ids, 1), plan.training)):
        with torch.no_grad():
            ratios = [
                float(logprob(model, rows[i]) - reference[i])
                for pair in batch
                for i in mismatched.get(pair, [])
            ]
        kl = max(0.0, sum(ratios) / len(ratios)) if ratios else 0.0
        terms = []
        for pair in batch:
            c, r = (
                (logprob(model, rows[i]), reference[i], rows[i]["n_scored"])
                for i in (ways[pair]["chosen_id"], ways[pair]["rejected_id"])
            )
            terms.append(loss(c, r, kl))
        mean = torch.stack(terms).mean()
        optimiser.zero_grad()
        torch.autograd.backward(mean)
        norm = math.sqrt(sum(float((p.grad**2).sum()) for p in parameters if p.grad is not None))
        for p in parameters:
            if p.grad is not None and norm > 1:
                p.grad /= norm
        # Linear: up over the warm-up, then down to 0 after the last step.
        share = step / WARMUP if step < WARMUP else (STEPS - step) / (STEPS - WARMUP)
        for group in optimiser.param_groups:
            group["lr"] = RATE * share
        optimiser.step()
        losses.append(float(mean))
    return losses


@pytest.mark.parametrize("loss", PAPERS)
def test_ten_steps_equal_a_float64_trainer_with_the_papers_formula(
    write_plan: WritePlan, loss: str
) -> None:
    spec = {"loss": loss, "reference": "base", "start": "base"}
    training = {"epochs": 4, "max_steps": STEPS, "batch_pairs": 4, "learning_rate": RATE}
    plan, store = prepared(write_plan(objectives={"it": spec}, training=training))
    mine = train(plan, store, "it").steps["loss"].to_list()
    oracle = second_trainer(plan, store, PAPERS[loss])
    assert len(mine) == len(oracle) == STEPS
    apart = max(abs(a / b - 1) for a, b in zip(mine, oracle, strict=True))
    measured(f"{loss}: ten losses at most {apart:.1e} apart, relative")
    assert apart < 5e-5
    assert max(abs(a - mine[0]) for a in mine) > 1e-2 * abs(mine[0]), "something was learnt"
    others = [second_trainer(plan, store, PAPERS[o]) for o in ("dpo", "ipo") if o != loss]
    assert all(other != pytest.approx(mine, rel=5e-5) for other in others), "control: other losses"
