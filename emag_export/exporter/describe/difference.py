"""In what a bundle differs from the one that a build would put in its place."""

from pathlib import Path

from emag_export.bundle import MANIFEST, Bundle
from emag_export.contract import DenoiserContract
from emag_export.errors import EmagError, InputError
from emag_export.exporter.describe.identify import BuildPlan
from emag_export.manifest import Provenance
from emag_export.models import SamplingDefaults
from emag_export.quantisation import Quantisation

__all__ = ["refuse_other_bundle"]

_INSTEAD = "give another folder as `output`, or replace it with `overwrite`"


def refuse_other_bundle(plan: BuildPlan, out: Path) -> None:
    """Refuse to replace a bundle, saying why it is not up to date. What is no bundle is not looked at.

    Args:
        plan: What would be built.
        out: Where it would be.

    Raises:
        InputError: If there is a bundle: it was made from something else, by other versions, or is damaged.
    """
    if not (out / MANIFEST).is_file():
        return
    try:
        there = Bundle(out)
        if there.key == plan.key:
            there.check()
    except EmagError as error:
        raise InputError(f"{out} holds a bundle that cannot be used ({error.message}); {_INSTEAD}") from error
    old = _facts(there.provenance, there.contract, there.defaults, there.quantisation, there.components)
    new = _facts(plan.provenance, plan.contract, plan.defaults, plan.quantisation, plan.components)
    changed = [f"{name} {old.get(name)}, now {new[name]}" for name in new if old.get(name) != new[name]]
    differs = "; ".join(changed) or "what this version of emag-export writes"
    raise InputError(f"{out} holds another bundle than was asked for ({differs}); {_INSTEAD}")


def _facts(
    source: Provenance,
    contract: DenoiserContract,
    defaults: SamplingDefaults,
    quantisation: Quantisation | None,
    components: list[str] | tuple[str, ...],
) -> dict[str, str]:
    """What a person can tell two bundles apart by, in words."""
    return {
        "model": source.model,
        "revision": source.revision or "none",
        "hash of the source": source.fingerprint[:12],
        "seed": "none" if source.seed is None else str(source.seed),
        "LoRAs": ", ".join(f"{lora.name}:{lora.scale:g}" for lora in source.loras) or "none",
        "timestep shift": "the model's" if source.timestep_shift is None else f"{source.timestep_shift:g}",
        "variant": contract.variant,
        "candidate blocks": ", ".join(map(str, contract.blocks)),
        "renorm": contract.renorm,
        "precision": contract.precision,
        "averages": contract.state_dtype,
        "text tokens": str(defaults.max_sequence_length),
        "quantisation": "none" if quantisation is None else quantisation.describe(),
        "components": ", ".join(components),
        **source.versions,
    }
