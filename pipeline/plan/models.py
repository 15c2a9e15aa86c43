"""What a plan may say of a model and of how it is run."""

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, Field

from pipeline.plan.faults import SECTION


class _Section(BaseModel):
    model_config = SECTION


class VllmConfig(_Section):
    """How vLLM runs a model; torch does not read it."""

    head_dtype: Literal["float32", "model"] = Field(
        default="float32", description="Of the logits; `model` is the body's dtype."
    )
    prefix_reuse: bool = Field(
        default=True, description="Compute a prompt once for all its completions."
    )
    block_size: int | None = Field(
        default=None,
        ge=1,
        description="Tokens per cache block; null: 32 on a CPU, elsewhere vLLM's choice.",
    )
    attention_backend: str | None = Field(default=None, description="null: vLLM's own choice.")
    enforce_eager: bool = True
    tensor_parallel: int = Field(default=1, ge=1)
    pipeline_parallel: int = Field(default=1, ge=1)
    max_batched_tokens: int = Field(default=8192, ge=64, description="Per step of the engine.")
    gpu_memory_utilization: float = Field(default=0.85, gt=0, le=1)
    cpu_kv_cache_gib: float = Field(default=2.0, gt=0, description="On a CPU only.")


class ModelConfig(_Section):
    """A checkpoint (directory, hub id or `packaged:smollm2-135m-instruct`) and its numerics."""

    checkpoint: str = Field(min_length=1)
    adapter: Path | None = None
    engine: Literal["auto", "torch", "vllm"] = Field(
        default="auto", description="auto: vLLM in half precision where CUDA is, else torch."
    )
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    attention: Literal["sdpa", "eager"] = "sdpa"
    vllm: VllmConfig = VllmConfig()
