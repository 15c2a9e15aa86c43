"""What goes through a model at once: everything, once, within bounds, and evenly."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.scoring.engines.base import Group
from pipeline.scoring.engines.batches import groups_in, packs, padded, passes
from pipeline.scoring.engines.forward.tree import grow
from scoring.oracle import completion, group, random_groups, random_ids


def n_tokens(groups: list[Group]) -> int:
    """Of the tree that is made of them."""
    return len(
        grow([np.concatenate([g.prompt_ids, c.ids]) for g in groups for c in g.completions]).ids
    )


@settings(deadline=None)
@given(st.integers(0, 100), st.integers(1, 30), st.integers(1, 2000), st.integers(1, 4))
def test_every_row_is_in_one_batch_and_none_is_too_large(
    seed: int, n: int, batch_tokens: int, n_threads: int
) -> None:
    groups = random_groups(seed, n)
    rows = {(g, c) for g in range(n) for c in range(2)}
    longest = max(len(g.prompt_ids) + len(c.ids) for g in groups for c in g.completions)
    for cut in (
        packs(groups, batch_tokens, n_threads),
        padded(groups, batch_tokens),
        passes(groups),
    ):
        assert sorted(row for batch in cut for row in batch) == sorted(rows)
    for batch in packs(groups, batch_tokens, n_threads):
        # Beginnings too short to be shared are counted once and computed for each.
        slack = 8 * len(batch)
        assert n_tokens(groups_in(groups, batch)) <= max(batch_tokens, longest) + slack
    for batch in padded(groups, batch_tokens):
        lengths = [len(groups[g].prompt_ids) + len(groups[g].completions[c].ids) for g, c in batch]
        assert len(batch) == 1 or max(lengths) * len(batch) <= batch_tokens


def test_rows_keep_their_order_in_groups() -> None:
    groups = random_groups(1, 3)
    chosen = [(2, 0), (2, 1), (0, 1)]
    found = [c.sequence_id for g in groups_in(groups, chosen) for c in g.completions]
    assert found == ["2-0", "2-1", "0-1"]


def test_two_threads_get_the_same_work() -> None:
    groups = random_groups(0, 60)
    sizes = [n_tokens(groups_in(groups, batch)) for batch in packs(groups, 1024, 2)]
    assert len(sizes) % 2 == 0
    assert sizes == sorted(sizes, reverse=True) or max(sizes) - min(sizes) < 250
    assert max(sizes) < 1.35 * min(sizes)
    # The control: one after another, in the order in which they come, the last one is what is left.
    assert sum(sizes) < sum(n_tokens([g]) for g in groups) + 60


def test_prompts_that_begin_alike_meet_in_one_tree() -> None:
    system = random_ids(50, 0)
    groups = []
    for g in range(8):
        opening = system if g % 2 else random_ids(50, 100 + g)
        replies = completion(f"{g}", random_ids(20, g)), completion(f"{g}x", random_ids(20, g + 50))
        groups.append(group([*opening, *random_ids(10, 200 + g)], *replies))
    cut = packs(groups, 400, 1)
    assert len(cut) > 1
    together = sum(n_tokens(groups_in(groups, batch)) for batch in cut)
    # Two of the four prompts at least find the system prompt there; one after another, none would.
    assert together <= sum(n_tokens([g]) for g in groups) - 2 * 50


def test_a_group_with_too_many_replies_is_cut() -> None:
    many = group(random_ids(30, 0), *(completion(f"{i}", random_ids(50, i)) for i in range(20)))
    cut = packs([many], 200, 1)
    assert len(cut) >= 6
    assert all(n_tokens(groups_in([many], batch)) <= 200 for batch in cut)
