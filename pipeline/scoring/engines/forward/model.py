"""How a loaded model computes log-probs: with shared prompts where it can, and found out if it can.

No architecture is known by name. At loading, a few made-up sequences go both ways, over a tree of
token runs and plainly through transformers' own eager attention; if the two differ by more than
rounding does, or one of them fails, the model goes the plain way and the reason is kept.
"""

import copy
import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.scoring.engines.base import Completion, Group, Sharing
from pipeline.scoring.engines.forward.attention import (
    IMPLEMENTATIONS,
    Layout,
    NotShared,
    attending,
    layout_of,
    register,
)
from pipeline.scoring.engines.forward.head import TargetScores, head_of, target_scores
from pipeline.scoring.engines.forward.plain import token_scores
from pipeline.scoring.engines.forward.tree import grow

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

FEWEST_ROWS = 32
"""Tokens of the smallest row: smaller matrix products, cut over threads, give other bits."""

_TOLERANCE = 1e-3
"""Nats per token in float32, the largest difference of the two ways that is rounding."""
_HALF_TOLERANCE = 0.1
"""Nats per token in half precision, the mean: a single token may be off by more."""
_log = logging.getLogger(__name__)

Within = Callable[[Callable[[], Any]], Any]
"""Calls what it is given while a sharded model's weights are all there; returns what it returns."""


