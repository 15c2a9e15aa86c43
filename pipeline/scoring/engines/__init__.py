"""The engines, by the name a plan gives them. torch and vllm are loaded when one is opened."""

from dataclasses import dataclass

from pipeline.models import Checkpoint
from pipeline.plan import ModelConfig, ScoringConfig
from pipeline.scoring.engines.base import Engine, Numerics
from pipeline.scoring.engines.torch_engine import TorchEngine, found_device_class, torch_numerics
from pipeline.scoring.engines.vllm_adapter import refuse_float32
from pipeline.scoring.engines.vllm_engine import VllmEngine, vllm_numerics

CPU_CALL_TOKENS = 1024
"""Tokens handed to vLLM on a CPU at once: a few seconds' work, so that a bar moves."""


@dataclass(frozen=True)
class Batching:
    """How a pass is cut up; nothing here changes an id.

    Attributes:
        commit_rows: sequences per committed part.
        batch_tokens: as `Engine.score` takes it.
        call_tokens: tokens of the groups handed to the engine at once.
    """

    commit_rows: int
    batch_tokens: int
    call_tokens: int


def engine_of(config: ModelConfig) -> str:
    """`torch` or `vllm`; `auto` is vLLM in half precision where CUDA is.

    In float32 it is torch: vLLM has no kernels there for adapters, and what trains is torch too.
    """
    if config.engine != "auto":
        return config.engine
    return "torch" if found_device_class() == "cpu" or config.dtype == "float32" else "vllm"


def require_adapters(config: ModelConfig) -> None:
    """Refuse a model under which a trained adapter could not be scored.

    Raises:
        ModelError: it is run by vLLM in float32 on a GPU.
    """
    if engine_of(config) == "vllm":
        refuse_float32(config.dtype, found_device_class())


def numerics_of(config: ModelConfig, checkpoint: Checkpoint) -> Numerics:
    """What the engine's numbers will depend on, without loading the model."""
    if engine_of(config) == "torch":
        return torch_numerics(config, checkpoint)
    return vllm_numerics(config, checkpoint)


def open_engine(config: ModelConfig, checkpoint: Checkpoint, longest: int) -> Engine:
    """Load the model; `longest` is the length of the longest sequence that will come.

    Raises:
        ModelError: the model cannot be loaded.
    """
    if engine_of(config) == "torch":
        return TorchEngine(config, checkpoint, longest)
    return VllmEngine(config, checkpoint, longest)


def batching_of(settings: ScoringConfig, numerics: Numerics) -> Batching:
    """The plan's settings, with what suits engine and device where it leaves them open."""
    on_cpu = numerics.device_class == "cpu"
    batch_tokens = settings.batch_tokens
    if batch_tokens is None:
        batch_tokens = 1024 if on_cpu and numerics.engine != "vllm" else 8192
    commit_rows = settings.commit_rows or (64 if on_cpu else 2048)
    # Several batches at once, to be divided among cores.
    call_tokens = 8 * batch_tokens if on_cpu else batch_tokens
    # vLLM batches what it is given by itself, so on a GPU it gets a whole part.
    if numerics.engine == "vllm":
        call_tokens = CPU_CALL_TOKENS if on_cpu else 1 << 40
    return Batching(commit_rows, batch_tokens, call_tokens)
