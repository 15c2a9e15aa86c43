"""What timings and memory mean on the device that is there."""

import resource

from pipeline.scoring.engines.torch_engine import found_device_class


def synchronise() -> None:
    """Wait for what a GPU was given to do."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def device_of(asked: str) -> tuple[str, dict[str, str]]:
    """The class of the device that `auto` or `cpu` means, and a process's environment for it."""
    if asked == "cpu":
        return "cpu", {"CUDA_VISIBLE_DEVICES": ""}
    return found_device_class(), {}


def peak_mib() -> float:
    """The most memory this process had: of a GPU if there is one, else resident.

    Of a GPU it is what tensors took, without what torch keeps for later and CUDA's own.
    """
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
