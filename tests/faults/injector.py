"""Faults at the n-th step that a piece of code takes on the file system.

Python reports every opening, renaming, linking and removing of a file to its audit hooks. A hook
that counts them and kills the process (or fails) at the n-th is a kill at a chosen place: all can
be tried one after the other, and the same number is the same place again.
"""

from __future__ import annotations

import errno
import os
import pickle
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from tstlens.errors import TstlensError

_CHANGING = {"os.rename", "os.mkdir", "os.link", "os.remove", "os.rmdir", "os.symlink", "os.chmod"}
_GROWING = {"open", "os.mkdir", "os.link"}
LONG = os.environ.get("TSTLENS_FAULTS") == "long"
TALLY: Counter[str] = Counter()  # of what was done to whom, for the last line of a run
_armed: list[Callable[[str, str], None]] = []


def _hook(event: str, args: tuple) -> None:
    if not _armed or not (event in _CHANGING or event == "open"):
        return
    if event == "open":
        flags = args[2] if isinstance(args[2], int) else 0
        if not flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            return
    if isinstance(args[0], str | bytes | os.PathLike):
        _armed[-1](event, os.fsdecode(args[0]))


sys.addaudithook(_hook)


@contextmanager
def steps(root: Path, act: Callable[[int, str], None]) -> Iterator[list[str]]:
    """Call ``act(number, event)`` at every step below a folder; the events are collected."""
    seen: list[str] = []

    def at(event: str, path: str) -> None:
        if path.startswith(str(root)):
            seen.append(event)
            act(len(seen), event)

    _armed.append(at)
    try:
        yield seen
    finally:
        _armed.pop()


def count(root: Path, work: Callable[[], object]) -> int:
    """How many steps a piece of work takes."""
    with steps(root, lambda number, event: None) as seen:
        work()
    return len(seen)


def killed_at(root: Path, number: int, work: Callable[[], object]) -> bool:
    """Do the work in a fork that dies at its step ``number``; whether it got that far."""
    child = os.fork()
    if child == 0:
        try:
            torch.set_num_threads(1)
            with steps(root, lambda at, event: os._exit(9) if at == number else None):
                work()
            os._exit(0)
        except BaseException:
            os._exit(1)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, 9), "the work itself failed"
    TALLY["kills"] += code == 9
    return code == 9


@contextmanager
def full_disk(root: Path, number: int) -> Iterator[None]:
    """From step ``number`` on nothing new fits; renaming and removing still work."""
    TALLY["full disks"] += 1

    def act(at: int, event: str) -> None:
        if at >= number and event in _GROWING:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with steps(root, act):
        yield


@contextmanager
def fails_once(root: Path, number: int) -> Iterator[None]:
    """Step ``number`` fails, whatever it is."""
    TALLY["failing steps"] += 1

    def act(at: int, event: str) -> None:
        if at == number:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    with steps(root, act):
        yield


@contextmanager
def read_only(root: Path, number: int) -> Iterator[None]:
    """From step ``number`` on nothing can be changed any more, not even what is half done."""
    TALLY["disks that turn read-only"] += 1

    def act(at: int, event: str) -> None:
        if at >= number:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    with steps(root, act):
        yield


def as_nobody(work: Callable[[], object]) -> BaseException | None:
    """Do the work in a fork of an ordinary user, whom permissions hold; what it raised."""

    def humbly() -> None:
        if os.getuid() == 0:
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
        work()

    return forked(humbly)


def forked(work: Callable[[], object]) -> BaseException | None:
    """Do the work in a fork of this process; what it raised."""
    near, far = os.pipe()
    child = os.fork()
    if child == 0:
        found: BaseException | None = None
        try:
            torch.set_num_threads(1)
            work()
        except BaseException as error:
            found = error
        os.write(far, pickle.dumps(found))
        os._exit(0)
    os.close(far)
    with os.fdopen(near, "rb") as answer:
        found = pickle.loads(answer.read())
    os.waitpid(child, 0)
    return found


def peak(work: Callable[[], object]) -> int:
    """Most memory, in bytes, that a piece of work takes beyond what is taken before it."""

    def kilobytes(name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(name))

    def measured() -> None:
        Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark anew
        before = kilobytes("VmRSS")
        with suppress(TstlensError):
            work()
        raise MemoryError(1024 * (kilobytes("VmHWM") - before))

    found = forked(measured)
    assert isinstance(found, MemoryError), found
    return found.args[0]


def chosen(n_steps: int) -> list[int]:
    """All steps in the long profile (``TSTLENS_FAULTS=long``), about a dozen of them else."""
    if LONG or n_steps <= 12:
        return list(range(1, n_steps + 1))
    return sorted({1 + round(i * (n_steps - 1) / 11) for i in range(12)})
