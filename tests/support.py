"""What several tests build: a tiny random model with a real tokeniser, a plan's stages, a step."""

import contextlib
import resource
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.intake import run_intake
from pipeline.names import store_of
from pipeline.plan import ObjectiveConfig, Plan, load_plan
from pipeline.stages import score, tokenize
from pipeline.store import Store
from pipeline.training.data.examples import Example
from pipeline.training.run.replicas import Replicas
from pipeline.training.run.step import StepResult, Work, run_step

PROJECT = Path(__file__).resolve().parent.parent

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' "
    "+ message['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def build_tiny_model(directory: Path, seed: int = 0, **config: Any) -> Path:
    """A two-layer Llama with random weights and a byte-level BPE tokeniser, as safetensors."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    text = ["the answer to the question is that it depends on what was asked"] * 4
    tokenizer.train_from_iterator(text, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|im_end|>"
    )
    fast.chat_template = CHATML
    torch.manual_seed(seed)
    values: dict[str, Any] = {
        "vocab_size": len(fast),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "initializer_range": 0.3,  # far from uniform, so that a wrong position shows
        "tie_word_embeddings": False,
        "pad_token_id": 2,
        "eos_token_id": 2,
        "bos_token_id": 1,
    }
    model = LlamaForCausalLM(LlamaConfig(**{**values, **config}))
    model.save_pretrained(directory)
    fast.save_pretrained(directory)
    return directory


class MeasuredWarning(UserWarning):
    """A measured number: pytest prints warnings even where everything passes."""


def measured(said: str) -> None:
    """Print a measured number at the end of the test run."""
    warnings.warn(said, MeasuredWarning, stacklevel=2)


@contextlib.contextmanager
def largest_file(n_bytes: int) -> Iterator[None]:
    """Writing beyond this fails, with EFBIG where a full disk gives ENOSPC."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def tokenized(path: Path, *overrides: str) -> tuple[Plan, Store]:
    """A plan with its intake and tokenisation done."""
    plan = load_plan(path, overrides)
    store = store_of(plan)
    run_intake(plan, store)
    tokenize(plan, store)
    return plan, store


def prepared(path: Path, *overrides: str) -> tuple[Plan, Store]:
    """A plan with its intake, tokenisation and the scoring of its models done."""
    plan, store = tokenized(path, *overrides)
    for name in plan.scored_models:
        score(plan, store, name)
    return plan, store


def stepped(
    model: Any,
    examples: Sequence[Example],
    objective: ObjectiveConfig,
    *,
    number: int = 1,
    before: Mapping[str, float] | None = None,
    most_tokens: int = 512,
    threads: int = 1,
) -> StepResult:
    """The gradient of a step, left in the model's parameters, and what it came to."""
    work = Work(examples, number, range(len(examples)), before or {})
    with Replicas(model, threads) as replicas:
        return run_step(replicas, work, objective, most_tokens, lambda *_: None)
