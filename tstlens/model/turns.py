"""One thread at a time: hooks belong to the model, so a run sees those of every other thread.

A run, an analysis, hooks put on for a while and dictionaries spliced in for a while each take the
model's turn. Other threads wait: long for a thread that is running the model, shortly for one that
only keeps hooks on it, and then they are told.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar, cast

from tstlens.errors import HookError

Method = TypeVar("Method", bound=Callable[..., Any])


class Turn:
    """The turn of a model: ``with turn`` while something runs; re-entrant in its own thread.

    A copy, or what a pickle gives, is a turn of its own that nobody has.
    """

    idle_s, busy_s = 5.0, 600.0  # without a sign of life of the other thread

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._holder, self._busy, self._signs = "", 0, 0

    def __enter__(self) -> None:
        self._take()
        self._busy += 1

    def __exit__(self, *_: object) -> None:
        self._busy -= 1
        self._give()

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep the turn while the caller's own code goes on, which may never come to an end."""
        self._take()
        try:
            yield
        finally:
            self._give()

    def _take(self) -> None:
        if not self._lock.acquire(blocking=False):
            waited, seen = 0.0, self._signs
            while not self._lock.acquire(timeout=self.idle_s):
                waited = waited + self.idle_s if self._signs == seen else 0.0
                seen = self._signs
                if waited >= (self.busy_s if self._busy else self.idle_s):
                    raise HookError(
                        f"thread {self._holder!r} has hooks or dictionaries on this model, or is "
                        "running it, and has made no step for "
                        f"{waited:.0f} s; this thread would see its edits. Leave the `with` there "
                        "first, or give every thread a model of its own: copy.deepcopy(model)"
                    )
        self._holder = threading.current_thread().name
        self._signs += 1

    def _give(self) -> None:
        self._signs += 1
        self._lock.release()

    def __reduce__(self) -> tuple[Any, ...]:
        return Turn, ()


def in_turn(method: Method) -> Method:
    """The method of a model, run while no other thread has hooks on it or runs it."""

    @functools.wraps(method)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        with self._turn:
            return method(self, *args, **kwargs)

    return cast(Method, call)
