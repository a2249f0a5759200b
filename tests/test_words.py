"""The library speaks Python, the command line its own words: options and commands, of the same errors."""

import ast
import json
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

import emag_export
from emag_export.api import BuildKeywords, CompileKeywords, build_options
from emag_export.bundle import DENOISER, MANIFEST, Bundle
from emag_export.cli.console import status
from emag_export.cli.main import main
from emag_export.cli.words import command_of, in_words, option_of, sentence
from emag_export.contract import PRECISIONS, Variant
from emag_export.engines.config import EngineKeywords
from emag_export.engines.tensorrt.build import compile_call
from emag_export.errors import PARAMETER, Call, EmagError, InputError
from emag_export.exporter.describe.identify import identify
from emag_export.families import SWITCHES
from emag_export.manifest import Manifest
from emag_export.options import BuildOptions, Lora
from emag_export.records import dump_record
from emag_export.runtime.keywords import SAMPLING_KEYWORDS
from emag_export.shared_encoders import record_encoders

ROOT = Path(emag_export.__file__).resolve().parent.parent
ABOVE = ("cli/", "emag_export/tiny_sd3/")
"""The command line itself, and the scripts that trained the embedded model and have options of their own."""
PYTHON_ONLY = ("noise",)
"""Parameters without an option: what adds noise to a single step is a matter of whoever calls ``step``."""


def sources() -> list[Path]:
    """The library below the command line; each file once, as the package has links to folders beside it."""
    folders = [ROOT / name for name in ("emag_export", "engines", "runtime")]
    found = {path.resolve() for folder in folders for path in folder.rglob("*.py")}
    return sorted(path for path in found if not path.relative_to(ROOT).as_posix().startswith(ABOVE))


def commands() -> dict[str, click.Command]:
    context = click.Context(main)
    found = {name: main.get_command(context, name) for name in main.list_commands(context)}
    return {name: command for name, command in found.items() if command is not None}


def options_of(command: click.Command) -> set[str]:
    """Every spelling, ``--no-…`` included."""
    return {spelling for option in command.params for spelling in (*option.opts, *option.secondary_opts)}


ALL_OPTIONS = set().union(*(options_of(command) for command in commands().values()))


def texts(path: Path) -> Iterator[tuple[int, str]]:
    """Line and content of every string that is no documentation; also the fixed parts of f-strings."""
    tree = ast.parse(path.read_text("utf-8"))
    documentation = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documentation:
            yield node.lineno, node.value


def test_the_library_spells_no_option() -> None:
    """Neither in messages nor in documentation: who calls it from Python has none."""
    found = sources()
    assert len(found) > 100
    for path in found:
        for number, line in enumerate(path.read_text("utf-8").splitlines(), start=1):
            assert not re.search(r"--[a-z]", line), f"{path}:{number}: {line.strip()}"


def test_every_parameter_in_a_message_is_an_option_of_some_command() -> None:
    named = [
        (name, f"{path}:{line}")
        for path in sources()
        for line, text in texts(path)
        for name in PARAMETER.findall(text)
    ]
    assert len({name for name, _ in named}) > 20
    for name, where in named:
        if name not in PYTHON_ONLY:
            assert set(option_of(name).split(" or ")) <= ALL_OPTIONS, (name, where)


@pytest.mark.parametrize("name", ["output", "overwrite", "bundle", "images", "batch_size"])
def test_arguments_of_functions_are_words_of_the_command_line(name: str) -> None:
    arguments = {param.name for command in commands().values() for param in command.params}
    assert name in arguments
    assert name == "bundle" or option_of(name) in ALL_OPTIONS


