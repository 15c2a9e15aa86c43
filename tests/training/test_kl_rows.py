"""Mismatched replies: who is whose partner, and that they cost nothing where nobody needs them."""

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from support import build_tiny_model, tokenized

from pipeline.errors import TrainingError
from pipeline.names import key_of, wanted_sequences
from pipeline.plan import TrainingConfig
from pipeline.scoring.ledger import read_logprobs
from pipeline.stages import score, train
from pipeline.store import checked, read
from pipeline.tokenization import sequence_id
from pipeline.training.data.kl_rows import kl_rows, kl_sequences
from pipeline.training.data.preferences import Preferences
from pipeline.training.data.schedule import step_ids
from schemas import (
    KlSequence,
    LabelSequence,
    PairSequence,
    PreferenceLabel,
    PreferencePair,
    Sequence,
    polars_schema,
)

WritePlan = Any
TRAINING = TrainingConfig(batch_pairs=4)


class Tables:
    """`pairs`, `labels`, their ways and `sequences` of made-up token ids.

    Pair i and label j answer the prompts given; every other label is desirable.
    """

    def __init__(
        self,
        prompts: list[int],
        held_out: frozenset[int] = frozenset(),
        labels: list[int] | None = None,
    ) -> None:
        pairs: list[dict[str, Any]] = []
        ways: list[dict[str, Any]] = []
        sequences: dict[str, dict[str, Any]] = {}
        for i, prompt in enumerate(prompts):
            sides = {}
            for side, first in (("chosen", 100), ("rejected", 200)):
                row = self.sequence([prompt + 3, prompt + 4], [first + i] * (2 + i % 3))
                sequences[row["sequence_id"]] = row
                sides[f"{side}_id"] = row["sequence_id"]
            pairs.append(
                {
                    "pair_id": f"{i:032x}",
                    "prompt_id": f"{prompt:032x}",
                    "split": "test" if i in held_out else "train",
                }
            )
            ways.append({"pair_id": f"{i:032x}", "tokenization_id": "0" * 32, **sides})
        label_rows, label_ways = [], []
        for j, prompt in enumerate(labels or []):
            row = self.sequence([prompt + 3, prompt + 4], [300 + j] * (2 + j % 3))
            sequences[row["sequence_id"]] = row
            key = {"label_id": label_id(j)}
            split = {"prompt_id": f"{prompt:032x}", "split": "train"}
            label_rows.append({**key, **split, "desirable": j % 2 == 0})
            way = {"tokenization_id": "0" * 32, "sequence_id": row["sequence_id"]}
            label_ways.append({**key, **way})
        self.pairs = _padded(pairs, polars_schema(PreferencePair))
        self.ways = _padded(ways, polars_schema(PairSequence))
        self.labels = _padded(label_rows, polars_schema(PreferenceLabel))
        self.label_ways = _padded(label_ways, polars_schema(LabelSequence))
        self.sequences = pl.DataFrame(list(sequences.values()), schema=polars_schema(Sequence))

    @staticmethod
    def sequence(prompt: list[int], completion: list[int]) -> dict[str, Any]:
        spans = [(0, len(completion))]
        return {
            "sequence_id": sequence_id(
                np.array(prompt, np.int32), np.array(completion, np.int32), spans
            ),
            "prompt_ids": prompt,
            "completion_ids": completion,
            "spans": [{"start": 0, "end": len(completion)}],
            "n_prompt": len(prompt),
            "n_scored": len(completion),
            "truncated": False,
        }

    def kl(self, partner: str = "ring", max_length: int = 100, **training: Any) -> pl.DataFrame:
        config = TRAINING.model_copy(update=training)
        return kl_rows(
            Preferences(self.pairs, self.ways, self.labels, self.label_ways),
            self.sequences,
            partner=partner,
            training=config,
            max_length=max_length,
        )


def label_id(j: int) -> str:
    return f"{1000 + j:032x}"


def _padded(rows: list[dict[str, Any]], schema: pl.Schema) -> pl.DataFrame:
    return pl.DataFrame([{**dict.fromkeys(schema), **row} for row in rows], schema=schema)


