"""A bundle that uses the encoders of another: the same embeddings and pictures, stored once."""

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from emag_export.bundle import MANIFEST, Bundle
from emag_export.contract import DenoiserContract
from emag_export.errors import BundleError, InputError
from emag_export.runtime.pipeline import Pipeline
from emag_export.runtime.request import default_request
from emag_export.shared_encoders import components_of, home_of, record_encoders
from emag_export.sizes import Geometry, TextRange
from tests.bundles import opener
from tests.sd3 import EMBEDS

SHARED = ("text_encoder", "text_encoder_2", "text_encoder_3", "vae_decoder")


def geometry_of(bundle: Bundle) -> Geometry:
    return bundle.manifest.geometry


@pytest.fixture
def pair(tiny_bundle: Path, tmp_path: Path) -> tuple[Path, Path]:
    """(whole, thin): a bundle, and one beside it that has the transformer only and shares the rest."""
    whole = shutil.copytree(tiny_bundle, tmp_path / "models" / "whole")
    return whole, thin_bundle(whole, whole.parent / "thin")


def thin_bundle(whole: Path, out: Path) -> Path:
    bundle = Bundle(whole)
    entry = record_encoders(bundle, out, bundle.contract, geometry_of(bundle), SHARED)
    out.mkdir(parents=True)
    for folder in ("transformer", "scheduler"):
        shutil.copytree(whole / folder, out / folder)
    manifest = json.loads((whole / MANIFEST).read_text())
    manifest["graphs"] = {"transformer": manifest["graphs"]["transformer"]}
    own = ("transformer/", "scheduler/")
    manifest["files"] = {name: record for name, record in manifest["files"].items() if name.startswith(own)}
    (out / MANIFEST).write_text(json.dumps(manifest | {"encoders": asdict(entry)}))
    return out


def test_same_embeddings_and_pictures(pair: tuple[Path, Path]) -> None:
    whole, thin = map(Bundle, pair)
    assert components_of(thin) == components_of(whole) == whole.components
    assert home_of(thin, "transformer").path == thin.path
    assert home_of(thin, "tokenizer_3").path.resolve() == whole.path.resolve()
    results = []
    for bundle in (whole, thin):
        with Pipeline(bundle, opener()) as pipeline:
            prepared = pipeline.prepare([replace(default_request(bundle, "a red circle"), steps=3)])
            *_, last = pipeline.denoise(prepared)
            results.append((prepared.conditioning.given[EMBEDS], last.latents, pipeline.decode(last.latents)))
    for got, wanted in zip(results[1], results[0], strict=True):
        assert torch.equal(torch.as_tensor(got), torch.as_tensor(wanted))


def test_bundles_may_move_together(pair: tuple[Path, Path], tmp_path: Path) -> None:
    whole, thin = pair
    assert json.loads((thin / MANIFEST).read_text())["encoders"]["path"] == "../whole"
    moved = whole.parent.rename(tmp_path / "elsewhere")
    assert home_of(Bundle(moved / "thin"), "vae_decoder").path.resolve() == (moved / "whole").resolve()


def test_distant_bundle_is_recorded_with_its_whole_path(pair: tuple[Path, Path], tmp_path: Path) -> None:
    whole, _ = pair
    bundle = Bundle(whole)
    out = tmp_path / "other" / "deep" / "thin"
    entry = record_encoders(bundle, out, bundle.contract, geometry_of(bundle), SHARED)
    assert entry.path == whole.resolve().as_posix()


def test_missing_bundle(pair: tuple[Path, Path]) -> None:
    whole, thin = pair
    shutil.rmtree(whole)
    with pytest.raises(BundleError, match=r"uses the encoders of .*whole, which cannot be opened"):
        Pipeline(Bundle(thin), opener())


def test_another_bundle_in_its_place(pair: tuple[Path, Path]) -> None:
    """Whole in itself, but with other weights: noticed by the hashes that the thin bundle recorded."""
    whole, thin = pair
    manifest = json.loads((whole / MANIFEST).read_text())
    manifest["files"]["text_encoder_2/model.onnx"]["sha256"] = "0" * 64
    (whole / MANIFEST).write_text(json.dumps(manifest))
    assert home_of(Bundle(thin), "text_encoder").path.resolve() == whole.resolve()
    with pytest.raises(BundleError, match=r"made with another .*text_encoder_2/model\.onnx: its SHA-256"):
        home_of(Bundle(thin), "text_encoder_2")


@pytest.mark.parametrize("name", ["text_encoder/model.onnx", "tokenizer_2/tokenizer.json"])
def test_damaged_file_of_the_other_bundle(name: str, pair: tuple[Path, Path]) -> None:
    whole, thin = pair
    data = (whole / name).read_bytes()
    (whole / name).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(BundleError, match="does not match its SHA-256"):
        Pipeline(Bundle(thin), opener())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"conditioning": (("text", 4096), (112,))},
            r"encoder_hidden_states's shape .* needs \('text', 4096\)",
        ),
        ({"conditioning": (("text", 128), (2048,))}, r"pooled_projections's shape .* needs \(2048,\)"),
        (
            {"latents": (16, "2*h", "2*w"), "out_channels": 16},
            "latent channels is 8, the transformer needs 16",
        ),
        ({"pixels_per_latent": 8}, "pixels per latent is 4, the transformer needs 8"),
        ({"text": TextRange(least=77, usual=97, most=97)}, "text tokens is .*, the transformer needs 77"),
    ],
)
def test_encoders_that_do_not_fit(
    change: dict[str, Any], message: str, tiny_bundle: Path, tmp_path: Path
) -> None:
    bundle = Bundle(tiny_bundle)
    geometry = geometry_of(bundle)
    contract: DenoiserContract = bundle.contract
    if "conditioning" in change:
        dims = change["conditioning"]
        wanted = tuple(
            replace(spec, dims=("trunk_rows", *own))
            for spec, own in zip(contract.conditioning, dims, strict=True)
        )
        contract = replace(contract, conditioning=wanted)
    elif change.keys() <= asdict(geometry).keys():
        geometry = replace(geometry, **change)
    else:
        contract = replace(contract, **change)
    with pytest.raises(InputError, match=message):
        record_encoders(bundle, tmp_path / "thin", contract, geometry, SHARED)


def test_components_that_are_not_there(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """Neither what the other bundle lacks nor what it shares itself can be shared on."""
    _, thin = pair
    bundle = Bundle(thin)
    with pytest.raises(InputError, match="has no text_encoder of its own to share, it has none"):
        record_encoders(bundle, tmp_path / "x", bundle.contract, geometry_of(bundle), ["text_encoder"])
