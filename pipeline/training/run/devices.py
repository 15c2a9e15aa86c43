"""The devices training runs on, by accelerate: one, or one for each process of torchrun.

Every process computes every n-th example of a step. It holds the whole model, and gradients are
added before the update, so that all make the same one; or its share of a model that is sharded.
"""

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pipeline.errors import TrainingError
from pipeline.plan import TrainingConfig
from pipeline.scoring.engines.forward import Within
from pipeline.scoring.engines.torch_engine import torch_device
from pipeline.training.run.sharding import shard, whole

if TYPE_CHECKING:
    import torch

_T = TypeVar("_T")
_PRECISION = {"float32": "no", "bfloat16": "bf16", "float16": "fp16"}


class Devices:
    """This process's device, and what it says to the others.

    Args:
        config: `log_to`, `fsdp`.
        dtype: what matrices are multiplied in on a GPU; a CPU has float32.
        name: what an experiment tracker calls the run.
        logs: where one that writes files puts them.

    Raises:
        TrainingError: a tracker of `log_to` is not installed, or cannot be started.
    """

    def __init__(
        self,
        config: TrainingConfig,
        dtype: str = "float32",
        name: str = "",
        logs: Path | None = None,
    ) -> None:
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState
        from accelerate.utils import ProjectConfiguration

        _require_trackers(config.log_to)
        device = torch_device()
        self.on_cpu = device.type == "cpu"
        precision = "no" if self.on_cpu else _PRECISION[dtype]
        if AcceleratorState._shared_state and AcceleratorState().mixed_precision != precision:
            AcceleratorState._reset_state()  # another policy's, in this process
        self._accelerator = Accelerator(
            cpu=self.on_cpu,
            mixed_precision=precision,
            log_with=list(config.log_to) or None,
            project_config=ProjectConfiguration(logging_dir=str(logs)),
        )
        self.device: torch.device = self._accelerator.device
        self._half = None if precision == "no" else dtype
        self.shards = config.fsdp and self.n_processes > 1
        self._logs = bool(config.log_to)
        if self._logs:
            try:
                self._accelerator.init_trackers("logratio", init_kwargs={"wandb": {"name": name}})
            except Exception as error:  # of any class: a tracker's own
                raise TrainingError(f"before step 1: training.log_to: {error}") from error

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes."""
        return bool(self._accelerator.is_main_process)

    @property
    def n_processes(self) -> int:
        """How many there are."""
        return int(self._accelerator.num_processes)

    def mine(self, n: int) -> range:
        """Which of n examples this process computes."""
        return range(self._accelerator.process_index, n, self.n_processes)

    def gather(self, of_this: list[_T]) -> list[_T]:
        """Every process's items, in the order of processes."""
        if self.n_processes == 1:
            return of_this
        import torch

        # accelerate's gather_object wants as many items of each.
        gathered: list[list[_T]] = [[] for _ in range(self.n_processes)]
        torch.distributed.all_gather_object(gathered, of_this)
        return [item for of_one in gathered for item in of_one]

    def in_order(self, gathered: Sequence[_T], n: int) -> list[_T]:
        """What `gather` gave, in the examples' order."""
        order = [i for first in range(self.n_processes) for i in range(first, n, self.n_processes)]
        by_example = dict(zip(order, gathered, strict=True))
        return [by_example[i] for i in range(n)]

    def require_agreed(self, what: str, of_this: object) -> None:
        """Refuse to go on where the processes do not have the same.

        Raises:
            TrainingError: says what each has.
        """
        said = self.gather([of_this])
        if any(one != said[0] for one in said):
            listed = ", ".join(f"process {i}: {one}" for i, one in enumerate(said))
            raise TrainingError(f"the processes do not agree on {what} ({listed})")

    def sum_gradients(self, parameters: "Iterable[torch.nn.Parameter]") -> None:
        """Add up all processes' gradients; those without any take part with zeros.

        A sharded model's are added as they are made.
        """
        if self.n_processes == 1 or self.shards:
            return
        import torch

        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            torch.distributed.all_reduce(parameter.grad)

    def shard(self, model: Any) -> Within | None:
        """Share a model among the processes; None where each is to hold all of it.

        Raises:
            TrainingError: see `sharding.shard`.
        """
        if not self.shards:
            return None
        import torch
        from torch.distributed.device_mesh import init_device_mesh

        mesh = init_device_mesh(self.device.type, (self.n_processes,))
        return shard(model, mesh, None if self._half is None else getattr(torch, self._half))

    def autocast(self) -> AbstractContextManager[Any]:
        """Half precision inside the block, where it was asked for.

        A sharded model's weights are gathered in it: autocast's own copies of them would be whole
        until the way back.
        """
        if self.shards:
            return nullcontext()
        context: AbstractContextManager[Any] = self._accelerator.autocast()
        return context

    def prepare(self, optimiser: "torch.optim.Optimizer") -> Any:
        """The optimiser with float16's loss scale."""
        return self._accelerator.prepare_optimizer(optimiser)

    @property
    def skips_overflow(self) -> bool:
        """Whether an infinite gradient lowers the loss scale and is skipped (float16)."""
        return self._accelerator.scaler is not None

    def scale(self, loss: "torch.Tensor") -> "torch.Tensor":
        """The loss times the loss scale (float16)."""
        scaler = self._accelerator.scaler
        return loss if scaler is None else scaler.scale(loss)

    def clip(self, parameters: "list[torch.nn.Parameter]", most: float) -> float:
        """Bound the gradients' norm; returns what it was. Undoes the loss scale."""
        return float(whole(self._accelerator.clip_grad_norm_(parameters, most)))

    def scale_state(self) -> dict[str, Any]:
        """The loss scale's state, as JSON has it."""
        scaler = self._accelerator.scaler
        return {} if scaler is None else scaler.state_dict()

    def load_scale(self, state: dict[str, Any]) -> None:
        """Put the loss scale back."""
        if self._accelerator.scaler is not None and state:
            self._accelerator.scaler.load_state_dict(state)

    def log(self, row: dict[str, Any], step: int) -> None:
        """A step's numbers to the experiment trackers of `training.log_to`.

        Raises:
            TrainingError: one cannot take them.
        """
        if not self._logs:
            return
        numbers = {k: v for k, v in row.items() if v is not None and k != "step"}
        try:
            self._accelerator.log(numbers, step=step)
        except Exception as error:  # of any class: a tracker's own
            raise TrainingError(f"step {step}: training.log_to: {error}") from error

    def first_alone(self) -> AbstractContextManager[Any]:
        """The first process is inside the block before the others enter it."""
        context: AbstractContextManager[Any] = self._accelerator.main_process_first()
        return context

    def wait(self) -> None:
        """Until all processes are here."""
        self._accelerator.wait_for_everyone()

    def close(self) -> None:
        """End what the trackers have open, and the group of processes."""
        self._accelerator.end_training()


def _require_trackers(names: Sequence[str]) -> None:
    """Refuse what accelerate leaves out with no more than a word in its debug log.

    Raises:
        TrainingError: names the missing package.
    """
    from accelerate.tracking import get_available_trackers

    there = {str(tracker) for tracker in get_available_trackers()}
    for name in names:
        if name not in there:
            raise TrainingError(
                f"before step 1: training.log_to: the package {name} is not installed"
            )