class Forward:
    """A model with the way found for it.

    Args:
        model: a causal language model of transformers, or a PEFT model over one, in evaluation mode
            and loaded with the attention it is to have (`sdpa` or `eager`).
        within: what a pass that is not a call of the model is made in; None for nothing.
    """

    def __init__(self, model: "PreTrainedModel", within: Within | None = None) -> None:
        self.model = model
        self._within = within
        self._inner: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
        self._attention: str = self._inner.config._attn_implementation
        # A model that another `Forward` has left with one of ours.
        plain = {ours: name for name, ours in IMPLEMENTATIONS.items()}
        self._plain_attention = plain.get(self._attention, self._attention)
        self._longest = _longest_shared(self._inner.config.get_text_config())
        self.sharing = self._find_out()
        if not self.sharing.shared:
            name = type(self._inner).__name__
            _log.warning("%s does not share prompts: %s", name, self.sharing.reason)

    def over(self, model: "PreTrainedModel") -> "Forward":
        """The same way over a copy of the model, without finding it out anew."""
        other = copy.copy(self)
        other.model = model
        other._inner = model.get_base_model() if hasattr(model, "get_base_model") else model
        return other

    def logprobs(self, groups: Sequence[Group]) -> "list[list[torch.Tensor]]":
        """Log-probs of scored tokens by group and completion, differentiable: float32 [n], nats.

        In one pass over all of them where the model shares prompts, else a pass for each sequence.
        Equal groups in any order make equal passes, so equal bits.
        """
        return _logprobs(self.scores(groups))

    def scores(
        self, groups: Sequence[Group], extras: Sequence[str] = ()
    ) -> list[list[TargetScores]]:
        """The same with `extras`, some of `head.EXTRAS`, which have no gradient."""
        if self._shares(groups):
            self._set_attention(IMPLEMENTATIONS[self._plain_attention])
            return self._tree(groups, extras)
        self._set_attention(self._plain_attention)
        return self._plain(groups, extras)

    def n_passes(self, groups: Sequence[Group]) -> int:
        """How often `scores` goes through the model for these."""
        return 1 if self._shares(groups) else sum(len(group.completions) for group in groups)

    def idle(self) -> "torch.Tensor":
        """A pass that counts for nothing: a scalar 0, with gradients of 0."""
        scores = self.scores([_IDLE])
        return scores[0][0].logprobs.sum() * 0.0

    def _shares(self, groups: Sequence[Group]) -> bool:
        return self.sharing.shared and (
            self._longest is None or _longest_sequence(groups) <= self._longest
        )

    def padded(self, groups: Sequence[Group]) -> "list[list[torch.Tensor]]":
        """`logprobs` in one plain pass over padded rows, each with its own copy of the prompt."""
        return _logprobs(self.padded_scores(groups))

    def padded_scores(
        self, groups: Sequence[Group], extras: Sequence[str] = ()
    ) -> list[list[TargetScores]]:
        """`scores` in such a pass."""
        self._set_attention(self._plain_attention)
        rows = [(group.prompt_ids, c) for group in groups for c in group.completions]
        flat = iter(
            token_scores(
                self.model,
                [prompt for prompt, _ in rows],
                [c.ids for _, c in rows],
                [c.scored for _, c in rows],
                extras,
            )
        )
        return [[next(flat) for _ in group.completions] for group in groups]

    def _plain(
        self, groups: Sequence[Group], extras: Sequence[str] = ()
    ) -> list[list[TargetScores]]:
        return [
            [
                token_scores(self.model, [group.prompt_ids], [c.ids], [c.scored], extras)[0]
                for c in group.completions
            ]
            for group in groups
        ]

    def _tree(
        self, groups: Sequence[Group], extras: Sequence[str] = ()
    ) -> list[list[TargetScores]]:
        import torch

        rows = [(group.prompt_ids, c) for group in groups for c in group.completions]
        # From the last token nothing is predicted.
        tree = grow([np.concatenate([prompt, c.ids[:-1]]) for prompt, c in rows])
        device = self.model.device
        missing = max(0, FEWEST_ROWS - len(tree.ids))
        ids, positions = (
            torch.from_numpy(np.pad(x, (0, missing)))[None].to(device)
            for x in (tree.ids, tree.positions)
        )
        # A token is predicted from the one before it on its path.
        before = [
            places[len(prompt) - 1 + c.scored]
            for places, (prompt, c) in zip(tree.places, rows, strict=True)
        ]
        targets = np.concatenate([c.ids[c.scored] for _, c in rows]).astype(np.int64)
        go = partial(
            self._pass,
            layout_of(tree, device),
            ids,
            positions,
            torch.from_numpy(np.concatenate(before)).to(device),
            torch.from_numpy(targets).to(device),
            extras,
        )
        scores = TargetScores(*(go() if self._within is None else self._within(go)))
        flat = iter(scores.split([len(places) for places in before]))
        return [[next(flat) for _ in group.completions] for group in groups]

    def _pass(
        self,
        layout: Layout,
        ids: "torch.Tensor",
        positions: "torch.Tensor",
        before: "torch.Tensor",
        targets: "torch.Tensor",
        extras: Sequence[str],
    ) -> "tuple[torch.Tensor, dict[str, torch.Tensor]]":
        """A `TargetScores`' fields, of targets [n] after the row's tokens at `before` [n]."""
        import torch

        with attending(layout):
            # A mask of ones says that the row is one: else transformers reads the positions as
            # those of several sequences, packed.
            hidden = self._inner.base_model(
                input_ids=ids,
                position_ids=positions,
                attention_mask=torch.ones_like(ids),
                use_cache=False,
            ).last_hidden_state[0]
        head = head_of(self._inner)  # a sharded one is another tensor outside a pass
        assert head is not None
        scores = target_scores(hidden[before], targets, head, extras)
        return scores.logprobs.clone(), scores.extras  # on a view, FSDP's hooks may be lost

    def _find_out(self) -> Sharing:
        """Try both ways; the plain one is left with an attention that does what the config says."""
        import torch

        inner = self._inner
        name = type(inner).__name__
        if self._plain_attention not in IMPLEMENTATIONS:
            return Sharing(False, f"its attention is {self._plain_attention}")
        if not inner.is_backend_compatible():
            return Sharing(False, f"{name} does not take attention functions")
        if inner.base_model is inner:
            return Sharing(False, f"{name} has no body apart from its output layer")
        register()
        sample = _sample(inner.get_input_embeddings().num_embeddings)
        with torch.no_grad():
            try:
                eager = self._tried("eager", sample)
            except Exception as error:  # of any class: there is nothing to compare with
                if self._plain_attention == "eager":
                    raise
                return Sharing(False, f"it fails with eager attention: {_said(error)}")
            if self._plain_attention != "eager":
                other = self._tried(self._plain_attention, sample)
                if not _agree(eager, other, inner.dtype):
                    # Soft-capped scores are lost in sdpa.
                    _log.warning("%s is run with eager attention: sdpa computes otherwise", name)
                    self._plain_attention = "eager"
            if head_of(inner) is None:
                return Sharing(False, "its output layer is not a plain linear one")
            self._set_attention(IMPLEMENTATIONS[self._plain_attention])
            try:
                shared = _logprobs(self._tree(sample))
                apart = self._apart(sample)
            except NotShared as error:
                return Sharing(False, str(error))
            except Exception as error:  # of any class: a module that cannot take such a row
                return Sharing(False, f"it fails over a tree: {_said(error)}")
        if not _agree(eager, shared, inner.dtype):
            return Sharing(False, f"over a tree it is {_distance(eager, shared):.2g} nats off")
        exact = all(torch.equal(a, b) for a, b in zip(_flat(shared), _flat(apart), strict=True))
        return Sharing(True, exact=exact)

    def _apart(self, sample: list[Group]) -> "list[list[torch.Tensor]]":
        """Each group in a tree of its own, on one thread."""
        import torch

        n_threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return [_logprobs(self._tree([group]))[0] for group in sample]
        finally:
            torch.set_num_threads(n_threads)

    def _tried(self, attention: str, sample: list[Group]) -> "list[list[torch.Tensor]]":
        self._set_attention(attention)
        return _logprobs(self._plain(sample))

    def _set_attention(self, attention: str) -> None:
        if self._attention != attention:
            self._inner.set_attn_implementation(attention)
            self._attention = attention


