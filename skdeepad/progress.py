"""Progress of what takes long: a bar where somebody looks, one line where nobody does.

"auto" shows what takes more than a moment. Tests set `monotonic` in place of the clock.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from multiprocessing import parent_process
from time import monotonic
from typing import Self

from tqdm import auto
from tqdm.std import tqdm

DELAY = 1.0  # seconds until a bar appears, and until the time left is estimated
LONG = 10.0  # seconds: what takes longer is told where there is no bar

logger = logging.getLogger("skdeepad")
_told: set[str] = set()
_silent: ContextVar[bool] = ContextVar("silent", default=False)


@contextmanager
def silence() -> Iterator[None]:
    """Show nothing of what is part of something whose progress is shown."""
    token = _silent.set(True)
    try:
        yield
    finally:
        _silent.reset(token)


def is_watched() -> bool:
    """Tell whether a bar would be seen: in a terminal or a notebook."""
    if parent_process() is not None:  # one of many
        return False
    return auto.tqdm is not auto.asyncio_tqdm or sys.stderr.isatty()


class Progress:
    """Count items that are done.

    Parameters
    ----------
    total : int
        How many there will be.
    unit : str
        What they are.
    name : str
        What is being done.
    verbose : bool, int or "auto"
        Whether to show a bar. "auto": a bar in a terminal and in a notebook, once a
        second has passed. Elsewhere, what will take longer than ten seconds is logged
        once for each name, with an estimate and how to see progress.
    """

    def __init__(
        self, total: int, unit: str, name: str, verbose: bool | int | str
    ) -> None:
        automatic = verbose == "auto"
        silent = automatic and _silent.get()
        shown = is_watched() and not silent if automatic else bool(verbose)
        delay = DELAY if automatic else 0.0
        self.total, self.unit, self.name = total, unit, name
        self.done = 0
        self.silent = shown or silent or not automatic or name in _told
        self.start = monotonic()
        self.bar: tqdm = auto.tqdm(
            total=total, unit=unit, desc=name, disable=not shown, delay=delay
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.close()

    def update(self, n: int) -> None:
        """Count n more items."""
        self.done += n
        self.bar.update(n)
        if not self.silent and (passed := monotonic() - self.start) >= DELAY:
            self.silent = True
            expected = passed * self.total / max(self.done, 1)
            if expected > LONG and parent_process() is None:
                _told.add(self.name)
                logger.warning(
                    "%s: %d %ss take about %.0f seconds. Set verbose=True to see "
                    "progress, verbose=False for silence.",
                    *(self.name, self.total, self.unit, expected),
                )