@pytest.mark.parametrize(
    "name",
    sorted(
        {*BuildKeywords.__annotations__, *CompileKeywords.__annotations__, *EngineKeywords.__annotations__}
    )
    + sorted(SAMPLING_KEYWORDS),
)
def test_every_keyword_of_the_front_door_has_an_option(name: str) -> None:
    """Messages that are made of a name, like "`{option}` is for …", are covered by this."""
    assert set(option_of(name).split(" or ")) <= ALL_OPTIONS


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"output": Path("a b")}, ["-o", "a b"]),
        ({"bundle": Path("b"), "backend": "tensorrt"}, ["b", "--backend", "tensorrt"]),
        ({"backend": "tensorrt", "bundle": "b"}, ["b", "--backend", "tensorrt"]),
        ({"emag_candidates": (6, 7, 8)}, ["--emag-candidates", "6,7,8"]),
        ({"components": ("transformer", "vae_decoder")}, ["--components", "transformer,vae_decoder"]),
        ({"overwrite": True}, ["--overwrite"]),
        ({"tf32": False}, ["--no-tf32"]),
        ({"targets": ("sm86", "sm89")}, ["--target", "sm86", "--target", "sm89"]),
        (
            {"loras": (Lora(path=Path("x.safetensors"), scale=0.5), Lora(path=Path("y")))},
            ["--lora", "x.safetensors:0.5", "--lora", "y:1.0"],
        ),
        ({"weights_seed": 0}, ["--weights", "random", "--weights-seed", "0"]),
        ({"without": ("text_encoder_3",)}, ["--no-t5"]),
        ({"without": ()}, []),
        ({"precision": "float16"}, ["--precision", "fp16"]),
        ({"precision": "bf16"}, ["--precision", "bf16"]),
        ({"state_precision": "float16"}, ["--state-precision", "fp16"]),
        ({"variant": Variant.EMAG_T}, ["--variant", "emag-t"]),
        ({"max_sequence_length": 77}, ["--max-sequence-length", "77"]),
        ({}, []),
    ],
)
def test_a_call_is_shown_as_its_command(arguments: dict[str, Any], words: list[str]) -> None:
    call = Call(verb="build", arguments=arguments)
    command = command_of(call)
    assert shlex.split(command) == ["emag-export", "build", *words]
    error = InputError("the `output` is full, `max_images` too", remedy=call)
    assert sentence(error) == f"the -o is full, --max-images too: {command}"


def test_precisions_and_switches_are_all_known() -> None:
    for short, dtype in PRECISIONS.items():
        assert command_of(Call(verb="build", arguments={"precision": dtype})).endswith(f"--precision {short}")
    for switch, component in SWITCHES.items():
        assert command_of(Call(verb="build", arguments={"without": (component,)})).endswith(f"--no-{switch}")


def test_a_sentence_without_a_remedy_is_the_message() -> None:
    assert sentence(EmagError("leave out `without`, or `loras`")) == "leave out --no-t5, or --lora"
    assert in_words("``this`` is `Not` one, `nor this`") == "``this`` is `Not` one, `nor this`".replace(
        "``this``", "`--this`"
    )


def test_an_error_tells_its_parameters_and_python_what_to_call() -> None:
    error = InputError(
        "`width` and `height` and `width`",
        remedy=Call(
            verb="build",
            arguments={
                "output": Path("b"),
                "variant": Variant.EMAG,
                "overwrite": True,
                "loras": (Lora(path=Path("x"), scale=0.5),),
            },
        ),
    )
    assert error.parameters == ("width", "height")
    assert str(error) == (
        "`width` and `height` and `width`: "
        "emag_export.build(output='b', variant='emag', overwrite=True, loras=(('x', 0.5),))"
    )


def test_engines_are_compiled_by_the_command_that_is_named(tiny_bundle: Path) -> None:
    command = command_of(compile_call(Bundle(tiny_bundle), "tensorrt-rtx", ("sm86", "sm89")))
    params = parsed(command)
    assert (params["bundle"], params["backend"], params["targets"]) == (
        tiny_bundle,
        "tensorrt-rtx",
        ("sm86", "sm89"),
    )
    assert "--target" not in command_of(compile_call(Bundle(tiny_bundle), "tensorrt"))


def parsed(command: str) -> dict[str, Any]:
    """What the command line makes of a command."""
    program, verb, *words = shlex.split(command)
    assert program == "emag-export"
    return commands()[verb].make_context(verb, words).params


Rebuilt = tuple[str, Path, BuildOptions, bool]


@pytest.fixture
def rebuilt(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Rebuilt]:
    """Runs a build command up to where the model would be looked for: model, folder, options, overwrite."""
    seen: list[Rebuilt] = []

    def stop(model: str, output: Path, wanted: BuildOptions, *, overwrite: bool, compiled: bool) -> Bundle:
        seen.append((model, output, wanted, overwrite))
        raise InputError("far enough")

    monkeypatch.setattr("emag_export.cli.build._bundle", stop)

    def run(command: str) -> Rebuilt:
        done = CliRunner().invoke(main, [*shlex.split(command)[1:], "--backend", "none"])
        assert "far enough" in done.output, done.output
        return seen.pop()

    return run


