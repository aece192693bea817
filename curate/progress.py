"""Progress of a stage on stderr: a bar in a terminal, elsewhere a line every ten seconds, and one line at the end."""

import sys
import threading
import time
from typing import Any

from pipelines.terminal import printable

PLAIN_INTERVAL_S = 10.0


class Progress:
    """The progress of one stage: items and rows done, failures, rows per second, and the time left.

    Rows of an item in progress count as soon as it reports them. Safe to use from several threads.
    """

    def __init__(self, label: str, total: int, *, unit: str = "shards", quiet: bool = False) -> None:
        self.label, self.total, self.unit, self.quiet = label, total, unit, quiet
        self.done = self.rows = self.failed = 0
        self.at_work: dict[Any, int] = {}  # rows done so far of each item in progress
        self.started = time.perf_counter()
        self.lock, self.closed = threading.RLock(), threading.Event()
        self.bar: Any = None
        if quiet:
            return
        if sys.stderr.isatty():
            self._begin_bar()
        else:
            threading.Thread(target=self._tell_now_and_then, daemon=True).start()

    def _begin_bar(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn

        columns = TextColumn("{task.description}", markup=False), BarColumn(bar_width=24)
        console = Console(file=sys.stderr, highlight=False)
        self.bar = Progress(*columns, console=console, transient=True, redirect_stdout=False)
        self.task = self.bar.add_task(self.text(), total=self.total)
        self.bar.start()

    def _tell_now_and_then(self) -> None:
        while not self.closed.wait(PLAIN_INTERVAL_S):
            self.write(self.text())

    def update(self, done: int, rows: int, failed: int = 0) -> None:
        """Note how many items and rows are done, and how many of the items failed."""
        with self.lock:
            self.done, self.rows, self.failed = done, rows, failed
        self._draw()

    def within(self, item: Any, rows: int) -> None:
        """Note how many rows are done of an item in progress."""
        with self.lock:
            self.at_work[item] = rows
        self._draw()

    def end(self, item: Any) -> None:
        """Forget the rows of an item in progress: it is done, or failed."""
        with self.lock:
            self.at_work.pop(item, None)

    def text(self) -> str:
        """Describe the state in one line."""
        with self.lock:
            within, elapsed = sum(self.at_work.values()), max(time.perf_counter() - self.started, 1e-9)
            rows = self.rows + within
            share = float(self.done)
            if self.rows and self.done > self.failed:  # a begun item counts as its rows over the mean done
                share += min(within * (self.done - self.failed) / self.rows, len(self.at_work))
            speed = f"  {rows:,} rows  {rows / elapsed:,.0f} rows/s" if rows else ""
            trouble = f"  {self.failed:,} failed" if self.failed else ""
            timing = f"{elapsed:,.1f} s"
            if self.done < self.total:
                timing = f"ETA {elapsed / share * max(0.0, self.total - share):,.0f} s" if share else "ETA unknown"
            return f"{self.label:<8} {self.done:,}/{self.total:,} {self.unit}{speed}{trouble}  {timing}"

    def _draw(self) -> None:
        if self.bar is not None:
            self.bar.update(self.task, description=self.text(), completed=self.done)

    def write(self, text: str) -> None:
        """Print a separate line; above the bar, if there is one."""
        text = printable(text)
        if self.bar is not None and not self.closed.is_set():
            self.bar.console.print(text, markup=False, soft_wrap=True)
        elif not self.quiet:
            sys.stderr.write(f"{text}\n")
            sys.stderr.flush()

    def close(self) -> None:
        """Print the final state as a full line, once."""
        if self.closed.is_set():
            return
        self.closed.set()
        if self.bar is not None:
            self.bar.stop()
        if self.done:
            self.write(self.text())
