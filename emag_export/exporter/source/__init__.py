"""Find the source model and read what it holds."""
