"""onnxruntime's CUDA provider on a machine without a GPU, over stub libraries that compute nothing."""
