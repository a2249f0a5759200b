"""A folder that is filled piece by piece and appears whole or not at all; a killed build resumes."""

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from emag_export.bundle import MANIFEST, file_records
from emag_export.errors import ExportError, InputError

__all__ = ["Staging", "require_disk_space", "require_free_target"]

_KEY = "build.json"
_DONE = ".done.json"


class Staging:
    """``.NAME.partial`` beside the target; :meth:`publish` renames it into place.

    Args:
        target: The finished folder.
        key: Hash of everything that decides the content. Parts finished under another key are discarded.
    """

    def __init__(self, target: Path, key: str) -> None:
        self.target = target
        self.path = target.absolute().parent / f".{target.absolute().name}.partial"
        marker = self.path / _KEY
        if marker.is_file() and marker.read_text("utf-8") != key:
            shutil.rmtree(self.path)
        self.path.mkdir(parents=True, exist_ok=True)
        marker.write_text(key, "utf-8")

    def part(self, name: str, write: Callable[[Path], Any]) -> Any:
        """Fill the sub-folder ``name``, or find it finished by an earlier, interrupted run.

        Args:
            name: Sub-folder.
            write: Fills the folder it is given; its JSON result is kept and returned.
        """
        folder = self.path / name
        done = folder / _DONE
        if done.is_file():
            record = json.loads(done.read_text("utf-8"))
            done.unlink()
            if file_records(folder) == record["files"]:
                done.write_text(json.dumps(record), "utf-8")
                return record["result"]
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        result = write(folder)
        done.write_text(json.dumps({"files": file_records(folder), "result": result}), "utf-8")
        return result

    def finished(self, name: str) -> bool:
        """Whether an earlier run left this part behind as finished."""
        return (self.path / name / _DONE).is_file()

    def publish(self, manifest: dict[str, Any]) -> None:
        """Write the manifest last and move everything into place, replacing what was there."""
        for done in self.path.glob(f"*/{_DONE}"):
            done.unlink()
        (self.path / _KEY).unlink()
        manifest = {**manifest, "files": file_records(self.path)}
        text = json.dumps(manifest, indent=2, sort_keys=True) + "\n"
        (self.path / MANIFEST).write_text(text, "utf-8")
        old = self.path.with_suffix(".old")
        shutil.rmtree(old, ignore_errors=True)
        if self.target.exists():
            self.target.rename(old)
        self.path.rename(self.target)
        shutil.rmtree(old, ignore_errors=True)


def require_free_target(target: Path, *, overwrite: bool) -> None:
    """Refuse a target that holds something, or cannot be written.

    Raises:
        InputError: With the remedy; nothing has been changed.
    """
    if target.exists() and not target.is_dir():
        raise InputError(f"{target} is a file; give a folder with -o")
    if target.is_dir() and any(target.iterdir()) and not overwrite:
        raise InputError(f"{target} is not empty; give another folder, or replace it with --overwrite")
    parent = next(folder for folder in target.absolute().parents if folder.exists())
    if not os.access(parent, os.W_OK | os.X_OK):
        raise InputError(f"{parent} cannot be written to; give a folder of yours with -o")


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
            "free some space or choose another disk with -o"
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
