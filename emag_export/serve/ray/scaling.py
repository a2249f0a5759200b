"""How many replicas a model needs, from the images that wait and are drawn in all of them.

Ray Serve calls the policy in its controller and pickles this module by value, so it imports nothing of this
package.
"""

from typing import Any

__all__ = ["IMAGES", "PLACES", "replicas_for_images"]

IMAGES = "images"
"""What a replica reports: images that it has taken and not finished."""
PLACES = "places"
"""What a replica reports: images that it denoises at once when it is full."""


def replicas_for_images(context: Any) -> tuple[float, dict[str, Any]]:
    """Replicas with which no image would have to wait.

    Requests are a poor measure here: one asks for one picture or for ten, and a replica draws several at
    once. Ray smooths what is returned over ``look_back_period_s`` and applies its delays and bounds.

    Args:
        context: Ray Serve's ``AutoscalingContext``; its metrics are averages over the last seconds.

    Returns:
        The wish, which may be a fraction, and the state of this policy: none.
    """
    reported = context.aggregated_metrics or {}
    images = reported.get(IMAGES) or {}
    places = reported.get(PLACES) or {}
    if not images or not places:
        return context.target_num_replicas, {}
    # Requests that found every replica full wait at the front; each is one image at least.
    waiting = context.total_queued_requests or 0.0
    room = sum(places.values()) / len(places)
    return (sum(images.values()) + waiting) / max(room, 1.0), {}
