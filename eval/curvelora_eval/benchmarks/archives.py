"""Reading the files of a tar archive without ever unpacking it to disk."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from curvelora.errors import UserError
from curvelora_eval.benchmarks.loading import DAMAGE

MOST_BYTES = 1 << 30


def read_members(path: Path, most: int = MOST_BYTES) -> Iterator[tuple[PurePosixPath, bytes]]:
    """(path inside, content) of every regular file, in the archive's order.

    Raises:
        UserError: a damaged archive, one that unpacks to more than `most` bytes, or a member that is absolute, climbs out with
            `..`, or is a link or a device.
    """
    left = most
    try:
        with tarfile.open(path) as archive:
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
                left -= member.size
                if left < 0:
                    raise UserError(
                        f"{path} unpacks to more than {most >> 20} MiB, which this data set does not: not read"
                    )
                yield inside, archive.extractfile(member).read()
    except UserError:
        raise
    except (tarfile.TarError, ValueError, *DAMAGE) as error:  # ValueError: numbers and names in a header
        raise UserError(f"{path} cannot be read as a tar archive ({error}): copy it again") from error
