"""The compiled kernels of the processor: agreement, determinism, torch.compile, and what is said where they cannot run."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moeforge_kernels import agreement
from moeforge_kernels.activations import FUNCTIONS
from moeforge_kernels.cpu import build, library, pages
from moeforge_kernels.expert_ffn import OP, expert_ffn
from moeforge_kernels.pairs import pairs_from_slots

ROOT = Path(__file__).resolve().parents[3]
DTYPES = [dtype for dtype in library.DTYPES if library.lacks(dtype == torch.bfloat16) is None]
compiled = pytest.mark.skipif(not DTYPES, reason=f"no compiled kernels here: {library.lacks(False)}")
FFN = [name for name, (op, _) in agreement.VARIANTS.items() if op is OP]


def layer(tokens, width, ffn, experts, slots, dtype=torch.float32, gated=True, seed=0):
    """(x, pairs, up, down), leaves."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, width, generator=g)
    up = torch.randn(experts, (2 if gated else 1) * ffn, width, generator=g) * width**-0.5
    down = torch.randn(experts, width, ffn, generator=g) * ffn**-0.5
    index = torch.rand(tokens, experts, generator=g).topk(slots).indices
    pairs = pairs_from_slots(index, torch.rand(tokens, slots, generator=g), experts)
    x, up, down = (t.to(dtype).requires_grad_() for t in (x, up, down))
    return x, pairs._replace(weight=pairs.weight.requires_grad_()), up, down


def answers(x, pairs, up, down, seed=7, **options):
    """out and the gradients of x, the pairs' weights, up, down."""
    out = expert_ffn(x, pairs, up, down, activation="silu", **options)
    towards = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed)).to(out.dtype)
    return out.detach(), *torch.autograd.grad(out, (x, pairs.weight, up, down), towards)


def same_bits(found, expected):
    return all(torch.equal(a.view(torch.int8), b.view(torch.int8)) for a, b in zip(found, expected, strict=True))


@compiled
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("variant", FFN)
def test_it_agrees_with_the_reference(variant, dtype):
    for seed, (case, sizes) in enumerate(agreement.CASES.items()):
        found = agreement.errors(variant, "cpu", dtype, case, seed=seed)
        if sizes.view:
            assert isinstance(found, str) and "last dimension of up has stride" in found
        else:
            assert not isinstance(found, str), found
            assert max(found.values()) <= agreement.LIMITS[dtype], (case, found)


@compiled
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("activation", FUNCTIONS)
def test_every_activation_and_its_slope(activation, dtype):
    x, pairs, up, down = layer(40, 48, 56, 3, 2, dtype)
    up = (up.detach() * torch.logspace(-3, 1, 3)[:, None, None].to(dtype)).requires_grad_()  # from 0.001 to saturation
    given = (x, pairs.weight, up, down)
    out = expert_ffn(x, pairs, up, down, activation=activation, backend="cpu")
    towards = torch.randn_like(out)
    found = out, *torch.autograd.grad(out, given, towards)
    wide = [t.detach().double().requires_grad_() for t in given]
    true = expert_ffn(
        wide[0], pairs._replace(weight=wide[1]), *wide[2:], activation=activation, backend="reference"
    )  # fmt: skip
    for one, other in zip(found, (true, *torch.autograd.grad(true, wide, towards.double())), strict=True):
        assert (one - other).abs().max() <= agreement.LIMITS[dtype] * other.abs().max()


@compiled
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_the_same_bits_whatever_the_number_of_threads(dtype):
    # gradients of 9 MB and more: their memory is kept between calls
    given = layer(150, 192, 512, 24, 3, dtype)
    here = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = answers(*given, backend="cpu")
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert same_bits(answers(*given, backend="cpu"), expected), threads
    finally:
        torch.set_num_threads(here)


@compiled
def test_gradients_of_experts_that_nobody_chose_are_zeros_in_memory_lent_again():
    x, pairs, up, down = layer(2, 255, 511, 16, 1)  # experts begin in the middle of pages
    assert up.numel() * 4 >= pages.LARGE
    chosen = set(pairs.expert.tolist())
    for _ in range(3):
        *_, to_up, to_down = answers(x, pairs, up, down, backend="cpu")
        for grad in (to_up, to_down):
            assert {e for e in range(16) if grad[e].abs().max() > 0} == chosen
            grad.fill_(7)  # what the next round gets back
        del to_up, to_down, grad


def test_freed_memory_waits_within_a_limit_and_is_never_lent_twice():
    shelf = pages.Shelf(3 << 20)
    first, used = shelf.take((1 << 20) - 5)
    assert not used and len(first) >= (1 << 20) - 5
    second, _ = shelf.take(1 << 20)
    shelf.put(first)
    third, used = shelf.take(1 << 20)
    assert used and third is first and third is not second
    for memory in (first, second, *(shelf.take(2 << 20)[0] for _ in range(2))):
        shelf.put(memory)
    assert shelf.waiting <= shelf.limit
    assert shelf.take(2 << 20)[1] and not shelf.take(2 << 20)[1], "the last one waits, the one before was thrown away"
    shelf.clear()
    assert shelf.waiting == 0 and not shelf.take(1 << 20)[1]


