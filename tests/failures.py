"""Calls that fail once, as they do on a full disk or without memory."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager


def disk_full() -> OSError:
    return OSError(errno.ENOSPC, "No space left on device")


@contextmanager
def failing(owner: object, name: str, call: int = 1) -> Iterator[None]:
    """Make the `call`-th call of `owner.name` find the disk full."""
    original, calls = getattr(owner, name), []

    def attempt(*arguments, **options):
        calls.append(name)
        if len(calls) == call:
            raise disk_full()
        return original(*arguments, **options)

    setattr(owner, name, attempt)
    try:
        yield
    finally:
        setattr(owner, name, original)
    assert len(calls) >= call, f"{name} was called {len(calls)} times"
