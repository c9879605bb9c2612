"""Files and folders on disk: whole or not there at all, and read without trust.

Writing: everything is made beside its place and then put into it in one step, so that a kill, an
interrupt or a full disk leaves the old one or the new one. What a killed writer left beside the
place is cleared away by the next one; a lock on it tells whether its writer is still at work.

Reading: sizes and nesting have bounds, tensors' shapes are read off the file's header before
anything is built, pipes and devices are not opened, and whatever a damaged file makes a library
raise becomes a :class:`CorruptFileError`.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import html
import json
import os
import re
import shutil
import stat
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from io import BytesIO
from pathlib import Path
from typing import Any

from tstlens.errors import ArgumentError, ConfigVersionError, CorruptFileError, StorageError

try:
    import fcntl
except ImportError:  # Windows: no locks, so nothing is cleared away and writers do not wait
    fcntl = None  # type: ignore[assignment]

_AS_IT_WAS = "what was there is as it was"
_DEEPEST = 64  # levels of nesting in JSON
_MOST_JSON = 256 * 2**20  # bytes
_MOST_UNPACKED = 64 * 2**20  # bytes that any archive may unpack to, and beyond them
_MOST_PACKED = 100  # times its own size; deflate reaches 1,000 on zeros alone
_LONGEST = 255  # bytes of a name, on every common file system
_WAIT = 30.0  # seconds that a writer waits for another one of the same folder
# What libraries raise on writing beside OSError: safetensors its own, torch a RuntimeError.
_WRITE_ERRORS = (OSError, RuntimeError, MemoryError)


# ---------------------------------------------------------------- digests and fingerprints


def digest(path: Path) -> str:
    """SHA-256 of a file, read piece by piece."""
    found = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            found.update(piece)
    return found.hexdigest()


def digest_of_json(record: Any) -> str:
    """SHA-256 of what JSON values say, whatever their layout in a file."""
    text = json.dumps(record, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def check_digest(path: Path, recorded: object, where: str, advice: str) -> None:
    """Raise :class:`CorruptFileError` unless a file has the recorded SHA-256.

    Raises:
        StorageError: the file may not be read.
    """
    try:
        found = digest(path)
    except PermissionError as error:
        raise StorageError(f"{path} cannot be read: {error.strerror}") from error
    except OSError as error:
        raise CorruptFileError(f"{path} cannot be read: {error}; {advice}") from error
    if found != recorded:
        raise CorruptFileError(
            f"{path} is truncated or was altered: its SHA-256 is {found[:12]}…, {where} records "
            f"{str(recorded)[:12]}…; {advice}"
        )


def fingerprint(**parts: Any) -> dict[str, str]:
    """SHA-256 of what a run depends on, by name: tensors, arrays, JSON values, in any nesting.

    Args:
        **parts: the model's ``state_dict``, the data's tensors, the settings, under names that a
            user will read where they differ.
    """
    return {name: _hash_of(value) for name, value in parts.items()}


def _hash_of(value: Any) -> str:
    found = hashlib.sha256()
    _add(found, value)
    return found.hexdigest()


def _add(found: Any, value: Any) -> None:
    if hasattr(value, "detach"):
        value = value.detach().cpu().contiguous()
        found.update(f"tensor {list(value.shape)} {value.dtype}".encode())
        import torch

        if value.numel():
            found.update(value.flatten().view(torch.uint8).numpy())
    elif hasattr(value, "tobytes"):
        found.update(f"array {list(value.shape)} {value.dtype}".encode())
        found.update(value.tobytes())
    elif isinstance(value, Mapping):
        for name in sorted(value, key=str):
            found.update(f"key {name} ".encode())
            _add(found, value[name])
    elif isinstance(value, list | tuple):
        found.update(f"list {len(value)} ".encode())
        for entry in value:
            _add(found, entry)
    else:
        found.update(f"{type(value).__name__} {value!r} ".encode())


def check_same_run(place: Path, then: Any, now: Mapping[str, str]) -> None:
    """Raise :class:`ArgumentError` unless what is kept at a place is of the run that goes on.

    Args:
        place: what the message names.
        then: the fingerprint that was kept, None where an older tstlens kept none.
        now: the fingerprint of the run.
    """
    if not isinstance(then, Mapping) or not then:
        raise ArgumentError(
            f"checkpoint: {place} was written by an older tstlens, which did not record of which "
            "model and data it is, so it cannot be gone on with safely; give another folder, or "
            "delete this one to start anew"
        )
    differ = [name for name in {**then, **now} if then.get(name) != now.get(name)]
    if differ:
        raise ArgumentError(
            f"checkpoint: {place} is of another run (another {' and another '.join(differ)}); go "
            "on with what it was started with, or give another folder to start anew"
        )


# ---------------------------------------------------------------- the place, before the work


def check_file(path: Path) -> None:
    """Raise before long work what :func:`write_bytes` would raise after it.

    Raises:
        StorageError: the place is a folder, or the folder that it lies in cannot be made or
            written to.
    """
    with _at(path, "the file"):
        _refuse_folder_or_strange(path)
        _try_out(path.absolute().parent, path.absolute())


def check_folder(folder: Path, what: str = "the folder", *, replaced: bool = True) -> None:
    """Raise before long work what writing a folder would raise after it.

    Args:
        folder: the place.
        what: goes into it, for messages.
        replaced: whether it is replaced as a whole (see :func:`staged`), or filled.

    Raises:
        StorageError: the place is a file, cannot be made or written to, or holds what would be in
            the way.
    """
    with _at(folder, what, f"; {_AS_IT_WAS}"):
        whole = folder.resolve()
        if whole.exists() and not whole.is_dir():
            raise StorageError(f"expected a folder at {folder}, found a file; choose another place")
        if replaced:
            if Path.cwd().is_relative_to(whole):
                raise StorageError(
                    f"{folder} is or holds the working directory, and it is replaced as a whole; "
                    "choose a folder of its own"
                )
            check_plain(whole)
            _try_out(whole.parent, whole)
        if whole.exists() or not replaced:
            _try_out(whole, whole)


def check_plain(folder: Path) -> None:
    """Raise if a folder holds what cannot be replaced as a whole: links, pipes, devices.

    Links are never followed, since what they point to may be anybody's.
    """
    for above, names, files in os.walk(folder):
        for name in [*names, *files]:
            _refuse_strange(Path(above, name), "is in the way: the folder is replaced as a whole")


def _refuse_folder_or_strange(path: Path) -> None:
    if path.is_dir():
        raise StorageError(f"expected a file to write at {path}, found a folder; name a file in it")
    _refuse_strange(path, "is in the way of a file")


def _refuse_strange(path: Path, why: str) -> None:
    with suppress(FileNotFoundError, NotADirectoryError):
        mode = path.lstat().st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            kind = "symbolic link" if stat.S_ISLNK(mode) else "pipe, socket or device"
            raise StorageError(f"{path} is a {kind} and {why}; move it away")


def _try_out(folder: Path, place: Path) -> None:
    """Make a file in the nearest folder that there is."""
    for part in (place, *place.parents):
        if len(os.fsencode(part.name)) > _LONGEST:
            raise OSError(f"the name {part.name[:20]}… is longer than {_LONGEST} bytes")
    nearest = next(above for above in (folder, *folder.parents) if above.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise OSError(f"{nearest} is no folder that can be written to")
    tempfile.TemporaryFile(dir=nearest).close()  # has no name, so a kill leaves nothing


@contextmanager
def _at(place: Path, what: str, end: str = "") -> Iterator[None]:
    """What writing raises, as a StorageError about this place."""
    try:
        yield
    except StorageError:
        raise
    except _WRITE_ERRORS as error:
        raise _cannot(place, what, getattr(error, "strerror", None) or error, end) from error
    except Exception as error:
        if type(error).__name__ != "SafetensorError":
            raise
        raise _cannot(place, what, error, end) from error


def _cannot(place: Path, what: str, why: object, end: str) -> StorageError:
    if what == "the file":
        return StorageError(f"{place} cannot be written: {why}{end}")
    return StorageError(f"could not write {what} to {place}: {why}{end}")


# ---------------------------------------------------------------- whole files


def write_text(path: Path, text: str) -> Path:
    """Write text to a file in UTF-8, atomically: see :func:`write_bytes`."""
    return write_bytes(path, _utf8(text, path))


def write_bytes(path: Path, content: bytes) -> Path:
    """Write a file, atomically.

    Args:
        path: the file; its folder is made if missing.
        content: what it is to hold.

    Returns:
        The path.

    Raises:
        StorageError: the place is a folder, or cannot be written.
    """
    return write_set({path: content})


def write_set(contents: Mapping[Path, bytes | str]) -> Path:
    """Write files that belong together: all of them, or none.

    Where one is replaced after another, a kill in between leaves the first file of the new set
    without the others: never files of two sets beside each other.

    Args:
        contents: file -> what it is to hold; folders are made if missing.

    Returns:
        The first file.

    Raises:
        StorageError: a place is a folder, a link to nowhere or a pipe, or cannot be written; the
            old files are as they were.
    """
    staged_files: list[tuple[Path, Path, int]] = []
    retired: list[tuple[Path, Path]] = []  # put back unless the first new file stands
    first = next(iter(contents))
    try:
        for path, content in contents.items():
            with _at(path, "the file", f"; {_AS_IT_WAS}"):
                _refuse_folder_or_strange(path)
                path.parent.mkdir(parents=True, exist_ok=True)
                _clear(path)
                part, handle = _locked(lambda place=path: _new_file(place))
                staged_files.append((part, path, handle))
                raw = _utf8(content, path) if isinstance(content, str) else content
                with os.fdopen(os.dup(handle), "wb") as file:
                    file.write(raw)
                    file.flush()
                    os.fsync(file.fileno())
                os.chmod(part, 0o644)
        with _at(first, "the file", f"; {_AS_IT_WAS}"), _one_at_a_time(contents):
            for _, place, _ in staged_files[1:]:
                if place.exists():
                    beside = _beside(place, "was")
                    os.replace(place, beside)
                    retired.append((beside, place))
            for part, place, _ in staged_files:
                os.replace(part, place)
                retired = []
            for place in contents:
                with suppress(OSError):
                    _remove(_beside(place, "was"))
    finally:
        for beside, place in retired:
            with suppress(OSError):
                os.replace(beside, place)
        for part, _, handle in staged_files:
            with suppress(OSError):
                part.unlink(missing_ok=True)
            os.close(handle)
    return first


@contextmanager
def _one_at_a_time(contents: Mapping[Path, Any]) -> Iterator[None]:
    """Two writers of a set, in one process or two of one machine, put its files down in turn."""
    if fcntl is None or len(contents) == 1:
        yield
        return
    name = hashlib.sha256(str(next(iter(contents)).resolve()).encode()).hexdigest()[:16]
    until = time.monotonic() + _WAIT
    with open(Path(tempfile.gettempdir()) / f".tstlens-{os.getuid()}-{name}", "w") as turn:
        while not _lock(turn.fileno()):
            if time.monotonic() > until:
                raise StorageError(
                    f"{next(iter(contents))} is being written by another process; try again later"
                )
            time.sleep(0.02)
        yield


def tensors_as_bytes(tensors: Mapping[str, Any]) -> bytes:
    """Tensors as the content of a safetensors file; those that share memory become their own."""
    from safetensors.torch import save

    own, seen = {}, set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        at = tensor.untyped_storage().data_ptr()
        own[name] = tensor.clone() if at in seen else tensor  # tied weights are refused else
        seen.add(at)
    return save(own, metadata={"format": "pt"})


def write_tensors(path: Path, tensors: Mapping[str, Any]) -> Path:
    """Write tensors as a safetensors file, atomically."""
    return write_bytes(path, tensors_as_bytes(tensors))


def write_torch(path: Path, content: Any) -> Path:
    """Write what ``torch.save`` writes, atomically."""
    import torch

    buffer = BytesIO()
    torch.save(content, buffer)
    return write_bytes(path, buffer.getvalue())


def json_text(record: Any, what: str, indent: int | None = 2, **options: Any) -> str:
    """JSON, if it can be read back: see :func:`read_json`.

    Raises:
        ArgumentError: values that are no JSON, half of a surrogate pair, nesting without end.
    """
    try:
        text = json.dumps(record, indent=indent, **options)
        _check_sound(json.loads(text))
    except (TypeError, ValueError, RecursionError) as error:
        raise ArgumentError(f"{what} must hold JSON values only: {error}") from error
    return text + "\n"


# ---------------------------------------------------------------- whole folders


@contextmanager
def staged(folder: Path, what: str, *, keep: bool = True) -> Iterator[Path]:
    """A folder in the making, which takes the place of ``folder`` at the end, in one step.

    Args:
        folder: the place.
        what: "the model", for messages.
        keep: begin with what the folder holds. Files are linked, not copied: replace them (as
            :func:`write_bytes` and :func:`fill` do), never write into them.

    Raises:
        StorageError: the place cannot be written, or holds links, pipes or devices. What was there
            is as it was.
    """
    place = folder.resolve()
    with _at(folder, what, f"; {_AS_IT_WAS}"):
        check_folder(folder, what)
        place.parent.mkdir(parents=True, exist_ok=True)
        recover(place)
        _clear(place)
        with _waiting(place):
            staging, handle = _locked(lambda: Path(tempfile.mkdtemp(**_named(place))))
            try:
                if keep and place.exists():
                    shutil.copytree(place, staging, copy_function=_link, dirs_exist_ok=True)
                yield staging
                os.chmod(staging, 0o755)
                check_plain(staging)
                _swap_in(staging, place)
            finally:
                shutil.rmtree(staging, ignore_errors=True)
                os.close(handle)


def fill(folder: Path, write: Callable[[Path], Any]) -> None:
    """Have ``write(scratch)`` make a folder, and move its files into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".tstlens.fill.", dir=folder) as scratch:
        made = Path(scratch) / "made"  # which the writer makes, as sae-lens does
        write(made)
        for part in sorted(made.iterdir()):
            os.chmod(part, 0o644)  # safetensors writes for the owner only
            os.replace(part, folder / part.name)


