"""Files that are either whole or absent, content hashes, and optional dependencies."""

from __future__ import annotations

import errno
import fcntl
import glob
import hashlib
import importlib
import json
import os
import re
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import Any

_FULL = ("No space left on device", "inline_container.cc")  # safetensors, torch.save
_NAME = re.compile(r"[\w][\w.+-]{0,99}")


def require(module: str) -> ModuleType:
    """Import an optional dependency.

    Args:
        module: its import name, such as ``"transformers"``.

    Returns:
        The module.

    Raises:
        ImportError: it is not installed, or broken; the message says how to install it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f'{module} cannot be imported ({error}); install it with: pip install "robustgate[lm]"'
        ) from error


def check_name(name: str, what: str) -> str:
    """Return ``name`` if it can name a folder on every file system.

    Args:
        name: the name of an expert or of a corpus.
        what: what it names, for the message.

    Returns:
        The same name.

    Raises:
        ValueError: another character than letters, digits and ``_ . + -``, or more than 100.
    """
    if not _NAME.fullmatch(name):
        raise ValueError(
            f"{what} name {name!r}: expected 1 to 100 letters, digits or _ . + -, "
            "starting with a letter, a digit or _"
        )
    return name


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, for use inside another message."""
    return str(error).strip().partition("\n")[0]


def sha256_json(value: Any) -> str:
    """Return the SHA-256 of a JSON value, whatever the order of its keys."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def write_atomic(path: Path, content: bytes) -> None:
    """Write a file so that readers see the old content or the new one, never a part.

    A temporary file in the same folder is written, flushed to the disk and renamed. When this
    fails, the temporary file is removed and ``path`` keeps what it held.

    Args:
        path: the file; its folder must exist.
        content: all of its bytes.

    Raises:
        OSError: the write failed; the message names the file, and says so if the disk is full.
    """
    temporary = _temporary(path)
    try:
        with explain_full_disk(path):
            with open(temporary, "wb") as stream:
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    fsync(path.parent)


@contextmanager
def explain_full_disk(path: Path) -> Iterator[None]:
    """Turn any library's error about a full disk into one that names ``path`` and the remedy.

    Raises:
        OSError: the disk is full.
    """
    try:
        yield
    except Exception as error:
        full = getattr(error, "errno", None) == errno.ENOSPC
        if not full and not any(sign in str(error) for sign in _FULL):
            raise
        remedy = "the disk is full; no half-written file was kept, so free some space and run again"
        raise OSError(errno.ENOSPC, remedy, str(path)) from error


def write_json(path: Path, value: Any) -> None:
    """Write a JSON value atomically, with sorted keys and a final newline."""
    text = json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    write_atomic(path, text.encode())


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        FileNotFoundError: it is not there.
        ValueError: it is not JSON in UTF-8; the message names the file and the place.
    """
    try:
        return json.loads(path.read_bytes())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from error


def fsync(path: Path) -> None:
    """Flush a file, or the entries of a folder (new names, renames, removals), to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Build a folder that appears whole or not at all.

    Args:
        path: the folder to make; its parents are made if needed.

    Yields:
        A temporary folder beside it, renamed to ``path`` when the block ends without an error and
        deleted otherwise.

    Raises:
        FileExistsError: ``path`` is already there.
    """
    if path.exists():
        raise FileExistsError(f"{path}: already exists; delete it first or choose another name")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _fresh(path)
    temporary.mkdir()
    try:
        with explain_full_disk(path):
            yield temporary
            for file in temporary.rglob("*"):
                fsync(file)
            fsync(temporary)
            temporary.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    fsync(path.parent)


@contextmanager
def scratch_folder(path: Path) -> Iterator[Path]:
    """Lend a hidden folder beside ``path``, for trials on the same disk, and delete it at the end.

    Args:
        path: a file or folder, there or not.

    Yields:
        The folder. If this is killed, the next one for the same ``path`` deletes it.
    """
    temporary = _fresh(path)
    temporary.mkdir()
    try:
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def remove_abandoned(folder: Path) -> int:
    """Delete the temporary files below a folder whose writer no longer runs on this machine.

    Args:
        folder: searched with all its subfolders.

    Returns:
        How many were deleted.
    """
    count = 0
    for place, folders, files in os.walk(folder):
        named = [name for name in (*folders, *files) if name.endswith("~.tmp")]
        found = [name for name in named if _abandoned(Path(place, name))]
        for name in found:
            _delete(Path(place, name))
        folders[:] = [name for name in folders if name not in found]
        count += len(found)
    return count


def remove_folder(path: Path) -> None:
    """Delete a folder; it vanishes by a rename first, so that nobody finds a part of it.

    What an earlier call for the same folder left when it was killed is deleted too.
    """
    hidden = _fresh(path)
    try:
        path.rename(hidden)
    except FileNotFoundError:
        return
    fsync(path.parent)
    _delete(hidden)


@contextmanager
def exclusive(path: Path, *, wait: bool = True) -> Iterator[None]:
    """Hold a lock that ends with the process, however it ends.

    Args:
        path: the lock file, made if needed and left there.
        wait: wait for the holder; otherwise raise.

    Raises:
        BlockingIOError: another process holds it and ``wait`` is false.
    """
    with open(path, "ab") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError as error:
            raise BlockingIOError(error.errno, "another process is at work here", str(path)) from (
                error
            )
        yield


def _temporary(path: Path) -> Path:
    """Return a name beside ``path`` that says which process of which machine writes it."""
    return path.with_name(f".{path.name}{_machine()}{os.getpid()}~.tmp")


def _machine() -> str:
    """Return what comes before the number of a process: the host's name and who numbers there.

    Containers may share the name of a host, but each counts its processes by itself.
    """
    try:
        namespace = os.stat("/proc/self/ns/pid").st_ino
    except OSError:  # not Linux
        namespace = 0
    return f"~{socket.gethostname()}~{namespace}~"


def _fresh(path: Path) -> Path:
    """Return the temporary name, after deleting what is left there from processes that are gone."""
    temporary = _temporary(path)
    for other in path.parent.glob(f".{glob.escape(path.name)}[~.]*~.tmp"):
        if other == temporary or _abandoned(other):
            _delete(other)
    return temporary


def _delete(path: Path) -> None:
    """Delete a file or a folder, though others may be deleting it at the same time."""
    while path.is_dir():
        with suppress(FileNotFoundError):
            shutil.rmtree(path)
    path.unlink(missing_ok=True)


def _abandoned(path: Path) -> bool:
    """Whether a file is temporary and its writer was a process of this machine that is gone."""
    older = f".{socket.gethostname()}~"  # in names that earlier versions gave
    writer = "|".join(map(re.escape, (_machine(), older)))
    match = re.fullmatch(rf"\..+(?:{writer})(\d+)~\.tmp", path.name)
    if match is None:
        return False
    try:
        os.kill(int(match[1]), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass
    return False
