"""A folder that is filled piece by piece and appears whole or not at all; a killed build resumes."""

import contextlib
import errno
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from emag_export.bundle import MANIFEST, file_records
from emag_export.errors import BundleError, ExportError, InputError
from emag_export.hashing import hash_file
from emag_export.manifest import FileRecord, Manifest
from emag_export.progress import Event, Progress, silent
from emag_export.records import FORMAT_VERSION, dump_record, read_record

__all__ = ["BuildMarker", "Staging", "require_disk_space", "require_free_target", "unfinished"]

_MARKER = "build.json"
_DONE = ".done.json"
_UNFINISHED = ".unfinished"
_LARGE = 1 << 30
"""Bytes of a file whose hashing takes long enough to be told about."""


@dataclass(frozen=True, kw_only=True)
class BuildMarker:
    """What ``build.json`` in an unfinished folder says."""

    format_version: int = FORMAT_VERSION
    key: str
    """Hash of everything that decides the content."""


@dataclass(frozen=True, kw_only=True)
class PartRecord:
    """What ``.done.json`` in a finished sub-folder says."""

    format_version: int = FORMAT_VERSION
    files: Mapping[str, FileRecord]


class Staging:
    """``.NAME.partial`` beside the target; :meth:`publish` renames it into place.

    Args:
        target: The finished folder.
        key: Hash of everything that decides the content. Parts finished under another key are discarded.
        progress: Told how far the hashing of large files is.

    Raises:
        BundleError: If an unfinished folder is there and does not say what it is.
    """

    def __init__(self, target: Path, key: str, progress: Progress = silent) -> None:
        self._progress = progress
        self._hashed: dict[tuple[Path, int, int], str] = {}
        self.target = target
        self.path = target.absolute().parent / f".{target.absolute().name}.partial"
        marker = self.path / _MARKER
        if marker.is_file():
            remedy = f"delete the unfinished folder {self.path}, and run the same command again"
            found = read_record(BuildMarker, marker.read_bytes(), name=str(marker), remedy=remedy)
            if found.key != key:
                shutil.rmtree(self.path)
        self.path.mkdir(parents=True, exist_ok=True)
        marker.write_text(dump_record(BuildMarker(key=key)), "utf-8")

    def part(self, name: str, write: Callable[[Path], object]) -> None:
        """Fill the sub-folder ``name``, or find it finished by an earlier, interrupted run.

        Args:
            name: Sub-folder.
            write: Fills the folder it is given.
        """
        folder = self.path / name
        if self._whole(folder):
            return
        if folder.is_dir():
            _clear(folder)
        folder.mkdir(exist_ok=True)
        write(folder)
        (folder / _DONE).write_text(dump_record(PartRecord(files=self._content(folder))), "utf-8")

    def _whole(self, folder: Path) -> bool:
        done = folder / _DONE
        if not done.is_file():
            return False
        try:
            record = read_record(PartRecord, done.read_bytes(), name=str(done), remedy="make it again")
        except BundleError:
            return False
        return self._content(folder) == record.files

    def finished(self, name: str) -> bool:
        """Whether an earlier run left this part behind as finished."""
        return (self.path / name / _DONE).is_file()

    def files(self) -> Mapping[str, FileRecord]:
        """Size and SHA-256 of everything so far, by path; markers of unfinished work are left out."""
        return self._content(self.path)

    def _content(self, folder: Path) -> dict[str, FileRecord]:
        records = file_records(folder, self._hash)
        return {name: record for name, record in records.items() if Path(name).name not in (_MARKER, _DONE)}

    def _hash(self, path: Path) -> str:
        """SHA-256 of a file, which is read once as long as it does not change."""
        stat = path.stat()
        known = (path, stat.st_size, stat.st_mtime_ns)
        if known not in self._hashed:

            def told(done: int) -> None:
                component = path.parent.name
                self._progress(Event(component=component, phase="hash", done=done, total=stat.st_size))

            self._hashed[known] = hash_file(path, told if stat.st_size > _LARGE else None)
        return self._hashed[known]

    def publish(self, manifest: Manifest) -> None:
        """Write the manifest last and move everything into place, replacing what was there."""
        for done in self.path.glob(f"*/{_DONE}"):
            done.unlink()
        (self.path / _MARKER).unlink()
        (self.path / MANIFEST).write_text(dump_record(manifest), "utf-8")
        old = self.path.with_suffix(".old")
        shutil.rmtree(old, ignore_errors=True)
        if self.target.exists():
            self.target.rename(old)
        self.path.rename(self.target)
        shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def unfinished(folder: Path) -> Iterator[Path]:
    """A sub-folder for files that take long: an interrupted run leaves it, the next one finds what is in it.

    Whoever writes there must be able to tell what is whole. It is gone at the end of the ``with``, unless
    that is left by an error.

    Args:
        folder: A part of a :class:`Staging`, or any other folder.
    """
    path = folder / _UNFINISHED
    path.mkdir(exist_ok=True)
    yield path
    shutil.rmtree(path)


def _clear(folder: Path) -> None:
    """Remove everything but what can be continued."""
    for path in folder.iterdir():
        if path.is_dir() and path.name != _UNFINISHED:
            shutil.rmtree(path)
        elif not path.is_dir():
            path.unlink()


def require_free_target(target: Path, *, overwrite: bool) -> None:
    """Refuse a target that holds something, or cannot be written.

    Raises:
        InputError: With the remedy; nothing has been changed.
    """
    if target.exists() and not target.is_dir():
        raise InputError(f"{target} is a file; give a folder as `output`")
    if target.is_dir() and any(target.iterdir()) and not overwrite:
        raise InputError(f"{target} is not empty; give another folder, or replace it with `overwrite`")
    parent = next(folder for folder in target.absolute().parents if folder.exists())
    if not os.access(parent, os.W_OK | os.X_OK):
        raise InputError(f"{parent} cannot be written to; give a folder of yours as `output`")


def require_disk_space(target: Path, need: int) -> None:
    """Refuse before the work begins rather than hours into it.

    Raises:
        InputError: Saying how many bytes are needed and how many are free.
    """
    parent = next(folder for folder in target.absolute().parents if folder.exists())
    free = shutil.disk_usage(parent).free
    if free < need:
        raise InputError(
            f"{parent} has {free / 1e9:.1f} GB free, the bundle needs about {need / 1e9:.1f} GB; "
            "free some space or choose another disk with `output`"
        )


@contextlib.contextmanager
def disk_errors(target: Path) -> Iterator[None]:
    """Turn a full or read-only disk into an error that says what to do.

    Raises:
        ExportError: In place of the operating system's error.
    """
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ExportError(
                f"the disk of {target} is full; free some space and run the same command again: "
                "finished components are kept"
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise ExportError(f"{error.filename or target} cannot be written: {error.strerror}") from error
        raise
