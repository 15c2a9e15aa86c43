"""Messages to token ids, as at inference.

The prompt's ids are those of the prompt rendered with its generation prompt; the completion's are
those of the rest of the rendered conversation, encoded by itself. Both sides of a pair therefore
share exactly one prompt, and no token straddles the boundary.
"""

import datetime
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from pipeline.errors import ModelError
from pipeline.ids import content_id
from pipeline.plan import TokenizationConfig
from schemas import PairSequence, Sequence, UntokenizedPair, polars_schema

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

VERSION = 1
"""Raised when the same settings would give other ids."""

_GUARDS = [chr(code) for code in range(0xE000, 0xF8FF)]
"""Private-use characters; one put inside a control string of the text keeps it from being taken
for the template's own."""


@dataclass(frozen=True)
class SequenceTables:
    """`sequences`, `pair_sequences`, `untokenized_pairs` and the one-row `tokenizations`."""

    sequences: pl.DataFrame
    pair_sequences: pl.DataFrame
    untokenized: pl.DataFrame
    tokenization: pl.DataFrame


class PairError(Exception):
    """A pair this tokenisation cannot carry; becomes a row of `untokenized_pairs`."""

    def __init__(self, rule: str, detail: str) -> None:
        super().__init__(f"{rule}: {detail}")
        self.rule = rule
        self.detail = detail


@dataclass(frozen=True)
class Rendered:
    """A conversation as text, and where its control strings stand that the template wrote."""

    text: str
    controls: list[tuple[int, int]]


