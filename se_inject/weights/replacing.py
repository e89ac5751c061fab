"""Replace files: written in a folder beside the target, then renamed, so that an interruption loses nothing."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from ..errors import WeightsError
from ..undo import undone

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

Write = Callable[[str], object]  # gets the name of a new file


def destination(path: str | os.PathLike[str]) -> Path:
    """The file that takes what is written to `path`: a link is followed, so that it stays a link.

    Raises:
        WeightsError: It is a folder, a pipe or a device. These cannot be replaced by a file, and are never written to: who
            reads weights needs a file.
    """
    try:
        target = Path(os.fsdecode(os.path.realpath(path)))
    except (TypeError, ValueError) as error:
        raise WeightsError(f"cannot write {path!r} ({error}): give the path of a file") from error
    try:
        mode = target.stat().st_mode
    except OSError:  # there is none yet, or its folder cannot be used, which `replace_files` says
        return target
    if stat.S_ISDIR(mode):
        raise WeightsError(f"cannot write {str(path)!r}, which is a folder: give a file in it, such as model.safetensors")
    if not stat.S_ISREG(mode):
        kind = "pipe" if stat.S_ISFIFO(mode) else "socket" if stat.S_ISSOCK(mode) else "device"
        raise WeightsError(f"cannot write {str(path)!r}, which is a {kind}: give the name of a file")
    return target


def write_atomically(path: str | os.PathLike[str], write: Write) -> None:
    """Call `write` with a temporary name, then rename the file to `path`. A link is followed.

    Raises:
        WeightsError: See `destination` and `replace_files`.
    """
    target = destination(path)
    replace_files([(target, write)], path, re.escape(target.name), status_of(target))


def status_of(*files: Path) -> os.stat_result | None:
    """The status of the first of these files that exists."""
    for file in files:
        with contextlib.suppress(OSError):
            return file.stat()
    return None


def replace_files(
    files: Sequence[tuple[Path, Write]], path: object, names: str, like: os.stat_result | None,
    clean_up: Callable[[], object] = lambda: None,
) -> None:  # fmt: skip
    """Write all `files`, which are in one folder, then rename them in order. On any error, none is replaced.

    Renaming and `clean_up` hold a lock on the folder, so that two processes that save one model do not mix their files.
    The last file decides which save is read: where it is not renamed, the others are removed.

    Args:
        files: Each target, and what writes it.
        path: The path that the user gave, for the messages.
        names: A regular expression for the names of targets, whose abandoned temporary folders are removed.
        like: The status of the file that is replaced: mode and owner stay. None is a new file, which follows the umask.
        clean_up: Called after the last rename.

    Raises:
        WeightsError: A file cannot be written.
    """
    from safetensors import SafetensorError

    folder = files[0][0].parent
    renamed: list[Path] = []
    try:
        _remove_abandoned(folder, names)
        stack = contextlib.ExitStack()
        with undone(stack.close):
            written = []
            for target, write in files:
                file = stack.enter_context(_temporary(target))
                mode = file.stat().st_mode  # by the umask, which cannot be read without a moment in which it is another
                write(str(file))
                _finish(file, mode, like)
                written.append((file, target))
            with _locked(folder):
                try:
                    for file, target in written:
                        os.replace(file, target)
                        renamed.append(target)
                except BaseException:
                    if written[-1][0].exists():
                        for target in renamed:
                            target.unlink(missing_ok=True)
                        renamed.clear()
                    raise
                clean_up()
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise WeightsError(
            f"cannot write {str(path)!r} ({reason}): choose a folder that exists, is writable and has room"
            + ("" if renamed else "; what was there is unchanged")) from error


@contextlib.contextmanager
def _temporary(target: Path) -> Iterator[Path]:
    """An empty file in a new folder beside `target`; the folder is removed at the end.

    A folder, because safetensors writes to a temporary name of its own, which also has to go after a kill. A lock on the
    folder says that its process lives: a process id says nothing on a folder that several machines or containers share.
    """
    while True:
        folder = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
        folder.mkdir(mode=0o700)
        lock = _lock(folder)
        if folder.exists():  # else another process took it for abandoned, before it was locked
            break
        _unlock(lock)
    stack = contextlib.ExitStack()
    stack.callback(_unlock, lock)
    stack.callback(shutil.rmtree, folder, ignore_errors=True)
    with undone(stack.close):
        file = folder / target.name
        file.touch()
        yield file


def _finish(file: Path, mode: int, like: os.stat_result | None) -> None:
    """Write a file through to the disk, with the mode and owner of the file that it replaces."""
    if like is not None:
        mode, now = like.st_mode, file.stat()
        if hasattr(os, "chown") and (like.st_uid, like.st_gid) != (now.st_uid, now.st_gid):
            with contextlib.suppress(PermissionError):  # only root gives files away
                os.chown(file, like.st_uid, like.st_gid)
    os.chmod(file, stat.S_IMODE(mode))
    with open(file, "rb") as opened:
        os.fsync(opened.fileno())


def _remove_abandoned(folder: Path, names: str) -> None:
    """Remove temporary folders, and files of earlier versions, that killed processes left."""
    pattern = re.compile(rf"\.(?:{names})\.[a-z0-9_]{{8}}\.tmp")
    with contextlib.suppress(OSError):  # what cannot be read or removed is in nobody's way
        for left in [file for file in folder.iterdir() if pattern.fullmatch(file.name)]:
            lock = _lock(left, wait=False)
            if lock is not None:  # else its process lives, or cannot be asked
                shutil.rmtree(left) if left.is_dir() else left.unlink()
                _unlock(lock)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    stack = contextlib.ExitStack()
    stack.callback(_unlock, _lock(folder))
    with undone(stack.close):
        yield


def _lock(file: Path, wait: bool = True) -> int | None:
    """Lock a file or a folder until `_unlock` or the end of the process. None where that is not possible."""
    if fcntl is None:
        return None
    opened = None
    try:
        opened = os.open(file, os.O_RDONLY)
        fcntl.flock(opened, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        if opened is not None:
            os.close(opened)
        return None
    return opened


def _unlock(lock: int | None) -> None:
    if lock is not None:
        fcntl.flock(lock, fcntl.LOCK_UN)  # forked processes have the lock too, and closing would leave it to them
        os.close(lock)