def described(model: str, options: BuildOptions, folder: Path) -> Bundle:
    """The bundle that a build would write, without its graphs: ``bundle.json`` decides how it is rebuilt."""
    plan = identify(model, options)
    encoders = None
    if plan.encoders is not None:
        encoders = record_encoders(plan.encoders, folder, plan.contract, plan.geometry, plan.shared)
    manifest = Manifest(
        key=plan.key,
        contract=plan.contract,
        defaults=plan.defaults,
        geometry=plan.geometry,
        graphs=dict.fromkeys(plan.components, plan.contract.graph),
        precision_notes={},
        preview=None,
        source=plan.provenance,
        encoders=encoders,
        files={},
    )
    folder.mkdir()
    (folder / MANIFEST).write_text(dump_record(manifest))
    return Bundle(folder)


def test_the_tiny_bundle_is_rebuilt_as_itself(
    tiny_bundle: Path, rebuilt: Callable[[str], Rebuilt], tmp_path: Path
) -> None:
    bundle = Bundle(tiny_bundle)
    model, output, options, overwrite = rebuilt(command_of(bundle.rebuild()))
    assert (model, output, overwrite) == ("tiny-sd3", tiny_bundle, True)
    assert identify(model, options).key == bundle.key
    model, output, options, overwrite = rebuilt(command_of(bundle.rebuild(tmp_path / "a b")))
    assert (model, output, overwrite) == ("tiny-sd3", tmp_path / "a b", False)
    assert identify(model, options).key == bundle.key


@pytest.mark.parametrize(
    "keywords",
    [
        {},
        {"variant": "emag-t", "renorm": "none", "precision": "fp16", "state_precision": "fp16"},
        {"variant": "emag", "emag_candidates": [2, 4], "max_sequence_length": 7},
        {"without": ["text_encoder_3"]},
        {"components": [DENOISER, "vae_decoder"], "precision": "bf16"},
        {"weights_seed": 3},
        {"loras": [("{tmp}/a lora.safetensors", -0.25), "{tmp}/a lora.safetensors"]},
        {"encoders": "{tiny}"},
        {"encoders": "{tiny}", "without": ["text_encoder_3"], "variant": "emag"},
    ],
)
def test_every_option_survives_a_rebuild(
    keywords: dict[str, Any], tiny_bundle: Path, rebuilt: Callable[[str], Rebuilt], tmp_path: Path
) -> None:
    """As a command and as a call in Python, both as they are printed."""
    (tmp_path / "a lora.safetensors").write_bytes(b"identified by its hash, not read")
    filled = json.dumps(keywords).replace("{tmp}", str(tmp_path)).replace("{tiny}", str(tiny_bundle))
    words = json.loads(filled)
    words["loras"] = [tuple(lora) if isinstance(lora, list) else lora for lora in words.get("loras", ())]
    model = "sd3-narrow" if "weights_seed" in words else "tiny-sd3"
    bundle = described(model, build_options(**words), tmp_path / "b")
    assert bundle.key == identify(model, build_options(**words)).key

    call = bundle.rebuild()
    found, output, options, overwrite = rebuilt(command_of(call))
    assert (found, output, overwrite) == (model, bundle.path, True)
    assert identify(found, options).key == bundle.key

    typed = ast.parse(str(call), mode="eval").body
    assert isinstance(typed, ast.Call)
    arguments = {str(word.arg): ast.literal_eval(word.value) for word in typed.keywords}
    assert (arguments.pop("output"), arguments.pop("overwrite")) == (str(bundle.path), True)
    assert identify(arguments.pop("model"), build_options(**arguments)).key == bundle.key


def test_a_change_is_part_of_the_call(tiny_bundle: Path, rebuilt: Callable[[str], Rebuilt]) -> None:
    call = Bundle(tiny_bundle).rebuild(Path("b"), variant=Variant.EMAG_I)
    _, output, options, _ = rebuilt(command_of(call))
    assert (output, options.variant) == (Path("b"), Variant.EMAG_I)


