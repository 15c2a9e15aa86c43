"""The tiled head: float64's numbers, its gradients, and never a whole row of logits."""

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.scoring.engines.forward.head import Head, target_logprobs

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


def expected(hidden: torch.Tensor, targets: torch.Tensor, head: Head) -> torch.Tensor:
    logits = hidden.double() @ head.weight.double().T
    if head.bias is not None:
        logits = logits + head.bias.double()
    logits = logits * head.scale
    if head.cap is not None:
        logits = head.cap * torch.tanh(logits / head.cap)
    return torch.log_softmax(logits, -1).gather(1, targets[:, None])[:, 0]


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


@pytest.mark.parametrize("grad", [False, True])
def test_there_is_never_a_logit_for_every_token_and_word(grad: bool) -> None:
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
        logprobs = target_logprobs(hidden, targets, head, 500)
        if grad:
            torch.autograd.backward(logprobs.sum())
    assert 300 * 500 <= Largest.numel < 300 * 5000 / 4


def test_one_token_has_the_bits_it_has_among_others() -> None:
    hidden, targets, head = case(n=40)
    together = target_logprobs(hidden, targets, head)
    for i in (0, 7, 39):
        alone = target_logprobs(hidden[i : i + 1], targets[i : i + 1], head)
        torch.testing.assert_close(alone, together[i : i + 1], atol=1e-5, rtol=0)
