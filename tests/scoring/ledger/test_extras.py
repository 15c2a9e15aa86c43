"""Extras in the ledger: parts of their own, of no identity, and no published number changes."""

import math
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from fake_engine import FakeEngine
from forks import begin, ended

from pipeline import failpoints
from pipeline.errors import ScoringError
from pipeline.plan import Extra
from pipeline.scoring.engines.base import Completion, Group, TokenScores, check_scores
from pipeline.scoring.ledger import (
    ScorerKey,
    append,
    collect,
    compact,
    inventory,
    read_complete,
    read_extras,
    read_logprobs,
    read_token_extras,
    read_unscored,
    verify_ledger,
)
from pipeline.scoring.ledger.manifests import in_force, present
from schemas import LogProb, SequenceExtra, TokenExtra, TokenLogProb, polars_schema
from scoring.ledger.desk import (
    PROVENANCE,
    A,
    FakeEngineWithExtras,
    everything,
    fake_key,
    made_sequences,
    put,
    score,
)

SQUARES: list[Extra] = ["log_sum_squares"]
BOTH: list[Extra] = ["log_sum_squares", "entropy"]
SEQUENCES, COMMIT_ROWS = made_sequences(4, seed=5), 3


def parts(key: ScorerKey) -> dict[str, list[str]]:
    """Names of part files by table; a name is the hash of what is in it."""
    return {
        folder.name: sorted(path.name for path in folder.iterdir())
        for folder in key.directory.iterdir()
        if folder.is_dir() and folder.name not in ("manifest", "trust", "differences")
    }


def asked(engine: FakeEngineWithExtras) -> dict[tuple[Extra, ...], int]:
    said = [extras for extras, _ in engine.asked]
    return {extras: said.count(extras) for extras in said}


def whole(key: ScorerKey) -> list[pl.DataFrame]:
    return [everything(key), read_extras(key), read_token_extras(key)]


def unchanged(before: list[pl.DataFrame], key: ScorerKey) -> bool:
    return all(a.equals(b) for a, b in zip(before, whole(key), strict=True))


def test_off_not_a_byte_changes_and_on_not_one_of_the_log_probs(tmp_path: Path) -> None:
    plain, off, on = (fake_key(tmp_path / name) for name in ("plain", "off", "on"))
    score(plain, SEQUENCES, FakeEngine(), commit_rows=COMMIT_ROWS)
    engine = FakeEngineWithExtras()
    score(off, SEQUENCES, engine, commit_rows=COMMIT_ROWS)
    assert engine.asked == []
    assert set(parts(plain)) == {"logprobs", "token_logprobs"}
    assert parts(off) == parts(plain)
    score(on, SEQUENCES, extras=SQUARES, commit_rows=COMMIT_ROWS)
    found = parts(on)
    assert len(found.pop("extras")) == len(found.pop("token_extras")) == 2
    assert found == parts(plain)
    assert on.directory.relative_to(on.ledger) == plain.directory.relative_to(plain.ledger)
    assert len(present(on.directory)) == len(present(plain.directory)), "one commit for all"


def test_extras_add_up_over_their_tokens(tmp_path: Path) -> None:
    key = fake_key(tmp_path)
    score(key, SEQUENCES, extras=BOTH)
    tokens = read_token_extras(key).select("sequence_id", "extra", "values")
    joined = read_extras(key).join(tokens, on=["sequence_id", "extra"])
    assert joined.height == 2 * SEQUENCES.height
    for row in joined.iter_rows(named=True):
        assert len(row["values"]) == row["n_tokens"]
        assert math.fsum(row["values"]) == row["total"]
    entropy = tokens.filter(pl.col("extra") == "entropy")
    for row in everything(key).join(entropy, on="sequence_id").iter_rows(named=True):
        np.testing.assert_allclose(row["values"], -1.5 * np.array(row["logprobs"]), rtol=1e-6)