class Encoder:
    """A tokeniser with its chat template and the settings that fix what ids come out.

    Raises:
        ModelError: no chat template, or one that shows today's date while no date is pinned.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerFast", config: TokenizationConfig) -> None:
        template = tokenizer.chat_template
        if not isinstance(template, str):
            raise ModelError("the tokeniser has no (single) chat template")
        if "strftime_now" in template and config.pinned_date is None:
            raise ModelError(
                "the chat template shows today's date, so ids would change over night; "
                "set tokenization.pinned_date (YYYY-MM-DD)"
            )
        from tokenizers import Tokenizer

        self.tokenizer = tokenizer
        self.config = config
        self._definition = _definition(tokenizer)
        # Copies, since the tokeniser's own backend may truncate or pad, as it was last used or
        # saved. The second knows no added token, and so takes their strings for text.
        self._tokens = Tokenizer.from_str(self._definition)
        nothing_added = {**json.loads(self._definition), "added_tokens": []}
        self._text = Tokenizer.from_str(json.dumps(nothing_added))
        self._controls = control_strings(tokenizer)
        self._variables: dict[str, Any] = {}
        if config.pinned_date is not None:
            date = datetime.date.fromisoformat(config.pinned_date)
            # A template variable of that name hides the global function transformers offers.
            self._variables = {
                "strftime_now": date.strftime,
                "date_string": date.strftime("%d %b %Y"),
            }

    def identity(self) -> pl.DataFrame:
        """The one-row `tokenizations` table."""
        # A template can write the special tokens, and the eos tail does.
        special = {name: str(token) for name, token in self.tokenizer.special_tokens_map.items()}
        fields = {
            "tokenizer": content_id("tokenizer", self._definition, special),
            "chat_template": self.tokenizer.chat_template,
            **self.config.model_dump(),
            "version": VERSION,
        }
        return pl.DataFrame(
            {"tokenization_id": content_id("tokenization", fields), **fields},
            schema_overrides={"pinned_date": pl.String},
        )

    def count_controls(self, messages: Iterable[dict[str, str]]) -> int:
        """How many control strings stand in the messages' own text."""
        if not self._controls.pattern:
            return 0
        return sum(len(self._controls.findall(message["content"])) for message in messages)

    def render(self, messages: list[dict[str, str]], *, generation_prompt: bool) -> Rendered:
        """Apply the chat template; under `literal`, tell its control strings from the text's own.

        Raises:
            PairError: `template_failed`, with the template's own message; `no_guard_character`.
        """
        literal = self.config.control_tokens == "literal" and self.count_controls(messages) > 0
        guard = ""
        if literal:
            said = "".join(message["content"] for message in messages)
            guard = next((character for character in _GUARDS if character not in said), "")
            if not guard:
                raise PairError("no_guard_character", "the text has every private-use character")
            messages = [
                {**m, "content": self._controls.sub(lambda c: guard.join(_halves(c)), m["content"])}
                for m in messages
            ]
        try:
            text = self.tokenizer.apply_chat_template(
                messages,
                tokenize=False,
                add_generation_prompt=generation_prompt,
                **self._variables,
            )
        except Exception as error:  # a template may raise anything: it is a program
            raise PairError("template_failed", str(error)[:500]) from error
        if not literal:
            return Rendered(text, [])
        pieces, controls, length = [], [], 0
        for part in re.split(f"({self._controls.pattern})", text):
            if self._controls.fullmatch(part):
                controls.append((length, length + len(part)))
            else:
                part = part.replace(guard, "")
            pieces.append(part)
            length += len(part)
        return Rendered("".join(pieces), controls)

    def encode(self, rendered: Rendered, start: int = 0) -> np.ndarray:
        """The ids of a rendered text from character `start` on, int32 [n]; adds no token."""
        text = rendered.text[start:]
        if not rendered.controls:
            return _ids(self._tokens, text)
        # Only the template's own control strings become control ids; the rest is plain text.
        edges = [0]
        for left, right in rendered.controls:
            if left >= start:
                edges += [left - start, right - start]
        edges.append(len(text))
        own = {left - start for left, _ in rendered.controls}
        parts = [
            _ids(self._tokens if left in own else self._text, text[left:right])
            for left, right in pairwise(edges)
            if left < right
        ]
        return np.concatenate(parts) if parts else np.empty(0, np.int32)

    def with_tail(self, completion: np.ndarray) -> np.ndarray:
        """Under `eos`, end the completion with exactly one end-of-sequence id."""
        if self.config.completion_tail == "template":
            return completion
        eos = self.tokenizer.eos_token_id
        if eos is None:
            raise ModelError("completion_tail: eos, but the tokeniser has no end-of-sequence token")
        last = np.flatnonzero(completion == eos)
        kept = completion[: last[-1]] if len(last) else completion
        return np.append(kept, np.int32(eos))


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
        found = _by_id(tokenizer)
        for token_id in sorted(expected.keys() | found.keys()):
            a, b = expected.get(token_id), found.get(token_id)
            if a != b:
                raise ModelError(
                    f"models '{first}' and '{name}' have different tokenisers: "
                    f"token {token_id} is {a!r} in one and {b!r} in the other"
                )
        if _definition(reference) != _definition(tokenizer):
            raise ModelError(
                f"models '{first}' and '{name}' have one vocabulary but split text differently"
            )


def tokenize_pairs(pairs: pl.DataFrame, encoder: Encoder) -> SequenceTables:
    """Every pair's two sequences, each distinct one once, sorted by id.

    Args:
        pairs: the `pairs` table (or a part of it).
        encoder: tokeniser, template and settings.
    """
    identity = encoder.identity()
    tokenization_id = identity["tokenization_id"][0]
    sequences: dict[str, dict[str, Any]] = {}
    ways, lost = [], []
    for pair in pairs.iter_rows(named=True):
        try:
            chosen, rejected, boundary, controls = _pair_rows(pair, encoder)
        except PairError as error:
            place = {key: pair[key] for key in ("pair_id", "file", "row", "byte_offset")}
            lost.append(
                {
                    "tokenization_id": tokenization_id,
                    **place,
                    "rule": error.rule,
                    "detail": error.detail,
                }
            )
            continue
        for row in (chosen, rejected):
            sequences.setdefault(row["sequence_id"], row)
        ways.append(
            {
                "tokenization_id": tokenization_id,
                "pair_id": pair["pair_id"],
                "chosen_id": chosen["sequence_id"],
                "rejected_id": rejected["sequence_id"],
                "boundary_merge": boundary,
                "control_tokens": controls,
            }
        )
    return SequenceTables(
        pl.DataFrame(list(sequences.values()), polars_schema(Sequence)).sort("sequence_id"),
        pl.DataFrame(ways, polars_schema(PairSequence)).sort("pair_id"),
        pl.DataFrame(lost, polars_schema(UntokenizedPair)).sort("pair_id"),
        identity,
    )


