"""Training reads the same forward pass: its gradients, tensor by tensor."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from pipeline.models import Checkpoint
from pipeline.scoring.engines.base import Group
from pipeline.scoring.engines.forward import Forward
from pipeline.scoring.engines.forward import model as model_module
from pipeline.scoring.engines.forward.vocabulary import KeptGradient, keep_gradients
from scoring.forward.families import FAMILIES, LAYOUTS, build, loaded, some_groups


def weighted(rows: list[torch.Tensor]) -> torch.Tensor:
    """A loss in which every sequence has a weight of its own."""
    total = rows[0].new_zeros(())
    for i, row in enumerate(rows):
        total = total + row.sum() * (0.5 - i % 3)
    return total


def plain_float64(checkpoint: Checkpoint, groups: list[Group]) -> dict[str, torch.Tensor]:
    """The oracle: one sequence at a time, a whole log_softmax."""
    model: Any = AutoModelForCausalLM.from_pretrained(
        checkpoint.path,
        dtype=torch.float64,
        attn_implementation="eager",
        experts_implementation="eager",
    )
    rows = []
    for group in groups:
        for c in group.completions:
            ids = torch.tensor([[*group.prompt_ids.tolist(), *c.ids.tolist()]])
            logprobs = torch.log_softmax(model(input_ids=ids).logits[0, :-1], -1)
            of_ids = logprobs.gather(1, ids[0, 1:, None])[:, 0]
            rows.append(of_ids[len(group.prompt_ids) - 1 :][torch.from_numpy(c.scored)])
    torch.autograd.backward(weighted(rows))
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(
    "name", ["llama", "qwen3", "gemma2", "gpt2", "phi", "cohere with scaled logits", "mixtral"]
)
def test_gradients_of_every_tensor_are_those_of_float64(
    name: str, attention: str, layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = build(tmp_path, FAMILIES[name])
    monkeypatch.setattr(model_module, "layout_of", LAYOUTS[layout])
    model = loaded(checkpoint, attention)
    forward, groups = Forward(model), some_groups(1, n=2)
    assert forward.sharing.shared
    loss = weighted([row for group in forward.logprobs(groups) for row in group])
    torch.autograd.backward(loss)
    expected = plain_float64(checkpoint, groups)
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys()
    for tensor, gradient in expected.items():
        scale = gradient.abs().max()
        error = (found[tensor].double() - gradient).abs().max()
        assert error <= 2e-3 * scale + 1e-6, f"{tensor}: {error:.1e} of {scale:.1e}"


def backward_group_by_group(forward: Forward, groups: list[Group]) -> None:
    """The gradient of `weighted` over all groups, from a pass for each."""
    n_before = 0
    for group in groups:
        (rows,) = forward.logprobs([group])
        nothing = [row.new_zeros(1) for row in rows[:1] * n_before]
        torch.autograd.backward(weighted([*nothing, *rows]))
        n_before += len(rows)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", ["llama", "gemma2", "gemma3", "gpt2", "phi"])
def test_gradients_over_the_vocabulary_keep_their_memory(
    name: str, tied: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    groups = some_groups(1, n=2)
    padding = int(groups[0].prompt_ids[3])  # its embedding has no gradient
    checkpoint = build(tmp_path, FAMILIES[name], pad_token_id=padding, tie_word_embeddings=tied)
    expected = plain_float64(checkpoint, groups)
    model = loaded(checkpoint)
    forward = Forward(model)
    keep_gradients(model)
    weight = model.get_output_embeddings().weight
    assert (weight is model.get_input_embeddings().weight) == tied
    places = set()
    for _ in range(2):
        model.zero_grad(set_to_none=True)
        backward_group_by_group(forward, groups)
        places.add(weight.grad.data_ptr())
        for tensor, gradient in expected.items():
            found = model.get_parameter(tensor).grad
            error = (found.double() - gradient).abs().max()
            assert error <= 2e-3 * gradient.abs().max() + 1e-6, tensor
    assert len(places) == 1

    real = KeptGradient.begin
    monkeypatch.setattr(KeptGradient, "begin", lambda kept: (real(kept)[0], True))
    model.zero_grad(set_to_none=True)
    backward_group_by_group(forward, groups)
    right = next(expected[n] for n, p in model.named_parameters() if p is weight)
    wrong = (weight.grad.double() - right).abs().max()
    assert wrong > 0.1 * right.abs().max(), "the control: written over"
