"""The version of this package, on its own so that everybody may read it."""

__all__ = ["VERSION"]

VERSION = "0.1.0"
