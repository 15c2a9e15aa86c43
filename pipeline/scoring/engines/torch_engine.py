"""The torch engine: transformers' own modules, on whatever device torch finds.

Where the model shares prompts (`forward`), groups go through it in packs without padding, those
with the longest common beginnings together. On a CPU every core works on packs of its own: its
matrix products then wait for nobody, and there is one copy of the model.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.metadata import version
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from pipeline.models import (
    Checkpoint,
    context_length,
    device_class,
    load_model,
    quantisation,
    vocabulary_size,
)
from pipeline.plan import Extra, ModelConfig
from pipeline.scoring.engines.base import (
    Group,
    Limits,
    Numerics,
    Sharing,
    TokenScores,
    major_minor,
    require_scorable,
)
from pipeline.scoring.engines.batches import Row, groups_in, packs, padded, passes
from pipeline.scoring.engines.forward import Forward

if TYPE_CHECKING:
    import torch

    from pipeline.scoring.engines.forward.head import TargetScores

_Found = TypeVar("_Found")
_Result = TypeVar("_Result")


def torch_device() -> "torch.device":
    """The device the engine and the trainer use."""
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def found_device_class() -> str:
    """The device's class, without loading torch where its version tells that it is a CPU build.

    So that planning a run whose numbers are there already stays free of it.
    """
    return "cpu" if version("torch").endswith("+cpu") else device_class(torch_device())


def limits_of(checkpoint: Checkpoint) -> Limits:
    """What rows the checkpoint can take."""
    return Limits(vocabulary_size(checkpoint), context_length(checkpoint))


def torch_numerics(config: ModelConfig, checkpoint: Checkpoint) -> Numerics:
    """What this engine's numbers will depend on, without loading the model.

    Whether prompts are shared is not part of it: a model shares them only if it was found to give
    the same numbers within rounding. It is on record with the scorer.
    """
    return Numerics(
        engine="torch",
        engine_version=major_minor("torch"),
        modeling_version=f"transformers {major_minor('transformers')}",
        runner="tree",
        body_dtype=config.dtype,
        head_dtype=config.dtype,
        cache_dtype="none",
        attention_backend=config.attention,
        quantisation=quantisation(checkpoint),
        prefix_reuse="none",
        tensor_parallel=1,
        pipeline_parallel=1,
        batch_invariant=False,
        device_class=found_device_class(),
        adapter_mode="none" if checkpoint.adapter is None else "applied",
    )


class TorchEngine:
    """Holds a loaded model; see `pipeline.scoring.engines.base.Engine`.

    Raises:
        ModelError: the checkpoint cannot be loaded.
    """

    def __init__(self, config: ModelConfig, checkpoint: Checkpoint, longest: int = 0) -> None:
        import torch

        # Nothing is allocated for the longest sequence in advance.
        self._limits = limits_of(checkpoint)
        torch.set_float32_matmul_precision("highest")
        device = torch_device()
        on_cpu = device.type == "cpu"
        self._forward = Forward(
            load_model(
                checkpoint, dtype=config.dtype, attention=config.attention, device=str(device)
            )
        )
        # Half a CPU's bits must be the whole's, and a tree's those of its parts, or step 0 of
        # training would not be exactly 0; a GPU makes no such promise.
        self._packs = self.sharing.shared and (self.sharing.exact or not on_cpu)
        self._pads = not self.sharing.shared and not on_cpu
        self._n_threads = torch.get_num_threads() if on_cpu else 1
        self._threads = ThreadPoolExecutor(self._n_threads)

    @property
    def sharing(self) -> Sharing:
        """Whether this model shares prompts; see `Engine.sharing`."""
        return self._forward.sharing

    def score(self, groups: Sequence[Group], batch_tokens: int) -> list[list[np.ndarray]]:
        """Log-probs per group and completion; see `Engine.score`."""
        forward = self._forward
        return self._in_batches(groups, batch_tokens, forward.logprobs, forward.padded, _array)

    def score_with_extras(
        self, groups: Sequence[Group], batch_tokens: int, extras: Sequence[Extra]
    ) -> list[list[TokenScores]]:
        """The same log-probs, and the extras; see `EngineWithExtras.score_with_extras`."""
        together, apart = (
            partial(way, extras=extras)
            for way in (self._forward.scores, self._forward.padded_scores)
        )
        return self._in_batches(groups, batch_tokens, together, apart, _arrays)

    def _in_batches(
        self,
        groups: Sequence[Group],
        batch_tokens: int,
        compute: Callable[[Sequence[Group]], list[list[_Found]]],
        compute_padded: Callable[[Sequence[Group]], list[list[_Found]]],
        result: Callable[[_Found], _Result],
    ) -> list[list[_Result]]:
        """What the model says of each completion, whatever goes through it at once."""
        import torch

        require_scorable(groups, self._limits)
        at_once = 1
        if batch_tokens and self._packs:
            batches = packs(groups, batch_tokens, self._n_threads)
            at_once = self._n_threads
        elif batch_tokens and self._pads:
            batches, compute = padded(groups, batch_tokens), compute_padded
        else:
            batches = passes(groups)

        def scored(batch: list[Row]) -> list[_Result]:
            with torch.inference_mode():  # of this thread alone
                found = compute(groups_in(groups, batch))
                return [result(row) for group in found for row in group]

        scores = {
            row: values
            for batch, of_batch in zip(batches, self._each(scored, batches, at_once), strict=True)
            for row, values in zip(batch, of_batch, strict=True)
        }
        return [
            [scores[g, c] for c in range(len(group.completions))] for g, group in enumerate(groups)
        ]

    def _each(
        self,
        scored: Callable[[list[Row]], list[_Result]],
        batches: list[list[Row]],
        at_once: int,
    ) -> Iterator[list[_Result]]:
        """Batches one after another over all cores, or side by side, the cores divided."""
        import torch

        at_once = min(at_once, len(batches))
        if at_once == 1:
            yield from map(scored, batches)
            return
        n_each = self._n_threads // at_once

        def alone(batch: list[Row]) -> list[_Result]:
            torch.set_num_threads(n_each)  # of this thread, and of those that begin after it
            return scored(batch)

        try:
            yield from self._threads.map(alone, batches)
        finally:
            torch.set_num_threads(self._n_threads)

    def close(self) -> None:
        """Drop the model; a CUDA device's memory is returned to it."""
        import torch

        self._threads.shutdown()
        del self._forward
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _array(values: "torch.Tensor") -> np.ndarray:
    array: np.ndarray = values.cpu().numpy()
    return array


def _arrays(scores: "TargetScores") -> TokenScores:
    extras = {name: _array(values) for name, values in scores.extras.items()}
    return TokenScores(_array(scores.logprobs), extras)  # type: ignore[arg-type]
