"""vLLM's `LLM` on the V2 model runner, which needs a GPU, as its source (0.32) says it behaves.

Real here: `SamplingParams` with its validation, the errors, `RequestOutput`, `FlatLogprobs`, the
check of an adapter, the names of `LLM`'s arguments, and the V2 runner's own book-keeping of
prompt log-probs by id, with torch in place of its Triton kernel. Rebuilt here: validation of a
request, the prefix cache, chunked prefill, and the ways in which an engine is lost. The numbers
come from transformers.

vLLM is imported inside functions: its import changes this process's environment, and the engine
under test must be the one to import it, so that it can take that back.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from itertools import chain
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

if TYPE_CHECKING:
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest
    from vllm.outputs import RequestOutput

JUNK = -123.0
"""What stands in rows the V1 runner did not compute; there it is stale memory."""


@dataclass
class Asked:
    """A request that was computed."""

    ids: list[int]
    adapter: str | None
    may_read_cache: bool
    cached: int


@dataclass
class Call:
    """One `generate`: what it computed, and whether rows with and without an adapter met."""

    rows: list[Asked] = field(default_factory=list)
    mixed: bool = False


@dataclass
class Faults:
    """What goes wrong in an engine, and when.

    Attributes:
        dies_of: of the ids of all rows of a call, whether the engine core is lost over them.
        answers: changes an answer on its way out.
        reset_fails: blocks are still in use when the cache is to be emptied.
        dies_idle: the engine core is lost between two calls; set it when it should be.
    """

    dies_of: Callable[[list[list[int]]], bool] = lambda rows: False
    answers: Callable[["RequestOutput"], Any] = lambda output: output
    reset_fails: bool = False
    dies_idle: bool = False


DEFAULT_BLOCK = 16
"""Tokens per cache block where a caller leaves it to vLLM."""


class FakeLLM:
    """Takes the arguments of `LLM`; see the module."""

    def __init__(self, arguments: dict[str, Any], faults: Faults | None = None) -> None:
        from vllm.engine.arg_utils import EngineArgs

        known = {f.name for f in fields(EngineArgs)} | {"use_tqdm_on_load"}
        if unknown := arguments.keys() - known:
            raise TypeError(f"EngineArgs got an unexpected keyword argument {unknown}")
        if arguments.get("max_num_seqs", 0) > arguments["max_num_batched_tokens"]:
            raise ValueError("max_num_batched_tokens must be greater than or equal to max_num_seqs")
        self.arguments = arguments
        self.faults = faults or Faults()
        self.calls: list[Call] = []
        self.resets = 0
        self.shut_down = False
        dtype = getattr(torch, arguments["dtype"])
        self._base = AutoModelForCausalLM.from_pretrained(arguments["model"], dtype=dtype).eval()
        self._adapted: PeftModel | None = None
        self._refuse_too_long_a_context()
        head = arguments.get("hf_overrides", {}).get("head_dtype", "model")
        self._head_dtype = dtype if head == "model" else getattr(torch, head)
        self._v2 = os.environ.get("VLLM_USE_V2_MODEL_RUNNER", "1") != "0"
        self._cache: set[tuple[str | None, tuple[int, ...]]] = set()
        self._wedged_by = ""
        self._dead = False
        self.model_config = SimpleNamespace(
            dtype=dtype,
            head_dtype=self._head_dtype,
            logprobs_mode="raw_logprobs",
            max_logprobs=20,
            max_model_len=arguments["max_model_len"],
            get_vocab_size=lambda: self._base.config.vocab_size,
            is_diffusion=False,
        )
        self.llm_engine = SimpleNamespace(
            vllm_config=SimpleNamespace(
                use_v2_model_runner=self._v2, model_config=self.model_config
            ),
            engine_core=SimpleNamespace(shutdown=self._shut_down),
            add_lora=self._add_lora,
        )

    @property
    def mixed(self) -> bool:
        """Whether rows with and without an adapter ever met in a call."""
        return any(call.mixed for call in self.calls)

    def reset_prefix_cache(self) -> bool:
        """As vLLM's: False where blocks are not free yet."""
        self._alive()
        if self.faults.reset_fails:
            return False
        self.resets += 1
        self._cache.clear()
        return True

    def generate(
        self,
        prompts: Sequence[dict[str, Any]],
        sampling_params: "Sequence[SamplingParams]",
        *,
        use_tqdm: bool = True,
        lora_request: "LoRARequest | list[LoRARequest | None] | None" = None,
    ) -> list[Any]:
        """As vLLM's: in the order asked; one refused request takes the whole call along."""
        from vllm.v1.engine.exceptions import EngineDeadError

        self._alive()
        assert not use_tqdm, "vLLM would draw its own bar over ours"
        if len(sampling_params) != len(prompts):
            raise ValueError("The lengths of prompts and params must be the same.")
        adapters = lora_request if isinstance(lora_request, list) else [lora_request] * len(prompts)
        for prompt, params, adapter in zip(prompts, sampling_params, adapters, strict=True):
            self._validate(prompt["prompt_token_ids"], params, adapter)
        ids = [prompt["prompt_token_ids"] for prompt in prompts]
        if self.faults.dies_of(ids):
            self._dead = True
            raise EngineDeadError
        call = Call(mixed=len({adapter is None for adapter in adapters}) > 1)
        self.calls.append(call)
        outputs = []
        for i, (row, params, adapter) in enumerate(
            zip(ids, sampling_params, adapters, strict=True)
        ):
            if adapter is not None:
                self._load_adapter(adapter)
            cached = self._read_cache(row, params, adapter)
            call.rows.append(
                Asked(
                    row,
                    adapter.lora_name if adapter else None,
                    not params.skip_reading_prefix_cache,
                    cached,
                )
            )
            # On a CPU up to 0.32, a base row beside an adapter's gets the adapter as well.
            applied = adapter is not None or call.mixed
            output = self._compute(str(i), row, params, cached, applied)
            outputs.append(self.faults.answers(output))
            self._write_cache(row, adapter)
        return [output for output in outputs if output is not None]

    def _alive(self) -> None:
        from vllm.v1.engine.exceptions import EngineDeadError

        if self._wedged_by:
            pytest.fail(f"this call would hang for ever, since an earlier one {self._wedged_by}")
        assert not self.shut_down, "the engine was closed"
        if self._dead or self.faults.dies_idle:
            raise EngineDeadError

    def _shut_down(self) -> None:
        self.shut_down = True

    def _refuse_too_long_a_context(self) -> None:
        allowed = self._base.config.max_position_embeddings
        asked = self.arguments["max_model_len"]
        if asked > allowed and os.environ.get("VLLM_ALLOW_LONG_MAX_MODEL_LEN") != "1":
            raise ValueError(
                f"User-specified max_model_len ({asked}) is greater than the derived "
                f"max_model_len (max_position_embeddings={allowed})"
            )

    def _validate(self, ids: Any, params: "SamplingParams", adapter: "LoRARequest | None") -> None:
        """Of vllm/renderers/params.py and vllm/v1/engine/input_processor.py, in their order."""
        from vllm.exceptions import VLLMValidationError

        length, longest = len(ids), self.model_config.max_model_len
        if length > longest:
            raise VLLMValidationError(
                f"This model's maximum context length is {longest} tokens. However, your prompt "
                f"contains at least {length} input tokens"
            )
        params.verify(self.model_config, None, None, None)  # type: ignore[arg-type]
        if params.prompt_logprob_token_ids is not None and not self._v2:
            raise VLLMValidationError(
                "prompt_logprob_token_ids requires the V2 model runner "
                "(VLLM_USE_V2_MODEL_RUNNER=1).",
                parameter="prompt_logprob_token_ids",
            )
        if adapter is not None and not self.arguments.get("enable_lora"):
            raise VLLMValidationError(f"Got lora_request {adapter} but LoRA is not enabled!")
        if isinstance(ids, np.ndarray):
            self._wedged_by = "was given an array as ids"
            raise ValueError("The truth value of an array is ambiguous")
        if length == 0:
            raise VLLMValidationError("The decoder prompt cannot be empty")
        if length == longest:
            raise VLLMValidationError(
                f"The decoder prompt (length {length}) plus the number of requested output "
                f"tokens (at least 1) is longer than the maximum model length of {longest}."
            )
        for id_ in (min(ids), max(ids)):
            if not 0 <= id_ < self._base.config.vocab_size:
                raise VLLMValidationError(f"Token id {id_} is out of vocabulary")
        rows = params.prompt_logprob_token_ids
        if rows is not None:
            expected = max(length - 1 - (params.prompt_logprob_start or 0), 0)
            if len(rows) != expected:
                raise VLLMValidationError(
                    f"prompt_logprob_token_ids has {len(rows)} rows, but the prompt has "
                    f"{expected} scored rows (prompt_len - 1 - prompt_logprob_start).",
                    parameter="prompt_logprob_token_ids",
                    value=len(rows),
                )
        # By now the front-end counts it as running; the core will never hear of it.
        if not isinstance(ids, list) or not all(isinstance(i, (int, np.integer)) for i in ids):
            self._wedged_by = f"was given {type(ids).__name__} of {type(ids[0]).__name__} as ids"
            raise AttributeError(f"'{type(ids).__name__}' object has no attribute 'copy'")

    def _add_lora(self, request: "LoRARequest") -> bool:
        self._alive()
        self._load_adapter(request)
        return True

    def _load_adapter(self, request: "LoRARequest") -> None:
        """At the first request, or when asked to before.

        Raises:
            ValueError: from vLLM's own check.
        """
        if self._adapted is None:
            from vllm.lora.peft_helper import PEFTHelper

            limits = SimpleNamespace(max_lora_rank=self.arguments["max_lora_rank"])
            helper = PEFTHelper.from_local_dir(request.lora_path, None)
            helper.validate_legal(limits)  # type: ignore[arg-type]
            self._adapted = PeftModel.from_pretrained(self._base, request.lora_path).eval()

    def _read_cache(
        self, ids: list[int], params: "SamplingParams", adapter: "LoRARequest | None"
    ) -> int:
        """Tokens of whole blocks found, never all: the last token's logits are needed."""
        if params.skip_reading_prefix_cache or not self.arguments["enable_prefix_caching"]:
            return 0
        size, name = (
            self.arguments.get("block_size", DEFAULT_BLOCK),
            adapter.lora_name if adapter else None,
        )
        found = 0
        for end in range(size, len(ids), size):
            if (name, tuple(ids[:end])) not in self._cache:
                break
            found = end
        return found

    def _write_cache(self, ids: list[int], adapter: "LoRARequest | None") -> None:
        size, name = (
            self.arguments.get("block_size", DEFAULT_BLOCK),
            adapter.lora_name if adapter else None,
        )
        for end in range(size, len(ids) + 1, size):
            self._cache.add((name, tuple(ids[:end])))

    def _compute(
        self, request_id: str, ids: list[int], params: "SamplingParams", cached: int, adapted: bool
    ) -> "RequestOutput":
        from vllm.outputs import CompletionOutput, RequestOutput

        with torch.inference_mode():
            hidden = self._hidden(ids, adapted)
            exact, flat = None, None
            if params.prompt_logprob_token_ids is not None:
                exact = self._exact(hidden, params, cached, len(ids))
            if params.prompt_logprobs is not None:
                flat = self._flat(hidden, ids, params, cached)
            sampled = int(self._logits(hidden[-1:]).argmax())
        return RequestOutput(
            request_id=request_id,
            prompt=None,
            prompt_token_ids=list(ids),
            prompt_logprobs=flat,
            outputs=[CompletionOutput(0, "", [sampled], None, None, finish_reason="length")],
            finished=True,
            num_cached_tokens=cached,
            prompt_token_id_logprobs=exact,
        )

    def _hidden(self, ids: list[int], adapted: bool) -> torch.Tensor:
        """Of the last layer, [n, hidden]."""
        inputs = torch.tensor([ids])
        if self._adapted is None:
            states: torch.Tensor = self._base.model(input_ids=inputs).last_hidden_state[0]
        elif adapted:
            states = self._adapted.get_base_model().model(input_ids=inputs).last_hidden_state[0]
        else:
            with self._adapted.disable_adapter():
                states = self._adapted.get_base_model().model(input_ids=inputs).last_hidden_state[0]
        return states

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        weight = self._base.lm_head.weight.to(self._head_dtype)
        return torch.nn.functional.linear(hidden.to(self._head_dtype), weight)

    def _exact(
        self, hidden: torch.Tensor, params: "SamplingParams", cached: int, length: int
    ) -> np.ndarray | None:
        """The V2 runner's own worker, step by step of a chunked prefill."""
        from vllm.v1.worker.gpu.sample import prompt_logprob

        worker = prompt_logprob.PromptLogprobsWorker(1, torch.device("cpu"))
        worker.add_request("r", 0, params)
        step = self.arguments["max_num_batched_tokens"]
        result: dict[str, torch.Tensor] = {}
        with patch.object(prompt_logprob, "compute_token_logprobs", _token_logprobs):
            for start in range(cached, length, step):
                end = min(start + step, length)
                batch = SimpleNamespace(
                    req_ids=["r"],
                    idx_mapping_np=np.array([0]),
                    num_computed_prefill_tokens_np=np.array([start]),
                    num_scheduled_tokens=np.array([end - start]),
                    prefill_len_np=np.array([length]),
                    query_start_loc_np=np.array([0, end - start]),
                )
                result |= worker.compute_prompt_token_id_logprobs(
                    self._logits,
                    hidden[start:end],
                    batch,  # type: ignore[arg-type]
                    np.array([length]),
                )
        return result["r"].numpy() if "r" in result else None

    def _flat(
        self, hidden: torch.Tensor, ids: list[int], params: "SamplingParams", cached: int
    ) -> Any:
        """After a hit the V2 runner leaves rows out; V1 has stale ones there."""
        from vllm.logprobs import FlatLogprobs, create_prompt_logprobs

        assert params.prompt_logprobs == 0
        targets = torch.tensor(ids[1:], dtype=torch.int64)[:, None]
        logprobs = _token_logprobs(self._logits(hidden[:-1]), targets)[:, 0].tolist()
        container = create_prompt_logprobs(params.flat_logprobs)
        if not isinstance(container, FlatLogprobs):
            return container
        for row, (id_, logprob) in enumerate(zip(ids[1:], logprobs, strict=True)):
            if row >= cached:
                container.append_fast([id_], [logprob], chain((1,)), [None])
            elif not self._v2:
                container.append_fast([0], [JUNK], chain((1,)), [None])
        return container


def _token_logprobs(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """As the Triton kernel: float32 logit minus logsumexp, of the ids only."""
    scores = logits.float()
    return scores.gather(-1, ids) - scores.logsumexp(dim=-1, keepdim=True)
