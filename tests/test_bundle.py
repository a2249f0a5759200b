"""A bundle whose content is not what was written is refused, and says how to get a good one."""

import json
import shutil
from pathlib import Path

import pytest

from emag_export.bundle import MANIFEST, Bundle
from emag_export.contract import Variant
from emag_export.errors import BundleError, InputError


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
    with pytest.raises(BundleError, match=r"model\.onnx does not match its SHA-256.*--overwrite"):
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
    with pytest.raises(BundleError, match="contract version is 99, this emag-export reads 1 to 1: upgrade"):
        Bundle(copy)


@pytest.mark.parametrize(("version", "said"), [(None, "no format_version"), (0, "format_version 0")])
def test_bundle_of_an_older_version_is_refused(copy: Path, version: int | None, said: str) -> None:
    manifest = json.loads((copy / MANIFEST).read_text())
    manifest["format_version"] = version
    (copy / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match=f"has {said}, .* an older one wrote it; rebuild"):
        Bundle(copy)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"contract": 3}', '{"contract": {"version": 1}}'])
def test_damaged_manifest(copy: Path, content: str) -> None:
    (copy / MANIFEST).write_text(content)
    with pytest.raises(BundleError, match="rebuild"):
        Bundle(copy)


def test_folder_that_is_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"is not a bundle.*emag-export build"):
        Bundle(tmp_path)


def test_other_variant_is_refused_with_the_command(small_bundle: Path) -> None:
    wanted = r"holds the variant emag, emag-q was.*--variant emag-q .*--emag-layers 1,2 -o .*-emag-q$"
    with pytest.raises(InputError, match=wanted):
        Bundle(small_bundle).require_variant(Variant.EMAG_Q)
    with pytest.raises(InputError, match=wanted):
        Bundle(small_bundle).require_variant("emag-q")


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
