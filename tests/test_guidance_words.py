"""What is added to a rule of guidance, as options, keywords, columns, fields of a request, and in a PNG."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image
from pydantic import ValidationError

from emag_export.bundle import Bundle
from emag_export.cli.main import main
from emag_export.errors import InputError
from emag_export.kinds import Variant
from emag_export.records import dump_record, read_record
from emag_export.runtime.guidance.rules import Guidance
from emag_export.runtime.keywords import SamplingKeywords, amended
from emag_export.runtime.pictures.metadata import PictureRecord, read_picture_record
from emag_export.runtime.request import GenerationRequest
from emag_export.serve.batch.table import read_table
from emag_export.serve.errors import OF_GUIDANCE, api_error
from emag_export.serve.models import ServedModel
from emag_export.serve.schemas import EmagOptions, GenerationBody
from emag_export.serve.settings import ServerSettings
from emag_export.serve.translate import requests_of

WORDS: SamplingKeywords = {
    "guidance_interval": (0.25, 0.75),
    "cfg_rescale": 0.7,
    "cfg_zero_star": True,
    "cfg_zero_init": 2,
    "tcfg": True,
    "guided_channels": 3,
}
GUIDANCE = Guidance(
    interval=(0.25, 0.75), rescale=0.7, zero_star=True, zero_init=2, tangential=True, guided_channels=3
)
REQUEST = GenerationRequest(prompt="x", height=64, width=64)
OPTIONS = (
    *(
        "--guidance-interval",
        "0.25",
        "0.75",
        "--cfg-rescale",
        "0.7",
        "--cfg-zero-star",
        "--cfg-zero-init",
        "2",
    ),
    *("--tcfg", "--guided-channels", "3"),
)


def run(*words: object) -> Any:
    return CliRunner().invoke(main, [str(word) for word in words])


def test_keywords_become_guidance_and_can_be_taken_back() -> None:
    request = amended(REQUEST, WORDS)
    assert request.guidance == GUIDANCE
    back: SamplingKeywords = {"guidance_interval": (0.0, 1.0), "cfg_rescale": 0.0, "guided_channels": 16}
    again = amended(request, {**back, "cfg_zero_star": False, "cfg_zero_init": 1, "tcfg": False})
    assert again.guidance == Guidance(guided_channels=16)


def test_a_record_without_modifiers_is_read_as_plain_guidance() -> None:
    """Of PNGs that were written before there were any."""
    record = PictureRecord(
        request=REQUEST, model="m", variant=Variant.EMAG_Q, fingerprint="f", precision="float32", engine="e"
    )
    data = json.loads(dump_record(record))
    guidance = data["request"]["guidance"]
    for name in ("interval", "rescale", "zero_star", "zero_init", "tangential", "guided_channels"):
        del guidance[name]
    assert read_record(PictureRecord, json.dumps(data), name="it", remedy="-") == record
    modified = replace(record, request=amended(REQUEST, WORDS))
    assert read_record(PictureRecord, dump_record(modified), name="it", remedy="-") == modified


def write(path: Path, text: str) -> Path:
    path.write_text(text, "utf-8")
    return path


def test_columns_of_a_table_are_keywords(tmp_path: Path) -> None:
    lines = write(tmp_path / "t.jsonl", json.dumps({"prompt": "x", **WORDS}))
    cells = write(
        tmp_path / "t.csv",
        f"prompt,{','.join(WORDS)}\nx,0.25 0.75,0.7,true,2,True,3\n",
    )
    for table in (lines, cells):
        (row,) = read_table(table)
        assert amended(REQUEST, row.keywords).guidance == GUIDANCE  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("guidance_interval", value) for value in ("0 1", [0.1], [0, 1, 2], [0, True], 0.5)],
        *[("cfg_zero_star", value) for value in (1, "true")],
        *[("tcfg", 0), ("cfg_rescale", True), ("cfg_zero_init", 1.5), ("guided_channels", "3")],
    ],
)
def test_columns_of_the_wrong_kind_are_named(name: str, value: Any, tmp_path: Path) -> None:
    table = write(tmp_path / "t.jsonl", json.dumps({"prompt": "x", name: value}))
    with pytest.raises(InputError, match=f"row 0: `{name}` is .*of the wrong kind"):
        list(read_table(table))


def test_cells_that_are_no_switch_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="row 0: `tcfg` is 'yes'; write true or false"):
        list(read_table(write(tmp_path / "t.csv", "prompt,tcfg\nx,yes\n")))


@pytest.fixture
def served(tiny_bundle: Path) -> Callable[..., GenerationRequest]:
    """What a server that holds the bundle, and is not started, makes of the options of a request."""
    model = object.__new__(ServedModel)
    room = {
        "options": SimpleNamespace(queue_images=8),
        "sizing": SimpleNamespace(room=SimpleNamespace(live=4)),
    }
    object.__setattr__(model, "batched", SimpleNamespace(bundle=Bundle(tiny_bundle), **room))

    def request_of(**options: Any) -> GenerationRequest:
        body = GenerationBody(prompt="x", seed=0, emag=EmagOptions(**options))
        (request,) = requests_of(body, model, ServerSettings())
        return request

    return request_of


def test_fields_of_a_request_are_keywords(served: Callable[..., GenerationRequest]) -> None:
    found = served(**{**WORDS, "guidance_interval": [0.25, 0.75]}).guidance
    plain = served().guidance
    assert found == replace(GUIDANCE, scale=plain.scale, emag_scale=plain.emag_scale, apg=plain.apg)
    assert plain.modifiers == ()
    assert set(OF_GUIDANCE) == {*WORDS, "embedded_guidance", "random_blocks", "blur_sigma"}
    wrong: list[dict[str, Any]] = [
        {"guidance_interval": [0.1]},
        {"tcfg": 1},
        {"guided_channels": 1.5},
        {"cfg_rescale": "1"},
    ]
    for options in wrong:
        with pytest.raises(ValidationError):
            EmagOptions(**options)


@pytest.mark.parametrize(
    ("name", "value"),
    [("guidance_interval", [0.9, 0.1]), ("cfg_rescale", 2.0), ("cfg_zero_init", -1), ("guided_channels", 0)],
)
def test_a_bad_field_is_named(name: str, value: Any, served: Callable[..., GenerationRequest]) -> None:
    with pytest.raises(InputError) as caught:
        served(**{name: value})
    answer = api_error(caught.value, model="m", path="/p")
    assert (answer.status, answer.param) == (400, f"emag.{name}")
    assert answer.message.startswith(f"'emag.{name}' is ")


def test_the_plan_says_what_an_interval_saves(tiny_bundle: Path) -> None:
    """Ten blocks, candidates from the third: c in 28 steps, u in 14, and 18 rows through seven blocks."""
    words = "plan", tiny_bundle, "--steps", "28", "--guidance-interval", "0", "0.5"
    data = json.loads(run(*words, "--json").stdout)
    assert data["row_blocks"] == {"planned": 280 + 140 + 126, "cfg": 560, "own": 560, "two_pass": 840}
    assert data["modifiers"] == ["interval 0 to 0.5"]
    assert [step["trunk_rows"] for step in data["steps"]] == [2] * 14 + [1] * 14
    shown = run(*words).stdout
    assert "0.975 × CFG" in shown
    assert "interval 0 to 0.5: an unconditional row in 14 of 28 steps" in shown


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--guidance-interval", "0.8", "0.2"), "--guidance-interval is 0.8 to 0.2; give two fractions"),
        (("--guidance-interval", "nan", "1"), "--guidance-interval is nan to 1.0"),
        (("--cfg-rescale", "1.5"), "--cfg-rescale is 1.5; it must lie between 0.0 and 1.0"),
        (("--guided-channels", "99"), "--guided-channels is 99; the model has"),
        (("--cfg-zero-star", "--cfg-zero-init", "4"), "--cfg-zero-init is 4 of 4 steps"),
    ],
)
def test_bad_options_are_one_sentence(options: tuple[str, ...], message: str, tiny_bundle: Path) -> None:
    refused = run("plan", tiny_bundle, "--steps", "4", *options)
    assert refused.exit_code == 2
    assert message in refused.stderr
    assert "`" not in refused.stderr and "Traceback" not in refused.stderr


def test_a_picture_remembers_its_modifiers(tiny_bundle: Path, tmp_path: Path) -> None:
    """Drawn by options, drawn again from the PNG, and without them again."""
    first, again, plain, default = (
        tmp_path / f"{name}.png" for name in ("first", "again", "plain", "default")
    )
    picture = "--prompt", "a large red circle on a blue background", "--seed", "1", "--steps", "6"
    made = run("generate", tiny_bundle, *picture, *OPTIONS, "-o", first, "--threads", "1")
    assert made.exit_code == 0, made.output
    guidance = read_picture_record(first).request.guidance
    assert guidance.modifiers == GUIDANCE.modifiers
    assert run("generate", tiny_bundle, "--like", first, "-o", again, "--threads", "1").exit_code == 0
    assert again.read_bytes() == first.read_bytes()
    off = ["--guidance-interval", "0", "1", "--cfg-rescale", "0", "--no-cfg-zero-star", "--no-tcfg"]
    off += ["--guided-channels", str(Bundle(tiny_bundle).contract.channels)]
    assert run("generate", tiny_bundle, "--like", first, *off, "-o", plain, "--threads", "1").exit_code == 0
    assert run("generate", tiny_bundle, *picture, "-o", default, "--threads", "1").exit_code == 0
    assert np.array_equal(np.asarray(Image.open(plain)), np.asarray(Image.open(default)))
    assert not np.array_equal(np.asarray(Image.open(first)), np.asarray(Image.open(default)))


def test_compare_takes_them(tiny_bundle: Path) -> None:
    """Engine and reference leave the same rows out, and agree in every step."""
    done = run("compare", tiny_bundle, "--steps", "4", *OPTIONS, "--threads", "1", "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["settings"]["modifiers"].startswith("interval 0.25 to 0.75; TCFG; CFG-Zero*, 2 zero steps")
    assert ["uncond" in step["errors"] for step in found["steps"]] == [False, False, True, False]
