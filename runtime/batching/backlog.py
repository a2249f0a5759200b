"""How long what waits will take, from how long calls have taken."""

import math

__all__ = ["Backlog"]

_WEIGHT = 0.05
"""Of the newest call in the running mean."""
LONGEST_WAIT = 120
"""Seconds that a client is told to wait at most; clients that obey headers refuse more."""


class Backlog:
    """A running mean of the seconds that one step of one image costs.

    Args:
        seconds_per_step: What is known before the first call.
    """

    def __init__(self, seconds_per_step: float) -> None:
        self.seconds_per_step = seconds_per_step

    def called(self, images: int, seconds: float) -> None:
        """Take a call into account."""
        self.seconds_per_step += _WEIGHT * (seconds / images - self.seconds_per_step)

    def retry_after(self, steps: int, images: int, wanted: int) -> int:
        """Whole seconds until there is likely room for some images more.

        Args:
            steps: That everybody who is here has still to go.
            images: That are here.
            wanted: That want to come.
        """
        mean = steps / max(images, 1)
        return max(1, min(LONGEST_WAIT, math.ceil(mean * wanted * self.seconds_per_step)))
