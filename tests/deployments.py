"""What stands in deploy/: Dockerfiles as instructions, Compose and Kubernetes files as data."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parent.parent
DEPLOY = ROOT / "deploy"
KUBERNETES = DEPLOY / "kubernetes"
USER = 10001
"""Of the images; volumes and Kubernetes know users by their number."""
LIVE, READY, METRICS = "/health/live", "/health/ready", "/metrics"
TO_LEAVE = 10
"""Seconds that a drained server takes at most for its last answers and to close connections."""
DOCKERFILES = ("Dockerfile.cpu", "Dockerfile.cuda")


@dataclass(frozen=True)
class Instruction:
    """One of a Dockerfile, its lines joined."""

    word: str
    value: str

    @property
    def words(self) -> list[str]:
        """Of the exec form, or split at spaces, without flags."""
        if self.value.startswith("["):
            found: list[str] = json.loads(self.value)
            return found
        return [word for word in self.value.split() if not word.startswith("--")]


def stages(name: str) -> list[list[Instruction]]:
    """Instructions of a Dockerfile by stage; what stands before the first FROM is left out."""
    text = re.sub(r"^#.*\n", "", (DEPLOY / "docker" / name).read_text("utf-8"), flags=re.MULTILINE)
    found: list[list[Instruction]] = []
    for line in text.replace("\\\n", " ").splitlines():
        word, _, value = line.strip().partition(" ")
        if word == "FROM":
            found.append([])
        if word and found:
            found[-1].append(Instruction(word, value.strip()))
    return found


def only(stage: list[Instruction], word: str) -> Instruction:
    """The one instruction of its kind."""
    (found,) = (instruction for instruction in stage if instruction.word == word)
    return found


def compose() -> dict[str, Any]:
    """The Compose file, its variables at their defaults."""
    text = (DEPLOY / "compose.yaml").read_text("utf-8")
    filled = re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", text)
    assert "${" not in filled, "a variable without a default"
    found: dict[str, Any] = yaml.safe_load(filled)
    return found


def manifest(name: str, folder: str = "base") -> dict[str, Any]:
    """A file of the Kubernetes folder."""
    found: dict[str, Any] = yaml.safe_load((KUBERNETES / folder / f"{name}.yaml").read_text("utf-8"))
    return found


def pod() -> dict[str, Any]:
    """The pod that the deployment makes."""
    found: dict[str, Any] = manifest("deployment")["spec"]["template"]["spec"]
    return found


def server() -> dict[str, Any]:
    """Its one container."""
    (found,) = pod()["containers"]
    container: dict[str, Any] = found
    return container


def gpu_arguments() -> list[str]:
    """What the overlay for GPUs appends to the command line."""
    patches = [entry["patch"] for entry in manifest("kustomization", "gpu")["patches"] if "patch" in entry]
    changes = [change for patch in patches for change in yaml.safe_load(patch)]
    return [change["value"] for change in changes if change["path"].endswith("/args/-")]


def command_lines() -> dict[str, list[str]]:
    """Everything that follows ``emag-export serve``, by where it stands."""
    found = {name: only(stages(name)[-1], "ENTRYPOINT").words[2:] for name in DOCKERFILES}
    services = compose()["services"]
    found |= {f"compose {name}": services[name]["command"] for name in ("cpu", "gpu")}
    return found | {"kubernetes": server()["args"], "kubernetes gpu": server()["args"] + gpu_arguments()}


def value_of(words: list[str], option: str) -> str:
    """Of ``--option=value``."""
    (found,) = (word.partition("=")[2] for word in words if word.startswith(f"{option}="))
    return found
