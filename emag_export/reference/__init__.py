"""The oracle: the released two-pass algorithm on the unmodified model, and engines held against it."""
