"""Quantise the linears of a denoiser's blocks, in the traced graph."""