def _link(source: str, target: str) -> str:
    try:
        os.link(source, target)
    except OSError:  # another file system's rules
        shutil.copy2(source, target)
    return target


def _swap_in(staging: Path, place: Path) -> None:
    """Put ``staging`` where ``place`` is; what was there ends up at ``staging``, or beside it."""
    for attempt in range(100):  # another writer may come and go in between
        try:
            if not place.exists():
                os.rename(staging, place)
                return
            if _exchange(staging, place):
                return
            try:
                os.rename(place, _beside(place, "old"))
                os.rename(staging, place)
            finally:
                recover(place)  # as the next reader does after a kill in between
                if place.exists():
                    shutil.rmtree(_beside(place, "old"), ignore_errors=True)
            return
        except OSError as error:
            passing = error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT)
            if not passing or attempt == 99:
                raise


def _exchange(one: Path, other: Path) -> bool:
    """Swap two names in one step; False where the system or the file system cannot."""
    sys.audit("os.rename", str(one), str(other), -1, -1)
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        if sys.platform == "darwin":
            failed = libc.renamex_np(os.fsencode(one), os.fsencode(other), 2)  # RENAME_SWAP
        else:  # AT_FDCWD and RENAME_EXCHANGE of linux/fs.h
            failed = libc.renameat2(-100, os.fsencode(one), -100, os.fsencode(other), 2)
    except (OSError, AttributeError, TypeError):
        return False
    if not failed:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EPERM):
        return False
    raise OSError(code, os.strerror(code))


