"""A bundle whose content is not what was written is refused, and says how to get a good one."""

import json
import shutil
from pathlib import Path

import pytest

from emag_export.bundle import MANIFEST, Bundle
from emag_export.errors import BundleError, Call, InputError
from emag_export.kinds import Variant


@pytest.fixture
def copy(small_bundle: Path, tmp_path: Path) -> Path:
    """A bundle that may be damaged."""
    return shutil.copytree(small_bundle, tmp_path / "copy")


def test_intact_bundle_passes(small_bundle: Path) -> None:
    Bundle(small_bundle).check()


def test_flipped_bit_is_found_before_the_graph_is_used(copy: Path) -> None:
    path = copy / "transformer" / "model.onnx"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(BundleError, match=r"model\.onnx does not match its SHA-256.*`overwrite`"):
        Bundle(copy).graph("transformer")


def test_truncated_file_is_found_by_its_size(copy: Path) -> None:
    path = copy / "vae_decoder" / "model.onnx"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(BundleError, match="truncated or was replaced"):
        Bundle(copy).graph("vae_decoder")


def test_missing_file_is_named(copy: Path) -> None:
    (copy / "scheduler" / "scheduler_config.json").unlink()
    with pytest.raises(BundleError, match=r"scheduler_config\.json is missing"):
        Bundle(copy).config("scheduler", "scheduler_config.json")


def test_newer_contract_is_refused(copy: Path) -> None:
    manifest = json.loads((copy / MANIFEST).read_text())
    manifest["contract"]["version"] = 99
    (copy / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match="contract version is 99, this emag-export reads 2: upgrade"):
        Bundle(copy)


@pytest.mark.parametrize(("version", "said"), [(None, "no format_version"), (0, "format_version 0")])
def test_bundle_of_an_older_version_is_refused(copy: Path, version: int | None, said: str) -> None:
    manifest = json.loads((copy / MANIFEST).read_text())
    manifest["format_version"] = version
    (copy / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match=f"has {said}, .* an older one wrote it; rebuild"):
        Bundle(copy)


def test_bundle_of_format_version_1_is_read_as_what_it_is(tiny_bundle: Path, tmp_path: Path) -> None:
    """What the first version wrote of tiny-sd3: numbers of SD3, where dimensions have names today."""
    today, path = Bundle(tiny_bundle).manifest, tmp_path / MANIFEST
    data = json.loads((tiny_bundle / MANIFEST).read_text())
    data["contract"] = {
        "variant": "emag-q",
        "blocks": [3, 4, 5],
        "num_blocks": 10,
        "heads": 3,
        "head_dim": 32,
        "in_channels": 8,
        "out_channels": 8,
        "patch_size": 2,
        "max_grid": 24,
        "text_dim": 128,
        "pooled_dim": 112,
        "family": "sd3",
        "renorm": "row",
        "precision": "float32",
        "state_dtype": "float32",
        "version": 1,
    }
    data["geometry"] = {"vae_factor": 4, "clip_tokens": 20}
    data["defaults"]["emag_layers"] = data["defaults"].pop("candidates")
    data |= {"format_version": 1, "arguments": ["--model", "tiny-sd3", "--emag-layers", "3,4,5"]}
    path.write_text(json.dumps(data))
    assert Bundle(tmp_path).manifest == today

    del data["geometry"]["clip_tokens"]
    path.write_text(json.dumps(data))
    with pytest.raises(BundleError, match=r"'clip_tokens'.* read as an older version; rebuild the bundle"):
        Bundle(tmp_path)
    data["format_version"] = 3
    path.write_text(json.dumps(data))
    with pytest.raises(BundleError, match=r"format_version 3, .* reads 2: upgrade emag-export"):
        Bundle(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"contract": 3}', '{"contract": {"version": 1}}'])
def test_damaged_manifest(copy: Path, content: str) -> None:
    (copy / MANIFEST).write_text(content)
    with pytest.raises(BundleError, match="rebuild"):
        Bundle(copy)


def test_folder_that_is_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(
        BundleError, match=r"is not a bundle.*: emag_export\.build\(model='tiny-sd3'"
    ) as caught:
        Bundle(tmp_path)
    remedy = caught.value.remedy
    assert remedy == Call(verb="build", arguments={"model": "tiny-sd3", "output": tmp_path})


@pytest.mark.parametrize("variant", [Variant.EMAG_Q, "emag-q"])
def test_other_variant_is_refused_with_the_call(
    variant: str, small_bundle: Path, small_pipeline: Path
) -> None:
    with pytest.raises(
        InputError, match="holds the variant emag, emag-q was asked for; build it: "
    ) as caught:
        Bundle(small_bundle).require_variant(variant)
    remedy = caught.value.remedy
    assert remedy is not None
    assert remedy.verb == "build"
    wanted = {
        "model": str(small_pipeline),
        "output": Path(f"{small_bundle}-emag-q"),
        "variant": "emag-q",
        "emag_candidates": (1, 2),
    }
    assert remedy.arguments.items() >= wanted.items()
    assert "overwrite" not in remedy.arguments, "the other variant's bundle is not in its way"


def test_its_own_variant_is_taken_as_member_and_as_text(small_bundle: Path) -> None:
    for variant in (Variant.EMAG, "emag", "".join(("em", "ag")), None):
        Bundle(small_bundle).require_variant(variant)
    with pytest.raises(InputError, match="there is no variant 'EMAG'; choose emag-q"):
        Bundle(small_bundle).require_variant("EMAG")


def test_unknown_component(small_bundle: Path) -> None:
    with pytest.raises(BundleError, match="has no text_encoder_3"):
        Bundle(small_bundle).graph("text_encoder_3")


def test_large_weights_are_refused_however_they_differ(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the data were so large that it is hashed while an engine loads it."""
    monkeypatch.setattr("emag_export.bundle._HASHED_BESIDE", 1 << 10)
    data = copy / "transformer" / "model.onnx"
    whole = bytearray(data.read_bytes())
    whole[len(whole) // 2] ^= 1
    data.write_bytes(whole)
    loaded = []
    with (
        pytest.raises(BundleError, match="does not match its SHA-256"),
        Bundle(copy).loading("transformer") as graph,
    ):
        loaded.append(graph)
    assert loaded == [data]
    data.write_bytes(whole[:-1])
    with pytest.raises(BundleError, match="truncated"), Bundle(copy).loading("transformer"):
        raise AssertionError("loaded a truncated file")
