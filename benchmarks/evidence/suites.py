"""What is compared: bundles, methods, prompts; every suite is one or two runs of ``emag-export eval``."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from emag_export.kinds import Variant
from emag_export.options import BuildOptions

__all__ = ["SUITES", "Suite"]

_HERE = Path(__file__).parent
_BUDGET = ("--seeds", "2", "--images-per-call", "8")
"""Two pictures of a prompt; eight share a call, which moves their last bits and halves the time."""
_METRICS = ("--metrics", "drawn,accuracy,diversity,drawn-distribution")


@dataclass(frozen=True, kw_only=True)
class Suite:
    """One comparison."""

    model: str
    """Known name."""
    bundles: Mapping[str, BuildOptions]
    """By name; the first draws what has no perturbed row."""
    methods: tuple[str, ...]
    prompts: str
    """Name of a file beside this one, and of that with ``-tuning`` for a sweep."""
    baseline: str = "cfg"
    tuned: bool = False
    """Run a second time, with scales tuned on prompts of their own."""
    shares: str | None = None
    """Name of an earlier suite with the same prompts, some of whose pictures it needs too."""
    probes: int = 2
    summary: str

    def arguments(self, folder: Path, *, tuned: bool) -> list[str]:
        """Those of ``emag-export``, as one would type them.

        Args:
            folder: Below which bundles and reports lie.
            tuned: With a sweep.
        """
        first, *others = (str(folder / "bundles" / name) for name in self.bundles)
        more = [word for other in others for word in ("--with", other)]
        words = ["eval", first, *more, "--methods", ",".join(self.methods), "--baseline", self.baseline]
        words += ["--prompts", str(_HERE / f"{self.prompts}.txt"), *_METRICS, *_BUDGET]
        words += ["--sweep", str(_HERE / f"{self.prompts}-tuning.txt")] if tuned else []
        return [*words, "--probes", str(self.probes)]


def _bundles(model: str, *variants: Variant) -> dict[str, BuildOptions]:
    return {f"{model}-{variant}": BuildOptions(variant=variant) for variant in variants}


_NEGATIVES = (
    Variant.EMAG_Q,
    Variant.EMAG,
    Variant.EMAG_I,
    Variant.IDENTITY,
    Variant.BLUR_QUERY,
    Variant.SKIP,
)

SUITES: Mapping[str, Suite] = MappingProxyType(
    {
        "tiny-sd3": Suite(
            model="tiny-sd3",
            bundles=_bundles("tiny-sd3", *_NEGATIVES),
            methods=(
                *("none", "cfg", "cfg+interval", "cfg-zero-star", "apg", "cads", "pag", "seg", "slg", "s2"),
                *("emag@emag-q", "emag@emag", "emag@emag-i", "emag+interval@emag-q", "emag-only@emag-q"),
                *("emag+apg@emag", "emag+cads@emag"),
            ),
            prompts="scenes",
            tuned=True,
            summary="every guidance and every negative, text to picture",
        ),
        "tiny-dit": Suite(
            model="tiny-dit",
            bundles=_bundles("tiny-dit", Variant.EMAG_Q, Variant.EMAG, Variant.IDENTITY, Variant.SKIP),
            methods=(
                *("none", "cfg", "cfg+interval", "cfg-zero-star[cfg-zero-init=0]", "apg", "pag", "slg", "s2"),
                *("emag@emag-q", "emag@emag", "emag-only@emag-q"),
            ),
            prompts="classes",
            tuned=True,
            summary="the same of a model of classes, which predicts noise",
        ),
        **{
            rule: Suite(
                model="tiny-sd3",
                bundles=_bundles("tiny-sd3", Variant.EMAG_Q, Variant.EMAG),
                methods=(rule, f"emag+{rule}"),
                prompts="scenes",
                baseline=rule,
                shares="tiny-sd3",
                probes=0,
                summary=f"does EMAG add something to {rule.upper()}?",
            )
            for rule in ("apg", "cads")
        },
        "blocks": Suite(
            model="tiny-sd3",
            bundles={
                "tiny-sd3-wide": BuildOptions(variant=Variant.EMAG_Q, emag_candidates=(2, 3, 4, 5, 6, 7, 8))
            },
            methods=(
                "cfg",
                "emag[emag-blocks=3,4,5]",
                "emag[random-blocks=1]",
                *(f"emag[emag-blocks={block}]" for block in range(2, 9)),
                "emag",
            ),
            prompts="scenes",
            baseline="emag",
            summary="one block in every step, a random one, three, or the one that moved most",
        ),
        "windows": Suite(
            model="tiny-sd3",
            bundles=_bundles("tiny-sd3", Variant.EMAG_Q),
            methods=(
                "emag",
                "emag[emag-stop=0]",
                "emag[emag-delta=0 emag-stop=0]",
                "emag[emag-stop=150]",
                "emag[emag-delta=125]",
                "emag[emag-strength=0.5]",
                "emag[emag-beta=0.9]",
                "emag[emag-beta=0.5]",
            ),
            prompts="scenes",
            baseline="emag",
            summary="when the negative acts, how much of it, and how long it remembers",
        ),
    }
)
"""By name, in the order in which they run."""
