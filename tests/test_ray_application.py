"""The Ray application before it runs: sizes, scaling, and the arguments of a ``serve.yaml``."""

import base64
import io
import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from emag_export.engines.config import EngineConfig
from emag_export.errors import InputError
from emag_export.records import parse_record
from emag_export.runtime.batching.options import BatchingOptions
from emag_export.runtime.pipeline import Pipeline
from emag_export.serve.ray.app import RayArguments, build_app
from emag_export.serve.ray.scaling import IMAGES, PLACES, replicas_for_images
from emag_export.serve.ray.sizing import Cluster, RayOptions, ReplicaPlan
from tests.serving import PROMPT

EXAMPLE = Path(__file__).parent.parent / "deploy/ray/serve.yaml"


def cluster(*nodes: tuple[int, int]) -> Cluster:
    """Of (cores, GPUs)."""
    rows = [{"Alive": True, "Resources": {"CPU": float(cpus), "GPU": float(gpus)}} for cpus, gpus in nodes]
    return Cluster.of([*rows, {"Alive": False, "Resources": {"CPU": 1000.0, "GPU": 1000.0}}])


TWO, BIG, GPUS = cluster((2, 0)), cluster((16, 0), (48, 0)), cluster((16, 4), (16, 4))
GPU = EngineConfig(device="cuda")


@pytest.mark.parametrize(
    ("where", "engine", "options", "models", "expected"),
    [  # (cores, GPUs, replicas)
        (TWO, EngineConfig(), RayOptions(), 1, (2, 0, 1)),
        (TWO, EngineConfig(), RayOptions(replicas=2), 1, (1, 0, 2)),
        (TWO, EngineConfig(threads=1), RayOptions(replicas=2), 1, (1, 0, 2)),
        (TWO, EngineConfig(), RayOptions(replicas=2), 2, (1, 0, 2)),
        (TWO, EngineConfig(), RayOptions(replicas="auto"), 1, (2, 0, 1)),
        (BIG, EngineConfig(), RayOptions(), 1, (48, 0, 1)),  # a replica lives on one node
        (BIG, EngineConfig(), RayOptions(replicas="auto"), 1, (4, 0, 16)),
        (BIG, EngineConfig(threads=8), RayOptions(replicas="auto"), 1, (8, 0, 8)),
        (BIG, EngineConfig(threads=8), RayOptions(replicas="auto", max_replicas=3), 1, (8, 0, 3)),
        (GPUS, GPU, RayOptions(), 1, (1, 1, 8)),
        (GPUS, GPU, RayOptions(), 2, (1, 1, 4)),
        (GPUS, GPU, RayOptions(gpus=0.5), 1, (1, 0.5, 16)),
        (GPUS, GPU, RayOptions(replicas="auto"), 2, (1, 1, 8)),
        (GPUS, EngineConfig(backend="tensorrt", threads=2), RayOptions(replicas=3), 1, (2, 1, 3)),
    ],
)
def test_a_cluster_is_shared_out(
    where: Cluster, engine: EngineConfig, options: RayOptions, models: int, expected: tuple[int, float, int]
) -> None:
    plan = ReplicaPlan.of(where, engine, options, models)
    assert (plan.cpus, plan.gpus, plan.replicas) == expected
    assert plan.auto == (options.replicas == "auto")


def test_the_engine_gets_the_cores_that_ray_reserves() -> None:
    plan = ReplicaPlan.of(BIG, EngineConfig(), RayOptions(replicas=8), 1)
    engine, batching = plan.of_engine(EngineConfig(), BatchingOptions())
    assert (plan.cpus, engine.threads, batching.threads) == (8, 8, 8)
    # PyTorch has no such option: Ray tells it by a variable of the environment.
    assert ReplicaPlan.of(BIG, EngineConfig(backend="torch"), RayOptions(replicas=8), 1).threads == 0


def test_what_ray_would_wait_for_without_end_is_refused() -> None:
    ReplicaPlan.of(TWO, EngineConfig(), RayOptions(replicas=2), 1).require_fit(TWO, 1)
    for models, options, engine in (
        (1, RayOptions(replicas=3), EngineConfig()),
        (2, RayOptions(replicas=2), EngineConfig()),
        (1, RayOptions(), EngineConfig(threads=4)),
    ):
        plan = ReplicaPlan.of(TWO, engine, options, models)
        with pytest.raises(InputError, match="2 cores") as caught:
            plan.require_fit(TWO, models)
        assert set(caught.value.parameters) == {"replicas", "threads"}
    auto = ReplicaPlan.of(BIG, EngineConfig(threads=20), RayOptions(replicas="auto", max_replicas=99), 1)
    auto.require_fit(BIG, 1)  # one fits, and more come with more nodes


def test_gpus_are_ray_s_to_choose() -> None:
    with pytest.raises(InputError, match="say cuda"):
        ReplicaPlan.of(GPUS, EngineConfig(device="cuda:1"), RayOptions(), 1)
    with pytest.raises(InputError, match="no node of the cluster"):
        ReplicaPlan.of(TWO, GPU, RayOptions(), 1)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"replicas": 0}, "`replicas` is 0"),
        ({"fronts": 0}, "`fronts` is 0"),
        ({"max_replicas": -1}, "`max_replicas` is -1"),
        ({"gpus": 0.0}, "0.0 GPUs"),
        ({"address": "ray://host:10001"}, "`ray_address` ray://host:10001"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=re.escape(said)):
        RayOptions(**options)


