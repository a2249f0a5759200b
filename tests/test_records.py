"""Every file of ours that is read back: each of its fields is checked, and named when it is wrong."""

import copy
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from emag_export.bundle import MANIFEST, Bundle
from emag_export.engines.tensorrt.builder import BuiltPlan
from emag_export.engines.tensorrt.options import EngineOptions, SizeRange
from emag_export.engines.tensorrt.store import EngineFolder, EngineHeader, EngineRecord
from emag_export.errors import BundleError, Call, EmagError, InputError
from emag_export.exporter.staging import BuildMarker, Staging
from emag_export.manifest import Manifest
from emag_export.records import dump_record, read_record
from emag_export.runtime.pictures.metadata import (
    PictureRecord,
    make_picture,
    read_picture_record,
    save_picture,
)
from emag_export.runtime.request import default_request

FREE_KEYS = ("files", "graphs", "versions", "plans", "precision_notes", "memory", "profiles.0", "limits")
"""Where names are data, not fields."""

Steps = tuple[str | int, ...]


@dataclass(frozen=True, kw_only=True)
class Stored:
    """One kind of record, with something in every field."""

    kind: type[Any]
    text: str

    @property
    def version(self) -> int:
        """That is written today."""
        found: int = self.kind.__dataclass_fields__["format_version"].default
        return found

    def read(self, data: Any) -> Any:
        return read_record(self.kind, json.dumps(data), name="the file", remedy="do something")


@pytest.fixture(params=["manifest", "engine", "picture", "marker"])
def stored(request: pytest.FixtureRequest, small_bundle: Path, tmp_path: Path) -> Stored:
    return {"manifest": _manifest, "engine": _engine, "picture": _picture, "marker": _marker}[request.param](
        small_bundle, tmp_path
    )


def _manifest(bundle: Path, tmp_path: Path) -> Stored:
    data = json.loads((bundle / MANIFEST).read_text())
    data["source"]["loras"] = [{"name": "a", "sha256": "b", "scale": 1.0}]
    data["encoders"] = {"path": "../b", "components": ["vae_decoder"], "files": {"a": "b"}}
    for name in ("files", "graphs"):  # one of many is enough
        data[name] = dict(list(data[name].items())[:1])
    return Stored(kind=Manifest, text=json.dumps(data))


def _engine(bundle: Path, tmp_path: Path) -> Stored:
    folder = EngineFolder(tmp_path / "engines", Call(verb="compile"))
    size = SizeRange.parse("64")
    folder.save(
        "transformer",
        BuiltPlan(data=b"plan", memory={"weights": 1}, warnings=("w",), seconds=0.5),
        key="key",
        header=EngineHeader(backend="tensorrt-rtx", version="1", targets=("sm89",), device="a GPU"),
        precision="float32",
        profiles=({"h": size},),
        options=EngineOptions(height_range=size, width_range=size, workspace=1, optimization_level=1),
    )
    return Stored(kind=EngineRecord, text=(folder.path / "engine.json").read_text())


def _picture(bundle: Path, tmp_path: Path) -> Stored:
    opened, path = Bundle(bundle), tmp_path / "a.png"
    pixels = np.zeros((8, 8, 3), np.uint8)
    save_picture(make_picture(pixels, opened, default_request(opened, "x"), "none"), path)
    record = read_picture_record(path)
    assert record.request == default_request(opened, "x")
    return Stored(kind=PictureRecord, text=dump_record(record))


def _marker(bundle: Path, tmp_path: Path) -> Stored:
    return Stored(kind=BuildMarker, text=(Staging(tmp_path / "b", "key").path / "build.json").read_text())


def places(data: Any, steps: Steps = ()) -> Iterator[Steps]:
    """Every field and every item, however deep."""
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for name, value in items:
        yield (*steps, name)
        yield from places(value, (*steps, name))


def changed(data: Any, steps: Steps, change: Callable[[Any, str | int], None]) -> Any:
    whole = copy.deepcopy(data)
    inner = whole
    for step in steps[:-1]:
        inner = inner[step]
    change(inner, steps[-1])
    return whole


def put(value: Any) -> Callable[[Any, str | int], None]:
    def change(inner: Any, name: str | int) -> None:
        inner[name] = value

    return change


def fields_of(data: Any) -> Iterator[Steps]:
    """Places that are fields of a dataclass, not keys or items that are data."""
    for steps in places(data):
        parent = ".".join(map(str, steps[:-1]))
        if isinstance(steps[-1], str) and not parent.endswith(FREE_KEYS):
            yield steps