def partners(kl: pl.DataFrame) -> dict[tuple[str, str], tuple[str, str]]:
    rows = kl.select(
        pl.coalesce("pair_id", "label_id"), "side", "partner_id", "partner_side"
    ).iter_rows()
    return {(a, b): (c, d) for a, b, c, d in rows}


def test_a_ring_gives_every_row_a_partner_with_another_prompt() -> None:
    tables = Tables([0, 0, 0, 1, 2, 2, 3, 4, 5, 5, 5, 5])
    kl = tables.kl()
    assert kl.height == 24
    prompts = dict(tables.pairs.select("pair_id", "prompt_id").iter_rows())
    found = partners(kl)
    assert len(found) == 24
    assert all(prompts[row[0]] != prompts[other[0]] for row, other in found.items())
    assert kl["step"].null_count() == 24
    shuffled = Tables([0, 0, 0, 1, 2, 2, 3, 4, 5, 5, 5, 5])
    shuffled.pairs = shuffled.pairs.reverse()
    shuffled.ways = shuffled.ways.sample(fraction=1, shuffle=True, seed=1)
    assert shuffled.kl().equals(kl), "the order of rows does not matter"
    assert tables.kl(seed=5, batch_pairs=2).equals(kl), "nor does the training"


def test_with_distinct_prompts_the_ring_is_one_cycle() -> None:
    found = partners(Tables(list(range(9))).kl())
    pairs_apart = {row: other for row, other in found.items() if row[0] != other[0]}
    assert len(pairs_apart) == 18
    assert len(set(found.values())) >= 16, "nearly everybody's reply is used once"


def test_an_inserted_row_disturbs_its_one_neighbour() -> None:
    before = partners(Tables(list(range(40))).kl())
    after = partners(Tables(list(range(41))).kl())
    changed = [row for row in before if before[row] != after[row]]
    assert len(changed) <= 2, "a pair is two rows, and each has one neighbour"
    new = f"{40:032x}"
    assert all(after[row][0] == new for row in changed)
    rotated = [partners(Tables(list(range(n))).kl("batch_rotation")) for n in (40, 41)]
    control = [row for row in rotated[0] if rotated[0][row] != rotated[1].get(row)]
    assert len(control) > 2, "control: a rotation inside batches is disturbed in many places"


def test_a_rotation_is_the_row_before_in_the_batch() -> None:
    tables = Tables(list(range(6)))
    kl = tables.kl("batch_rotation", epochs=2, batch_pairs=3)
    steps = step_ids(dict.fromkeys(tables.pairs["pair_id"], 1), TRAINING.model_copy(
        update={"epochs": 2, "batch_pairs": 3}))  # fmt: skip
    assert len(steps) == 4
    for step, batch in enumerate(steps, start=1):
        rows = [(pair, side) for side in ("chosen", "rejected") for pair in batch]
        found = partners(kl.filter(pl.col("step") == step))
        # TRL: KL_completion_ids = [completion_ids[-1]] + completion_ids[:-1]
        assert found == dict(zip(rows, [rows[-1], *rows[:-1]], strict=True))


SIDE = {True: "chosen", False: "rejected"}


def test_labels_stand_on_the_ring_as_pairs_do() -> None:
    prompts, answered = [0, 0, 1, 2, 2, 3], [0, 0, 0, 2, 7, 8, 8]
    tables = Tables(prompts, labels=answered)
    kl = checked("kl_sequences", tables.kl(), KlSequence)
    assert kl.height == 2 * 6 + 7
    assert (kl["pair_id"].is_null() == kl["label_id"].is_not_null()).all()
    labels = dict(zip(kl["label_id"], kl["side"], strict=True))
    assert {label: labels[label] for label in map(label_id, range(7))} == {
        label_id(j): SIDE[j % 2 == 0] for j in range(7)
    }
    by_prompt = dict(tables.pairs.select("pair_id", "prompt_id").iter_rows())
    by_prompt |= dict(tables.labels.select("label_id", "prompt_id").iter_rows())
    found = partners(kl)
    assert all(by_prompt[row[0]] != by_prompt[other[0]] for row, other in found.items())
    crossed = [(row[0] in labels) != (other[0] in labels) for row, other in found.items()]
    assert any(crossed), "pairs and labels are on one ring"
    made = {row["sequence_id"]: row for row in kl_sequences(kl, tables.sequences).to_dicts()}
    assert set(made) == set(kl["sequence_id"])
    tables.labels = tables.labels.reverse()
    tables.label_ways = tables.label_ways.sample(fraction=1, shuffle=True, seed=1)
    assert tables.kl().equals(kl), "the order of rows does not matter"