def recover(place: Path) -> None:
    """Put a folder back that a killed writer had moved away, where names cannot be swapped."""
    with suppress(OSError):
        place = place.resolve()
        if not place.exists():
            os.rename(_beside(place, "old"), place)


# Names beside a place are short, whatever its own name is, and tell which place they belong to.


def _tag(place: Path) -> str:
    return f".tstlens.{hashlib.sha256(os.fsencode(place.name)).hexdigest()[:12]}."


def _named(place: Path) -> dict[str, Any]:
    return {"prefix": f"{_tag(place)}new.", "dir": place.parent}


def _beside(place: Path, end: str) -> Path:
    return place.with_name(f"{_tag(place)}{end}")


def _new_file(place: Path) -> Path:
    handle, name = tempfile.mkstemp(**_named(place))
    os.close(handle)
    return Path(name)


def _locked(make: Callable[[], Path]) -> tuple[Path, int]:
    """Something new with a lock on it, which tells :func:`_clear` that its writer is at work."""
    while True:
        path = make()
        try:
            handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
        except BaseException:
            _remove(path)
            raise
        if _lock(handle) and _still(path, handle):
            return path, handle
        os.close(handle)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _lock(handle: int) -> bool:
    if fcntl is None:
        return True
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.EAGAIN, errno.EACCES)  # no locks here: as if free
    return True