def test_turned_on_later_only_the_missing_measure_is_computed(tmp_path: Path) -> None:
    key = fake_key(tmp_path)
    score(key, SEQUENCES.head(5))
    before = everything(key)
    engine = FakeEngineWithExtras("other numbers")
    result = score(key, SEQUENCES, engine, extras=SQUARES, null_test_tolerance=1e9)
    assert (result.n_reused, result.n_scored, result.n_unscored) == (0, 8, 0)
    assert asked(engine) == {("log_sum_squares",): 8}
    ids = before["sequence_id"].to_list()
    assert everything(key).filter(pl.col("sequence_id").is_in(ids)).equals(before)
    # The extras of those five are the second engine's all the same.
    values = dict(read_extras(key).select("sequence_id", "total").iter_rows())
    assert not any(
        math.isclose(values[i], 0.5 * v)
        for i, v in before.select("sequence_id", "logprob").iter_rows()
    )
    squares = read_token_extras(key)
    engine = FakeEngineWithExtras("others again")
    result = score(key, SEQUENCES, engine, extras=BOTH)
    assert (result.n_reused, result.n_scored) == (0, 8)
    assert asked(engine) == {("entropy",): 8}
    assert read_token_extras(key).filter(pl.col("extra") == "log_sum_squares").equals(squares)
    for extras in ([], SQUARES, BOTH):
        again = score(key, SEQUENCES, extras=extras)
        assert (again.n_reused, again.n_scored, again.model_loaded) == (8, 0, False)
    assert verify_ledger(key.ledger) == []


def test_each_sequence_is_asked_for_what_it_lacks(tmp_path: Path) -> None:
    key = fake_key(tmp_path)
    score(key, SEQUENCES.slice(0, 2), extras=["entropy"])
    score(key, SEQUENCES.slice(2, 2), extras=SQUARES)
    score(key, SEQUENCES.slice(4, 1))
    score(key, SEQUENCES.slice(5, 1), extras=BOTH)
    engine = FakeEngineWithExtras()
    result = score(key, SEQUENCES, engine, extras=["log_sum_squares", "entropy", "entropy"])
    assert (result.n_reused, result.n_scored) == (1, 7)
    assert asked(engine) == {
        ("entropy", "log_sum_squares"): 3,  # two new ones, and one with a log-prob alone
        ("log_sum_squares",): 2,
        ("entropy",): 2,
    }
    assert read_complete(key, BOTH).equals(read_logprobs(key))
    assert verify_ledger(key.ledger) == []


def add_extras(root: Path) -> None:
    score(fake_key(root), SEQUENCES, extras=SQUARES, commit_rows=COMMIT_ROWS)
    compact(fake_key(root).directory)
    collect(fake_key(root).ledger, remove=True)


def test_killed_anywhere_nothing_is_lost(tmp_path: Path) -> None:
    """Over log-probs of some sequences, those of the others and all extras are committed."""
    first, calm = tmp_path / "first", tmp_path / "calm"
    score(fake_key(first), SEQUENCES.head(4), commit_rows=COMMIT_ROWS)
    before = everything(fake_key(first))
    shutil.copytree(first, calm)
    points = ("ledger.part", "ledger.parts", "ledger.committed", "compact.committed")
    failpoints.arm(",".join(f"{point}:count" for point in points))
    try:
        add_extras(calm)
        counted = failpoints.passed()
    finally:
        failpoints.arm("")
    expected = whole(fake_key(calm))
    # Of 8 sequences, 4 with a log-prob: two commits of four parts, two of two, and a merged one.
    assert counted["ledger.part"] == 2 * 4 + 2 * 2 + 4
    faults = [(point, n) for point in points for n in range(1, counted[point] + 1)]
    for start in range(0, len(faults), 3):
        roots = [(tmp_path / f"{p}-{n}", f"{p}:kill@{n}") for p, n in faults[start : start + 3]]
        for root, _ in roots:
            shutil.copytree(first, root)
        begun = [begin(add_extras, root, fail=fail) for root, fail in roots]
        for (root, fail), process in zip(roots, begun, strict=True):
            assert ended(process) == -9, fail
            left = everything(fake_key(root))
            ids = before["sequence_id"].to_list()
            assert left.filter(pl.col("sequence_id").is_in(ids)).equals(before), fail
            assert verify_ledger(fake_key(root).ledger) == [], fail
            add_extras(root)
            assert unchanged(expected, fake_key(root)), fail


