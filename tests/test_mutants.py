"""The mutation check itself, on small modules: what is changed, who notices, and what is not run again."""

import ast
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.mutants.changes import KINDS
from tests.mutants.children import Outcome
from tests.mutants.judged import Verdict, judgement_of, read_judgements, stale
from tests.mutants.mutate import mutants_of
from tests.mutants.report import Found, counts, rows, survivor_table
from tests.mutants.store import Store
from tests.mutants.subjects import SUBJECTS, sample_of

ROOT = Path(__file__).parent.parent


def changes(source: str, *kinds: str) -> list[tuple[str, str]]:
    """Before and after, of these kinds or of all."""
    found = mutants_of("toy.py", source)
    return [(one.before, one.after) for one in found if not kinds or one.kind in kinds]


@pytest.mark.parametrize(
    ("line", "after"),
    [
        ("x = a < b <= c", ["x = a <= b <= c", "x = a < b < c"]),
        ("x = a not  in b", ["x = a in b"]),
        ("x = (a) is not (b)", ["x = (a) is (b)"]),
        ("x = a + b * -c", ["x = a - b * -c", "x = a + b / -c", "x = a + b * (c)"]),
        ("x = a // b", ["x = a * b"]),
        ("x = a and b or not c", ["x = a and b and not c", "x = a or b or not c", "x = a and b or (c)"]),
        ("x = not (a or b)", ["x = (a or b)", "x = not (a and b)"]),
        ("x = 1", ["x = 2", "x = 0"]),
        ("x = 0.5", ["x = 1.5"]),
        ("x = 1.0", ["x = 0.0"]),
        ("x = True", ["x = False"]),
        ("x = y if a else b", ["x = y if not (a) else b"]),
        ("x = y if a == b else c", ["x = y if a != b else c"]),
        ("x = [y for y in z if y.real]", ["x = [y for y in z if not (y.real)]"]),
        ("x = min(a, b)", ["x = max(a, b)"]),
        ("x = a.clamp_min(b)", ["x = a.clamp_max(b)"]),
        ("x = f(a, b)", ["x = f(b, a)"]),
        ("x = f(a, a)", []),
        ("x = f(a, k=b, m=c)", ["x = f(a, k=c, m=b)"]),
        ("x = {k: a, m: b}", ["x = {k: b, m: a}"]),
        ("x = a[b:, :c]", ["x = a[:, :c]", "x = a[b:, :]"]),
        ("x += a", ["pass"]),
        ("f(a)", ["pass"]),
        ("raise E(f'{a} is not {1 + 1}')", ["pass"]),
        ("return a, b", ["return b, a"]),
        ("return a", []),
        ("return a, a", []),
        ("assert a > 1", []),
        ("x: Literal[1] = a", []),
        ("x = 'some text' if a else f'{b + 1}'", []),
        ("'documentation'", []),
        ("x = 'ĉ', a < b", ["x = 'ĉ', a <= b"]),
    ],
)
def test_a_line_is_changed_in_these_ways(line: str, after: list[str]) -> None:
    source = f"def f(a, b):\n    {line}\n"
    # Operators of one line are found from its start to its end, so that the order is that of the text.
    assert sorted(changes(source)) == sorted((" ".join(line.split()), one) for one in after)


def test_declarations_are_left_alone() -> None:
    source = """
__all__ = ["a", "b"]
Name = tuple[int, 1] | None
if TYPE_CHECKING:
    x = 1
@decorated(1, b < c)
def f(a: Shape[1] = 2, *, b: int = 3) -> Shape[4]:
    '''Documentation.'''
"""
    assert changes(source) == [
        (
            "def f(a: Shape[1] = 2, *, b: int = 3) -> Shape[4]:",
            f"def f(a: Shape[1] = {one}, *, b: int = {two}) -> Shape[4]:",
        )
        for one, two in ((3, 3), (1, 3), (2, 4), (2, 2))
    ]


def test_none_is_returned_where_it_may_be() -> None:
    body = "    if a:\n        return None\n    return a\n"
    source = f"def f(a) -> int | None:\n{body}def g(a) -> int:\n    return a\n"
    (found,) = (one for one in mutants_of("toy.py", source) if one.kind == "nothing")
    assert (found.before, found.after, found.function, found.inside) == ("return a", "return None", "f", True)


def test_a_change_over_several_lines_shows_those_that_differ() -> None:
    source = (
        "x = f(\n    first,\n    k=a,  # why + how\n    m=(\n        b\n    ),\n    n=c\n)\nX = a  # 1 < 2\n"
    )
    mutant, _ = (one for one in mutants_of("toy.py", f"def g():\n  {source}") if one.kind == "swap")
    assert (mutant.before, mutant.after) == ("k=a, # why + how m=( b", "k=b, # why + how m=( a")
    assert (mutant.name, mutant.function) == ("toy.py:4:7:swap", "g")