def _still(path: Path, handle: int) -> bool:
    try:
        return os.stat(path).st_ino == os.fstat(handle).st_ino
    except FileNotFoundError:
        return False


def _clear(place: Path) -> None:
    """Remove what killed writers of this place left beside it."""
    if fcntl is None:
        return
    if place.exists():
        _remove(_beside(place, "old"))
    for left in place.parent.glob(f"{_tag(place)}new.*"):
        with suppress(OSError):
            handle = os.open(left, os.O_RDONLY)
            try:
                if not _lock(handle):
                    continue
                _remove(left)
            finally:
                os.close(handle)


@contextmanager
def _waiting(folder: Path) -> Iterator[None]:
    """Hold the lock on a folder that is there; another writer of it waits, then reads it anew."""
    until, handle = time.monotonic() + _WAIT, None
    while folder.is_dir() and fcntl is not None:
        handle = os.open(folder, os.O_RDONLY)
        if _lock(handle) and _still(folder, handle):
            break
        os.close(handle)
        handle = None
        if time.monotonic() > until:
            raise StorageError(f"{folder} is being written by another process; try again later")
        time.sleep(0.02)
    try:
        yield
    finally:
        if handle is not None:
            os.close(handle)


@contextmanager
def claimed(folder: Path | None) -> Iterator[None]:
    """A folder that is this run's alone while it keeps its progress there; made if missing.

    Raises:
        StorageError: it cannot be written, or another run is writing to it.
    """
    if folder is None:
        yield
        return
    with _at(folder, "a run's progress"):
        check_folder(folder, replaced=False)
        folder.mkdir(parents=True, exist_ok=True)
        handle = None if fcntl is None else os.open(folder, os.O_RDONLY)
    try:
        if handle is not None and not _lock(handle):
            raise StorageError(
                f"another run is writing to {folder} at this moment; wait for it, or give another "
                "folder"
            )
        yield
    finally:
        if handle is not None:
            os.close(handle)