def test_compaction_and_collection_keep_the_first_committed_of_each(tmp_path: Path) -> None:
    key = fake_key(tmp_path)
    put(key, a=-1.0)
    for total in (-0.5, -0.9):
        append(key, *nothing(), PROVENANCE, extras=extra_rows(key, A, [total]))
    append(key, *nothing(), PROVENANCE, extras=extra_rows(key, A, [3.0], "entropy"))
    before = whole(key)
    assert before[1].select("extra", "total").rows() == [
        ("entropy", 3.0),
        ("log_sum_squares", -0.5),
    ]
    done = compact(key.directory)
    assert (done.before, done.after) == (4, 1)
    assert unchanged(before, key)
    # The parts of the log-prob are the merged commit's, being equal to the byte.
    assert len(collect(key.ledger, remove=True)) == 4 + 3 * 2
    assert unchanged(before, key)
    assert verify_ledger(key.ledger) == []
    assert inventory(key.ledger).select("sequences", "extras", "commits").row(0) == (1, 2, 1)
    (merged,) = in_force(present(key.directory))
    part = key.directory / "token_extras" / merged.parts["token_extras"].file
    part.write_bytes(b"junk")
    (fault,) = verify_ledger(key.ledger)
    assert fault.path == part


def test_a_damaged_extra_is_computed_again(tmp_path: Path) -> None:
    key = fake_key(tmp_path)
    score(key, SEQUENCES, commit_rows=COMMIT_ROWS)
    score(key, SEQUENCES, extras=SQUARES, commit_rows=COMMIT_ROWS)
    before = whole(key)
    one = next(m for m in present(key.directory) if "extras" in m.parts)
    (key.directory / "extras" / one.parts["extras"].file).write_bytes(b"")
    engine = FakeEngineWithExtras()
    result = score(key, SEQUENCES, engine, extras=SQUARES)
    assert result.n_scored == one.parts["extras"].rows == len(engine.asked)
    assert unchanged(before, key)
    assert verify_ledger(key.ledger) == []


def test_a_damaged_extra_takes_its_commit_along_and_one_pass_mends_both(tmp_path: Path) -> None:
    key = fake_key(tmp_path)
    score(key, SEQUENCES, extras=SQUARES, commit_rows=COMMIT_ROWS)
    before = whole(key)
    one = present(key.directory)[1]
    (key.directory / "extras" / one.parts["extras"].file).write_bytes(b"")
    score(key, SEQUENCES)
    assert everything(key).equals(before[0]), "who does not ask for extras does not read them"
    result = score(key, SEQUENCES, extras=SQUARES)
    assert (result.n_scored, result.n_unscored) == (one.parts["logprobs"].rows, 0)
    assert unchanged(before, key)


def nothing() -> tuple[pl.DataFrame, pl.DataFrame]:
    return tuple(pl.DataFrame(schema=polars_schema(t)) for t in (LogProb, TokenLogProb))  # type: ignore[return-value]


def extra_rows(
    key: ScorerKey, sequence: str, values: list[float], extra: str = "log_sum_squares"
) -> tuple[pl.DataFrame, pl.DataFrame]:
    of = {
        "model_id": key.model.model_id,
        "numerics_id": key.numerics.numerics_id,
        "sequence_id": sequence,
        "extra": extra,
    }
    total = {**of, "total": math.fsum(values), "n_tokens": len(values)}
    return (
        pl.DataFrame([total], schema=polars_schema(SequenceExtra)),
        pl.DataFrame([{**of, "values": values}], schema=polars_schema(TokenExtra)),
    )


