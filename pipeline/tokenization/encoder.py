"""A tokeniser with its chat template and the settings that fix what ids come out."""

import json
from array import array
from collections.abc import Iterable, Sequence
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import polars as pl

from pipeline.errors import ModelError
from pipeline.ids import content_id
from pipeline.plan import TokenizationConfig
from pipeline.tokenization.boundary import Boundary
from pipeline.tokenization.definition import control_strings, definition_of
from pipeline.tokenization.errors import LimitBroken
from pipeline.tokenization.literal import Marked
from pipeline.tokenization.rendering import Messages, Renderer

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

VERSION = 1
"""Raised when the same settings would give other ids."""

_KEPT_MERGES = 100_000

_PROBES: list[tuple[Messages, list[str]]] = [
    ([{"role": "user", "content": "What is it?"}], ["This."]),
    (
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is it?"}],
        ["This."],
    ),
    (
        [
            {"role": "user", "content": "What is it?"},
            {"role": "assistant", "content": "This."},
            {"role": "user", "content": "And that?"},
        ],
        ["That."],
    ),
]
"""Conversations a template is tried on before it meets any data."""


class Encoder:
    """Turns conversations into text and text into ids.

    Raises:
        ModelError: no chat template, one that cannot be compiled, breaks a limit on a plain
            conversation, shows today's date while no date is pinned, or begins with two
            begin-of-sequence tokens; a tail of end-of-sequence without such a token.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerFast", config: TokenizationConfig) -> None:
        template = tokenizer.chat_template
        if not isinstance(template, str):
            raise ModelError("the tokeniser has no (single) chat template")
        if config.completion_tail == "eos" and tokenizer.eos_token_id is None:
            raise ModelError("completion_tail: eos, but the tokeniser has no end-of-sequence token")
        from tokenizers import Tokenizer

        self.tokenizer = tokenizer
        self.config = config
        self.controls = control_strings(tokenizer)
        added = {token.content for token in tokenizer.added_tokens_decoder.values()}
        self._control_begins = {text[0] for text in added if len(text) > 1}
        definition = definition_of(tokenizer)
        self._definition = json.dumps(definition, sort_keys=True)
        self._eos: int | None = tokenizer.eos_token_id
        # A copy, since the tokeniser's own backend may truncate or pad, as it was last used or
        # saved.
        self._tokens = Tokenizer.from_str(self._definition)
        self._boundary = Boundary(definition, self.controls)
        self._merges: dict[tuple[str, str], bool] = {}
        variables = dict(tokenizer.special_tokens_map)
        self.renderer = Renderer(template, variables, config.pinned_date)
        self._try_template()

    @cached_property
    def _text(self) -> "Tokenizer":
        """Knows no added token, and so takes their strings for text."""
        from tokenizers import Tokenizer

        nothing_added = {**json.loads(self._definition), "added_tokens": []}
        return Tokenizer.from_str(json.dumps(nothing_added))

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

    def count_controls(self, texts: Iterable[str]) -> int:
        """How many control strings stand in texts."""
        if not self.controls.pattern:
            return 0
        return sum(
            len(self.controls.findall(text))
            for text in texts
            if any(character in text for character in self._control_begins)
        )

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The ids of each text, int32 [n]; control strings are control ids, and none is added."""
        ids = array("i")
        edges = [0]
        for encoding in self._tokens.encode_batch_fast(texts, add_special_tokens=False):
            ids.extend(encoding.ids)
            edges.append(len(ids))
        flat = np.frombuffer(ids, dtype=np.int32)
        return [flat[begin:end] for begin, end in pairwise(edges)]

    def encode_marked(self, marked: Marked, start: int = 0) -> np.ndarray:
        """The ids of a text from `start` on, where only marked control strings are control ids."""
        text = marked.text[start:]
        edges = [0]
        for left, right in marked.controls:
            if left >= start:
                edges += [left - start, right - start]
        edges.append(len(text))
        own = {left - start for left, _ in marked.controls}
        ids = array("i")
        for left, right in pairwise(edges):
            if left < right:
                tokens = self._tokens if left in own else self._text
                ids.extend(tokens.encode(text[left:right], add_special_tokens=False).ids)
        return np.frombuffer(ids, dtype=np.int32)

    def merges(self, texts: Sequence[tuple[str, str]]) -> list[bool]:
        """Whether (prompt, completion) encoded in one go have other ids than one after the other.

        Control strings in them are taken for control tokens.
        """
        if len(self._merges) > _KEPT_MERGES:
            self._merges.clear()
        halves = [self._boundary.halves(*text) for text in texts]
        new = list({half: None for half in halves if half not in self._merges})
        if new:
            ids = self.encode([part for a, b in new for part in (a, b, a + b)])
            for half, *three in zip(new, ids[0::3], ids[1::3], ids[2::3], strict=True):
                a, b, both = three
                self._merges[half] = not np.array_equal(np.concatenate([a, b]), both)
        return [self._merges[half] for half in halves]

    def with_tail(self, completion: np.ndarray) -> np.ndarray:
        """Under `eos`, end the completion with exactly one end-of-sequence id."""
        if self.config.completion_tail == "template":
            return completion
        last = np.flatnonzero(completion == self._eos)
        kept = completion[: last[-1]] if len(last) else completion
        return np.append(kept, np.int32(self._eos or 0))

    def _try_template(self) -> None:
        """Render plain conversations, and look at what comes out."""
        bos = self.tokenizer.bos_token_id
        for number, probe in enumerate(_PROBES):
            (rendered,) = self.renderer.render([probe])
            texts = [rendered.prompt, *rendered.rests, *rendered.wholes]
            broken = [t for t in texts if isinstance(t, LimitBroken)]
            if broken and number == 0:
                raise ModelError(f"the chat template cannot be used: {broken[0].detail}")
            if bos is None or not isinstance(rendered.prompt, str):
                continue
            ids = self.encode([rendered.prompt])[0]
            first, twice = ids[:2] == bos, (ids[1:] == bos) & (ids[:-1] == bos)
            # Where one token both begins and ends, two of them may stand between turns.
            if (len(first) == 2 and first.all()) or (bos != self._eos and twice.any()):
                raise ModelError(
                    "the chat template writes the begin-of-sequence token "
                    f"{self.tokenizer.bos_token!r} twice in a row"
                )
