"""The verb `plan`: how to spread a model over GPUs, from its config and headers alone."""
