"""Where the time of embedding goes: what threads and decoding processes spent it on, as shares that add up to 100 %.

A shard occupies n threads while it is embedded, so n times as many seconds are accounted for; time that no part of the
work claims was spent waiting. On a GPU, threads keep the card fed while processes decode, and each of the two has its
own account: if one waits, the other is the bottleneck.
"""

import io
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

WORK = ("read", "decode", "wait", "copy", "compute", "write")
WHO = {"threads": "threads", "decoders": "decoding processes"}
Account = dict[str, float]  # seconds of each of WORK, and of `all` of them, waiting included; `count`: who worked


class Spent:
    """Seconds by what they were spent on. Safe to use from several threads."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._began = time.perf_counter()

    @contextmanager
    def on(self, work: str) -> Iterator[None]:
        """Take the time of what is done meanwhile."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.add({work: time.perf_counter() - began})

    def add(self, seconds: Mapping[str, float]) -> None:
        """Take what was timed elsewhere."""
        with self._lock:
            self.seconds.update(seconds)

    def account(self, count: int) -> Account:
        """Account for the time of this many threads or processes since the object was made."""
        return {**self.seconds, "all": count * (time.perf_counter() - self._began), "count": count}


class TimedFile(io.FileIO):
    """A file that knows how many seconds its reading took; to be read through a buffer."""

    seconds = 0.0

    def readinto(self, buffer: Any) -> int | None:
        """Read into a buffer."""
        began = time.perf_counter()
        try:
            return super().readinto(buffer)
        finally:
            self.seconds += time.perf_counter() - began


def shares(accounts: Iterable[Mapping[str, Account]]) -> dict[str, dict[str, int]]:
    """Add up the accounts of shards: for threads and decoders the percentage of each of WORK, which come to 100."""
    totals: dict[str, Counter[str]] = {}
    for shard in accounts:
        for who, account in shard.items():
            totals.setdefault(who, Counter()).update({name: account[name] for name in account if name != "count"})
            totals[who]["count"] = max(totals[who]["count"], int(account["count"]))
    return {who: {"count": int(total["count"]), **_percent(total)} for who, total in totals.items()}


def _percent(total: Mapping[str, float]) -> dict[str, int]:
    """Round to whole percentages that come to 100: down, and then up where most was cut off."""
    done = {work: total.get(work, 0.0) for work in WORK}
    whole = max(total["all"], sum(done.values()), 1e-9)
    done["wait"] += whole - sum(done.values())
    exact = {work: 100 * seconds / whole for work, seconds in done.items()}
    found = {work: int(value) for work, value in exact.items()}
    for work in sorted(exact, key=lambda each: found[each] - exact[each])[: 100 - sum(found.values())]:
        found[work] += 1
    return found


def in_words(found: Mapping[str, Mapping[str, int]]) -> str:
    """Say shares in a line."""
    parts = [
        f"{account['count']} {WHO[who]}: " + ", ".join(f"{work} {account[work]} %" for work in WORK if account[work])
        for who, account in found.items()
    ]
    return "time of " + "; of ".join(parts)
