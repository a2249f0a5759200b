"""Images and the Compose file: what they run exists, as nobody privileged, and stops in time."""

import asyncio
import json
import re
import subprocess
import sys
import threading
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import click
import httpx2
import pytest
import yaml

from emag_export.cli.serve import command
from emag_export.serve.app import create_app
from emag_export.serve.metrics import Metrics
from emag_export.serve.settings import ServerSettings
from tests.command_line import options_of
from tests.deployments import (
    DEPLOY,
    DOCKERFILES,
    LIVE,
    METRICS,
    READY,
    ROOT,
    TO_LEAVE,
    USER,
    command_lines,
    compose,
    only,
    server,
    stages,
    value_of,
)

SERVERS = ("cpu", "gpu")


def test_every_file_can_be_read() -> None:
    """A key that stands twice is an error for Kubernetes, and PyYAML would take the last."""

    class Strict(yaml.SafeLoader):
        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
            keys = [key.value for key, _ in node.value if key.value != "<<"]
            assert len(set(keys)) == len(keys), f"a key stands twice in {node.start_mark}"
            return super().construct_mapping(node, deep)

    files = list(DEPLOY.rglob("*.yaml"))
    assert len(files) > 15
    for path in files:
        assert all(yaml.load_all(path.read_text("utf-8"), Strict)), path
    for path in DEPLOY.rglob("*.json"):
        json.loads(path.read_text("utf-8"))


@pytest.mark.parametrize("place", command_lines())
def test_the_command_has_every_option(place: str) -> None:
    words = command_lines()[place]
    options = [word for word in words if word.startswith("--")]
    assert {word.partition("=")[0] for word in options} <= options_of(command)
    context = click.Context(command)
    for word in options:
        name, equals, value = word.partition("=")
        (option,) = (param for param in command.params if name in param.opts)
        if equals and not isinstance(option.type, (click.Path, click.File)):
            option.type_cast_value(context, value)


@pytest.mark.parametrize("name", DOCKERFILES)
def test_an_image_runs_as_nobody_and_carries_no_key(name: str) -> None:
    build, final = stages(name)
    assert only(final, "USER").value == f"{USER}:{USER}"
    assert only(final, "STOPSIGNAL").value == "SIGTERM"
    entry = only(final, "ENTRYPOINT")
    assert entry.value.startswith("[")
    assert entry.words[:2] == ["emag-export", "serve"]
    health = only(final, "HEALTHCHECK").value
    assert health.endswith('CMD ["python", "/opt/ready.py"]')
    # Only what the first stage made, and the health check: no compiler, no source, no cache.
    assert [one.value for one in final if one.word == "COPY"] == [
        "--from=build /opt/emag-export /opt/emag-export",
        "deploy/docker/ready.py /opt/ready.py",
    ]
    environment = {word for one in final if one.word == "ENV" for word in one.words}
    assert {"HF_HUB_OFFLINE=1", "ORT_DISABLE_TELEMETRY=1"} <= environment, (
        "a server talks to its clients alone"
    )
    for instruction in build + final:
        if instruction.word in ("ENV", "ARG"):
            names = re.findall(r"(\w+)=", instruction.value)
            assert not [one for one in names if re.search("KEY|TOKEN|SECRET|PASSWORD", one)], names


@pytest.mark.parametrize("name", DOCKERFILES)
def test_an_image_installs_extras_that_exist(name: str) -> None:
    extras = next(one for one in stages(name)[0] if one.value.startswith("EXTRAS=")).value.partition("=")[2]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert set(extras.split(",")) <= project["optional-dependencies"].keys()
    assert {"serve"} < set(extras.split(","))
    base = re.search(r"ARG BASE=python:(3\.\d+)-", (DEPLOY / "docker" / name).read_text("utf-8"))
    assert base
    pinned = (ROOT / "constraints.txt").read_text("utf-8").partition("\n")[0]
    assert f"Python {base[1]}," in pinned, "constraints.txt holds for another Python"


def test_the_build_sees_what_it_needs_and_nothing_else() -> None:
    lines = [line for line in (ROOT / ".dockerignore").read_text("utf-8").splitlines() if line[:1] != "#"]
    assert lines[0] == "*"
    let_in = {line[1:] for line in lines if line.startswith("!")}
    assert all((ROOT / name).exists() for name in let_in)
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["setuptools"]
    folders = {package.split(".")[0] for package in setuptools["packages"]} | {
        *setuptools["package-dir"].values()
    }
    needed = folders | {"pyproject.toml", "README.md", "LICENSE", "constraints.txt", "deploy/docker/ready.py"}
    assert let_in == needed
    for name in DOCKERFILES:
        copied = [
            one for stage in stages(name) for one in stage if one.word == "COPY" and "--from" not in one.value
        ]
        assert {source.rstrip("/") for one in copied for source in one.words[:-1]} == needed