_IDLE = Group(np.zeros(1, np.int32), (Completion("idle", np.zeros(1, np.int32), ((0, 1),)),))


def _sample(vocabulary: int) -> list[Group]:
    """Made-up groups with a common opening, one of two replies, one that reaches a second tile."""
    draw = np.random.default_rng(0)

    def ids(n: int) -> np.ndarray:
        return draw.integers(0, vocabulary, n).astype(np.int32)

    def reply(name: str, n: int) -> Completion:
        return Completion(name, ids(n), ((0, n),))

    opening = ids(16)
    return [
        Group(np.concatenate([opening, ids(10)]), (reply("a", 13), reply("b", 9))),
        Group(np.concatenate([opening, ids(40)]), (reply("c", 12),)),
    ]


def _logprobs(scores: list[list[TargetScores]]) -> "list[list[torch.Tensor]]":
    return [[row.logprobs for row in group] for group in scores]


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _flat(logprobs: "list[list[torch.Tensor]]") -> "list[torch.Tensor]":
    return [row for group in logprobs for row in group]


def _distance(a: "list[list[torch.Tensor]]", b: "list[list[torch.Tensor]]") -> float:
    """The largest difference per token."""
    import torch

    return float((torch.cat(_flat(a)) - torch.cat(_flat(b))).abs().max())


def _agree(
    a: "list[list[torch.Tensor]]", b: "list[list[torch.Tensor]]", dtype: "torch.dtype"
) -> bool:
    import torch

    differences = (torch.cat(_flat(a)) - torch.cat(_flat(b))).abs()
    if dtype in (torch.bfloat16, torch.float16):
        return bool(differences.mean() <= _HALF_TOLERANCE)
    return bool(differences.max() <= _TOLERANCE)  # NaN is no agreement


def _longest_sequence(groups: Sequence[Group]) -> int:
    return max(len(g.prompt_ids) + len(c.ids) for g in groups for c in g.completions)


def _longest_shared(config: Any) -> int | None:
    """The longest sequence whose rotary angles do not depend on what is computed beside it.

    Beyond the length they were trained on, these kinds take them from the longest in the batch.
    """
    found = getattr(config, "rope_parameters", None) or {}
    kinds = [found, *(value for value in found.values() if isinstance(value, dict))]
    limits = [
        int(kind.get("original_max_position_embeddings") or config.max_position_embeddings)
        for kind in kinds
        if kind.get("rope_type") in ("dynamic", "longrope")
    ]
    return min(limits, default=None)
