"""What a plan may say of training."""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, Field, field_validator, model_validator

from pipeline.plan.faults import SECTION, fault
from schemas import TrainingEvaluation, polars_schema


class _Section(BaseModel):
    model_config = SECTION


class LoraConfig(_Section):
    """Low-rank adapters (Hu et al. 2021, arXiv 2106.09685)."""

    rank: int = Field(default=16, ge=1)
    alpha: float = Field(default=32.0, gt=0)
    target_modules: str | list[str] = "all-linear"
    last_layers: int | None = Field(
        default=None,
        ge=1,
        description="Adapters in the last so many layers only, which costs less; null: in all.",
    )


class TrainingConfig(_Section):
    """Optimiser and schedule, shared by all objectives."""

    method: Literal["lora", "full"] = Field(
        default="lora", description="Adapters over the start model, or all of its weights."
    )
    epochs: float = Field(default=1.0, gt=0)
    max_steps: int | None = Field(default=None, ge=1, description="Ends training earlier.")
    batch_pairs: int = Field(default=8, ge=1, description="Pairs (or labels) per optimiser step.")
    batch_tokens: int | None = Field(
        default=None,
        ge=1,
        description="Tokens per optimiser step instead, prompts counted with every reply.",
    )
    learning_rate: float = Field(default=5e-5, gt=0)
    schedule: Literal["linear", "cosine", "constant_with_warmup", "constant"] = "linear"
    warmup_share: float = Field(default=0.1, ge=0, lt=1)
    weight_decay: float = Field(default=0.0, ge=0)
    adam_beta1: float = Field(default=0.9, ge=0, lt=1)
    adam_beta2: float = Field(default=0.999, ge=0, lt=1)
    adam_epsilon: float = Field(default=1e-8, gt=0)
    max_grad_norm: float = Field(default=1.0, gt=0)
    seed: int = Field(default=0, ge=0)
    reference_correction: Literal["auto", "never"] = Field(
        default="auto",
        description="Whether a reference scored in other numerics than the trainer's is brought "
        "into the trainer's, or refused.",
    )
    lora: LoraConfig = LoraConfig()
    where: str | None = Field(
        default=None,
        description="Which pairs of the training split are trained on: a condition in SQL over "
        "`pairs` and rewards (docs/selection.md); null: all.",
    )
    weight: str | None = Field(
        default=None,
        description="How much each of them counts beside the others of its step: a number above "
        "0 in SQL; null: all the same.",
    )
    retrain: Literal["always", "never"] | dict[str, int] = Field(
        default="always",
        description="Whether other data is a reason to train a policy anew: always, never, or "
        "{min_new_pairs: N}. A change of the plan always is.",
    )
    evaluate_every: int | None = Field(
        default=None,
        ge=1,
        description="Steps between evaluations on held-out pairs (or labels); null: none.",
    )
    evaluation_pairs: int | None = Field(
        default=None,
        ge=1,
        description="Held-out pairs (or labels) to evaluate on, the first by hash.",
    )
    best_metric: str = Field(
        default="eval_loss",
        description="What evaluations are compared by, a column of `training_evaluations`; of a "
        "loss less is better, of all else more.",
    )
    keep_best: bool = Field(
        default=False, description="Whether the policy has the best evaluation's weights."
    )
    patience: int | None = Field(
        default=None, ge=1, description="Ends training after so many evaluations without a better."
    )
    checkpoint_every: int = Field(default=25, ge=1, description="Steps between checkpoints.")
    keep_checkpoints: int = Field(default=2, ge=1, description="The last ones, beside the best.")
    gradient_checkpointing: bool = Field(
        default=False, description="Compute activations twice rather than keep them."
    )
    micro_batch_tokens: int | None = Field(
        default=None,
        ge=1,
        description="About how many tokens go through the model at once, a shared prompt counted "
        "once; null: what suits the device.",
    )
    threads: int | None = Field(
        default=None, ge=1, description="Copies of the model's modules; null: what suits a CPU."
    )
    processes: int = Field(default=1, ge=1, description="Started by torchrun, one a device.")
    fsdp: bool = Field(
        default=False,
        description="Whether the processes share one model, each a part of every layer (torch's "
        "fully_shard), or each holds all of it.",
    )
    token_statistics: bool = Field(
        default=False, description="Whether entropy and token accuracy are computed and logged."
    )
    log_to: list[Literal["tensorboard", "wandb"]] = Field(
        default=[], description="Experiment trackers, which must be installed."
    )

    @field_validator("best_metric")
    @classmethod
    def _metric_is_one(cls, name: str) -> str:
        metrics = [column for column in polars_schema(TrainingEvaluation) if "eval_" in column]
        if name not in metrics:
            raise ValueError(f"'{name}' is not one of {', '.join(metrics)}")
        return name

    @property
    def identity(self) -> dict[str, Any]:
        """What decides the weights, beyond rounding."""
        said = self.model_dump(exclude=_NOT_WEIGHTS)
        if not (self.keep_best or self.patience):
            said = {k: v for k, v in said.items() if k not in _EVALUATION}
        return said

    @field_validator("retrain", mode="before")
    @classmethod
    def _retrain_is_known(cls, given: Any) -> Any:
        match given:
            case "always" | "never":
                return given
            case {"min_new_pairs": int(n)} if len(given) == 1 and n >= 1 and n is not True:
                return given
        raise ValueError(
            f"{given!r} is not one of always, never, {{min_new_pairs: N}} with N at least 1"
        )

    @model_validator(mode="after")
    def _best_is_looked_for(self) -> "TrainingConfig":
        if (self.keep_best or self.patience) and self.evaluate_every is None:
            raise fault("evaluate_every", "keep_best and patience need evaluations")
        return self

    @model_validator(mode="after")
    def _sharded_is_one_copy(self) -> "TrainingConfig":
        if self.fsdp and self.processes > 1 and self.threads not in (None, 1):
            raise fault("threads", "with fsdp the processes share one copy of the model")
        return self


def require_shardable(training: TrainingConfig, dtypes: Mapping[str, str]) -> None:
    """Refuse to shard starts, given with their dtypes, whose loss would be scaled.

    Raises:
        pydantic_core.PydanticCustomError: names one.
    """
    for start, dtype in sorted(dtypes.items()):
        if training.fsdp and dtype == "float16":
            raise fault(
                "training.fsdp",
                f"the start '{start}' is float16, whose loss scale is one process's; use bfloat16",
            )


_EVALUATION = {"evaluate_every", "evaluation_pairs", "best_metric", "keep_best", "patience"}
# Whether a reference was corrected shows in its values.
_NOT_WEIGHTS = {
    *("reference_correction", "checkpoint_every", "keep_checkpoints", "gradient_checkpointing"),
    *("micro_batch_tokens", "threads", "processes", "fsdp", "log_to", "token_statistics"),
    # What they select shows in the values.
    *("where", "weight", "retrain"),
}
