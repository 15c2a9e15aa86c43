"""Do two engines agree? Rewards of one are compared with those of another over the same pairs."""

from dataclasses import asdict, dataclass
from typing import Any

import polars as pl

from pipeline.errors import ScoringError
from pipeline.ids import unit_interval
from pipeline.names import reported_pairs, scored_by
from pipeline.plan import ModelConfig, ParityConfig, Plan
from pipeline.scoring.ledger import read_logprobs
from pipeline.scoring.passes import with_passes
from pipeline.scoring.run import score_sequences, scorer_key
from pipeline.store import Store, read


@dataclass(frozen=True)
class Parity:
    """Absolute differences between two engines per sequence, nats, over `n` sequences.

    Attributes:
        engine: that of the published numbers.
        other: the one they are compared with.
        logratio_max: largest difference of policy minus reference (the reward, at beta 1).
        logratio_mean: its mean.
        reference_max: largest difference of the reference's log-prob.
        policy_max: of the policy's.
        control: the largest log-ratio itself. An engine that ignored the policy's adapter would
            differ by that much: unless it is above the tolerance, agreement says nothing.
        tolerance: what `logratio_max` may be.
    """

    engine: str
    other: str
    n: int
    logratio_max: float
    logratio_mean: float
    reference_max: float
    policy_max: float
    control: float
    tolerance: float

    @property
    def passed(self) -> bool:
        """The engines agree, and would be seen to disagree."""
        return self.logratio_max <= self.tolerance < self.control

    def to_dict(self) -> dict[str, Any]:
        """The fields, for the record."""
        return asdict(self)


def engine_parity(plan: Plan, store: Store, name: str) -> Parity:
    """Score a policy's pairs of one split with the plan's second engine too, and compare.

    What the second engine makes is in the ledger under its own numerics, and is not made again.

    Raises:
        ScoringError: the plan names no second engine, it is the one that scored already, or no
            pair of that split is reported on.
    """
    parity = plan.scoring.parity
    if parity is None:
        raise ScoringError("scoring.parity is not set: there is no engine to compare with")
    against = plan.reference_of(name)
    sequences = _sample(plan, store, parity)
    columns = {}
    for role, who in (("reference", against), ("policy", name)):
        config, checkpoint = scored_by(plan, store, who)
        other_config: ModelConfig = config.model_copy(update={"engine": parity.engine})
        keys = [scorer_key(store, c, checkpoint) for c in (config, other_config)]
        if keys[0].numerics == keys[1].numerics:
            raise ScoringError(f"scoring.parity.engine: '{who}' is scored with {parity.engine}")
        score_sequences(
            f"{who} with {parity.engine}",
            keys[1],
            other_config,
            checkpoint,
            sequences,
            plan.scoring,
        )
        columns[role] = [_values(read_logprobs(key), sequences) for key in keys]
    reference, policy = columns["reference"], columns["policy"]
    ratios = [policy[i] - reference[i] for i in range(2)]
    differences = [(pair[0] - pair[1]).abs() for pair in (ratios, reference, policy)]
    config, _ = scored_by(plan, store, against)
    return Parity(
        engine=keys[0].numerics.engine,
        other=parity.engine,
        n=sequences.height,
        logratio_max=_largest(differences[0]),
        logratio_mean=float(differences[0].sum()) / sequences.height,
        reference_max=_largest(differences[1]),
        policy_max=_largest(differences[2]),
        control=_largest(ratios[0].abs()),
        tolerance=parity.allowed(config.dtype),
    )


def _sample(plan: Plan, store: Store, parity: ParityConfig) -> pl.DataFrame:
    pairs = read(store, "pairs").filter(pl.col("split") == parity.split)
    ways = reported_pairs(plan, store).join(pairs, on="pair_id", how="semi")
    kept = sorted(ways["pair_id"], key=lambda i: unit_interval(i, "parity"))[: parity.max_pairs]
    ways = ways.filter(pl.col("pair_id").is_in(kept))
    if ways.is_empty():
        raise ScoringError(f"scoring.parity: no pair of the split '{parity.split}' is reported on")
    ids = [*ways["chosen_id"], *ways["rejected_id"]]
    sampled = read(store, "sequences").filter(pl.col("sequence_id").is_in(ids))
    return with_passes(sampled, ways)


def _values(logprobs: pl.DataFrame, sequences: pl.DataFrame) -> pl.Series:
    """Log-probs in the order of `sequences`; all of them are there."""
    joined = sequences.select("sequence_id").join(logprobs, on="sequence_id", how="left")
    values = joined.sort("sequence_id")["logprob"]
    if values.null_count():
        raise ScoringError(f"{values.null_count()} sequences are not scored; score the plan first")
    return values


def _largest(values: pl.Series) -> float:
    return float(values.to_numpy().max())
