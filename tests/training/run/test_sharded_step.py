"""The gradient of a step over a sharded model, in one process that holds every shard.

What two processes make of it is in `test_sharding`; here are half precision and GPUs.
"""

from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import pytest
import torch
from support import build_tiny_model, measured
from torch import distributed
from torch._C._distributed_c10d import HashStore
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from pipeline.models import Checkpoint
from pipeline.plan import LoraConfig, ModelConfig, ObjectiveConfig, TrainingConfig
from pipeline.scoring.engines.base import Completion
from pipeline.training.data.examples import Example
from pipeline.training.run.model import trainable_model
from pipeline.training.run.replicas import Replicas
from pipeline.training.run.sharding import gathered, local, put, shard
from pipeline.training.run.step import Work, run_step

Gradients = dict[str, torch.Tensor]
CPU = torch.device("cpu")


@pytest.fixture(
    params=["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.timeout(300)])]
)
def mesh(request: pytest.FixtureRequest) -> Iterator[DeviceMesh]:
    backend = {"cpu": "gloo", "cuda": "nccl"}[request.param]
    distributed.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
    yield init_device_mesh(request.param, (1,))
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    path = tmp_path_factory.mktemp("tied")
    return Checkpoint(build_tiny_model(path, tie_word_embeddings=True, num_hidden_layers=3))


def examples() -> list[Example]:
    draw = np.random.default_rng(3)

    def ids(n: int) -> np.ndarray:
        return draw.integers(3, 300, n).astype(np.int32)

    def reply(name: str, n: int) -> Completion:
        return Completion(name, ids(n), ((0, n),))

    return [
        Example(str(i), ids(9 + i), (reply(f"{i}+", 7 + i), reply(f"{i}-", 12 - i)), (-40.0, -70.0))
        for i in range(5)
    ]


def stepped(
    start: Checkpoint,
    config: TrainingConfig,
    mesh: DeviceMesh,
    half: torch.dtype | None = None,
    *,
    sharded: bool,
) -> tuple[Gradients, list[float]]:
    """Whole gradients by name, and the examples' losses."""
    dtype: Literal["float32", "bfloat16"] = "float32" if half is None else "bfloat16"
    numerics = ModelConfig(checkpoint=str(start.path), engine="torch", dtype=dtype)
    device = torch.device(mesh.device_type)
    model = trainable_model(start, numerics, config, CPU if sharded else device)
    within = shard(model, mesh, half) if sharded else None
    objective = ObjectiveConfig.model_validate(
        {"loss": "dpo", "beta": 0.1, "reference": "base", "start": "base"}
    )
    work = Work(examples(), 1, range(5), {})
    autocast = half is not None and not sharded
    with (
        Replicas(model, 1, within) as replicas,
        torch.autocast(device.type, half, enabled=autocast),
    ):
        result = run_step(replicas, work, objective, 40, lambda *_: None)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert {p.dtype for p in trained.values()} == {torch.float32}
    found = {n: p.grad for n, p in trained.items() if p.grad is not None}
    losses = [numbers["loss"] or 0.0 for numbers in result.seen]
    return gathered(found, keep=True), losses


def distance(found: Gradients, expected: Gradients) -> float:
    assert found.keys() == expected.keys()
    flat = [torch.cat([of[n].double().flatten() for n in expected]) for of in (found, expected)]
    return float((flat[0] - flat[1]).norm() / flat[1].norm())


METHODS: dict[str, Any] = {
    "full": {"method": "full"},
    "full, checkpointed": {"method": "full", "gradient_checkpointing": True},
    "lora": {"lora": LoraConfig(rank=4)},
}


@pytest.mark.parametrize("method", METHODS)
def test_it_is_that_of_a_whole_model(start: Checkpoint, mesh: DeviceMesh, method: str) -> None:
    config = TrainingConfig(**METHODS[method])
    exact, losses = stepped(start, config, mesh, sharded=False)
    found, seen = stepped(start, config, mesh, sharded=True)
    assert distance(found, exact) < 1e-5
    assert seen == pytest.approx(losses, abs=1e-5)
    half, _ = stepped(start, config, mesh, torch.bfloat16, sharded=False)
    gathered_in_half, seen = stepped(start, config, mesh, torch.bfloat16, sharded=True)
    near, autocast = distance(gathered_in_half, exact), distance(half, exact)
    measured(
        f"{method}, bfloat16 on {mesh.device_type}: gradients within {near:.3f} of float32's, "
        f"under autocast {autocast:.3f}"
    )
    assert 1e-4 < near < max(0.1, 2 * autocast), "half precision, and no worse than autocast's"
    assert seen == pytest.approx(losses, abs=0.1)


def test_rows_are_put_where_they_belong(mesh: DeviceMesh) -> None:
    layer = torch.nn.Linear(3, 5, bias=False)
    values = torch.arange(15.0).view(5, 3)
    torch.distributed.fsdp.fully_shard(layer, mesh=mesh)
    with torch.no_grad():
        put(layer.weight, values)
    assert local(layer.weight).equal(values.to(mesh.device_type))
    assert gathered({"weight": layer.weight}, keep=True)["weight"].equal(values)
    assert gathered({"weight": layer.weight}, keep=False) == {}
