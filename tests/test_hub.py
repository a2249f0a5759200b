"""Models on the hub: what is downloaded, and what to do when it cannot be. No test uses the network."""

import importlib
import shutil
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import huggingface_hub.errors
import pytest

from emag_export.errors import ModelError
from emag_export.exporter.source.find import find_source
from emag_export.families import FAMILIES
from emag_export.families.weight_files import needed_files
from emag_export.tiny_sd3 import MODEL_DIR

# What the hub lists for SD3-medium and SD3.5-large, shortened.
REPOSITORY = [
    ".gitattributes",
    "LICENSE.md",
    "model_index.json",
    "sd3.5_large.safetensors",
    "text_encoders/t5xxl_fp16.safetensors",
    "scheduler/scheduler_config.json",
    "text_encoder/config.json",
    "text_encoder/model.fp16.safetensors",
    "text_encoder/model.safetensors",
    "text_encoder_3/config.json",
    "text_encoder_3/model-00001-of-00002.safetensors",
    "text_encoder_3/model-00002-of-00002.safetensors",
    "text_encoder_3/model.fp16-00001-of-00002.safetensors",
    "text_encoder_3/model.fp16-00002-of-00002.safetensors",
    "text_encoder_3/model.safetensors.index.fp16.json",
    "text_encoder_3/model.safetensors.index.json",
    "tokenizer_3/spiece.model",
    "tokenizer_3/tokenizer.json",
    "transformer/config.json",
    "transformer/diffusion_pytorch_model.bin",
    "transformer/diffusion_pytorch_model.fp16.safetensors",
    "vae/config.json",
    "vae/diffusion_pytorch_model.safetensors",
]
NEEDED = [
    "scheduler/scheduler_config.json",
    "text_encoder/config.json",
    "text_encoder/model.safetensors",
    "text_encoder_3/config.json",
    "text_encoder_3/model-00001-of-00002.safetensors",
    "text_encoder_3/model-00002-of-00002.safetensors",
    "text_encoder_3/model.safetensors.index.json",
    "tokenizer_3/spiece.model",
    "tokenizer_3/tokenizer.json",
    "transformer/config.json",
    "transformer/diffusion_pytorch_model.fp16.safetensors",
    "vae/config.json",
    "vae/diffusion_pytorch_model.safetensors",
]


def test_needed_files_of_a_published_repository() -> None:
    assert needed_files(REPOSITORY, "m", FAMILIES.values()) == NEEDED


class Hub:
    """Stands for the hub: lists ``REPOSITORY`` and records what is downloaded, or fails as it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        self.folder = folder
        self.calls: list[dict[str, Any]] = []
        monkeypatch.setattr("huggingface_hub.HfApi.list_repo_files", self.list_repo_files)
        monkeypatch.setattr("huggingface_hub.snapshot_download", self.snapshot_download)

    listing: Exception | None = None
    downloading: Exception | None = None
    names = REPOSITORY

    def list_repo_files(self, hub_id: str, *, revision: str | None) -> list[str]:
        if self.listing is not None:
            raise self.listing
        return self.names

    def snapshot_download(self, hub_id: str, **options: Any) -> str:
        self.calls.append(options)
        if self.downloading is not None:
            raise self.downloading
        return str(self.folder)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Hub:
    folder = tmp_path / ("c0ffee" * 7)[:40]
    shutil.copytree(MODEL_DIR, folder)
    return Hub(monkeypatch, folder)


def http_error(kind: str) -> Exception:
    errors: Any = huggingface_hub.errors
    return getattr(errors, kind)("refused", response=Mock(status_code=403, headers={}))  # type: ignore[no-any-return]


def test_only_needed_files_are_downloaded_and_the_commit_is_recorded(hub: Hub) -> None:
    source = find_source("owner/model", revision="v1")
    assert hub.calls == [{"revision": "v1", "allow_patterns": ["model_index.json", *NEEDED]}]
    assert source.revision == hub.folder.name


def test_pickled_repository_is_refused_before_the_download(hub: Hub) -> None:
    hub.names = ["model_index.json", "transformer/diffusion_pytorch_model.bin", "transformer/config.json"]
    with pytest.raises(ModelError, match=r"transformer in owner/model are pickled"):
        find_source("owner/model")
    hub.names = ["unet.safetensors"]
    with pytest.raises(ModelError, match=r"https://huggingface\.co/owner/model has no model_index\.json"):
        find_source("owner/model")
    assert hub.calls == []


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (
            "GatedRepoError",
            r"gated: accept its licence at https://huggingface\.co/o/m, then .* hf auth login",
        ),
        ("RepositoryNotFoundError", r"no model o/m on the hub, or it is private: .* hf auth login"),
        ("RevisionNotFoundError", r"o/m has no revision 'v9'; see https://huggingface\.co/o/m/tree/main"),
    ],
)
@pytest.mark.parametrize("when", ["listing", "downloading"])
def test_what_the_hub_refuses(kind: str, message: str, when: str, hub: Hub) -> None:
    setattr(hub, when, http_error(kind))
    with pytest.raises(ModelError, match=message):
        find_source("o/m", revision="v9")


def connect_error() -> Exception:
    """What the HTTP client of this version of the hub library raises without a network."""
    client = importlib.import_module(
        huggingface_hub.errors.HfHubHTTPError.__mro__[1].__module__.split(".")[0]
    )
    error: Exception = client.ConnectError("no route to host")
    return error


@pytest.mark.parametrize("offline", [True, False])
def test_cached_model_needs_no_network(offline: bool, hub: Hub) -> None:
    hub.listing = huggingface_hub.errors.OfflineModeIsEnabled() if offline else connect_error()
    assert find_source("o/m").revision == hub.folder.name
    assert hub.calls[0]["local_files_only"]
    (hub.folder / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(ModelError, match="vae has no weights"):
        find_source("o/m")


def test_no_network_and_no_cache(hub: Hub) -> None:
    hub.listing = connect_error()
    hub.downloading = huggingface_hub.errors.LocalEntryNotFoundError("nothing")
    with pytest.raises(ModelError, match="not in the local cache and the hub cannot be reached"):
        find_source("o/m")


def test_full_disk_names_the_cache(hub: Hub) -> None:
    hub.downloading = OSError(28, "No space left on device")
    with pytest.raises(ModelError, match=r"disk of the hub's cache is full.*HF_HOME"):
        find_source("o/m")
