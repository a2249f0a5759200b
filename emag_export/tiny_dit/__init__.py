"""tiny-dit: a small class-conditional DiT and its training. No weights ship yet: train, then evaluate."""
