"""What vLLM is asked for a sequence, and how its answer is read and doubted.

Two ways lead to the log-probs of a completion. `exact_ids` (0.32 and later on the V2 runner) names
the ids it wants scored and from which row on. `flat` asks for the log-probs of the whole prompt,
of which the completion is the end. Both can reuse a prompt that an earlier completion left in the
prefix cache; a hit that goes past the prompt takes rows of the completion with it, and such a
sequence is asked for again without the cache.
"""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from pipeline.errors import ScoringError

Path = Literal["exact_ids", "flat"]

REQUIRED = {
    "flat": {"prompt_logprobs", "flat_logprobs", "skip_reading_prefix_cache", "detokenize"},
    "exact_ids": {
        *("prompt_logprob_token_ids", "prompt_logprob_start"),
        *("skip_reading_prefix_cache", "detokenize"),
    },
}
"""Fields of `SamplingParams` each way needs."""


@dataclass(frozen=True)
class Row:
    """A sequence as vLLM takes it: plain lists of Python integers.

    A tuple or an array in their place makes an engine in this process hang at the next call.
    """

    sequence_id: str
    prompt: list[int]
    completion: list[int]

    @property
    def ids(self) -> list[int]:
        """Prompt and completion: to vLLM all of it is a prompt."""
        return self.prompt + self.completion


def sampling_fields(row: Row, path: Path, *, reuse: bool) -> dict[str, Any]:
    """Arguments of `SamplingParams`; one token is sampled, since none cannot be asked for."""
    fields: dict[str, Any] = {
        "max_tokens": 1,
        "temperature": 0.0,
        "detokenize": False,
        "skip_reading_prefix_cache": not reuse,
    }
    if path == "flat":
        return {**fields, "prompt_logprobs": 0, "flat_logprobs": True}
    return {
        **fields,
        "prompt_logprob_token_ids": np.asarray(row.completion, np.int64)[:, None],
        "prompt_logprob_start": len(row.prompt) - 1,
    }


def read_answer(output: Any, row: Row, path: Path) -> np.ndarray | None:
    """The log-probs of the completion's tokens, float32 [n], nats; None if the cache took some.

    Args:
        output: vLLM's `RequestOutput`.
        row: what was asked for.
        path: how it was asked for.

    Raises:
        ScoringError: the answer is another row's, or does not have the shape it must have.
    """
    if list(output.prompt_token_ids) != row.ids:
        raise ScoringError(f"sequence {row.sequence_id}: vLLM answered for other token ids")
    # The row that predicts the first token of the completion is the last one of the prompt.
    if (output.num_cached_tokens or 0) > len(row.prompt) - 1:
        return None
    if path == "exact_ids":
        return _read_exact(output.prompt_token_id_logprobs, row)
    return _read_flat(output.prompt_logprobs, row)


def _read_exact(scores: np.ndarray | None, row: Row) -> np.ndarray | None:
    if scores is None:  # dropped, since the prefill began past the first row asked for
        return None
    if scores.shape != (len(row.completion), 1):
        raise ScoringError(
            f"sequence {row.sequence_id}: vLLM gave log-probs {list(scores.shape)} for "
            f"{len(row.completion)} tokens"
        )
    return np.asarray(scores[:, 0], dtype=np.float32)


def _read_flat(flat: Any, row: Row) -> np.ndarray:
    """Right-aligned: after a hit the V2 runner leaves the first rows out, V1 has junk there."""
    n = len(row.completion)
    ids = getattr(flat, "token_ids", [])[-n:]
    logprobs = getattr(flat, "logprobs", [])[-n:]
    if list(ids) != row.completion or len(logprobs) != n:
        raise ScoringError(f"sequence {row.sequence_id}: vLLM's log-probs are of other tokens")
    return np.asarray(logprobs, dtype=np.float32)
