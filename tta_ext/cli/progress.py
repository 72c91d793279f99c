"""How far a command is: a bar on a terminal, lines in a log."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from threading import Event, Thread
from time import monotonic

from tta_ext.cli.common import console, errors

__all__ = ["Meter", "progress", "tell"]

# Between lines where stderr is no terminal.
SECONDS_A_LINE = 10.0


class Meter:
    """Counts units and tokens; call it with what a batch added.

    Args:
        unit: what is counted.
        total, done: all of them, and those that an earlier run has done.
        show: called after each count.
    """

    def __init__(
        self,
        unit: str,
        total: int,
        done: int = 0,
        show: Callable[[Meter], object] = lambda meter: None,
    ) -> None:
        self.unit, self.total, self.done, self.tokens = unit, total, done, 0
        self._new, self._show, self._start = 0, show, monotonic()

    def __call__(self, units: int, tokens: int = 0) -> None:
        """Count; where no token was generated, units were taken over from a file."""
        self.done += units
        self.tokens += tokens
        self._new += units if tokens else 0
        self._show(self)

    def __str__(self) -> str:
        seconds = max(monotonic() - self._start, 1e-9)
        text = f"{self.unit} {self.done}/{self.total}, {_clock(seconds)}"
        if self.tokens:
            text += f", {self.tokens / seconds:.0f} tokens/s"
        if self._new and self.done < self.total:
            text += f", {_clock(seconds / self._new * (self.total - self.done))} left"
        return text


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


def tell(meter: Meter, over: Event) -> None:
    """A line every few seconds, also while the first batch of a night is not yet done."""
    while not over.wait(SECONDS_A_LINE):
        if meter.done < meter.total:
            errors.print(str(meter))


@contextmanager
def progress(unit: str, total: int, done: int = 0, text: bool = False) -> Iterator[Meter]:
    """Show on stderr, so that stdout keeps only results, how far a block is.

    Args:
        unit, total, done: as :class:`Meter`'s.
        text: the block prints results as it goes, on a terminal progress enough.
    """
    if not errors.is_terminal:
        meter, over = Meter(unit, total, done), Event()
        log = Thread(target=tell, args=(meter, over), daemon=True)
        log.start()
        try:
            yield meter
        finally:
            over.set()
            log.join()
        if total > 1:
            errors.print(str(meter))
        return
    from rich.progress import BarColumn, Progress, TextColumn

    columns = BarColumn(), TextColumn("{task.description}")
    # Redirected, what goes to stdout would be put on stderr, as that is the bar's console.
    with Progress(
        *columns, console=errors, transient=True, redirect_stdout=False, redirect_stderr=False,
        disable=text and console.is_terminal,
    ) as bar:  # fmt: skip
        task = bar.add_task(unit, total=total, completed=done)
        yield Meter(
            unit, total, done,
            lambda meter: bar.update(task, completed=meter.done, description=str(meter)),
        )  # fmt: skip
