"""The pictures of an evaluation: every prompt at every setting, from the same noise."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from emag_export.bundle import Bundle
from emag_export.errors import EmagError, InputError
from emag_export.evaluation.settings import Setting
from emag_export.runtime.keywords import SamplingKeywords, request_for
from emag_export.runtime.request import any_prompt, check_prompts, plan_request
from emag_export.serve.batch.plan import PICTURES, Item
from emag_export.serve.batch.table import Row

__all__ = ["MOST_SEEDS", "Trials"]

MOST_SEEDS = 1000
"""Seeds of a prompt, and the distance to those of the next one: prompts share no noise, and pictures that are
there stay as they are when prompts or seeds are added."""


@dataclass(frozen=True, kw_only=True)
class Trials:
    """All pictures of one bundle, for the machinery of batches."""

    bundle: Bundle
    output: Path
    """Folder of this bundle's pictures."""
    settings: tuple[Setting, ...]
    prompts: tuple[str, ...]
    seeds: int
    """Pictures of a prompt, at every setting."""
    seed: int = 0
    """Of the first picture of the first prompt."""
    keywords: SamplingKeywords
    """The same for every method: steps, sides, negative prompt."""

    @property
    def count(self) -> int:
        """How many pictures there are."""
        return len(self.prompts) * len(self.settings) * self.seeds

    def items(self) -> Iterator[Item]:
        """All pictures, prompt by prompt: an evaluation that is interrupted has complete prompts."""
        for number in range(len(self.prompts)):
            for setting in self.settings:
                yield from self.items_of(setting, number)

    def items_of(self, setting: Setting, number: int) -> Iterator[Item]:
        """The pictures of one prompt at one setting, seed by seed."""
        prompt = self.prompts[number]
        words: SamplingKeywords = {**self.keywords, **setting.keywords}
        words["seed"] = self.seed + number * MOST_SEEDS
        base = request_for(self.bundle, prompt, words)
        others = {"setting": setting.label, "method": setting.method}
        row = Row(number=number, prompt=prompt, keywords={}, others=others)
        for image in range(self.seeds):
            request = replace(base, seed=base.seed + image)
            path = Path(PICTURES) / setting.folder / f"{number:06d}-{image}-seed{request.seed}.png"
            yield Item(row=row, image=image, request=request, path=path)

    def cost(self, setting: Setting) -> float:
        """Row-blocks of a picture over those of classifier-free guidance."""
        words: SamplingKeywords = {**self.keywords, **setting.keywords}
        request = request_for(self.bundle, any_prompt(self.bundle, "-"), words)
        return plan_request(self.bundle, request).cost.relative_to_cfg

    def check(self) -> int:
        """Look at all that is asked for before any work begins.

        Returns:
            How many pictures there are.

        Raises:
            InputError: If a setting does not fit the model, or a prompt names no class of it.
        """
        for setting in self.settings:
            try:
                self.cost(setting)
            except EmagError as error:
                raise InputError(f"{setting.label}: {error.message}") from error
        for number in range(len(self.prompts)):
            for setting in self.settings[:1]:
                check_prompts(self.bundle, next(self.items_of(setting, number)).request)
        return self.count
