"""Kubernetes manifests: pods without privileges, probes that exist, and names that fit together."""

import shutil
import subprocess

import pytest
import yaml

from tests.deployments import (
    KUBERNETES,
    LIVE,
    METRICS,
    READY,
    TO_LEAVE,
    USER,
    command_lines,
    manifest,
    pod,
    server,
    value_of,
)

SELECTOR = {"app.kubernetes.io/name": "emag-export"}


def test_a_pod_runs_as_nobody_with_a_read_only_file_system() -> None:
    filling = yaml.safe_load((KUBERNETES / "fill-bundles.yaml").read_text("utf-8"))["spec"]
    for spec in (pod(), filling):
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["runAsUser"] == USER
        assert spec["automountServiceAccountToken"] is False
        (container,) = spec["containers"]
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert {"requests", "limits"} <= container["resources"].keys()


def test_a_pod_mounts_bundles_read_only() -> None:
    volumes = {volume["name"]: volume for volume in pod()["volumes"]}
    mounts = {mount["name"]: mount for mount in server()["volumeMounts"]}
    assert volumes.keys() == mounts.keys()
    assert mounts["bundles"] == {"name": "bundles", "mountPath": "/bundles", "readOnly": True}
    claim = volumes["bundles"]["persistentVolumeClaim"]
    assert claim == {"claimName": manifest("bundles")["metadata"]["name"], "readOnly": True}
    assert server()["args"][0].startswith("/bundles/")
    assert [name for name, mount in mounts.items() if not mount.get("readOnly")] == ["tmp"]


def test_a_pod_is_given_time_to_drain() -> None:
    before = int(server()["lifecycle"]["preStop"]["exec"]["command"][1])
    drain = int(value_of(server()["args"], "--drain-timeout"))
    assert before + drain + TO_LEAVE < pod()["terminationGracePeriodSeconds"]


def test_probes_ask_routes_that_exist() -> None:
    asked = {
        name: server()[f"{name}Probe"]["httpGet"]["path"] for name in ("startup", "readiness", "liveness")
    }
    assert asked == {"startup": READY, "readiness": READY, "liveness": LIVE}
    (scraped,) = manifest("podmonitor")["spec"]["podMetricsEndpoints"]
    assert scraped["path"] == METRICS
    ports = {port["name"] for port in server()["ports"]}
    assert {scraped["port"], *(server()[f"{name}Probe"]["httpGet"]["port"] for name in asked)} <= ports
    (service,) = manifest("service")["spec"]["ports"]
    assert service["targetPort"] in ports


def test_threads_are_the_cores_of_the_limit() -> None:
    cores = server()["resources"]["limits"]["cpu"]
    assert server()["resources"]["requests"]["cpu"] == cores
    assert value_of(server()["args"], "--threads") == cores
    assert {"name": "OMP_NUM_THREADS", "value": cores} in server()["env"]


def test_everything_selects_the_pods_of_the_deployment() -> None:
    assert manifest("deployment")["spec"]["template"]["metadata"]["labels"] == SELECTOR
    for name in ("deployment", "poddisruptionbudget", "podmonitor"):
        assert manifest(name)["spec"]["selector"]["matchLabels"] == SELECTOR, name
    assert manifest("service")["spec"]["selector"] == SELECTOR
    assert manifest("networkpolicy")["spec"]["podSelector"]["matchLabels"] == SELECTOR
    scaled = manifest("horizontalpodautoscaler")["spec"]
    assert scaled["scaleTargetRef"]["name"] == manifest("deployment")["metadata"]["name"]
    target = int(scaled["metrics"][0]["pods"]["target"]["averageValue"])
    assert target < int(value_of(server()["args"], "--max-queue")), "it would refuse before it grows"


def test_the_example_of_the_secret_has_the_keys_and_nobody_applies_it() -> None:
    example = yaml.safe_load((KUBERNETES / "secret.example.yaml").read_text("utf-8"))
    values = example["stringData"]
    (mounted,) = (volume["secret"] for volume in pod()["volumes"] if "secret" in volume)
    (endpoint,) = manifest("podmonitor")["spec"]["podMetricsEndpoints"]
    shown = endpoint["authorization"]["credentials"]
    assert {mounted["secretName"], shown["name"]} == {example["metadata"]["name"]}
    assert {*(item["key"] for item in mounted["items"]), shown["key"]} == values.keys()
    assert values["metrics-key"] in values["api-keys"].splitlines()
    (mount,) = (one for one in server()["volumeMounts"] if one["name"] == "keys")
    (item,) = mounted["items"]
    assert value_of(server()["args"], "--api-key-file") == f"{mount['mountPath']}/{item['path']}"
    resources = manifest("kustomization")["resources"]
    assert all((KUBERNETES / "base" / name).exists() for name in resources)
    others = {path.name for path in (KUBERNETES / "base").glob("*.yaml")} - {*resources}
    assert others == {"kustomization.yaml"}


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")
@pytest.mark.parametrize(("folder", "image"), [("cpu", "emag-export:cpu"), ("gpu", "emag-export:cuda")])
def test_kustomize_builds_the_manifests(folder: str, image: str) -> None:
    command = ["kubectl", "kustomize", str(KUBERNETES / folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = {document["kind"]: document for document in yaml.safe_load_all(done.stdout)}
    spaces = {one["metadata"].get("namespace", one["metadata"]["name"]) for one in found.values()}
    assert spaces == {"emag-export"}
    (container,) = found["Deployment"]["spec"]["template"]["spec"]["containers"]
    assert container["image"] == image
    assert container["args"] == command_lines()["kubernetes gpu" if folder == "gpu" else "kubernetes"]
    assert container["resources"]["limits"].get("nvidia.com/gpu") == ("1" if folder == "gpu" else None)
    assert container["securityContext"] == server()["securityContext"]
