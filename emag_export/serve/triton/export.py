"""Writing a model repository for Triton Inference Server."""

import json
import os
import shutil
from importlib.resources import files
from pathlib import Path

from emag_export.bundle import ENGINES, MANIFEST, Bundle
from emag_export.engines.config import EngineConfig
from emag_export.engines.tensorrt.flavour import FLAVOURS
from emag_export.errors import InputError
from emag_export.serve.triton.fields import FIELDS, PICTURE, PROMPT
from emag_export.serve.triton.parameters import Limits, as_parameters

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
        InputError: If the folder is not empty or overlaps the bundle, or the bundle shares components of
            another one.
        BundleError: If a file of the bundle does not match its hash.
    """
    if bundle.encoders is not None:
        raise InputError(
            f"{bundle.path} uses {', '.join(bundle.encoders.components)} of another bundle; "
            "build it without `encoders`, so that the repository holds all of it"
        )
    if images < 1:
        raise InputError(f"`max_images` is {images}; give 1 or more")
    output = output.resolve()
    _check_output(bundle.path.resolve(), output, overwrite=overwrite)
    bundle.check()
    partial = output.with_name(f".{output.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        name = _write(bundle, partial, engine, images)
        replaced = output.with_name(f".{output.name}.replaced")
        shutil.rmtree(replaced, ignore_errors=True)
        if output.exists():
            output.rename(replaced)
        partial.rename(output)
        shutil.rmtree(replaced, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return output / name


def _check_output(bundle: Path, output: Path, *, overwrite: bool) -> None:
    """Refuse a folder whose content would be lost."""
    if output.is_relative_to(bundle) or bundle.is_relative_to(output):
        raise InputError(
            f"`output` {output} and the bundle {bundle} lie inside one another; give a folder beside it"
        )
    if output.exists() and not output.is_dir():
        raise InputError(f"`output` {output} is a file; give a folder")
    if output.exists() and any(output.iterdir()) and not overwrite:
        raise InputError(f"{output} is not empty; give another `output`, or add `overwrite`")


def _write(bundle: Bundle, folder: Path, engine: EngineConfig, images: int) -> str:
    """Everything of a repository; the model's name."""
    name = bundle.path.resolve().name
    version = folder / name / "1"
    version.mkdir(parents=True)
    _copy_bundle(bundle, version / "bundle")
    (version / "model.py").write_text(_file("model.py"), "utf-8")
    config = config_text(name, engine, images, Limits.of(bundle))
    (folder / name / "config.pbtxt").write_text(config, "utf-8")
    words = {"name": name, "prompt": PROMPT, "picture": PICTURE, "images": images}
    extra = _extra(engine)
    fields = ", ".join(f"`{field}`" for field in FIELDS)
    for template, target in (("repository.md", "README.md"), ("client.txt", "client.py")):
        text = _file(template).format(**words, extra=extra, fields=fields)
        (folder / target).write_text(text, "utf-8")
    return name


def _extra(engine: EngineConfig) -> str:
    """Of this package, what the environment of the model needs."""
    if engine.backend == "onnxruntime":
        return "gpu" if engine.device.startswith("cuda") else "cpu"
    return engine.backend if engine.backend in FLAVOURS else "export"


def _file(name: str) -> str:
    """A file of this package."""
    return files("emag_export.serve.triton").joinpath(name).read_text("utf-8")


def config_text(name: str, engine: EngineConfig, images: int, limits: Limits) -> str:
    """``config.pbtxt`` of the model.

    Args:
        name: Of the model.
        engine: How it opens the bundle.
        images: That share a call.
        limits: Of a request.
    """
    inputs = [_tensor(PROMPT, "STRING", optional=False)]
    inputs += [_tensor(name, field.kind, field.count, optional=True) for name, field in FIELDS.items()]
    lines = [
        f"name: {_quoted(name)}",
        'backend: "python"',
        f"max_batch_size: {images}",
        "input [",
        ",\n".join(inputs),
        "]",
        "output [",
        _tensor(PICTURE, "STRING", optional=False),
        "]",
        "sequence_batching {",
        "  # A request is called again until its picture is finished: one step of all live ones at a time.",
        "  iterative_sequence: true",
        "  # Between two steps nobody is idle; Triton would end a request whose first step is slow.",
        "  max_sequence_idle_microseconds: 600000000",
        "  # Not 'direct': requests whose inputs differ from the first one's would wait for its end.",
        f"  oldest {{ max_candidate_sequences: {images} }}",
        "}",
        "# The model opens its device itself.",
        "instance_group [ { count: 1, kind: KIND_CPU } ]",
        "# How the bundle is opened, and what a request may ask for at most.",
        *(
            f'parameters {{ key: "{key}", value: {{ string_value: {_quoted(value)} }} }}'
            for key, value in as_parameters(engine, limits).items()
        ),
    ]
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _tensor(name: str, kind: str, count: int = 1, *, optional: bool) -> str:
    words = f'name: "{name}", data_type: TYPE_{kind}, dims: [ {count} ]' + (
        ", optional: true" if optional else ""
    )
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
            os.link((bundle.path / name).resolve(), path)
        except OSError:  # another file system, or one without links
            shutil.copy2(bundle.path / name, path)
