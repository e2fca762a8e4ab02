"""Atomic writes and locks."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ddpm_hf import files
from ddpm_hf.files import atomic_file, atomic_folder, lock_folder, staging_folder

ROOT = Path(__file__).resolve().parent.parent


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def fail(*_args) -> None:
    raise OSError(28, "No space left on device")


# ------------------------------------------------------------------ files


@pytest.mark.parametrize("content, expected", [("ü\n", "ü\n".encode()), (b"\0\xff", b"\0\xff")])
def test_atomic_file_writes_text_as_utf8_and_bytes(tmp_path, content, expected):
    (tmp_path / "a.txt").write_text("old")
    for name in ("a.txt", "b.txt"):
        atomic_file(tmp_path / name, content)
        assert (tmp_path / name).read_bytes() == expected
    assert names(tmp_path) == ["a.txt", "b.txt"]


@pytest.mark.parametrize("step", ["sync", "replace"])
def test_a_failed_atomic_file_leaves_the_old_content(tmp_path, monkeypatch, step):
    (tmp_path / "a.txt").write_text("old")
    monkeypatch.setattr(*((files, "sync") if step == "sync" else (os, "replace")), fail)
    with pytest.raises(OSError, match="No space left"):
        atomic_file(tmp_path / "a.txt", "new")
    assert names(tmp_path) == ["a.txt"] and (tmp_path / "a.txt").read_text() == "old"


# ------------------------------------------------------------------ folders


def make_folder(folder: Path, content: str = "old") -> Path:
    folder.mkdir()
    (folder / "a.txt").write_text(content)
    (folder / "only-in-the-old-one.txt").write_text(content)
    return folder


def test_atomic_folder_replaces_the_old_folder_completely(tmp_path):
    folder = make_folder(tmp_path / "model")
    with atomic_folder(folder) as staged:
        assert names(staged) == [] and staged.parent == tmp_path and staged.name.startswith(".")
        (staged / "sub").mkdir()
        (staged / "sub" / "a.txt").write_text("new")
        assert (folder / "a.txt").read_text() == "old"
    assert names(tmp_path) == ["model"] and names(folder) == ["sub"]
    assert (folder / "sub" / "a.txt").read_text() == "new"


def test_atomic_folder_creates_missing_parents(tmp_path):
    with atomic_folder(tmp_path / "a" / "b") as staged:
        (staged / "file").touch()
    assert names(tmp_path / "a") == ["b"] and names(tmp_path / "a" / "b") == ["file"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt(), ValueError("bad")])
def test_atomic_folder_keeps_the_old_folder_if_anything_is_raised(tmp_path, error):
    folder = make_folder(tmp_path / "model")
    with pytest.raises(type(error)), atomic_folder(folder) as staged:
        (staged / "a.txt").write_text("half")
        raise error
    assert names(tmp_path) == ["model"] and (folder / "a.txt").read_text() == "old" and len(names(folder)) == 2


@pytest.mark.parametrize("function", ["sync", "rename"])
def test_atomic_folder_keeps_the_old_folder_if_it_cannot_be_replaced(tmp_path, monkeypatch, function):
    folder = make_folder(tmp_path / "model")  # a mount point, for example, cannot be renamed
    monkeypatch.setattr(*((files, "sync") if function == "sync" else (os, "rename")), fail)
    with pytest.raises(OSError, match="No space left"), atomic_folder(folder) as staged:
        (staged / "a.txt").write_text("new")
    assert names(tmp_path) == ["model"] and (folder / "a.txt").read_text() == "old" and len(names(folder)) == 2


def test_atomic_folder_restores_the_old_folder_if_the_new_one_fails(tmp_path, monkeypatch):
    folder, rename = make_folder(tmp_path / "model"), os.rename

    def fail_for_staged(source, target):
        fail() if Path(source).name == ".model.unfinished" else rename(source, target)

    monkeypatch.setattr(os, "rename", fail_for_staged)
    with pytest.raises(OSError, match="No space left"), atomic_folder(folder) as staged:
        (staged / "a.txt").write_text("new")
    assert names(tmp_path) == ["model"] and (folder / "a.txt").read_text() == "old"


def test_a_folder_left_by_a_kill_between_the_renames_is_restored(tmp_path):
    make_folder(tmp_path / ".model.old.unfinished")
    with pytest.raises(ValueError, match="stop"), atomic_folder(tmp_path / "model"):
        raise ValueError("stop")
    assert names(tmp_path) == ["model"] and (tmp_path / "model" / "a.txt").read_text() == "old"


def test_atomic_folder_replaces_the_target_of_a_link(tmp_path):
    target = make_folder(tmp_path / "target")
    (tmp_path / "link").symlink_to(target)
    with atomic_folder(tmp_path / "link") as staged:
        (staged / "a.txt").write_text("new")
    assert (tmp_path / "link").is_symlink() and names(target) == ["a.txt"]


def test_a_process_killed_while_writing_leaves_the_old_folder(tmp_path):
    folder = make_folder(tmp_path / "model")
    code = """
