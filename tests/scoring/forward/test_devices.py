"""What a GPU needs of the forward pass, seen where there is none.

On torch's `meta` device a tensor has a shape and no numbers: whatever would wait for one fails, and
so does a product of tensors on two devices.
"""

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.scoring.engines.forward import Forward, blocks
from pipeline.scoring.engines.forward import model as model_module
from pipeline.scoring.engines.forward.blocks import blocks_of
from pipeline.scoring.engines.forward.head import EXTRAS
from pipeline.scoring.engines.forward.tiles import tiles_of
from pipeline.scoring.engines.forward.tree import Tree, grow
from scoring.forward.families import FAMILIES, build, loaded, some_groups

CPU = torch.device("cpu")
SHARING = [name for name, family in FAMILIES.items() if family.shares]


def on_meta(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Forward:
    forward = Forward(loaded(build(folder, FAMILIES[name])))
    assert forward.sharing.shared
    forward.model.to("meta")
    # autocast has no such device.
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: False)
    return forward


@pytest.mark.parametrize("name", [name for name in SHARING if name != "mixtral"])
def test_nothing_is_waited_for_and_nothing_left_on_the_cpu(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor on the way back. (Experts are told apart by numbers.)"""
    forward = on_meta(name, tmp_path, monkeypatch)
    scores = [row for rows in forward.scores(some_groups(1), EXTRAS) for row in rows]
    assert {row.logprobs.device.type for row in scores} == {"meta"}
    torch.autograd.backward(torch.cat([row.logprobs for row in scores]).sum())
    assert all(p.grad is not None for p in forward.model.parameters() if p.requires_grad)


def test_what_is_left_on_the_cpu_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control."""
    forward = on_meta("llama", tmp_path, monkeypatch)

    def waits(tree: Tree, device: torch.device) -> Any:
        torch.zeros(1, device=device).item()

    monkeypatch.setattr(model_module, "layout_of", waits)
    with pytest.raises(RuntimeError, match="item"):
        forward.scores(some_groups(1))
    monkeypatch.setattr(model_module, "layout_of", lambda tree, device: blocks_of(tree, CPU))
    with pytest.raises(RuntimeError, match="device"):
        forward.scores(some_groups(1))


LENGTHS = st.lists(st.tuples(st.integers(1, 60), st.integers(1, 40)), min_size=1, max_size=9)


def trees(lengths: list[tuple[int, int]], seed: int = 0) -> Tree:
    """A common opening, prompts of some lengths, and two replies to each."""
    draw = np.random.default_rng(seed)
    opening = draw.integers(0, 9, 12)
    sequences = []
    for n_prompt, n in lengths:
        prompt = np.concatenate([opening, draw.integers(0, 9, n_prompt)])
        sequences += [np.concatenate([prompt, draw.integers(0, 9, n + i)]) for i in range(2)]
    return grow([one.astype(np.int32) for one in sequences])


def causal(batch: Any, head: Any, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    return key <= query


@pytest.mark.parametrize("call", [0, 2000, 1 << 20])
@pytest.mark.parametrize("fused", [True, False])
@settings(max_examples=25, deadline=None)
@given(lengths=LENGTHS)
def test_blocks_attend_as_tiles_do(fused: bool, call: int, lengths: list[tuple[int, int]]) -> None:
    tree = trees(lengths)
    n = len(tree.ids)
    draw = torch.Generator().manual_seed(n)
    found = []
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(blocks, "CALL", call)
        layouts = (tiles_of(tree, CPU), blocks_of(tree, CPU))
    query, key, value = (
        torch.randn((heads, n + 3, 8), generator=draw, requires_grad=True) for heads in (4, 2, 2)
    )
    slopes = torch.randn((4, n, 8), generator=draw)
    for layout in layouts:
        mask = layout.mask(causal, CPU)
        assert mask.shape == layout.mask_shape
        out = layout.attend(query, key, value, mask, 0.3, None, fused)
        assert out.shape == slopes.shape
        found.append([out, *torch.autograd.grad((out * slopes).sum(), (query, key, value))])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


@settings(max_examples=25, deadline=None)
@given(lengths=LENGTHS)
def test_every_run_is_in_one_block_and_padding_costs_less_than_a_call(
    lengths: list[tuple[int, int]],
) -> None:
    tree = trees(lengths)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(blocks, "CALL", 2000)
        made = blocks._alike(tree.runs)
        found = blocks_of(tree, CPU)
    assert sorted(run.start for of in made for run in of) == [run.start for run in tree.runs]
    for of, block in zip(made, found.blocks, strict=True):
        runs, n, m = block.shape
        assert (runs, n) == (len(of), max(run.n for run in of))
        assert m % blocks.KEYS == 0
        assert len(of) == 1 or runs * n * m - sum(r.n * len(r.path) for r in of) <= 2000
    assert sorted(set(found.order.tolist())) == sorted(found.order.tolist()), "each has its place"
    longest = [block.shape[1] for block in found.blocks]
    assert all(a >= b for a, b in pairwise(longest))
