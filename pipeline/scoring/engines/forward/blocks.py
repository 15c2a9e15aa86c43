"""Attention over a tree on a GPU: runs of about one size together, in few and large calls.

A call costs a GPU more than the attention of a short run, so runs are padded to a common size
where that costs less than another call.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.scoring.engines.forward.tree import Run, Tree

if TYPE_CHECKING:
    import torch

CALL = 1 << 20
"""Pairs of a query and a key that take about as long as the calls of another block."""

KEYS = 16
"""CUDA's fused kernels want the mask's rows to be a multiple of this, and else copy it."""


@dataclass(frozen=True)
class Block:
    """Runs that attend together.

    Attributes:
        shape: how many runs; queries and keys of each, with padding.
        queries: flat rows, int64 [runs * queries]; a run's last one stands for what it lacks.
        at: their positions, int64 [runs, 1, queries, 1].
        keys: flat rows, int64 [runs * keys]; a key's position is its number on the path, so that
            what is beyond a path's end is masked as what comes later.
    """

    shape: tuple[int, int, int]
    queries: "torch.Tensor"
    at: "torch.Tensor"
    keys: "torch.Tensor"


@dataclass(frozen=True)
class Blocks:
    """A tree as attention reads it; see `attention.Layout`.

    Attributes:
        blocks: which hold every run once.
        order: where the tokens of the flat row are in the blocks' queries, int64 [T].
    """

    blocks: tuple[Block, ...]
    order: "torch.Tensor"

    @property
    def mask_shape(self) -> tuple[int, ...]:
        """As `attention.Layout.mask_shape`."""
        return (1, 1, 1, sum(map(_n_pairs, self.blocks)))

    def mask(self, mask_function: Any, device: "torch.device") -> "torch.Tensor":
        """What the blocks' queries see of their keys, one block after another."""
        import torch

        one = torch.zeros((1, 1, 1, 1), dtype=torch.long, device=device)
        found = []
        for block in self.blocks:
            runs, n, m = block.shape
            keys = torch.arange(m, device=device)[None, None, None]
            found.append(mask_function(one, one, block.at, keys).expand(runs, 1, n, m).flatten())
        return torch.cat(found)[None, None, None]

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

        rows, shared = _rows().apply, query.shape[0] // key.shape[0]
        seen = torch.split(mask.flatten(), [_n_pairs(block) for block in self.blocks])
        outputs = []
        for block, of_block in zip(self.blocks, seen, strict=True):
            runs, n, m = block.shape

            def of_runs(x: torch.Tensor, index: torch.Tensor, runs: int = runs) -> torch.Tensor:
                """[H, T, D] to [runs, H, n, D]."""
                return rows(x, index).unflatten(1, (runs, -1)).transpose(0, 1)  # type: ignore[no-any-return]

            queries, keys, values = (
                of_runs(x, index)
                for x, index in (
                    (query, block.queries),
                    (key, block.keys),
                    (value, block.keys),
                )
            )
            if shared > 1:
                # The fused kernels take a mask or keys that heads share, and not both.
                keys, values = (x.repeat_interleave(shared, 1) for x in (keys, values))
            attend = _fused if fused and softcap is None else _plain
            attended = attend(queries, keys, values, of_block.view(runs, 1, n, m), scaling, softcap)
            outputs.append(attended.transpose(0, 1).flatten(1, 2))
        together: torch.Tensor = rows(torch.cat(outputs, dim=1), self.order)
        return together


def blocks_of(tree: Tree, device: "torch.device") -> Blocks:
    """Divide a tree's runs among blocks; everything is moved to the device in one piece."""
    import torch

    order = np.zeros(len(tree.ids), np.int64)
    shapes, parts, passed = [], [], 0
    for runs in _alike(tree.runs):
        n, m = runs[0].n, _up(max(len(run.path) for run in runs))
        for run in runs:
            ends = np.minimum(np.arange(n), run.n - 1)
            parts += [
                run.start + ends,
                run.position + ends,
                np.pad(run.path, (0, m - len(run.path))),
            ]
            order[run.start : run.start + run.n] = passed + np.arange(run.n)
            passed += n
        shapes.append((len(runs), n, m))
    flat = torch.from_numpy(np.concatenate([*parts, order])).to(device)
    sizes = [n_runs * (2 * n + m) for n_runs, n, m in shapes]
    *of_blocks, moved = torch.split(flat, [*sizes, len(order)])
    blocks = []
    for (n_runs, n, m), numbers in zip(shapes, of_blocks, strict=True):
        queries, at, keys = torch.split(numbers.view(n_runs, -1), [n, n, m], dim=1)
        at = at[:, None, :, None]
        blocks.append(Block((n_runs, n, m), queries.flatten(), at, keys.flatten()))
    return Blocks(tuple(blocks), moved)


def _alike(runs: Sequence[Run]) -> list[list[Run]]:
    """Runs in blocks, in each of which padding costs no more than `CALL`; most queries first."""
    found: list[list[Run]] = []
    longest: list[int] = []
    pairs: list[int] = []
    for run in sorted(runs, key=lambda run: (-run.n, -len(run.path), run.start)):
        own = run.n * len(run.path)
        wasted = [
            (len(of) + 1) * of[0].n * _up(max(most, len(run.path))) - (n + own)
            for of, most, n in zip(found, longest, pairs, strict=True)
        ]
        if not wasted or min(wasted) > CALL:
            wasted.append(0)
            found.append([])
            longest.append(0)
            pairs.append(0)
        which = wasted.index(min(wasted))
        found[which].append(run)
        longest[which] = max(longest[which], len(run.path))
        pairs[which] += own
    return found


def _up(n: int) -> int:
    return -(-n // KEYS) * KEYS


def _n_pairs(block: Block) -> int:
    runs, n, m = block.shape
    return runs * n * m


@cache
def _rows() -> Any:
    """The autograd function, made when torch is loaded."""
    import torch

    class Rows(torch.autograd.Function):
        """Chosen rows [H, n, D] of [H, T, D].

        A key that many runs see gets many gradients, which are added in float32.
        """

        @staticmethod
        def forward(ctx: Any, x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
            ctx.index, ctx.shape = index, x.shape
            return x.index_select(1, index)

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
            dtype = torch.promote_types(grad.dtype, torch.float32)
            total = grad.new_zeros(ctx.shape, dtype=dtype).index_add_(1, ctx.index, grad.to(dtype))
            return total.to(grad.dtype), None

    return Rows


def _fused(
    queries: "torch.Tensor",
    keys: "torch.Tensor",
    values: "torch.Tensor",
    mask: "torch.Tensor",
    scaling: float,
    softcap: float | None,
) -> "torch.Tensor":
    """Queries [runs, H, n, D] over keys and values [runs, H, m, D]: [runs, H, n, D]."""
    from torch.nn.functional import scaled_dot_product_attention

    return scaled_dot_product_attention(queries, keys, values, attn_mask=mask, scale=scaling)


def _plain(
    queries: "torch.Tensor",
    keys: "torch.Tensor",
    values: "torch.Tensor",
    mask: "torch.Tensor",
    scaling: float,
    softcap: float | None,
) -> "torch.Tensor":
    """The same step by step, with the scores soft-capped where the model has it so."""
    import torch

    scores = queries @ keys.transpose(2, 3) * scaling
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    weights = torch.softmax(scores.masked_fill(~mask, -torch.inf), dim=-1, dtype=torch.float32)
    return weights.to(values.dtype) @ values