# ---------------------------------------------------------------- reading


@contextmanager
def reading(path: Path, fault: str, advice: str) -> Iterator[None]:
    """Whatever a damaged or hostile file makes libraries raise, as a CorruptFileError.

    Args:
        path: the file or folder.
        fault: what is then the case: "holds no whole index".
        advice: what to do.
    """
    try:
        yield
    except StorageError:
        raise
    except PermissionError as error:
        raise StorageError(f"{path} cannot be read: {error.strerror}") from error
    except Exception as error:  # a dozen kinds: zlib's, pickle's, struct's, numpy's, pyarrow's
        # torch's own words end in the advice to load the file unsafely.
        unsafe = type(error).__name__ == "UnpicklingError"
        why = "it is damaged, or holds more than tensors" if unsafe else _one_line(error)
        raise CorruptFileError(f"{path} {fault}: {why}; {advice}") from error


def _one_line(error: Exception) -> str:
    """The first words of a message, which may quote a whole file."""
    text = " ".join(str(error).split()).encode("utf-8", "replace").decode()
    return (text[:300] + "…" if len(text) > 300 else text) or type(error).__name__


def regular(path: Path) -> bool:
    """Whether a file is there that can be read to its end: no pipe, no device, no dangling link."""
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name that is too long, or that holds a NUL
        return False


def _require(path: Path, what: str) -> None:
    if not regular(path):
        raise StorageError(f"expected {what} at {path}, found no file")


def read_bytes(path: Path, what: str, most: int | None = None) -> bytes:
    """A file's content.

    Raises:
        StorageError: no file is there, or it cannot be read.
        CorruptFileError: it is larger than ``most`` bytes.
    """
    _require(path, what)
    try:
        size = path.stat().st_size
        if most is not None and size > most:
            raise CorruptFileError(f"{path} has {size:,} bytes, and {what} at most {most:,}")
        return path.read_bytes()
    except OSError as error:
        if isinstance(error, StorageError):
            raise
        raise StorageError(f"{path} cannot be read: {error.strerror or error}") from error


def read_json(
    path: Path,
    what: str,
    advice: str = "write it again",
    *,
    format: str | None = None,
    version: int | None = None,
) -> dict[str, Any]:
    """A JSON object from a file, with bounds on size and nesting, and its header checked.

    Args:
        path: the file.
        what: "a circuit that Circuit.to_json wrote", for messages.
        advice: what to do about a damaged one.
        format: what its ``format`` has to be.
        version: the newest ``format_version`` that this tstlens reads.

    Raises:
        StorageError: no file is there, or it cannot be read.
        CorruptFileError: it is no JSON object, or not of this format.
        ConfigVersionError: a newer tstlens wrote it.
    """
    content = read_bytes(path, what, _MOST_JSON)
    try:
        record = json.loads(content.decode("utf-8"))
        _check_sound(record)
    except (ValueError, RecursionError, MemoryError) as error:
        why = "nested too deeply" if isinstance(error, RecursionError) else _one_line(error)
        raise CorruptFileError(f"{path} is no JSON that can be read: {why}; {advice}") from error
    if not isinstance(record, dict) or (format is not None and record.get("format") != format):
        raise CorruptFileError(f"{path} is not {what}; {advice}")
    found = record.get("format_version")
    if version is not None and (type(found) is not int or found > version or found < 1):
        raise ConfigVersionError(
            f"{path} has format version {_short(found)}, this tstlens reads up to {version}; "
            "update tstlens"
        )
    return record


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) < 60 else text[:60] + "…"


