"""Every backend that runs on this machine against the reference in float64: answers and gradients, on odd shapes."""

import pytest
import torch

from moeforge_kernels import agreement

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
HERE = [
    (variant, name)
    for variant, (op, _) in agreement.VARIANTS.items()
    for name in op.backends
    if name not in ("triton", "cpu")  # in files of their own: test_triton.py, test_cpu.py
]


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize(("variant", "backend"), HERE)
def test_backends_agree_with_the_reference(variant, backend, dtype):
    ran = 0
    for seed, case in enumerate(agreement.CASES):
        found = agreement.errors(variant, backend, dtype, case, seed=seed)
        if isinstance(found, str):
            refused = variant.startswith("expert_gemv")  # too many tokens for it
            assert refused or backend != "reference", "the reference takes everything"
            continue
        ran += 1
        assert max(found.values()) <= agreement.LIMITS[dtype], (case, found)
    if backend in ("torch", "reference") and dtype is not torch.float64:
        assert ran >= 7, "a backend that refuses most cases proves nothing"


def test_the_comparison_sees_a_wrong_backend(monkeypatch):
    wrong = agreement.VARIANTS["combine"][0].backends["torch"]
    right = wrong.function
    monkeypatch.setitem(wrong.__dict__, "function", lambda y, pairs: right(y, pairs) * 1.001)
    found = agreement.errors("combine", "torch", torch.float32, "small")
    assert isinstance(found, dict) and found["out"] > 5e-4 and found["y"] > 5e-4
