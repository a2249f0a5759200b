"""The library speaks Python, the command line its own words: options and commands, of the same errors."""

import ast
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import emag_export
from emag_export.api import BuildKeywords, CompileKeywords
from emag_export.bundle import Bundle
from emag_export.cli.main import main
from emag_export.cli.words import command_of, in_words, option_of, sentence
from emag_export.contract import PRECISIONS
from emag_export.engines.config import EngineKeywords
from emag_export.engines.tensorrt.build import compile_call
from emag_export.errors import PARAMETER, Call, EmagError, InputError
from emag_export.families import SWITCHES
from emag_export.kinds import Variant
from emag_export.options import Lora
from emag_export.runtime.keywords import SAMPLING_KEYWORDS
from tests.command_line import commands, options_of, parsed

ROOT = Path(emag_export.__file__).resolve().parent.parent
ABOVE = ("cli/", "emag_export/tiny_dit/", "emag_export/tiny_sd3/", "emag_export/evaluation/extractor/")
"""The command line itself, and the scripts that trained the small networks and have options of their own."""
PYTHON_ONLY = ("noise",)
"""Parameters without an option: what adds noise to a single step is a matter of whoever calls ``step``."""


def sources() -> list[Path]:
    """The library below the command line; each file once, as the package has links to folders beside it."""
    folders = [ROOT / name for name in ("emag_export", "engines", "runtime")]
    found = {path.resolve() for folder in folders for path in folder.rglob("*.py")}
    return sorted(path for path in found if not path.relative_to(ROOT).as_posix().startswith(ABOVE))


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
