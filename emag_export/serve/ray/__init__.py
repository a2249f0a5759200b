"""The server on a Ray cluster: a front without an engine, and replicas that draw."""