import sys, time
from pathlib import Path
from ddpm_hf.files import atomic_folder
with atomic_folder(Path(sys.argv[1])) as staged:
    (staged / "a.txt").write_text("half")
    print("written", flush=True)
    time.sleep(60)
"""
    command, env = [sys.executable, "-c", code, str(folder)], {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout.readline() == "written\n"  # the end of the process at the latest: 60 s
        finally:
            process.kill()
        assert process.wait(timeout=30) == -signal.SIGKILL
    assert (folder / "a.txt").read_text() == "old" and names(tmp_path) == [".model.unfinished", "model"]
    with atomic_folder(folder) as staged:
        assert names(staged) == []
        (staged / "a.txt").write_text("new")
    assert names(tmp_path) == ["model"] and names(folder) == ["a.txt"]


# ------------------------------------------------------------------ staging


def test_staging_lies_inside_an_existing_folder_and_next_to_a_new_one(tmp_path):
    existing = make_folder(tmp_path / "existing")
    with staging_folder(existing) as staged:
        assert staged.parent == existing and names(staged) == []
    with staging_folder(tmp_path / "new") as staged:
        assert staged.parent == tmp_path
    assert names(tmp_path) == ["existing"] and len(names(existing)) == 2


def test_staging_follows_a_link_to_the_folders_own_file_system(tmp_path):
    target = make_folder(tmp_path / "target")
    (tmp_path / "link").symlink_to(target)
    with staging_folder(tmp_path / "link") as staged:
        assert staged.parent == target
        (staged / "a.txt").write_text("new")
        os.rename(staged / "a.txt", tmp_path / "link" / "a.txt")
    assert (target / "a.txt").read_text() == "new" and (tmp_path / "link").is_symlink() and len(names(target)) == 2


def test_staging_is_empty_and_deleted_even_after_an_error(tmp_path):
    for _ in range(2):
        with pytest.raises(ValueError, match="stop"), staging_folder(tmp_path / "new") as staged:
            assert names(staged) == []
            (staged / "half").touch()
            raise ValueError("stop")
        assert names(tmp_path) == []


# ------------------------------------------------------------------ locks


def test_a_locked_folder_refuses_a_second_run_in_time(tmp_path):
    folder = tmp_path / "run"
    with lock_folder(folder):
        start = time.monotonic()
        with pytest.raises(ValueError, match="another run is writing to .*run: end it first"), lock_folder(folder, 0.3):
            pytest.fail("locked twice")
        assert time.monotonic() - start < 10
    with lock_folder(folder, 0.0):
        pass


def test_a_lock_ends_with_an_error_in_its_block(tmp_path):
    with pytest.raises(RuntimeError, match="stop"), lock_folder(tmp_path):
        raise RuntimeError("stop")
    with lock_folder(tmp_path, 0.0):
        pass
