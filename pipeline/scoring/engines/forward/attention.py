"""Attention over a tree of token runs, through transformers' attention interface.

transformers lets a model's own modules run over any row of tokens if it is told how a token
attends. Here every run of a `Tree` attends to the tokens on its path and to nothing else. What a
layer's mask lets it see (all, or a window) is asked of transformers' own mask function, at the
positions that tokens have in their sequences.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Protocol

from pipeline.scoring.engines.forward.blocks import blocks_of
from pipeline.scoring.engines.forward.tiles import tiles_of
from pipeline.scoring.engines.forward.tree import Tree

if TYPE_CHECKING:
    import torch

IMPLEMENTATIONS = {"sdpa": "logratio_tree_sdpa", "eager": "logratio_tree_eager"}
"""By a plan's `attention`: the names under which transformers knows the two functions here."""

_UNDERSTOOD = {"position_ids", "sliding_window", "cache_position", "use_cache", "layer_idx"}
"""Arguments that change nothing here: a window is in the mask, and there is no cache."""


class NotShared(Exception):
    """A model asks for something that attention over a tree does not do."""


class Layout(Protocol):
    """A tree as attention reads it."""

    @property
    def mask_shape(self) -> tuple[int, ...]:
        """Of `mask`."""
        ...

    def mask(self, mask_function: Any, device: "torch.device") -> "torch.Tensor":
        """What queries see of keys, bool: transformers' own function asked at their positions."""
        ...

    def attend(
        self,
        query: "torch.Tensor",
        key: "torch.Tensor",
        value: "torch.Tensor",
        mask: "torch.Tensor",
        scaling: float,
        softcap: float | None,
        fused: bool,
    ) -> "torch.Tensor":
        """Queries [H, T, D] over keys and values [G, T, D]: [H, n, D], n tokens of runs.

        `mask` is `mask`'s. Where `softcap` is given or it is not to be `fused`, step by step.
        """
        ...


_layout: ContextVar[Layout] = ContextVar("layout")


def layout_of(tree: Tree, device: "torch.device") -> Layout:
    """Prepare a tree for `attending`: only a CPU's products let numbers not depend on the batch."""
    return tiles_of(tree, device) if device.type == "cpu" else blocks_of(tree, device)


@contextmanager
def attending(layout: Layout) -> Iterator[None]:
    """Inside the block, in this thread, a model set to one of `IMPLEMENTATIONS` sees this tree."""
    token = _layout.set(layout)
    try:
        yield
    finally:
        _layout.reset(token)


def recomputing() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """For torch's checkpointing: nothing at first, and this tree again on the way back.

    A GPU's gradients are computed in a thread of their own, which knows of no tree.
    """
    layout = _layout.get(None)
    return nullcontext(), nullcontext() if layout is None else attending(layout)


def register() -> None:
    """Make the implementations known to transformers; doing it twice does nothing."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    for name, attend in zip(IMPLEMENTATIONS.values(), (_sdpa, _eager), strict=True):
        AttentionInterface.register(name, attend)
        AttentionMaskInterface.register(name, _mask)


def _mask(*, mask_function: Any, device: "torch.device", use_vmap: bool = False, **_: Any) -> Any:
    """A kind of layer's mask: transformers asks for each once, and hands it to the layers."""
    if use_vmap:
        raise NotShared("its mask is not a function of positions")
    return _layout.get().mask(mask_function, device)


def _sdpa(module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **how: Any) -> Any:
    return _attend(module, query, key, value, attention_mask, fused=True, **how)


def _eager(module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **how: Any) -> Any:
    return _attend(module, query, key, value, attention_mask, fused=False, **how)


def _attend(
    module: Any,
    query: "torch.Tensor",
    key: "torch.Tensor",
    value: "torch.Tensor",
    attention_mask: "torch.Tensor",
    *,
    fused: bool,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    **others: Any,
) -> "tuple[torch.Tensor, None]":
    """As transformers' attention functions: [1, H, T, D] to [1, T, H, D].

    Raises:
        NotShared: an argument has a meaning this does not know, or the mask is not `_mask`'s.
    """
    import torch

    layout = _layout.get()
    if strange := [k for k, v in others.items() if k not in _UNDERSTOOD and v not in (None, False)]:
        raise NotShared(f"its attention takes {', '.join(strange)}")
    if dropout or getattr(attention_mask, "shape", None) != layout.mask_shape:
        raise NotShared("its attention has a mask of its own, or dropout")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    attended = layout.attend(query[0], key[0], value[0], attention_mask, scaling, softcap, fused)
    if padding := query.shape[2] - attended.shape[1]:  # tokens of no run, at the end
        attended = torch.nn.functional.pad(attended, (0, 0, 0, padding))
    return attended.transpose(0, 1)[None], None
