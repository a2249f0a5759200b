"""Methods, trials, scores, tuning and reports of an evaluation, without a run."""

import base64
import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from emag_export.bundle import Bundle
from emag_export.errors import InputError
from emag_export.evaluation.methods import METHODS, methods_named
from emag_export.evaluation.metrics.protocol import Column
from emag_export.evaluation.plots import pareto_front
from emag_export.evaluation.prompts import read_prompt_file, require_disjoint
from emag_export.evaluation.report import most_telling, write_report
from emag_export.evaluation.results import Results, summarise
from emag_export.evaluation.scoring import PictureScores, ScoreStore
from emag_export.evaluation.settings import Setting, settings_of
from emag_export.evaluation.sweep import GRID, candidates, choose, sweep_record
from emag_export.evaluation.trials import Trials
from emag_export.kinds import Variant
from emag_export.tiny_sd3.read_caption import read_caption

ROOT = Path(__file__).parent.parent
PROMPTS = ("a large red circle on a blue background", "a small green square on a red background")
QUALITY = Column(name="iou", better="higher", summary="overlap")
ERROR = Column(name="error", better="lower", unit="px", summary="distance")


class Double(Bundle):
    """A bundle of any variant, without files."""

    def __init__(self, variant: Variant) -> None:
        self._variant = variant

    @property
    def contract(self) -> Any:
        return SimpleNamespace(variant=self._variant)

    @property
    def defaults(self) -> Any:
        return SimpleNamespace(guidance_scale=4.0, apg_scale=10.0, emag_scale=1.5)


OWN = tuple(name for name, method in METHODS.items() if method.variant is None)
"""Methods that run with any variant."""


def setting(method: str, scale: float | None = 4.0, emag_scale: float | None = None) -> Setting:
    variant = Variant.EMAG_Q if METHODS[method].perturbed else None
    return Setting(method=method, variant=variant, scale=scale, emag_scale=emag_scale)


def measured(of: Setting, values: Sequence[float | None], column: str = "iou") -> list[PictureScores]:
    """One picture per prompt."""
    return [
        PictureScores(setting=of.label, prompt=number, paths=(), scores=({column: value},), together={})
        for number, value in enumerate(values)
    ]


def test_every_method_draws(tiny_bundle: Path) -> None:
    """The plan of each fits the model, and unguided pictures cost half of guided ones."""
    bundle = Bundle(tiny_bundle)
    settings = settings_of(OWN, [bundle])
    trials = Trials(
        bundle=bundle,
        output=Path(),
        settings=tuple(settings),
        prompts=PROMPTS,
        seeds=3,
        keywords={"steps": 28},
    )
    assert trials.check() == len(OWN) * 2 * 3
    cost = {of.method: trials.cost(of) for of in settings}
    assert (cost["none"], cost["cfg"]) == (0.5, 1.0)
    assert cost["cfg-zero-star"] == pytest.approx(1 - 1 / 56)
    assert (
        cost["emag"] == pytest.approx(1.225) and cost["cfg+interval"] < cost["emag+interval"] < cost["emag"]
    )


