"""A known model with its real configuration and random weights: for speed and size, not for pictures."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from emag_export.architectures import CLASSES, PARAMETERS, PIPELINES, TOKEN_LIMITS
from emag_export.errors import ModelError
from emag_export.exporter.source.find import SourceModel
from emag_export.hashing import hash_json
from emag_export.models import KNOWN_MODELS

__all__ = ["RandomModel", "random_model"]

_BYTES = 2
"""Of a weight in half precision, as the models were published."""


@dataclass(frozen=True, kw_only=True)
class RandomModel(SourceModel):
    """Configurations from the table; weights from the seed when a component is loaded."""

    seed: int

    def config(self, component: str) -> dict[str, Any]:
        """A component's configuration."""
        return json.loads(json.dumps(dict(PIPELINES[self.name][component])))  # type: ignore[no-any-return]

    def fingerprint(self) -> str:
        """SHA-256 over configurations and seed."""
        return hash_json(
            [{name: dict(config) for name, config in PIPELINES[self.name].items()}, "random", self.seed]
        )

    def weight_bytes(self, *components: str) -> int:
        """Bytes in half precision, as published; nothing lies on the disk."""
        names = components or tuple(PIPELINES[self.name])
        return sum(_BYTES * PARAMETERS.get(self.name if n == "transformer" else n, 0) for n in names)

    def bytes_per_weight(self) -> int:
        """As :meth:`weight_bytes` counts."""
        return _BYTES

    def precision(self) -> str:
        """The published model's; float32 where there is none, whose shape is for measuring alone."""
        return super().precision() if self.name in KNOWN_MODELS else "float32"

    def load(self, component: str, model_class: Any, **options: Any) -> Any:
        """The component with random weights; options as ``from_pretrained`` takes them."""
        from emag_export.exporter.source.random_weights import random_component

        dtype = options["torch_dtype"] if "torch_dtype" in options else options["dtype"]
        return random_component(model_class, self.config(component), dtype=dtype, seed=self.seed)

    def copied(self, component: str) -> Iterator[tuple[str, bytes]]:
        """Files of the scheduler or of a tokenizer: tiny-sd3's vocabulary, with the real token limit."""
        if component == "scheduler":
            yield "scheduler_config.json", json.dumps(self.config("scheduler"), indent=2).encode()
            return
        for path in sorted((Path(str(files("emag_export"))) / "tiny_sd3" / "model" / component).iterdir()):
            data = path.read_bytes()
            if path.name == "tokenizer_config.json":
                limited = {**json.loads(data), "model_max_length": TOKEN_LIMITS[component]}
                data = json.dumps(limited, indent=2).encode()
            yield path.name, data


def random_model(name: str, seed: int) -> RandomModel:
    """A random model of a published configuration.

    Raises:
        ModelError: If the configuration is not known here.
    """
    if name not in PIPELINES:
        raise ModelError(
            f"--weights random needs a known configuration: {', '.join(PIPELINES)}; {name!r} is none"
        )
    index: dict[str, Any] = {"_class_name": "StableDiffusion3Pipeline"}
    index |= {component: list(names) for component, names in CLASSES.items()}
    return RandomModel(name=name, path=Path(name), revision=None, index=index, seed=seed)
