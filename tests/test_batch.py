"""Tables of prompts to pictures: checked first, drawn once, whatever happens in between."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from emag_export.bundle import Bundle
from emag_export.cli.main import main
from emag_export.errors import EngineError, InputError
from emag_export.hashing import hash_file
from emag_export.runtime.batching.options import BatchingOptions
from emag_export.runtime.batching.pipeline import BatchedPipeline
from emag_export.runtime.pictures.metadata import read_picture_record
from emag_export.runtime.pipeline import Pipeline
from emag_export.serve.batch.draw import BatchResult, draw, pending, record_failures
from emag_export.serve.batch.plan import BatchPlan
from emag_export.serve.batch.table import read_table
from tests.bundles import opener
from tests.test_batched_pipeline import sizing

ROWS: list[dict[str, Any]] = [
    {"prompt": "a large red circle on a blue background", "seed": 5, "source": "a, b"},
    {"prompt": "a small green star on a white background", "guidance": "cfg", "steps": 2},
    {"prompt": "a large yellow ring on a black background", "emag_scale": 2.5, "source": "c"},
]
STEPS = ("--steps", "3", "--threads", "1", "--images-per-call", "4")
# Of 255: images share calls in another company every time.
ONE_LEVEL = 1


def write_table(path: Path, rows: list[dict[str, Any]] = ROWS) -> Path:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    elif path.suffix == ".csv":
        names = list(dict.fromkeys(name for row in rows for name in row))
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, names, restval="")
            writer.writeheader()
            writer.writerows(rows)
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, schema=_schema()), path)
    return path


def _schema() -> Any:
    texts, integers = ("prompt", "source", "guidance"), ("seed", "steps")
    fields = [*((name, pyarrow.string()) for name in texts), *((name, pyarrow.int64()) for name in integers)]
    return pyarrow.schema([*fields, ("emag_scale", pyarrow.float64())])


def batch(bundle: Path, table: Path, output: Path, *options: str) -> Result:
    words = ["batch", str(bundle), "--prompts", str(table), "-o", str(output), *STEPS, *options]
    return CliRunner().invoke(main, words)


def pictures(output: Path) -> dict[str, np.ndarray]:
    return {
        path.relative_to(output).as_posix(): np.asarray(Image.open(path)).astype(int)
        for path in sorted(output.rglob("*.png"))
    }


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_every_kind_of_table_says_the_same(tmp_path: Path, suffix: str) -> None:
    rows = list(read_table(write_table(tmp_path / f"t{suffix}")))
    assert [row.prompt for row in rows] == [row["prompt"] for row in ROWS]
    assert [dict(row.keywords) for row in rows] == [
        {"seed": 5},
        {"guidance": "cfg", "steps": 2},
        {"emag_scale": 2.5},
    ]
    assert [row.others.get("source") for row in rows] == ["a, b", None, "c"]


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_a_table_becomes_pictures_and_an_index(tiny_bundle: Path, tmp_path: Path, form: str) -> None:
    table, output = write_table(tmp_path / "t.jsonl"), tmp_path / "out"
    done = batch(tiny_bundle, table, output, "--images", "2", "--index", form, "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout) == {
        "drawn": 6,
        "kept": 0,
        "failed": 0,
        "index": str(output / f"index.{form}"),
    }
    path = output / f"index.{form}"
    if form == "jsonl":
        index = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    else:
        index = pyarrow.parquet.read_table(path).to_pylist()
    assert [(row["row"], row["image"], row["seed"], row["steps"]) for row in index] == [
        (0, 0, 5, 3),
        (0, 1, 6, 3),
        (1, 0, 0, 2),
        (1, 1, 1, 2),
        (2, 0, 0, 3),
        (2, 1, 1, 3),
    ]
    for row in index:
        assert hash_file(output / row["path"]) == row["sha256"]
        record = read_picture_record(output / row["path"])
        assert (record.request.seed, record.request.prompt) == (row["seed"], row["prompt"])
    assert [row.get("source") for row in index][::2] == ["a, b", None, "c"]
    with Pipeline.open(tiny_bundle, threads=1) as pipeline:
        (alone,) = pipeline.generate(ROWS[2]["prompt"], steps=3, seed=1, emag_scale=2.5)
    served = np.asarray(Image.open(output / index[5]["path"])).astype(int)
    assert np.abs(served - np.asarray(alone)).max() <= ONE_LEVEL


def test_what_is_there_is_kept_and_what_is_missing_is_drawn(tiny_bundle: Path, tmp_path: Path) -> None:
    table, output = write_table(tmp_path / "t.jsonl"), tmp_path / "out"
    assert batch(tiny_bundle, table, output).exit_code == 0
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*.png")}
    gone = sorted(before)[1]
    gone.unlink()
    (output / "index.jsonl").unlink()
    leftover = gone.with_name(f".{gone.name}.partial")
    leftover.write_bytes(b"half a picture")
    done = batch(tiny_bundle, table, output, "--json")
    assert json.loads(done.stdout)["drawn"] == 1 and json.loads(done.stdout)["kept"] == 2
    after = {path: path.stat().st_mtime_ns for path in output.rglob("*.png")}
    assert after.keys() == before.keys() and not leftover.exists()
    assert all(after[path] == before[path] for path in before if path != gone)
    assert len((output / "index.jsonl").read_text().splitlines()) == 3


def test_a_picture_that_was_made_otherwise_is_not_replaced_unasked(tiny_bundle: Path, tmp_path: Path) -> None:
    table, output = write_table(tmp_path / "t.jsonl"), tmp_path / "out"
    assert batch(tiny_bundle, table, output).exit_code == 0
    before = pictures(output)
    refused = batch(tiny_bundle, table, output, "--emag-strength", "0.5")
    assert refused.exit_code == 2 and "add --overwrite" in refused.stderr.replace("\n", " ")
    assert pictures(output).keys() == before.keys()
    replaced = batch(tiny_bundle, table, output, "--emag-strength", "0.5", "--overwrite")
    assert replaced.exit_code == 0
    names = {read_picture_record(path).request.windows.strength for path in output.rglob("*.png")}
    assert names == {0.5}


def test_mistakes_are_found_before_work_begins(tiny_bundle: Path, tmp_path: Path) -> None:
    rows = [*ROWS, {"prompt": "x", "steps": 0}, {"prompt": "", "seed": 1}, {"prompt": "y", "height": 63}]
    table, output = write_table(tmp_path / "t.jsonl", rows), tmp_path / "out"
    done = batch(tiny_bundle, table, output)
    said = " ".join(done.stderr.split())
    assert done.exit_code == 2 and not output.exists()
    for part in (
        "3 rows of",
        "row 3: 0 denoising steps",
        "row 4: the --prompt is empty",
        "row 5: --height 63",
    ):
        assert part in said, said


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("t.txt", "a prompt", "ends in none of .jsonl, .csv, .parquet"),
        ("t.jsonl", "{", "row 0 is no JSON"),
        ("t.jsonl", "[1]", "row 0 is no JSON object"),
        ("t.jsonl", '{"prompt": [3]}', "row 0 has no text in the column prompt"),
        ("t.jsonl", '{"prompt": "x", "path": "y"}', "a column path, which the index needs itself"),
        ("t.jsonl", '{"prompt": "x", "steps": "4"}', "`steps` is '4'"),
        ("t.jsonl", '{"prompt": "x", "seed": true}', "`seed` is True"),
        ("t.csv", "prompt,seed\nx,many\n", "`seed` is 'many'"),
        ("t.csv", "prompt,seed\nx,1,2\n", "more or fewer cells"),
        ("t.parquet", "no parquet", "is no Parquet file"),
    ],
)
def test_a_damaged_table_is_named(tmp_path: Path, name: str, text: str, said: str) -> None:
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(InputError, match=said):
        list(read_table(path))


def test_an_empty_or_absent_table_is_named(tiny_bundle: Path, tmp_path: Path) -> None:
    empty = write_table(tmp_path / "t.jsonl", [])
    plan = BatchPlan(bundle=Bundle(tiny_bundle), table=empty, output=tmp_path / "out", keywords={})
    with pytest.raises(InputError, match="holds no prompt"):
        plan.check()
    with pytest.raises(InputError, match="cannot be read"):
        list(read_table(tmp_path / "absent.csv"))


@pytest.fixture
def batched(tiny_bundle: Path) -> Iterator[BatchedPipeline]:
    pipeline = Pipeline(Bundle(tiny_bundle), opener(threads=1))
    with BatchedPipeline(pipeline, BatchingOptions(), sizing=sizing(2, 2)) as running:
        yield running


def test_a_picture_that_fails_is_tried_again_and_then_reported(
    tiny_bundle: Path, tmp_path: Path, batched: BatchedPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    table, output = write_table(tmp_path / "t.jsonl"), tmp_path / "out"
    output.mkdir()
    plan = BatchPlan(bundle=Bundle(tiny_bundle), table=table, output=output, keywords={"steps": 2})
    prepare, attempts = batched.pipeline.prepare, list[int]()

    def unlucky(requests: Any) -> Any:
        seed = requests[0].seed
        attempts.append(seed)
        if seed == 5 or (attempts.count(0) == 1 and seed == 0):
            raise EngineError("the encoder has a bad day")
        return prepare(requests)

    monkeypatch.setattr(batched.pipeline, "prepare", unlucky)
    result = BatchResult()
    draw(pending(plan, result), output, batched, result)
    assert (result.drawn, [item.request.seed for item, _ in result.failed]) == (2, [5])
    assert attempts.count(5) == 2 and attempts.count(0) == 3, "each is tried twice, then given up"
    listed = record_failures(plan, result)
    assert listed is not None and json.loads(listed.read_text())["row"] == 0
    assert record_failures(plan, BatchResult()) is None and not listed.exists()


def test_a_long_table_is_never_in_memory(tiny_bundle: Path, tmp_path: Path, batched: BatchedPipeline) -> None:
    """Rows are asked for as there is room for them."""
    table, output = write_table(tmp_path / "t.jsonl", ROWS * 8), tmp_path / "out"
    plan = BatchPlan(bundle=Bundle(tiny_bundle), table=table, output=output, keywords={"steps": 1})
    result, ahead = BatchResult(), list[int]()

    def counted() -> Iterator[Any]:
        for number, item in enumerate(pending(plan, result)):
            ahead.append(number - result.drawn)
            yield item

    draw(counted(), output, batched, result)
    assert result.drawn == 24 and max(ahead) <= 2 * batched.sizing.room.live


def test_killed_and_run_again_it_draws_every_picture_once(tiny_bundle: Path, tmp_path: Path) -> None:
    rows = [{**row, "seed": number} for number, row in enumerate(ROWS * 4)]
    table, output = write_table(tmp_path / "t.jsonl", rows), tmp_path / "killed"
    words = [sys.executable, "-m", "emag_export.cli.main", "batch", str(tiny_bundle)]
    words += ["--prompts", str(table), "-o", str(output), *STEPS, "--steps", "20"]
    process = subprocess.Popen(words, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    until = time.monotonic() + 60
    while len(list(output.rglob("*.png"))) < 3 and time.monotonic() < until:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    half = {path: path.stat().st_mtime_ns for path in output.rglob("*.png")}
    assert 3 <= len(half) < len(rows), "it was killed in the middle"
    done = batch(tiny_bundle, table, output, "--steps", "20", "--json")
    assert json.loads(done.stdout)["kept"] == len(half)
    assert all(path.stat().st_mtime_ns == when for path, when in half.items()), "none is drawn twice"
    whole = tmp_path / "whole"
    assert batch(tiny_bundle, table, whole, "--steps", "20").exit_code == 0
    killed, uninterrupted = pictures(output), pictures(whole)
    assert killed.keys() == uninterrupted.keys() and len(killed) == len(rows)
    for name, found in killed.items():
        assert np.abs(found - uninterrupted[name]).max() <= ONE_LEVEL
