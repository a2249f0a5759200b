"""Write one component as an ONNX graph, and check it."""
