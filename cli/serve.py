"""``emag-export serve``."""

import os
from pathlib import Path
from typing import Any

import click
from cloup import argument, option

from emag_export.cli.console import progress_bar, quiet_libraries, status
from emag_export.cli.options import cli_command, engine_config, engine_options, group
from emag_export.cli.progress import bar_reporter
from emag_export.errors import InputError
from emag_export.packages import require_packages

__all__ = ["command"]

_SETTINGS = (
    *("host", "port", "insecure", "max_images", "max_steps", "max_pixels", "max_prompt", "max_body"),
    *("max_requests", "max_streams", "deadline", "drain_timeout", "log_format", "log_prompts"),
)
_PACKAGES = ("fastapi", "uvicorn", "prometheus_client")


class _Replicas(click.ParamType["int | str"]):
    """A number, or ``auto``."""

    name = "N|auto"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | str:
        """As it is given to Ray."""
        if value == "auto" or isinstance(value, int):
            return value  # type: ignore[no-any-return]
        try:
            return int(value)
        except ValueError:
            self.fail(f"{value!r} is no number of replicas; give one, or auto", param, ctx)


@cli_command("serve")
@argument("bundles", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="BUNDLE...")
@group(
    "Address",
    option("--host", default="127.0.0.1", show_default=True, help="Address to listen at."),
    option("--port", type=int, default=8000, show_default=True, help="0 takes a free one."),
    option(
        "--api-key-file",
        type=click.Path(path_type=Path),
        help="Keys, one a line; whoever asks shows one. Or the variable EMAG_API_KEYS, with commas.",
    ),
    option("--insecure", is_flag=True, help="Listen on a public address without keys."),
)
@group(
    "Limits",
    option("--max-queue", type=int, default=64, show_default=True, help="Pictures that may wait."),
    option("--max-requests", type=int, default=256, show_default=True, help="Requests at the same time."),
    option("--max-streams", type=int, default=64, show_default=True, help="Streams at the same time."),
    option("--max-images", type=int, default=10, show_default=True, help="Pictures of one request."),
    option("--max-steps", type=int, default=100, show_default=True, help="Steps of one picture."),
    option("--max-pixels", type=int, help="Of one picture. Default: four times the bundle's own."),
    option("--max-prompt", type=int, default=4000, show_default=True, help="Characters of a prompt."),
    option("--max-body", type=int, default=1 << 20, show_default=True, help="Bytes of a request."),
    option("--deadline", type=float, default=300.0, show_default=True, help="Seconds for a picture."),
    option(
        "--drain-timeout",
        type=float,
        default=30.0,
        show_default=True,
        help="Seconds to finish what is there, once told to end.",
    ),
)
@group(
    "Sharing calls",
    option(
        "--images-per-call",
        type=int,
        help="Pictures that share an engine call, at most. Default: as many as pay, which is measured.",
    ),
    option(
        "--live-images",
        type=int,
        help="Pictures that are denoised at the same time; beyond a call they take turns.",
    ),
    option(
        "--policy",
        type=click.Choice(["fifo", "priority", "deadline"]),
        default="fifo",
        show_default=True,
        help="Who comes first of those that wait.",
    ),
)
@group(
    "Ray",
    option("--ray", is_flag=True, help="Serve from replicas on a Ray cluster."),
    option(
        "--replicas",
        type=_Replicas(),
        help="Of every bundle there; auto follows its queue. Default: one per GPU, or one on the CPU.",
    ),
    option(
        "--ray-address",
        metavar="ADDRESS",
        help="Of a cluster that runs: auto or HOST:6379. Default: one on this machine, as long as it serves.",
    ),
)
@group(
    "Logs",
    option(
        "--log-format",
        type=click.Choice(["text", "json"]),
        default="text",
        show_default=True,
        help="Of lines.",
    ),
    option("--log-prompts", is_flag=True, help="Log what people ask for."),
)
@engine_options()
def command(bundles: tuple[Path, ...], **options: Any) -> None:
    """Serve bundles over HTTP: the OpenAI Images API, and a page to play with.

    Requests share engine calls step by step. SIGTERM and Ctrl-C finish what is there.
    """
    require_packages(*_PACKAGES, *(("ray",) if options["ray"] else ()), purpose="serving")
    if not options["ray"] and (given := [name for name in ("replicas", "ray_address") if options[name]]):
        raise InputError(f"`{given[0]}` is about replicas on Ray; give `ray` with it, or leave it out")
    from emag_export.serve.settings import ServerSettings, read_keys

    keys, warning = read_keys(options["api_key_file"], os.environ)
    if warning is not None:
        status.print(f"warning: {warning}", style="yellow", markup=False)
    settings = ServerSettings(api_keys=keys, **{name: options[name] for name in _SETTINGS})
    # With PyTorch behind them: what is refused above is refused at once.
    from emag_export.runtime.batching.options import BatchingOptions
    from emag_export.serve.run import serve

    engine = engine_config(options)
    batching = BatchingOptions(
        images_per_call=options["images_per_call"],
        live_images=options["live_images"],
        policy=options["policy"],
        queue_images=options["max_queue"],
        threads=engine.threads,
    )
    quiet_libraries()
    with progress_bar("starting", None) as bar:
        report = bar_reporter(bar)

        def ready(url: str) -> None:
            bar.stop()
            shown = ", ".join(path.resolve().name for path in bundles)
            status.print(f"serving {shown} at {url}", markup=False, soft_wrap=True)

        if options["ray"]:
            from emag_export.serve.ray.app import serve_on_ray
            from emag_export.serve.ray.sizing import RayOptions

            ray = RayOptions(replicas=options["replicas"], address=options["ray_address"])
            serve_on_ray(bundles, settings, engine, batching, ray, ready)
        else:
            serve(bundles, settings, engine, batching, progress=report, ready=ready)