def _check_sound(record: Any) -> None:
    """Raise ValueError for nesting that later steps would stumble over, and for half characters."""
    level, layer = 0, [record]
    while layer:
        level += 1
        if level > _DEEPEST:
            raise ValueError(f"nested deeper than {_DEEPEST} levels")
        below: list[Any] = []
        for value in layer:
            if isinstance(value, str):
                value.encode("utf-8")  # raises for a lone surrogate
            elif isinstance(value, dict):
                for key in value:
                    key.encode("utf-8")
                below += value.values()
            elif isinstance(value, list):
                below += value
        layer = below


_SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1}
_SIZES |= {"U16": 2, "U32": 4, "U64": 8, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1, "C64": 8}


def shapes_in(path: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors in a safetensors file, off its header alone.

    Raises:
        StorageError: no file is there, or it cannot be read.
        CorruptFileError: it is no safetensors file, or its header claims more than it holds.
    """
    _require(path, "weights")
    with reading(path, "is no safetensors file", "fetch or save it again"):
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(size - 8, 100_000_000):
                raise ValueError("its header is no header")
            header = json.loads(file.read(length).decode("utf-8"))
        shapes = {}
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            count = 1
            for axis in entry["shape"]:
                if type(axis) is not int or axis < 0:
                    raise ValueError(f"{name} has the shape {_short(entry['shape'])}")
                count *= axis
            first, last = entry["data_offsets"]
            held = _SIZES.get(entry["dtype"])
            if not 0 <= first <= last <= size - 8 - length or (
                held is not None and count * held != last - first
            ):
                raise ValueError(f"{name} claims more or less than the file holds")
            shapes[name] = tuple(entry["shape"])
        return shapes


def read_tensors(path: Path) -> dict[str, Any]:
    """The tensors of a safetensors file; errors as for :func:`shapes_in`."""
    from safetensors.torch import load_file

    shapes_in(path)
    with reading(path, "is no safetensors file", "fetch or save it again"):
        return load_file(path)


def check_packed(path: Path) -> None:
    """Refuse an archive (``.npz``, ``.pt``) that claims to unpack to far more than its own size.

    Raises:
        CorruptFileError: nothing of it is unpacked then. A file that is no archive passes.
    """
    with path.open("rb") as file:
        if not zipfile.is_zipfile(file):
            return
        with zipfile.ZipFile(file) as archive:
            claimed = sum(entry.file_size for entry in archive.infolist())
    most = _MOST_UNPACKED + _MOST_PACKED * path.stat().st_size
    if claimed > most:
        raise CorruptFileError(
            f"{path} claims to unpack to {claimed:,} bytes, more than the {most:,} that are read "
            "from an archive of its size; fetch or save it again"
        )


def read_torch(path: Path, what: str, advice: str) -> Any:
    """What ``torch.save`` wrote, tensors and plain values only.

    Raises:
        StorageError: no file is there, or it cannot be read.
        CorruptFileError: it is damaged, or holds code.
    """
    import torch

    _require(path, what)
    with reading(path, f"does not hold {what}", advice):
        check_packed(path)
        return torch.load(path, weights_only=True, map_location="cpu")


# ---------------------------------------------------------------- words in a README


def plain(text: object) -> str:
    """A name as it reads in Markdown: nothing in it is markup, HTML or the end of a cell."""
    shown = html.escape(" ".join(_shown(str(text)).split()), quote=False)
    return re.sub(r"([\\`*\[\]|]|(?<!\w)_|_(?!\w))", r"\\\1", shown)


def quoted(text: object) -> str:
    """A name as a string in Python code, on one line."""
    shown = _shown(str(text))
    return f'"{shown}"' if re.fullmatch(r"[\w./ -]*", shown, re.ASCII) else ascii(shown)


def fenced(text: object, language: str) -> str:
    """A block of code in Markdown, whatever backticks the code holds."""
    shown = _shown(str(text))
    longest = max((len(run) for run in re.findall(r"`+", shown)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{shown}\n{fence}"


def _shown(text: str) -> str:
    return text.encode("utf-8", "replace").decode("utf-8")


def _utf8(text: str, path: Path) -> bytes:
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ArgumentError(
            f"the text for {path} holds half of a surrogate pair, which is no character: {error}"
        ) from error
