"""Attention over a tree of token runs, through transformers' attention interface.

transformers lets a model's own modules run over any row of tokens if it is told how a token
attends. Here every run of a `Tree` attends to the tokens on its path and to nothing else. What a
layer's mask lets it see (all, or a window) is asked of transformers' own mask function, at the
positions that tokens have in their sequences.

A token's numbers are made not to depend on what else is in the row: it is computed in the tile of
64 positions that it falls into, with keys up to the end of that tile, and in no fewer than 8 rows.
Where a matrix product gives a row the same bits whatever other rows there are (MKL does, from 8
rows on), a sequence has the same log-probs in every batch, to the bit.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.scoring.engines.forward.tree import Tree

if TYPE_CHECKING:
    import torch

IMPLEMENTATIONS = {"sdpa": "logratio_tree_sdpa", "eager": "logratio_tree_eager"}
"""By a plan's `attention`: the names under which transformers knows the two functions here."""

TILE = 64
ROWS = 8
"""Matrix products of fewer rows go another way in MKL, and give other bits."""

_UNDERSTOOD = {"position_ids", "sliding_window", "cache_position", "use_cache", "layer_idx"}
"""Arguments that change nothing here: a window is in the mask, and there is no cache."""


class NotShared(Exception):
    """A model asks for something that attention over a tree does not do."""


@dataclass(frozen=True)
class _Tile:
    """Some queries of one run: how many, the positions they have, and how many keys they see."""

    n: int
    seen: slice
    end: int


@dataclass(frozen=True)
class Layout:
    """A tree as attention reads it.

    Attributes:
        paths: for every run the flat rows of its keys, int64 [its last tile's end], and how many of
            them each of its tiles sees.
        tiles: of all runs, in the order of the flat row, which they cover.
        longest: positions of the longest path, up to its last tile's end.
        rows: the fewest queries of a matrix product.
    """

    paths: "tuple[tuple[torch.Tensor, tuple[int, ...]], ...]"
    tiles: tuple[_Tile, ...]
    longest: int
    rows: int


_layout: ContextVar[Layout] = ContextVar("layout")