def test_what_was_written_is_read_again(stored: Stored) -> None:
    record = stored.read(json.loads(stored.text))
    assert json.loads(dump_record(record)) == json.loads(stored.text) | {"format_version": stored.version}


def test_a_value_of_another_kind_is_named_in_every_place(stored: Stored) -> None:
    data = json.loads(stored.text)
    seen = 0
    for steps in places(data):
        with pytest.raises(BundleError, match=r"^the file .*; do something$") as caught:
            stored.read(changed(data, steps, put({"foreign": {"kind": 1}})))
        assert str(steps[0]) in str(caught.value), steps
        named = ".".join(map(str, steps))
        assert named in str(caught.value) or steps == ("format_version",), steps
        seen += 1
    assert seen >= len(data)


def test_an_unknown_field_is_named_in_every_record(stored: Stored) -> None:
    data = json.loads(stored.text)
    for parent in {steps[:-1] for steps in fields_of(data)}:
        steps = (*parent, "unheard_of")
        with pytest.raises(BundleError, match=re.escape(".".join(map(str, steps)) + " is no field")):
            stored.read(changed(data, steps, put(1)))


def test_a_missing_field_is_named_or_has_a_default(stored: Stored) -> None:
    data = json.loads(stored.text)

    def drop(inner: Any, name: str | int) -> None:
        del inner[name]

    named = 0
    for steps in fields_of(data):
        try:
            stored.read(changed(data, steps, drop))
        except BundleError as error:
            assert ".".join(map(str, steps)) in str(error)
            named += 1
    assert named >= len(data) - 3


@pytest.mark.parametrize("version", [None, 0, -1, "1", True, 1.5])
def test_an_older_or_odd_version_is_refused(stored: Stored, version: Any) -> None:
    with pytest.raises(BundleError, match=r"the file has (no )?format_version.*older.*; do something"):
        stored.read({**json.loads(stored.text), "format_version": version})


def test_a_newer_version_is_refused(stored: Stored) -> None:
    newer, said = stored.version + 1, f"reads {stored.version}: upgrade emag-export, or do"
    with pytest.raises(BundleError, match=rf"format_version {newer}, .* {said}"):
        stored.read({**json.loads(stored.text), "format_version": newer})


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "null", "\x00"])
def test_what_is_no_record_at_all_is_refused(stored: Stored, text: str) -> None:
    with pytest.raises(BundleError, match=r"the file is damaged: .*; do something"):
        read_record(stored.kind, text, name="the file", remedy="do something")


def test_a_damaged_marker_of_an_unfinished_build_is_named(tmp_path: Path) -> None:
    """It is not thrown away silently: the folder may hold hours of somebody's work."""
    marker = Staging(tmp_path / "b", "key").path / "build.json"
    marker.write_text("{")
    with pytest.raises(BundleError, match=r"build\.json is damaged.*delete the unfinished folder"):
        Staging(tmp_path / "b", "key")
    assert marker.exists()


def test_a_damaged_picture_record_is_named(small_bundle: Path, tmp_path: Path) -> None:
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    data = json.loads(_picture(small_bundle, tmp_path).text)
    data["request"]["guidance"]["scale"] = "high"
    info = PngInfo()
    info.add_itxt("emag-export", json.dumps(data))
    Image.new("RGB", (4, 4)).save(tmp_path / "b.png", pnginfo=info)
    with pytest.raises(BundleError, match=r'b\.png cannot be read: request\.guidance\.scale: .*got "high"'):
        read_picture_record(tmp_path / "b.png")
    Image.new("RGB", (4, 4)).save(tmp_path / "c.png")
    with pytest.raises(InputError, match="holds no emag-export parameters"):
        read_picture_record(tmp_path / "c.png")


def test_impossible_values_are_bundle_errors_too(stored: Stored) -> None:
    """What a dataclass itself refuses as bad input of a user is damage where it was read."""
    data = json.loads(stored.text)
    impossible = {
        Manifest: (("contract", "blocks"), [99]),
        EngineRecord: (("plans", "transformer", "options", "max_images"), 0),
        PictureRecord: (("request", "steps"), 0),
    }
    if stored.kind not in impossible:
        return
    steps, value = impossible[stored.kind]
    with pytest.raises(EmagError) as caught:
        stored.read(changed(data, steps, put(value)))
    assert type(caught.value) is BundleError
