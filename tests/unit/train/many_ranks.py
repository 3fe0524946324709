"""Cases of one training run, done by one process or, as a program under torchrun, by many: `many_ranks.py CASES.json OUT.pt`.

Importing torch and transformers takes a rank seconds, so one start of the ranks does all cases.
"""

import contextlib
import functools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import torch

from moeforge.checkpoint import open_checkpoint
from moeforge.errors import Interrupted, MoeforgeError
from moeforge.model.load import load
from moeforge.pipeline.progress import Progress
from moeforge.train.data import Document, Pool
from moeforge.train.distill import Teacher
from moeforge.train.layout import Layout
from moeforge.train.loop import Loop, save_memory
from moeforge.train.packing import Packer
from moeforge.train.params import choose
from moeforge.train.ranks import Ranks, joined
from moeforge.train.routing import find_sites
from moeforge.train.settings import Settings


def bodies(lengths, seed):
    generator = torch.Generator().manual_seed(seed)
    return {f"d{i}": torch.randint(3, 61, (length,), generator=generator).tolist() for i, length in enumerate(lengths)}


def packer(case, held=False):
    text = bodies([20, 7, 11] if held else case.get("lengths", [9, 30, 4, 17, 2, 25, 12, 8, 40, 3]), 7 + held)
    documents = tuple(Document(key, len(body), lambda: "") for key, body in text.items())
    return Packer(
        [Pool(documents)],
        lambda d: text[d.key],
        case.get("length", 16),
        None if held else 5,
        shared=case.get("shared", True),
    )


class Keeper:
    """States in a directory, newest last."""

    def __init__(self, directory):
        self.directory = directory

    def newest(self):
        return max(self.directory.glob("state-*"), default=None)

    def place(self, step):
        return self.directory / f"state-{step:06}"

    def record(self, path, step):
        pass


def refuse(path, step):
    raise OSError(28, "No space left on device")


class Stop:
    """Asks one rank to stop at its n-th check."""

    def __init__(self, at):
        self.left = at

    def __call__(self):
        self.left -= 1
        if self.left < 0:
            raise Interrupted("stopped")


def make(case, ranks, directory):
    """The loop of a case. `layout` None: every rank holds the whole model."""
    layout = Layout(*case["layout"]) if case.get("layout") else None
    with open_checkpoint(case["model"]) as source:
        if layout is not None:
            from moeforge.train.engine import load_sharded

            model, ranks = load_sharded(source, layout, ranks, short=case.get("short", False))
        else:
            model = load(source, dtype=torch.float32)
    if case.get("checkpointing"):
        save_memory(model)
    teacher = None
    if case.get("teacher"):
        with open_checkpoint(case["teacher"]) as source:
            teacher = Teacher.of(load(source, dtype=torch.float32))
    sites = find_sites(model)
    choice = choose(model, sites, case.get("select", "all"))
    settings = Settings(**{"rows": 2, "amount": 3, "learning_rate": 3e-3, "warmup": 0.2, "routing_every": 1, "clip": 0.5, "balance": 0.05,
                           "z": 0.01, "importance": 0.02, **case.get("settings", {})})  # fmt: skip
    if ranks.main:
        directory.mkdir(exist_ok=True)
    stop = Stop(case["stop"]) if case.get("stop") is not None and ranks.index == ranks.size - 1 else lambda: None
    return Loop(model, sites, choice, settings, packer(case), packer(case, held=True), directory if ranks.main else None,
                keeper=Keeper(directory) if ranks.main else None, check=stop, ranks=ranks, teacher=teacher)  # fmt: skip


def run(case, ranks, directory):
    """What a case did: records, gradients of the first update as the optimizer saw them, weights at the end; on the first rank."""
    try:
        loop = make(case, ranks, directory)
    except MoeforgeError as error:
        return {"refused": f"{type(error).__name__}: {error}"}
    gradients = {}
    inner = loop.optimizer.step
    if case.get("full_disk") and loop.keeper is not None:
        loop.keeper.record = refuse

    def step():
        if not gradients:
            gradients.update({name: loop.ranks.gathered(master.grad) for name, master in loop.named.items()})
            gradients.update({name: None if value is None else value.clone() for name, value in gradients.items()})
        inner()

    loop.optimizer.step = step
    stopped = None
    try:
        loop.run(functools.partial(Progress("tune", "none").bar, check=lambda: None))
    except MoeforgeError as error:
        stopped = f"{type(error).__name__}: {error}"
    weights = {name: loop.ranks.gathered(master) for name, master in loop.named.items()}
    metrics = [json.loads(line) for line in (directory / "metrics.jsonl").open()] if ranks.main else []
    return {"records": metrics, "gradients": gradients, "weights": {n: None if v is None else v.clone() for n, v in weights.items()},
            "accumulate": loop.accumulate, "step": loop.step, "stopped": stopped, "dtypes": {str(m.dtype) for m in loop.named.values()}}  # fmt: skip


def alone(case, directory):
    """The case done by one process; `rows` are those of all ranks."""
    return run(case, Ranks(0, 1, torch.device("cpu")), directory)


def together(cases, size, directory):
    """The cases done by `size` ranks, in one start of them; those that die of a signal, once more: gloo has been seen to abort at its end."""
    directory.mkdir(exist_ok=True)
    (directory / "cases.json").write_text(json.dumps(cases))
    out = directory / "out.pt"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size), __file__,
               directory / "cases.json", out]  # fmt: skip
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    for last in (False, True):
        done = subprocess.run(command, timeout=300, env=env, capture_output=True, text=True)
        if done.returncode == 0 or last or f"Signal {int(signal.SIGABRT)} " not in done.stderr:
            break
        out.unlink(missing_ok=True)
    assert done.returncode == 0, done.stderr
    return torch.load(out)


def main(cases, out):
    torch.set_num_threads(1)
    found = {}
    with joined(None) as ranks:
        for name, case in json.loads(Path(cases).read_text()).items():
            found[name] = run(case, ranks, Path(case["directory"]))
        if ranks.main:
            torch.save(found, out)


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main(*sys.argv[1:])
