"""Every loss TRL 1.16 has, run from the installed package; and each place where it is elsewhere.

`test_loss_oracles` says how TRL's trainers are made to run; here they run for the whole family.
"""

from collections.abc import Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from trl_trainers import (
    ACCELERATOR,
    N_PROMPT,
    Rows,
    bare,
    cpo_trainer,
    gradient,
    make_rows,
    trl_dpo,
)

from pipeline.losses import REGISTRY, PairBatch, weighted_sum
from pipeline.losses.table import statistics_of

BETA = {"beta": 0.1}


def columns(rows: Rows) -> PairBatch:
    """The batch with what LD-DPO and WPO read, computed here from the rows' tokens."""
    more: dict[str, torch.Tensor] = {}
    for k, side in enumerate(("chosen", "rejected")):
        prefixes: dict[str, list[torch.Tensor]] = {"policy": [], "reference": []}
        alignment = []
        for pair in range(4):
            row, public = 4 * k + pair, min(rows.n[pair], rows.n[4 + pair])
            first = N_PROMPT - 1
            for name, table in (("policy", rows.policy), ("reference", rows.reference)):
                prefixes[name].append(table[row, first : first + public].sum())
            tokens = rows.policy[row, first : first + rows.n[row]]
            squares = rows.squares[row, first : first + rows.n[row]]
            alignment.append((tokens - squares).mean())
        more |= {f"{name}_prefix_{side}": torch.stack(found) for name, found in prefixes.items()}
        more[f"alignment_{side}"] = torch.stack(alignment).detach()
    return replace(rows.batch(), more=more)


def ours(name: str, batch: PairBatch, values: Mapping[str, float]) -> torch.Tensor:
    """A step's loss: the mean over its pairs, its statistics being the batch's."""
    spec = REGISTRY[name]
    complete = {**spec.defaults, **values}
    return spec.loss(batch, complete, statistics_of(batch, spec, complete)).mean()


# Ours, TRL's loss_type, our values, TRL's own attributes.
SAME: list[tuple[str, str, dict[str, float], dict[str, Any]]] = [
    ("dpo", "sigmoid", BETA, {}),
    ("hinge", "hinge", BETA, {}),
    ("ipo_mean", "ipo", BETA, {}),
    ("exo_pair", "exo_pair", {**BETA, "label_smoothing": 0.02}, {"label_smoothing": 0.02}),
    ("nca_pair", "nca_pair", BETA, {}),
    ("robust", "robust", {**BETA, "label_smoothing": 0.2}, {"label_smoothing": 0.2}),
    ("bco_pair_unshifted", "bco_pair", BETA, {}),
    ("sppo_hard", "sppo_hard", BETA, {}),
    ("aot", "aot", {**BETA, "label_smoothing": 0.1}, {"label_smoothing": 0.1}),
    ("aot_unpaired", "aot_unpaired", {**BETA, "label_smoothing": 0.1}, {"label_smoothing": 0.1}),
    ("apo_zero", "apo_zero", BETA, {}),
    ("apo_down", "apo_down", BETA, {}),
    ("discopop", "discopop", {**BETA, "tau": 0.4}, {}),
    ("nll_token_mean", "sft", {}, {}),
    ("dpo_norm", "sigmoid_norm", {"beta": 5.0}, {"beta": 5.0}),
    ("ld_dpo", "sigmoid", {**BETA, "alpha": 0.3}, {"ld_alpha": 0.3}),
    ("wpo", "sigmoid", BETA, {"use_weighting": True}),
    ("fdpo_forward_kl", "sigmoid", BETA, {"f_divergence_type": "forward_kl"}),
    ("fdpo_js", "sigmoid", BETA, {"f_divergence_type": "js_divergence"}),
]


@pytest.mark.parametrize(("name", "loss_type", "values", "theirs"), SAME, ids=[s[0] for s in SAME])
@pytest.mark.parametrize("spread", [1.0, 2.5])
def test_a_loss_and_its_gradient_are_trls(
    name: str, loss_type: str, values: dict[str, float], theirs: dict[str, Any], spread: float
) -> None:
    rows = make_rows(spread=spread)
    batch = rows.batch()
    h = batch.chosen.log_ratio - batch.rejected.log_ratio
    assert 5 < h.abs().max() <= 50
    rows.policy.requires_grad_()
    expected, _ = trl_dpo(rows, loss_type, **theirs)
    found = ours(name, columns(rows), values)
    assert found.item() == pytest.approx(expected.item(), rel=1e-7)
    found_gradient, expected_gradient = gradient(found, rows), gradient(expected, rows)
    scale = expected_gradient.abs().max().item()
    torch.testing.assert_close(found_gradient, expected_gradient, rtol=1e-7, atol=1e-9 * scale)
    for key in values:
        wrong = ours(name, columns(rows), {**values, key: 1.1 * values[key]}).item()
        assert abs(wrong / expected.item() - 1) > 1e-6, key
    swapped = replace(columns(rows), reference_chosen=batch.reference_rejected)
    off = abs(ours(name, swapped, values).item() / expected.item() - 1)
    assert (off < 1e-6) == (name == "nll_token_mean"), "the NLL has no reference"


