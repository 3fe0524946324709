"""Kernels compiled for the processor that runs them: `source/` in C++, `build` compiles it, `library` calls it; see README.md."""
