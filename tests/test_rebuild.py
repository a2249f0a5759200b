"""A bundle names the build command that makes it again, and that command does."""

import ast
import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from emag_export.api import build_options
from emag_export.bundle import DENOISER, MANIFEST, Bundle
from emag_export.cli.main import main
from emag_export.cli.words import command_of
from emag_export.errors import InputError
from emag_export.exporter.build import build
from emag_export.exporter.describe.identify import identify
from emag_export.kinds import Variant
from emag_export.manifest import Manifest
from emag_export.options import BuildOptions
from emag_export.records import dump_record
from emag_export.shared_encoders import record_encoders

Rebuilt = tuple[str, Path, BuildOptions, bool]


@pytest.fixture
def rebuilt(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Rebuilt]:
    """Runs a build command up to where the model would be looked for: model, folder, options, overwrite."""
    seen: list[Rebuilt] = []

    def stop(model: str, output: Path, wanted: BuildOptions, *, overwrite: bool, compiled: bool) -> Bundle:
        seen.append((model, output, wanted, overwrite))
        raise InputError("far enough")

    monkeypatch.setattr("emag_export.cli.build._bundle", stop)

    def run(command: str) -> Rebuilt:
        done = CliRunner().invoke(main, [*shlex.split(command)[1:], "--backend", "none"])
        assert "far enough" in done.output, done.output
        return seen.pop()

    return run


def described(model: str, options: BuildOptions, folder: Path) -> Bundle:
    """The bundle that a build would write, without its graphs: ``bundle.json`` decides how it is rebuilt."""
    plan = identify(model, options)
    encoders = None
    if plan.encoders is not None:
        encoders = record_encoders(plan.encoders, folder, plan.contract, plan.geometry, plan.shared)
    manifest = Manifest(
        key=plan.key,
        contract=plan.contract,
        defaults=plan.defaults,
        geometry=plan.geometry,
        graphs=dict.fromkeys(plan.components, plan.contract.graph),
        precision_notes={},
        preview=None,
        source=plan.provenance,
        encoders=encoders,
        quantisation=plan.quantisation,
        files={},
    )
    folder.mkdir()
    (folder / MANIFEST).write_text(dump_record(manifest))
    return Bundle(folder)


def test_the_tiny_bundle_is_rebuilt_as_itself(
    tiny_bundle: Path, rebuilt: Callable[[str], Rebuilt], tmp_path: Path
) -> None:
    bundle = Bundle(tiny_bundle)
    model, output, options, overwrite = rebuilt(command_of(bundle.rebuild()))
    assert (model, output, overwrite) == ("tiny-sd3", tiny_bundle, True)
    assert identify(model, options).key == bundle.key
    model, output, options, overwrite = rebuilt(command_of(bundle.rebuild(tmp_path / "a b")))
    assert (model, output, overwrite) == ("tiny-sd3", tmp_path / "a b", False)
    assert identify(model, options).key == bundle.key


