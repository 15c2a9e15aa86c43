"""What a preference loss is."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from pipeline.errors import LogratioError

if TYPE_CHECKING:
    import torch

Values = Mapping[str, float]
"""A loss's parameters by name, for instance beta and gamma."""

Statistics = Mapping[str, float]
"""What a loss knows of more than its own pair, by name. Constants to the gradient."""


class LossInputError(LogratioError):
    """A loss was asked for what it is not defined on, or without a number it needs."""


@dataclass(frozen=True)
class PairBatch:
    """Sequence log-probs of B pairs, nats, each a tensor [B]; the reference's carry no gradient.

    A loss that does not need a reference may be given zeros for it. `n_*` are scored tokens, the
    end-of-turn included, as floats. `more` holds the columns that only some losses need (`NEEDS`).
    """

    policy_chosen: "torch.Tensor"
    policy_rejected: "torch.Tensor"
    reference_chosen: "torch.Tensor"
    reference_rejected: "torch.Tensor"
    n_chosen: "torch.Tensor"
    n_rejected: "torch.Tensor"
    more: Mapping[str, "torch.Tensor"] = field(default_factory=dict, kw_only=True)

    @property
    def chosen(self) -> "Side":
        """The preferred replies."""
        return Side(self, "chosen")

    @property
    def rejected(self) -> "Side":
        """The others."""
        return Side(self, "rejected")

    @cached_property
    def reference_partners(self) -> "torch.Tensor":
        """For each pair's policy margin, where the reference margin of equal rank stands, [B].

        Margins are differences of log-probs. Sorted once, whatever is asked of the batch.
        """
        return of_equal_rank(
            self.policy_chosen - self.policy_rejected,
            self.reference_chosen - self.reference_rejected,
        )

    @cached_property
    def rejected_partners(self) -> "torch.Tensor":
        """For each chosen log-ratio, where the rejected one of equal rank stands, [B]."""
        return of_equal_rank(self.chosen.log_ratio, self.rejected.log_ratio)

    def column(self, name: str) -> "torch.Tensor":
        """One of `more`.

        Raises:
            LossInputError: it was not given.
        """
        if name not in self.more:
            raise LossInputError(f"the loss needs the column '{name}', which is not there")
        return self.more[name]


def of_equal_rank(ours: "torch.Tensor", theirs: "torch.Tensor") -> "torch.Tensor":
    """For each number of `ours`, [B], where in `theirs`, [B], the one of equal rank stands."""
    import torch

    order, others = (torch.argsort(x.detach(), stable=True) for x in (ours, theirs))
    partners = torch.empty_like(order)
    partners[order] = others
    return partners


@dataclass(frozen=True)
class Side:
    """One reply of each pair; every property is a tensor [B]."""

    batch: PairBatch
    name: str

    @property
    def logprob(self) -> "torch.Tensor":
        """The policy's sum over the reply, nats."""
        logprob: torch.Tensor = getattr(self.batch, f"policy_{self.name}")
        return logprob

    @property
    def n(self) -> "torch.Tensor":
        """Scored tokens."""
        n: torch.Tensor = getattr(self.batch, f"n_{self.name}")
        return n

    @property
    def log_ratio(self) -> "torch.Tensor":
        """The policy's log-prob minus the reference's, nats."""
        reference: torch.Tensor = getattr(self.batch, f"reference_{self.name}")
        return self.logprob - reference

    @property
    def mean_logprob(self) -> "torch.Tensor":
        """Nats per token."""
        return self.logprob / self.n

    @property
    def mean_log_ratio(self) -> "torch.Tensor":
        """Nats per token."""
        return self.log_ratio / self.n

    def column(self, name: str) -> "torch.Tensor":
        """This side's column of `PairBatch.more`."""
        return self.batch.column(f"{name}_{self.name}")


@dataclass(frozen=True)
class Need:
    """What a loss reads beyond the policy's sums.

    Attributes:
        what: in words.
        columns: of `PairBatch.more`; empty where the batch has it anyway.
        trained: whether the trainer can give it.
    """

    what: str
    columns: tuple[str, ...] = ()
    trained: bool = True


def _both(*names: str) -> tuple[str, ...]:
    return tuple(f"{name}_{side}" for name in names for side in ("chosen", "rejected"))


NEEDS: Mapping[str, Need] = {
    "reference": Need("the reference's log-probs"),
    "lengths": Need("numbers of scored tokens"),
    "kl": Need("log-ratios of mismatched replies"),
    "batch": Need("the other pairs of its batch"),
    "strength": Need("how much better the chosen reply is", ("strength",)),
    "policy_prefix": Need(
        "the policy's log-probs of the first min(n_chosen, n_rejected) tokens, nats",
        _both("policy_prefix"),
        trained=False,
    ),
    "reference_prefix": Need(
        "the reference's log-probs of the first min(n_chosen, n_rejected) tokens, nats",
        _both("reference_prefix"),
        trained=False,
    ),
    "alignment": Need(
        "the mean over tokens of log p(token) - log sum p(v)^2 over the vocabulary",
        _both("alignment"),
        trained=False,
    ),
    "sequential_kl": Need(
        "the sum over tokens of KL(reference || policy) over the vocabulary, nats",
        _both("sequential_kl"),
        trained=False,
    ),
    "gold": Need(
        "the policy's log-prob of a third, gold reply, and its tokens",
        ("gold_logprob", "n_gold"),
        trained=False,
    ),
}
"""What losses may need, by name."""


