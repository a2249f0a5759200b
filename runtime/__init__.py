"""Time, guidance and state: plans the steps, drives the denoising loop, chooses the block to perturb."""
