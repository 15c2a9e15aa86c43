"""The torch engine: transformers' own forward pass, on whatever device torch finds."""

from collections.abc import Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING

import numpy as np

from pipeline.models import (
    Checkpoint,
    context_length,
    device_class,
    load_model,
    quantisation,
    vocabulary_size,
)
from pipeline.plan import ModelConfig
from pipeline.scoring.engines.base import (
    Group,
    Limits,
    Numerics,
    major_minor,
    require_scorable,
)
from pipeline.scoring.engines.forward import pass_logprobs, token_logprobs

if TYPE_CHECKING:
    import torch


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
    """What this engine's numbers will depend on, without loading the model."""
    return Numerics(
        engine="torch",
        engine_version=major_minor("torch"),
        modeling_version=f"transformers {major_minor('transformers')}",
        runner="forward",
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
        self._model = load_model(
            checkpoint,
            dtype=config.dtype,
            attention=config.attention,
            device=str(torch_device()),
        )

    def score(self, groups: Sequence[Group], batch_tokens: int) -> list[list[np.ndarray]]:
        """Log-probs per group and completion; see `Engine.score`."""
        import torch

        require_scorable(groups, self._limits)
        with torch.inference_mode():
            if not batch_tokens:
                return [self._passes(group) for group in groups]
            return self._padded(groups, batch_tokens)

    def _passes(self, group: Group) -> list[np.ndarray]:
        """A group in its own passes."""
        passes: dict[str, list[int]] = {}
        for i, completion in enumerate(group.completions):
            passes.setdefault(completion.pass_id or completion.sequence_id, []).append(i)
        scores: dict[int, np.ndarray] = {}
        for members in passes.values():
            together = [group.completions[i] for i in members]
            logprobs = pass_logprobs(self._model, group.prompt_ids, together)
            scores |= {i: row.cpu().numpy() for i, row in zip(members, logprobs, strict=True)}
        return [scores[i] for i in range(len(group.completions))]

    def _padded(self, groups: Sequence[Group], batch_tokens: int) -> list[list[np.ndarray]]:
        """All completions in padded batches, each with its own copy of the prompt."""
        rows = [(group.prompt_ids, c) for group in groups for c in group.completions]
        scores: dict[int, np.ndarray] = {}
        for batch in _batches([len(p) + len(c.ids) for p, c in rows], batch_tokens):
            logprobs = token_logprobs(
                self._model,
                [rows[i][0] for i in batch],
                [rows[i][1].ids for i in batch],
                [rows[i][1].scored for i in batch],
            )
            for i, values in zip(batch, logprobs, strict=True):
                scores[i] = values.cpu().numpy()
        flat = iter(scores[i] for i in range(len(rows)))
        return [[next(flat) for _ in group.completions] for group in groups]

    def close(self) -> None:
        """Drop the model; a CUDA device's memory is returned to it."""
        import torch

        del self._model
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _batches(lengths: list[int], batch_tokens: int) -> list[list[int]]:
    """Indices in batches of at most `batch_tokens` padded tokens, the longest rows first."""
    batches: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        fits = batches and lengths[batches[-1][0]] * (len(batches[-1]) + 1) <= batch_tokens
        if fits:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches
