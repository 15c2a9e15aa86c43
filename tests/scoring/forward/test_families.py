"""Every family gives float64's numbers, whichever way it goes; and it says which way."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from support import measured
from transformers.models.llama import modeling_llama

from pipeline.scoring.engines.base import Group, Sharing
from pipeline.scoring.engines.forward import Forward, model
from pipeline.scoring.engines.forward.head import Head
from pipeline.scoring.engines.forward.tree import Run, Tree, grow
from scoring.forward.families import FAMILIES, LAYOUTS, Family, build, loaded, some_groups
from scoring.oracle import Oracle, group

TOLERANCE = 2e-4
"""Nats per token, float32 against float64; logits here are of the size of those of real models."""

SHARING = [name for name, family in FAMILIES.items() if family.shares]
ALONE = [name for name, family in FAMILIES.items() if not family.shares]


def largest_error(logprobs: list[list[torch.Tensor]], groups: list[Group], oracle: Oracle) -> float:
    """Per token, over all completions."""
    return max(
        float(np.abs(row.numpy() - oracle.logprobs(g.prompt_ids, c.ids)[c.scored]).max())
        for g, rows in zip(groups, logprobs, strict=True)
        for c, row in zip(g.completions, rows, strict=True)
    )


def leaky(sequences: Any) -> Tree:
    """The control: a tree in which a run sees everything before it in the row."""
    tree = grow(sequences)
    runs = tuple(Run(r.start, np.arange(r.start + r.n), r.n) for r in tree.runs)
    return replace(tree, runs=runs)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", SHARING)
def test_shared_prompts_give_the_numbers_of_float64(
    name: str, attention: str, layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = build(tmp_path, FAMILIES[name])
    monkeypatch.setattr(model, "layout_of", LAYOUTS[layout])
    forward, oracle = Forward(loaded(checkpoint, attention)), Oracle(checkpoint)
    assert forward.sharing.shared, forward.sharing.reason
    worst = leaked = 0.0
    for seed in range(4):
        groups = some_groups(seed)
        with torch.inference_mode():
            worst = max(worst, largest_error(forward.logprobs(groups), groups, oracle))
            with monkeypatch.context() as patched:
                patched.setattr(model, "grow", leaky)
                leaked = max(leaked, largest_error(forward.logprobs(groups), groups, oracle))
    measured(
        f"{name}, {attention}, {layout}: {worst:.1e} nats per token; leaky control {leaked:.2f}"
    )
    assert worst < TOLERANCE
    assert leaked > 0.05, "the control must fail"


@pytest.mark.parametrize("name", ALONE)
def test_what_cannot_share_goes_the_plain_way_and_says_so(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoint = build(tmp_path, FAMILIES[name])
    with caplog.at_level(logging.WARNING, "pipeline"):
        forward = Forward(loaded(checkpoint))
    assert not forward.sharing.shared
    assert forward.sharing.reason
    assert forward.sharing.reason in caplog.text
    oracle = Oracle(checkpoint, FAMILIES[name].oracle)
    groups = some_groups(7)
    with torch.inference_mode():
        assert largest_error(forward.logprobs(groups), groups, oracle) < TOLERANCE


def test_a_model_without_eager_attention_is_loaded_and_goes_the_plain_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = build(tmp_path, FAMILIES["llama"])
    oracle, groups = Oracle(checkpoint, "sdpa"), some_groups(7)

    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("there is none")

    monkeypatch.setattr(modeling_llama, "eager_attention_forward", broken)
    forward = Forward(loaded(checkpoint, "sdpa"))
    reason = "it fails with eager attention: RuntimeError: there is none"
    assert (forward.sharing.shared, forward.sharing.reason) == (False, reason)
    with torch.inference_mode():
        assert largest_error(forward.logprobs(groups), groups, oracle) < TOLERANCE
    with pytest.raises(RuntimeError, match="there is none"):
        Forward(loaded(checkpoint, "eager"))


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "mixtral"])
def test_a_tree_that_leaks_is_found_out_at_loading(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = build(tmp_path, FAMILIES[name])
    monkeypatch.setattr(model, "grow", leaky)
    forward = Forward(loaded(checkpoint))
    assert not forward.sharing.shared
    assert "nats off" in forward.sharing.reason
    groups = some_groups(7)
    with torch.inference_mode():
        error = largest_error(forward.logprobs(groups), groups, Oracle(checkpoint))
    assert error < TOLERANCE


def test_a_head_that_is_computed_otherwise_is_found_out_at_loading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = build(tmp_path, FAMILIES["cohere with scaled logits"])
    monkeypatch.setattr(
        model, "head_of", lambda inner: Head(inner.lm_head.weight, inner.lm_head.bias)
    )
    assert "nats off" in Forward(loaded(checkpoint)).sharing.reason


def test_soft_capping_is_not_lost_in_the_plain_way(tmp_path: Path) -> None:
    """transformers' sdpa leaves out the capping of attention scores."""
    checkpoint = build(tmp_path, FAMILIES["gemma2"])
    forward, oracle = Forward(loaded(checkpoint, "sdpa")), Oracle(checkpoint)
    forward.sharing = Sharing(False)
    groups = some_groups(3)
    with torch.inference_mode():
        plain = forward.logprobs(groups)
        padded = forward.padded(groups)
    assert largest_error(plain, groups, oracle) < TOLERANCE
    assert largest_error(padded, groups, oracle) < TOLERANCE


