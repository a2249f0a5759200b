"""Which guidance draws better: methods, scales and seeds over prompts, with metrics and statistics."""
