"""Conversations to text, by a chat template that runs in a process of its own (`render_child`).

Whatever a template does, this process lives: a text that cannot be had is a `PairError` in its
place, and a process that ended is started again and the conversation found that ended it.
"""

import contextlib
import json
import os
import signal
import struct
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from pipeline.errors import ModelError
from pipeline.tokenization import render_child
from pipeline.tokenization.errors import LimitBroken, PairError

Messages = list[dict[str, str]]

MOST_BROKEN_LIMITS = 100
"""So many texts over a limit, at up to 3 s each, and the template is given up."""

_KEPT_VARIABLES = ("PATH", "PYTHONPATH", "PYTHONHOME", "LD_LIBRARY_PATH", "LANG", "LC_ALL", "TZ")
_NOT_PINNED = (
    "the chat template shows today's date, so ids would change over night; "
    "set tokenization.pinned_date (YYYY-MM-DD)"
)


@dataclass(frozen=True, slots=True)
class Rendered:
    """A prompt's text and its conversations' texts, or why there is none.

    A reply's text is what follows the prompt's in the whole conversation's (`rests`), or, where
    the whole does not begin with the prompt, all of it (`wholes`).
    """

    prompt: str | PairError
    rests: list[str | None]
    wholes: list[str | PairError | None]


class Renderer:
    """A chat template, ready to render.

    Args:
        template: its Jinja source.
        variables: what every conversation is rendered with, besides its messages.
        pinned: the date the template sees (ISO), or None where it may see none.

    Raises:
        ModelError: the template cannot be compiled.
    """

    def __init__(self, template: str, variables: dict[str, Any], pinned: str | None) -> None:
        self._setup = json.dumps([template, variables, pinned]).encode()
        self._broken = 0
        self._child = _Child(self._setup)

    def render(self, batch: list[tuple[Messages, list[str]]]) -> list[Rendered]:
        """The texts of every (prompt, replies): with a generation prompt, and with each reply.

        Raises:
            ModelError: a text shows the date and none is pinned, or too many broke a limit.
        """
        try:
            return self._parsed(self._child.ask(batch), batch)
        except _Died:
            self._child = _Child(self._setup)
        return [self._one_by_one(messages, replies) for messages, replies in batch]

    def _one_by_one(self, messages: Messages, replies: list[str]) -> Rendered:
        """The same, and whatever ends the process is found."""
        alone = self._one(messages, [])
        if isinstance(alone.prompt, PairError):
            return alone
        found = [self._one(messages, [reply]) for reply in replies]
        return Rendered(
            alone.prompt,
            [one.rests[0] if one.rests else None for one in found],
            # A process that ended at the reply has left the prompt's place an error.
            [one.wholes[0] if one.wholes else one.prompt for one in found],
        )

    def _one(self, messages: Messages, replies: list[str]) -> Rendered:
        batch = [(messages, replies)]
        try:
            return self._parsed(self._child.ask(batch), batch)[0]
        except _Died as died:
            self._child = _Child(self._setup)
            return Rendered(self._limit_broken(str(died)), [], [])

    def _parsed(self, data: bytes, batch: list[tuple[Messages, list[str]]]) -> list[Rendered]:
        answers = _answers(data)
        rendered = []
        for _, replies in batch:
            prompt = self._text(*next(answers))
            if isinstance(prompt, PairError):
                rendered.append(Rendered(prompt, [], []))
                continue
            rests: list[str | None] = []
            wholes: list[str | PairError | None] = []
            for _ in replies:
                kind, text = next(answers)
                is_rest = kind == render_child.REST
                rests.append(text if is_rest else None)
                wholes.append(None if is_rest else self._text(kind, text))
            rendered.append(Rendered(prompt, rests, wholes))
        return rendered

    def _text(self, kind: int, text: str) -> str | PairError:
        if kind == render_child.DATED:
            raise ModelError(_NOT_PINNED)
        if kind == render_child.BROKE_A_LIMIT:
            return self._limit_broken(text)
        return PairError("template_failed", text) if kind == render_child.FAILED else text

    def _limit_broken(self, cause: str) -> PairError:
        self._broken += 1
        if self._broken >= MOST_BROKEN_LIMITS:
            raise ModelError(
                f"the chat template broke a limit in {self._broken} renderings, last: {cause}"
            )
        return LimitBroken(cause)


class _Died(Exception):
    """The process ended before it had answered."""


class _Child:
    """The process, from its start to its end; one question at a time."""

    def __init__(self, setup: bytes) -> None:
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - open as long as the process
        self._process = subprocess.Popen(
            # By its path: as a module, it would load this package and all that it needs.
            [sys.executable, "-P", str(Path(render_child.__file__))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env={name: os.environ[name] for name in _KEPT_VARIABLES if name in os.environ},
        )
        weakref.finalize(self, _end, self._process)
        try:
            refused = self._exchange(setup).decode()
        except _Died as died:
            refused = str(died)
        if refused:
            raise ModelError(f"the chat template cannot be used: {refused}")

    def ask(self, batch: list[tuple[Messages, list[str]]]) -> bytes:
        """The answers to a batch, as `render_child.answers` writes them."""
        return self._exchange(json.dumps(batch, ensure_ascii=False).encode())

    def _exchange(self, data: bytes) -> bytes:
        # It reads all of a question before it answers, so neither waits for the other.
        asks, says = self._pipes()
        try:
            asks.write(struct.pack("<Q", len(data)) + data)
            asks.flush()
        except OSError:
            raise self._died() from None
        head = says.read(8)
        if len(head) == 8:
            (length,) = struct.unpack("<Q", head)
            answer = says.read(length)
            if len(answer) == length:
                return answer
        raise self._died()

    def _pipes(self) -> tuple[IO[bytes], IO[bytes]]:
        asks, says = self._process.stdin, self._process.stdout
        if asks is None or says is None:
            raise RuntimeError("a process that was started without pipes")
        return asks, says

    def _died(self) -> _Died:
        _end(self._process, patience=1)  # it has lost its pipes, and so has ended or will
        code = self._process.returncode
        if code == -signal.SIGPROF:
            return _Died(f"more than {1.5 * render_child.CPU_SECONDS:g} s of CPU time in one step")
        self._errors.seek(0)
        said = self._errors.read().decode(errors="replace").strip().rpartition("\n")[2][:400]
        how = f"signal {-code}" if code < 0 else f"status {code}"
        return _Died(f"its process ended ({how}): {said}" if said else f"its process ended ({how})")


def _end(process: "subprocess.Popen[bytes]", patience: float = 0) -> None:
    for pipe in (process.stdin, process.stdout):
        with contextlib.suppress(OSError):  # what was not sent cannot be
            if pipe is not None:
                pipe.close()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(patience)
    process.kill()
    process.wait()


def _answers(data: bytes) -> Iterator[tuple[int, str]]:
    place = 0
    while place < len(data):
        kind, length = struct.unpack_from("<BI", data, place)
        yield kind, data[place + 5 : place + 5 + length].decode()
        place += 5 + length
