"""One optimiser step's losses and gradients."""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import zip_longest
from typing import TYPE_CHECKING, Any, TypeVar

from pipeline.errors import TrainingError
from pipeline.losses import LossSpec
from pipeline.plan import ObjectiveConfig
from pipeline.scoring.engines.base import Group, sequence_sum
from pipeline.scoring.engines.forward import Forward
from pipeline.scoring.engines.forward.head import TargetScores, joined
from pipeline.training.data.examples import Example
from pipeline.training.run.numbers import (
    TOKEN_STATISTICS,
    Numbers,
    class_batch,
    losses_of,
    numbers_of,
    shares_of,
    token_numbers,
)
from pipeline.training.run.replicas import Replicas, divide

if TYPE_CHECKING:
    import torch

T = TypeVar("T")

Report = Callable[[int, int], None]
"""Takes examples and tokens done."""


@dataclass(frozen=True)
class Row:
    """An example's loss, and the whole step's loss by the log-probs of its replies."""

    loss: float
    slopes: tuple[float, ...]


@dataclass(frozen=True)
class StepResult:
    """What a step's examples came to, process by process, and what the loss knew of them all."""

    seen: list[Numbers]
    statistics: Mapping[str, float]


@dataclass(frozen=True)
class Work:
    """A step as it is given to this process.

    Attributes:
        examples: of the whole step.
        number: the step's; None for an evaluation.
        mine: which examples this process computes.
        before: the statistics of the step before, for a running mean; an evaluation's KL term.
    """

    examples: Sequence[Example]
    number: int | None
    mine: Sequence[int]
    before: Mapping[str, float]


def run_step(
    replicas: Replicas,
    work: Work,
    objective: ObjectiveConfig,
    most_tokens: int,
    report: Report,
    *,
    gather: Callable[[list[Any]], list[Any]] = list,
    scale: Callable[["torch.Tensor"], "torch.Tensor"] = lambda loss: loss,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    token_statistics: bool = False,
    train: bool = True,
) -> StepResult:
    """Losses of a step's examples, and (in training) their mean's gradient.

    The loss of a step is the mean over its rows, each times its example's weight; a pair is two
    rows, a label one. What depends on the whole step is found first, without a gradient, so that
    nothing depends on how the step is cut.

    Args:
        replicas: the model.
        work: the step.
        objective: the loss and its values.
        most_tokens: about how many go through a copy of the model at once.
        report: told of every part.
        gather: this process's numbers to those of all, in the order of processes.
        scale: what the loss is multiplied by before its gradient is taken (float16).
        autocast: what the model's forward pass runs in (half precision); the way back does not.
        token_statistics: whether entropy and token accuracy are computed too, which costs a pass
            over the logits.
        train: whether gradients are wanted.

    Raises:
        TrainingError: the loss needs mismatched replies and the step has none.
    """
    import torch

    spec, values = objective.spec, objective.values
    mine = [work.examples[i] for i in work.mine]
    shares_of_all = shares_of(work.examples)
    shares = [shares_of_all[i] for i in work.mine]
    step = _Step(replicas, mine, most_tokens, report, gather, autocast)
    statistics: dict[str, float] = {}
    if spec.needs_kl and train:
        statistics["kl"] = _kl(step, work.number, spec)
    elif spec.needs_kl:
        statistics["kl"] = work.before["kl"]
    rows: list[Row] = []
    if spec.needs_batch:
        known, found = _look_ahead(step, work, objective)
        statistics |= known
        rows = [found[i] for i in work.mine]

    def compute(forward: Forward, part: Part) -> list[Numbers]:
        examples = [mine[i] for i in part.members]
        sides, told = step.scored(
            forward, [example.group for example in examples], token_statistics
        )
        counted: list[torch.Tensor] = []
        if rows:
            losses = [rows[i].loss for i in part.members]
            # Its gradient is the slopes'; its value means nothing.
            slopes = [slope for i in part.members for slope in rows[i].slopes]
            counted = [side for sides_of in sides for side in sides_of]
        else:
            counted = losses_of(spec, values, statistics, examples, sides)
            losses = [term.item() for term in counted]
            slopes = [shares[i] for i in part.members]
        # Beside what counts for nothing, so that there is one way back for all.
        counted += [step.idle(forward) for _ in range(part.n_idle)]
        slopes += [1.0] * part.n_idle
        if train:
            share = (torch.stack(counted) * counted[0].new_tensor(slopes)).sum()
            torch.autograd.backward(scale(share.to(replicas.model.device)))
        report(len(examples), sum(example.n_tokens for example in examples))
        return [
            numbers_of(objective, example, loss, [side.detach() for side in sides_of])
            | token_numbers(example, extras)
            for example, loss, sides_of, extras in zip(examples, losses, sides, told, strict=True)
        ]

    with torch.set_grad_enabled(train):
        done = step.parted(compute, [example.group for example in mine])
    if train:
        replicas.gather_gradients()
    return StepResult(gather(done), statistics)