@contextmanager
def answering(status: int) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status if self.path == READY else 404)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as listening:
        thread = threading.Thread(target=listening.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{listening.server_port}{READY}"
        listening.shutdown()
        thread.join()


@pytest.mark.parametrize(("status", "healthy"), [(200, True), (503, False)])
def test_the_health_check_tells_ready_from_not_ready(status: int, healthy: bool) -> None:
    """Also where the environment names a proxy, which would answer for another machine."""
    script = DEPLOY / "docker" / "ready.py"
    environment = {"http_proxy": "http://127.0.0.1:9", "HTTP_PROXY": "http://127.0.0.1:9"}
    with answering(status) as url:
        command = [sys.executable, "-I", str(script), url]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode == 0) == healthy, done.stderr
    assert "Traceback" not in done.stderr
    if healthy:
        refused = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert refused.returncode == 1, "nobody listens any more"


def test_the_health_check_asks_the_port_that_the_image_serves() -> None:
    (url,) = re.findall(r'"(http://[^"]+)"', (DEPLOY / "docker" / "ready.py").read_text("utf-8"))
    for name in DOCKERFILES:
        entry = only(stages(name)[-1], "ENTRYPOINT").words
        port = entry[entry.index("--port") + 1]
        assert url == f"http://127.0.0.1:{port}{READY}"
        assert only(stages(name)[-1], "EXPOSE").value == port
    assert server()["ports"] == [{"name": "http", "containerPort": int(port)}]
    assert [compose()["services"][name]["ports"] for name in SERVERS] == [[f"127.0.0.1:8000:{port}"]] * 2


@pytest.mark.parametrize("name", compose()["services"])
def test_a_service_has_no_more_rights_than_it_needs(name: str) -> None:
    service = compose()["services"][name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert int(service["user"].partition(":")[0]) > 0
    assert not {"privileged", "network_mode", "pid", "cap_add"} & service.keys()
    assert all(port.startswith("127.0.0.1:") for port in service["ports"]), "public unless asked for"
    assert service["healthcheck"]["test"][0] == "CMD"
    assert re.search(r":[\w.]+$", service["image"])
    assert not service["image"].endswith(":latest")


@pytest.mark.parametrize("name", SERVERS)
def test_a_served_bundle_is_read_only_and_served_to_the_end(name: str) -> None:
    service = compose()["services"][name]
    assert service["user"] == f"{USER}:{USER}"
    (bundles,) = service["volumes"]
    assert bundles["target"] == "/bundles"
    assert bundles["read_only"] is True
    assert service["command"][0].startswith("/bundles/")
    drain = int(value_of(service["command"], "--drain-timeout"))
    assert drain + TO_LEAVE < int(service["stop_grace_period"].removesuffix("s"))
    (secret,) = service["secrets"]
    assert value_of(service["command"], "--api-key-file") == f"/run/secrets/{secret}"
    assert ("profiles" in service) == (name == "gpu")


def test_compose_mounts_files_that_exist_and_keys_that_git_ignores() -> None:
    everything = compose()
    for service in everything["services"].values():
        for mount in service.get("volumes", ()):
            if isinstance(mount, str) and mount.startswith("./"):
                source, _, mode = mount.split(":")
                assert (DEPLOY / source).exists(), source
                assert mode == "ro"
        if "build" in service:
            assert (ROOT / service["build"]["dockerfile"]).exists()
    ignored = (DEPLOY / ".gitignore").read_text("utf-8").splitlines()
    for secret in everything["secrets"].values():
        assert secret["file"].startswith("./secrets/")
    assert "/secrets/" in ignored


def test_the_server_answers_probes_without_a_key_and_prometheus_with_one() -> None:
    """An orchestrator has no key to show. A server that is about to end lives, and gets no new requests."""
    key = "k" * 32
    app = create_app([], ServerSettings(api_keys=(key,)), Metrics())

    async def statuses() -> list[int]:
        shown = {"Authorization": f"Bearer {key}"}
        transport = httpx2.ASGITransport(app=app)
        async with httpx2.AsyncClient(transport=transport, base_url="http://server") as client:
            answers = [await client.get(path) for path in (LIVE, READY, METRICS)]
            answers.append(await client.get(METRICS, headers=shown))
        return [answer.status_code for answer in answers]

    assert asyncio.run(statuses()) == [200, 200, 401, 200]
    app.state.server.drain()
    assert asyncio.run(statuses()) == [200, 503, 401, 200]


def test_linked_files_exist() -> None:
    readme = (DEPLOY / "README.md").read_text("utf-8")
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", readme)
    assert links
    assert [link for link in links if not (DEPLOY / link).exists()] == []
