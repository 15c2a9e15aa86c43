"""The torch engine over trees: what goes through the model, on which threads, what is recorded."""

import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaModel

from pipeline.models import Checkpoint
from pipeline.plan import ModelConfig, ScoringConfig
from pipeline.scoring.engines.base import Group, Sharing
from pipeline.scoring.engines.torch_engine import TorchEngine
from pipeline.scoring.ledger import scorers
from pipeline.scoring.run import score_sequences, scorer_key
from pipeline.store import Store, publish
from schemas import Scorer
from scoring.forward.families import FAMILIES, build
from scoring.oracle import completion, group, random_ids, sequences_of


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def engine_of(path: Path) -> TorchEngine:
    return TorchEngine(ModelConfig(checkpoint=str(path)), Checkpoint(path))


def with_a_system_prompt(n: int) -> list[Group]:
    system = random_ids(30, 0)
    return [
        group(
            [*system, *random_ids(20, 10 + g)],
            *(completion(f"{g} {c}", random_ids(25, 100 + 2 * g + c)) for c in range(2)),
        )
        for g in range(n)
    ]


def score_into(store: Store, checkpoint: Checkpoint, groups: list[Group]) -> pl.DataFrame:
    config = ModelConfig(checkpoint=str(checkpoint.path))
    key = scorer_key(store, config, checkpoint)
    score_sequences("m", key, config, checkpoint, sequences_of(groups), ScoringConfig())
    table = scorers(store.ledger)
    publish(store, "scorers", table, Scorer)
    return table


def test_the_scorers_table_says_whether_prompts_were_shared(tmp_path: Path, store: Store) -> None:
    groups = with_a_system_prompt(3)
    shares = score_into(store, build(tmp_path / "llama", FAMILIES["llama"]), groups)
    said = shares.select("shared_prompts", "shared_prompts_reason")
    assert said.rows() == [(True, "")]
    alone = build(tmp_path / "falcon", FAMILIES["falcon with rotary positions"])
    (row,) = (
        score_into(store, alone, groups).filter(~pl.col("shared_prompts")).iter_rows(named=True)
    )
    assert row["checkpoint"] == str(alone.path)
    assert "does not take attention functions" in row["shared_prompts_reason"]


def test_a_system_prompt_goes_through_the_model_once(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, seen = engine_of(tiny_model), []
    body = LlamaModel.forward

    def counted(self: Any, *arguments: Any, **keywords: Any) -> Any:
        seen.append(tuple(keywords["input_ids"].shape))
        return body(self, *arguments, **keywords)

    monkeypatch.setattr(LlamaModel, "forward", counted)
    groups = with_a_system_prompt(6)
    packed = engine.score(groups, 1 << 20)
    # The last token of a sequence predicts nothing.
    assert sum(n for _, n in seen) == 6 * (20 + 2 * 24) + 30 * len(seen)
    assert len(seen) <= engine._n_threads
    seen.clear()
    apart = engine.score(groups, 0)
    assert sorted(seen) == [(1, 74)] * 12  # no pass is said to be shared
    for a, b in zip(packed, apart, strict=True):
        for x, y in zip(a, b, strict=True):
            np.testing.assert_allclose(x, y, atol=2e-5)


def test_every_core_works_alone_and_the_process_has_its_threads_back(
    tiny_model: Path, two_threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_of(tiny_model)
    assert engine.sharing == Sharing(True, "", True)
    forward, seen = engine._forward, []
    logprobs, meet = forward.logprobs, threading.Barrier(2, timeout=60)

    def watched(groups: Any) -> Any:
        meet.wait()  # both are at work at once
        seen.append((threading.get_ident(), torch.get_num_threads()))
        return logprobs(groups)

    monkeypatch.setattr(forward, "logprobs", watched)
    engine.score(with_a_system_prompt(8), 1024)
    assert len({thread for thread, _ in seen}) == 2
    assert {n for _, n in seen} == {1}
    assert torch.get_num_threads() == 2
    engine.close()


def test_where_bits_depend_on_the_batch_passes_go_one_by_one(
    tiny_model: Path, two_threads: None
) -> None:
    """Training could not start exactly at the tables otherwise."""
    engine = engine_of(tiny_model)
    forward = engine._forward
    forward.sharing = replace(forward.sharing, exact=False)
    engine._packs = False
    calls: list[int] = []
    logprobs = forward.logprobs
    forward.logprobs = lambda groups: calls.append(len(groups)) or logprobs(groups)  # type: ignore
    groups = [
        replace(g, completions=tuple(replace(c, pass_id=str(i)) for c in g.completions))
        for i, g in enumerate(with_a_system_prompt(3))
    ]
    engine.score(groups, 1024)
    assert calls == [1, 1, 1]
