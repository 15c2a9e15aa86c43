"""What a tokeniser is: its definition as JSON, its control strings, and whether two are one."""

import json
import re
from typing import TYPE_CHECKING, Any

from pipeline.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def definition_of(tokenizer: "PreTrainedTokenizerFast") -> dict[str, Any]:
    """What a tokeniser does to a text, without how it truncates and pads batches."""
    definition = json.loads(tokenizer.backend_tokenizer.to_str())
    return {**definition, "truncation": None, "padding": None}


def control_strings(tokenizer: "PreTrainedTokenizerFast") -> re.Pattern[str]:
    """A pattern that finds every added token's text, special or not, the longest first."""
    added = sorted({t.content for t in tokenizer.added_tokens_decoder.values()}, key=len)
    return re.compile("|".join(re.escape(text) for text in reversed(added) if len(text) > 1))


def require_same_tokenizer(
    tokenizers: dict[str, "PreTrainedTokenizerFast"],
) -> None:
    """Refuse models whose token ids mean different things.

    Raises:
        ModelError: names the models and the first token that differs.
    """
    (first, reference), *others = tokenizers.items()
    expected = _by_id(reference)
    for name, tokenizer in others:
        if tokenizer.backend_tokenizer.to_str() == reference.backend_tokenizer.to_str():
            continue
        found = _by_id(tokenizer)
        for token_id in sorted(expected.keys() | found.keys()):
            a, b = expected.get(token_id), found.get(token_id)
            if a != b:
                raise ModelError(
                    f"models '{first}' and '{name}' have different tokenisers: "
                    f"token {token_id} is {a!r} in one and {b!r} in the other"
                )
        if definition_of(reference) != definition_of(tokenizer):
            raise ModelError(
                f"models '{first}' and '{name}' have one vocabulary but split text differently"
            )


def _by_id(tokenizer: "PreTrainedTokenizerFast") -> dict[int, str]:
    return {token_id: token for token, token_id in tokenizer.get_vocab().items()}
