"""Files and folders that appear whole or not at all, whatever ends the process at whatever moment.

A draft lies beside its target under the name ``.NAME.partial-PID-RANDOM`` and holds a lock for as long as its process lives.
A draft without one was left by a process that was killed; the next writer of the same target removes it.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
import stat
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from stageparity import strict

__all__ = ["collect", "exchange", "is_stream", "replacing", "said", "sync", "write_bytes", "write_text"]

_TRIES = 100
_ROOM = "make room there, or write to another place"
_REMEDIES: dict[int | None, str] = {
    errno.ENOSPC: _ROOM,
    errno.EDQUOT: _ROOM,
    errno.EFBIG: "raise the limit (ulimit -f), or write to another place",
    errno.EROFS: "write to another place",
}
_DRAFT = re.compile(r"\..*\.partial-\d+-[a-z0-9_]{8}")
#: Names of what this process already has open: written into where it stands, as a shell's own redirection would.
_STREAMS = {"/dev/stdin": 0, "/dev/stdout": 1, "/dev/stderr": 2}
_DESCRIPTOR = re.compile(r"/(?:dev|proc/self)/fd/(\d{1,9})")


def write_text(path: str | Path, text: str) -> None:
    """Write a file in UTF-8, see `write_bytes`."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: str | Path, data: bytes) -> None:
    """Write or replace a file in one step, flushed to disk. A link is followed: what it names is replaced. What is no
    regular file, such as a pipe, /dev/null or /dev/stdout, is written into.

    Raises OSError that names ``path``; the old file is then untouched.
    """
    with _told_of(Path(path)):
        if is_stream(path):
            with open(_opened(path), "wb") as out:
                out.write(data)
            return
        path = Path(os.path.realpath(path))
        found = path.stat().st_mode if path.exists() else None
        collect(path)
        handle, draft = _locked_draft(path, folder=False)
        try:
            with open(handle, "wb") as out:
                out.write(data)
                out.flush()
                if found is not None:
                    os.fchmod(handle, found & 0o777)
                os.fsync(handle)
                os.replace(draft, path)
            sync(path.parent)
        except BaseException:
            draft.unlink(missing_ok=True)
            raise


def is_stream(path: str | Path) -> bool:
    """Is there something that has no content to be kept: a pipe, a device, a descriptor of this process?"""
    try:
        return _descriptor(path) is not None or not stat.S_ISREG(os.stat(path).st_mode)
    except FileNotFoundError:
        return False


def _descriptor(path: str | Path) -> int | None:
    found = _DESCRIPTOR.fullmatch(str(path))
    return int(found[1]) if found else _STREAMS.get(str(path))


def _opened(path: str | Path) -> int:
    """A handle of a stream. A pipe that nobody reads is an error: opening one waits, perhaps for ever."""
    if (number := _descriptor(path)) is not None:
        if number == 1:
            sys.stdout.flush()  # what was printed before stands before it
        return os.dup(number)
    try:
        handle = os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    except OSError as error:
        if error.errno != errno.ENXIO:
            raise
        raise OSError(errno.ENXIO, "is a pipe that nobody reads; start its reader first") from None
    os.set_blocking(handle, True)
    return handle


@contextmanager
def replacing(target: str | Path, check: Callable[[Path], None] | None = None) -> Iterator[Path]:
    """A draft folder that becomes ``target`` if the block ends well and vanishes if not.

    The target may be absent, or an empty folder; a full one is replaced where ``check`` allows it, by one exchange of the two
    folders. check: called with the folder that would be lost, before anything is written and again when it has been
    exchanged; what it raises leaves the target as it was. Without it a full folder raises FileExistsError.

    Files in the draft are flushed by whoever writes them. Raises OSError that names the target, not the draft.
    """
    target = Path(target).absolute()
    with _told_of(target), _drafted(target, check or _refuse) as draft:
        yield draft


