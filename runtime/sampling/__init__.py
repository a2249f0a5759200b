"""The parts of one denoising step: plan, schedule, rows, state."""