def test_an_inserted_label_disturbs_its_one_neighbour() -> None:
    before, after = (
        partners(Tables(list(range(10)), labels=list(range(20, 20 + n))).kl()) for n in (20, 21)
    )
    changed = [row for row in before if before[row] != after[row]]
    assert len(changed) == 1
    assert after[changed[0]][0] == label_id(20)


def test_a_rotation_of_labels_is_trls_of_an_unpaired_dataset() -> None:
    tables = Tables([], labels=list(range(7)))
    kl = tables.kl("batch_rotation", epochs=2, batch_pairs=3)
    config = TRAINING.model_copy(update={"epochs": 2, "batch_pairs": 3})
    steps = step_ids(dict.fromkeys(tables.labels["label_id"], 1), config)
    assert [len(batch) for batch in steps] == [3, 3, 1] * 2
    side = {label_id(j): SIDE[j % 2 == 0] for j in range(7)}
    for step, batch in enumerate(steps, start=1):
        rows = [(label, side[label]) for label in batch]
        # TRL: KL_completion_ids = [completion_ids[-1]] + completion_ids[:-1], in the order of rows
        expected = dict(zip(rows, [rows[-1], *rows[:-1]], strict=True))
        assert partners(kl.filter(pl.col("step") == step)) == expected
    rows = [(label, side[label]) for label in steps[0]]
    after = dict(zip(rows, [*rows[1:], rows[0]], strict=True))
    assert partners(kl.filter(pl.col("step") == 1)) != after, "control: the row after"


def test_a_rotation_of_both_has_the_rejected_sides_last() -> None:
    tables = Tables([0, 1, 2], labels=[3, 4, 5])
    kl = tables.kl("batch_rotation", batch_pairs=4)
    ids = [*tables.pairs["pair_id"], *tables.labels["label_id"]]
    batch = step_ids(dict.fromkeys(ids, 1), TRAINING)[0]
    side = {label_id(j): SIDE[j % 2 == 0] for j in range(3)}
    rows = [(i, side.get(i, "chosen")) for i in batch]
    rows += [(i, "rejected") for i in batch if i not in side]
    assert 4 < len(rows) < 8, "the batch has some of both"
    expected = dict(zip(rows, [rows[-1], *rows[:-1]], strict=True))
    assert partners(kl.filter(pl.col("step") == 1)) == expected


def test_the_reply_stands_under_the_rows_own_prompt() -> None:
    tables = Tables(list(range(8)))
    by_id = {row["sequence_id"]: row for row in tables.sequences.iter_rows(named=True)}
    kl = tables.kl()
    made = {row["sequence_id"]: row for row in kl_sequences(kl, tables.sequences).to_dicts()}
    assert len(made) == kl["sequence_id"].n_unique()
    ways = {row["pair_id"]: row for row in tables.ways.to_dicts()}
    for row in kl.iter_rows(named=True):
        own = by_id[ways[row["pair_id"]][f"{row['side']}_id"]]
        other = by_id[ways[row["partner_id"]][f"{row['partner_side']}_id"]]
        assert made[row["sequence_id"]] == Tables.sequence(
            own["prompt_ids"], other["completion_ids"]
        )


