"""Copies between CPU and GPU that onnxruntime inserted into a graph, and the nodes that they join."""

from pathlib import Path

import onnx

__all__ = ["inserted_copies"]


def inserted_copies(optimised: Path) -> list[str]:
    """What each copies, from which node to which.

    Args:
        optimised: The graph as onnxruntime wrote it after its last pass.
    """
    graph = onnx.load(str(optimised), load_external_data=False).graph
    makers = {output: node.name for node in graph.node for output in node.output}
    found = []
    for node in graph.node:
        if node.op_type.startswith("Memcpy"):
            users = [user.name for user in graph.node if node.output[0] in user.input]
            maker = makers.get(node.input[0], "an input")
            found.append(f"{node.op_type} of {node.input[0]}, from {maker} to {', '.join(users)}")
    return found
