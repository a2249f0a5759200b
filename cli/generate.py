"""``emag-export generate``."""

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import click
from cloup import option

from emag_export.bundle import Bundle
from emag_export.cli.console import out, print_json, progress_bar, quiet_libraries, status
from emag_export.cli.grid import SHEET, Cell, grid_cells, write_sheet
from emag_export.cli.options import (
    bundle_argument,
    cli_command,
    engine_config,
    engine_options,
    group,
    json_option,
    variant_option,
)
from emag_export.cli.sampling import RENAMED, keywords_of, read_prompts, request_of, sampling_options
from emag_export.engines.config import EngineConfig
from emag_export.errors import BundleError, InputError
from emag_export.kinds import Variant
from emag_export.runtime.request import GenerationRequest, check_prompts, plan_request

__all__ = ["command", "generate_all"]


@cli_command("generate", renamed=RENAMED)
@bundle_argument
@group(
    "Picture",
    option("--prompt", "prompts", multiple=True, help="What to draw; repeatable."),
    option("--prompt-file", type=click.Path(path_type=Path), help="One prompt per line."),
    option("--negative-prompt", help="What to stay away from."),
    option(
        "--seed", type=int, help="Seed of each prompt's first picture; the next ones count up. Default 0."
    ),
    option("--images", type=click.IntRange(1), default=1, show_default=True, help="Pictures per prompt."),
    option(
        "--like",
        type=click.Path(path_type=Path),
        help="Take all parameters from this PNG; options change them.",
    ),
    variant_option("Refuse a bundle of another variant."),
)
@sampling_options
@engine_options()
@group(
    "Output",
    option(
        "-o",
        "--output",
        type=click.Path(path_type=Path),
        required=True,
        help="PNG file, or folder for several.",
    ),
    option(
        "--batch-size", type=click.IntRange(1), default=4, show_default=True, help="Pictures per engine call."
    ),
    option(
        "--previews",
        type=click.IntRange(1),
        metavar="N",
        help="Every N steps, write what is seen so far into the folder previews/ beside the picture.",
    ),
    option(
        "--grid",
        metavar="METHODS",
        help="Draw every picture by each of these, as cfg,emag,emag+apg (all: eval --help), and lay them out "
        "in OUTPUT/grid.png.",
    ),
    option("--overwrite", is_flag=True, help="Replace pictures that were made from other parameters."),
    json_option("Print a record per picture, for scripts."),
)
def command(bundle: Path, output: Path, like: Path | None, variant: Variant | None, **options: Any) -> None:
    """Make pictures from prompts with a bundle.

    Every PNG remembers its parameters. Pictures that are already there with the same parameters are
    kept, so an interrupted run continues with the same command.
    """
    opened = Bundle(bundle)
    requests = _requests(opened, like, variant, options)
    cells: list[Cell] = []
    if options["grid"] is not None:
        if output.suffix.lower() == ".png":
            raise InputError(f"{output} is a picture, and a grid is a folder of them; give one as `output`")
        scales = (options["guidance_scale"], options["emag_scale"])
        cells = grid_cells(opened, requests, options["grid"], scales)
        requests = [request for _, request, _ in cells]
    for request in requests:
        check_prompts(opened, request)
    for request in {request.guidance.name: request for request in requests}.values():
        plan_request(opened, request)
    paths = [output / path for *_, path in cells] or _targets(output, requests)
    todo = _unfinished(output, paths, requests, opened, overwrite=options["overwrite"])
    if todo:
        with status.status("loading engines …"):
            quiet_libraries()
        generate_all(
            opened,
            [requests[i] for i in todo],
            [paths[i] for i in todo],
            engine_config(options),
            batch_size=options["batch_size"],
            previews=options["previews"],
        )
    drawn = write_sheet(cells, output) if cells else None
    if options["as_json"]:
        print_json([{"path": str(p), **asdict(r)} for p, r in zip(paths, requests, strict=True)])
        return
    for index, path in enumerate(paths):
        there = "" if index in todo else " (already there)"
        out.print(f"{path}{there}", markup=False, soft_wrap=True)
    if drawn is not None:
        out.print(str(drawn), markup=False, soft_wrap=True)


def _requests(
    bundle: Bundle, like: Path | None, variant: Variant | None, options: dict[str, Any]
) -> list[GenerationRequest]:
    from emag_export.runtime.keywords import amended
    from emag_export.runtime.pictures.metadata import read_picture_record

    bundle.require_variant(variant)
    if like is None:
        prompts = read_prompts(options["prompts"], options["prompt_file"])
        bases = [request_of(bundle, prompt, options) for prompt in prompts]
    else:
        record = read_picture_record(like)
        bundle.require_variant(record.variant)
        if not record.same_weights(bundle):
            names = ", ".join(lora.name for lora in record.loras)
            merged = f" with {names}" if names else ""
            status.print(
                f"warning: {like} was made with other weights ({record.model}{merged}); the picture will "
                "differ",
                style="yellow",
                markup=False,
            )
        base = amended(record.request, keywords_of(options))
        given = options["prompts"] or options["prompt_file"]
        prompts = read_prompts(options["prompts"], options["prompt_file"]) if given else [base.prompt]
        bases = [replace(base, prompt=prompt) for prompt in prompts]
    return [replace(base, seed=base.seed + offset) for base in bases for offset in range(options["images"])]


