"""`moeforge plan MODEL`: which layout over many GPUs, and why."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, ClassVar, Literal

from moeforge.checkpoint import open_checkpoint
from moeforge.checkpoint.anatomy import anatomy
from moeforge.checkpoint.folder import Folder
from moeforge.checkpoint.safetensors import parse_json
from moeforge.errors import BadInput, ExitCode, UsageProblem
from moeforge.launch import source
from moeforge.options import arg, did_you_mean, opt
from moeforge.pipeline.artifact import Artifact
from moeforge.pipeline.context import Context
from moeforge.pipeline.describe import describe_value
from moeforge.pipeline.reading import Reading
from moeforge.pipeline.run import check_kind
from moeforge.pipeline.stage import Answer

from . import local
from .job import Hardware, Job, hardware
from .layouts import Engine
from .render import Report
from .search import search
from .shape import Shape, read

LOCAL = "local"
UNCOUNTED = 0.02
"""Share of the parameters in the headers that may be none of those counted here before a note says so."""


@dataclasses.dataclass(frozen=True)
class Options(Reading):
    model: str = arg("a directory, a GGUF file, a Hub id, or a config.json alone; only headers are read; left out: the reference on stdin",
                     default="-")  # fmt: skip
    gpus: int = opt("how many GPUs", default=8, min=1, max=1_000_000)
    gpu: str | None = opt(
        f"which: {', '.join(hardware())}, or {LOCAL} for what --calibrate measured here [default: h100]", default=None
    )
    seq: int = opt("length of a sequence", default=4096, min=1, max=1_000_000_000, unit="tokens")
    global_batch: int = opt("sequences of one update, over all GPUs", default=256, min=1, max=1_000_000_000)
    micro_batch: int | None = opt(
        "sequences of one forward pass [default: what suits each layout]", default=None, min=1
    )
    engine: Literal["any", "transformers", "megatron"] = opt(
        "what trains: transformers (TP, FSDP, EP; `moeforge tune`), megatron (also PP, CP, ETP; Megatron-Bridge), or whichever is better",
        default="any",
    )
    objective: Literal["mfu", "memory"] = opt("what to sort by: the fastest step, or the least memory", default="mfu")
    memory: float | None = opt("what a rank may take [default: the GPU's]", default=None, min=0.001, unit="GB")
    training: Literal["full", "lora", "4bit"] = opt(
        "full: every parameter; lora: adapters beside frozen weights; 4bit: the same beside weights in 4 bits",
        default="full",
    )
    rank: int = opt("rank of the adapters of lora and 4bit", default=16, min=1)
    optimizer: Literal["adamw", "adamw-8bit"] = opt("AdamW, or bitsandbytes' with moments of 8 bits", default="adamw")
    skew: float = opt("rows of the busiest expert over the mean; 1 is balanced", default=1.0, min=1)
    node: int | None = opt("GPUs of one machine [default: the hardware's]", default=None, min=1)
    network: float | None = opt(
        "between machines, a GPU, one way [default: the hardware's]", default=None, min=0.001, unit="GB/s"
    )
    top: int = opt("layouts to show; 0: all", default=5, min=0)
    calibrate: bool = opt(
        f"first measure this machine (matrix products, an all-to-all, an all-gather) and plan for it (--gpu {LOCAL}); without MODEL, "
        "only measure",
        default=False,
    )

    def __post_init__(self) -> None:
        if self.gpu is not None and self.gpu not in (*hardware(), LOCAL):
            raise UsageProblem(f"--gpu {self.gpu}: {did_you_mean(self.gpu, (*hardware(), LOCAL))}")
        if self.calibrate and self.gpu not in (None, LOCAL):
            raise UsageProblem(
                f"--calibrate measures this machine, and --gpu {self.gpu} asks for another; leave one out"
            )
        if self.engine == "megatron" and (self.training == "4bit" or self.optimizer == "adamw-8bit"):
            asked = "--training 4bit" if self.training == "4bit" else "--optimizer adamw-8bit"
            raise UsageProblem(f"{asked} is bitsandbytes', which Megatron does not run; use --engine transformers")

    @property
    def engines(self) -> tuple[Engine, ...]:
        if self.engine != "any":
            return (self.engine,)
        only = self.training == "4bit" or self.optimizer == "adamw-8bit"
        return ("transformers",) if only else ("megatron", "transformers")


class Plan:
    """Imports no torch, save to calibrate."""

    name: ClassVar[str] = "plan"
    summary: ClassVar[str] = (
        "rank the ways of spreading a model over many GPUs, by time and memory, and say how to run the best"
    )
    examples: ClassVar[dict[str, str]] = {
        "moeforge plan mistralai/Mixtral-8x22B-v0.1 --gpus 128": "ranked layouts, why each lost, what does not fit",
        "moeforge plan Qwen/Qwen3-30B-A3B --gpus 16 --engine transformers": "the DistributedConfig and the tune line",
        "moeforge upcycle org/dense --experts 8 --dry-run | moeforge plan --gpus 64": "a model that is not written yet",
        "moeforge plan config.json --gpus 8 --gpu a100 --training lora --objective memory": "from sizes alone",
        "moeforge plan --calibrate": "measure this machine for --gpu local",
    }
    api_version = 1
    consumes: ClassVar[frozenset[str]] = frozenset({"checkpoint", "gguf", "plan"})
    sources = 0  # MODEL is an argument: --calibrate needs none, and config.json is no artifact
    Options = Options

    def answer(self, sources: list[Artifact], options: Options, ctx: Context) -> Answer:
        if options.calibrate:
            measured = local.calibrate(ctx)
            if options.model == "-":
                return Answer(measured.data(), measured.text())
        gpu, notes = _hardware(options, ctx.home)
        shape, said, ref = self._shape(options)
        job = Job(options.seq, options.global_batch, options.training, options.optimizer, options.rank, options.skew)
        budget = 1e9 * (options.memory or gpu.memory)
        found = search(shape, job, gpu, options.gpus, budget, engines=options.engines, objective=options.objective,
                       micro_batch=options.micro_batch)  # fmt: skip
        if not found.fits and not found.misfits:
            why = "; ".join(text for text, _ in found.refused.most_common(3)) or "the engine has none"
            raise UsageProblem(
                f"no layout of {ref} on {options.gpus} GPUs can run: {why}; change --gpus, --global-batch or --engine"
            )
        report = Report(
            ref, shape, job, gpu, options.gpus, budget, options.objective, found, options.top, [*said, *notes]
        )
        return Answer(report.data(), report.text(), ExitCode.OK if found.fits else ExitCode.GATE)

    def _shape(self, options: Options) -> tuple[Shape, list[str], str]:
        """(shape, notes, what it is called)."""
        path = Path(options.model).expanduser()
        if path.suffix == ".json" and path.is_file():
            folder = Folder(path.resolve().parent)
            return read(_object(parse_json(folder.read(path.name), str(path)), path)), [], options.model
        src = source(None if options.model == "-" else options.model, self.name)
        check_kind(self, src)
        with open_checkpoint(src.ref, allow_pickle=options.allow_pickle, dequantize=None, plan=src.plan) as checkpoint:
            found = anatomy(checkpoint.config, checkpoint.tensors)
            shape = read(checkpoint.config, found)
        off = found.parameters_total / shape.parameters - 1
        notes = []
        if abs(off) > UNCOUNTED:
            notes.append(f"the headers hold {describe_value('parameters', found.parameters_total)} parameters, {100 * abs(off):.0f}% "
                         f"{'more' if off > 0 else 'fewer'} than the decoder that is planned for")  # fmt: skip
        return shape, notes, "the plan on stdin" if src.plan is not None else src.ref


def _object(config: Any, path: Path) -> dict[str, Any]:
    if not isinstance(config, dict):
        raise BadInput(f"{path}: expected the JSON object of a config.json, got {type(config).__name__}")
    return config


def _hardware(options: Options, home: Path) -> tuple[Hardware, list[str]]:
    """What to plan for, and what to note of it."""
    notes = []
    if options.calibrate or options.gpu == LOCAL:
        gpu = local.stored(home)
        if options.gpus > 1 and not gpu.link:
            raise UsageProblem(f"--gpu {LOCAL} --gpus {options.gpus}: only one GPU was measured here, no link between several; name a --gpu "
                               f"of {', '.join(hardware())}, or plan for one")  # fmt: skip
        if options.gpus > (options.node or gpu.node) and options.network is None:
            notes.append(
                f"between machines {gpu.link:.3g} GB/s are assumed, the link that was measured within this one; --network says better"
            )
    else:
        gpu = hardware()[options.gpu or "h100"]
    changed = {name: value for name in ("node", "network") if (value := getattr(options, name)) is not None}
    return dataclasses.replace(gpu, **changed), notes
