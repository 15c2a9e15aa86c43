"""Losses of a pair among others: AOT's sort, the statistics of BCO, β-DPO and the token mean, sums,
and a step that goes through its pairs one by one all the same."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from loss_pairs import A_PAIR, STATISTICS, Numbers, a_pair, batch_of, gradients
from papers import FORMULAS, exact, log_sigmoid, slope
from support import prepared, stepped

from pipeline.errors import TrainingError
from pipeline.losses import REGISTRY, weighted_sum
from pipeline.losses.table import statistics_of
from pipeline.models import Checkpoint
from pipeline.names import key_of
from pipeline.plan import ObjectiveConfig
from pipeline.scoring.ledger import read_logprobs
from pipeline.stages import train
from pipeline.store import read
from pipeline.training.data.examples import Example, training_pairs, values_digest
from pipeline.training.run.model import trainable_model

WritePlan = Any
SIDES = ("chosen", "rejected")


def sorted_margins(name: str, pairs: list[Numbers]) -> tuple[list[float], list[int], list[int]]:
    """The matched margins in rising order, and whose chosen and rejected reply is in each."""

    def order(key: Callable[[Numbers], float]) -> list[int]:
        return sorted(range(len(pairs)), key=lambda i: key(pairs[i]))

    def apart(model: str) -> Callable[[Numbers], float]:
        return lambda pair: pair[f"{model}_chosen"] - pair[f"{model}_rejected"]

    def moved(side: str) -> Callable[[Numbers], float]:
        return lambda pair: pair[f"policy_{side}"] - pair[f"reference_{side}"]

    if name == "aot":
        policy, reference = order(apart("policy")), order(apart("reference"))
        both = zip(policy, reference, strict=True)
        margins = [apart("policy")(pairs[i]) - apart("reference")(pairs[j]) for i, j in both]
        return margins, policy, policy
    chosen, rejected = order(moved("chosen")), order(moved("rejected"))
    both = zip(chosen, rejected, strict=True)
    margins = [moved("chosen")(pairs[i]) - moved("rejected")(pairs[j]) for i, j in both]
    return margins, chosen, rejected


@pytest.mark.parametrize("name", ["aot", "aot_unpaired"])
def test_aot_is_the_papers(name: str) -> None:
    """Melnyk et al. 2024: quantile against quantile; 30 batches of 1 to 13 pairs."""
    generator, spec = np.random.default_rng(3), REGISTRY[name]

    def smoothed(x: Any) -> Any:
        m = x["beta"] * x["margin"]
        return -(1 - x["e"]) * log_sigmoid(m), -x["e"] * log_sigmoid(-m)

    n_moved = 0
    for n in [*range(1, 14), *[7] * 17]:
        pairs = [a_pair(generator, 60.0) for _ in range(n)]
        values = {"beta": generator.uniform(0.01, 2), "label_smoothing": generator.uniform(0, 0.4)}
        margins, chosen, rejected = sorted_margins(name, pairs)
        numbers = [
            {"beta": values["beta"], "e": values["label_smoothing"], "margin": m} for m in margins
        ]
        batch = batch_of(pairs)
        losses = spec.loss(batch, values, {}).tolist()
        found = gradients(spec, batch_of(pairs), values, {})
        closed = [side.tolist() for side in spec.logprob_slopes(batch, values, {})]
        for x, i, j in zip(numbers, chosen, rejected, strict=True):
            assert losses[i] == pytest.approx(exact(smoothed, x), rel=1e-9)
            by_margin = slope(smoothed, x, "margin")
            for gradient in (found, closed):
                assert gradient[0][i] == pytest.approx(by_margin, rel=1e-9, abs=1e-12)
                assert gradient[1][j] == pytest.approx(-by_margin, rel=1e-9, abs=1e-12)
        alone = REGISTRY["cdpo"].loss(batch, values, {}).tolist()
        n_moved += alone != pytest.approx(losses)
        if n == 1:
            assert alone == pytest.approx(losses, rel=1e-12), "one pair is its own quantile"
    assert n_moved > 20, "control: unsorted losses must differ"


@pytest.mark.parametrize("name", REGISTRY)
def test_a_losss_scope_is_what_it_depends_on(name: str) -> None:
    """Among others, or with another statistic, only a loss of the whole step is another one."""
    spec = REGISTRY[name]
    pairs = [a_pair(np.random.default_rng(seed), 30.0) for seed in range(5)]

    def first(members: list[Numbers], kl: float) -> float:
        batch = batch_of(members)
        known = {"kl": kl}
        if spec.statistic is not None:
            known |= spec.statistic(batch, spec.defaults, {"running": 1.0})
        return spec.loss(batch, spec.defaults, known)[0].item()

    among, alone = first(pairs, 1.5), first(pairs[:1], 0.0)
    assert spec.scope == ("pair" if among == pytest.approx(alone, rel=1e-12) else "optimizer_step")


def test_statistics_are_means_over_the_batch() -> None:
    pairs = [a_pair(np.random.default_rng(seed), 60.0) for seed in range(5)]
    batch = batch_of(pairs)
    ratios = [[p[f"policy_{s}"] - p[f"reference_{s}"] for s in SIDES] for p in pairs]

    def of(name: str, before: Numbers | None = None) -> Any:
        spec = REGISTRY[name]
        assert spec.statistic is not None
        return spec.statistic(batch, {**spec.defaults, "beta": 0.3}, before or {})

    shift = 0.3 * math.fsum(map(sum, ratios)) / 10
    assert of("bco_pair") == {"shift": pytest.approx(shift, rel=1e-12)}
    assert of("bco_unpaired") == of("bco_pair")
    tokens = math.fsum(p["n_chosen"] for p in pairs) / 5
    assert of("nll_token_mean") == {"tokens": pytest.approx(tokens)}
    mean = math.fsum(c - r for c, r in ratios) / 5
    assert of("beta_dpo") == {"surplus": 0.0, "running": pytest.approx(mean)}
    later = of("beta_dpo", {"running": mean - 2.0})
    assert later == {
        "surplus": pytest.approx(2.0), "running": pytest.approx(mean - 1.8)
    }  # fmt: skip


def test_a_sum_is_the_sum_of_its_terms_with_their_own_values_and_statistics() -> None:
    terms = ("bco_pair", "simpo", "kto", "bco_unpaired", "nll_mean")
    spec = weighted_sum({name: REGISTRY[name] for name in terms})
    generator = np.random.default_rng(4)
    pairs = [a_pair(generator, 60.0) for _ in range(6)]
    batch = batch_of(pairs)
    values = {key: generator.uniform(0.5, 2) for key in spec.parameters}
    statistics = statistics_of(batch, spec, values, {"kl": 1.5})
    assert statistics["bco_pair.shift"] != statistics["bco_unpaired.shift"], "each has its own beta"
    losses = spec.loss(batch, values, statistics).tolist()
    found = gradients(spec, batch_of(pairs), values, statistics)
    closed = [side.tolist() for side in spec.logprob_slopes(batch, values, statistics)]
    for row, pair in enumerate(pairs):
        total, slopes = 0.0, [0.0, 0.0]
        for name in terms:
            own = {
                key.partition(".")[2]: x
                for key, x in {**values, **statistics}.items()
                if key.startswith(f"{name}.")
            }
            numbers = {**pair, **own, "kl": 1.5}
            total += own["weight"] * exact(FORMULAS[name], numbers)
            for k, side in enumerate(SIDES):
                slopes[k] += own["weight"] * slope(FORMULAS[name], numbers, f"policy_{side}")
        assert losses[row] == pytest.approx(total, rel=1e-9)
        for k in range(2):
            assert found[k][row] == pytest.approx(slopes[k], rel=1e-9)
            assert closed[k][row] == pytest.approx(slopes[k], rel=1e-9)
    other_way = weighted_sum({name: REGISTRY[name] for name in reversed(terms)})
    assert other_way.loss(batch, values, statistics).tolist() == losses, "to the bit"
    assert spec.reward_beta(values) == values["bco_pair.beta"]
    assert set(spec.needs) == {"reference", "batch", "lengths", "kl"}
    of_lead = weighted_sum({"dpo": REGISTRY["dpo"], "nll_sum": REGISTRY["nll_sum"]})
    plain = batch_of([A_PAIR])
    weighted = {"dpo.weight": 2.0, "dpo.beta": 0.1, "nll_sum.weight": 0.05}
    dpo = REGISTRY["dpo"].gradient_weight(plain, {"beta": 0.1}, STATISTICS).item()
    # Per unit of the lead's score: 2 x DPO's on both sides, and 0.05 / 0.1 on the chosen one.
    assert of_lead.gradient_weight(plain, weighted, {}).item() == pytest.approx(2 * dpo + 0.25)


def objective(loss: Any, **values: float) -> ObjectiveConfig:
    return ObjectiveConfig.model_validate(
        {"loss": loss, "reference": "base", "start": "base", **values}
    )


def log_sigmoid_(x: torch.Tensor) -> torch.Tensor:
    return -torch.log1p(torch.exp(-x))


def of_batch(name: str, hw: torch.Tensor, hl: torch.Tensor, ref: torch.Tensor) -> torch.Tensor:
    """The mean loss of a batch, written out: log-ratios [B], and the reference's margins [B]."""
    shift = (0.1 * torch.cat([hw, hl])).mean().detach()
    match name:
        case "aot":
            apart = (hw - hl + ref).sort().values - ref.sort().values
            return -log_sigmoid_(0.1 * apart).mean()
        case "aot_unpaired":
            return -log_sigmoid_(0.1 * (hw.sort().values - hl.sort().values)).mean()
        case "bco_pair":
            return -(log_sigmoid_(0.1 * hw - shift) + log_sigmoid_(shift - 0.1 * hl)).mean()
        case "beta_dpo":
            surplus = ((hw - hl).mean() - 1.0).detach()  # the running mean is 1
            beta = max(1e-3, 0.1 * (1 + 0.6 * float(surplus)))
            return -log_sigmoid_(beta * (hw - hl)).mean()
    dpo = -log_sigmoid_(0.1 * (hw - hl)).mean()
    return 0.7 * dpo + 0.3 * of_batch("bco_pair", hw, hl, ref)


