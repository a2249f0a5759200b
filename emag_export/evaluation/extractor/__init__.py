"""A small network that describes drawn pictures by 64 numbers, trained here, for distances between sets."""
