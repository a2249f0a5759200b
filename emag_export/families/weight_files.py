"""Which files of a diffusers pipeline hold what an export reads, by their names alone."""

import json
import math
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from emag_export.errors import ModelError
from emag_export.families.family import Family

__all__ = ["CONFIGURATION", "WEIGHTS", "is_half_precision", "needed_files", "variant_of"]

CONFIGURATION = (".json", ".txt", ".model", ".jinja")
_PICKLED = (".bin", ".ckpt", ".pt", ".pth")
WEIGHTS = re.compile(
    r"(?:model|diffusion_pytorch_model)"
    r"(?:\.(?P<variant>\w+))?(?:-\d+-of-\d+)?\.safetensors(?P<index>\.index(?:\.(?P<listed>\w+))?\.json)?"
)
"""Names that diffusers and transformers give to weights: one file, or shards and their index; with a variant
(``fp16``) between the name and the number of the shard, and at the end of the index."""


def needed_files(names: Iterable[str], model: str, families: Iterable[Family]) -> list[str]:
    """Of a pipeline's files those that an export reads, sorted.

    Weights in half precision (``model.fp16.safetensors``) are needed only where there are no others: the
    export rounds to the precision that it is asked for.

    Args:
        names: Relative POSIX paths.
        model: For the message.
        families: That the model may be of; they say which folders are read.

    Raises:
        ModelError: If a component has pickled weights only: unpickling runs code from the file.
    """
    families = tuple(families)
    weighted = {folder for family in families for folder in family.folders.values()}
    read = {folder for family in families for folder in family.classes}
    folders: dict[str, list[str]] = {}
    for name in names:
        folder, _, rest = name.partition("/")
        if folder in read and rest and "/" not in rest:
            folders.setdefault(folder, []).append(rest)
    needed = []
    for folder, files_of in folders.items():
        weights = [name for name in files_of if WEIGHTS.fullmatch(name)]
        pickled = sorted(name for name in files_of if name.endswith(_PICKLED))
        if folder in weighted and pickled and not weights:
            raise ModelError(
                f"the weights of {folder} in {model} are pickled ({pickled[0]}), and a pickle can run "
                "any code when it is read; only safetensors are. Convert the model where you trust it: "
                "pipe.save_pretrained(folder, safe_serialization=True), and give that folder"
            )
        variants = {variant_of(name) for name in weights}
        wanted = min(
            variants, key=lambda variant: (variant is not None, variant != "fp16", variant), default=None
        )
        needed += [f"{folder}/{name}" for name in weights if variant_of(name) == wanted]
        needed += [
            f"{folder}/{name}"
            for name in files_of
            if name.endswith(CONFIGURATION) and not WEIGHTS.fullmatch(name)
        ]
    return sorted(needed)


def is_half_precision(weights: Path, prefix: str = "") -> bool:
    """Whether most numbers in a safetensors file have 16 bits or fewer; only its header is read.

    Args:
        weights: The file.
        prefix: Of the tensors that count.

    Raises:
        ModelError: If it has no header.
    """
    try:
        with weights.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        kinds = Counter[str]()
        for name, tensor in header.items():
            if name != "__metadata__" and name.startswith(prefix):
                kinds[tensor["dtype"]] += math.prod(tensor["shape"])
    except (ValueError, KeyError, TypeError, AttributeError, MemoryError, OverflowError) as error:
        raise ModelError(f"{weights} is damaged: it has no safetensors header; download it again") from error
    return kinds.total() > 2 * (kinds["F32"] + kinds["F64"])


def variant_of(name: str) -> str | None:
    """``fp16`` of ``model.fp16.safetensors``, of its shards and of their index; None without a variant."""
    match = WEIGHTS.fullmatch(name)
    return match and (match["variant"] or match["listed"])
