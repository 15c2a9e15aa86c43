"""TRL's trainers without their constructors, over models that read log-probs from a table.

TRL computes DPO's and KTO's losses inside `_compute_loss`, between a model and its metrics. That
method is what runs here; nothing of TRL is copied.
"""

import os
from collections import defaultdict
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, ClassVar

import torch

from pipeline.losses import PairBatch

N_PROMPT, N_POSITIONS = 2, 12
N_SCORED = [[3, 9, 1, 6], [8, 2, 7, 6]]  # chosen, rejected
BETA = {"beta": 0.1}


class TableModel:
    """Log-probs [rows, positions - 1] in place of a model; a row's first token is its number."""

    training = True
    is_gradient_checkpointing = False
    _modules: ClassVar[dict[str, Any]] = {}

    def __init__(self, logprobs: torch.Tensor, squares: torch.Tensor) -> None:
        self.logprobs = logprobs
        self.squares = squares

    def __call__(
        self, input_ids: torch.Tensor, labels: torch.Tensor, **others: Any
    ) -> SimpleNamespace:
        scored = labels[:, 1:] != -100
        logprobs = torch.where(scored, self.logprobs[input_ids[:, 0]], 0.0)
        nothing = torch.zeros_like(logprobs)
        return SimpleNamespace(
            log_probs=logprobs,
            log_sum_sq_probs=self.squares[input_ids[:, 0]],
            entropy=nothing,
            mean_logits=nothing,
            is_top1=scored,
        )


@dataclass(frozen=True)
class Rows:
    """Tokens and log-probs of rows, 4 chosen, then 4 rejected, then 8 mismatched ones for KTO."""

    n: list[int]
    n_prompt: int
    policy: torch.Tensor
    reference: torch.Tensor
    squares: torch.Tensor
    """Log sum of squared probabilities per position, which WPO reads."""

    def sums(self, table: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """Sequence log-probs of rows, nats: a position scores the token after it."""
        first = max(self.n_prompt - 1, 0)
        scored = [self.n_prompt + n - 1 for n in self.n]
        return torch.stack([table[row, first : scored[row]].sum() for row in range(start, stop)])

    def batch(self, swap_reference: bool = False) -> PairBatch:
        chosen, rejected = (self.sums(self.reference, start, start + 4) for start in (0, 4))
        n = torch.tensor(self.n, dtype=torch.float64)
        return PairBatch(
            policy_chosen=self.sums(self.policy, 0, 4),
            policy_rejected=self.sums(self.policy, 4, 8),
            reference_chosen=rejected if swap_reference else chosen,
            reference_rejected=chosen if swap_reference else rejected,
            n_chosen=n[:4],
            n_rejected=n[4:8],
        )

    def kl(self) -> float:
        return (self.sums(self.policy, 8, 16) - self.sums(self.reference, 8, 16)).mean().item()

    def tokens(self, rows: list[int], prefix: str = "") -> dict[str, torch.Tensor]:
        """A collated batch of TRL's."""
        ids = torch.zeros(len(rows), N_POSITIONS, dtype=torch.long)
        ids[:, 0] = torch.tensor(rows)
        position = torch.arange(N_POSITIONS)
        ends = torch.tensor([self.n_prompt + self.n[row] for row in rows])
        mask = (position >= self.n_prompt) & (position < ends[:, None])
        return {
            f"{prefix}input_ids": ids,
            f"{prefix}attention_mask": torch.ones_like(ids),
            f"{prefix}completion_mask": mask.long(),
        }


def make_rows(
    kl_shift: float = 0.0,
    n_prompt: int = N_PROMPT,
    add: int = 0,
    *,
    spread: float = 1.0,
    dtype: torch.dtype = torch.float64,
) -> Rows:
    """Random rows; `kl_shift` nats per token raise the mismatched rows' log-ratio.

    `spread` widens all log-probs.
    """
    generator = torch.Generator().manual_seed(5)

    def table() -> torch.Tensor:
        shape = (16, N_POSITIONS - 1)
        return -4 * spread * torch.rand(shape, generator=generator, dtype=torch.float64)

    policy, reference = table(), table()
    reference[8:] -= kl_shift
    n = [n + add for side in N_SCORED for n in side] * 2
    tables = (table.to(dtype) for table in (policy, reference, table()))
    return Rows(n, n_prompt, *tables)


def _as_it_is(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


ACCELERATOR = SimpleNamespace(
    device=torch.device("cpu"), gather=_as_it_is, gather_for_metrics=_as_it_is
)


def bare(trainer: Any, **attributes: Any) -> Any:
    """A TRL trainer as its constructor would leave what the loss reads, and no more."""
    made = trainer.__new__(trainer)
    shared = {
        "accelerator": ACCELERATOR,
        "aux_loss_enabled": False,
        "precompute_ref_logps": True,
        "_metrics": {"train": defaultdict(list)},
        "_total_train_tokens": 0,
        "_tp_size": 1,
    }
    vars(made).update({**shared, **attributes})
    return made


def trl_dpo(
    rows: Rows, loss_type: str | list[str], **attributes: Any
) -> tuple[torch.Tensor, dict[str, Any]]:
    """DPOTrainer's loss of the 4 pairs, and what it logs; `attributes` are the trainer's."""
    from trl.trainer.dpo_trainer import DPOTrainer

    model = TableModel(rows.policy, rows.squares)
    settings = {
        "beta": BETA["beta"],
        "loss_types": [loss_type] if isinstance(loss_type, str) else loss_type,
        "loss_weights": [1.0],
        "label_smoothing": 0.0,
        "f_divergence_type": "reverse_kl",
        "ld_alpha": None,
        "use_weighting": False,
        "precompute_ref_logps": False,  # so that LD-DPO's reference is TRL's too
        "ref_model": TableModel(rows.reference, rows.squares),
        "args": SimpleNamespace(gradient_checkpointing_kwargs=None, discopop_tau=0.4),
    }
    trainer = bare(DPOTrainer, model=model, **{**settings, **attributes})
    inputs = rows.tokens(list(range(8)))
    return trainer._compute_loss(model, inputs, False), trainer._metrics["train"]


def gradient(loss: torch.Tensor, rows: Rows) -> torch.Tensor:
    (found,) = torch.autograd.grad(loss, rows.policy)
    return found


def cpo_trainer(**attributes: Any) -> Any:
    """TRL's CPOTrainer, whose `cpo_loss` is of log-probs alone."""
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    from trl.experimental.cpo import CPOTrainer

    return bare(CPOTrainer, **{"alpha": 0.0, "label_smoothing": 0.0, **attributes})
