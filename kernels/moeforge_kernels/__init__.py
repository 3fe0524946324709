"""Kernels: one folder an op, each with a plain torch reference beside it. None has landed yet."""
