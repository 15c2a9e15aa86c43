"""The one forward pass that scoring and training share, so that step 0 can be exactly 0."""

import inspect
from typing import TYPE_CHECKING

import numpy as np

from pipeline.scoring.engines.base import Completion

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

_FULL_ATTENTION = ("llama", "mistral", "qwen2", "qwen3")
"""Architectures known to take a mask and positions as they are given: every layer attends to all
that the mask lets it, and nothing else carries a token's influence."""


def pass_logprobs(
    model: "PreTrainedModel", prompt_ids: np.ndarray, completions: "list[Completion]"
) -> "list[torch.Tensor]":
    """Log-probs of one prompt's completions: in one pass where the model can, else one by one.

    Equal arguments make equal shapes, so equal bits: the order of the completions does not count.

    Args:
        model: a causal language model of transformers, or a PEFT model over one.
        prompt_ids: token ids [P], at least one.
        completions: what to score under it.

    Returns:
        In the order of `completions`, the log-probs of their scored tokens: float32 [n], nats.
    """
    if len(completions) == 1 or not shares_prompts(model):
        return [token_logprobs(model, [prompt_ids], [c.ids], [c.scored])[0] for c in completions]
    order = sorted(range(len(completions)), key=lambda i: completions[i].sequence_id)
    logprobs = _shared(model, prompt_ids, [completions[i] for i in order])
    return [logprobs[order.index(i)] for i in range(len(completions))]


def shares_prompts(model: "PreTrainedModel") -> bool:
    """Whether several completions can follow one prompt in one row of this model."""
    config = model.config
    layers = getattr(config, "layer_types", None) or ["full_attention"]
    window = getattr(config, "sliding_window", None)
    slides = window is not None and getattr(config, "use_sliding_window", True)
    full = set(layers) == {"full_attention"} and not slides
    return config.model_type in _FULL_ATTENTION and full


def token_logprobs(
    model: "PreTrainedModel",
    prompts: list[np.ndarray],
    completions: list[np.ndarray],
    positions: list[np.ndarray],
) -> "list[torch.Tensor]":
    """Log-probs of chosen positions of completions, differentiable: float32 [n] each, nats.

    Rows are padded on the right and need no mask: in a causal model nothing looks ahead. The head
    runs on completion positions only.

    Args:
        model: a causal language model of transformers, or a PEFT model over one.
        prompts: token ids [P_i], at least one each.
        completions: token ids [C_i].
        positions: which completion tokens count, [n_i] each.
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
        result.append(_logprobs(logits[i, at], inputs[i, at + first + 1]))
    return result


def _shared(
    model: "PreTrainedModel", prompt_ids: np.ndarray, completions: "list[Completion]"
) -> "list[torch.Tensor]":
    """One row: the prompt, then every completion, each seeing the prompt and itself only."""
    import torch

    n_prompt, lengths = len(prompt_ids), [len(c.ids) for c in completions]
    starts = [n_prompt + sum(lengths[:k]) for k in range(len(lengths))]
    row = np.concatenate([prompt_ids, *(c.ids for c in completions)]).astype(np.int64)
    ids = torch.from_numpy(row)[None]
    positions = torch.cat(
        [torch.arange(n_prompt), *(torch.arange(n_prompt, n_prompt + n) for n in lengths)]
    )[None]
    seen = torch.ones((len(row), len(row)), dtype=torch.bool).tril()
    for start, n in zip(starts, lengths, strict=True):
        seen[start : start + n, n_prompt:start] = False
    # Added to the scores; a boolean mask would mean something else to eager attention.
    mask = torch.zeros(seen.shape, dtype=model.dtype)
    mask = mask.masked_fill(~seen, torch.finfo(model.dtype).min)[None, None]
    # A completion's first token is predicted from the prompt's last one.
    before = [
        np.where(c.scored == 0, n_prompt - 1, c.scored + start - 1)
        for c, start in zip(completions, starts, strict=True)
    ]
    device = model.device
    logits = model(
        input_ids=ids.to(device),
        position_ids=positions.to(device),
        attention_mask=mask.to(device),
        logits_to_keep=torch.from_numpy(np.concatenate(before)).to(device),
        use_cache=False,
    ).logits[0]
    split = logits.split([len(where) for where in before])
    return [
        _logprobs(part, torch.from_numpy(c.ids[c.scored].astype(np.int64)).to(device))
        for part, c in zip(split, completions, strict=True)
    ]


def _logprobs(logits: "torch.Tensor", targets: "torch.Tensor") -> "torch.Tensor":
    """Log-probs of targets [n] under logits [n, vocabulary]: float32 [n], nats.

    Logit minus logsumexp: torch's float32 log_softmax over a large vocabulary is itself off by up
    to 3e-3 nats per sequence.
    """
    import torch

    scored = logits.float()
    chosen = scored.gather(1, targets[:, None])[:, 0]
    return chosen - torch.logsumexp(scored, dim=1)


def _keeps_logits(model: "PreTrainedModel") -> bool:
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return "logits_to_keep" in inspect.signature(inner.forward).parameters
