"""One model shared among the processes: torch's fully_shard, layer by layer.

A process holds its rows of every weight, of its gradient and of AdamW's moments; a layer is whole
only while it computes. accelerate's own way is not taken: it has none for a CPU, and enters the
model by its `forward` alone.
"""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, cast

from pipeline.errors import TrainingError
from pipeline.scoring.engines.forward import Within

if TYPE_CHECKING:
    import torch
    from torch.distributed.device_mesh import DeviceMesh


def shard(model: Any, mesh: "DeviceMesh", dtype: "torch.dtype | None") -> Within:
    """Leave this process its rows of a model's weights, on the mesh's device.

    Gradients are added over the processes, in float32, as they are made. All processes must make
    equally many passes: each gathers what the others hold.

    Args:
        model: a model of transformers or a PEFT model over one, the same in every process.
        mesh: the processes, in one dimension.
        dtype: what weights are gathered and multiplied in; None for their own.

    Returns:
        What a pass over the model is made within.

    Raises:
        TrainingError: the model does not name its layers, or has weights that cannot be cut.
    """
    import torch
    from torch.distributed.fsdp import (
        FSDPModule,
        MixedPrecisionPolicy,
        fully_shard,
        register_fsdp_forward_method,
    )

    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    kinds = set(inner._no_split_modules or ())  # what accelerate shards by, too
    layers = [module for module in model.modules() if type(module).__name__ in kinds]
    if not layers:
        raise TrainingError(
            f"before step 1: training.fsdp: {type(inner).__name__} does not say what its layers are"
        )
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    try:
        for module in (*layers, model):
            # The outermost too: what a pass without a gradient left whole would be stale after the
            # next update.
            fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    except ValueError as error:  # a weight without dimensions
        raise TrainingError(f"before step 1: training.fsdp: {error}") from error
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # A share is of the whole step already: a sum, not torch's mean.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    model.run_within = _call
    register_fsdp_forward_method(model, "run_within")
    return cast(Within, model.run_within)


def _call(work: Callable[[], Any]) -> Any:
    return work()


def local(tensor: "torch.Tensor") -> "torch.Tensor":
    """This process's rows of a sharded tensor; another as it is."""
    from torch.distributed.tensor import DTensor

    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: "torch.Tensor") -> "torch.Tensor":
    """All rows of a sharded tensor, in which all processes must take part; another as it is."""
    from torch.distributed.tensor import DTensor

    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gathered(tensors: "Mapping[str, torch.Tensor]", keep: bool) -> "dict[str, torch.Tensor]":
    """Whole tensors on the CPU, where they are kept: one process's memory need not hold them all.

    All processes must take part.
    """
    kept = {}
    for name, tensor in tensors.items():
        found = whole(tensor.detach())
        if keep:
            kept[name] = found.cpu().contiguous()
    return kept


def put(tensor: "torch.Tensor", values: "torch.Tensor") -> None:
    """Copy a whole tensor into another, or this process's rows of it into its shard."""
    import torch
    from torch.distributed.tensor import DTensor

    if isinstance(tensor, DTensor):
        rows = torch.chunk(values, tensor.device_mesh.size())  # as fully_shard cuts
        which = tensor.device_mesh.get_local_rank()
        if which < len(rows):
            tensor.to_local().copy_(rows[which])
    else:
        tensor.copy_(values)
