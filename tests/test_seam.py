"""The seam for model families: nothing outside a family's folder knows a model."""

import json
import re
import shutil
from pathlib import Path

import pytest

from emag_export.bundle import MANIFEST, Bundle
from emag_export.contract import DenoiserContract
from emag_export.errors import ContractError, ModelError
from emag_export.families import FAMILIES, family_of, family_of_pipeline
from emag_export.families.protocol import Blocks
from emag_export.kinds import Variant
from tests.conftest import small_model

ROOT = Path(__file__).parent.parent
MODEL_WORDS = re.compile(r"sd3|clip(?!_sample)|t5|\bdit\b|flux|qwen|z_image", re.IGNORECASE)
"""``clip_sample`` is a field of diffusers' schedulers."""
OWN = (
    "emag_export/families/",
    *("emag_export/tiny_sd3/", "emag_export/tiny_dit/"),
    # CLIP measures pictures here, whatever drew them; those of the embedded models are measured exactly.
    *("emag_export/evaluation/", "cli/eval.py"),
)


def sources() -> list[Path]:
    """Every file of the library, each once: three of its folders are links."""
    folders = ("emag_export", "engines", "runtime", "cli")
    found = {path.resolve() for folder in folders for path in (ROOT / folder).rglob("*.py")}
    return sorted(path for path in found if not str(path.relative_to(ROOT)).startswith(OWN))


def code_of(path: Path) -> list[str]:
    """Lines of a file without comments and docstrings."""
    text = re.sub(r'"""(?:[^"\\]|\\.|"(?!""))*"""', "", path.read_text("utf-8"))
    return [line.split("  # ")[0] for line in text.splitlines() if not line.strip().startswith("#")]


def test_no_code_outside_a_family_knows_a_model() -> None:
    found = [
        f"{path.relative_to(ROOT)}: {line.strip()}"
        for path in sources()
        for line in code_of(path)
        if MODEL_WORDS.search(line) and "for example" not in line and "families.sd3" not in line
    ]
    # The program's first lines of help name the embedded model.
    assert [line for line in found if "tiny-sd3" not in line] == []
    assert {line.split(":")[0] for line in found} <= {"cli/main.py"}


def test_every_family_is_whole() -> None:
    for name, family in FAMILIES.items():
        assert family.name == name
        for part in ("graph", "prompt", "oracle"):
            assert family.part(part)
        for component in family.components:
            assert component.folder in family.classes
        for model in family.models.values():
            assert model.blocks > max(model.defaults.candidates)
        for configs in family.configs.values():
            assert {"transformer", "scheduler"} <= configs.keys()


def test_a_family_cuts_its_model_into_blocks() -> None:
    blocks = FAMILIES["sd3"].part("graph").blocks(small_model())
    assert isinstance(blocks, Blocks)
    assert blocks.num_blocks == 3


def test_an_unknown_family_is_refused() -> None:
    contract = FAMILIES["sd3"].contract(small_model().config, variant=Variant.EMAG_Q, blocks=(1,))
    other = DenoiserContract(**{**contract.__dict__, "family": "unet"})
    with pytest.raises(ContractError, match="of the family 'unet', this emag-export knows sd3"):
        family_of(other)
    with pytest.raises(ModelError, match=r"somewhere is a PixArtAlphaPipeline; only StableDiffusion3Pip"):
        family_of_pipeline("PixArtAlphaPipeline", "somewhere")


def test_a_bundle_of_version_1_is_read(tiny_bundle: Path, tmp_path: Path) -> None:
    """``bundle-v1.json`` was written by the last version whose contract knew SD3 alone."""
    old = json.loads((ROOT / "tests" / "golden" / "bundle-v1.json").read_text("utf-8"))
    now = Bundle(tiny_bundle)
    copy = tmp_path / "old"
    shutil.copytree(tiny_bundle, copy)
    files = {name: {"bytes": record.bytes, "sha256": record.sha256} for name, record in now.files.items()}
    (copy / MANIFEST).write_text(json.dumps({**old, "files": files}))
    read = Bundle(copy)
    assert read.contract == now.contract
    assert read.geometry == now.geometry
    assert read.defaults == now.defaults
    assert read.options == now.options
    read.check()
    broken = json.loads((copy / MANIFEST).read_text())
    del broken["contract"]["patch_size"]
    (copy / MANIFEST).write_text(json.dumps(broken))
    with pytest.raises(Exception, match=r"'patch_size'.*older version"):
        Bundle(copy)
