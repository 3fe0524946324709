"""Benchmark tasks through lm-evaluation-harness, on a model that moeforge loaded."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

from moeforge.errors import MachineLacks, UsageProblem
from moeforge.options import did_you_mean

if TYPE_CHECKING:
    from moeforge.checkpoint.base import Checkpoint
    from moeforge.pipeline.context import Context


def check_installed() -> None:
    """Raises:
    MachineLacks: the harness is not installed; says how to get it.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise MachineLacks(
            "--lm-eval needs lm-evaluation-harness, which is not installed: pip install 'moeforge[lm-eval]'"
        )


def run_tasks(checkpoint: Checkpoint, options: Any, ctx: Context) -> dict[str, dict[str, float]]:
    """Task (with its subtasks) -> metric -> value, as the harness reports them.

    Raises:
        UsageProblem: a task that it does not know.
    """
    import lm_eval  # pyright: ignore[reportMissingImports] - optional
    from lm_eval.models.huggingface import HFLM  # pyright: ignore[reportMissingImports]
    from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]

    from moeforge.model.build import require_generation
    from moeforge.model.compute import check_compute
    from moeforge.model.load import load
    from moeforge.model.tokenizer import load_tokenizer

    check_compute(options.device, options.dtype)
    tasks = [name for given in options.lm_eval for name in given.split(",") if name]
    manager = TaskManager()
    known = set(manager.all_tasks)
    for name in tasks:
        if name not in known:
            raise UsageProblem(f"--lm-eval {name}: lm-evaluation-harness has no such task; {_near(name, known)}")
    dtype = options.dtype or ("float32" if options.device == "cpu" else None)
    require_generation(checkpoint.config, checkpoint.ref)
    ctx.say(f"loading {checkpoint.ref} for {', '.join(tasks)}; lm-evaluation-harness takes over")
    tokenizer = load_tokenizer(checkpoint)
    model = HFLM(pretrained=load(checkpoint, dtype=dtype, device=options.device), tokenizer=tokenizer,
                 batch_size=options.batch_size, max_length=None)  # fmt: skip
    found = lm_eval.simple_evaluate(model=model, tasks=tasks, task_manager=manager, limit=options.limit,
                                    random_seed=options.seed, numpy_random_seed=options.seed, torch_random_seed=options.seed)  # fmt: skip
    ctx.check()
    # metrics are called `name,filter`; what else stands there are counts and labels
    return {task: {metric: float(value) for metric, value in metrics.items() if "," in metric and isinstance(value, int | float)}
            for task, metrics in found["results"].items()}  # fmt: skip


def _near(name: str, known: set[str]) -> str:
    told = did_you_mean(name, sorted(known))
    return told if told.startswith("did") else "`lm_eval ls tasks` lists them"
