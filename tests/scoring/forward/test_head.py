"""The tiled head: float64's numbers, its gradients, and never a whole row of logits."""

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.scoring.engines.forward.head import (
    ENTROPY,
    EXTRAS,
    IS_TOP1,
    LOG_SUM_SQUARES,
    Head,
    extras_of,
    target_logprobs,
    target_scores,
)

CASES = [
    {}, {"bias": True}, {"scale": 0.25}, {"cap": 3.0}, {"bias": True, "scale": 2.0, "cap": 5.0},
]  # fmt: skip


def case(
    n: int = 20, vocabulary: int = 1000, bias: bool = False, **how: Any
) -> tuple[torch.Tensor, torch.Tensor, Head]:
    torch.manual_seed(0)
    weight = torch.randn(vocabulary, 16)
    head = Head(weight, torch.randn(vocabulary) if bias else None, **how)
    return torch.randn(n, 16), torch.randint(0, vocabulary, (n,)), head


def logits_of(hidden: torch.Tensor, head: Head) -> torch.Tensor:
    logits = hidden.double() @ head.weight.double().T
    if head.bias is not None:
        logits = logits + head.bias.double()
    logits = logits * head.scale
    if head.cap is not None:
        logits = head.cap * torch.tanh(logits / head.cap)
    return logits


def expected(hidden: torch.Tensor, targets: torch.Tensor, head: Head) -> torch.Tensor:
    return torch.log_softmax(logits_of(hidden, head), -1).gather(1, targets[:, None])[:, 0]


def expected_extras(logits: torch.Tensor, targets: torch.Tensor) -> dict[str, torch.Tensor]:
    """From whole rows of float64 logits, by the definitions."""
    p = torch.softmax(logits, -1)
    return {
        LOG_SUM_SQUARES: (p * p).sum(-1).log(),
        ENTROPY: -(p * torch.log_softmax(logits, -1)).sum(-1),
        IS_TOP1: (logits.argmax(-1) == targets).double(),
    }


@pytest.mark.parametrize("tile", [1, 7, 256, 1000, 4096])
@pytest.mark.parametrize("how", CASES)
def test_any_tile_gives_the_numbers_of_float64(how: dict[str, Any], tile: int) -> None:
    hidden, targets, head = case(**how)
    found = target_logprobs(hidden, targets, head, tile)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected(hidden, targets, head), atol=2e-5, rtol=0)
    other = target_logprobs(hidden, (targets + 1) % 1000, head, tile)
    assert (other - found).abs().max() > 0.1, "the control must fail"


