"""ShareGPT conversations as LLaMA-Factory has them: pairs, and labels for KTO.

Fields: `conversations`, a list of {from, value}, or `messages`, a list of {role, content}; with it
either `chosen` and `rejected`, one turn each, or `kto_tag` or `label` for the last turn; optionally
`system`. Every other field survives in `meta`.
"""

from pipeline.sources.base import Label, Message, Read, ReadOptions, RowError, split_reply
from pipeline.sources.fields import (
    Leftovers,
    desirable,
    optional_text,
    preference,
    required,
    rest,
    turns,
)

_FIELDS = ("conversations", "messages", "system")
_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "system": "system",
    "user": "user",
    "assistant": "assistant",
}
_TOOLS = frozenset({"function_call", "observation", "function", "tool"})


def read_sharegpt(row: dict[str, object], options: ReadOptions) -> list[Read]:
    """One row is one pair or one label.

    A system turn of the conversation goes before `system`, as in LLaMA-Factory.

    Raises:
        RowError: `missing_field`, `wrong_type`, `unsupported_content`, `unknown_role`, `no_reply`,
            `strength_not_finite`.
    """
    field = "messages" if row.get("conversations") is None and "messages" in row else _FIELDS[0]
    left: Leftovers = {}
    said = _turns(required(row, field), field, left)
    used = {field, "system"}
    system = optional_text(row, "system")
    if said and said[0]["role"] == "system":
        used.discard("system")
    elif system:
        said.insert(0, {"role": "system", "content": system})
    if row.get("chosen") is not None or row.get("rejected") is not None:
        chosen = _turns([required(row, "chosen")], "chosen", left)
        rejected = _turns([required(row, "rejected")], "rejected", left)
        pair = split_reply(said + chosen, said + rejected)
        return [preference(row, pair, used | {"chosen", "rejected"}, left)]
    tag = "label" if row.get("kto_tag") is None and "label" in row else "kto_tag"
    if row.get(tag) is None:
        raise RowError("missing_field", "no 'chosen' and 'rejected', nor 'kto_tag' or 'label'")
    if not said or said[-1]["role"] != "assistant":
        raise RowError("no_reply", f"{field} does not end with an assistant turn")
    label = desirable(row[tag], tag)
    return [Label(said[:-1], said[-1]["content"], label, rest(row, used | {tag}, left))]


def _turns(value: object, place: str, left: Leftovers) -> list[Message]:
    keys = ("role", "content")
    if isinstance(value, list) and value and isinstance(value[0], dict) and "from" in value[0]:
        keys = ("from", "value")
    messages = turns(value, place, left, *keys)
    for index, message in enumerate(messages):
        role = _ROLES.get(message["role"])
        if role is None:
            rule = "unsupported_content" if message["role"] in _TOOLS else "unknown_role"
            raise RowError(rule, f"{place}[{index}].{keys[0]} is {message['role'][:40]!r}")
        message["role"] = role
    return messages
