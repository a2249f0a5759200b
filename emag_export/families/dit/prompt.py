"""What DiT's denoiser takes of a prompt: the number of a class."""

import torch

from emag_export.errors import InputError
from emag_export.families.texts import Cut, Encoded, Texts

__all__ = ["encode"]


def encode(prompt: str, texts: Texts) -> Encoded:
    """The class of one prompt.

    Args:
        prompt: A number or a name of a class; empty: the null class, as the model was trained without one.
            As a negative prompt, a class is what guidance steers away from in place of the null class.
        texts: With the classes of the bundle.

    Raises:
        InputError: If there is no such class.
    """
    if texts.labels is None:
        raise InputError("this bundle does not say which classes its model has; build it again")
    label = texts.labels.find(prompt)
    return Encoded(tensors={"class_labels": torch.tensor([label])}, cut=(Cut(),))
