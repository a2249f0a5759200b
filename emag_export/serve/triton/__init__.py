"""A bundle as a model of Triton Inference Server, denoised step by step across requests."""