STEPS: dict[str, Any] = {
    **{name: name for name in ("aot", "aot_unpaired", "bco_pair", "beta_dpo")},
    "sum": {"dpo": 0.7, "bco_pair": 0.3},
}


@pytest.mark.parametrize("name", STEPS)
def test_a_step_of_single_pairs_has_the_whole_batchs_gradient(
    write_plan: WritePlan, name: str
) -> None:
    """Per adapter tensor, against autograd through the whole batch at once, in float64."""
    plan, store = prepared(write_plan())
    start = Checkpoint(Path(plan.models["base"].checkpoint))
    pairs = the_pairs(plan, store)[:5]
    # References away from the start, so that the sort has something to do.
    pairs = [
        replace(
            pair,
            references=(
                pair.references[0] - 3.0 * (i % 3),
                pair.references[1] + 2.0 * (i % 4) - 3.0,
            ),
        )
        for i, pair in enumerate(pairs)
    ]
    grads = []
    for ahead_of_it in (True, False):
        numerics = plan.models["base"].model_copy(update={"dtype": "float64"})
        model = trainable_model(start, numerics, plan.training, torch.device("cpu"))
        for key, parameter in model.named_parameters():
            if "lora_B" in key:
                parameter.data = torch.randn_like(parameter) * 0.05
        if ahead_of_it:
            found = stepped(
                model, pairs, objective(STEPS[name]), before={"running": 1.0}, most_tokens=1
            )
            seen = [numbers["loss"] or 0.0 for numbers in found.seen]
        else:
            sums = torch.stack([torch.stack(written_out(model, pair)) for pair in pairs])
            references = torch.tensor([pair.references for pair in pairs])
            ratios = sums - references.double()
            apart = (references[:, 0] - references[:, 1]).double()
            loss = of_batch(name, ratios[:, 0], ratios[:, 1], apart)
            torch.autograd.backward(loss)
            assert sum(seen) / len(seen) == pytest.approx(loss.item(), rel=1e-6)
        grads.append({k: p.grad for k, p in model.named_parameters() if p.grad is not None})
    mine, oracle = grads
    assert len(mine) == len(oracle) == 28
    for key, gradient in oracle.items():
        assert gradient.norm() > 0
        assert (mine[key] - gradient).norm() / gradient.norm() < 1e-5, key