@dataclass(frozen=True)
class Part:
    """What goes through the model at once.

    Attributes:
        members: numbers of examples (or of other groups); none where others have more parts.
        n_idle: passes beside theirs, while processes that share one model make theirs.
    """

    members: list[int]
    n_idle: int = 0


@dataclass(frozen=True)
class _Step:
    """What every pass over a step's examples needs."""

    replicas: Replicas
    mine: Sequence[Example]
    most_tokens: int
    report: Report
    gather: Callable[[list[Any]], list[Any]]
    autocast: Callable[[], AbstractContextManager[Any]]

    def parted(
        self, compute: Callable[[Forward, Part], list[T]], groups: Sequence[Group]
    ) -> list[T]:
        """`compute` on parts of the groups; results in the groups' order."""
        if self.replicas.packs_examples:
            costs = [_unique_tokens(group) for group in groups]
            parts = divide(costs, self.most_tokens, len(self.replicas.forwards))
        else:
            parts = [[i] for i in range(len(groups))]
        padded = self._padded(parts, groups)
        found: dict[int, T] = {}
        for part, results in zip(padded, self.replicas.each(compute, padded), strict=True):
            found |= dict(zip(part.members, results, strict=True))
        return [found[i] for i in range(len(groups))]

    def _padded(self, parts: list[list[int]], groups: Sequence[Group]) -> list[Part]:
        """The parts, with as many passes as the process with most has, if they share a model."""
        if not self.replicas.sharded:
            return [Part(members) for members in parts]
        forward = self.replicas.forwards[0]
        own = [
            sum(forward.n_passes(one) for one in _passes(self.replicas, [groups[i] for i in part]))
            for part in parts
        ]
        most = [max(counts) for counts in zip_longest(*self.gather([own]), fillvalue=0)]
        return [
            Part(members or [], n - (has or 0)) for members, has, n in zip_longest(parts, own, most)
        ]

    def without_gradient(self, groups: Sequence[Group]) -> list[list[float]]:
        """Log-probs of the groups' sequences, nats."""
        import torch

        def compute(forward: Forward, part: Part) -> list[list[float]]:
            members = [groups[i] for i in part.members]
            found, _ = self.scored(forward, members)
            for _ in range(part.n_idle):
                self.idle(forward)
            self.report(0, sum(group.n_tokens for group in members))
            return [[row.item() for row in rows] for rows in found]

        with torch.no_grad():
            return self.parted(compute, groups)

    def scored(
        self, forward: Forward, groups: Sequence[Group], token_statistics: bool = False
    ) -> "tuple[list[list[torch.Tensor]], list[list[Mapping[str, torch.Tensor]]]]":
        """Sequence log-probs by group and completion, and what else is known of their tokens.

        The log-probs are float64 scalars of exactly the ledger's values. They are on the CPU, as
        is all that follows, for every number read from a GPU would be waited for.
        """
        extras = TOKEN_STATISTICS if token_statistics else ()
        with self.autocast():
            found = [
                row
                for together in _passes(self.replicas, groups)
                for of_group in forward.scores(together, extras)
                for row in of_group
            ]
            flat = iter(_on_cpu(found))
        scores = [[next(flat) for _ in group.completions] for group in groups]
        return (
            [[_total(row.logprobs) for row in rows] for rows in scores],
            [[row.extras for row in rows] for rows in scores],
        )

    def idle(self, forward: Forward) -> "torch.Tensor":
        """`Forward.idle` as `scored` would give it."""
        with self.autocast():
            return forward.idle().double().to("cpu")


