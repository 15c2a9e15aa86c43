"""Which pairs SQL selects and how much they count: DuckDB's word, autograd's, and refusals."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import polars as pl
import pytest
import torch
from report_tables import frame, ident, reward_row
from support import build_tiny_model, prepared, stepped

from pipeline.errors import PlanError, StoreError, TrainingError
from pipeline.models import Checkpoint
from pipeline.names import key_of
from pipeline.plan import Plan, Selection, Sql, load_plan, policies_named
from pipeline.scoring.ledger import read_logprobs
from pipeline.stages import compute_rewards, score, train
from pipeline.store import Store, read
from pipeline.training.data.examples import Example, training_pairs
from pipeline.training.data.selection import select_pairs, selected_pairs
from pipeline.training.policy import trained_examples
from pipeline.training.run.model import trainable_model
from schemas import PairSequence, PreferencePair, Reward, Sequence

WritePlan = Any

N = 90


@pytest.fixture(scope="module")
def tables() -> dict[str, pl.DataFrame]:
    """Pairs of all splits under thirty prompts, their sequences, and rewards of two policies."""
    rng = np.random.default_rng(11)
    pairs, ways, sequences = [], [], []
    for i in range(N):
        pairs.append(
            {
                "pair_id": ident("pair", i),
                "prompt_id": ident("prompt", i % 30),
                "sources": [["web"], ["books"], ["web", "books"]][i % 3],
                "split": ["train", "train", "test", "train", "left_out"][i % 5],
                "prompt": [{"role": "user", "content": f"question {i % 30}"}],
                "chosen": f"yes {i}",
                "rejected": f"no {i}",
                "strength": None if i % 7 == 0 else float(rng.normal(2, 1)),
                "votes": int(rng.integers(1, 4)),
                "flags": [[], ["mojibake"], ["cut_off", "mojibake"]][int(rng.integers(3))],
                "meta": json.dumps({"category": "even" if i % 2 == 0 else "odd"}),
                "file": f"{'ab'[i % 2]}.jsonl",
                "row": i,
                "byte_offset": None if i % 4 == 0 else 10 * i,
            }
        )
        ids = [ident(side, i) for side in ("chosen", "rejected")]
        ways.append(
            {
                "tokenization_id": ident("tokenization"),
                "pair_id": ident("pair", i),
                "chosen_id": ids[0],
                "rejected_id": ids[1],
                "boundary_merge": i % 11 == 0,
                "control_tokens": i % 3,
            }
        )
        sequences += [
            {
                "sequence_id": sequence,
                "prompt_ids": [1] * (5 + i % 30),
                "completion_ids": [2],
                "spans": [{"start": 0, "end": 1}],
                "n_prompt": 5 + i % 30,
                "n_scored": int(rng.integers(1, 40)),
                "truncated": False,
            }
            for sequence in ids
        ]
    rewards = {
        policy: frame(
            Reward,
            [
                reward_row(i, "train", *rng.normal(0, 6, 2).tolist())
                for i in range(N)
                if i % every == 0
            ],
        ).with_columns(prompt_id=pl.lit(ident("of the reward")))
        for policy, every in (("theirs", 2), ("dpo", 1))
    }
    lost = ident("pair", 3)  # valid, and not tokenised
    return {
        "pairs": frame(PreferencePair, pairs),
        "pair_sequences": frame(PairSequence, ways).filter(pl.col("pair_id") != lost),
        "sequences": frame(Sequence, sequences),
        **rewards,
    }


def selected(tables: dict[str, pl.DataFrame], where: str | None, weight: str | None = None) -> Any:
    return select_pairs(
        Selection(
            None if where is None else Sql("training.where", where),
            None if weight is None else Sql("training.weight", weight),
        ),
        tables["pairs"],
        tables["pair_sequences"],
        tables["sequences"],
        {name: tables[name] for name in ("theirs", "dpo")},
    )


def by_duckdb(tables: dict[str, pl.DataFrame], expression: str, keep: str = "TRUE") -> list[Any]:
    """Rows of (pair, value of an expression) of the training pairs that were tokenised."""
    with duckdb.connect() as connection:
        for name, table in tables.items():
            connection.register(name, table.to_arrow())
        return connection.execute(
            f"""
            WITH pairs AS (
                SELECT p.*, w.boundary_merge, w.control_tokens, c.n_prompt,
                    c.n_scored AS n_chosen, r.n_scored AS n_rejected, theirs, dpo
                FROM pairs p JOIN pair_sequences w ON p.pair_id = w.pair_id
                JOIN sequences c ON w.chosen_id = c.sequence_id
                JOIN sequences r ON w.rejected_id = r.sequence_id
                LEFT JOIN theirs ON theirs.pair_id = p.pair_id
                LEFT JOIN dpo ON dpo.pair_id = p.pair_id
                WHERE p.split = 'train'
            ), judged AS (SELECT *, ({keep}) AS kept FROM pairs)
            SELECT pair_id, ({expression}) AS value FROM judged WHERE kept ORDER BY pair_id
            """
        ).fetchall()


CONDITIONS = [
    "strength > 2",
    "strength IS NULL OR strength BETWEEN 1.5 AND 2.5",
    "votes >= 2",
    "votes % 2 = 1 AND NOT votes = 3",
    "NOT array_contains(flags, 'mojibake')",
    "array_contains(flags, 'cut_off') OR array_contains(sources, 'books')",
    "array_length(sources) = 2",
    "file = 'a.jsonl' AND row < 60",
    "file LIKE 'b%'",
    "meta LIKE '%\"even\"%'",
    "byte_offset IS NULL",
    "byte_offset + 1 > 300",
    "n_chosen < n_rejected",
    "n_prompt + n_chosen <= 40",
    "n_chosen * 1.0 / n_rejected > 0.8",
    "boundary_merge",
    "control_tokens IN (0, 2)",
    "LENGTH(chosen) > 5",
    "theirs.margin > -0.2",
    "NOT theirs.margin > -0.2",
    "theirs.margin IS NULL",
    "COALESCE(theirs.margin, 0) >= 0",
    "theirs.correct = 1.0 OR strength > 2",
    "theirs.logratio_chosen > dpo.logratio_chosen",
    "dpo.gradient_weight < 0.6 AND ABS(dpo.margin) > 0.3",
    "CASE WHEN votes > 1 THEN theirs.margin > 0 ELSE TRUE END",
    "ROW_NUMBER() OVER (PARTITION BY prompt_id ORDER BY dpo.margin DESC) = 1",
    "strength > 2 -- a comment",
]


@pytest.mark.parametrize("where", CONDITIONS)
def test_what_is_selected_is_what_duckdb_selects(
    tables: dict[str, pl.DataFrame], where: str
) -> None:
    found = selected(tables, where)
    values = dict(by_duckdb(tables, f"\n{where}\n"))
    assert found.pair_ids == [pair for pair, value in values.items() if value]
    record = found.record
    assert record.n == len(values)
    assert record.n_selected == len(found.pair_ids)
    assert record.n_left_out == sum(value is False for value in values.values())
    assert record.n_null == sum(value is None for value in values.values())
    # Controls: the condition tells pairs apart, and is not its own opposite.
    assert 0 < record.n_selected < record.n
    assert selected(tables, f"NOT (\n{where}\n)").pair_ids != found.pair_ids


@pytest.mark.parametrize(
    "weight",
    [
        "2",
        "COALESCE(strength * strength, 1.0) + 0.5",
        "votes",
        "CASE WHEN theirs.margin < 0 THEN 0.25 ELSE 2 END",
        "1 / COUNT(*) OVER (PARTITION BY prompt_id)",
        "EXP(dpo.margin)",
        "n_chosen + n_rejected",
    ],
)
@pytest.mark.parametrize("where", ["TRUE", "votes >= 2"])
def test_weights_are_what_duckdb_gives_the_selected_pairs(
    tables: dict[str, pl.DataFrame], where: str, weight: str
) -> None:
    found = selected(tables, where, weight)
    expected = by_duckdb(tables, weight, keep=where)
    assert list(found.weights) == found.pair_ids == [pair for pair, _ in expected]
    values = [float(value) for _, value in expected]
    assert list(found.weights.values()) == pytest.approx(values, rel=1e-14)
    assert found.record.lightest == min(found.weights.values())
    assert found.record.heaviest == max(found.weights.values())
    if "OVER" in weight and where != "TRUE":
        every = dict(by_duckdb(tables, weight))
        assert any(every[pair] != value for pair, value in expected), "control: WHERE comes first"


def test_where_polars_is_not_sql_is_known(tables: dict[str, pl.DataFrame]) -> None:
    """What docs/selection.md warns of; when Polars mends it, the page can be shorter."""
    condition = "(theirs.margin < 0) IS NOT TRUE"
    theirs = selected(tables, condition)
    sql = {pair for pair, value in by_duckdb(tables, condition) if value}
    assert theirs.record.n_null > 0
    assert sql - set(theirs.pair_ids)
    as_it_says = "NOT COALESCE(theirs.margin < 0, FALSE)"
    assert set(selected(tables, as_it_says).pair_ids) == sql
    thirds = selected(tables, None, "1.0 / CAST(3 AS INT)").weights.values()
    assert set(thirds) == {0.3333333}, "a literal with a point is a decimal of seven digits"
    assert set(selected(tables, None, "1 / 3").weights.values()) == {1 / 3}


def test_why_pairs_are_neither_is_counted(tables: dict[str, pl.DataFrame]) -> None:
    record = selected(tables, "theirs.margin > -0.2 AND strength > -9").record
    train = tables["pairs"].join(tables["pair_sequences"], on="pair_id").filter(split="train")
    unrewarded = train.join(tables["theirs"], on="pair_id", how="anti")
    # Where the margin is too low, the strength does not matter.
    low = tables["theirs"].filter(pl.col("margin") <= -0.2)["pair_id"]
    odd = train.filter(pl.col("strength").is_null() & ~pl.col("pair_id").is_in(low.to_list()))
    assert record.null_in == {"strength": odd.height, "theirs": unrewarded.height}
    assert 0 < odd.height < unrewarded.height < record.n
    assert f"{unrewarded.height} without theirs" in str(record)
    assert selected(tables, "dpo.margin > 0").record.null_in == {}


@pytest.mark.parametrize(
    ("where", "weight", "said"),
    [
        ("strength > 1e9", None, r"training\.where: selects nothing: 0 of \d+ pairs, \d+ left"),
        (None, "strength", r"training\.weight: is NULL for pair [0-9a-f]{32}, one of \d+"),
        (None, "votes - 2", r"training\.weight: is (-1|0)\.0 for pair .* no number above 0"),
        (None, "1 / (control_tokens - 1)", r"training\.weight: is (-1\.0|inf) for pair"),
        (None, "1.0 / (control_tokens - 1)", r"training\.weight: division by zero"),
        (None, "SQRT(control_tokens - 1)", r"training\.weight: is (nan|0\.0) for pair"),
        ("CAST(chosen AS INT) > 0", None, r"training\.where: .*conversion"),
        ("TRUE) AS value FROM pairs UNION ALL SELECT pair_id, (FALSE", None, r"where: gives \d+ v"),
    ],
)
def test_values_that_are_no_selection_are_refused(
    tables: dict[str, pl.DataFrame], where: str | None, weight: str | None, said: str
) -> None:
    with pytest.raises(TrainingError, match=said):
        selected(tables, where, weight)


AUDITED: dict[str, Any] = {
    "audits": {"theirs": {"reference": "base", "policy": "other"}},
    "objectives": {
        "dpo": {"loss": "dpo", "beta": 0.1, "reference": "base", "start": "base"},
        "ipo": {"loss": "ipo", "beta": 0.1, "reference": "base", "start": "base"},
    },
}


@pytest.fixture
def write_audited(
    write_plan: WritePlan, tiny_model: Path, tmp_path: Path
) -> Callable[..., tuple[Path, list[str]]]:
    """A plan with an audit and two objectives, and overrides as they are given."""
    other = build_tiny_model(tmp_path / "other", seed=5)
    models = {"base": {"checkpoint": str(tiny_model)}, "other": {"checkpoint": str(other)}}

    def write(*overrides: str, **sections: Any) -> tuple[Path, list[str]]:
        return write_plan(**{**AUDITED, "models": models, **sections}), list(overrides)

    return write


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("training.where='strenght > 1'", r"training\.where: .*strenght.*may name pair_id, "),
        ("training.where='strength >'", r"training\.where: .*may name .*n_rejected"),
        ("training.where=''", r"training\.where: "),
        ("training.where='strength'", r"training\.where: is a condition \(Boolean\), not Float64"),
        ("training.where='NULL'", r"training\.where: is a condition \(Boolean\), not Null"),
        ("training.where='theirs.margins > 0'", r"training\.where: .*as in dpo\.margin, "),
        ("training.where='base.margin > 0'", r"training\.where: .*of dpo, ipo, theirs, as in"),
        (
            "training.where='theirs > 0'",
            r"training\.where: names theirs without a column; it may name",
        ),
        ("training.where='flags = 1'", r"training\.where: .*List\(String\).*may name"),
        ("training.where='theirs.margin LIKE 1'", r"training\.where: .*may name"),
        ("training.where='AVG(strength) > 1'", r"training\.where: "),
        ("training.where='TRUE; DROP TABLE pairs'", r"training\.where: "),
        ("training.where='TRUE), (TRUE'", r"training\.where: "),
        ("training.where=[1]", r"training\.where: .*valid string"),
        ("training.weight='votes > 1'", r"training\.weight: is a number, not Boolean"),
        ("training.weight='chosen'", r"training\.weight: is a number, not String"),
        ("objectives.ipo.where='a > 1'", r"objectives\.ipo\.where: .*'?a'?"),
        ("objectives.ipo.weight=2", r"objectives\.ipo\.weight: .*valid string"),
        (
            "objectives.dpo.where='dpo.margin > 0'",
            r"objectives\.dpo\.where: 'dpo' would wait for its own rewards: dpo <- dpo",
        ),
        ("training.where='ipo.margin > 0'", r"training\.where: 'ipo' would wait for its own"),
        ("training.retrain=sometimes", r"training\.retrain: 'sometimes' is not one of always"),
        ("training.retrain={min_new_pairs: 0}", r"training\.retrain: .*N at least 1"),
        ("training.retrain={min_new_pairs: true}", r"training\.retrain: .*N at least 1"),
        ("training.retrain={min_pairs: 3}", r"training\.retrain: .*N at least 1"),
    ],
)
def test_a_wrong_expression_is_a_wrong_plan(write_audited: Any, override: str, said: str) -> None:
    path, overrides = write_audited(override)
    with pytest.raises(PlanError, match=said):
        load_plan(path, overrides)


def test_objectives_that_wait_for_each_other_are_refused(write_audited: Any) -> None:
    path, overrides = write_audited(
        "objectives.dpo.where='ipo.margin > 0'", "objectives.ipo.weight='EXP(dpo.margin)'"
    )
    with pytest.raises(PlanError, match=r"rewards: (dpo <- ipo <- dpo|ipo <- dpo <- ipo)"):
        load_plan(path, overrides)
    plan = load_plan(path, overrides[:1])
    assert policies_named(plan, "dpo") == ["ipo"]
    assert policies_named(plan, "ipo") == []


def test_an_objectives_own_words_stand_before_the_trainings(write_audited: Any) -> None:
    path, overrides = write_audited(
        "training.where='theirs.margin > 0 AND votes > 0'",
        "training.weight='EXP(theirs.margin)'",
        "objectives.ipo={loss: ipo, start: base, reference: base, where: 'TRUE', "
        "weight: 'EXP(dpo.margin)'}",
    )
    plan = load_plan(path, overrides)
    assert policies_named(plan, "dpo") == ["theirs"]
    assert policies_named(plan, "ipo") == ["dpo"]


def test_names_that_would_be_taken_for_columns_are_refused(write_audited: Any) -> None:
    audits = {"votes": {"reference": "base", "policy": "other"}}
    path, _ = write_audited(audits=audits)
    load_plan(path)
    with pytest.raises(PlanError, match=r"audits\.votes: is called like what training\.where"):
        load_plan(path, ["training.where='row > 1'"])


def test_rotation_deals_out_partners_before_anything_is_selected(write_plan: WritePlan) -> None:
    kto = {"loss": "kto", "reference": "base", "start": "base", "kl_partner": "batch_rotation"}
    path = write_plan(objectives={"kto": kto})
    load_plan(path, ["training.weight='votes'"])
    with pytest.raises(PlanError, match=r"kto\.kl_partner: .* with training\.where use ring"):
        load_plan(path, ["training.where='votes > 1'"])


def test_a_policy_is_trained_on_what_was_selected(write_plan: WritePlan) -> None:
    """KTO, whose mismatched replies come from pairs that are not selected too."""
    kto = {"loss": "kto", "beta": 0.1, "reference": "base", "start": "base"}
    where = "meta LIKE '%\"even\"%'"
    path = write_plan(objectives={"kto": kto})
    plan, store = prepared(path, f"training.where={json.dumps(where)}")
    result = train(plan, store, "kto")
    pairs = read(store, "pairs").filter(split="train")
    even = pairs.filter(pl.col("meta").str.contains('"even"'))["pair_id"]
    assert 0 < len(even) < pairs.height
    trained = trained_examples(store, result.policy_id)
    assert trained["example_id"].to_list() == sorted(even)
    assert trained["weight"].to_list() == [1.0] * len(even)
    record = json.loads((result.directory / "policy.json").read_text())["selection"]
    assert (record["n"], record["n_selected"]) == (pairs.height, len(even))
    assert (record["where"], record["weight"]) == (where, None)
    assert result.selection is not None
    assert result.selection.to_dict() == record
    # The selection is part of what a policy is, its words are not.
    other = load_plan(path, [f"training.where={json.dumps(f'NOT ({where}) IS FALSE')}"])
    assert selected_pairs(other, store, "kto").pair_ids == sorted(even)
    again = train(other, store, "kto")
    assert (again.policy_id, again.trained) == (result.policy_id, False)
    every = train(load_plan(path), store, "kto")
    assert every.policy_id != result.policy_id
    (store.policies / result.policy_id / "trained_examples.parquet").write_bytes(b"PAR1")
    with pytest.raises(StoreError, match="damaged"):
        trained_examples(store, result.policy_id)


def test_weights_decide_the_weights(write_plan: WritePlan) -> None:
    path = write_plan()
    plan, store = prepared(path, "training.weight='n_chosen'")
    result = train(plan, store, "dpo")
    weights = trained_examples(store, result.policy_id)["weight"]
    assert weights.n_unique() > 1
    assert result.selection is not None
    assert result.selection.heaviest == weights.max()
    assert train(load_plan(path), store, "dpo").policy_id != result.policy_id
    ones = train(load_plan(path, ["training.weight='1'"]), store, "dpo")
    assert not ones.trained, "all count the same: the policy without weights"


def test_the_gradient_is_the_weighted_means(write_plan: WritePlan) -> None:
    """Per adapter tensor, against a weighted mean written out over a plain float64 model."""
    weight = "1.0 + n_rejected * n_chosen / 10.0 + row"
    plan, store = prepared(write_plan(), f"training.weight={weight!r}")
    weights = selected_pairs(plan, store, "dpo").weights
    examples = [
        replace(p, references=(p.references[0] - 3.0 * i, p.references[1]), weight=weights[
            p.example_id
        ])
        for i, p in enumerate(pairs_of(plan, store)[:4])
    ]  # fmt: skip
    mine = gradients(plan, examples, [example.weight for example in examples])
    assert len({example.weight for example in examples}) == 4
    assert mine < 1e-4
    turned = [example.weight for example in (*examples[1:], examples[0])]
    assert gradients(plan, examples, turned) > 1e-2, "control: the weights of other pairs"
    assert gradients(plan, examples, [1.0] * 4) > 1e-2, "control: no weights"


def gradients(plan: Plan, examples: list[Any], weights: list[float]) -> float:
    """The largest relative error, over tensors, of a step's gradient against autograd's."""
    objective, config = plan.objectives["dpo"], plan.models["base"]
    start = Checkpoint(Path(config.checkpoint))
    single, double = (
        trainable_model(
            start, config.model_copy(update={"dtype": dtype}), plan.training, torch.device("cpu")
        )
        for dtype in ("float32", "float64")
    )
    twins = dict(double.named_parameters())
    torch.manual_seed(0)
    for name, parameter in single.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn_like(parameter) * 0.05
        twins[name].data = parameter.data.double()
    stepped(single, examples, objective)
    losses = torch.stack([written_out(double, e, objective.values["beta"]) for e in examples])
    share = torch.tensor(weights, dtype=torch.float64)
    torch.autograd.backward((losses * share).sum() / share.sum())
    errors = [
        (ours.grad.double() - twins[name].grad).norm() / twins[name].grad.norm()
        for name, ours in single.named_parameters()
        if ours.grad is not None
    ]
    assert len(errors) == 2 * 2 * 7
    return float(max(errors))


def pairs_of(plan: Plan, store: Store) -> list[Example]:
    reference, _ = key_of(plan, store, "base")
    return training_pairs(
        read(store, "pairs"),
        read(store, "pair_sequences"),
        read(store, "sequences"),
        read_logprobs(reference),
    )


def written_out(model: torch.nn.Module, pair: Example, beta: float) -> torch.Tensor:
    """DPO's loss of one pair: each reply by itself, through the model's own forward."""
    ratios = []
    for completion, reference in zip(pair.replies, pair.references, strict=True):
        ids = torch.tensor([[*pair.prompt_ids, *completion.ids]])
        logprobs = torch.log_softmax(model(input_ids=ids).logits[0, :-1], -1)
        picked = logprobs.gather(1, ids[0, 1:, None])[len(pair.prompt_ids) - 1 :, 0]
        ratios.append(picked.sum() - reference)
    return -torch.nn.functional.logsigmoid(beta * (ratios[0] - ratios[1]))


def audited(write_audited: Any, *overrides: str) -> tuple[Plan, Store]:
    path, said = write_audited(*overrides)
    plan, store = prepared(path, *said)
    score(plan, store, "theirs")
    compute_rewards(plan, store, "theirs")
    return plan, store


def test_rewards_of_other_pairs_are_refused(write_audited: Any, write_pairs: Any) -> None:
    overrides = ("objectives.dpo.where='theirs.margin > 0'",)
    path, said = write_audited(*overrides)
    plan, store = prepared(path, *said)
    with pytest.raises(StoreError, match="nothing has been published under 'rewards/theirs'"):
        train(plan, store, "dpo")
    plan, store = audited(write_audited, *overrides)
    train(plan, store, "dpo")
    write_pairs(16)
    plan, store = prepared(path, *said)
    with pytest.raises(TrainingError, match=r"'theirs', .* are of an earlier snapshot of pairs"):
        train(plan, store, "dpo")


def test_rewards_of_an_earlier_policy_are_refused(write_audited: Any) -> None:
    path, said = write_audited("objectives.ipo.where='dpo.margin > -100'")
    plan, store = prepared(path, *said)
    for step in (train, score, compute_rewards):
        step(plan, store, "dpo")
    train(plan, store, "ipo")
    again = load_plan(path, [*said, "training.seed=4"])
    train(again, store, "dpo")
    with pytest.raises(TrainingError, match=r"'dpo', .* are of an earlier policy"):
        train(again, store, "ipo")


def test_pairs_without_rewards_are_not_selected_and_said(
    write_audited: Any, caplog: pytest.LogCaptureFixture
) -> None:
    where = "objectives.dpo.where='theirs.margin > -100'"
    plan, store = audited(write_audited, where, "scoring.train_pairs=3")
    with caplog.at_level("INFO", logger="pipeline"):
        record = selected_pairs(plan, store, "dpo").record
    assert record.n_selected == 3
    assert record.n_null == record.n - 3 == record.null_in["theirs"]
    assert f"trained on 3 of {record.n} pairs, 0 left out, {record.n - 3} NULL" in caplog.text
    assert "scoring.train_pairs is 3" in caplog.text
