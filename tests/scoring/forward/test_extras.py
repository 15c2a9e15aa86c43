"""Extras of the forward pass, whichever way it goes, against whole rows of float64 logits."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from support import measured

from pipeline.models import Checkpoint
from pipeline.plan import Extra, ModelConfig
from pipeline.scoring.engines.base import EngineWithExtras, Group, TokenScores
from pipeline.scoring.engines.forward import Forward
from pipeline.scoring.engines.forward.head import EXTRAS, TargetScores
from pipeline.scoring.engines.torch_engine import TorchEngine
from schemas.scoring import EXTRAS as PUBLISHED
from scoring.forward.families import FAMILIES, build, loaded, some_groups
from scoring.oracle import Oracle

TOLERANCE = 2e-4
"""Nats per token, as of log-probs."""

WAYS: dict[str, Callable[[Forward, list[Group]], list[list[TargetScores]]]] = {
    "tree": lambda forward, groups: forward.scores(groups, EXTRAS),
    "plain": lambda forward, groups: _plain(forward, groups),
    "padded": lambda forward, groups: forward.padded_scores(groups, EXTRAS),
}


def _plain(forward: Forward, groups: list[Group]) -> list[list[TargetScores]]:
    forward._set_attention(forward._plain_attention)
    return forward._plain(groups, EXTRAS)


def by_hand(
    oracle: Oracle, groups: list[Group], temperature: float = 1.0, words: int | None = None
) -> dict[str, np.ndarray]:
    """Of all scored tokens in order, from float64 logits of one sequence after another."""
    found: dict[str, list[torch.Tensor]] = {name: [] for name in EXTRAS}
    for group in groups:
        for c in group.completions:
            ids = torch.tensor([[*group.prompt_ids.tolist(), *c.ids.tolist()]])
            with torch.inference_mode():
                logits = oracle.model(input_ids=ids).logits[0].double()
            rows = logits[len(group.prompt_ids) - 1 + torch.tensor(c.scored)] / temperature
            p = torch.softmax(rows[:, :words], -1)
            targets = torch.tensor(c.ids[c.scored].astype(np.int64))
            found["log_sum_squares"].append(p.square().sum(-1).log())
            found["entropy"].append(-torch.special.xlogy(p, p).sum(-1))
            found["is_top1"].append((rows.argmax(-1) == targets).double())
    return {name: torch.cat(values).numpy() for name, values in found.items()}


def flat(scores: list[list[Any]], name: str) -> np.ndarray:
    return np.concatenate([np.asarray(row.extras[name]) for group in scores for row in group])


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "cohere with scaled logits"])
def test_every_way_gives_the_extras_of_float64(name: str, way: str, tmp_path: Path) -> None:
    checkpoint = build(tmp_path, FAMILIES[name])
    forward, oracle = Forward(loaded(checkpoint)), Oracle(checkpoint)
    assert forward.sharing.shared
    groups = some_groups(3)
    with torch.inference_mode():
        found = WAYS[way](forward, groups)
        alone = forward.logprobs(groups) if way == "tree" else None
    right = by_hand(oracle, groups)
    # A soft-capped model is nearly uniform; that the controls fail is asked of the mean.
    controls = by_hand(oracle, groups, temperature=1.2), by_hand(oracle, groups, words=300)
    for extra in ("log_sum_squares", "entropy"):
        worst = np.abs(flat(found, extra) - right[extra]).max()
        missed = min(np.abs(flat(found, extra) - c[extra]).mean() for c in controls)
        measured(f"{name}, {way}, {extra}: {worst:.1e} nats; nearest control {missed:.3f}")
        assert worst < TOLERANCE
        assert missed > 10 * TOLERANCE, "the control must fail"
    assert (flat(found, "is_top1") == right["is_top1"]).all()
    if alone is not None:
        rows = [row.logprobs for group in found for row in group]
        assert all(
            torch.equal(a, b) for a, b in zip(rows, (r for g in alone for r in g), strict=True)
        )


def test_the_likeliest_reply_is_top1_at_every_token(tmp_path: Path) -> None:
    """Random replies hardly ever are: here one is decoded greedily, and a control is not."""
    checkpoint = build(tmp_path, FAMILIES["llama"])
    forward, oracle = Forward(loaded(checkpoint)), Oracle(checkpoint)
    (group,) = some_groups(0, 1)
    ids = torch.tensor([group.prompt_ids.tolist()])
    greedy = oracle.model.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=None)
    reply = greedy[0, ids.shape[1] :].numpy().astype(np.int32)
    first = group.completions[0]
    changed = reply.copy()
    changed[5] = (changed[5] + 1) % 300
    rows = tuple(type(first)(n, r, ((0, 12),)) for n, r in (("a", reply), ("b", changed)))
    for way in WAYS.values():
        with torch.inference_mode():
            ((said, control),) = way(forward, [Group(group.prompt_ids, rows)])
        assert said.extras["is_top1"].tolist() == [1.0] * 12
        assert control.extras["is_top1"][5] == 0.0


def test_extras_have_no_gradient_and_log_probs_keep_theirs(tmp_path: Path) -> None:
    checkpoint = build(tmp_path, FAMILIES["llama"])
    gradients = []
    for extras in ((), EXTRAS):
        forward = Forward(loaded(checkpoint))
        for way in (forward.scores, forward.padded_scores):
            scores = [row for group in way(some_groups(1), extras) for row in group]
            assert not any(v.requires_grad for row in scores for v in row.extras.values())
            assert all(row.logprobs.requires_grad for row in scores)
            torch.autograd.backward(torch.cat([row.logprobs for row in scores]).sum())
        gradients.append([p.grad for p in forward.model.parameters()])
    for a, b in zip(*gradients, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


@pytest.mark.parametrize("name", ["llama", "falcon with rotary positions"])
def test_an_engine_gives_the_same_log_probs_with_extras(name: str, tmp_path: Path) -> None:
    checkpoint = build(tmp_path, FAMILIES[name])
    engine = TorchEngine(ModelConfig(checkpoint=str(tmp_path)), Checkpoint(tmp_path))
    assert isinstance(engine, EngineWithExtras)
    groups, asked = some_groups(4), get_args(Extra)
    right = by_hand(Oracle(checkpoint, FAMILIES[name].oracle), groups)
    for pads in (False, True):
        engine._pads = pads  # as on a GPU
        for batch_tokens in (0, 64, 1 << 20):
            plain = engine.score(groups, batch_tokens)
            found = engine.score_with_extras(groups, batch_tokens, asked)
            for a, b in zip(plain, found, strict=True):
                for logprobs, scores in zip(a, b, strict=True):
                    assert isinstance(scores, TokenScores)
                    np.testing.assert_array_equal(scores.logprobs, logprobs)
                    assert tuple(scores.extras) == asked
                    assert {v.dtype for v in scores.extras.values()} == {np.dtype(np.float32)}
            for extra in asked:
                assert np.abs(flat(found, extra) - right[extra]).max() < TOLERANCE
    engine.close()


def test_what_a_plan_may_ask_for_is_what_is_computed_and_published() -> None:
    assert list(get_args(Extra)) == PUBLISHED
    assert set(get_args(Extra)) < set(EXTRAS)
