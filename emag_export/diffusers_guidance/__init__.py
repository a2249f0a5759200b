"""EMAG inside diffusers' own pipelines, on their unmodified PyTorch models; nothing is exported."""