WINDOWS = {
    "--beta": ("--emag-beta", "0.5"),
    "--start": ("--emag-start", "200"),
    "--delta": ("--emag-delta", "20"),
    "--stop": ("--emag-stop", "10"),
    "--strength": ("--emag-strength", "0.25"),
    "--blocks": ("--emag-blocks", "3-4"),
}
SIDES = {"--height": ("--height-range", "64"), "--width": ("--width-range", "32:64:96")}
OLD: dict[str, tuple[list[str], dict[str, tuple[str, str]]]] = {
    "build": (
        ["--model", "tiny-sd3"],
        {"--emag-layers": ("--emag-candidates", "3,4"), "--seed": ("--weights-seed", "1"), **SIDES},
    ),
    "compile": (["b", "--backend", "tensorrt-rtx"], SIDES),
    "generate": (["b", "-o", "a.png"], WINDOWS),
    "compare": (["b"], {**WINDOWS, "--reference": ("--source", "somewhere")}),
    "bench": (
        ["b"],
        {**WINDOWS, "--reference": ("--source", "somewhere"), "--images": ("--batch-size", "2")},
    ),
    "plan": (["b"], WINDOWS),
}
"""Command to what it needs, and to its old spellings with the new ones and a value."""


def test_every_old_spelling_is_in_the_table_and_free() -> None:
    """An option that has an old spelling today would be read as the new one."""
    for name, command in commands().items():
        renamed = getattr(command, "_renamed", {})
        assert renamed == {old: new for old, (new, _) in OLD.get(name, ([], {}))[1].items()}, name
        assert not renamed.keys() & options_of(command)
        assert options_of(command) >= set(renamed.values())


@pytest.mark.parametrize("name", OLD)
def test_old_spellings_work_with_a_hint(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the value as a word of its own, and behind an equals sign."""
    needed, spellings = OLD[name]
    seen: list[dict[str, Any]] = []

    def see(**params: Any) -> None:
        seen.append(params)

    monkeypatch.setattr(commands()[name], "callback", see)
    monkeypatch.setattr(status, "width", 200)
    today = [word for new, value in spellings.values() for word in (new, value)]
    before = [word for old, (_, value) in spellings.items() for word in (old, value)]
    joined = [f"{old}={value}" for old, (_, value) in spellings.items()]
    hints = [
        f"{old} is now {new}; the old name goes with the next version" for old, (new, _) in spellings.items()
    ]
    for words, said in ((today, []), (before, hints), (joined, hints)):
        done = CliRunner().invoke(main, [name, *needed, *words])
        assert done.exit_code == 0, done.output
        assert done.stderr.splitlines() == said
        assert done.stdout == ""
    assert seen[0] == seen[1] == seen[2]
    assert seen[0] != _defaults(name, needed), "the values arrived"


def _defaults(name: str, needed: list[str]) -> dict[str, Any]:
    return commands()[name].make_context(name, list(needed)).params


def test_a_hint_is_a_warning_so_quiet_silences_it(tiny_bundle: Path) -> None:
    words = ["plan", str(tiny_bundle), "--beta", "0.5"]
    said = CliRunner().invoke(main, words)
    assert "--beta is now --emag-beta" in said.stderr
    quiet = CliRunner().invoke(main, ["--quiet", *words])
    CliRunner().invoke(main, ["models"])  # the console is one for the process: as it was before
    assert (quiet.stderr, quiet.stdout) == ("", said.stdout)
    assert said.stdout == CliRunner().invoke(main, ["plan", str(tiny_bundle), "--emag-beta", "0.5"]).stdout


def test_errors_reach_the_terminal_in_its_words(tiny_bundle: Path, tmp_path: Path) -> None:
    missing = CliRunner().invoke(main, ["plan", str(tmp_path / "a b")])
    assert missing.exit_code == 4
    assert f"emag-export build --model tiny-sd3 -o '{tmp_path / 'a b'}'" in missing.stderr
    assert "emag_export." not in missing.stderr
    picture = [
        "generate",
        str(tiny_bundle),
        "--prompt",
        "x",
        "--variant",
        "emag",
        "-o",
        str(tmp_path / "a.png"),
    ]
    other = CliRunner().invoke(main, picture)
    assert other.exit_code == 2
    wanted = (
        "build it: emag-export build --model tiny-sd3 -o {0}-emag --variant emag --emag-candidates 3,4,5 "
    )
    assert wanted.format(tiny_bundle) in other.stderr
    assert "`" not in other.stderr
