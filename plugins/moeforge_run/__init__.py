"""Verbs that run a model: `generate`, later `eval` and `serve`."""
