"""Files of prompts, and what two of them may not share."""

from collections.abc import Sequence
from pathlib import Path

from emag_export.errors import InputError
from emag_export.serve.batch.table import read_table

__all__ = ["read_prompt_file", "require_disjoint"]


def read_prompt_file(path: Path, *, name: str = "prompts") -> list[str]:
    """Prompts, each once: a line each, or the column ``prompt`` of a table.

    Args:
        path: Text, or ``.jsonl``, ``.csv`` or ``.parquet`` as for a batch.
        name: Parameter that gave it, for errors.

    Raises:
        InputError: If the file cannot be read, is empty or says something twice; or if a table has columns
            that set what an evaluation varies itself.
    """
    if path.suffix.lower() in (".jsonl", ".csv", ".parquet"):
        prompts = []
        for row in read_table(path):
            if row.keywords:
                raise InputError(
                    f"row {row.number} of `{name}` {path} sets {next(iter(row.keywords))}, which would hold "
                    "for every method alike; leave that column out"
                )
            prompts.append(str(row.prompt))
    else:
        try:
            text = path.read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"`{name}` {path} cannot be read as UTF-8 text: {error}") from error
        prompts = [line.strip() for line in text.splitlines() if line.strip()]
    if not prompts:
        raise InputError(f"`{name}` {path} holds no prompt; write one per line")
    seen: dict[str, str] = {}
    for prompt in prompts:
        if _plain(prompt) in seen:
            raise InputError(
                f"`{name}` {path} has {prompt!r} twice, which would count as two independent prompts; "
                "remove one, and ask for more `seeds` to have more pictures of it"
            )
        seen[_plain(prompt)] = prompt
    return prompts


def require_disjoint(reported: Sequence[str], sweep: Sequence[str]) -> None:
    """Refuse to tune on what is reported.

    Raises:
        InputError: Naming the first prompt that is in both.
    """
    known = {_plain(prompt) for prompt in reported}
    if shared := [prompt for prompt in sweep if _plain(prompt) in known]:
        raise InputError(
            f"{len(shared)} prompts are in `sweep` and in `prompts`, {shared[0]!r} first: scales would be "
            "tuned on what is reported; give each its own prompts"
        )


def _plain(prompt: str) -> str:
    return " ".join(prompt.casefold().split())
