"""Guidance in a limited interval of the run (arXiv:2404.07724)."""

from emag_export.errors import InputError

__all__ = ["WHOLE_RUN", "in_interval", "require_interval"]

WHOLE_RUN = (0.0, 1.0)
"""From the noisiest step to the last."""


def in_interval(index: int, steps: int, interval: tuple[float, float]) -> bool:
    r"""Whether a step is guided; elsewhere w is 1, so that nothing is predicted without the prompt.

    Step :math:`i` of :math:`n` lies at :math:`i/(n-1)`: the first, noisiest one at 0, the last one at 1, the
    only one of a run of one step at 0. Both ends of the interval belong to it.

    Args:
        index: :math:`i`, from 0.
        steps: :math:`n`.
        interval: Low and high, fractions of the run.

    Returns:
        Whether the step lies in the interval.

    Examples:
        >>> from emag_export.runtime.guidance.interval import in_interval
        >>> [in_interval(index, 5, (0.25, 0.75)) for index in range(5)]
        [False, True, True, True, False]

    Source:
        arXiv:2404.07724, section 3, which guides where :math:`\sigma_{lo} < \sigma_i \le \sigma_{hi}`, with
        sigma the standard deviation of the noise over unscaled latents: :math:`t/(1-t)` at level t of a flow,
        :math:`\sqrt{(1-\bar\alpha)/\bar\alpha}` of a variance-preserving model. As sigma falls, those steps
        are consecutive. From :math:`i_1`, the first at or below :math:`\sigma_{hi}`, to :math:`i_2`, the last
        above :math:`\sigma_{lo}`, the same interval is :math:`(i_1/(n-1),\, i_2/(n-1))` here.
    """
    low, high = interval
    return low <= index / max(steps - 1, 1) <= high


def require_interval(interval: tuple[float, float]) -> None:
    """Refuse what is no interval of a run.

    Args:
        interval: Low and high, fractions of the run.

    Raises:
        InputError: If it is not low and high with 0 <= low <= high <= 1.

    Examples:
        >>> from emag_export.runtime.guidance.interval import require_interval
        >>> require_interval((0.8, 0.2))
        Traceback (most recent call last):
            ...
        emag_export.errors.InputError: `guidance_interval` is 0.8 to 0.2; give two fractions of the run, ...
    """
    low, high = interval
    if not 0 <= low <= high <= 1:
        raise InputError(
            f"`guidance_interval` is {low} to {high}; "
            "give two fractions of the run, the lower one first, between 0 and 1"
        )
