"""Finding, reading and checking the original files of a data set. Nothing is ever downloaded."""

from __future__ import annotations

import gzip
import hashlib
import tarfile
import zlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


class DataError(ValueError):
    """A data set that can't be used, and why: one line that names the file."""


@dataclass(frozen=True)
class FileCheck:
    """What became of the checksum of one file.

    Attributes:
        file: its name.
        md5: what was found.
        expected: what was published.
    """

    file: str
    md5: str
    expected: str

    @property
    def verified(self) -> bool:
        return self.md5 == self.expected

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class Checksums:
    """Compares files with their published md5 sums and keeps the results.

    Args:
        dataset: the data set's name.
        waived: names of data sets or files whose mismatch is accepted, and only recorded.
    """

    def __init__(self, dataset: str, waived: Collection[str] = ()) -> None:
        self.dataset = dataset
        self.waived = frozenset(waived)
        self.results: list[FileCheck] = []

    def check(self, path: Path, content: bytes, expected: str) -> None:
        """Record the md5 sum of ``content``.

        Raises:
            DataError: it is not the published one, and neither the file nor the set is waived.
        """
        found = hashlib.md5(content, usedforsecurity=False).hexdigest()
        result = FileCheck(path.name, found, expected)
        if not result.verified and not self.waived & {path.name, self.dataset}:
            raise DataError(
                f"{path}: its md5 sum is {found}, the published one is {expected} "
                f"({len(content)} bytes read): the file is damaged or not the original; "
                f"--allow-unverified-data {path.name} or {self.dataset} accepts and records it"
            )
        self.results.append(result)


@dataclass(frozen=True)
class Layout:
    """Files that belong together.

    Attributes:
        folder: what the original archive unpacks to.
        archive: the original archive's name, or empty.
        md5: published sum of every file, by name.
    """

    folder: str
    archive: str
    md5: Mapping[str, str]

    def found_in(self, root: Path) -> Path | None:
        """The folder or archive under ``root`` that holds any of the files."""
        for place in (root, root / self.folder):
            if any((place / name).is_file() for name in self.md5):
                return place
        archive = root / self.archive
        return archive if self.archive and archive.is_file() else None

    def read(self, place: Path, checksums: Checksums) -> dict[str, bytes]:
        """Every file's content by name, checked.

        Args:
            place: what :meth:`found_in` gave.
        """
        contents = _read_archive(place, self.md5) if place.is_file() else {}
        for name, expected in self.md5.items():
            if not place.is_file():
                contents[name] = read_file(place / name, f"beside {_listed(self.md5)}")
            elif name not in contents:
                raise DataError(f"{place}: holds no file {name}; was it cut short?")
            checksums.check(place / name, contents[name], expected)
        return contents


def find_layout(dataset: str, root: Path, layouts: Sequence[Layout]) -> tuple[Layout, Path]:
    """The first layout that ``root`` holds, and where.

    Raises:
        DataError: none is there; says what was looked for.
    """
    if not root.is_dir():
        raise DataError(f"--data {root}: no such folder")
    for layout in layouts:
        place = layout.found_in(root)
        if place is not None:
            return layout, place
    wanted = " or ".join(
        f"{_listed(one.md5)} (in it, in {one.folder}/"
        + (f", or packed in {one.archive})" if one.archive else ")")
        for one in layouts
    )
    raise DataError(f"--data {root}: holds no {dataset}; looked for {wanted}")


def read_file(path: Path, expected: str) -> bytes:
    """The file's bytes; DataError, telling where it was ``expected``, if it can't be read."""
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise DataError(f"{path}: missing; it is expected {expected}") from error
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from error


def unpack_gzip(path: Path, content: bytes) -> bytes:
    """Decompress; DataError names the file if it is cut short or no gzip file."""
    try:
        return gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: not a complete gzip file ({error})") from error


def _read_archive(path: Path, names: Collection[str]) -> dict[str, bytes]:
    contents = {}
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                name = Path(member.name).name
                if name in names and member.isfile():
                    file = archive.extractfile(member)
                    assert file is not None
                    contents[name] = file.read()
    except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: not a complete tar archive ({error})") from error
    return contents


def _listed(names: Collection[str]) -> str:
    ordered = list(names)
    return ", ".join(ordered) if len(ordered) < 4 else f"{ordered[0]} ... {ordered[-1]}"