def test_every_mutant_of_the_core_can_be_read_and_has_a_name_of_its_own() -> None:
    """And there is one of each kind, so that the table of kinds is true."""
    found = [
        mutant
        for subject in SUBJECTS
        for mutant in mutants_of(subject.path, (ROOT / subject.path).read_text("utf-8"))
    ]
    assert {mutant.kind for mutant in found} == set(KINDS)
    assert len({mutant.name for mutant in found}) == len(found)
    for mutant in sample_of(found)[::25]:
        original = (ROOT / mutant.path).read_text("utf-8")
        assert ast.dump(ast.parse(mutant.source)) != ast.dump(ast.parse(original)), mutant.name
        lines = zip(original.splitlines(), mutant.source.splitlines(), strict=False)
        first = next(number for number, (old, new) in enumerate(lines, start=1) if old != new)
        assert first >= mutant.line, mutant.name


TOY = """
def largest(numbers):
    found = numbers[0]
    for number in numbers:
        if number > found:
            found = number
    return found
"""
TESTS = """
from toy import largest

def test_one(): assert largest([3]) == 3
def test_some(): assert largest([1, 2]) == 2
"""
DRIVER = """
import json, sys
from pathlib import Path
from tests.mutants.campaign import outcomes_of
from tests.mutants.mutate import mutants_of
from tests.mutants.subjects import Subject

told = []
outcomes = outcomes_of(
    [Subject(path="toy.py", tests=("test_toy",))],
    mutants_of("toy.py", Path("toy.py").read_text()),
    Path("out"),
    jobs=2,
    preloaded=["pytest"],
    notify=lambda name, outcome, total: told.append(name),
)
by = {name: outcome.by for name, outcome in outcomes.items()}
passed = [name for name, outcome in outcomes.items() if outcome.passed]
print(json.dumps({"by": by, "passed": passed, "ran": len(told)}))
"""


def driven(folder: Path, script: str = DRIVER, code: int = 0) -> Any:
    """What a process of its own prints: this one has threads, and modules that a fork would inherit."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == code, done.stderr
    return json.loads(done.stdout) if code == 0 else done.stderr


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    (tmp_path / "tests").mkdir()
    (tmp_path / "toy.py").write_text(TOY)
    (tmp_path / "tests" / "test_toy.py").write_text(TESTS)
    return tmp_path


@pytest.mark.slow
def test_what_no_test_sees_survives_and_nothing_is_run_twice(toy: Path) -> None:
    """Beginning with the last number, and taking the later one of equals, are no mistakes; others are."""
    negated, turned = "toy.py:5:12:negate", "toy.py:5:19:compare"
    larger, smaller = "toy.py:3:21:larger", "toy.py:3:21:smaller"
    found = driven(toy)
    assert found["by"] == {
        larger: "tests/test_toy.py::test_one",
        smaller: "",
        negated: "tests/test_toy.py::test_some",
        turned: "",
    }
    assert (found["passed"], found["ran"]) == ([smaller, turned], 4)
    assert driven(toy) == {**found, "ran": 0}

    store = toy / "out" / "outcomes.jsonl"
    lines = store.read_text().splitlines()
    store.write_text("\n".join([*lines[:-2], lines[-2][:20]]))  # as if it had been killed
    assert driven(toy) == {**found, "ran": 2}

    # A test that sees both, and only the tests have changed.
    tests = toy / "tests" / "test_toy.py"
    tests.write_text(TESTS + "def test_first(): assert largest([1, True]) is not True\n")
    better = driven(toy)
    assert better["by"][turned] == better["by"][smaller] == "tests/test_toy.py::test_first"
    assert (better["passed"], better["ran"]) == ([], 4)


def test_tests_that_fail_anyway_say_nothing_of_mutants(toy: Path) -> None:
    (toy / "tests" / "test_toy.py").write_text("import toy\ndef test_it(): assert False\n")
    assert "tests/test_toy.py::test_it fails, though nothing is mutated" in driven(toy, code=1)


TRIALS = """
import json, sys
from pathlib import Path
from tests.mutants.children import Limits
from tests.mutants.mutate import Mutant
from tests.mutants.run import Suite, run_anew

