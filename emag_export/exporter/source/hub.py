"""Download a model from the Hugging Face hub: only what an export reads, with errors that say what to do."""

import errno
from pathlib import Path

from emag_export.errors import ModelError
from emag_export.families import FAMILIES
from emag_export.families.weight_files import needed_files

__all__ = ["download"]


def download(hub_id: str, revision: str | None) -> Path:
    """Bring what an export reads of a hub model into the cache, and say where that is.

    Cache (``HF_HOME``), ``HF_HUB_OFFLINE`` and tokens are settings of the hub library.

    Args:
        hub_id: ``owner/name``.
        revision: Branch, tag or commit; None is the default branch.

    Returns:
        The snapshot's folder, named after its commit.

    Raises:
        ModelError: If there is no such model or revision, or it is gated, no diffusers pipeline, or out
            of reach.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    unreachable: tuple[type[Exception], ...] = (OfflineModeIsEnabled, *_transport_errors())
    page = f"https://huggingface.co/{hub_id}"
    try:
        try:
            names = HfApi().list_repo_files(hub_id, revision=revision)
        except (RepositoryNotFoundError, RevisionNotFoundError):
            raise
        except unreachable:
            # The cache may have it all the same; which weights are there shows when they are looked for.
            cached = ["model_index.json", "*/config.json"]
            return Path(
                snapshot_download(hub_id, revision=revision, local_files_only=True, allow_patterns=cached)
            )
        if "model_index.json" not in names:
            raise ModelError(f"{page} has no model_index.json, so it is no diffusers pipeline")
        wanted = ["model_index.json", *needed_files(names, hub_id, FAMILIES.values())]
        return Path(snapshot_download(hub_id, revision=revision, allow_patterns=wanted))
    except GatedRepoError as error:
        raise ModelError(
            f"{hub_id} is gated: accept its licence at {page}, then log in with: hf auth login"
        ) from error
    except RevisionNotFoundError as error:
        raise ModelError(f"{hub_id} has no revision {revision!r}; see {page}/tree/main") from error
    except RepositoryNotFoundError as error:
        raise ModelError(
            f"there is no model {hub_id} on the hub, or it is private: check {page}, "
            "or log in with: hf auth login"
        ) from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ModelError(
                f"the disk of the hub's cache is full, {hub_id} does not fit: free some space, or name "
                "another disk with HF_HOME"
            ) from error
        raise ModelError(
            f"{hub_id} is not in the local cache and the hub cannot be reached: "
            "check the network and HF_HUB_OFFLINE, or give a folder that diffusers saved as `model`"
        ) from error


def _transport_errors() -> tuple[type[Exception], ...]:
    """What the hub library's HTTP client raises without a connection; it has changed clients before."""
    from huggingface_hub.errors import HfHubHTTPError

    return tuple(
        base
        for base in HfHubHTTPError.__mro__
        if base.__name__ == "HTTPError" and issubclass(base, Exception)
    )
