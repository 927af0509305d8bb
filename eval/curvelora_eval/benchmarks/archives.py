"""Reading the files of a tar archive without ever unpacking it to disk."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from curvelora.errors import UserError
from curvelora_eval.benchmarks.loading import DAMAGE, PACKED

MOST_BYTES = 256 << 20
"""Five times what 20 Newsgroups unpacks to; a header may be as large, and is held in memory."""


class Counted:
    """A stream that refuses to give more than `most` bytes: also the headers of an archive can be made to unpack to anything."""

    def __init__(self, stream: BinaryIO, path: Path, most: int) -> None:
        self.stream, self.path, self.most, self.left = stream, path, most, most

    def read(self, size: int) -> bytes:
        """The next `size` bytes.

        Raises:
            UserError: that would be more than `most` bytes in all.
        """
        content = self.stream.read(size)
        self.left -= len(content)
        if self.left < 0:
            raise too_large(self.path, self.most)
        return content


def too_large(path: Path, most: int) -> UserError:
    """What to raise for an archive that unpacks to more than `most` bytes."""
    return UserError(f"{path} unpacks to more than {most >> 20} MiB, which this data set does not: not read")


def read_members(path: Path, most: int = MOST_BYTES) -> Iterator[tuple[PurePosixPath, bytes]]:
    """(path inside, content) of every regular file, in the archive's order; packed where the name says so.

    Raises:
        UserError: a damaged archive, one that unpacks to more than `most` bytes, or a member that is absolute, climbs out with
            `..`, or is a link or a device.
    """
    left = most
    try:
        with (
            PACKED.get(path.suffix, open)(path, "rb") as stream,
            tarfile.open(fileobj=Counted(stream, path, most), mode="r|") as archive,  # type: ignore[call-overload]
        ):
            for member in archive:
                inside = PurePosixPath(member.name)
                if inside.is_absolute() or ".." in inside.parts or "\\" in member.name or "\0" in member.name:
                    raise UserError(
                        f"{path} holds the unsafe path {member.name!r}: it was not made by who says so; not read"
                    )
                if member.isdir():
                    continue
                if not member.isreg():
                    raise UserError(f"{path} holds {member.name!r}, a link or a device and no file: not read")
                left -= member.size  # what a sparse file unpacks to is not in the stream
                if left < 0:
                    raise too_large(path, most)
                yield inside, archive.extractfile(member).read()
    except UserError:
        raise
    except (tarfile.TarError, ValueError, *DAMAGE) as error:  # ValueError: numbers and names in a header
        raise UserError(f"{path} cannot be read as a tar archive ({error}): copy it again") from error
