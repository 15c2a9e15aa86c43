"""Progress bars a terminal shows: rows, tokens per second, time left."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from time import monotonic
from typing import Never

from tqdm import tqdm

_FORMAT = (
    "{desc} {percentage:3.0f}%|{bar:24}| {n_fmt}/{total_fmt} {unit}{postfix}, {remaining} left"
)


@dataclass
class Progress:
    """Counts rows and tokens and moves a bar."""

    bar: "tqdm[Never]"
    started: float
    n_tokens: int = 0

    def advance(self, rows: int, tokens: int) -> None:
        """`rows` more are done, which took `tokens` tokens."""
        self.n_tokens += tokens
        self.bar.set_postfix_str(f"{self.tokens_per_second:,.0f} tokens/s", refresh=False)
        self.bar.update(rows)

    @property
    def tokens_per_second(self) -> float:
        """Mean since the start."""
        return self.n_tokens / max(monotonic() - self.started, 1e-9)


@contextmanager
def progress(description: str, total: int, unit: str = "rows") -> Iterator[Progress]:
    """A bar over `total` rows on standard error, moved about once a second."""
    with tqdm(
        total=total,
        desc=description,
        unit=unit,
        bar_format=_FORMAT,
        mininterval=1.0,
        file=sys.stderr,
    ) as bar:
        yield Progress(bar, monotonic())