@pytest.mark.parametrize(
    "keywords",
    [
        {},
        {"variant": "emag-t", "renorm": "none", "precision": "fp16", "state_precision": "fp16"},
        {"variant": "emag", "emag_candidates": [2, 4], "max_sequence_length": 7},
        {"without": ["text_encoder_3"]},
        {"components": [DENOISER, "vae_decoder"], "precision": "bf16"},
        {"weights_seed": 3},
        {"loras": [("{tmp}/a lora.safetensors", -0.25), "{tmp}/a lora.safetensors"]},
        {"encoders": "{tiny}"},
        {"encoders": "{tiny}", "without": ["text_encoder_3"], "variant": "emag"},
    ],
)
def test_every_option_survives_a_rebuild(
    keywords: dict[str, Any], tiny_bundle: Path, rebuilt: Callable[[str], Rebuilt], tmp_path: Path
) -> None:
    """As a command and as a call in Python, both as they are printed."""
    (tmp_path / "a lora.safetensors").write_bytes(b"identified by its hash, not read")
    filled = json.dumps(keywords).replace("{tmp}", str(tmp_path)).replace("{tiny}", str(tiny_bundle))
    words = json.loads(filled)
    words["loras"] = [tuple(lora) if isinstance(lora, list) else lora for lora in words.get("loras", ())]
    model = "sd3-narrow" if "weights_seed" in words else "tiny-sd3"
    bundle = described(model, build_options(**words), tmp_path / "b")
    assert bundle.key == identify(model, build_options(**words)).key

    call = bundle.rebuild()
    found, output, options, overwrite = rebuilt(command_of(call))
    assert (found, output, overwrite) == (model, bundle.path, True)
    assert identify(found, options).key == bundle.key

    typed = ast.parse(str(call), mode="eval").body
    assert isinstance(typed, ast.Call)
    arguments = {str(word.arg): ast.literal_eval(word.value) for word in typed.keywords}
    assert (arguments.pop("output"), arguments.pop("overwrite")) == (str(bundle.path), True)
    assert identify(arguments.pop("model"), build_options(**arguments)).key == bundle.key


def test_a_change_is_part_of_the_call(tiny_bundle: Path, rebuilt: Callable[[str], Rebuilt]) -> None:
    call = Bundle(tiny_bundle).rebuild(Path("b"), variant=Variant.EMAG_I)
    _, output, options, _ = rebuilt(command_of(call))
    assert (output, options.variant) == (Path("b"), Variant.EMAG_I)


@pytest.mark.parametrize(
    ("before", "now", "said"),
    [
        ({}, {"variant": "emag"}, "variant emag-q, now emag"),
        ({"precision": "fp16"}, {}, "precision float16, now float32"),
        ({"quantize": "w8"}, {}, "quantisation int8 weights, now none"),
        (
            {"emag_candidates": [3]},
            {"max_sequence_length": 7},
            "candidate blocks 3, now 3, 4, 5; text tokens 20, now 7",
        ),
        (
            {"components": [DENOISER]},
            {"components": [DENOISER, "vae_decoder"]},
            "components transformer, now transformer, vae_decoder",
        ),
    ],
)
def test_a_build_says_what_differs_in_the_bundle_that_is_there(
    before: dict[str, Any], now: dict[str, Any], said: str, tmp_path: Path
) -> None:
    described("tiny-sd3", build_options(**before), tmp_path / "b")
    with pytest.raises(InputError) as caught:
        build("tiny-sd3", tmp_path / "b", build_options(**now))
    assert caught.value.message == (
        f"{tmp_path / 'b'} holds another bundle than was asked for ({said}); give another folder as "
        "`output`, or replace it with `overwrite`"
    )


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda data: data["source"]["versions"].update(torch="1.0"),
            r"\(torch 1\.0, now 2\..*\); give another",
        ),
        (lambda data: data["source"]["versions"].pop("onnx"), r"\(onnx None, now 1\."),
        (
            lambda data: data["files"].update(x={"bytes": 1, "sha256": "0"}),
            r"cannot be used \(.*x is missing; ",
        ),
        (lambda data: data.update(format_version=99), r"cannot be used \(.*format_version 99, .* upgrade"),
        (lambda data: None, r"\(what this version of emag-export writes\)"),
    ],
)
def test_a_build_says_that_versions_changed_or_files_are_damaged(
    change: Callable[[dict[str, Any]], object], said: str, tmp_path: Path
) -> None:
    described("tiny-sd3", BuildOptions(), tmp_path / "b")
    file = tmp_path / "b" / MANIFEST
    data = json.loads(file.read_text())
    change(data)
    if not data["files"]:
        data["key"] = "0" * 64  # versions are part of what it is a hash of
    file.write_text(json.dumps(data))
    with pytest.raises(InputError, match=said):
        build("tiny-sd3", tmp_path / "b")
