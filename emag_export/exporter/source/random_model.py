"""A known model with its real configuration and random weights: for speed and size, not for pictures."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from emag_export.errors import ModelError
from emag_export.families import RANDOM_MODELS
from emag_export.families.source_model import SourceModel
from emag_export.hashing import hash_json

__all__ = ["RandomModel", "random_model"]

_BYTES = 2
"""Of a weight in half precision, as the models were published."""


@dataclass(frozen=True, kw_only=True)
class RandomModel(SourceModel):
    """Configurations from the table; weights from the seed when a component is loaded."""

    seed: int

    def config(self, component: str) -> dict[str, Any]:
        """A component's configuration."""
        return json.loads(json.dumps(dict(self.family.configs[self.name][component])))  # type: ignore[no-any-return]

    def fingerprint(self) -> str:
        """SHA-256 over configurations and seed."""
        return hash_json(
            [
                {name: dict(config) for name, config in self.family.configs[self.name].items()},
                "random, each weight seeded by its name",
                self.seed,
            ]
        )

    def weight_bytes(self, *components: str) -> int:
        """Bytes in half precision, as published; nothing lies on the disk."""
        names = components or tuple(self.family.configs[self.name])
        return sum(
            _BYTES * self.family.parameters.get(self.name if n == "transformer" else n, 0) for n in names
        )

    def bytes_per_weight(self) -> int:
        """As :meth:`weight_bytes` counts."""
        return _BYTES

    def precision(self) -> str:
        """The published model's; float32 where there is none, whose shape is for measuring alone."""
        return super().precision() if self.name in self.family.models else "float32"

    def load(self, component: str, model_class: Any, **options: Any) -> Any:
        """The component with random weights; options as ``from_pretrained`` takes them."""
        from emag_export.exporter.source.random_weights import random_component

        dtype = options["torch_dtype"] if "torch_dtype" in options else options["dtype"]
        return random_component(model_class, self.config(component), dtype=dtype, seed=self.seed)

    def unread(self, component: str, model_class: Any, dtype: Any) -> Any:
        """The component with random weights that are made when they are needed: those of :meth:`load`."""
        from emag_export.exporter.source.random_weights import unread_random

        return unread_random(model_class, self.config(component), dtype=dtype, seed=self.seed)

    def copied(self, component: str) -> Iterator[tuple[str, bytes]]:
        """Files of the scheduler or of a tokenizer: a small vocabulary, with the real token limit."""
        if component == "scheduler":
            yield "scheduler_config.json", json.dumps(self.config("scheduler"), indent=2).encode()
            return
        own = self.family.vocabulary_folders.get(component, component)
        folder = Path(str(files("emag_export"))) / self.family.vocabulary / own
        for path in sorted(folder.iterdir()):
            data = path.read_bytes()
            if path.name == "tokenizer_config.json":
                limited = {**json.loads(data), "model_max_length": self.family.token_limits[component]}
                data = json.dumps(limited, indent=2).encode()
            yield path.name, data


def random_model(name: str, seed: int) -> RandomModel:
    """A random model of a published configuration.

    Raises:
        ModelError: If the configuration is not known here.
    """
    if name not in RANDOM_MODELS:
        raise ModelError(
            f"random weights need a known configuration: {', '.join(RANDOM_MODELS)}; {name!r} is none"
        )
    family = RANDOM_MODELS[name]
    index: dict[str, Any] = {"_class_name": family.pipelines[0]}
    index |= {component: list(names) for component, names in family.classes.items()}
    return RandomModel(name=name, path=Path(name), revision=None, index=index, family=family, seed=seed)
