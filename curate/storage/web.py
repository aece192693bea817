"""What fsspec's driver for web servers leaves to us: failures that it takes for absence, and ignored ranges."""

from collections.abc import Sequence
from typing import Any

Span = tuple[int, int | None]  # from the first byte up to, not including, the last; negative: from the end


def is_web(fs: Any) -> bool:
    """Say whether a driver is the one for web servers."""
    return "http" in fs.protocol


def refused(error: BaseException | None) -> int | None:
    """Return the status of a web server's final refusal: 403, an expired address, and the like."""
    status = getattr(error, "status", None)
    lasting = isinstance(status, int) and 400 <= status < 500 and status not in (408, 425, 429)
    return status if lasting and not isinstance(error, OSError) else None


def exists(fs: Any, path: str) -> bool:
    """Say whether a file or directory is there. Many servers refuse what is not."""
    if not is_web(fs):
        return bool(fs.exists(path))
    try:
        return bool(fs.exists(path, strict=True))  # else a server that fails for a moment has nothing
    except Exception as error:
        if refused(error) is None:
            raise
        return False


def info(fs: Any, path: str) -> Any:
    """Ask for a driver's description of a file. Raises: OSError for what a web server's driver takes for absence."""
    try:
        return fs.info(path)
    except FileNotFoundError as error:
        cause = error.__cause__
        if not is_web(fs) or cause is None or refused(cause) is not None:
            raise
        raise OSError(f"{type(cause).__name__}: {cause}") from None


def cat_ranges(fs: Any, path: str, spans: Sequence[Span]) -> list[Any]:
    """Fetch ranges of a file at once; in the place of one that failed stands its error.

    A web server may ignore what range is asked for, and send all of the file: one is tried first.
    """
    if not is_web(fs) or not spans:
        return _cat(fs, path, spans)
    [answer], (start, stop) = _cat(fs, path, spans[:1]), spans[0]
    asked = abs(start) if stop is None else stop - start
    if not isinstance(answer, BaseException) and asked < len(answer) and (start, stop) != (0, None):
        return [answer[start:stop] for start, stop in spans]
    return [answer, *_cat(fs, path, spans[1:])]


def _cat(fs: Any, path: str, spans: Sequence[Span]) -> list[Any]:
    if not spans:
        return []
    starts, stops = [start for start, _ in spans], [stop for _, stop in spans]
    return list(fs.cat_ranges([path] * len(spans), starts, stops, on_error="return"))