def written_out(model: torch.nn.Module, pair: Example) -> list[torch.Tensor]:
    totals = []
    for completion in pair.replies:
        ids = torch.tensor([[*pair.prompt_ids, *completion.ids]])
        logprobs = torch.log_softmax(model(input_ids=ids).logits[0, :-1], -1)
        picked = logprobs.gather(1, ids[0, 1:, None])[:, 0]
        totals.append(picked[len(pair.prompt_ids) - 1 :].sum())
    return totals


def the_pairs(plan: Any, store: Any, strengths: pl.Series | None = None) -> list[Example]:
    reference, _ = key_of(plan, store, "base")
    pairs = read(store, "pairs")
    if strengths is not None:
        pairs = pairs.with_columns(strength=strengths)
    return training_pairs(
        pairs,
        read(store, "pair_sequences"),
        read(store, "sequences"),
        read_logprobs(reference),
        with_strength=strengths is not None,
    )


def test_strengths_reach_the_loss_and_the_identity(write_plan: WritePlan) -> None:
    plan, store = prepared(write_plan())
    n = read(store, "pairs").height
    one, two = (pl.Series([float(i)] * n) for i in (1, 2))
    weak, strong = (the_pairs(plan, store, strength) for strength in (one, two))
    assert values_digest(weak) != values_digest(strong)
    assert values_digest(the_pairs(plan, store)) not in (values_digest(weak), values_digest(strong))
    start = Checkpoint(Path(plan.models["base"].checkpoint))
    model = trainable_model(start, plan.models["base"], plan.training, torch.device("cpu"))
    found = [
        stepped(model, pairs[:1], objective("rpo_sq")).seen[0]["loss"] for pairs in (weak, strong)
    ]
    assert found == pytest.approx([1.0, 4.0]), "(0 - strength)^2 at the start"
    some = pl.Series([None, *[1.0] * (n - 1)], dtype=pl.Float64)
    pairs = read(store, "pairs").sort(pl.col("split") != "train").with_columns(strength=some)
    reference, _ = key_of(plan, store, "base")
    with pytest.raises(TrainingError, match="1 of 9 pairs have no strength") as caught:
        training_pairs(
            pairs,
            read(store, "pair_sequences"),
            read(store, "sequences"),
            read_logprobs(reference),
            with_strength=True,
        )
    assert pairs["pair_id"][0] in str(caught.value)


def test_a_loss_of_the_step_and_a_sum_train_from_a_plan(write_plan: WritePlan) -> None:
    of = {"reference": "base", "start": "base"}
    objectives = {
        "aot": {"loss": "aot_unpaired", **of},
        "mixed": {"loss": {"dpo": 1.0, "nll_mean": 0.2}, "beta": 0.3, **of},
    }
    plan, store = prepared(
        write_plan(objectives=objectives), "training.epochs=6", "training.learning_rate=1e-2"
    )
    for name in objectives:
        steps = train(plan, store, name).steps
        assert steps["rewards/accuracies"][0] == 0.5
        assert steps["loss"][-1] < 0.7 * steps["loss"][0]
    first = read(store, "training_steps/mixed").row(0, named=True)
    assert first["loss"] > math.log(2), "ln 2, and the chosen replies' NLL"
    assert read(store, "training_steps/aot")["loss"][0] == pytest.approx(math.log(2))
