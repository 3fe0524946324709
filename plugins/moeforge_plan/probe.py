"""Measuring this machine: matrix products by rows, a copy, an all-to-all and an all-gather at three sizes.

One process a GPU (NCCL); without GPUs two processes (gloo) that share the cores. The only module of this plugin that imports torch.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from moeforge.errors import MachineLacks
from moeforge.pipeline.context import Context

REPEATS = 15
CPU_RANKS = 2
PATIENCE_S = 300.0


def measure(ctx: Context) -> dict[str, Any]:
    """Everything that :func:`moeforge_plan.local.from_raw` reads, and the raw seconds.

    Raises:
        MachineLacks: a process failed or never ended.
    """
    import torch

    cards = torch.cuda.device_count()
    ranks = cards or CPU_RANKS
    ctx.say(f"measuring {f'{cards} GPUs with NCCL' if cards else f'{ranks} processes with gloo'}; let nothing else run")
    for attempt in range(2):
        with tempfile.TemporaryDirectory() as folder:
            codes = _spawn(ranks, folder, ctx)
            if not any(codes):
                return json.loads(Path(folder, "result.json").read_text("utf-8"))
        if attempt or not any(code < 0 for code in codes):
            break  # gloo has died of a signal at the end of a good run before: that is worth another try, an error is not
    raise MachineLacks(
        f"--calibrate: the measuring processes ended with codes {codes}, 0 expected; their messages stand above"
    )


def _spawn(ranks: int, folder: str, ctx: Context) -> list[int]:
    """Run `_work` on every rank; exit codes."""
    context = multiprocessing.get_context("spawn")
    started = [context.Process(target=_work, args=(rank, ranks, folder)) for rank in range(ranks)]
    for process in started:
        process.start()
    try:
        deadline = time.monotonic() + PATIENCE_S
        while any(p.is_alive() for p in started):
            ctx.check()
            if time.monotonic() > deadline or any(p.exitcode for p in started):
                break
            time.sleep(0.05)
        for process in started:
            process.join(5)
        return [-1 if p.exitcode is None else p.exitcode for p in started]
    finally:
        for process in started:
            if process.is_alive():
                process.kill()
                process.join()


def _work(rank: int, ranks: int, folder: str) -> None:
    """One process: measures, and the first writes the result."""
    import torch
    import torch.distributed as dist

    cuda = torch.cuda.is_available()
    device = torch.device("cuda", rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // ranks))
    dist.init_process_group(
        "nccl" if cuda else "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=ranks
    )
    try:
        found = _measured(device, ranks)
        if rank == 0:
            Path(folder, "result.json").write_text(json.dumps(found), "utf-8")
        dist.barrier()
    finally:
        dist.destroy_process_group()


def _measured(device: Any, ranks: int) -> dict[str, Any]:
    import torch
    import torch.distributed as dist

    cuda = device.type == "cuda"
    dtype, side = (torch.bfloat16, 8192) if cuda else (torch.float32, 1024)
    seconds: Callable[[Callable[[], Any]], float] = lambda work: _seconds(work, device)  # noqa: E731
    weight = torch.randn(side, side, device=device).to(dtype)
    products = {}
    for rows in (16, 64, 256, 1024) if not cuda else (64, 512, 4096, 16384):
        x = torch.randn(rows, side, device=device).to(dtype)
        products[rows] = seconds(lambda x=x: x @ weight)
    held = torch.empty(2**28 if cuda else 2**24, device=device)
    copied = 2 * held.nbytes / seconds(held.clone) / 1e9
    found = {
        "title": torch.cuda.get_device_name(device) if cuda else f"this machine's cores in {ranks} processes",
        "ranks": ranks, "backend": dist.get_backend(), "dtype": str(dtype).removeprefix("torch."), "torch": torch.__version__,
        "memory_gb": (torch.cuda.get_device_properties(device).total_memory if cuda else
                      os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / ranks) / 1e9,
        "copy_gbs": copied, "matmul": half_speed(products, side),
    }  # fmt: skip
    if ranks > 1:
        gathers, exchanges = {}, {}
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its name before torch 2.13
        for numel in (2**24, 2**26, 2**28) if cuda else (2**14, 2**18, 2**22):
            numel -= numel % ranks  # an all-to-all splits it evenly
            part = torch.randn(numel, device=device)
            whole, other = torch.empty(numel * ranks, device=device), torch.empty_like(part)
            away = part.nbytes * (ranks - 1)
            gathers[away] = seconds(lambda part=part, whole=whole: gather(whole, part))
            exchanges[away // ranks] = seconds(lambda part=part, other=other: dist.all_to_all_single(other, part))
        found |= {"all_gather": line(gathers), "all_to_all": line(exchanges)}
    return found


def _seconds(work: Callable[[], Any], device: Any) -> float:
    """The least of some runs that every rank begins at once: what disturbs a run only makes it longer."""
    import torch
    import torch.distributed as dist

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    work()
    taken = []
    for _ in range(REPEATS):
        dist.barrier()
        wait()
        begin = time.perf_counter()
        work()
        wait()
        taken.append(time.perf_counter() - begin)
    return min(taken)


def fit(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """(a, b) of seconds = a + b * size with the least sum of squared relative errors; a is not below 0, b above it: where no such
    line is the best one (a disturbed machine), the best through the origin."""
    weights = [(1 / s**2, x, s) for x, s in points]
    w, wx, wy = (sum(v) for v in zip(*((w, w * x, w * s) for w, x, s in weights), strict=True))
    wxx, wxy = (sum(v) for v in zip(*((w * x * x, w * x * s) for w, x, s in weights), strict=True))
    slope = (w * wxy - wx * wy) / (w * wxx - wx * wx)
    first = (wy - slope * wx) / w
    return (first, slope) if first >= 0 and slope > 0 else (0.0, wxy / wxx)


def line(seconds: dict[int, float]) -> dict[str, Any]:
    """Latency and bandwidth of a collective: bytes that leave a rank -> seconds."""
    alpha, per_byte = fit(list(seconds.items()))
    return {
        "alpha_s": alpha,
        "beta_gbs": 1e-9 / per_byte,
        "seconds": {str(size): taken for size, taken in seconds.items()},
    }


def half_speed(seconds: dict[int, float], side: int) -> dict[str, Any]:
    """Peak of a product of [rows, side] with [side, side], and the rows at which half of it is reached: seconds = a + b*rows
    means FLOP/s = peak * rows / (rows + a/b)."""
    first, per_row = fit(list(seconds.items()))
    return {"tflops": 2e-12 * side * side / per_row, "half_rows": first / per_row, "side": side,
            "seconds": {str(rows): taken for rows, taken in seconds.items()}}  # fmt: skip
