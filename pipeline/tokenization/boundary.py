"""Whether encoding prompt and completion in one go would give other ids, without doing so.

A tokeniser first splits a text at its added tokens; what stands between two of them is encoded by
itself. So the last added token of the prompt and the first of the completion bound what a token
over the boundary could depend on: with P = x·A·y and C = z·B·w, joint and separate ids are equal
exactly if they are for A·y and z. Where the tokeniser's regular expression is a known one, z can be
cut after a letter that a space and a letter follow: none of these expressions matches over that
place, none looks back, and none looks further ahead than one character, so what stands on either
side is encoded as if it stood alone. The two short texts are then encoded, together and apart.
"""

import re
from collections import deque
from typing import Any

_REACH = 200
"""Characters of the prompt's end, and of the completion's begin, that are searched first."""
_BETWEEN_WORDS = re.compile("[A-Za-z](?= [A-Za-z])")

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
WORD_PATTERNS = {
    # Llama 3 (and OpenAI's cl100k), Qwen 2 and 3, SmolLM3.
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_REST}",
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_REST}",
}
"""Regular expressions that no match of which has a letter before a space."""


class Boundary:
    """What a tokeniser's definition says about where texts can be cut.

    Args:
        definition: the tokeniser's.
        controls: finds its added tokens.
    """

    def __init__(self, definition: dict[str, Any], controls: re.Pattern[str]) -> None:
        added = definition["added_tokens"]
        self._controls = controls
        self._longest = max((len(token["content"]) for token in added), default=0)
        self._anchored = bool(added) and _found_wherever_they_stand(added)
        self._words = splits_between_words(definition)

    def halves(self, prompt: str, completion: str) -> tuple[str, str]:
        """An end of the prompt and a beginning of the completion that decide.

        Joint and separate ids of the whole texts are equal exactly if those of the halves are.
        """
        whole = prompt, completion
        if not self._anchored:
            return whole
        anchor = self._last_control(prompt)
        if anchor is None:
            return whole
        end = prompt[anchor.start() :]
        y = prompt[anchor.end() :]
        word = _BETWEEN_WORDS.search(completion, 0, _REACH) if self._words else None
        cut = word.end() if word else len(completion)
        following = self._controls.search(y + completion[: cut + self._longest])
        if following is not None:
            if following.start() < len(y):  # one over the boundary itself
                return whole
            cut = min(cut, following.start() - len(y))
        return end, completion[:cut]

    def _last_control(self, prompt: str) -> re.Match[str] | None:
        for begin in (max(0, len(prompt) - _REACH), 0):
            if found := deque(self._controls.finditer(prompt, begin), maxlen=1):
                return found[0]
        return None


def splits_between_words(definition: dict[str, Any]) -> bool:
    """Whether a text may be cut after a letter that a space and a letter follow.

    True for byte-level BPE behind a known regular expression (GPT-2's, SmolLM2's, Llama 3's,
    Qwen's), with no normaliser or one of Unicode's canonical forms: a space composes with nothing.
    """
    normalizer = definition["normalizer"]
    if normalizer is not None and normalizer["type"] not in ("NFC", "NFD"):
        return False
    if definition["model"]["type"] != "BPE" or definition["model"].get("dropout"):
        return False
    first = definition["pre_tokenizer"] or {"type": "none"}
    steps = first["pretokenizers"] if first["type"] == "Sequence" else [first]
    return any(map(_is_by_words, steps)) and all(map(_is_byte_level_or_splits, steps))


def _is_by_words(step: dict[str, Any]) -> bool:
    if step["type"] == "ByteLevel":
        return bool(step["use_regex"])
    return step["type"] == "Split" and step["pattern"].get("Regex") in WORD_PATTERNS


def _is_byte_level_or_splits(step: dict[str, Any]) -> bool:
    """A step that changes no character but to a byte's, and looks no further than the above."""
    match step["type"]:
        case "ByteLevel":
            return not step["add_prefix_space"]
        case "Digits":
            return True
        case "Split":
            known = step["pattern"].get("Regex") in WORD_PATTERNS
            return known and step["behavior"] == "Isolated" and not step["invert"]
        case _:
            return False


def _found_wherever_they_stand(added: list[dict[str, Any]]) -> bool:
    """Whether each added token is split off wherever its string stands, whatever is around it."""
    if any(t["lstrip"] or t["rstrip"] or t["single_word"] or t["normalized"] for t in added):
        return False
    texts = {token["content"] for token in added}
    if min(map(len, texts)) < 2:
        return False
    beginnings = {text[:i] for text in texts for i in range(1, len(text))}
    overlap = any(text[i:] in beginnings for text in texts for i in range(1, len(text)))
    inside = any(
        text[i:j] in texts
        for text in texts
        for i in range(len(text))
        for j in range(i + 1, len(text) + 1)
        if j - i < len(text)
    )
    return not overlap and not inside
