"""The torch engine against an independent float64 computation, and what its ids are made of."""

from dataclasses import fields
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from support import PROJECT, measured
from transformers import AutoModelForCausalLM

from pipeline.errors import ScoringError
from pipeline.intake import run_intake
from pipeline.models import Checkpoint, ModelIdentity, load_tokenizer
from pipeline.plan import ModelConfig, Plan, ScoringConfig, SourceConfig, TokenizationConfig
from pipeline.scoring.engines.base import (
    Completion,
    Group,
    Numerics,
    check_logprobs,
    groups_of,
    sequence_sum,
)
from pipeline.scoring.engines.torch_engine import TorchEngine, torch_numerics
from pipeline.scoring.ledger import read_logprobs, read_token_logprobs
from pipeline.scoring.run import score_sequences, scorer_key
from pipeline.store import Store, read
from pipeline.tokenization import Encoder, tokenize_pairs
from schemas import Scorer, identity_fields


def sample_sequences(checkpoint: Checkpoint, store: Store, n: int | None = None) -> pl.DataFrame:
    """Sequences of the embedded sample, the first `n` by id."""
    source = SourceConfig(path=PROJECT / "sample" / "preferences.jsonl", shape="conversational")
    plan = Plan(name="t", sources={"s": source}, models={"m": ModelConfig(checkpoint="x")})
    run_intake(plan, store)
    encoder = Encoder(load_tokenizer(checkpoint), TokenizationConfig())
    return tokenize_pairs(read(store, "pairs"), encoder).sequences.head(n or 1000)


def float64_logprob(model: torch.nn.Module, row: dict[str, list[int]]) -> float:
    """The sum over completion tokens, by transformers in float64 and a plain log_softmax."""
    ids = torch.tensor([row["prompt_ids"] + row["completion_ids"]])
    with torch.inference_mode():
        logits = model(input_ids=ids).logits[0]
    assert logits.dtype == torch.float64
    logprobs = torch.log_softmax(logits[:-1], dim=-1).gather(1, ids[0, 1:, None])[:, 0]
    return float(logprobs[len(row["prompt_ids"]) - 1 :].sum())


def oracle_differences(checkpoint: Checkpoint, store: Store, n: int, batch_tokens: int) -> float:
    sequences = sample_sequences(checkpoint, store, n)
    config = ModelConfig(checkpoint=str(checkpoint.path))
    key = scorer_key(store, config, checkpoint)
    settings = ScoringConfig(batch_tokens=batch_tokens, null_test_rows=1)
    score_sequences("m", key, config, checkpoint, sequences, settings)
    scored = dict(read_logprobs(key).select("sequence_id", "logprob").iter_rows())
    model = AutoModelForCausalLM.from_pretrained(checkpoint.path, dtype=torch.float64)
    rows = list(sequences.iter_rows(named=True))
    largest: float = max(abs(scored[r["sequence_id"]] - float64_logprob(model, r)) for r in rows)
    untrained = AutoModelForCausalLM.from_config(model.config).to(torch.float64)
    control = min(abs(scored[r["sequence_id"]] - float64_logprob(untrained, r)) for r in rows[:1])
    measured(f"{n} sequences: at most {largest:.2e} nats apart; untrained control {control:.1f}")
    assert control > 1, "the control must fail"
    return largest


def test_twelve_sequences_equal_float64_transformers(
    packaged_model: Checkpoint, store: Store
) -> None:
    assert oracle_differences(packaged_model, store, 12, batch_tokens=0) <= 1e-3


@pytest.mark.slow
def test_fifty_sequences_equal_float64_transformers_in_batches_too(
    packaged_model: Checkpoint, store: Store, tmp_path: Path
) -> None:
    assert oracle_differences(packaged_model, store, 50, batch_tokens=0) <= 1e-3
    assert oracle_differences(packaged_model, Store(tmp_path, "b"), 50, batch_tokens=1024) <= 1e-3


def test_padded_batches_give_the_same_numbers(tiny_model: Path) -> None:
    engine = TorchEngine(ModelConfig(checkpoint=str(tiny_model)), Checkpoint(tiny_model))
    generator = np.random.default_rng(0)
    groups = []
    for g in range(5):
        prompt = generator.integers(3, 300, 2 + 7 * g).astype(np.int32)
        completions = []
        for c in range(3):
            ids = generator.integers(3, 300, 1 + 5 * c + g).astype(np.int32)
            spans = ((0, len(ids)),) if len(ids) < 4 else ((0, 2), (3, len(ids)))
            completions.append(Completion(f"{g}-{c}", ids, spans))
        groups.append(Group(prompt, tuple(completions)))
    alone = engine.score(groups, 0)
    for batch_tokens in (1, 64, 10_000):
        for mine, other in zip(alone, engine.score(groups, batch_tokens), strict=True):
            for a, b in zip(mine, other, strict=True):
                np.testing.assert_allclose(a, b, atol=2e-5)


