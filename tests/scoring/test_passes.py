"""Which sequences share a pass where it matters to the bits, and that training starts there."""

from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from support import build_tiny_model, prepared
from transformers.models.llama.modeling_llama import LlamaModel

from pipeline.models import Checkpoint, load_model
from pipeline.names import wanted_sequences
from pipeline.plan import ModelConfig
from pipeline.scoring.engines.base import groups_of, sequence_sum
from pipeline.scoring.engines.forward import Forward
from pipeline.scoring.engines.torch_engine import TorchEngine
from pipeline.scoring.passes import with_passes
from pipeline.stages import train
from pipeline.store import read

WritePlan = Any


def test_only_pairs_that_own_their_sequences_share_a_pass() -> None:
    ways = pl.DataFrame(
        {
            "pair_id": ["p1", "p2", "p3", "p4"],
            "chosen_id": ["a", "c", "c", "g"],
            "rejected_id": ["b", "d", "e", "h"],
        }
    )
    sequences = pl.DataFrame({"sequence_id": list("habcdefg")})
    found = dict(with_passes(sequences, ways).rows())
    together = {"a": "p1", "b": "p1", "g": "p4", "h": "p4"}
    assert found == {**dict.fromkeys("cdef"), **together}
    assert with_passes(sequences, ways)["sequence_id"].to_list() == list("habcdefg")
    # Mismatched replies under one prompt are a pass, unless one of them stands elsewhere too.
    kl = pl.DataFrame(
        {
            "pair_id": ["p1", "p1", "p2", "p2"],
            "step": [None] * 4,
            "sequence_id": ["e", "f", "x", "h"],
        },
        schema_overrides={"step": pl.Int64},
    )
    found = dict(with_passes(sequences, ways, kl).rows())
    assert found["f"] is None, "e is in p3 too"
    assert found["g"] is found["h"] is None
    assert found["a"] == found["b"] == "p1"
    kl = kl.filter(pl.col("sequence_id").is_in(["f", "x"]))
    more = pl.DataFrame({"sequence_id": ["f", "x"]})
    assert with_passes(more, ways, kl.with_columns(pair_id=pl.lit("p2")))["pass_id"].n_unique() == 1


def test_the_engine_makes_one_pass_of_a_pair(
    write_plan: WritePlan, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, store = prepared(write_plan())
    engine = TorchEngine(ModelConfig(checkpoint=str(tiny_model)), Checkpoint(tiny_model))
    passes = []
    body = LlamaModel.forward

    def counted(self: Any, *arguments: Any, **keywords: Any) -> Any:
        passes.append(keywords["input_ids"].shape)
        return body(self, *arguments, **keywords)

    monkeypatch.setattr(LlamaModel, "forward", counted)
    together = groups_of(wanted_sequences(plan, store, "base"))
    alone = groups_of(read(store, "sequences"))
    shared, single = engine.score(together, 0), engine.score(alone, 0)
    assert len(passes) == 12 + 24
    assert sum(n for _, n in passes[:12]) < 0.8 * sum(n for _, n in passes[12:])
    for a, b in zip(shared, single, strict=True):
        for one, other in zip(a, b, strict=True):
            assert abs(sequence_sum(one) - sequence_sum(other)) < 1e-4


def test_training_starts_exactly_at_the_ledger_whatever_shares_a_pass(
    write_plan: WritePlan, write_pairs: Any
) -> None:
    """A reply in two pairs, a prompt with three replies, and pairs of their own."""

    def pair(question: str, chosen: str, rejected: str) -> dict[str, Any]:
        said = {"prompt": question, "chosen": chosen, "rejected": rejected}
        roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
        return {k: [{"role": roles[k], "content": v}] for k, v in said.items()}

    rows = [pair(f"question {i}?", f"the answer is {i}", f"it depends {i}") for i in range(5)]
    rows += [pair("why?", "because", "it depends"), pair("why?", "because", "no answer")]
    rows += [pair("how?", "like this", "it depends"), pair("how?", "so it is", "no answer")]
    source = {
        "pairs": {"path": str(write_pairs(rows=rows, name="q.jsonl")), "shape": "conversational"}
    }
    plan, store = prepared(
        write_plan(sources=source, split={"test_share": 0.0}), "training.batch_pairs=64"
    )
    shared = wanted_sequences(plan, store, "base")["pass_id"].drop_nulls()
    assert (len(shared), shared.n_unique()) == (2 * 7, 7)
    result = train(plan, store, "dpo")
    first = result.steps.row(0, named=True)
    assert result.first_step.n == shared.len() + 3  # each sequence once
    assert result.first_step.difference == 0.0
    assert (first["rewards/margins"], first["rewards/accuracies"]) == (0.0, 0.5)


def test_another_model_does_not_start_there(write_plan: WritePlan, tmp_path: Path) -> None:
    """The control of the test above: weights the ledger does not hold."""
    plan, store = prepared(write_plan())
    another = Checkpoint(build_tiny_model(tmp_path / "other", seed=9))
    other = load_model(another, dtype="float32", attention="sdpa", device="cpu")
    held = dict(
        pl.read_parquet(next((store.root / "ledger").rglob("logprobs/*.parquet")))
        .select("sequence_id", "logprob")
        .iter_rows()
    )
    group = groups_of(wanted_sequences(plan, store, "base"))[0]
    with torch.inference_mode():
        (logprobs,) = Forward(other).logprobs([group])
    for row, c in zip(logprobs, group.completions, strict=True):
        assert abs(sequence_sum(row.numpy()) - held[c.sequence_id]) > 0.1
