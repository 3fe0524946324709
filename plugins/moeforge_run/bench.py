"""The verb `bench`: how fast this machine is, backend by backend."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from moeforge.errors import UsageProblem
from moeforge.options import arg, opt
from moeforge.pipeline.artifact import Artifact
from moeforge.pipeline.context import Context
from moeforge.pipeline.stage import Answer
from moeforge.report.table import table


@dataclass(frozen=True)
class Options:
    what: str = arg("what to measure: kernels", default="kernels")
    shape: tuple[str, ...] = opt("tokens x width x FFN width x experts x active, such as 64x2048x1024x64x8 (an OLMoE layer)",
                                 default=("1x576x1536x8x2", "64x576x1536x8x2"), metavar="TxDxFxExK")  # fmt: skip
    dtype: Literal["float32", "bfloat16", "float16"] = opt("float type", default="float32")
    device: str = opt("where to run: cpu, cuda, cuda:1", default="cpu")
    backward: bool = opt("forward and backward instead of forward alone", default=False)
    repeats: int = opt("measurements of each; the median counts", default=10, min=1)
    tune: bool = opt("first measure block sizes for Triton's kernels and keep the best in $MOEFORGE_HOME/kernels.json; needs a GPU",
                     default=False)  # fmt: skip

    def __post_init__(self) -> None:
        if self.what != "kernels":
            raise UsageProblem(f"bench {self.what}: expected kernels")
        for shape in self.shape:
            parse(shape)
        if self.tune and not self.device.startswith("cuda"):
            raise UsageProblem(f"--tune measures Triton's kernels, which run on a GPU; --device is {self.device}")


class Bench:
    name: ClassVar[str] = "bench"
    summary: ClassVar[str] = "measure the kernels on this machine: op by backend, beside torch's own"
    examples: ClassVar[dict[str, str]] = {
        "moeforge bench kernels": "two shapes of a small model, forward",
        "moeforge bench kernels --shape 2048x2048x1024x64x8 --dtype bfloat16 --backward": "an OLMoE layer as it is trained",
    }
    api_version = 1
    consumes: ClassVar[frozenset[str]] = frozenset()
    sources = 0
    Options = Options

    def answer(self, sources: list[Artifact], options: Options, ctx: Context) -> Answer:
        import torch

        from moeforge.model.compute import check_compute
        from moeforge_kernels import measure, tuning

        check_compute(options.device, options.dtype)
        device, dtype = torch.device(options.device), getattr(torch, options.dtype)
        rows: list[dict[str, Any]] = []
        for text in options.shape:
            shape = measure.Layer(*parse(text))
            if options.tune:
                for line in measure.tune(shape, dtype, device):
                    ctx.check()
                    ctx.say(line)
            for row in measure.rows(shape, dtype, device, backward=options.backward, repeats=options.repeats):
                ctx.check()
                rows.append({"shape": text, "dtype": options.dtype, **row})
        where = tuning.device_name(device)
        threads = torch.get_num_threads()
        data = {
            "device": where,
            "threads": threads,
            "torch": torch.__version__,
            "backward": options.backward,
            "rows": rows,
        }
        told = [[row["shape"], row["op"], row["backend"], f"{row['ms']:.3f}", f"{row['ratio']:.2f}"] for row in rows]
        head = f"{where}, {threads} threads, torch {torch.__version__}, {options.dtype}, {'forward and backward' if options.backward else 'forward'}"
        return Answer(data, "\n".join([head, *table(["shape", "op", "backend", "ms", "times the best peer"], told)]))


def parse(text: str) -> tuple[int, int, int, int, int]:
    """(T, D, F, E, K).

    Raises:
        UsageProblem: not five positive numbers, or more active experts than there are.
    """
    parts = text.split("x")
    if len(parts) != 5 or not all(part.isdigit() and int(part) > 0 for part in parts):
        raise UsageProblem(f"--shape {text}: expected five positive numbers, TxDxFxExK, such as 64x2048x1024x64x8")
    tokens, width, ffn, experts, active = map(int, parts)
    if active > experts:
        raise UsageProblem(f"--shape {text}: {active} of {experts} experts cannot be active")
    return tokens, width, ffn, experts, active
