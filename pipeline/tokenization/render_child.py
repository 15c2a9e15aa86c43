"""The process that renders a chat template: a program by strangers, which may loop or fill memory.

Run by its path, so that nothing but Jinja is loaded. Frames come on standard input and go out on
standard output, each behind its length: first the template, then batches of conversations. Jinja
is set up as `transformers` 5.19 does. The limits are on the CPU time and the text of one
rendering and on the memory of this process. What runs over a limit is told, or, where Jinja is
stuck in one long operation, the process is ended by a signal and whoever asked sees that.
"""

import json
import os
import random
import resource
import signal
import struct
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date, datetime
from types import FrameType
from typing import Any, BinaryIO

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.runtime
from jinja2.sandbox import ImmutableSandboxedEnvironment

REST, WHOLE, FAILED, BROKE_A_LIMIT, DATED = range(5)
"""What is said of a text: it follows, without the prompt it begins with; it follows; what the
template raised; the limit that was broken; it shows the date."""

CPU_SECONDS = 2.0
"""CPU time of one rendering; half as much again and the process is ended."""
MEMORY_BYTES = 1 << 30
EXTRA_CHARACTERS = 1 << 18
"""A text may be so much longer than 16 times what is said in the conversation."""

_DATES = datetime(2006, 1, 2, 3, 4, 5), datetime(2038, 11, 27, 18, 39, 46)
"""Two dates that differ in every part; a template's text must be the same under both."""


class _BrokeALimit(BaseException):
    """Not an `Exception`, which Jinja catches here and there."""


class _Dated(Exception):
    """The text is another one on another day."""


class _Generation(jinja2.ext.Extension):
    """`{% generation %}`, which marks the assistant's words and writes nothing itself."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = self.call_method("_said", [])
        return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _said(self, caller: jinja2.runtime.Macro) -> str:
        said: str = caller()
        return said


class Template:
    """A compiled template with the variables that every conversation is given."""

    def __init__(self, source: str, variables: dict[str, Any], pinned: str | None) -> None:
        self._day: Any = _DATES[0]
        self._asked = False
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = self._strftime_now
        self._variables = dict(variables)
        if pinned is not None:
            day = date.fromisoformat(pinned)
            # A variable hides the global function of that name.
            self._variables["strftime_now"] = day.strftime
            self._variables["date_string"] = day.strftime("%d %b %Y")
        self._draws = "random" in source or "lipsum" in source
        self._template = environment.from_string(source)

    def text(self, messages: list[dict[str, str]], generation_prompt: bool) -> str:
        """The conversation as the template writes it."""
        text = self._render(messages, generation_prompt)
        if self._asked:
            self._day = _DATES[1]
            try:
                if self._render(messages, generation_prompt) != text:
                    raise _Dated
            finally:
                self._day, self._asked = _DATES[0], False
        return text

    def _render(self, messages: list[dict[str, str]], generation_prompt: bool) -> str:
        if not messages:
            raise ValueError("Cannot apply chat template to an empty conversation.")
        if self._draws:  # the same draws for every conversation
            random.seed(0)
        text = self._template.render(
            messages=messages,
            tools=None,
            documents=None,
            add_generation_prompt=generation_prompt,
            **self._variables,
        )
        most = EXTRA_CHARACTERS + 16 * sum(len(message["content"]) for message in messages)
        if len(text) > most:
            raise _BrokeALimit(f"the text has {len(text)} characters, more than {most}")
        return text

    def _strftime_now(self, form: str) -> str:
        self._asked = True
        said: str = self._day.strftime(form)
        return said


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: Any = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise(message: str) -> None:
    raise jinja2.exceptions.TemplateError(message)


@contextmanager
def _limited() -> Iterator[None]:
    """Bound the CPU time of what runs inside, first by an exception and then by the kernel."""
    signal.setitimer(signal.ITIMER_VIRTUAL, CPU_SECONDS)
    signal.setitimer(signal.ITIMER_PROF, 1.5 * CPU_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.setitimer(signal.ITIMER_PROF, 0)


def _out_of_time(signum: int, frame: FrameType | None) -> None:
    raise _BrokeALimit(f"more than {CPU_SECONDS:g} s of CPU time")


def _answer(
    template: Template, messages: list[dict[str, str]], generation_prompt: bool, prompt: str | None
) -> tuple[int, bytes, str]:
    """What is said of one text, its bytes, and the text."""
    try:
        with _limited():
            text = template.text(messages, generation_prompt)
            if prompt is not None and text.startswith(prompt):
                return REST, text[len(prompt) :].encode(), text
            return WHOLE, text.encode(), text
    except _Dated:
        return DATED, b"", ""
    except UnicodeEncodeError:
        return FAILED, b"the text is not Unicode (it has half a surrogate pair)", ""
    except MemoryError:
        return BROKE_A_LIMIT, b"more than %d MiB of memory" % (MEMORY_BYTES >> 20), ""
    except _BrokeALimit as broken:
        return BROKE_A_LIMIT, str(broken).encode(), ""
    except Exception as error:  # a template may raise anything: it is a program
        return FAILED, str(error)[:500].encode(errors="replace"), ""


def answers(template: Template, batch: list[tuple[list[dict[str, str]], list[str]]]) -> bytes:
    """The prompt's text and the replies' of every conversation, each behind its kind and length."""
    out = []
    for messages, replies in batch:
        kind, data, prompt = _answer(template, messages, True, None)
        out += [struct.pack("<BI", kind, len(data)), data]
        if kind != WHOLE:
            continue
        for reply in replies:
            whole = [*messages, {"role": "assistant", "content": reply}]
            kind, data, _ = _answer(template, whole, False, prompt)
            out += [struct.pack("<BI", kind, len(data)), data]
    return b"".join(out)


def _read(stream: BinaryIO) -> Any:
    head = stream.read(8)
    if len(head) < 8:  # whoever asked is gone
        sys.exit(0)
    (length,) = struct.unpack("<Q", head)
    return json.loads(stream.read(length))


def _write(stream: BinaryIO, data: bytes) -> None:
    stream.write(struct.pack("<Q", len(data)) + data)
    stream.flush()


def main() -> None:
    """Serve until the other end closes."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
    signal.signal(signal.SIGVTALRM, _out_of_time)
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C is for who asked
    asks, says = sys.stdin.buffer, os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    source, variables, pinned = _read(asks)
    try:
        with _limited():
            template = Template(source, variables, pinned)
    except MemoryError:
        _write(says, b"more than %d MiB of memory" % (MEMORY_BYTES >> 20))
    except (_BrokeALimit, Exception) as error:
        _write(says, f"{error}"[:500].encode(errors="replace") or b"it failed")
    else:
        _write(says, b"")
        while True:
            _write(says, answers(template, _read(asks)))


if __name__ == "__main__":
    main()
