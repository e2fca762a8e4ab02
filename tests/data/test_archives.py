"""Files in archives are read in place, from threads and forked processes too, and damage is named."""

import multiprocessing
import tarfile
import zipfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from ddpm_hf.data.archives import is_archive, list_members, member_path, read_member
from ddpm_hf.data.reasons import BadData
from tests.data.helpers import pack


def read_all(paths: list[str]) -> list[bytes]:
    with ThreadPoolExecutor(4) as pool:
        return list(pool.map(read_member, paths))


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_files_are_read_alike_by_threads_and_processes(tmp_path, kind):
    contents = {f"a/{i}::x.bin": np.random.default_rng(i).bytes(50_000) for i in range(40)}
    archive = pack(tmp_path / f"b::c.{kind}", **contents)
    assert is_archive(archive) and list_members(archive) == list(contents)
    paths = [member_path(archive, name) for name in contents] * 3
    expected = list(contents.values()) * 3
    assert read_all(paths) == expected
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert pool.map_async(read_all, [paths] * 4).get(timeout=60) == [expected] * 4


def test_other_paths_are_not_read(tmp_path):
    for path in ("/x/a.png", "https://host/a.png", "zip://a.png::hf://datasets/x/y.zip", f"zip://a::{tmp_path}"):
        assert read_member(path) is None


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_an_archive_with_new_content_is_read_again(tmp_path, kind):
    for value in (1, 2):
        archive = pack(tmp_path / f"a.{kind}", **{"0.png": bytes(value)})
        assert read_member(member_path(archive, "0.png")) == bytes(value)


def test_special_members_are_not_listed(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name, kind in (("pipe", tarfile.FIFOTYPE), ("link", tarfile.SYMTYPE), ("folder", tarfile.DIRTYPE)):
            member = tarfile.TarInfo(f"{name}.png")
            member.type, member.linkname = kind, "/etc/passwd"
            archive.addfile(member)
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        link = zipfile.ZipInfo("link.png")
        link.external_attr = 0o120777 << 16
        archive.writestr(link, "/etc/passwd")
        archive.mkdir("folder.png")
        archive.writestr("a\\b.png", b"windows")
    assert list_members(tmp_path / "a.tar") == [] and list_members(tmp_path / "a.zip") == ["a/b.png"]


def test_damaged_archives_and_members_are_named(tmp_path):
    for kind in ("zip", "tar"):
        (tmp_path / f"text.{kind}").write_text("no archive")
        with pytest.raises(BadData, match=f"text.{kind} cannot be read: "):
            list_members(tmp_path / f"text.{kind}")
    with tarfile.open(tmp_path / "packed.tar", "w:gz") as archive:
        archive.addfile(tarfile.TarInfo("0.png"))
    with pytest.raises(BadData, match="packed.tar cannot be read: .*"):
        list_members(tmp_path / "packed.tar")
    archive = pack(tmp_path / "a.tar", "0.png")
    list_members(archive)
    with pytest.raises(KeyError):
        read_member(member_path(archive, "1.png"))
