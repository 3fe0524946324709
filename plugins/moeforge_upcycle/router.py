"""Rows of a new router, and the random streams that every perturbation draws from."""

from __future__ import annotations

import hashlib

import numpy as np


def keyed(seed: int, *words: object) -> np.random.Generator:
    """A random stream named by the seed and some words: the same whatever the order, the threads and the shards.

    Philox (Salmon et al., SC 2011), a counter-based generator, with 128 bits of SHA-256 as its key.
    """
    name = "/".join(map(str, (seed, *words)))
    return np.random.Generator(np.random.Philox(key=int.from_bytes(hashlib.sha256(name.encode()).digest()[:16])))


def random_rows(rows: int, width: int, std: float, rng: np.random.Generator) -> np.ndarray:
    """[rows, width] float32 from N(0, std^2), as Sparse Upcycling (2212.05055) starts its routers."""
    return rng.standard_normal((rows, width), dtype=np.float32) * np.float32(std)


def expand(rows: np.ndarray, tied: int, untie: float, rng: np.random.Generator) -> np.ndarray:
    """[E / tied, D] -> [E, D] float32: each row `tied` times in a row, so that the shards of a virtual group always
    enter the top-k together (2410.07524, section 3).

    `untie` > 0 adds noise of that size relative to the rows' standard deviation, which lets training tell the shards
    apart at the price of exactness.
    """
    full = np.repeat(rows.astype(np.float32), tied, axis=0)
    if untie:
        full += rng.standard_normal(full.shape, dtype=np.float32) * np.float32(untie * rows.std())
    return full
