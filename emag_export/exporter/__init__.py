"""From a checkpoint to a bundle: trace, check, verify, write."""
