"""Export diffusion transformers with EMAG guidance to ONNX, and run them.

Importing this package is free: no torch, no I/O, no environment. The rooms are
:mod:`emag_export.exporter`, :mod:`emag_export.engines`, :mod:`emag_export.runtime`,
:mod:`emag_export.reference` and :mod:`emag_export.cli`.
"""

__all__ = ["__version__"]

__version__ = "0.1.0"