def _kl(step: _Step, number: int | None, spec: LossSpec) -> float:
    """The mean log-ratio of the step's mismatched replies, nats, at least 0.

    arXiv 2402.01306, section 4.1.
    """
    replies = [example.mismatched_in(number) for example in step.mine]
    groups = [
        Group(example.prompt_ids, tuple(reply.completion for reply in of_example))
        for example, of_example in zip(step.mine, replies, strict=True)
        if of_example
    ]
    references = [reply.reference for of_example in replies for reply in of_example]
    logprobs = [logprob for rows in step.without_gradient(groups) for logprob in rows]
    ratios = step.gather([p - q for p, q in zip(logprobs, references, strict=True)])
    if not ratios:
        raise TrainingError(f"step {number}: {spec.name} needs mismatched replies, and has none")
    # In this order, so that NaN stays NaN and is refused.
    return max(math.fsum(ratios) / len(ratios), 0.0)


def _look_ahead(
    step: _Step, work: Work, objective: ObjectiveConfig
) -> tuple[Mapping[str, float], list[Row]]:
    """What the loss knows of the whole step, and every example's loss and slopes in it.

    Of log-probs without a gradient; the pass that follows hands the slopes on to the weights.
    """
    import torch

    spec, values = objective.spec, objective.values
    found = step.without_gradient([example.group for example in step.mine])
    everyones = dict(step.gather(list(zip(work.mine, found, strict=True))))
    sides = [
        [torch.tensor(value, dtype=torch.float64) for value in everyones[i]]
        for i in range(len(work.examples))
    ]
    known: Mapping[str, float] = {}
    if spec.statistic is not None:
        known = spec.statistic(class_batch(work.examples, sides), values, work.before)
    leaves = [side.requires_grad_() for sides_of in sides for side in sides_of]
    with torch.enable_grad():
        losses = losses_of(spec, values, known, work.examples, sides)
        shares = torch.tensor(shares_of(work.examples), dtype=torch.float64)
        whole = (torch.stack(losses) * shares).sum()
    slopes = iter(torch.autograd.grad(whole, leaves, allow_unused=True, materialize_grads=True))
    return known, [
        Row(loss.item(), tuple(next(slopes).item() for _ in sides_of))
        for loss, sides_of in zip(losses, sides, strict=True)
    ]


def _unique_tokens(group: Group) -> int:
    return len(group.prompt_ids) + sum(len(reply.ids) for reply in group.completions)


def _on_cpu(scores: list[TargetScores]) -> list[TargetScores]:
    """The same, differentiable as before, copied from a GPU in one piece."""
    if not scores or scores[0].logprobs.device.type == "cpu":
        return scores
    return joined(scores).to("cpu").split([len(row.logprobs) for row in scores])


def _passes(replicas: Replicas, groups: Sequence[Group]) -> list[list[Group]]:
    """What of a part is asked of the model together.

    Where it matters to the bits, that is what the engine puts together: the same shapes give the
    same bits at step 0.
    """
    if replicas.packs_examples:
        return [list(groups)] if groups else []
    passes = []
    for group in groups:
        one_pass = len({c.pass_id or c.sequence_id for c in group.completions}) == 1
        together = [group.completions] if one_pass else [(c,) for c in group.completions]
        passes += [[Group(group.prompt_ids, members)] for members in together]
    return passes


def _total(row: "torch.Tensor") -> "torch.Tensor":
    total = row.double().sum()
    exact = sequence_sum(row.detach().numpy())
    return total + (exact - total.detach())  # torch adds in another order