def test_spans_leave_tokens_out(tiny_model: Path) -> None:
    engine = TorchEngine(ModelConfig(checkpoint=str(tiny_model)), Checkpoint(tiny_model))
    prompt, ids = np.array([5, 6, 7], np.int32), np.array([8, 9, 10, 11, 12], np.int32)
    whole = Completion("w", ids, ((0, 5),))
    parts = Completion("p", ids, ((0, 1), (3, 5)))
    ((all_, some),) = engine.score([Group(prompt, (whole, parts))], 0)
    np.testing.assert_array_equal(all_[[0, 3, 4]], some)


def test_the_sum_does_not_depend_on_order() -> None:
    values = -np.random.default_rng(0).gamma(0.3, 5.0, 4096).astype(np.float32)
    exact = sequence_sum(values)
    assert exact == sequence_sum(values[::-1]) == sequence_sum(np.sort(values))
    float32 = float(values.sum(dtype=np.float32))
    assert abs(exact - float(values.astype(np.float64).sum())) < 1e-9
    assert abs(exact - float32) > 1e-6, "a float32 sum would not do"


@pytest.mark.parametrize(
    "bad", [[-1.0], [-1.0, float("nan")], [-1.0, -float("inf")], [-1.0, 0.5], [-1.0, -1.0, -1.0]]
)
def test_what_cannot_be_logprobs_is_refused(bad: list[float]) -> None:
    completion = Completion("s", np.array([1, 2], np.int32), ((0, 2),))
    check_logprobs(completion, np.array([-1.0, -2.0], np.float32))
    with pytest.raises(ScoringError, match="sequence s"):
        check_logprobs(completion, np.array(bad, np.float32))


def test_groups_hold_each_sequence_once(packaged_model: Checkpoint, store: Store) -> None:
    sequences = sample_sequences(packaged_model, store)
    groups = groups_of(sequences)
    assert sorted(c.sequence_id for g in groups for c in g.completions) == list(
        sequences["sequence_id"]
    )
    assert len({g.prompt_ids.tobytes() for g in groups}) == len(groups) == 256
    lengths = [len(g.prompt_ids) + max(len(c.ids) for c in g.completions) for g in groups]
    assert lengths == sorted(lengths, reverse=True)


def test_ids_are_made_of_the_columns_marked_identity(tiny_model: Path) -> None:
    assert [f.name for f in fields(ModelIdentity)] == identity_fields("model")
    assert [f.name for f in fields(Numerics)] == identity_fields("numerics")
    marked = {(column.metadata or {}).get("role") for column in Scorer.to_schema().columns.values()}
    assert marked == {"identity", "provenance", None}


def test_batch_size_and_path_are_no_identity(tiny_model: Path, tmp_path: Path) -> None:
    one = torch_numerics(ModelConfig(checkpoint="a"), Checkpoint(tiny_model))
    assert one == torch_numerics(ModelConfig(checkpoint="b"), Checkpoint(tiny_model))
    other = torch_numerics(ModelConfig(checkpoint="a", dtype="bfloat16"), Checkpoint(tiny_model))
    assert one.numerics_id != other.numerics_id
    assert not one.comparable(other)
    applied = torch_numerics(ModelConfig(checkpoint="a"), Checkpoint(tiny_model, tmp_path))
    assert one.numerics_id != applied.numerics_id
    assert one.comparable(applied)


def test_token_logprobs_add_up_to_the_sums(
    tiny_model: Path, store: Store, write_sequences: pl.DataFrame
) -> None:
    config, checkpoint = ModelConfig(checkpoint=str(tiny_model)), Checkpoint(tiny_model)
    key = scorer_key(store, config, checkpoint)
    score_sequences("m", key, config, checkpoint, write_sequences, ScoringConfig(commit_rows=5))
    joined = read_logprobs(key).join(read_token_logprobs(key), on="sequence_id")
    assert joined.height == write_sequences.height
    for row in joined.iter_rows(named=True):
        assert len(row["logprobs"]) == row["n_tokens"]
        assert sum(row["logprobs"]) == pytest.approx(row["logprob"], abs=1e-9)