def test_a_reply_that_is_too_long_loses_its_end() -> None:
    tables = Tables(list(range(8)))
    kl = tables.kl(max_length=4)
    assert set(kl["n_completion"]) == {2}
    made = kl_sequences(kl, tables.sequences)
    assert made["completion_ids"].list.len().to_list() == [2] * made.height
    assert made["truncated"].sum() > 0


def test_held_out_replies_take_no_part() -> None:
    kl = Tables(list(range(10)), held_out=frozenset({2, 5})).kl()
    assert kl.height == 16
    used = {*kl["pair_id"], *kl["partner_id"]}
    assert used.isdisjoint({f"{2:032x}", f"{5:032x}"})


def test_one_prompt_alone_has_nothing_to_mismatch() -> None:
    with pytest.raises(TrainingError, match="two prompts at least"):
        Tables([7, 7, 7]).kl()


def test_mismatched_replies_are_made_and_scored_only_where_an_objective_needs_them(
    write_plan: WritePlan,
) -> None:
    plan, store = tokenized(write_plan())
    assert score(plan, store, "base").n_scored == 24
    assert not (store.directory / "kl_sequences").exists()

    kto = {"loss": "kto", "reference": "base", "start": "base"}
    plan, store = tokenized(write_plan(objectives={"kto": kto}))
    kl = read(store, "kl_sequences/kto")
    n_train = read(store, "pairs").filter(pl.col("split") == "train").height
    assert kl.height == 2 * n_train
    more = score(plan, store, "base")
    assert (more.n_reused, more.n_scored) == (24, kl["sequence_id"].n_unique())
    policy = train(plan, store, "kto")
    assert policy.steps["kl"].null_count() == 0
    assert wanted_sequences(plan, store, "kto").height == 24, "the policy itself scores none"
    assert score(plan, store, "kto").n_wanted == 24


@pytest.mark.parametrize("partner", ["ring", "batch_rotation"])
def test_the_logged_kl_is_the_mean_log_ratio_of_the_steps_mismatched_replies(
    write_plan: WritePlan, tiny_model: Path, tmp_path: Path, partner: str
) -> None:
    """Two models, each once the reference of the other: at one of the two, the mean is above 0."""
    other = build_tiny_model(tmp_path / "other", seed=5)
    models = {"a": {"checkpoint": str(tiny_model)}, "b": {"checkpoint": str(other)}}
    objectives = {
        f"from_{start}": {
            "loss": "kto", "kl_partner": partner, "reference": reference, "start": start
        }
        for start, reference in (("a", "b"), ("b", "a"))
    }  # fmt: skip
    plan, store = tokenized(
        write_plan(models=models, objectives=objectives), "training.max_steps=1"
    )
    logprobs = {}
    for name in models:
        score(plan, store, name)
        key, _ = key_of(plan, store, name)
        logprobs[name] = dict(read_logprobs(key).select("sequence_id", "logprob").iter_rows())
    train_ids = sorted(read(store, "pairs").filter(pl.col("split") == "train")["pair_id"])
    (batch,) = step_ids(dict.fromkeys(train_ids, 1), plan.training)
    found: list[float] = []
    expected: list[float] = []
    matched: list[float] = []
    for name, objective in plan.objectives.items():
        found.append(train(plan, store, name).steps["kl"][0])
        rows = read(store, f"kl_sequences/{name}").filter(pl.col("pair_id").is_in(batch))
        assert rows.height == 2 * len(batch)
        own = read(store, "pair_sequences").filter(pl.col("pair_id").is_in(batch))
        for ids, means in (
            (rows["sequence_id"], expected),
            ([*own["chosen_id"], *own["rejected_id"]], matched),
        ):
            ratios = [logprobs[objective.start][i] - logprobs[objective.reference][i] for i in ids]
            means.append(sum(ratios) / len(ratios))
    assert found == pytest.approx([max(0.0, mean) for mean in expected], abs=1e-5)
    assert max(found) > 0
    assert max(abs(a - b) for a, b in zip(expected, matched, strict=True)) > 0.1, (
        "control: the batch's own replies have another mean"
    )