def context(images: list[float], places: list[float], waiting: float = 0.0, target: int = 1) -> Any:
    metrics = {IMAGES: dict(enumerate(images)), PLACES: dict(enumerate(places))}
    return SimpleNamespace(
        aggregated_metrics=metrics, total_queued_requests=waiting, target_num_replicas=target
    )


@pytest.mark.parametrize(
    ("images", "waiting", "wish"),
    [([0.0], 0, 0), ([8.0], 0, 1), ([8.5], 0, 1.0625), ([24.0], 0, 3), ([16, 0], 8, 3), ([0, 4], 0, 0.5)],
)
def test_there_are_as_many_replicas_as_images_fill(images: list[float], waiting: float, wish: float) -> None:
    found, state = replicas_for_images(context(images, [8.0] * len(images), waiting))
    assert (found, state) == (wish, {})


def test_without_reports_nothing_changes() -> None:
    assert replicas_for_images(context([], [], 5.0, target=3)) == (3, {})
    nothing = SimpleNamespace(aggregated_metrics=None, total_queued_requests=None, target_num_replicas=2)
    assert replicas_for_images(nothing) == (2, {})


def test_the_example_is_a_valid_application() -> None:
    (application,) = yaml.safe_load(EXAMPLE.read_text("utf-8"))["applications"]
    assert application["import_path"] == f"{build_app.__module__}:{build_app.__name__}"
    given = parse_record(RayArguments, application["args"], name="example", remedy="mend it")
    assert given.ray.replicas == "auto"
    assert given.bundles


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ({}, "bundles is missing"),
        ({"bundles": ["b"], "replica": 2}, "replica is no field"),
        ({"bundles": ["b"], "ray": {"replicas": "two"}}, "replicas"),
        ({"bundles": ["b"], "batching": {"policy": "luck"}}, "policy"),
        ({"bundles": ["b"]}, "no API key"),
        ({"bundles": ["b"], "server": {"api_keys": ["k" * 32]}}, "keys too"),
        ({"bundles": ["b"], "api_key_file": "/nowhere/keys"}, "cannot be read"),
        ({"bundles": ["b"], "ray": {"address": "auto"}}, "leave it out"),
    ],
)
def test_arguments_that_cannot_be_are_refused(
    args: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("EMAG_API_KEYS", raising=False)
    with pytest.raises(InputError, match=said):
        build_app(args)


_IN_THIS_PROCESS = """
import json, sys
from ray import serve
from emag_export.serve.ray.app import build_app
from emag_export.serve.ray.wire import HttpRequest

def ask(method, path, body=None):
    scope = {"type": "http", "method": method, "path": path, "query_string": b"", "headers": [
        (b"content-type", b"application/json")]}
    answer = front.ask.remote(HttpRequest(scope=scope, body=json.dumps(body).encode())).result()
    return answer.status, answer.body.decode()

front = serve.run(build_app(json.loads(sys.argv[1])), _local_testing_mode=True)
body = {"prompt": sys.argv[2], "seed": 1, "num_inference_steps": 4}
drawn = ask("POST", "/v1/images/generations", body)
streamed = ask("POST", "/v1/images/generations", {**body, "stream": True})
figures = ask("GET", "/metrics")
assert front.drain.remote().result() == 0
print(json.dumps([drawn, streamed, figures, ask("POST", "/v1/images/generations", body)]))
"""


@pytest.mark.ray
@pytest.mark.slow
def test_an_application_runs_in_one_process_without_a_cluster(tiny_bundle: Path) -> None:
    """Ray Serve's local testing mode, with its own handles between front and replica."""
    pytest.importorskip("ray")
    args = {"bundles": [str(tiny_bundle)], "server": {"insecure": True}, "engine": {"threads": 1}}
    args["batching"] = {"images_per_call": 4, "live_images": 4}
    # A process of its own: the type checks of these tests hide from Ray which methods are generators.
    command = [sys.executable, "-c", _IN_THIS_PROCESS, json.dumps(args), PROMPT]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    drawn, streamed, figures, refused = json.loads(done.stdout.splitlines()[-1])
    with Pipeline.open(tiny_bundle, threads=1) as pipeline:
        expected = np.asarray(pipeline.generate(PROMPT, seed=1, steps=4)[0], np.int16)
    assert drawn[0] == streamed[0] == figures[0] == 200
    (completed,) = re.findall(r"^event: image_generation.completed\ndata: (.*)$", streamed[1], re.MULTILINE)
    for text in (json.loads(drawn[1])["data"][0]["b64_json"], json.loads(completed)["b64_json"]):
        pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(text))), np.int16)
        assert np.abs(pixels - expected).max() <= 1  # of 255: images share calls
    assert re.search(r'^emag_requests_total\{model=.*outcome="completed".*\} 2.0$', figures[1], re.MULTILINE)
    assert (refused[0], json.loads(refused[1])["error"]["code"]) == (503, "draining")
