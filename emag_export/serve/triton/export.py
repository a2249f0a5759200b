"""Writing a model repository for Triton Inference Server."""

import os
import shutil
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path

from emag_export.bundle import ENGINES, MANIFEST, Bundle
from emag_export.engines.config import EngineConfig
from emag_export.errors import InputError
from emag_export.serve.triton.fields import FIELDS, PICTURE, PROMPT

__all__ = ["config_text", "export_repository"]


def export_repository(
    bundle: Bundle, output: Path, engine: EngineConfig, *, images: int = 8, overwrite: bool = False
) -> Path:
    """Write a repository with one model; it appears whole or not at all.

    Args:
        bundle: To serve. Its files are hard links where the file system allows.
        output: Folder of the repository.
        engine: How the model opens it.
        images: That share a call.
        overwrite: Replace what is in the folder.

    Returns:
        The model's folder.

    Raises:
        InputError: If the folder is not empty, or the bundle shares components of another one.
        BundleError: If a file of the bundle does not match its hash.
    """
    if bundle.encoders is not None:
        raise InputError(
            f"{bundle.path} uses {', '.join(bundle.encoders.components)} of another bundle; "
            "build it without `encoders`, so that the repository holds all of it"
        )
    if images < 1:
        raise InputError(f"`max_images` is {images}; give 1 or more")
    if output.exists() and (not output.is_dir() or any(output.iterdir())) and not overwrite:
        raise InputError(f"{output} is not empty; give another `output`, or add `overwrite`")
    bundle.check()
    name = bundle.path.resolve().name
    partial = output.with_name(f".{output.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    version = partial / name / "1"
    version.mkdir(parents=True)
    _copy_bundle(bundle, version / "bundle")
    (version / "model.py").write_text(_file("model.py"), "utf-8")
    (partial / name / "config.pbtxt").write_text(config_text(name, engine, images), "utf-8")
    words = {"name": name, "prompt": PROMPT, "picture": PICTURE, "images": images}
    extra = "gpu" if engine.device.startswith("cuda") else "cpu"
    fields = ", ".join(f"`{field}`" for field in FIELDS)
    for template, target in (("repository.md", "README.md"), ("client.txt", "client.py")):
        text = _file(template).format(**words, extra=extra, fields=fields)
        (partial / target).write_text(text, "utf-8")
    if output.exists():
        shutil.rmtree(output)
    partial.rename(output)
    return output / name


def _file(name: str) -> str:
    """A file of this package."""
    return files("emag_export.serve.triton").joinpath(name).read_text("utf-8")


def config_text(name: str, engine: EngineConfig, images: int) -> str:
    """``config.pbtxt`` of the model.

    Args:
        name: Of the model.
        engine: How it opens the bundle.
        images: That share a call.
    """
    inputs = [_tensor(PROMPT, "STRING", optional=False)]
    inputs += [_tensor(field, given.kind, optional=True) for field, given in FIELDS.items()]
    parameters: Mapping[str, str] = {
        "backend": engine.backend,
        "device": engine.device,
        "threads": str(engine.threads),
    }
    lines = [
        f'name: "{name}"',
        'backend: "python"',
        f"max_batch_size: {images}",
        "input [",
        ",\n".join(inputs),
        "]",
        "output [",
        _tensor(PICTURE, "STRING", optional=False),
        "]",
        "# A request is called again until its picture is finished: one step of all live ones at a time.",
        # Between two steps nobody is idle; Triton would end a request whose first step is slow.
        "sequence_batching { iterative_sequence: true, max_sequence_idle_microseconds: 600000000 }",
        # The model opens its device itself.
        "instance_group [ { count: 1, kind: KIND_CPU } ]",
        *(
            f'parameters {{ key: "{key}", value: {{ string_value: "{value}" }} }}'
            for key, value in parameters.items()
        ),
    ]
    return "\n".join(lines) + "\n"


def _tensor(name: str, kind: str, *, optional: bool) -> str:
    words = f'name: "{name}", data_type: TYPE_{kind}, dims: [ 1 ]' + (", optional: true" if optional else "")
    return f"  {{ {words} }}"


def _copy_bundle(bundle: Bundle, target: Path) -> None:
    names = [*bundle.files, MANIFEST]
    names += [
        path.relative_to(bundle.path).as_posix()
        for path in sorted((bundle.path / ENGINES).rglob("*"))
        if path.is_file()
    ]
    for name in names:
        path = target / name
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(bundle.path / name, path)
        except OSError:  # another file system, or one without links
            shutil.copy2(bundle.path / name, path)
