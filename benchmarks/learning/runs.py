"""One training run of the benchmark, from its plan to the held-out pairs it got right."""

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import polars as pl
import yaml

from pipeline.ids import unit_interval
from pipeline.intake import run_intake
from pipeline.names import store_of
from pipeline.plan import Plan, load_plan
from pipeline.report.baselines import baselines
from pipeline.stages import compute_rewards, score, tokenize, train
from pipeline.store import Store, read


@dataclass(frozen=True)
class Task:
    """A run: which data, which objective, which seed, and whose labels it is trained on.

    `labels` is `true`; `shuffled`, half of them turned round by a coin of that seed; or `mirrored`,
    the other half. A policy learns some direction from any labels, and follows it on every
    held-out pair, so one shuffle can end far from 0.5; with its mirror image it tends back there,
    unless something but the labels tells chosen from rejected.
    """

    data: str
    objective: str
    seed: int
    labels: str = "true"

    @property
    def name(self) -> str:
        """The plan's name."""
        return "_".join(
            [self.data, self.objective, str(self.seed)] + [self.labels] * (self.labels != "true")
        )


def write_plan(task: Task, base: Path, store: Path, changes: dict[str, Any]) -> Path:
    """The plan of a run: the base plan with one objective and the task's seed.

    The policies are scored on held-out pairs only; the second engine is left out.
    """
    values = yaml.safe_load(base.read_text())
    for source in values["sources"].values():
        source["path"] = str((base.parent / source["path"]).resolve())
    values.update(changes)
    values["name"], values["store"] = task.name, str(store)
    values["objectives"] = {task.objective: values["objectives"][task.objective]}
    values["training"] = {**values["training"], "seed": task.seed}
    values["scoring"] = {"train_pairs": 0}
    path = store / "plans" / f"{task.name}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return path


def prepare(path: Path) -> tuple[Plan, Store]:
    """Intake, tokenisation and the reference's log-probs, as far as they are not there."""
    plan = load_plan(path, environment={})
    store = store_of(plan)
    run_intake(plan, store)
    tokenize(plan, store)
    for name in plan.scored_models:
        score(plan, store, name)
    return plan, store


def run(task: Task, path: Path) -> dict[str, Any]:
    """Train, score the held-out pairs, and say which are right; baselines beside them.

    Returns:
        The task's fields, `correct` by pair (1, 0, or 0.5 for a tie) with the pair's prompt, the
        same in the loss's own score, `baselines`, and the first and last training loss.
    """
    plan, store = prepare(path)
    trained = train(plan, store, task.objective)
    score(plan, store, task.objective)
    compute_rewards(plan, store, task.objective)
    pairs = read(store, "pairs")
    rewards = read(store, f"rewards/{task.objective}").filter(split="test").sort("pair_id")
    own = pl.col("objective_score_chosen") - pl.col("objective_score_rejected")
    ways = read(store, "pair_sequences")
    fitted = pairs.filter(split="train").join(ways, on="pair_id", how="semi")
    return {
        **vars(task),
        "n_trained": fitted.height,
        "prompts": rewards["prompt_id"].to_list(),
        "correct": rewards["correct"].to_list(),
        "own_correct": rewards.select(0.5 * (own.sign() + 1)).to_series().to_list(),
        "baselines": baselines(rewards, pairs, fitted),
        "loss": [trained.steps["loss"][0], trained.steps["loss"][-1]],
    }


def shuffle_labels(path: Path, source: Path, seed: int, target: Path, *, mirrored: bool) -> Path:
    """A copy of a plan's conversational file with half its training labels turned round.

    The held-out pairs keep theirs, so a policy trained on the copy is judged by true labels.
    """
    plan = load_plan(path, environment={})
    run_intake(plan, store_of(plan))
    train = read(store_of(plan), "pairs").filter(split="train")
    turned = {
        row
        for row, prompt in train.select("row", "prompt_id").iter_rows()
        if (unit_interval(prompt, f"turned {seed}") < 0.5) != mirrored
    }
    lines = source.read_text(encoding="utf-8").splitlines()
    swapped = map(partial(_swapped, turned), enumerate(lines))
    target.write_text("".join(swapped), encoding="utf-8")
    return target


def _swapped(turned: set[int], numbered: tuple[int, str]) -> str:
    number, line = numbered
    row = json.loads(line)
    if number in turned:
        row["chosen"], row["rejected"] = row["rejected"], row["chosen"]
    return json.dumps(row, ensure_ascii=False) + "\n"
