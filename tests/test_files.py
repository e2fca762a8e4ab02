"""Atomic writes and locks."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ddpm_hf import files
from ddpm_hf.files import atomic_file, atomic_folder, check_output_folder, lock_folder, move_file, staging_folder

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


@pytest.mark.parametrize("same_disk", [True, False])
def test_a_file_moves_to_any_disk_and_replaces_the_old_one(tmp_path, other_disk, same_disk):
    target = (tmp_path if same_disk else other_disk) / "target.bin"
    target.write_text("old")
    (tmp_path / "new.bin").write_text("new")
    move_file(tmp_path / "new.bin", target)
    assert (
        target.read_text() == "new" and not (tmp_path / "new.bin").exists() and names(target.parent) == ["target.bin"]
    )


def test_a_move_to_a_full_disk_leaves_both_files(tmp_path, mount):
    (tmp_path / "new.bin").write_bytes(bytes(200_000))
    full = mount("full", "size=64k")
    (full / "target.bin").write_text("old")
    with pytest.raises(OSError, match="No space left"):
        move_file(tmp_path / "new.bin", full / "target.bin")
    assert (full / "target.bin").read_text() == "old" and names(full) == ["target.bin"]
    assert (tmp_path / "new.bin").stat().st_size == 200_000


# ------------------------------------------------------------------ places


def make_places(root: Path) -> None:
    (root / "file").touch()
    (root / "dangling").symlink_to(root / "nowhere")
    (root / "loop").symlink_to(root / "loop")
    (root / "to_file").symlink_to(root / "file")
    os.mkfifo(root / "fifo")
    socket.socket(socket.AF_UNIX).bind(str(root / "socket"))
    for part in ("a", "b", "c"):
        (root / "folder" / f"{part}.txt").mkdir(parents=True)
    (root / "folder" / "sub").touch()
    (root / "folder" / "lost").symlink_to(root / "nowhere")


@pytest.mark.parametrize(
    ("place", "problem"),
    [
        ("file", "file' is not a folder"),
        ("file/below/it", "file' is not a folder"),
        ("to_file", "to_file' is not a folder"),
        ("dangling", "dangling' is a link to '.*nowhere', which does not exist"),
        ("dangling/below", "dangling' is a link to '.*nowhere', which does not exist"),
        ("loop", "loop' is a link to '.*loop', which does not exist"),
        ("fifo", "fifo' is not a folder"),
        ("socket", "socket' is not a folder"),
        ("/dev/null", "'/dev/null' is not a folder"),
        ("/dev/null/below", "'/dev/null' is not a folder"),
    ],
)
def test_impossible_folders_are_refused_by_name(tmp_path, monkeypatch, place, problem):
    monkeypatch.chdir(tmp_path)  # names of sockets are short
    make_places(Path())
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(
        ValueError, match=f"output_dir must be a folder that can be written to.* got '{place}': .*{problem}"
    ):
        check_output_folder("output_dir", place)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("files", "folders", "problem"),
    [
        (["new.txt", "a.txt"], [], "a.txt' is a folder, and a file is written there"),
        ([], ["new", "sub"], "sub' is not a folder"),
        ([], ["lost"], "lost' is a link to '.*nowhere', which does not exist"),
    ],
)
def test_files_and_folders_in_the_way_are_refused_by_name(tmp_path, monkeypatch, files, folders, problem):
    monkeypatch.chdir(tmp_path)
    make_places(Path())
    with pytest.raises(ValueError, match=f"output_dir must be .*{problem}"):
        check_output_folder("output_dir", "folder", files, folders)


def test_a_read_only_disk_is_refused_before_anything_is_written(tmp_path, mount):
    folder = mount("disk", "size=64k,ro")
    for place in (folder, folder / "new" / "folder"):
        with pytest.raises(ValueError, match="disk' cannot be written to: it is read-only"):
            check_output_folder("output_dir", place)


def test_places_that_can_be_written_to_are_accepted(tmp_path, other_disk, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(other_disk)
    (tmp_path / "old.txt").symlink_to("nowhere")  # a file that is written replaces the link
    for place in (".", "", "new", "new/and/deep", "link", "link/new", "..", str(other_disk)):
        check_output_folder("output_dir", place, ["a.txt", "old.txt"], ["sub"])
    assert sorted(os.listdir()) == ["link", "old.txt"] and not list(other_disk.iterdir())


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
