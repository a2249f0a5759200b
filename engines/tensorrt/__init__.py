"""TensorRT and TensorRT-RTX: one code path builds, stores, inspects and runs engines of both."""