@dataclass(frozen=True)
class Parameter:
    """A number a plan may set: its default and its bounds, `above` and `below` being excluded."""

    default: float
    above: float | None = None
    below: float | None = None
    least: float | None = None
    most: float | None = None

    def __str__(self) -> str:
        """For instance `0.1, > 0`."""
        bounds = ((">", self.above), ("≥", self.least), ("<", self.below), ("≤", self.most))
        said = [f"{sign} {bound:g}" for sign, bound in bounds if bound is not None]
        return ", ".join([f"{self.default:g}", *said])

    def allows(self, value: float) -> bool:
        """Whether a value is inside the bounds; NaN and infinities are not."""
        return (
            abs(value) < float("inf")
            and (self.above is None or value > self.above)
            and (self.least is None or value >= self.least)
            and (self.below is None or value < self.below)
            and (self.most is None or value <= self.most)
        )


@dataclass(frozen=True)
class Target:
    """The score margin where a loss is at rest (or, for SimPO, that it asks for), as text too.

    Attributes:
        nats: the margin of log-ratios (of log-probs, for a loss without reference).
        unit: `nats`, or `nats per token` where a reply counts by its mean.
    """

    nats: float
    unit: str

    def __str__(self) -> str:
        """For instance `5 nats`."""
        return f"{self.nats:.6g} {self.unit}"


Pair = tuple["torch.Tensor", "torch.Tensor"]
"""A tensor [B] of the chosen replies and one of the rejected ones."""


@dataclass(frozen=True)
class Scale:
    """How a loss scores a reply.

    Attributes:
        name: in words, for instance `β × log-ratio`.
        score: (replies, values) to their scores, [B].
        slope: (replies, values) to dscore/d policy log-prob, [B].
    """

    name: str
    score: Callable[[Side, Values], "torch.Tensor"]
    slope: Callable[[Side, Values], "torch.Tensor"]


@dataclass(frozen=True)
class LossSpec:
    """A loss with what the rest of the house must know about it.

    Attributes:
        name: as a plan names it.
        paper: where the formula comes from.
        formula: the loss in one line; `m` is the difference of the two scores s.
        gradient: dLoss/dm in one line, or that of each side.
        parameters: what a plan may set.
        needs: names of `NEEDS`.
        scale: how it scores a reply.
        loss: (batch, values, statistics) to per-pair losses [B]. A step's loss is their mean.
        slopes: (batch, values, statistics) to dLoss/dscore of either side, in closed form, with
            sign. The loss is the sum over the batch, where pairs depend on one another.
        target: values to the margin the loss aims at, or None if it always asks for more.
        statistic: (batch, values, the step before's) to what `loss` must know of the whole batch;
            None for a loss of its own pair. Its scope is the optimiser step, or a whole table.
        domain: what the numbers must be; outside `loss` raises LossInputError.
        rows: (batch, values, statistics) to the losses of a chosen reply as a desirable row and of
            a rejected one as an undesirable row, [B] each; `loss` is their mean. None for a loss
            of pairs.
    """

    name: str
    paper: str
    formula: str
    gradient: str
    parameters: Mapping[str, Parameter]
    needs: tuple[str, ...]
    scale: Scale
    loss: Callable[[PairBatch, Values, Statistics], "torch.Tensor"]
    slopes: Callable[[PairBatch, Values, Statistics], Pair]
    target: Callable[[Values], Target | None] = lambda values: None
    statistic: Callable[[PairBatch, Values, Statistics], Statistics] | None = None
    domain: str = ""
    rows: Callable[[PairBatch, Values, Statistics], Pair] | None = None

    @property
    def defaults(self) -> dict[str, float]:
        """The values its parameters have where a plan says nothing."""
        return {name: parameter.default for name, parameter in self.parameters.items()}

    @property
    def needs_reference(self) -> bool:
        """False for a loss of the policy's log-probs alone."""
        return "reference" in self.needs

    @property
    def needs_kl(self) -> bool:
        """Whether `statistics` must hold `kl`, the mean log-ratio of mismatched replies, nats."""
        return "kl" in self.needs

    @property
    def needs_batch(self) -> bool:
        """Whether a pair's loss depends on the other pairs it is given with."""
        return "batch" in self.needs

    @property
    def scope(self) -> str:
        """What a pair's loss depends on: `pair`, or `optimizer_step`.

        The latter is every pair of the step, however it is cut into passes and processes; of a
        table, every pair of the table.
        """
        return "optimizer_step" if self.needs_kl or self.needs_batch else "pair"

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns of `PairBatch.more` it reads."""
        return tuple(column for need in self.needs for column in NEEDS[need].columns)

    def scores(self, batch: PairBatch, values: Values) -> Pair:
        """Each reply's score in the loss's own scale, [B] each."""
        return self.scale.score(batch.chosen, values), self.scale.score(batch.rejected, values)

    def gradient_weight(
        self, batch: PairBatch, values: Values, statistics: Statistics
    ) -> "torch.Tensor":
        """|dLoss/dscore|, the mean of the two sides, [B].

        For a loss of the score margin both sides are equal, and it is |dLoss/dmargin|.
        """
        chosen, rejected = self.slopes(batch, values, statistics)
        return (chosen.abs() + rejected.abs()) / 2

    def logprob_slopes(self, batch: PairBatch, values: Values, statistics: Statistics) -> Pair:
        """dLoss/d policy log-prob of either side, per nat, in closed form, [B] each."""
        chosen, rejected = self.slopes(batch, values, statistics)
        return (
            chosen * self.scale.slope(batch.chosen, values),
            rejected * self.scale.slope(batch.rejected, values),
        )

    def reward_beta(self, values: Values) -> float | None:
        """What its log-ratios are multiplied by to be rewards; None without a reference or beta."""
        betas = [v for name, v in values.items() if name.rpartition(".")[2] == "beta"]
        return betas[0] if self.needs_reference and betas else None
