"""A whole evaluation: refused, drawn, interrupted and resumed, tuned, probed; from Python and the command."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result

from emag_export.bundle import Bundle
from emag_export.cli.main import main
from emag_export.errors import InputError
from emag_export.evaluation.asked import Evaluation, check_evaluation
from emag_export.evaluation.metrics.names import MetricModels
from emag_export.evaluation.probe import fineness
from emag_export.exporter.build import build
from emag_export.kinds import Variant
from emag_export.options import BuildOptions
from emag_export.runtime.keywords import amended
from emag_export.runtime.pipeline import Pipeline
from emag_export.runtime.request import default_request

ROOT = Path(__file__).parent.parent
PROMPTS = ("a large red circle on a blue background", "a small green square on a red background")


def asked(bundle: Path, **changed: Any) -> Evaluation:
    fields = {"methods": ("cfg", "emag"), "prompts": PROMPTS, "models": MetricModels(), "keywords": {}}
    return Evaluation(bundles=(Bundle(bundle),), **{**fields, **changed})


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"baseline": "apg"}, "`baseline` apg is not among `methods`"),
        ({"sweep": ("a large red ring on a blue background",), "scales": (2.0,)}, "leave out `scales`"),
        ({"sweep": (PROMPTS[0].upper(),)}, "1 prompts are in `sweep` and in `prompts`"),
        ({"seeds": 1001}, "`seeds` is 1001; give 1 to 1000"),
        ({"quality": "beauty"}, "`quality` is beauty, which these `metrics` do not give"),
        ({"metrics": ("drawn",), "prompts": ("a dog",)}, "'a dog' describes no scene"),
        ({"reference": Path("photos")}, "the metric distribution and `reference`"),
        ({"metrics": ("drawn", "distribution")}, "need each other; give both"),
        ({"keywords": {"steps": 0}}, "cfg, w 4: 0 denoising steps"),
        ({"keywords": {"height": 63}}, "`height` 63"),
    ],
)
def test_what_could_not_be_finished_is_not_begun(
    tiny_bundle: Path, changed: dict[str, Any], said: str
) -> None:
    with pytest.raises(InputError, match=said):
        check_evaluation(asked(tiny_bundle, **changed))


def test_two_bundles_of_one_variant_are_refused(tiny_bundle: Path) -> None:
    bundle = Bundle(tiny_bundle)
    with pytest.raises(InputError, match="two bundles are of the same variant"):
        check_evaluation(replace(asked(tiny_bundle), bundles=(bundle, bundle)))


def words(bundle: Path, output: Path) -> list[str]:
    return ["eval", str(bundle), "--steps", "3", "--threads", "1", "--seeds", "2", "-o", str(output)]


def run(bundle: Path, output: Path, *options: str) -> Result:
    return CliRunner().invoke(main, [*words(bundle, output), *options])


def files(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_interrupted_and_resumed_it_reports_the_same(tiny_bundle: Path, tmp_path: Path) -> None:
    """As after a kill: pictures missing, one half written, scores torn, no report."""
    prompts = tmp_path / "p.txt"
    prompts.write_text("\n".join(PROMPTS))
    output, options = tmp_path / "out", ("--prompts", str(prompts), "--methods", "cfg,emag")
    done = run(tiny_bundle, output, *options, "--json")
    assert done.exit_code == 0, done.output
    results = json.loads(done.stdout)
    assert results == json.loads((output / "results.json").read_text("utf-8"))
    assert [row["label"] for row in results["settings"]] == ["cfg, w 4", "emag (emag-q), w 4, s 1.5"]
    assert len(results["tests"]) == 8 and results["contrast"] == {} and results["facts"]["steps"] == 3
    index = [json.loads(line) for line in (output / "emag-q" / "index.jsonl").read_text("utf-8").splitlines()]
    assert [row["method"] for row in index] == ["cfg", "cfg", "emag", "emag"] * 2
    whole = files(output)

    drawn = sorted(output.rglob("pictures/**/*.png"))
    assert len(drawn) == 8
    for path in drawn[::3]:
        path.unlink()
    drawn[0].with_name(f".{drawn[0].name}.partial").write_bytes(b"half")
    scores = output / "scores" / "drawn-1.jsonl"
    scores.write_bytes(scores.read_bytes()[:300])
    for name in ("results.json", "report.html", "emag-q/index.jsonl"):
        (output / name).unlink()
    kept = {path: path.stat().st_mtime_ns for path in output.rglob("pictures/**/*.png")}
    assert run(tiny_bundle, output, *options).exit_code == 0
    assert all(path.stat().st_mtime_ns == when for path, when in kept.items()), "none is drawn twice"
    again = files(output)
    assert again.keys() == whole.keys()
    assert {name for name in whole if whole[name] != again[name]} == set()

    refused = run(tiny_bundle, output, *options, "--height", "128")
    assert refused.exit_code == 2 and "was made otherwise" in " ".join(refused.stderr.split())


def test_scales_are_tuned_on_other_prompts_from_other_noise(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("emag_export.evaluation.sweep._SINGLE", (0.5, 1.0))
    reported, tuned = tmp_path / "p.txt", tmp_path / "t.txt"
    reported.write_text(PROMPTS[0])
    tuned.write_text(PROMPTS[1])
    options = ("--prompts", str(reported), "--sweep", str(tuned), "--methods", "none,cfg", "--seeds", "1")
    done = run(tiny_bundle, tmp_path / "out", *options, "--steps", "2", "--json", "--quality", "residual")
    assert done.exit_code == 0, done.output
    results = json.loads(done.stdout)
    sweep = results["sweep"]
    assert (sweep["column"], sweep["prompts"], results["prompts"]) == ("residual", [PROMPTS[1]], [PROMPTS[0]])
    none, cfg = sweep["methods"]
    assert list(none["tried"]) == ["none"] and list(cfg["tried"]) == ["cfg, w 2.5", "cfg, w 4"]
    assert cfg["chosen"] == min(cfg["tried"], key=cfg["tried"].get)
    assert [row["label"] for row in results["settings"]] == ["none", cfg["chosen"]]
    index = (tmp_path / "out" / "sweep" / "emag-q" / "index.jsonl").read_text("utf-8").splitlines()
    assert {json.loads(line)["seed"] for line in index} == {10**9}
    measured = [path.name for path in (tmp_path / "out" / "sweep" / "scores").iterdir()]
    assert measured == ["drawn-1.jsonl"], "the column that is tuned by, and no other"


@pytest.mark.parametrize(("turns", "along", "wanted"), [(0, 1, 0.0), (4, 1, 0.25), (4, 0, 0.25), (8, 1, 0.5)])
def test_a_stripe_is_as_fine_as_its_frequency(turns: int, along: int, wanted: float) -> None:
    place = torch.arange(16, dtype=torch.float32)
    wave = torch.cos(2 * torch.pi * turns * place / 16)
    change = (wave[None, :] if along else wave[:, None]).expand(16, 16)
    assert fineness(change.expand(1, 3, 16, 16)) == pytest.approx(wanted, abs=1e-6)
    noise = torch.randn(8, 4, 64, 64, generator=torch.Generator().manual_seed(0))
    assert fineness(noise) == pytest.approx(0.38, abs=0.01), "of white noise, the mean over the square"


def test_probes_say_how_far_the_negative_lies(tiny_bundle: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "p.txt"
    prompts.write_text("\n".join(PROMPTS))
    options: tuple[str, ...] = ("--prompts", str(prompts), "--methods", "none,cfg,emag,emag-only")
    options += ("--seeds", "1", "--steps", "6", "--probes", "2")
    done = run(tiny_bundle, tmp_path / "out", *options, "--json")
    assert done.exit_code == 0, done.output
    ((label, row),) = json.loads(done.stdout)["contrast"].items()
    assert label == "emag (emag-q), w 4, s 1.5", "no other has all three predictions"
    with Pipeline.open(tiny_bundle, threads=1) as pipeline:
        ratios = []
        for number, prompt in enumerate(PROMPTS):
            request = amended(default_request(pipeline.bundle, prompt), {"steps": 6, "seed": 1000 * number})
            run_ = [step.predictions for step in pipeline.denoise(pipeline.prepare([request]))]
            ratios.append(
                [
                    float((p.cond - p.perturbed).norm() / (p.cond - p.uncond).norm())
                    for p in run_
                    if p.uncond is not None and p.perturbed is not p.cond
                ]
            )
    assert all(len(one["blocks"]) == 2 and set(one["blocks"]) <= {3, 4, 5} for one in row), "one a prompt"
    assert all(0 < one["near"] < 0.71 and 0 < one["far"] < 0.71 for one in row)
    assert [one["ratio"] for one in row] == pytest.approx(np.mean(ratios, axis=0), rel=1e-4)
    took = json.loads((tmp_path / "out" / "seconds.json").read_text("utf-8"))
    assert len(took) == 4 and all(value > 0 for value in took.values())
    before = files(tmp_path / "out")
    assert run(tiny_bundle, tmp_path / "out", *options).exit_code == 0
    assert files(tmp_path / "out") == before, "nothing is run twice"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--methods", "cfg,magic"), "no method 'magic' in --methods"),
        (("--scales", "2,x"), "is no list of numbers; write 2,4,7"),
        (("--metrics", "fid"), "there is no metric 'fid' in --metrics"),
        (("--baseline", "apg"), "--baseline apg is not among --methods"),
    ],
)
def test_the_command_says_what_to_do(
    tiny_bundle: Path, tmp_path: Path, options: tuple[str, ...], said: str
) -> None:
    done = run(tiny_bundle, tmp_path / "out", "--prompts", str(ROOT / "examples" / "prompts.txt"), *options)
    assert done.exit_code == 2 and said in " ".join(done.stderr.split()), done.stderr
    assert not (tmp_path / "out").exists()


def test_variants_of_one_model_are_compared(tiny_bundle: Path, tmp_path: Path) -> None:
    skip, prompts = tmp_path / "skip", tmp_path / "p.txt"
    build("tiny-sd3", skip, BuildOptions(variant=Variant.SKIP, encoders=tiny_bundle))
    prompts.write_text(PROMPTS[0])
    options = ("--with", str(skip), "--prompts", str(prompts), "--methods", "cfg,emag")
    done = run(tiny_bundle, tmp_path / "out", *options, "--json")
    assert done.exit_code == 0, done.output
    settings = json.loads(done.stdout)["settings"]
    assert [(row["method"], row["variant"]) for row in settings] == [
        ("cfg", None),
        ("emag", "emag-q"),
        ("emag", "skip"),
    ]
    assert settings[1]["row_blocks_relative_to_cfg"] != settings[2]["row_blocks_relative_to_cfg"]
    folders = {path.parent.relative_to(tmp_path / "out").as_posix() for path in tmp_path.rglob("*seed*.png")}
    assert folders == {
        "emag-q/pictures/cfg-w4",
        "emag-q/pictures/emag-emag-q-w4-s1.5",
        "skip/pictures/emag-skip-w4-s1.7",
    }
