"""For our own tests and those of third-party plugins: tiny models, the real command, and the conformance suite."""
