"""The plain way: transformers' own forward pass over rows that repeat their prompts."""

import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from pipeline.scoring.engines.forward.head import TargetScores, extras_of

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


def token_scores(
    model: "PreTrainedModel",
    prompts: list[np.ndarray],
    completions: list[np.ndarray],
    positions: list[np.ndarray],
    extras: Sequence[str] = (),
) -> list[TargetScores]:
    """Log-probs of chosen positions of completions, differentiable, each with its extras.

    Rows are padded on the right and need no mask: in a causal model nothing looks ahead. The head
    runs on completion positions only.

    Args:
        model: a causal language model of transformers, or a PEFT model over one.
        prompts: token ids [P_i], at least one each.
        completions: token ids [C_i].
        positions: which completion tokens count, [n_i] each.
        extras: some of `head.EXTRAS`.
    """
    import torch

    rows = [np.concatenate(pair) for pair in zip(prompts, completions, strict=True)]
    length = max(len(row) for row in rows)
    # The last token is never conditioned on, but stays, so that lengths are those of the tables.
    ids = torch.zeros((len(rows), length), dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.from_numpy(row.astype(np.int64))
    first = min(len(prompt) for prompt in prompts) - 1
    device = model.device
    inputs = ids.to(device)
    if _keeps_logits(model):
        kept = torch.arange(first, length - 1, device=device)
        logits = model(input_ids=inputs, logits_to_keep=kept, use_cache=False).logits
    else:
        logits = model(input_ids=inputs, use_cache=False).logits[:, first : length - 1]
    result = []
    for i, (prompt, where) in enumerate(zip(prompts, positions, strict=True)):
        # The token at prompt + p is predicted one position earlier.
        at = torch.from_numpy(where + len(prompt) - 1 - first).to(device)
        result.append(_scores(logits[i, at], inputs[i, at + first + 1], extras))
    return result


def _scores(logits: "torch.Tensor", targets: "torch.Tensor", extras: Sequence[str]) -> TargetScores:
    """Of targets [n] under logits [n, vocabulary].

    Logit minus log-sum-exp: torch's float32 log_softmax over a large vocabulary is itself off by up
    to 3e-3 nats per sequence.
    """
    import torch

    scored = logits.float()
    chosen = scored.gather(1, targets[:, None])[:, 0]
    total = torch.logsumexp(scored, dim=1)
    with torch.no_grad():
        found = extras_of(scored, chosen, total, extras) if extras else {}
    return TargetScores(chosen - total, found)


def _keeps_logits(model: "PreTrainedModel") -> bool:
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return "logits_to_keep" in inspect.signature(inner.forward).parameters
