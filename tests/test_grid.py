"""``generate --grid``: every picture by every method, and a sheet of all of them."""

from pathlib import Path

import numpy as np
from click.testing import CliRunner
from PIL import Image

from emag_export.cli.main import main
from emag_export.evaluation.contact import SheetRow, sheet
from emag_export.runtime.pictures.metadata import read_picture_record

PROMPT = "a large red circle on a blue background"
ASKED = (
    "--prompt",
    PROMPT,
    "--steps",
    "6",
    "--images",
    "2",
    "--grid",
    "none,cfg,emag",
    "--guidance-scale",
    "3",
)


def run(*arguments: str | Path) -> tuple[int, str, str]:
    done = CliRunner().invoke(main, [str(argument) for argument in arguments])
    return done.exit_code, done.stdout, done.stderr


def test_a_grid_draws_every_method_from_the_same_seeds_and_goes_on(tiny_bundle: Path, tmp_path: Path) -> None:
    folder = tmp_path / "grid"
    code, told, complaint = run("generate", tiny_bundle, *ASKED, "-o", folder)
    assert code == 0, complaint
    found = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.png"))
    assert found == [
        "cfg-w3/0000-seed0.png",
        "cfg-w3/0001-seed1.png",
        "emag-emag-q-w3-s1.5/0000-seed0.png",
        "emag-emag-q-w3-s1.5/0001-seed1.png",
        "grid.png",
        "none/0000-seed0.png",
        "none/0001-seed1.png",
    ]
    record = read_picture_record(folder / found[3])
    assert (record.request.guidance.name, record.request.guidance.scale, record.request.seed) == (
        "emag",
        3,
        1,
    )
    alone = tmp_path / "alone.png"
    assert run("generate", tiny_bundle, "--like", folder / found[1], "-o", alone)[0] == 0
    one, two = (np.asarray(Image.open(path)).astype(int) for path in (alone, folder / found[1]))
    assert abs(one - two).max() <= 1, "as if drawn alone"
    with Image.open(folder / "grid.png") as drawn:
        pixels = np.asarray(drawn.convert("RGB"))
        assert drawn.width >= 2 * 128 and drawn.height >= 3 * 128
    big = np.asarray(Image.open(folder / found[0])).repeat(2, 0).repeat(2, 1)
    assert any((pixels[top : top + 128, 6:134] == big).all() for top in range(pixels.shape[0] - 127)), (
        "the sheet shows the pictures"
    )
    (folder / found[4]).unlink()
    (folder / found[0]).unlink()
    code, told, complaint = run("generate", tiny_bundle, *ASKED, "-o", folder)
    assert code == 0 and told.count("already there") == 5, complaint
    assert (np.asarray(Image.open(folder / "grid.png")) == pixels).all(), "continued, it is the same sheet"


def test_what_is_no_grid_is_refused(tiny_bundle: Path, tmp_path: Path) -> None:
    code, _, complaint = run("generate", tiny_bundle, *ASKED, "-o", tmp_path / "a.png")
    assert code == 2 and "a grid is a folder" in complaint.replace("\n", " ")
    wrong = [*ASKED[:-4], "--grid", "cfg,pag"]
    code, _, complaint = run("generate", tiny_bundle, *wrong, "-o", tmp_path / "b")
    assert code == 2 and "variant identity" in complaint.replace("\n", " ") and not (tmp_path / "b").exists()


def test_a_sheet_is_as_wide_as_its_longest_line() -> None:
    rows = [SheetRow(label="cfg", pictures=[np.zeros((64, 64, 3), np.uint8)])]
    narrow, wide = (sheet(title, rows) for title in ("a", "a very long prompt indeed, " * 6))
    assert wide.width > narrow.width >= 128 + 12 and wide.height == narrow.height
