"""Write the weights of a graph beside it, one at a time; an interrupted run is continued where it was."""

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir

from emag_export.errors import BundleError
from emag_export.hashing import hash_json
from emag_export.records import FORMAT_VERSION, dump_record, read_record

__all__ = ["Journal", "Piece", "write_data"]

_PIECE = 256 << 20
"""Bytes after which what was written is forced to the disk and recorded: at most so much is done again."""

_BLOCK = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Up to where a file was written."""

    bytes: int
    """From its beginning."""
    sha256: str
    """Of all of them."""


@dataclass(frozen=True, kw_only=True)
class Journal:
    """What ``<name>.journal`` beside an unfinished file says."""

    format_version: int = FORMAT_VERSION
    layout: str
    """Hash of the names, types, shapes and order of the tensors."""
    pieces: tuple[Piece, ...] = field(default=())


def write_data(
    tensors: Sequence[Any], path: Path, told: Callable[[int, int], object]
) -> list[onnx_ir.ExternalTensor]:
    """Write tensors one behind the other, as ``onnx_ir.save`` lays them out.

    Called again after an interruption, with the same tensors, it checks the pieces that are there by their
    SHA-256, keeps those that are whole and continues behind them.

    Args:
        tensors: Of onnx_ir. The data of one at a time is in memory.
        path: The file; while it is unfinished, a journal lies beside it.
        told: Called with the bytes that are there, and those there will be.

    Returns:
        The tensors as the graph beside the file names them.
    """
    offsets = np.cumsum([0, *(tensor.nbytes for tensor in tensors)]).tolist()
    journal = path.with_name(f"{path.name}.journal")
    layout = hash_json([[t.name, str(t.dtype), [int(side) for side in t.shape]] for t in tensors])
    path.touch()
    with path.open("r+b") as file:
        pieces = _read_journal(journal, layout)
        digest, pieces = _whole(file, pieces)
        begin = offsets.index(pieces[-1].bytes) if pieces else 0
        file.truncate(offsets[begin])
        file.seek(offsets[begin])
        told(offsets[begin], offsets[-1])
        for tensor, end in zip(tensors[begin:], offsets[begin + 1 :], strict=True):
            data = np.ascontiguousarray(tensor.numpy()).reshape(-1).view(np.uint8)
            assert data.nbytes == tensor.nbytes, tensor.name
            file.write(data.data)
            digest.update(data.data)
            told(end, offsets[-1])
            if end - (pieces[-1].bytes if pieces else 0) >= _PIECE:
                _force(file)
                pieces = (*pieces, Piece(bytes=end, sha256=digest.hexdigest()))
                _write_journal(journal, Journal(layout=layout, pieces=pieces))
        _force(file)
    journal.unlink(missing_ok=True)
    return [
        onnx_ir.ExternalTensor(
            path.name,
            offset,
            tensor.nbytes,
            tensor.dtype,
            shape=tensor.shape,
            name=tensor.name,
            base_dir=str(path.parent),
        )
        for tensor, offset in zip(tensors, offsets, strict=False)
    ]


def _read_journal(journal: Path, layout: str) -> tuple[Piece, ...]:
    """Pieces of an earlier run that wrote the same tensors."""
    if not journal.is_file():
        return ()
    try:
        found = read_record(Journal, journal.read_bytes(), name=str(journal), remedy="write it again")
    except BundleError:
        return ()
    return found.pieces if found.layout == layout else ()


def _whole(file: Any, pieces: Sequence[Piece]) -> tuple[Any, tuple[Piece, ...]]:
    """The pieces whose bytes are as they were written, and the SHA-256 of those, to be continued."""
    kept: list[Piece] = []
    digest, read = hashlib.sha256(), 0
    file.seek(0)
    for piece in pieces:
        ahead = digest.copy()
        while read < piece.bytes:
            block = file.read(min(_BLOCK, piece.bytes - read))
            if not block:
                return digest, tuple(kept)
            ahead.update(block)
            read += len(block)
        if ahead.hexdigest() != piece.sha256:
            break
        digest = ahead
        kept.append(piece)
    return digest, tuple(kept)


def _write_journal(path: Path, journal: Journal) -> None:
    new = path.with_name(f"{path.name}.new")
    new.write_text(dump_record(journal), "utf-8")
    new.replace(path)


def _force(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())