def layout_of(tree: Tree, device: "torch.device") -> Layout:
    """Prepare a tree for `attending`."""
    import torch

    # Tiles make numbers independent of the batch, which only a CPU's matrix products keep.
    tile, rows = (TILE, ROWS) if device.type == "cpu" else (1 << 30, 1)
    tiles, paths, all_ends = [], [], []
    for run in tree.runs:
        length = len(run.path)
        ends = []
        for begin in range(run.position // tile * tile, length, tile):
            first, last = max(begin, run.position), min(begin + tile, length)
            ends.append(min(begin + tile, _up(length)))
            tiles.append(_Tile(last - first, slice(first, last), ends[-1]))
        # Keys beyond the path's end are some token's, and masked.
        paths.append(np.pad(run.path, (0, ends[-1] - length)))
        all_ends.append(tuple(ends))
    flat = torch.from_numpy(np.concatenate(paths)).to(device)
    moved = torch.split(flat, [len(path) for path in paths])
    longest = max(tile.end for tile in tiles)
    return Layout(tuple(zip(moved, all_ends, strict=True)), tuple(tiles), longest, rows)


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
    """What a position sees of the positions on its path: bool [1, 1, longest, longest].

    transformers asks for it once for each kind of layer, and hands it to the layers.
    """
    import torch

    if use_vmap:
        raise NotShared("its mask is not a function of positions")
    n = _layout.get().longest
    at, nowhere = torch.arange(n, device=device), torch.zeros(1, dtype=torch.long, device=device)
    one = nowhere[:, None, None, None]
    seen = mask_function(one, one, at[None, None, :, None], at[None, None, None, :])
    return seen.expand(1, 1, n, n)


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
    if dropout or getattr(attention_mask, "shape", None) != (1, 1, layout.longest, layout.longest):
        raise NotShared("its attention has a mask of its own, or dropout")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    seen, attend = attention_mask[0, 0], _tile_fused if fused and softcap is None else _tile_plain
    # What is left of the row belongs to no run.
    counts = [tile.n for tile in layout.tiles]
    counts.append(query.shape[2] - sum(counts))
    keys, values = (_gather().apply(x[0], layout.paths) for x in (key, value))
    outputs = []
    for tile, rows, of_keys, of_values in zip(
        layout.tiles, torch.split(query[0], counts, 1), keys, values, strict=False
    ):
        mask = seen[tile.seen, : tile.end]
        if missing := -tile.n % layout.rows:
            rows = torch.cat([rows, rows[:, -1:].expand(-1, missing, -1)], dim=1)
            mask = torch.cat([mask, mask[-1:].expand(missing, -1)])
        attended = attend(rows, of_keys, of_values, mask, scaling, softcap)
        outputs.append(attended[:, : tile.n] if missing else attended)
    attended = torch.cat(outputs, dim=1)
    if padding := query.shape[2] - attended.shape[1]:  # tokens of no run, at the end
        attended = torch.nn.functional.pad(attended, (0, 0, 0, padding))
    return attended.transpose(0, 1)[None], None


@cache
def _gather() -> Any:
    """The autograd function, made when torch is loaded."""
    import torch

    class Gather(torch.autograd.Function):
        """Keys [G, T, D] as every tile sees them, [G, end, D] each.

        By itself autograd would fill a row of zeros for every tile on the way back.
        """

        @staticmethod
        def forward(
            ctx: Any,
            keys: torch.Tensor,
            paths: tuple[tuple[torch.Tensor, tuple[int, ...]], ...],
        ) -> tuple[torch.Tensor, ...]:
            ctx.paths, ctx.shape = paths, keys.shape
            found = []
            for path, ends in paths:
                of_run = keys.index_select(1, path)
                found += [of_run[:, :end] for end in ends]
            return tuple(found)

        @staticmethod
        def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
            total = grads[0].new_zeros(ctx.shape)
            rest = iter(grads)
            for path, ends in ctx.paths:
                of_run = total.new_zeros((total.shape[0], len(path), total.shape[2]))
                for end in ends:
                    of_run[:, :end] += next(rest)
                total.index_add_(1, path, of_run)
            return total, None

    return Gather


def _tile_fused(
    rows: "torch.Tensor",
    keys: "torch.Tensor",
    values: "torch.Tensor",
    mask: "torch.Tensor",
    scaling: float,
    softcap: float | None,
) -> "torch.Tensor":
    """Queries [H, n, D] over keys and values [G, m, D]: [H, n, D]."""
    from torch.nn.functional import scaled_dot_product_attention

    shared = rows.shape[0] // keys.shape[0]
    if shared > 1 and rows.device.type != "cpu":
        # CUDA's fused kernels take a mask or keys that heads share, and not both: with both, all
        # scores would be written out.
        keys, values = (x.repeat_interleave(shared, 0) for x in (keys, values))
    return scaled_dot_product_attention(
        rows[None],
        keys[None],
        values[None],
        attn_mask=mask[None, None],
        scale=scaling,
        enable_gqa=rows.shape[0] != keys.shape[0],
    )[0]


def _tile_plain(
    rows: "torch.Tensor",
    keys: "torch.Tensor",
    values: "torch.Tensor",
    mask: "torch.Tensor",
    scaling: float,
    softcap: float | None,
) -> "torch.Tensor":
    """The same step by step, with the scores soft-capped where the model has it so."""
    import torch

    heads, n, _ = rows.shape
    groups = heads // keys.shape[0]
    folded = rows.reshape(keys.shape[0], groups * n, -1)  # heads that share keys, one below another
    scores = torch.bmm(folded, keys.transpose(1, 2)) * scaling
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.view(heads, n, -1).masked_fill(~mask, -torch.inf)
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(values.dtype)
    return torch.bmm(weights.view(keys.shape[0], groups * n, -1), values).view(heads, n, -1)


def _up(n: int) -> int:
    return -(-n // TILE) * TILE
