"""A step's work on several threads, each with gradients of its own.

On a CPU every core works on examples of its own, with torch on one thread: its matrix products then
wait for nobody. There is one set of weights: the copies of the model's modules share them, and
only the gradients are apart until the step's end, when they are added in the copies' order.
"""

import copy
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

from pipeline.scoring.engines.forward import Forward, Within
from pipeline.scoring.engines.forward.vocabulary import keep_gradients

if TYPE_CHECKING:
    import torch

_P = TypeVar("_P")
_T = TypeVar("_T")

_MOST = 4
"""Copies: each holds gradients of all that is trained. More cores are divided among them."""


class Replicas:
    """The model in training, once for each thread.

    Args:
        model: a model of transformers, or a PEFT model over one, in evaluation mode.
        n: threads; None for as many as pay: one where not the same bits come out whatever else is
            in a batch, or on a device that is not a CPU.
        within: what a pass over a sharded model is made within, of which there is one; None for a
            model that is whole.
    """

    def __init__(self, model: Any, n: int | None = None, within: Within | None = None) -> None:
        import torch

        self.model = model
        self.sharded = within is not None
        forward = Forward(model, within)
        self._n_cores = torch.get_num_threads()
        on_cpu = model.device.type == "cpu"
        if self.sharded:
            n = 1
        elif n is None:
            n = min(self._n_cores, _MOST) if on_cpu and forward.sharing.exact else 1
        self.forwards = [forward, *(forward.over(_twin(model)) for _ in range(n - 1))]
        if on_cpu and not self.sharded:
            for each in self.forwards:
                keep_gradients(each.model)
        self._parameters = [
            [p for p in f.model.parameters() if p.requires_grad] for f in self.forwards
        ]
        self._threads = ThreadPoolExecutor(n) if n > 1 else None

    @property
    def parameters(self) -> "list[torch.nn.Parameter]":
        """What is trained; `gather_gradients` leaves the sum of all gradients here."""
        return self._parameters[0]

    @property
    def packs_examples(self) -> bool:
        """Whether examples may go through the model together without another bit."""
        sharing = self.forwards[0].sharing
        return sharing.shared and (sharing.exact or self.model.device.type != "cpu")

    def each(self, work: Callable[[Forward, _P], _T], parts: Sequence[_P]) -> list[_T]:
        """`work` on every part; part i on copy i modulo their number, in order."""
        import torch

        if self._threads is None:
            return [work(self.forwards[0], part) for part in parts]
        n = len(self.forwards)
        grad = torch.is_grad_enabled()

        def of_copy(which: int) -> list[_T]:
            torch.set_num_threads(max(1, self._n_cores // n))  # of this thread alone
            with torch.set_grad_enabled(grad):
                return [work(self.forwards[which], part) for part in parts[which::n]]

        try:
            done = list(self._threads.map(of_copy, range(min(n, len(parts)))))
        finally:
            torch.set_num_threads(self._n_cores)
        return [done[i % n][i // n] for i in range(len(parts))]

    def gather_gradients(self) -> None:
        """Add the copies' gradients to the first's, in their order."""
        for i, parameter in enumerate(self._parameters[0]):
            for others in self._parameters[1:]:
                gradient, others[i].grad = others[i].grad, None
                if gradient is None:
                    continue
                if parameter.grad is None:
                    parameter.grad = gradient
                else:
                    parameter.grad += gradient

    def __enter__(self) -> "Replicas":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._threads is not None:
            self._threads.shutdown()


def divide(costs: Sequence[int], most: int, n_threads: int) -> list[list[int]]:
    """Numbers of examples in parts of about `most` tokens and about the same size.

    The same for every part's content, whatever thread is faster; the longest example first, into
    the part that has least.
    """
    total = sum(costs)
    rounds = max(1, round(total / (most * n_threads)))
    n = min(rounds * n_threads, len(costs))
    parts: list[list[int]] = [[] for _ in range(n)]
    loads = [0] * n
    for i in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        least = min(range(n), key=lambda part: loads[part])
        parts[least].append(i)
        loads[least] += costs[i]
    return parts


def _twin(model: Any) -> Any:
    """A copy of the modules over the same weights, with gradients of its own."""
    import torch

    shared: dict[int, Any] = {
        id(p): torch.nn.Parameter(p.detach(), requires_grad=p.requires_grad)
        for p in model.parameters()
    }
    shared |= {id(b): b for b in model.buffers()}
    return copy.deepcopy(model, shared)