def test_a_method_may_name_a_variant_and_options() -> None:
    text = "cfg, emag@emag-q[emag-blocks=4,5 emag_strength=0.5],emag[random-blocks=1],cfg"
    names = methods_named(text)
    assert names == ("cfg", "emag@emag-q[emag-blocks=4,5 emag_strength=0.5]", "emag[random-blocks=1]")
    bundles = [Double(Variant.EMAG_Q), Double(Variant.SKIP)]
    settings = settings_of((*names, "slg", "s2"), bundles)
    assert [(of.method[:6], of.variant) for of in settings] == [
        ("cfg", None),
        ("emag@e", "emag-q"),
        ("emag[r", "emag-q"),
        ("emag[r", "skip"),
        ("slg", "skip"),
        ("s2", "skip"),
    ]
    assert settings[1].keywords["emag_blocks"] == (4, 5) and settings[1].keywords["emag_strength"] == 0.5
    assert settings[1].folder == "emag_emag-q_emag-blocks=4,5_emag_strength=0.5-emag-q-w4-s1.5"
    assert len({of.folder for of in settings}) == len({of.label for of in settings}) == len(settings)
    assert settings[-1].keywords["random_blocks"] == 1
    assert settings[-1].label == "s2, w 4, s 1.5" and settings[3].series == "emag[random-blocks=1] (skip)"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cfg@skip", "cfg of `methods` does not run with the variant skip"),
        ("pag@skip", "pag of `methods` does not run with the variant skip"),
        ("emag@blurr", "`methods`"),
        ("emag[strength=1]", "'strength=1' in `methods` is no option; write one of embedded_guidance, "),
        ("emag[emag-scale=2]", "is no option"),
        ("emag[emag-start=2.5]", "`emag_start` is '2.5'; write a number"),
        ("cfg[guidance-interval=0.5]", "is of the wrong kind"),
        ("emag[", r"`methods` cannot be read from 'emag\[' on"),
        ("emagg[tcfg=true]", "there is no method 'emagg' in `methods`"),
    ],
)
def test_a_method_that_does_not_exist_is_refused(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        methods_named(text)


def test_a_method_without_its_variant_is_refused() -> None:
    with pytest.raises(InputError, match="pag of `methods` runs with the variant identity, and no bundle"):
        settings_of(("cfg", "pag"), [Double(Variant.EMAG_Q)])


def test_trials_share_noise_between_methods_and_not_between_prompts(tiny_bundle: Path) -> None:
    bundle = Bundle(tiny_bundle)
    settings = tuple(settings_of(("cfg", "emag", "apg"), [bundle]))
    trials = Trials(bundle=bundle, output=Path(), settings=settings, prompts=PROMPTS, seeds=2, keywords={})
    items = list(trials.items())
    assert len({item.path for item in items}) == len(items) == 12
    seeds = {
        (of.method, number): [item.request.seed for item in trials.items_of(of, number)]
        for of in settings
        for number in (0, 1)
    }
    assert seeds["cfg", 0] == seeds["emag", 0] == seeds["apg", 0] == [0, 1]
    assert seeds["cfg", 1] == seeds["emag", 1] == [1000, 1001]
    more = replace(trials, prompts=(*PROMPTS, "a third one"), seeds=3)
    assert {item.path for item in items} < {item.path for item in more.items()}, "what is there stays"
    names = {item.request.guidance.name for item in items}
    assert names == {"cfg", "emag", "apg"}


def test_methods_with_a_negative_run_with_every_variant() -> None:
    bundles = [Double(Variant.EMAG_Q), Double(Variant.SKIP)]
    labels = [of.label for of in settings_of(("none", "cfg", "apg", "emag", "emag-only"), bundles, (2, 4))]
    assert labels == [
        "none",
        "cfg, w 2",
        "cfg, w 4",
        "apg, w 2",
        "apg, w 4",
        "emag (emag-q), w 2, s 1.5",
        "emag (emag-q), w 4, s 1.5",
        "emag (skip), w 2, s 1.5",
        "emag (skip), w 4, s 1.5",
        "emag-only (emag-q), s 1.5",
        "emag-only (skip), s 1.5",
    ]
    (own,) = settings_of(("apg",), bundles)
    assert own.scale == 10 and own.folder == "apg-w10", "APG has a scale of its own"


def test_names_of_methods_are_checked() -> None:
    assert methods_named("cfg, emag,cfg") == ("cfg", "emag")
    with pytest.raises(InputError, match="no method 'pig' in `methods`; there are none, cfg, emag"):
        methods_named("cfg,pig")
    with pytest.raises(InputError, match="`methods` names none"):
        methods_named(" , ")


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("p.txt", "\n \n", "`prompts` .* holds no prompt"),
        ("p.txt", "a Dog\na  dog\n", "has 'a  dog' twice"),
        ("p.jsonl", '{"prompt": "x", "seed": 3}', "sets seed, which would hold for every method"),
        ("p.csv", "prompt\n", "holds no prompt"),
    ],
)
def test_a_file_of_prompts_that_cannot_be_compared_is_refused(
    tmp_path: Path, name: str, text: str, said: str
) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=said):
        read_prompt_file(tmp_path / name)