def sequence_id(prompt: np.ndarray, completion: np.ndarray, spans: list[tuple[int, int]]) -> str:
    """The id of (prompt ids, completion ids, scored spans), whatever tokenised them."""
    return content_id("sequence", prompt, completion, spans)


def _pair_rows(
    pair: dict[str, Any], encoder: Encoder
) -> tuple[dict[str, Any], dict[str, Any], bool, int]:
    prompt = encoder.render(pair["prompt"], generation_prompt=True)
    prompt_ids = encoder.encode(prompt)
    if not len(prompt_ids):
        raise PairError("empty_prompt_ids", "the rendered prompt has no token to condition on")
    rows, boundary = [], False
    controls = encoder.count_controls(pair["prompt"])
    for side in ("chosen", "rejected"):
        reply = {"role": "assistant", "content": pair[side]}
        controls += encoder.count_controls([reply])
        whole = encoder.render([*pair["prompt"], reply], generation_prompt=False)
        if not whole.text.startswith(prompt.text):
            raise PairError(
                "template_not_prefix_stable",
                f"rendered with the {side} reply, the conversation does not begin as the prompt",
            )
        completion = encoder.encode(whole, len(prompt.text))
        joint = encoder.encode(whole)
        boundary |= not np.array_equal(joint, np.concatenate([prompt_ids, completion]))
        rows.append(_sequence_row(prompt_ids, encoder.with_tail(completion), encoder.config, side))
    if encoder.config.control_tokens == "reject" and controls:
        raise PairError("control_tokens", f"{controls} control strings stand in the text")
    if rows[0]["sequence_id"] == rows[1]["sequence_id"]:
        raise PairError("identical_tokens", "the two replies have the same token ids")
    return rows[0], rows[1], boundary, controls


def _sequence_row(
    prompt: np.ndarray, completion: np.ndarray, config: TokenizationConfig, side: str
) -> dict[str, Any]:
    length = len(prompt) + len(completion)
    truncated = length > config.max_length
    if truncated:
        if config.over_long == "quarantine":
            raise PairError(
                "over_long", f"{side}: {length} tokens, max_length is {config.max_length}"
            )
        completion = completion[: max(0, config.max_length - len(prompt))]
    if not len(completion):
        raise PairError("nothing_to_score", f"{side}: no completion token within max_length")
    spans = [(0, len(completion))]
    return {
        "sequence_id": sequence_id(prompt, completion, spans),
        "prompt_ids": prompt,
        "completion_ids": completion,
        "spans": [{"start": start, "end": end} for start, end in spans],
        "n_prompt": len(prompt),
        "n_scored": sum(end - start for start, end in spans),
        "truncated": truncated,
    }


def _halves(match: re.Match[str]) -> tuple[str, str]:
    text = match.group()
    return text[0], text[1:]


def _by_id(tokenizer: "PreTrainedTokenizerFast") -> dict[int, str]:
    return {token_id: token for token, token_id in tokenizer.get_vocab().items()}


def _definition(tokenizer: "PreTrainedTokenizerFast") -> str:
    """What a tokeniser does to a text, as JSON, without how it truncates and pads batches."""
    definition = json.loads(tokenizer.backend_tokenizer.to_str())
    return json.dumps({**definition, "truncation": None, "padding": None}, sort_keys=True)


def _ids(tokenizer: "Tokenizer", text: str) -> np.ndarray:
    encoding = tokenizer.encode(text, add_special_tokens=False)
    return np.asarray(encoding.ids, dtype=np.int32)
