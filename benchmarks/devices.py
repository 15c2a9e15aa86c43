"""What timings and memory mean on the device that is there."""

import resource


def synchronise() -> None:
    """Wait for what a GPU was given to do."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def hide_gpus() -> dict[str, str]:
    """For a process's environment: it is to find none."""
    return {"CUDA_VISIBLE_DEVICES": ""}


def peak_mib() -> float:
    """The most memory this process had: of a GPU if there is one, else resident.

    Of a GPU it is what tensors took, without what torch keeps for later and CUDA's own.
    """
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def device_name() -> str:
    """For the report."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
