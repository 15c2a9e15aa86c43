"""Attention over a tree on a CPU, tile by tile, so that no bit depends on the batch.

A token's numbers are made not to depend on what else is in the row: it is computed in the tile of
64 positions that it falls into, with keys up to the end of that tile, and in no fewer than 8 rows.
Where a matrix product gives a row the same bits whatever other rows there are (MKL does, from 8
rows on), a sequence has the same log-probs in every batch, to the bit.
"""

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.scoring.engines.forward.tree import Tree

if TYPE_CHECKING:
    import torch

TILE = 64
ROWS = 8
"""Matrix products of fewer rows go another way in MKL, and give other bits."""


@dataclass(frozen=True)
class _Tile:
    """Some queries of one run: how many, the positions they have, and how many keys they see."""

    n: int
    seen: slice
    end: int


@dataclass(frozen=True)
class Tiles:
    """A tree as attention reads it; see `attention.Layout`.

    Attributes:
        paths: for every run the flat rows of its keys, int64 [its last tile's end], and how many of
            them each of its tiles sees.
        tiles: of all runs, in the order of the flat row, which they cover.
        longest: positions of the longest path, up to its last tile's end.
    """

    paths: "tuple[tuple[torch.Tensor, tuple[int, ...]], ...]"
    tiles: tuple[_Tile, ...]
    longest: int

    @property
    def mask_shape(self) -> tuple[int, ...]:
        """As `attention.Layout.mask_shape`."""
        return (1, 1, self.longest, self.longest)

    def mask(self, mask_function: Any, device: "torch.device") -> "torch.Tensor":
        """What a position sees of the positions on its path: bool [1, 1, longest, longest]."""
        import torch

        at = torch.arange(self.longest, device=device)
        one = torch.zeros((1, 1, 1, 1), dtype=torch.long, device=device)
        seen: torch.Tensor = mask_function(one, one, at[None, None, :, None], at[None, None, None])
        return seen.expand(self.mask_shape)

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
        """As `attention.Layout.attend`."""
        import torch

        # What is left of the row belongs to no run.
        counts = [tile.n for tile in self.tiles]
        counts.append(query.shape[1] - sum(counts))
        keys, values = (_gather().apply(x, self.paths) for x in (key, value))
        outputs = []
        for tile, rows, of_keys, of_values in zip(
            self.tiles, torch.split(query, counts, 1), keys, values, strict=False
        ):
            seen = mask[0, 0, tile.seen, : tile.end]
            if missing := -tile.n % ROWS:
                rows = torch.cat([rows, rows[:, -1:].expand(-1, missing, -1)], dim=1)
                seen = torch.cat([seen, seen[-1:].expand(missing, -1)])
            attend = _fused if fused and softcap is None else _plain
            attended = attend(rows, of_keys, of_values, seen, scaling, softcap)
            outputs.append(attended[:, : tile.n] if missing else attended)
        return torch.cat(outputs, dim=1)


def tiles_of(tree: Tree, device: "torch.device") -> Tiles:
    """Cut a tree's runs."""
    import torch

    tiles, paths = [], []
    for run in tree.runs:
        length = len(run.path)
        ends = []
        for begin in range(run.position // TILE * TILE, length, TILE):
            first, last = max(begin, run.position), min(begin + TILE, length)
            ends.append(min(begin + TILE, _up(length)))
            tiles.append(_Tile(last - first, slice(first, last), ends[-1]))
        # Keys beyond the path's end are some token's, and masked.
        path = np.pad(run.path, (0, ends[-1] - length))
        paths.append((torch.from_numpy(path).to(device), tuple(ends)))
    return Tiles(tuple(paths), tuple(tiles), max(tile.end for tile in tiles))


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


def _fused(
    rows: "torch.Tensor",
    keys: "torch.Tensor",
    values: "torch.Tensor",
    mask: "torch.Tensor",
    scaling: float,
    softcap: float | None,
) -> "torch.Tensor":
    """Queries [H, n, D] over keys and values [G, m, D]: [H, n, D]."""
    from torch.nn.functional import scaled_dot_product_attention

    return scaled_dot_product_attention(
        rows[None],
        keys[None],
        values[None],
        attn_mask=mask[None, None],
        scale=scaling,
        enable_gqa=rows.shape[0] != keys.shape[0],
    )[0]


def _plain(
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