def test_memory_comes_back_when_the_last_tensor_on_it_is_gone():
    made = pages.empty((3 << 20,), torch.float32)
    at, view = made.data_ptr(), made[5:]
    del made
    other = pages.empty((3 << 20,), torch.float32)
    assert other.data_ptr() != at
    view.fill_(1)
    del view
    assert pages.empty((3 << 20,), torch.float32).data_ptr() == at


@compiled
def test_a_token_that_goes_nowhere_poisons_nobody():
    x, _, up, down = layer(9, 32, 48, 3, 2)
    index = torch.rand(9, 3).topk(2).indices
    index[4] = 3
    pairs = pairs_from_slots(index, torch.rand(9, 2), 3)
    x = x.detach()
    clean = expert_ffn(x, pairs, up, down, activation="silu", backend="cpu")
    x[4] = torch.nan
    assert torch.equal(expert_ffn(x, pairs, up, down, activation="silu", backend="cpu"), clean)
    assert clean[4].abs().max() == 0 and clean[3].abs().max() > 0


@compiled
def test_only_what_is_asked_for_gets_a_gradient():
    given = layer(20, 32, 48, 3, 2)
    expected = answers(*given, backend="cpu")
    for name, wanted in (("x", 0), ("up", 2), ("down", 3)):
        frozen = [t.detach() for t in (given[0], given[1].weight, *given[2:])]
        frozen[wanted].requires_grad_()
        x, weight, up, down = frozen
        out = expert_ffn(x, given[1]._replace(weight=weight), up, down, activation="silu", backend="cpu")
        towards = torch.randn(out.shape, generator=torch.Generator().manual_seed(7))
        (found,) = torch.autograd.grad(out, frozen[wanted], towards)
        assert torch.equal(found, expected[1:][wanted]), name


@compiled
def test_it_is_what_a_processor_takes_and_no_second_gradient_is_made_up():
    x, pairs, up, down = layer(5, 32, 48, 3, 2)
    options = {"activation": "silu", "gated": True, "up_bias": None, "down_bias": None}
    assert OP.choose(None, x, pairs, up, down, **options).name == "cpu"
    out = expert_ffn(x, pairs, up, down, activation="silu")
    (grad,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@compiled
def test_it_is_one_node_each_way_to_torch_compile():
    given = layer(33, 32, 48, 4, 2)

    def loss(x, pairs, up, down):
        return expert_ffn(x.sin(), pairs, up, down, activation="silu", backend="cpu").square().mean()

    wanted = (given[0], given[1].weight, *given[2:])
    plain = loss(*given)
    whole = torch.compile(loss, backend="aot_eager", fullgraph=True)(*given)
    assert torch.allclose(whole, plain)
    for one, other in zip(torch.autograd.grad(whole, wanted), torch.autograd.grad(plain, wanted), strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-6)


def test_without_a_compiler_it_says_so_and_torch_runs(tmp_path):
    """In a process of its own: what was found is remembered."""
    script = (
        "import torch\n"
        "from moeforge_kernels.expert_ffn import OP, expert_ffn\n"
        "from moeforge_kernels.pairs import pairs_from_slots\n"
        "x, up, down = torch.randn(3, 16), torch.randn(2, 16, 16), torch.randn(2, 16, 8)\n"
        "pairs = pairs_from_slots(torch.tensor([[0], [1], [0]]), torch.rand(3, 1), 2)\n"
        "options = dict(activation='silu', gated=True, up_bias=None, down_bias=None)\n"
        "print(OP.choose(None, x, pairs, up, down, **options).name)\n"
        "print(OP.backends['cpu'].why_not(x, pairs, up, down, **options))\n"
    )
    done = _python(script, tmp_path, CXX="no-such-compiler")
    chosen, reason = done.stdout.splitlines()
    assert chosen == "torch"
    assert "no C++ compiler no-such-compiler" in reason or "AVX" in reason or "avx" in reason or "Linux" in reason


@compiled
def test_processes_that_build_at_once_share_one_whole_file(tmp_path):
    script = "from moeforge_kernels.cpu import library; print(library.lacks(False))"
    running = [_start(script, tmp_path) for _ in range(2)]
    for process in running:
        out, err = process.communicate(timeout=300)
        assert (process.returncode, out.strip()) == (0, "None"), err
    assert [path.suffix for path in (tmp_path / "kernels").iterdir()] == [".so"]


@compiled
def test_a_compiler_that_fails_is_quoted(tmp_path, monkeypatch):
    broken = tmp_path / "cxx"
    broken.write_text("#!/bin/sh\necho 'x.h:1: error: no room for two' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    monkeypatch.setenv("MOEFORGE_HOME", str(tmp_path))
    with pytest.raises(build.CannotBuild, match="no room for two"):
        build.library.__wrapped__()
    assert list((tmp_path / "kernels").iterdir()) == []


def _start(script, home, **more):
    env = {**os.environ, "MOEFORGE_HOME": str(home), "PYTHONPATH": str(ROOT / "kernels"), **more}
    return subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env
    )


def _python(script, home, **more):
    process = _start(script, home, **more)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return subprocess.CompletedProcess(script, 0, out, err)
