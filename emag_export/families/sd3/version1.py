"""Bundles of format version 1, which were all of SD3, as version 2."""

from typing import Any

__all__ = ["upgrade"]


def upgrade(data: dict[str, Any]) -> dict[str, Any]:
    """``bundle.json`` of version 1 as plain data, to version 2.

    Raises:
        KeyError: If a field of version 1 is missing.
    """
    contract, geometry, defaults = (dict(data[name]) for name in ("contract", "geometry", "defaults"))
    defaults["candidates"] = defaults.pop("emag_layers")
    text = geometry["clip_tokens"] + defaults["max_sequence_length"]
    kept = {name: value for name, value in data.items() if name != "arguments"}
    return {
        **kept,
        "format_version": 2,
        "contract": _contract(contract),
        "defaults": defaults,
        "geometry": {
            "pixels_per_latent": geometry["vae_factor"],
            "text": {"least": geometry["clip_tokens"], "usual": text, "most": text},
        },
    }


def _contract(old: dict[str, Any]) -> dict[str, Any]:
    patch, side = old.pop("patch_size"), old.pop("max_grid")
    text, pooled, channels = old.pop("text_dim"), old.pop("pooled_dim"), old.pop("in_channels")
    precision = old["precision"]

    def spec(name: str, *dims: int | str) -> dict[str, Any]:
        return {"name": name, "dtype": precision, "dims": ["trunk_rows", *dims]}

    return {
        **old,
        "latents": [channels, f"{patch}*h", f"{patch}*w"],
        "grid": ["h", "w"],
        "keys": "h*w+text",
        "conditioning": [spec("encoder_hidden_states", "text", text), spec("pooled_projections", pooled)],
        "limits": {"h": side, "w": side},
        "prediction": "velocity",
        "version": 2,
    }