@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_rotary_angles_that_depend_on_the_batch_go_the_plain_way(kind: str, tmp_path: Path) -> None:
    """A long sequence would change the angles of the short ones beside it."""
    rope: dict[str, Any] = {"rope_type": kind, "rope_theta": 1e4, "factor": 4.0}
    rope["original_max_position_embeddings"] = 96
    if kind == "longrope":
        rope |= {"short_factor": [1.0] * 4, "long_factor": [3.0, 5.0, 7.0, 9.0]}
    family = Family("phi3" if kind == "longrope" else "llama")
    config = {"rope_parameters": rope, "original_max_position_embeddings": 96}
    config["max_position_embeddings"] = 384 if kind == "longrope" else 96
    checkpoint = build(tmp_path, family, **config)
    forward = Forward(loaded(checkpoint))
    draw = np.random.default_rng(0)
    groups = [
        replace(g, prompt_ids=draw.integers(3, 300, n).astype(np.int32))
        for g, n in zip(some_groups(5), (3, 80, 5), strict=True)
    ]
    assert forward.sharing.shared
    oracle = Oracle(checkpoint)  # which has them one by one
    with torch.inference_mode():
        assert largest_error(forward.logprobs(groups), groups, oracle) < TOLERANCE
        shared = model._logprobs(forward._tree(groups))
        assert largest_error(shared, groups, oracle) > 0.01, "the control must fail"
        short = [group(g.prompt_ids.tolist(), g.completions[0]) for g in groups[::2]]
        with patch.object(forward, "_tree", side_effect=forward._tree) as tree:
            assert largest_error(forward.logprobs(short), short, oracle) < TOLERANCE
        assert tree.called, "those that are short enough share their prompts"


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", SHARING)
def test_no_bit_depends_on_the_batch_where_that_is_claimed(
    name: str, attention: str, tmp_path: Path
) -> None:
    forward = Forward(loaded(build(tmp_path, FAMILIES[name]), attention))
    groups = [g for seed in range(6) for g in some_groups(seed)]
    n_threads = torch.get_num_threads()
    worst, equal = 0.0, True
    with torch.inference_mode():
        together = forward.logprobs(groups)
        backwards = forward.logprobs(groups[::-1])[::-1]
        torch.set_num_threads(1)
        try:
            apart = [forward.logprobs([g])[0] for g in groups]
            single = [
                [forward.logprobs([replace(g, completions=(c,))])[0][0] for c in g.completions]
                for g in groups
            ]
        finally:
            torch.set_num_threads(n_threads)
    for a, *others in zip(together, backwards, apart, single, strict=True):
        for other in others:
            for x, y in zip(a, other, strict=True):
                equal &= x.equal(y)
                worst = max(worst, float((x - y).abs().max()))
    measured(f"{name}, {attention}: exact {forward.sharing.exact}; seen {worst:.1e}")
    assert equal or not forward.sharing.exact
    assert worst < TOLERANCE
