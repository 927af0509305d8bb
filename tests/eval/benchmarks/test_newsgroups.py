"""The tar archive of 20 Newsgroups is read in place, and nothing in it can reach outside."""

from __future__ import annotations

import io
import random
import tarfile
import tracemalloc
from pathlib import Path

import pytest

from curvelora.errors import UserError
from curvelora_eval import benchmarks
from curvelora_eval.benchmarks import loading
from curvelora_eval.benchmarks.archives import read_members
from curvelora_eval.benchmarks.newsgroups20 import body


def archive(path: Path, name: str, **changes: object) -> Path:
    with tarfile.open(path, "w") as tar:
        member = tarfile.TarInfo(name)
        member.size = 4
        for key, value in changes.items():
            setattr(member, key, value)
        tar.addfile(member, io.BytesIO(b"text") if member.isreg() else None)
    return path


def test_both_splits_look_alike(samples: Path) -> None:
    """The training posts have tabs for line ends in the usual copy, the test posts have not."""
    benchmark = benchmarks.get("newsgroups20")
    train, test = (benchmarks.load(benchmark, samples, split).rows for split in ("train", "test"))
    assert [row.fields for row in train] == [row.fields for row in test]
    assert test[0].id == "alt.atheism/1000" and test[0].answer == "alt.atheism"
    assert test[0].fields["text"] == "Does an argument need a first cause at all? > I never said so. Then we agree."
    assert "café" in test[1].fields["text"]  # Latin-1
    assert not any("Subject" in row.fields["text"] or "\t" in row.fields["text"] for row in [*train, *test])


def test_a_post_without_a_header_is_kept_whole() -> None:
    assert body(b"just a line") == "just a line"
    assert body(b"From: a\r\n\r\nhi\r\n\r\nthere") == "hi there"


@pytest.mark.parametrize("name", ["/etc/passwd", "a/../../b", "..", "a\\..\\b"])
def test_members_that_climb_out_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="unsafe path"):
        list(read_members(archive(tmp_path / "a.tar", name)))


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_are_refused(kind: bytes, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="a link or a device"):
        list(read_members(archive(tmp_path / "a.tar", "a", type=kind, linkname="b", size=0)))


def test_size_damage_and_foreign_archives(tmp_path: Path) -> None:
    good = archive(tmp_path / "a.tar", "folder/a")
    assert [(str(name), content) for name, content in read_members(good)] == [("folder/a", b"text")]
    with pytest.raises(UserError, match="unpacks to more"):
        list(read_members(good, most=3))
    (tmp_path / "b.tar").write_bytes(b"no archive")
    with pytest.raises(UserError, match="cannot be read as a tar archive"):
        list(read_members(tmp_path / "b.tar"))
    (tmp_path / "20news-bydate.tar").write_bytes(good.read_bytes())
    with pytest.raises(UserError, match="no post below a folder that ends in -test"):
        benchmarks.load(benchmarks.get("newsgroups20"), tmp_path)
    with pytest.raises(UserError, match="does not know"):  # a group that is none of the twenty
        benchmarks.load(
            benchmarks.get("newsgroups20"), archive(tmp_path / "20news-bydate.tar", "x-test/alt.cats/1").parent
        )


@pytest.mark.parametrize(("ending", "mode"), [(".gz", "w:gz"), (".bz2", "w:bz2"), (".xz", "w:xz")])
def test_a_packed_archive_that_is_damaged_is_said(ending: str, mode: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.tar{ending}"
    with tarfile.open(path, mode) as tar:
        member = tarfile.TarInfo("folder/a")
        member.size = 1 << 14
        tar.addfile(member, io.BytesIO(random.Random(0).randbytes(1 << 14)))
    assert [str(name) for name, _ in read_members(path)] == ["folder/a"]
    content = path.read_bytes()
    for damaged in (content[: len(content) // 2], content[:60] + b"\xff" * 200 + content[260:]):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="cannot be read as a tar archive"):
            list(read_members(path))


LONG = tarfile.GNUTYPE_LONGNAME


@pytest.mark.parametrize(
    ("kind", "ending"),
    [
        (LONG, ""),
        (LONG, ".gz"),
        (LONG, ".bz2"),
        (LONG, ".xz"),
        (tarfile.GNUTYPE_LONGLINK, ".gz"),
        (tarfile.XHDTYPE, ".gz"),
    ],
)
def test_headers_count_as_well(kind: bytes, ending: str, tmp_path: Path) -> None:
    """A header of 16 MiB packs to next to nothing, and no file's size tells of it."""
    size = 16 << 20
    header = tarfile.TarInfo("././@LongLink")
    header.type, header.size = kind, size
    path = tmp_path / f"a.tar{ending}"
    with loading.PACKED.get(ending, open)(path, "wb") as stream:
        stream.write(header.tobuf(tarfile.GNU_FORMAT))
        for _ in range(16):
            stream.write(bytes(1 << 20))
        stream.write(archive(tmp_path / "b.tar", "folder/a").read_bytes())
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match="unpacks to more than 1 MiB"):
            list(read_members(path, most=1 << 20))
        assert tracemalloc.get_traced_memory()[1] < 12 << 20
    finally:
        tracemalloc.stop()
