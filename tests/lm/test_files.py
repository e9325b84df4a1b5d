"""Temporary files: which are left by processes that are gone, and who deletes them."""

from __future__ import annotations

import os
import shutil
import signal
import socket
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest

from robustgate.lm.files import remove_abandoned, remove_folder, scratch_folder, write_atomic

from .conftest import fork, tree


def killed_writer(path: Path) -> int:
    """Let a process die while it writes a file; return its number."""
    child = fork(partial(write_atomic, path, b"new"), kill_at=0)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    return child


@pytest.mark.parametrize("host", ["node1", "node1.cluster.local", "a-b.c+d"])
def test_what_a_killed_process_left_is_known_by_the_whole_name_of_the_host(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, host: str
) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: host)
    (tmp_path / "deep").mkdir()
    gone = killed_writer(tmp_path / "deep" / "x.safetensors")
    for other in (f"z.{host}", host.partition(".")[2], "safetensors"):
        monkeypatch.setattr(socket, "gethostname", lambda other=other: other)
        assert remove_abandoned(tmp_path) == 0
    monkeypatch.setattr(socket, "gethostname", lambda: host)
    (tmp_path / f".y.{host}~{gone}~.tmp").mkdir()  # as earlier versions named them
    assert remove_abandoned(tmp_path) == 2
    assert [path.name for path in tmp_path.rglob("*")] == ["deep"]


def test_processes_that_are_numbered_elsewhere_are_not_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Containers that share the host's name count their processes by themselves."""
    stat = os.stat

    def elsewhere(path: object, **options: object) -> object:
        there = path == "/proc/self/ns/pid"
        return SimpleNamespace(st_ino=7) if there else stat(path, **options)  # type: ignore[call-overload]

    with monkeypatch.context() as container:
        container.setattr(os, "stat", elsewhere)
        killed_writer(tmp_path / "x")
        assert len(tree(tmp_path)) == 1
    assert remove_abandoned(tmp_path) == 0
    write_atomic(tmp_path / "x", b"ours")
    assert len(tree(tmp_path)) == 2
    monkeypatch.setattr(os, "stat", elsewhere)
    assert remove_abandoned(tmp_path) == 1
    assert tree(tmp_path) == {"x": b"ours"}


def test_the_next_writer_of_a_name_deletes_what_was_left(tmp_path: Path) -> None:
    killed_writer(tmp_path / "x")
    with scratch_folder(tmp_path / "x") as scratch:
        assert list(tmp_path.iterdir()) == [scratch]
    assert list(tmp_path.iterdir()) == []


def test_two_processes_delete_the_same_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = os.waitpid(fork(lambda: None), 0)[0]
    remove = shutil.rmtree

    def other_first(path: Path, **options: object) -> None:
        monkeypatch.setattr(shutil, "rmtree", remove)
        (path / "one").unlink()  # between the list of the folder and the deletion
        raise FileNotFoundError(path / "one")

    for delete in (remove_abandoned, lambda folder: remove_folder(folder / "x")):
        for folder in ("x", f".x.{socket.gethostname()}~{gone}~.tmp"):
            (tmp_path / folder).mkdir(exist_ok=True)
            for name in ("one", "two"):
                (tmp_path / folder / name).write_bytes(b"")
        monkeypatch.setattr(shutil, "rmtree", other_first)
        delete(tmp_path)
        assert shutil.rmtree is remove
        assert all(name.startswith("x/") for name in tree(tmp_path))
    assert tree(tmp_path) == {}