def test_trls_alpha_divergence_is_the_papers_at_one_minus_its_alpha() -> None:
    """Table 1 has f'(u) = (1 - u^-a) / a; TRL's coefficient c makes it (u^(c-1) - 1) / (c - 1)."""
    rows = make_rows(dtype=torch.float32)  # it knows no float64
    coefficient = 0.3
    expected, _ = trl_dpo(
        rows, "sigmoid", f_divergence_type="alpha_divergence", f_alpha_divergence_coef=coefficient
    )
    batch = make_rows().batch()
    found = ours("fdpo_alpha", batch, {**BETA, "alpha": 1 - coefficient}).item()
    assert found == pytest.approx(expected.item(), rel=1e-5)
    as_it_says = ours("fdpo_alpha", batch, {**BETA, "alpha": coefficient}).item()
    assert abs(as_it_says / expected.item() - 1) > 1e-2


def test_a_weighted_sum_is_trls() -> None:
    rows = make_rows()
    expected, _ = trl_dpo(rows, ["sigmoid", "bco_pair", "sft"], loss_weights=[0.8, 0.2, 0.5])
    terms = ("dpo", "bco_pair_unshifted", "nll_token_mean")
    spec = weighted_sum({name: REGISTRY[name] for name in terms})
    weights = dict(zip((f"{term}.weight" for term in terms), (0.8, 0.2, 0.5), strict=True))
    batch = rows.batch()
    values = {**spec.defaults, **weights}
    found = spec.loss(batch, values, statistics_of(batch, spec, values)).mean()
    assert found.item() == pytest.approx(expected.item(), rel=1e-9)


# Where TRL is elsewhere


def test_trl_ignores_label_smoothing_with_its_sigmoid() -> None:
    rows = make_rows()
    expected = trl_dpo(rows, "sigmoid", label_smoothing=0.2)[0].item()
    assert ours("dpo", rows.batch(), BETA).item() == pytest.approx(expected, rel=1e-12)
    smoothed = ours("cdpo", rows.batch(), {**BETA, "label_smoothing": 0.2}).item()
    assert abs(smoothed / expected - 1) > 1e-2


def test_trl_leaves_out_bcos_shift() -> None:
    rows = make_rows(kl_shift=0.0)
    rows.policy[:8] += 0.4  # all rewards above 0
    expected = trl_dpo(rows, "bco_pair")[0].item()
    assert abs(ours("bco_pair", rows.batch(), BETA).item() / expected - 1) > 1e-2
    spec = REGISTRY["bco_pair"]
    without = spec.loss(rows.batch(), BETA, {"shift": 0.0}).mean().item()
    assert without == pytest.approx(expected, rel=1e-12)


def test_trls_ld_dpo_discounts_both_models_since_0_29() -> None:
    """So its margin is 0 where policy and reference are one; with the policy alone it is not."""
    rows = make_rows()
    expected = trl_dpo(rows, "sigmoid", ld_alpha=0.3)[0].item()
    policy = ours("ld_dpo_policy", columns(rows), {**BETA, "alpha": 0.3}).item()
    assert abs(policy / expected - 1) > 1e-2
    one = replace(rows, policy=rows.reference)
    ln2 = torch.log(torch.tensor(2.0, dtype=torch.float64)).item()
    values = {**BETA, "alpha": 0.3}
    assert ours("ld_dpo", columns(one), values).item() == pytest.approx(ln2, rel=1e-12)
    assert abs(ours("ld_dpo_policy", columns(one), values).item() / ln2 - 1) > 1e-2


def test_trl_does_not_clamp_wpos_weights() -> None:
    """Nor does ours, as in eq. 2: a weight above 1 stays."""
    rows = make_rows()
    rows.squares[:] -= 6.0
    batch = columns(rows)
    weights = (batch.more["alignment_chosen"] + batch.more["alignment_rejected"]).exp()
    assert (weights > 1).any()
    expected = trl_dpo(rows, "sigmoid", use_weighting=True)[0].item()
    assert ours("wpo", batch, BETA).item() == pytest.approx(expected, rel=1e-9)


def test_trls_exo_refuses_no_smoothing_and_so_do_ours() -> None:
    assert not REGISTRY["exo_pair"].parameters["label_smoothing"].allows(0.0)


# The trainers without a reference


def logps(rows: Rows, *, mean: bool) -> tuple[torch.Tensor, torch.Tensor]:
    batch = rows.batch()
    if mean:
        return batch.chosen.mean_logprob, batch.rejected.mean_logprob
    return batch.policy_chosen, batch.policy_rejected