def _targets(output: Path, requests: Sequence[GenerationRequest]) -> list[Path]:
    if output.suffix.lower() == ".png":
        if len(requests) > 1:
            raise InputError(f"{len(requests)} pictures do not fit into {output}; give a folder as `output`")
        return [output]
    if output.is_file():
        raise InputError(f"{output} is a file and no .png; give a folder, or a name that ends in .png")
    return [output / f"{index:04d}-seed{request.seed}.png" for index, request in enumerate(requests)]


def _unfinished(
    output: Path,
    paths: Sequence[Path],
    requests: Sequence[GenerationRequest],
    bundle: Bundle,
    *,
    overwrite: bool,
) -> list[int]:
    """Indices that are still to be made, after refusing to touch anything that is not ours to replace."""
    import os

    from emag_export.runtime.pictures.metadata import read_picture_record
    from emag_export.runtime.pictures.preview import PREVIEWS

    folder = output if output.suffix.lower() != ".png" else output.parent
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise InputError(f"{existing} cannot be written to; give another place as `output`")
    if output.is_dir() and not overwrite:
        expected = {*paths, *(path.parent for path in paths), output / PREVIEWS, output / SHEET}
        if foreign := [path for path in sorted(output.iterdir()) if path not in expected]:
            raise InputError(
                f"{output} is not empty ({foreign[0].name}); give another folder, or add `overwrite`"
            )
    todo = []
    for index, (path, request) in enumerate(zip(paths, requests, strict=True)):
        if not path.exists():
            todo.append(index)
            continue
        try:
            same = read_picture_record(path).made_by(bundle, request)
        except (InputError, BundleError):
            same = False
        if not same:
            if not overwrite:
                raise InputError(
                    f"{path} exists and was made otherwise; choose another name, or add `overwrite`"
                )
            todo.append(index)
    return todo


def generate_all(
    bundle: Bundle,
    requests: Sequence[GenerationRequest],
    paths: Sequence[Path],
    engine: EngineConfig,
    *,
    batch_size: int,
    previews: int | None = None,
) -> None:
    """Make pictures batch by batch, saving each batch as soon as it is done.

    Args:
        bundle: To run.
        requests: Those that differ in prompt, negative prompt and seed only share calls.
        paths: One PNG per request.
        engine: How components are opened.
        batch_size: Pictures per engine call.
        previews: Write previews after every so many steps.
    """
    from emag_export.engines.registry import open_backend
    from emag_export.runtime.pictures.metadata import make_picture, save_picture
    from emag_export.runtime.pictures.preview import preview_saver
    from emag_export.runtime.pipeline import Pipeline

    save_previews = preview_saver(bundle, previews)
    batches = _batches(requests, batch_size)
    with (
        Pipeline(bundle, open_backend(engine, bundle)) as pipeline,
        progress_bar("generating", sum(requests[batch.start].steps for batch in batches)) as progress,
    ):
        for batch in batches:
            prepared = pipeline.prepare(requests[batch])
            for request, cut in zip(prepared.requests, prepared.cut, strict=True):
                if cut:
                    status.print(
                        f"warning: the prompt is too long: {cut.describe()} (of “{request.prompt}”)",
                        style="yellow",
                        markup=False,
                    )
            latents = prepared.latents
            for step in pipeline.denoise(prepared):
                save_previews(step, paths[batch])
                latents = step.latents
                progress.advance(progress.task_ids[0])
            pictures = pipeline.decode(latents)
            for pixels, request, path in zip(pictures, prepared.requests, paths[batch], strict=True):
                save_picture(make_picture(pixels, bundle, request, pipeline.denoiser.name), path)


def _batches(requests: Sequence[GenerationRequest], size: int) -> list[slice]:
    """Neighbours that share calls, so many at a time."""
    found: list[slice] = []
    own = ("prompt", "negative_prompt", "seed")
    alike = [
        {name: value for name, value in vars(request).items() if name not in own} for request in requests
    ]
    for index, request in enumerate(alike):
        last = found[-1] if found else None
        if last is not None and index - last.start < size and alike[last.start] == request:
            found[-1] = slice(last.start, index + 1)
        else:
            found.append(slice(index, index + 1))
    return found
