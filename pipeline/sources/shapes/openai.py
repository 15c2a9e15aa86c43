"""OpenAI's files for preference fine-tuning, also read by Azure, Together and Fireworks.

Fields: `input`, an object with `messages` and optionally `tools` and `parallel_tool_calls`;
`preferred_output` and `non_preferred_output`, lists of {role, content} that end with the
assistant's turn. Every other field survives in `meta`, those of `input` under its name.
"""

from pipeline.sources.base import Read, ReadOptions, RowError, split_reply
from pipeline.sources.fields import Leftovers, preference, required, rest, turns

_FIELDS = ("input", "preferred_output", "non_preferred_output")


def read_openai(row: dict[str, object], options: ReadOptions) -> list[Read]:
    """One row is one pair.

    Raises:
        RowError: `missing_field`, `wrong_type`, `unsupported_content`, `no_reply`,
            `prompts_differ`, `strength_not_finite`.
    """
    given = required(row, "input")
    if not isinstance(given, dict):
        raise RowError("wrong_type", f"'input' is a {type(given).__name__}, not an object")
    left: Leftovers = {}
    head = turns(required(given, "messages"), "messages", left)
    chosen = turns(required(row, "preferred_output"), "preferred_output", left)
    rejected = turns(required(row, "non_preferred_output"), "non_preferred_output", left)
    more = rest(given, ("messages", "tools") if not given.get("tools") else ("messages",), {})
    unit = preference(row, split_reply(head + chosen, head + rejected), _FIELDS, left)
    if more:
        unit.meta["input"] = more
    return [unit]