def test_cpo_is_trls_but_for_the_nll() -> None:
    """Ours is the paper's sum over tokens; TRL's a mean over the batch's tokens."""
    rows = make_rows()
    trainer = cpo_trainer(loss_type="sigmoid", beta=0.1)
    expected, *_ = trainer.cpo_loss(*logps(rows, mean=False))
    spec, batch = REGISTRY["cpo"], rows.batch()
    found = spec.loss(batch, {**BETA, "nll_weight": 0.0}, {})
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)
    with_nll = spec.loss(batch, {**BETA, "nll_weight": 1.0}, {})
    torch.testing.assert_close(with_nll, expected - batch.policy_chosen, rtol=1e-9, atol=0)


@pytest.mark.parametrize("alpha", [0.25, -0.5, 1.5])
def test_alphapo_is_trls(alpha: float) -> None:
    rows = make_rows()
    trainer = cpo_trainer(loss_type="simpo", beta=2.0, simpo_gamma=0.7, alpha=alpha)
    expected, rewards, _ = trainer.cpo_loss(*logps(rows, mean=True))
    values = {"beta": 2.0, "gamma": 0.7, "alpha": alpha}
    spec, batch = REGISTRY["alphapo"], rows.batch()
    torch.testing.assert_close(spec.loss(batch, values, {}), expected, rtol=1e-7, atol=1e-12)
    torch.testing.assert_close(spec.scores(batch, values)[0], rewards, rtol=1e-9, atol=1e-12)
    other = spec.loss(batch, {**values, "alpha": alpha + 0.1}, {})
    assert (other / expected - 1).abs().max() > 1e-3


def test_simpo_by_ratio_is_trls_absolute_gamma() -> None:
    rows = make_rows()
    trainer = cpo_trainer(loss_type="simpo", beta=2.0, simpo_gamma=0.6)
    expected, *_ = trainer.cpo_loss(*logps(rows, mean=True))
    found = REGISTRY["simpo_ratio"].loss(rows.batch(), {"beta": 2.0, "gamma_ratio": 0.3}, {})
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)


def test_orpo_is_trls_but_for_the_nll(monkeypatch: pytest.MonkeyPatch) -> None:
    """The odds ratio is theirs, in float32; the NLL is per reply, theirs over prompts as well."""
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    from trl.experimental.orpo.orpo_trainer import ORPOTrainer

    rows = make_rows()
    trainer = bare(ORPOTrainer, beta=0.1)
    losses, *_ = trainer.odds_ratio_loss(*logps(rows, mean=True))
    batch = rows.batch()
    found = REGISTRY["orpo"].loss(batch, BETA, {})
    of_odds = found + batch.chosen.mean_logprob
    torch.testing.assert_close(of_odds, -losses.double(), rtol=1e-5, atol=1e-8)
    assert (REGISTRY["orpo"].loss(batch, {"beta": 0.2}, {}) - found).abs().max() > 1e-3


def test_tpo_l_is_trls(monkeypatch: pytest.MonkeyPatch) -> None:
    """With its third reply's NLL: theirs is a mean over the batch's gold tokens, ours per reply."""
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    from trl.experimental.tpo.tpo_trainer import TPOTrainer

    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(12, 12, 17, generator=generator, dtype=torch.float64)
    ids = torch.randint(0, 17, (12, 12), generator=generator)
    n = torch.tensor([3, 9, 1, 6, 8, 2, 7, 6, 5, 5, 5, 5])
    position = torch.arange(12)
    mask = (position >= N_PROMPT) & (position < N_PROMPT + n[:, None])
    trainer = bare(
        TPOTrainer,
        model=SimpleNamespace(training=True),
        accelerator=ACCELERATOR,
        loss_type="tpo-l",
        beta=2.0,
        tpo_alpha=0.7,
        tpo_l_gamma=0.4,
        label_smoothing=0.0,
    )
    inputs = {"input_ids": ids, "completion_mask": mask.long(), "attention_mask": mask.long()}
    expected = trainer._compute_loss(
        lambda **_: SimpleNamespace(logits=logits), inputs, False
    ).item()
    picked = logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
    sums = (picked * mask[:, 1:]).sum(1)
    lengths = n.double()
    batch = PairBatch(
        *(sums[:4], sums[4:8], sums[:4], sums[:4], lengths[:4], lengths[4:8]),
        more={"gold_logprob": sums[8:], "n_gold": lengths[8:]},
    )
    values = {"beta": 2.0, "gamma": 0.4, "nll_weight": 0.7}
    found = REGISTRY["tpo_l"].loss(batch, values, {}).mean().item()
    assert found == pytest.approx(expected, rel=1e-5), "equal gold lengths: both means are one"
    for key in values:
        wrong = REGISTRY["tpo_l"].loss(batch, {**values, key: 1.1 * values[key]}, {}).mean().item()
        assert abs(wrong / expected - 1) > 1e-3, key
