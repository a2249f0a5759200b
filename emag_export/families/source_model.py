"""A diffusers pipeline on this disk, and what an export reads of it."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from emag_export.errors import ModelError
from emag_export.families.family import Family
from emag_export.families.weight_files import (
    CONFIGURATION,
    WEIGHTS,
    is_half_precision,
    needed_files,
    variant_of,
)
from emag_export.hashing import hash_files

__all__ = ["SourceModel", "read_json"]


@dataclass(frozen=True, kw_only=True)
class SourceModel:
    """A diffusers pipeline on this disk."""

    name: str
    """As the user gave it."""
    path: Path
    revision: str | None
    """Commit of a hub model."""
    index: dict[str, Any]
    """``model_index.json``."""
    family: Family
    loaded_whole: ClassVar[bool] = False
    """Whether :meth:`unread` gives nothing, whatever the component."""

    def has(self, component: str) -> bool:
        """Whether the pipeline has this component."""
        entry = self.index.get(component)
        return bool(entry and entry[1])

    def config(self, component: str) -> dict[str, Any]:
        """A component's ``config.json``.

        Raises:
            ModelError: If it is missing or damaged.
        """
        return read_json(self.path / component / "config.json")

    def files(self) -> Iterator[Path]:
        """Configuration, tokenizer and weight files that an export reads.

        Raises:
            ModelError: If a component has pickled weights only.
        """
        names = (path.relative_to(self.path).as_posix() for path in self.path.glob("*/*") if path.is_file())
        for name in needed_files(names, self.name, (self.family,)):
            if self.has(name.split("/")[0]):
                yield self.path / name
        yield self.path / "model_index.json"

    def variant(self, component: str) -> str | None:
        """What diffusers calls the variant of a component's weights: ``fp16`` where they are only there so.

        Raises:
            ModelError: If there are no weights, or a shard that the index names is missing.
        """
        folder = self.path / component
        weights = [path for path in self.files() if path.parent == folder and WEIGHTS.fullmatch(path.name)]
        if not any(path.suffix == ".safetensors" for path in weights):
            raise ModelError(
                f"{folder} has no weights (*.safetensors); the pipeline is incomplete, "
                "save or download it again"
            )
        for index in (path for path in weights if path.suffix == ".json"):
            for shard in sorted(set(read_json(index).get("weight_map", {}).values())):
                if not (folder / shard).is_file():
                    raise ModelError(
                        f"{folder / shard} is missing, {index.name} names it; "
                        "save or download the model again"
                    )
        return variant_of(weights[0].name)

    def precision(self) -> str:
        """Of a bundle, where none is asked for: a known model's, else float32 or float16 as it is stored."""
        if self.name in self.family.models:
            return self.family.models[self.name].precision
        return "float16" if self.bytes_per_weight() == 2 else "float32"

    def bytes_per_weight(self) -> int:
        """2 or 4: how most of the transformer is stored."""
        weights = (path for path in self.files() if path.match("transformer/*.safetensors"))
        return 2 if is_half_precision(next(weights)) else 4

    def load(self, component: str, model_class: Any, **options: Any) -> Any:
        """A component with its weights, of which one copy at most is held.

        Args:
            component: Folder.
            model_class: Its class in diffusers or transformers.
            **options: For ``from_pretrained``: the wanted dtype.

        Raises:
            ModelError: If the weights are not whole.
            Exception: Whatever the library finds wrong with them.
        """
        return model_class.from_pretrained(
            self.path / component,
            use_safetensors=True,
            local_files_only=True,
            variant=self.variant(component),
            **options,
        )

    def unread(self, component: str, model_class: Any, dtype: Any) -> Any:
        """A component whose weights are left in their files, each to be read when it is needed.

        Args:
            component: Folder.
            model_class: Its class in diffusers or transformers.
            dtype: Of the weights, as PyTorch names it.

        Returns:
            What reads its weights one by one; None where only :meth:`load` can read this layout.

        Raises:
            ModelError: If the weights are not whole.
        """
        from emag_export.families.unread import unread_files

        self.variant(component)
        files = [path for path in self.files() if path.match(f"{component}/*.safetensors")]
        return unread_files(files, model_class, self.config(component), dtype)

    def copied(self, component: str) -> Iterator[tuple[str, bytes]]:
        """Files of a tokenizer or of the scheduler that a bundle takes over, by name."""
        for path in sorted((self.path / component).iterdir()):
            if path.suffix in CONFIGURATION:
                yield path.name, path.read_bytes()

    def fingerprint(self) -> str:
        """SHA-256 over everything an export reads."""
        return hash_files(self.path, self.files())

    def weight_bytes(self, *components: str) -> int:
        """Bytes of the weights of these components, or of all."""
        return sum(
            path.stat().st_size
            for path in self.files()
            if path.suffix == ".safetensors" and (not components or path.parent.name in components)
        )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of the source.

    Raises:
        ModelError: If it is missing or damaged.
    """
    try:
        data = json.loads(path.read_text("utf-8"))
    except FileNotFoundError as error:
        raise ModelError(
            f"{path} is missing; the pipeline is incomplete, save or download it again"
        ) from error
    except ValueError as error:
        raise ModelError(f"{path} is damaged ({error}); save or download the model again") from error
    if not isinstance(data, dict):
        raise ModelError(f"{path} holds no JSON object; save or download the model again")
    return data
