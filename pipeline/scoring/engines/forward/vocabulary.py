"""Gradients of the matrices over the vocabulary, in memory that is kept.

They are a model's largest, and autograd takes new memory for each of them in every step, which a C
library gets from the system, zeros and gives back: for the output layer, for the embedding, and
where the two are one matrix both are there at once to be added. Here the output layer's is written
where the last step's was, and the embedding's is added to it in place.
"""

from functools import cache, partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


class KeptGradient:
    """The memory of a weight's gradient. That is `weight.grad` as ever, which may be dropped."""

    def __init__(self, weight: "torch.nn.Parameter") -> None:
        self._weight = weight
        self._memory: torch.Tensor | None = None

    def begin(self) -> "tuple[torch.Tensor, bool]":
        """The gradient to add to, and whether all of it is to be written over first."""
        import torch

        if self._weight.grad is not None:
            return self._weight.grad, False
        if self._memory is None:
            self._memory = torch.empty_like(self._weight)
        self._weight.grad = self._memory
        return self._memory, True


def keep_gradients(model: Any) -> None:
    """Have a model's output layer keep the memory of its gradient, if it is trained.

    The model's gradients must not be watched by hooks on its parameters, as FSDP's are: these are
    not called.
    """
    import torch

    output: Any = model.get_output_embeddings()
    embedding = model.get_input_embeddings()
    trained: bool = type(output) is torch.nn.Linear and output.weight.requires_grad
    if not trained:
        return
    kept = KeptGradient(output.weight)
    output.kept_gradient = kept
    plain = type(embedding) is torch.nn.Embedding and not (
        embedding.sparse or embedding.scale_grad_by_freq or embedding.max_norm is not None
    )
    if plain and embedding.weight is output.weight:
        embedding.forward = partial(_embed, embedding, kept)


def _embed(embedding: Any, kept: KeptGradient, ids: "torch.Tensor") -> "torch.Tensor":
    found: torch.Tensor = _function().apply(ids, embedding.weight, embedding.padding_idx, kept)
    return found


@cache
def _function() -> Any:
    """The autograd function, made when torch is loaded."""
    import torch

    class Embedding(torch.autograd.Function):
        @staticmethod
        def forward(
            ctx: Any,
            ids: torch.Tensor,
            weight: torch.Tensor,
            padding: int | None,
            kept: KeptGradient,
        ) -> torch.Tensor:
            ctx.save_for_backward(ids)
            ctx.how = padding, kept
            return torch.nn.functional.embedding(ids, weight, padding)

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> tuple[None, None, None, None]:
            padding, kept = ctx.how
            ids, rows = ctx.saved_tensors[0].flatten(), grad.flatten(0, -2)
            if padding is not None:  # its row has no gradient, as torch has it
                rows, ids = rows[ids != padding], ids[ids != padding]
            total, anew = kept.begin()
            if anew:
                total.zero_()
            total.index_add_(0, ids, rows)
            return None, None, None, None

    return Embedding