def test_the_example_is_a_file_of_scenes() -> None:
    prompts = read_prompt_file(ROOT / "examples" / "prompts.txt")
    assert len(prompts) == 12 and all(read_caption(prompt) is not None for prompt in prompts)
    with pytest.raises(InputError, match=r"1 prompts are in `sweep` and in `prompts`, 'A dog' first"):
        require_disjoint(["a  dog", "b"], ["c", "A dog"])


def test_scores_are_measured_once_and_a_torn_line_again(tmp_path: Path) -> None:
    path, count = tmp_path / "s.jsonl", list[int]()

    def measure() -> dict[str, float | None]:
        count.append(1)
        return {"iou": 0.123456789123, "place": None}

    assert ScoreStore(path).get("a", measure) == {"iou": 0.123456789, "place": None}
    assert ScoreStore(path).get("a", measure)["iou"] == 0.123456789 and len(count) == 1
    ScoreStore(path).get("b", measure)
    whole = path.read_bytes()
    path.write_bytes(whole[:-7])
    assert ScoreStore(path).get("a", measure) and len(count) == 2
    ScoreStore(path).get("b", measure)
    assert len(count) == 3 and path.read_bytes() == whole


def test_tests_are_paired_corrected_and_at_the_same_scale() -> None:
    rng = np.random.default_rng(0)
    hard = rng.normal(0.5, 0.2, 40)  # prompts differ far more than methods do
    rows = {
        setting("cfg", 2.0): hard,
        setting("cfg", 4.0): hard + 0.05 + rng.normal(0, 0.01, 40),
        setting("emag", 4.0, 1.5): hard + 0.07 + rng.normal(0, 0.01, 40),
        setting("none", None): hard + rng.normal(0, 0.01, 40),
    }
    pictures = [row for of, values in rows.items() for row in measured(of, list(values))]
    results, tests = summarise([(of, 1.0) for of in rows], pictures, [QUALITY, ERROR], baseline="cfg")
    assert [row.intervals["iou"].mean for row in results] == [pytest.approx(v.mean()) for v in rows.values()]
    emag, none = tests
    assert emag.baseline == "cfg, w 4" and none.baseline == "cfg, w 2"
    assert emag.verdict == "better" and emag.difference.mean == pytest.approx(0.02, abs=0.01)
    assert none.verdict == "unclear" and none.p == pytest.approx(none.p_holm)
    assert emag.p_holm == pytest.approx(2 * emag.p)
    width = results[2].intervals["iou"]
    assert width.high - width.low > 10 * (emag.difference.high - emag.difference.low), "what pairing gains"


def test_what_could_not_be_measured_is_left_out_pairwise() -> None:
    one, two = setting("cfg"), setting("emag", 4.0, 1.5)
    pictures = [*measured(one, [1.0, None, 3.0, 2.0]), *measured(two, [None, 2.0, 5.0, 4.0])]
    (first, _), (test,) = summarise([(one, 1), (two, 1.2)], pictures, [QUALITY], baseline="cfg")
    assert first.values["iou"] == (1.0, None, 3.0, 2.0) and first.intervals["iou"].mean == 2.0
    assert test.prompts == 2 and test.difference.mean == 2.0
    worse = replace(QUALITY, better="lower")
    many = [*measured(one, [1.0] * 8), *measured(two, list(np.linspace(1.1, 1.2, 8)))]
    (_, (test,)) = summarise([(one, 1), (two, 1.2)], many, [worse], baseline="cfg")
    assert test.verdict == "worse" and test.p == pytest.approx(2 / 256)


