"""SHA-256 of files and folders: what makes a bundle's content trustworthy and a build resumable."""

import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

__all__ = ["hash_file", "hash_files", "hash_json"]


_BLOCK = 64 << 20
"""Bytes after which whoever waits for a hash is told how far it is."""


def hash_file(path: Path, told: Callable[[int], object] | None = None) -> str:
    """SHA-256 of one file's bytes, in hexadecimal; other threads run meanwhile.

    The file is read, not mapped: pages of a mapped file count as this process's memory, as many as the file
    has, beside whatever else is loaded.

    Args:
        path: The file.
        told: Called again and again with the bytes that are hashed.
    """
    with path.open("rb") as file:
        if told is None:
            return hashlib.file_digest(file, "sha256").hexdigest()
        digest, part = hashlib.sha256(), bytearray(min(_BLOCK, path.stat().st_size))
        done = 0
        while read := file.readinto(part):
            digest.update(memoryview(part)[:read])
            done += read
            told(done)
        return digest.hexdigest()


def hash_json(data: Any) -> str:
    """SHA-256 of plain data, independent of key order."""
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def hash_files(root: Path, paths: Iterable[Path]) -> str:
    """SHA-256 over several files: names relative to ``root`` and contents, independent of order."""
    return hash_json({path.relative_to(root).as_posix(): hash_file(path) for path in sorted(paths)})