def test_verify_finds_extras_that_are_not_of_their_tokens(tmp_path: Path) -> None:
    key = fake_key(tmp_path)
    put(key, a=-1.0)
    sums, tokens = extra_rows(key, A, [-0.5])
    append(key, *nothing(), PROVENANCE, extras=(sums.with_columns(total=-0.25), tokens))
    append(key, *nothing(), PROVENANCE, extras=extra_rows(key, A, [-0.5, -0.5], "entropy"))
    found = [(fault.path.stem, fault.what) for fault in verify_ledger(key.ledger)]
    assert found == [
        ("00000002", "1 sums are not those of their tokens"),
        ("00000003", "1 extras are of other tokens than the log-probs"),
    ]


def test_an_engine_that_does_not_know_them_is_named_before_anything_is_scored(
    tmp_path: Path,
) -> None:
    key, engine = fake_key(tmp_path), FakeEngine()
    with pytest.raises(ScoringError, match="FakeEngine does not compute log_sum_squares"):
        score(key, SEQUENCES, engine, extras=SQUARES)
    assert engine.scored == []
    vllm = replace(key, numerics=replace(key.numerics, engine="vllm"))
    with pytest.raises(ScoringError, match="'m' is scored by vLLM, and only the torch engine"):
        score(vllm, SEQUENCES, extras=SQUARES)
    assert read_logprobs(key).is_empty()


class Forgetful(FakeEngineWithExtras):
    """Out of memory whenever it is asked for the extras of one sequence."""

    def __init__(self, sequence: str) -> None:
        super().__init__()
        self.sequence = sequence

    def score_with_extras(
        self, groups: Sequence[Group], batch_tokens: int, extras: Sequence[Extra]
    ) -> list[list[TokenScores]]:
        if any(c.sequence_id == self.sequence for g in groups for c in g.completions):
            raise MemoryError("cannot allocate")
        return super().score_with_extras(groups, batch_tokens, extras)


def test_what_does_not_fit_is_on_record_as_lacking_its_extra(tmp_path: Path) -> None:
    key, victim = fake_key(tmp_path), SEQUENCES["sequence_id"][3]
    score(key, SEQUENCES)
    result = score(key, SEQUENCES, Forgetful(victim), extras=SQUARES)
    assert (result.n_scored, result.n_unscored) == (7, 1)
    assert read_unscored(key).is_empty(), "it has a log-prob"
    assert read_unscored(key, SQUARES)["sequence_id"].to_list() == [victim]
    assert read_complete(key, SQUARES).height == 7
    assert score(key, SEQUENCES, extras=SQUARES).n_scored == 1
    assert read_unscored(key, SQUARES).is_empty()


@pytest.mark.parametrize(
    ("extra", "bad"),
    [
        ("log_sum_squares", [-1.0]),
        ("log_sum_squares", [-1.0, float("nan")]),
        ("log_sum_squares", [-1.0, 0.01]),
        ("log_sum_squares", [-1.0, -4.1]),  # below twice the token's own log-prob
        ("entropy", [1.0, float("inf")]),
        ("entropy", [1.0, -0.1]),
    ],
)
def test_what_no_distribution_has_is_refused(extra: Extra, bad: list[float]) -> None:
    completion = Completion("s", np.array([1, 2], np.int32), ((0, 2),))
    logprobs = np.array([-1.0, -2.0], np.float32)
    good: dict[Extra, list[float]] = {"log_sum_squares": [-2.0, -3.9], "entropy": [0.0, 2.0]}
    check_scores(
        completion, TokenScores(logprobs, {k: np.array(v, np.float32) for k, v in good.items()})
    )
    with pytest.raises(ScoringError, match=f"sequence s.*{extra}"):
        check_scores(completion, TokenScores(logprobs, {extra: np.array(bad, np.float32)}))