@pytest.mark.parametrize("how", CASES)
def test_gradients_are_those_of_float64(how: dict[str, Any]) -> None:
    hidden, targets, head = case(**how)
    weights = torch.linspace(-1, 1, len(targets))
    leaves = [t for t in (hidden, head.weight, head.bias) if t is not None]
    for leaf in leaves:
        leaf.requires_grad_()
    torch.autograd.backward((target_logprobs(hidden, targets, head, 300) * weights).sum())
    found = [leaf.grad for leaf in leaves]
    for leaf in leaves:
        leaf.grad = None
    torch.autograd.backward((expected(hidden, targets, head) * weights).sum())
    for gradient, leaf in zip(found, leaves, strict=True):
        assert gradient is not None
        assert leaf.grad is not None
        torch.testing.assert_close(gradient, leaf.grad, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("tile", [1, 7, 256, 1000, 4096])
@pytest.mark.parametrize("how", CASES)
def test_extras_of_any_tile_are_those_of_float64(how: dict[str, Any], tile: int) -> None:
    hidden, targets, head = case(**how)
    logits = logits_of(hidden, head)
    targets = torch.where(torch.arange(len(targets)) % 2 == 0, logits.argmax(-1), targets)
    right = expected_extras(logits, targets)
    wrong = expected_extras(logits / 1.05, targets), expected_extras(logits[:, :-1], targets)
    found = target_scores(hidden, targets, head, EXTRAS, tile)
    single = logits.float()
    chosen = single.gather(1, targets[:, None])[:, 0]
    there = extras_of(single, chosen, torch.logsumexp(single, 1), EXTRAS, tile)
    for extras in (found.extras, there):
        for name in EXTRAS:
            assert extras[name].dtype == torch.float32
            torch.testing.assert_close(extras[name].double(), right[name], atol=2e-5, rtol=0)
        for name in (LOG_SUM_SQUARES, ENTROPY):
            for control in wrong:  # another temperature, a word too few
                assert (extras[name] - control[name]).abs().max() > 2e-4, "the control must fail"
    assert 0 < right[IS_TOP1].mean() < 1
    torch.testing.assert_close(
        target_scores(hidden, targets, head, [ENTROPY], tile).extras[ENTROPY],
        found.extras[ENTROPY],
        atol=0,
        rtol=0,
    )


@pytest.mark.parametrize("how", CASES)
@pytest.mark.parametrize("grad", [False, True])
def test_extras_change_no_bit_of_log_probs_and_gradients(how: dict[str, Any], grad: bool) -> None:
    results = []
    for extras in ((), EXTRAS, (ENTROPY,)):
        hidden, targets, head = case(n=5, **how)
        leaves = [t.requires_grad_(grad) for t in (hidden, head.weight)]
        scores = target_scores(hidden, targets, head, extras, 300)
        assert list(scores.extras) == list(extras)
        assert not any(values.requires_grad for values in scores.extras.values())
        if grad:
            torch.autograd.backward((scores.logprobs * torch.linspace(-1, 1, 5)).sum())
        results.append([scores.logprobs.detach(), *(leaf.grad for leaf in leaves)])
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert (a is None) == (b is None)
            assert a is None or b is None or torch.equal(a, b)


def test_a_tie_is_the_largest_logit_too() -> None:
    hidden, _, head = case(n=12)
    logits = torch.nn.functional.linear(hidden, head.weight)
    twin = Head(torch.cat([head.weight, head.weight]), None)
    best = logits.argmax(-1)
    for targets, top1 in ((best, 1.0), (best + 1000, 1.0), ((best + 1) % 1000, 0.0)):
        found = target_scores(hidden, targets, twin, [IS_TOP1], 1000).extras[IS_TOP1]
        assert found.tolist() == [top1] * 12


def test_extreme_distributions_stay_finite() -> None:
    """One word alone, or all alike; and the largest logit in the last tile, far above the first."""
    weight = torch.zeros(1000, 16)
    hidden, targets = torch.ones(9, 16), torch.zeros(9, dtype=torch.long)
    alike = target_scores(hidden, targets, Head(weight, None), EXTRAS, 300).extras
    torch.testing.assert_close(alike[ENTROPY], torch.full((9,), 1000.0).log())
    torch.testing.assert_close(alike[LOG_SUM_SQUARES], -torch.full((9,), 1000.0).log())
    for word in (0, 999):
        weight = torch.zeros(1000, 16)
        weight[word] = 40.0
        alone = target_scores(hidden, targets, Head(weight, None), EXTRAS, 300).extras
        assert alone[ENTROPY].abs().max() < 1e-6
        assert alone[LOG_SUM_SQUARES].abs().max() < 1e-6
        assert alone[IS_TOP1].tolist() == [float(word == 0)] * 9


@pytest.mark.parametrize("extras", [(), EXTRAS])
@pytest.mark.parametrize("grad", [False, True])
def test_there_is_never_a_logit_for_every_token_and_word(
    grad: bool, extras: tuple[str, ...]
) -> None:
    class Largest(TorchDispatchMode):  # type: ignore[no-untyped-call]
        numel = 0

        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                Largest.numel = max(Largest.numel, out.numel())
            return out

    hidden, targets, head = case(n=300, vocabulary=5000)
    hidden.requires_grad_(grad)
    with Largest():  # type: ignore[no-untyped-call]
        logprobs = target_scores(hidden, targets, head, extras, 500).logprobs
        if grad:
            torch.autograd.backward(logprobs.sum())
    assert 300 * 500 <= Largest.numel < 300 * 5000 / 4


def test_one_token_has_the_bits_it_has_among_others() -> None:
    hidden, targets, head = case(n=40)
    together = target_logprobs(hidden, targets, head)
    for i in (0, 7, 39):
        alone = target_logprobs(hidden[i : i + 1], targets[i : i + 1], head)
        torch.testing.assert_close(alone, together[i : i + 1], atol=1e-5, rtol=0)
