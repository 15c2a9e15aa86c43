"""Prompts with their replies, from messages to ids, a batch at a time.

A prompt is rendered and encoded once for all its replies in the batch, and a reply once for all
rows that have it.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from pipeline.ids import Canonical
from pipeline.tokenization.encoder import Encoder
from pipeline.tokenization.errors import PairError
from pipeline.tokenization.literal import Marked, guard_for, guarded, unguarded
from pipeline.tokenization.rendering import Messages, Rendered

_NO_IDS = np.empty(0, np.int32)
_NOT_STABLE = "rendered with the {side} reply, the conversation does not begin as the prompt"


@dataclass(slots=True)
class Reply:
    """A reply under its prompt.

    `text` is what follows the prompt in the rendered conversation, None where the conversation
    does not begin as the prompt; `ids` are its token ids, int32 [n].
    """

    n_controls: int
    text: str | PairError | None = None
    ids: np.ndarray = field(default_factory=lambda: _NO_IDS)
    boundary_merge: bool = False
    literal: Marked | None = None

    def checked(self, side: str) -> np.ndarray:
        """The ids.

        Raises:
            PairError: there are none; `side` is what the reply is called.
        """
        if isinstance(self.text, PairError):
            raise self.text
        if self.text is None:
            raise PairError("template_not_prefix_stable", _NOT_STABLE.format(side=side))
        return self.ids


@dataclass(slots=True)
class Prompt:
    """A prompt with its replies, by what they say."""

    messages: Messages
    n_controls: int
    replies: dict[str, Reply] = field(default_factory=dict)
    text: str | PairError = ""
    ids: np.ndarray = field(default_factory=lambda: _NO_IDS)
    literal: Marked | None = None
    form: Canonical | None = None

    def checked(self) -> np.ndarray:
        """The ids.

        Raises:
            PairError: there are none.
        """
        if isinstance(self.text, PairError):
            raise self.text
        if not len(self.ids):
            raise PairError("empty_prompt_ids", "the rendered prompt has no token to condition on")
        return self.ids


Batch = tuple[list[Prompt], list[tuple[Prompt, list[Reply]]]]
"""The distinct prompts, and every row's prompt and replies."""


def gather(
    prompts: Sequence[Messages], replies: Sequence[Sequence[str]], encoder: Encoder
) -> Batch:
    """Put rows with equal prompts, and equal replies under one, together.

    Args:
        prompts: each row's prompt.
        replies: for each reply of a row (chosen and rejected, say), its text in every row.
        encoder: finds control strings.
    """
    distinct: dict[str, Prompt] = {}
    rows = []
    for messages, *said in zip(prompts, *replies, strict=True):
        key = json.dumps(messages, ensure_ascii=False)
        prompt = distinct.get(key)
        if prompt is None:
            n_controls = encoder.count_controls([message["content"] for message in messages])
            prompt = distinct[key] = Prompt(messages, n_controls)
        for text in said:
            if text not in prompt.replies:
                prompt.replies[text] = Reply(encoder.count_controls([text]))
        rows.append((prompt, [prompt.replies[text] for text in said]))
    return list(distinct.values()), rows


def render(prompts: list[Prompt], encoder: Encoder) -> None:
    """Fill in the texts."""
    is_literal = encoder.config.control_tokens == "literal"
    plain, asked = [], []
    for prompt in prompts:
        replies = prompt.replies.items()
        if is_literal and (prompt.n_controls or any(reply.n_controls for _, reply in replies)):
            for said, reply in replies:
                _render_literally(prompt, said, reply, encoder)
        else:
            plain.append(prompt)
            asked.append((prompt.messages, list(prompt.replies)))
    for prompt, rendered in zip(plain, encoder.renderer.render(asked), strict=True):
        prompt.text = rendered.prompt
        if isinstance(rendered.prompt, PairError):
            continue
        for reply, rest, whole in zip(
            prompt.replies.values(), rendered.rests, rendered.wholes, strict=True
        ):
            reply.text = whole if isinstance(whole, PairError) else rest


def encode(prompts: list[Prompt], encoder: Encoder) -> None:
    """Fill in the ids, and whether a token would stand over the boundary."""
    texts: list[str] = []
    takers: list[Prompt | Reply] = []
    both: list[tuple[str, str]] = []
    asking: list[Reply] = []
    for prompt in prompts:
        if not isinstance(prompt.text, str):
            continue
        if prompt.literal is None:
            texts.append(prompt.text)
            takers.append(prompt)
        else:
            prompt.ids = encoder.encode_marked(prompt.literal)
        for reply in prompt.replies.values():
            if not isinstance(reply.text, str) or reply.literal is not None:
                continue
            texts.append(reply.text)
            takers.append(reply)
            both.append((prompt.text, reply.text))
            asking.append(reply)
    for taker, ids in zip(takers, encoder.encode(texts), strict=True):
        taker.ids = ids
    for reply, merges in zip(asking, encoder.merges(both), strict=True):
        reply.boundary_merge = merges
    for prompt in prompts:
        for reply in prompt.replies.values():
            if reply.literal is not None and isinstance(prompt.text, str):
                reply.ids = encoder.encode_marked(reply.literal, len(prompt.text))
                joint = encoder.encode_marked(reply.literal)
                separate = np.concatenate([prompt.ids, reply.ids])
                reply.boundary_merge = not np.array_equal(joint, separate)


def _render_literally(prompt: Prompt, said: str, reply: Reply, encoder: Encoder) -> None:
    """Render one reply so that the control strings people wrote are told from the template's."""
    contents = [message["content"] for message in prompt.messages]
    try:
        guard = guard_for([*contents, said]) if prompt.n_controls or reply.n_controls else ""
    except PairError as error:
        reply.text = error
        prompt.text = prompt.text or error
        return

    def mark(text: str) -> str:
        return guarded(text, encoder.controls, guard) if guard else text

    messages = [{**m, "content": mark(m["content"])} for m in prompt.messages]
    rendered = encoder.renderer.render([(messages, [mark(said)])])[0]
    if isinstance(rendered.prompt, PairError):
        prompt.text = rendered.prompt
        return
    begin = unguarded(rendered.prompt, encoder.controls, guard)
    prompt.text = begin.text
    if prompt.n_controls:
        prompt.literal = begin
    whole = _whole(rendered)
    if isinstance(whole, PairError):
        reply.text = whole
        return
    marked = unguarded(whole, encoder.controls, guard)
    if marked.text.startswith(begin.text):
        reply.text = marked.text[len(begin.text) :]
        if guard:
            reply.literal = marked


def _whole(rendered: Rendered) -> str | PairError:
    whole, rest = rendered.wholes[0], rendered.rests[0]
    if whole is None:
        return str(rendered.prompt) + str(rest)
    return whole