{before}
sources = {{
    "endless": "while True: pass",
    "greedy": "largest = lambda numbers: bytearray(1 << 40)",
    "dead": "import os; os.kill(os.getpid(), 9)",
    "wrong": "largest = )",
}}
common = dict(path="toy.py", line=1, column=1, function="", inside=False, before="", after="")
mutants = [Mutant(kind=kind, source=source, **common) for kind, source in sources.items()]
suite = Suite(paths=("toy.py",), tests={{"tests/test_toy.py": ""}}, log=Path("out"))
ended = run_anew(suite, mutants, Limits(seconds=2))
print(json.dumps({{name.split(":")[-1]: outcome.by for name, outcome in ended}}))
"""


@pytest.mark.slow
def test_a_mutant_may_do_whatever_it_likes(toy: Path) -> None:
    """Never end, take all memory, die, or be no Python; it harms nobody else."""
    assert driven(toy, TRIALS.format(before="")) == {
        "endless": "timeout",
        "greedy": "tests/test_toy.py::test_one",
        "dead": "SIGKILL",
        "wrong": "tests/test_toy.py",
    }


def test_a_module_that_is_there_already_cannot_be_exchanged(toy: Path) -> None:
    assert "the tests could not be run" in driven(toy, TRIALS.format(before="import toy"), code=1)
    assert "toy.py was imported before the fork" in (toy / "out" / "anew-0.txt").read_text()


JUDGED = """
[[judged]]
module = "toy.py"
function = "largest"
before = "found = numbers[0]"
after = "found = numbers[-1]"
verdict = "equivalent"
why = "the largest number is the same wherever one begins"
"""


def test_a_judgement_is_found_wherever_its_line_stands(tmp_path: Path) -> None:
    file = tmp_path / "judged.toml"
    file.write_text(JUDGED)
    judgements = read_judgements(file)
    for source in (TOY, "\n\nX = 1\n" + TOY):
        judged = [one.name for one in mutants_of("toy.py", source) if judgement_of(one, judgements)]
        assert len(judged) == 1 and judged[0].endswith(":21:smaller")
        assert stale(judgements, mutants_of("toy.py", source)) == []
    (gone,) = stale(judgements, mutants_of("toy.py", TOY.replace("[0]", "[2]")))
    assert gone.verdict is Verdict.EQUIVALENT
    file.write_text(JUDGED * 2)
    with pytest.raises(ValueError, match=r"judged.toml judges twice: found = numbers\[0\]"):
        read_judgements(file)
    file.write_text(JUDGED.replace("the largest number is the same wherever one begins", ""))
    with pytest.raises(ValueError, match="gives no reason"):
        read_judgements(file)


def test_what_is_equivalent_is_not_counted(tmp_path: Path) -> None:
    """Of four mutants one is equivalent and one is not judged, so that two of three were noticed."""
    (tmp_path / "judged.toml").write_text(JUDGED)
    judgements = read_judgements(tmp_path / "judged.toml")
    fates = {"negate": "a test", "larger": "timeout", "smaller": "", "compare": ""}
    found = [
        Found.of(one, Outcome(passed=not fates[one.kind], seconds=1.0, by=fates[one.kind]), judgements)
        for one in mutants_of("toy.py", TOY)
    ]
    counted = {"mutants": 4, "killed": 2, "timeouts": 1, "equivalent": 1, "accepted": 0, "score": 2 / 3}
    assert counts(found) == counted
    results = rows(found)
    assert results["total"] == counted
    assert results["modules"] == [{"module": "toy.py", **counted}]
    _, table = survivor_table(results)
    assert table[0] == [
        "`toy.largest`",
        "`found = numbers[0]`",
        "`found = numbers[-1]`",
        "equivalent: the largest number is the same wherever one begins",
    ]


def test_a_sample_does_not_depend_on_other_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    def sampled(source: str) -> list[tuple[str, str]]:
        return [(one.before, one.after) for one in sample_of(mutants_of("toy.py", source))]

    source = "def f(a):\n" + "".join(f"    x{number} = a < {number}\n" for number in range(2, 30))
    monkeypatch.setattr("tests.mutants.subjects.SAMPLE", 10)
    assert len(sampled(source)) == 10
    assert sampled(f"import os\n\n\n{source}") == sampled(source)
    monkeypatch.setattr("tests.mutants.subjects.SEED", 1)
    other = sampled(source)
    monkeypatch.setattr("tests.mutants.subjects.SEED", 0)
    assert len(other) == 10 and other != sampled(source)


def test_half_a_line_is_no_outcome(tmp_path: Path) -> None:
    store = Store(tmp_path / "kept" / "outcomes.jsonl")
    outcome = Outcome(passed=False, seconds=0.5, by="a test")
    store.add("one", outcome)
    store.add("two", replace(outcome, passed=True))
    with (tmp_path / "kept" / "outcomes.jsonl").open("a") as file:
        file.write('{"key": "three", "pas')
    again = Store(tmp_path / "kept" / "outcomes.jsonl")
    assert again.get("one") == outcome
    assert again.get("two") == replace(outcome, passed=True)
    assert again.get("three") is None
