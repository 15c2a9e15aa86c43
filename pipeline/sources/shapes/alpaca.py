"""Alpaca's fields with two replies, or with one and a tag, as LLaMA-Factory has them.

Fields: `instruction` and optionally `input`, which together are the user's last turn; `chosen` and
`rejected`, or `output` and `kto_tag`; optionally `system` and `history`, a list of earlier
[user, assistant] texts. Every other field survives in `meta`.
"""

from pipeline.sources.base import Label, Message, Read, ReadOptions, RowError
from pipeline.sources.fields import desirable, optional_text, preference, rest, text

_FIELDS = ("instruction", "input", "system", "history", "chosen", "rejected", "output", "kto_tag")


def read_alpaca(row: dict[str, object], options: ReadOptions) -> list[Read]:
    """One row is one pair or one label.

    Raises:
        RowError: `missing_field`, `wrong_type`, `unsupported_content`, `strength_not_finite`.
    """
    asked = "\n".join(filter(None, (text(row, "instruction"), optional_text(row, "input"))))
    prompt = _before(row)
    prompt.append({"role": "user", "content": asked})
    if row.get("kto_tag") is not None and row.get("chosen") is None:
        used = (*_FIELDS[:4], "output", "kto_tag")
        label = desirable(row["kto_tag"], "kto_tag")
        return [Label(prompt, text(row, "output"), label, rest(row, used, {}))]
    pair = (prompt, text(row, "chosen"), text(row, "rejected"))
    return [preference(row, pair, _FIELDS[:6], {})]


def _before(row: dict[str, object]) -> list[Message]:
    messages: list[Message] = []
    if system := optional_text(row, "system"):
        messages.append({"role": "system", "content": system})
    history = row.get("history")
    if history is None:
        return messages
    if not isinstance(history, list):
        raise RowError("wrong_type", f"'history' is a {type(history).__name__}, not a list")
    for index, exchange in enumerate(history):
        match exchange:
            case [str(asked), str(said)]:
                messages.append({"role": "user", "content": asked})
                messages.append({"role": "assistant", "content": said})
            case _:
                raise RowError("wrong_type", f"history[{index}] is not a pair of texts")
    return messages