@contextmanager
def _drafted(target: Path, check: Callable[[Path], None]) -> Iterator[Path]:
    if _is_full(target):
        check(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    collect(target)
    handle, draft = _locked_draft(target, folder=True)
    try:
        yield draft
        sync(draft)
        if _is_full(target):
            with _held(target):  # nobody may collect the old folder before it is known that it may go
                exchange(draft, target)
                try:
                    check(draft)  # now the old folder; something may have come into it meanwhile
                except BaseException:
                    exchange(draft, target)
                    raise
        else:
            os.rename(draft, target)
        sync(target.parent)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
        os.close(handle)


def said(error: OSError) -> str:
    """What the system says, and what helps where something could not be written; no name of a file."""
    remedy = _REMEDIES.get(error.errno)
    return strict.reason(error) + (f"; {remedy}" if remedy else "")


@contextmanager
def _told_of(target: Path) -> Iterator[None]:
    """What the system says of a draft, or of nothing by name (a full disk), is told of the target: that is what a user named."""
    try:
        yield
    except OSError as error:
        named = Path(os.fsdecode(error.filename)) if isinstance(error.filename, (str, bytes)) else None
        if error.errno is None or (named is not None and not any(map(_DRAFT.fullmatch, named.parts))):
            raise
        raise OSError(error.errno, error.strerror, str(target)) from error


def collect(target: str | Path) -> list[Path]:
    """Remove what killed writers of ``target`` left beside it; returns what was removed. Never waits, never fails."""
    target = Path(target).absolute()
    pattern, gone = re.compile(re.escape(_prefix(target)) + r"\d+-[a-z0-9_]{8}"), []
    with suppress(OSError):
        for path in [path for path in target.parent.iterdir() if pattern.fullmatch(path.name)]:
            with suppress(OSError):
                handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
                    gone.append(path)
                finally:
                    os.close(handle)
    return gone


def exchange(one: Path, other: Path) -> None:
    """Swap two folders in one step (renameat2 on Linux, renamex_np on macOS). Raises OSError where that cannot be done."""
    import ctypes  # costs more than the rest of this module

    libc = ctypes.CDLL(None, use_errno=True)
    if sys.platform == "darwin":
        failed = libc.renamex_np(os.fsencode(one), os.fsencode(other), 2)
    elif hasattr(libc, "renameat2"):
        failed = libc.renameat2(-100, os.fsencode(one), -100, os.fsencode(other), 2)
    else:
        raise OSError(errno.ENOSYS, "this system cannot exchange two folders in one step; write to a new place")
    if failed:
        code = ctypes.get_errno()
        if code in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
            raise OSError(code, "this file system cannot exchange two folders in one step; write to a new place")
        raise OSError(code, os.strerror(code), str(other))


def sync(path: str | Path) -> None:
    """Flush a file, or a folder's list of names, to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _locked_draft(target: Path, *, folder: bool) -> tuple[int, Path]:
    """A new draft and the handle that holds its lock. Another writer may collect a draft before it is locked: try again."""
    prefix = f"{_prefix(target)}{os.getpid()}-"
    mode = _umask()
    for _ in range(_TRIES):
        if folder:
            draft = Path(tempfile.mkdtemp(prefix=prefix, dir=target.parent))
        else:
            first, name = tempfile.mkstemp(prefix=prefix, dir=target.parent)
            os.close(first)
            draft = Path(name)
        try:
            handle = os.open(draft, (os.O_RDONLY if folder else os.O_RDWR) | os.O_NOFOLLOW)
        except FileNotFoundError:
            continue
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.stat(draft).st_ino == os.fstat(handle).st_ino:
                os.fchmod(handle, (0o777 if folder else 0o666) & ~mode)
                return handle, draft
        except OSError as error:
            if error.errno in (errno.ENOLCK, errno.ENOTSUP, errno.EINVAL):  # a file system without locks
                return handle, draft
            if error.errno not in (errno.EWOULDBLOCK, errno.ENOENT):
                os.close(handle)
                raise
        os.close(handle)
    raise OSError(errno.EAGAIN, "another process removes every draft at once", str(target))


@contextmanager
def _held(folder: Path) -> Iterator[None]:
    """The lock of a folder that is about to be exchanged."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OSError(errno.EBUSY, "another process is replacing it; wait for it", str(folder)) from None
        except OSError:
            pass  # a file system without locks: nothing is collected there either
        yield
    finally:
        os.close(handle)


def _prefix(target: Path) -> str:
    return f".{target.name[:50]}.partial-"  # room for what follows within a name's 255 bytes


def _is_full(folder: Path) -> bool:
    return folder.is_dir() and any(folder.iterdir())


def _refuse(folder: Path) -> None:
    raise FileExistsError(errno.EEXIST, "is there and not empty", str(folder))


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