def test_every_method_is_tuned_on_as_many_settings() -> None:
    start = [
        setting("cfg"),
        setting("emag", 4.0, 1.5),
        setting("emag-only", None, 1.5),
        setting("none", None),
    ]
    groups = [candidates(of) for of in start]
    assert [len(group) for group in groups] == [GRID, GRID, GRID, 1]
    assert all(of in group for of, group in zip(start, groups, strict=True))
    assert len({of.folder for group in groups for of in group}) == 3 * GRID + 1
    values = {of.label: abs(of.scale - 4.9) for group in groups[:2] for of in group if of.scale}
    pictures = [
        row
        for group in groups
        for of in group
        for row in measured(of, [values.get(of.label), values.get(of.label, 3.0)], "error")
    ]
    best = choose(groups, pictures, ERROR)
    assert [of.scale for of in best] == [4.6, 5.5, None, None]
    record = sweep_record(groups, pictures, ERROR, ["x", "y"])
    assert record["methods"][0]["chosen"] == "cfg, w 4.6" and len(record["methods"][1]["tried"]) == GRID
    json.dumps(record, allow_nan=False)


def test_the_front_has_what_no_other_beats() -> None:
    costs = {"none": 0.5, "cfg": 1.0, "apg": 1.0, "emag": 1.2, "cads": 1.3}
    means = {"none": 0.2, "cfg": 0.6, "apg": 0.7, "emag": 0.65, "cads": 0.8}
    of = {name: setting(name, emag_scale=1.5 if name == "emag" else None) for name in costs}
    pictures = [row for name in costs for row in measured(of[name], [means[name]])]
    rows, _ = summarise([(of[name], costs[name]) for name in costs], pictures, [QUALITY], baseline=None)
    names = [row.setting.method for row in pareto_front(rows, "iou", higher=True)]
    assert names == ["none", "apg", "cads"]
    assert [row.setting.method for row in pareto_front(rows, "iou", higher=False)] == ["none"]


def test_a_report_says_the_same_in_numbers_and_pictures(tmp_path: Path) -> None:
    paths = []
    for seed in range(2):
        paths.append(tmp_path / f"{seed}.png")
        Image.new("RGB", (64, 64), (40 * seed, 90, 10)).save(paths[-1])
    both = (setting("cfg"), setting("emag", 4.0, 1.5))
    pictures = tuple(
        replace(row, paths=tuple(paths), scores=({"iou": 0.5 + 0.1 * place, "error": None},) * 2)
        for place, of in enumerate(both)
        for row in measured(of, [0.0, 0.0])
    )
    rows, tests = summarise([(of, 1.0) for of in both], pictures, [QUALITY, ERROR], baseline="cfg")
    results = Results(
        facts={"model": "<small>", "seeds": 2, "steps": 4, "methods": {"cfg": "u + w(c - u)"}},
        prompts=("a & b", "c"),
        columns=(QUALITY, ERROR),
        quality="iou",
        settings=rows,
        tests=tests,
        pictures=pictures,
    )
    written = write_report(results, tmp_path / "report")
    names = [path.relative_to(tmp_path / "report").as_posix() for path in written]
    assert names == ["results.json", "pareto.png", "report.html", "contact/0000.png", "contact/0001.png"]
    data = json.loads(written[0].read_text("utf-8"))
    assert [row["label"] for row in data["settings"]] == ["cfg, w 4", "emag (emag-q), w 4, s 1.5"]
    assert data["settings"][1]["columns"] == {
        "iou": {"mean": 0.6, "low": 0.6, "high": 0.6, "prompts": [0.6, 0.6]}
    }
    assert data["tests"][0]["difference"]["mean"] == pytest.approx(0.1)
    page = written[2].read_text("utf-8")
    assert "&lt;small&gt;" in page and "$" not in page
    embedded = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    assert base64.b64decode(embedded[0]) == written[1].read_bytes() and len(embedded) == 4
    assert most_telling(results) == 0 and base64.b64decode(embedded[1]) == written[3].read_bytes()
    apart = replace(rows[1], values={"iou": (0.6, 0.9)})
    assert most_telling(replace(results, settings=(rows[0], apart))) == 1
    with Image.open(written[3]) as sheet:
        assert sheet.width >= 2 * 128 and sheet.height >= 2 * 128
        assert (np.asarray(sheet) == (40, 90, 10)).all(-1).sum() == 2 * 128 * 128
