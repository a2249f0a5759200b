"""Run one graph once: PyTorch eager and onnxruntime behind one Protocol."""
