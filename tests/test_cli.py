"""The command line as a user meets it, by exit code, output and files."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from emag_export.cli.console import out, status
from emag_export.cli.main import main
from emag_export.cli.options import Blocks
from emag_export.families import KNOWN_MODELS
from emag_export.kinds import Variant
from emag_export.runtime.pictures.metadata import read_picture_record

PROMPT = "a large red circle on a blue background"


@dataclass(frozen=True, kw_only=True)
class Ended:
    """What is left of a command."""

    code: int
    stdout: str
    stderr: str


def run(*arguments: str | Path, width: int = 240) -> Ended:
    """``emag-export`` within this process, by default so wide that no sentence is wrapped."""
    with pytest.MonkeyPatch.context() as patch:
        for console in (out, status):
            patch.setattr(console, "width", width)
        done = CliRunner().invoke(main, [str(argument) for argument in arguments])
    return Ended(code=done.exit_code, stdout=done.stdout, stderr=done.stderr)


def run_alone(*arguments: str | Path) -> Ended:
    """``emag-export`` in a process of its own: starting one takes seconds."""
    command = [sys.executable, "-m", "emag_export.cli.main", *map(str, arguments)]
    environment = {**os.environ, "COLUMNS": "240", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    return Ended(code=done.returncode, stdout=done.stdout, stderr=done.stderr)


def succeeded(*arguments: str | Path, width: int = 240) -> str:
    result = run(*arguments, width=width)
    assert result.code == 0, result.stderr
    assert "Warning" not in result.stderr, "warnings of libraries must not reach the user"
    return result.stdout


def refused(code: int, *arguments: str | Path, run: Callable[..., Ended] = run) -> str:
    """The one error sentence of a run that must fail without a traceback."""
    result = run(*arguments)
    assert result.code == code, result.stdout + result.stderr
    assert "Traceback" not in result.stderr
    return result.stderr


def pixels(path: Path) -> np.ndarray[Any, Any]:
    return np.asarray(Image.open(path)).astype(int)


def test_generate_reproduces_itself_and_batches_change_nothing(tiny_bundle: Path, tmp_path: Path) -> None:
    one, like, folder = tmp_path / "a.png", tmp_path / "b.png", tmp_path / "many"
    succeeded("generate", tiny_bundle, "--prompt", PROMPT, "--guidance", "emag", "--seed", "2", "-o", one)
    record = read_picture_record(one)
    assert (record.request.prompt, record.request.seed, record.variant) == (PROMPT, 2, "emag-q")

    alone = run_alone("generate", tiny_bundle, "--like", one, "-o", like)
    assert (alone.code, "Warning" in alone.stderr) == (0, False), alone.stderr
    assert one.read_bytes() == like.read_bytes(), "same bundle, same machine, same parameters: same file"

    succeeded("generate", tiny_bundle, "--prompt", PROMPT, "--seed", "1", "--images", "3", "-o", folder)
    assert sorted(path.name for path in folder.iterdir()) == [f"000{i}-seed{i + 1}.png" for i in range(3)]
    # In a batch of three, matrix products add in another order: at most one of 255 levels (measured: 0).
    assert np.abs(pixels(folder / "0001-seed2.png") - pixels(one)).max() <= 1


def test_generate_keeps_what_is_there(tiny_bundle: Path, tmp_path: Path) -> None:
    folder = tmp_path / "many"
    arguments = ("generate", tiny_bundle, "--prompt", PROMPT, "--steps", "2", "--images", "2", "-o", folder)
    succeeded(*arguments)
    (folder / "0001-seed1.png").unlink()
    kept = (folder / "0000-seed0.png").stat().st_mtime_ns
    assert "0000-seed0.png (already there)" in succeeded(*arguments)
    assert (folder / "0000-seed0.png").stat().st_mtime_ns == kept
    assert (folder / "0001-seed1.png").exists()

    message = refused(2, *arguments, "--guidance-scale", "2")
    assert "exists and was made otherwise; choose another name, or add --overwrite" in message
    (folder / "notes.txt").write_text("mine")
    assert "is not empty (notes.txt)" in refused(2, *arguments)
    succeeded(*arguments, "--overwrite", "--guidance-scale", "2")
    assert (folder / "notes.txt").read_text() == "mine"


def test_paths_stand_on_one_line_however_narrow_it_is(tiny_bundle: Path, tmp_path: Path) -> None:
    """A path that is broken cannot be copied, nor read by a script that looks at lines."""
    path, table = tmp_path / "a picture.png", tmp_path / "prompts.csv"
    table.write_text(f"prompt\n{PROMPT}\n", "utf-8")
    drawn = ("generate", tiny_bundle, "--prompt", PROMPT, "--steps", "1", "-o", path)
    assert succeeded(*drawn, width=20).splitlines() == [str(path)]
    assert succeeded(*drawn, width=20).splitlines() == [f"{path} (already there)"]
    many = ("batch", tiny_bundle, "--prompts", table, "--steps", "1", "-o", tmp_path / "b")
    index = tmp_path / "b" / "index.jsonl"
    words = (*many, "--images-per-call", "1")
    assert succeeded(*words, width=20).splitlines() == [f"1 drawn, 0 already there: {index}"]


def test_every_guidance_draws_a_red_circle_on_blue(tiny_bundle: Path, tmp_path: Path) -> None:
    """The middle is red and a corner is blue, whichever guidance drew it."""
    for name in ("cfg", "emag", "emag-only", "emag+apg", "emag+cads", "apg", "cads"):
        path = tmp_path / f"{name}.png"
        succeeded("generate", tiny_bundle, "--prompt", PROMPT, "--guidance", name, "--seed", "1", "-o", path)
        picture = pixels(path)
        red, _, blue = picture[28:36, 28:36].mean(axis=(0, 1))
        assert red > blue + 80, name
        red, _, blue = picture[:4, :4].mean(axis=(0, 1))
        assert blue > red + 80, name


def test_torch_backend_draws_the_same(tiny_bundle: Path, tmp_path: Path) -> None:
    for backend in ("onnxruntime", "torch"):
        succeeded(
            "generate",
            tiny_bundle,
            "--prompt",
            PROMPT,
            "--backend",
            backend,
            "-o",
            tmp_path / f"{backend}.png",
        )
    difference = np.abs(pixels(tmp_path / "onnxruntime.png") - pixels(tmp_path / "torch.png"))
    assert difference.max() <= 1, "latents differ by 1e-5 (measured), a rounding boundary of 8 bits at most"


def test_sizes_other_than_the_training_size(tiny_bundle: Path, tmp_path: Path) -> None:
    path = tmp_path / "wide.png"
    succeeded(
        "generate",
        tiny_bundle,
        "--prompt",
        PROMPT,
        "--height",
        "40",
        "--width",
        "88",
        "--steps",
        "3",
        "-o",
        path,
    )
    assert pixels(path).shape == (40, 88, 3)


def test_long_prompt_warns_with_the_cut_text(tiny_bundle: Path, tmp_path: Path) -> None:
    result = run(
        "generate",
        tiny_bundle,
        "--prompt",
        "red " * 20 + "triangle",
        "--steps",
        "1",
        "-o",
        tmp_path / "a.png",
    )
    assert result.code == 0
    assert "the prompt is too long: CLIP did not see “red red triangle”" in result.stderr


def test_compare_agrees_in_every_step(tiny_bundle: Path, tmp_path: Path) -> None:
    data = json.loads(succeeded("compare", tiny_bundle, "--json", "--report", tmp_path / "r"))
    assert data["passed"] is True
    assert len(data["steps"]) == 28
    for step in data["steps"]:
        for name in ("uncond", "cond", "perturbed"):
            if name in step["errors"]:
                assert step["errors"][name]["max_abs"] <= 1e-4
        for choice in step["choices"]:
            assert choice["engine"] == choice["reference"]
    assert "data:image/png" in (tmp_path / "r" / "report.html").read_text()


def test_compare_fails_when_the_model_is_another_one(tiny_bundle: Path, small_pipeline: Path) -> None:
    assert "its files differ" in refused(3, "compare", tiny_bundle, "--source", small_pipeline)


def test_plan_prints_the_formula(tiny_bundle: Path) -> None:
    """28 steps, 18 of them perturbed: 2 rows x 10 blocks x 28 + 18 x (10 - 3), over 560."""
    data = json.loads(succeeded("plan", tiny_bundle, "--steps", "28", "--json"))
    assert data["row_blocks"] == {"planned": 686, "cfg": 560, "own": 560, "two_pass": 1120}
    assert data["relative_to_cfg"] == pytest.approx(1.225)
    assert "1.225 × CFG" in succeeded("plan", tiny_bundle, "--steps", "28")


def test_inspect_shows_and_checks(tiny_bundle: Path, tmp_path: Path) -> None:
    assert "every SHA-256 matches" in succeeded("inspect", tiny_bundle)
    shown = json.loads(succeeded("inspect", tiny_bundle, "--json"))
    assert shown["intact"] is True
    sizes = [(row["images"], row["height"], row["width"]) for row in shown["memory"]["sizes"]]
    assert sizes == [(1, 64, 64), (4, 64, 64), (1, 32, 32), (4, 32, 32)]
    assert "Memory of the denoiser" in succeeded("inspect", tiny_bundle)
    copy = shutil.copytree(tiny_bundle, tmp_path / "copy")
    data = copy / "transformer" / "model.onnx.data"
    data.write_bytes(data.read_bytes()[:-1] + b"\0\0")
    assert "truncated or was replaced" in refused(4, "inspect", copy)
    assert "truncated" in refused(4, "generate", copy, "--prompt", PROMPT, "-o", tmp_path / "a.png")
    assert not (tmp_path / "a.png").exists()


def test_models_and_doctor() -> None:
    assert json.loads(succeeded("models", "--json"))["sd3"]["source"].startswith("stabilityai/")
    shown = succeeded("models", width=60)
    for model in KNOWN_MODELS.values():
        assert model.source in shown or model.source.startswith("package:"), (
            "an id that is cut cannot be copied"
        )
    assert "can run: onnxruntime on the CPU" in succeeded("doctor")
    assert json.loads(succeeded("doctor", "--json"))["runs"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", ""], "the --prompt is empty"),
        ([], "there is nothing to draw"),
        (["--prompt", "x", "--steps", "0"], "0 denoising steps"),
        (["--prompt", "x", "--guidance-scale", "nan"], "--guidance-scale is nan; give a finite number"),
        (["--prompt", "x", "--emag-scale", "inf"], "--emag-scale is inf"),
        (["--prompt", "x", "--height", "60"], "--height 60 is no multiple of 8; take 56 or 64"),
        (["--prompt", "x", "--width", "0"], "--width 0 is no multiple of 8"),
        (["--prompt", "x", "--width", "4096"], "positional embedding covers: 192"),
        (["--prompt", "x", "--seed", "-1"], "seed is -1"),
        (
            ["--prompt", "x", "--emag-blocks", "9"],
            "block 9 is no candidate, which are 3, 4, 5",
        ),
        (["--prompt", "x", "--emag-blocks", "six"], "names no blocks; write 6-8"),
        (["--prompt", "x", "--emag-beta", "2"], "--emag-beta is 2.0; it must lie between"),
        (["--prompt", "x", "--variant", "emag"], "holds the variant emag-q, emag was asked for"),
        (["--prompt", "x", "--guidance", "magic"], "is not one of"),
        (["--prompt", "x", "--images", "2"], "do not fit into"),
        (
            ["--prompt", "x", "--weight-budget", "64"],
            "--weight-budget is for tensorrt and tensorrt-rtx; onnxruntime takes none",
        ),
        (["--like", "missing.png"], "cannot be read as a picture"),
    ],
)
def test_bad_input_is_one_sentence_and_writes_nothing(
    tiny_bundle: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    assert message in refused(2, "generate", tiny_bundle, *arguments, "-o", tmp_path / "a.png")
    assert list(tmp_path.iterdir()) == []


def test_empty_and_unreadable_prompt_files(tiny_bundle: Path, tmp_path: Path) -> None:
    empty, binary = tmp_path / "empty.txt", tmp_path / "binary.txt"
    empty.write_text(" \n\n")
    binary.write_bytes(b"\xff\xfe\x00")
    target = tmp_path / "a.png"
    assert "holds no prompt" in refused(2, "generate", tiny_bundle, "--prompt-file", empty, "-o", target)
    assert "UTF-8" in refused(2, "generate", tiny_bundle, "--prompt-file", binary, "-o", target)


def test_like_needs_a_picture_of_ours(tiny_bundle: Path, tmp_path: Path) -> None:
    foreign = tmp_path / "foreign.png"
    Image.new("RGB", (4, 4)).save(foreign)
    message = refused(2, "generate", tiny_bundle, "--like", foreign, "-o", tmp_path / "a.png")
    assert "holds no emag-export parameters" in message


def test_like_refuses_a_bundle_of_another_variant(
    tiny_bundle: Path, small_bundle: Path, tmp_path: Path
) -> None:
    path = tmp_path / "a.png"
    succeeded("generate", small_bundle, "--prompt", PROMPT, "--steps", "1", "-o", path)
    assert read_picture_record(path).variant == Variant.EMAG
    message = refused(2, "generate", tiny_bundle, "--like", path, "-o", tmp_path / "b.png")
    assert "--variant emag " in message


def test_build_refusals_by_exit_code(tmp_path: Path, tiny_bundle: Path) -> None:
    bundle = tmp_path / "b"
    assert "no known name" in refused(3, "build", "--model", "nonsense", "-o", bundle)
    unreachable = refused(3, "build", "--model", "sd3", "-o", bundle, run=run_alone)
    assert "hub cannot be reached" in unreachable
    assert "blocks 0 to 9" in refused(
        2, "build", "--model", "tiny-sd3", "--emag-candidates", "8-12", "-o", bundle
    )
    assert "is not a bundle" in refused(4, "generate", bundle, "--prompt", PROMPT, "-o", tmp_path / "a.png")
    assert list(tmp_path.iterdir()) == []


def test_place_that_cannot_hold_files_is_no_traceback(tiny_bundle: Path) -> None:
    """Nobody, root included, can make files in /proc."""
    refused(1, "generate", tiny_bundle, "--prompt", PROMPT, "--steps", "1", "-o", "/proc/emag/a.png")
    refused(2, "build", "--model", "tiny-sd3", "-o", "/proc/emag/bundle")


@pytest.mark.slow
def test_interrupted_build_leaves_nothing_at_the_target(tmp_path: Path) -> None:
    """A real SIGINT while the transformer is traced: exit 130, one sentence, nothing left at the target."""
    command = [sys.executable, "-m", "emag_export.cli.main", "build", "--model", "tiny-sd3", "-o", "b"]
    # A shell's background job ignores SIGINT, and so would what it starts.
    heeded = partial(signal.signal, signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True, preexec_fn=heeded)
    assert process.stderr is not None
    while "transformer: trace" not in process.stderr.readline():
        assert process.poll() is None, "the build ended before it was interrupted"
    process.send_signal(signal.SIGINT)
    _, message = process.communicate(timeout=120)
    assert process.returncode == 130, message
    assert "interrupted; the same command continues" in message
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    ("text", "blocks"), [("6-8", (6, 7, 8)), ("6,7,8", (6, 7, 8)), ("3,5-6", (3, 5, 6)), ("2", (2,))]
)
def test_blocks_are_read_as_written(text: str, blocks: tuple[int, ...]) -> None:
    assert Blocks().convert(text, None, None) == blocks
