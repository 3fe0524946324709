"""Proofs about an adapter, from its written files: what it computes at step 0, that it can be saved and loaded, that every tensor
learns, that each expert alone is what PEFT makes of it, and that the base stays as it is."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from moeforge.checkpoint import open_checkpoint
from moeforge.checkpoint.expert_adapter import adapter_ops, write_settings
from moeforge.checkpoint.tensor import TensorInfo
from moeforge.checkpoint.writer import write_checkpoint
from moeforge.errors import one_line
from moeforge.mixture.losses import Weights, layer_losses
from moeforge.model.adapters import fill, forced, values_of
from moeforge.model.load import load
from moeforge.model.memory import fits
from moeforge.model.mixing import LABELS
from moeforge.options import format_bytes
from moeforge.pipeline.context import Context
from moeforge_kernels.dispatch import using

if TYPE_CHECKING:
    from .stage import Job

TOKENS = (2, 48)
TOLERANCE = 1e-5
SCRATCH = "verify"
ALONE = 8
"""Experts that are compared with PEFT one by one."""


def verify(job: Job, written: Path, ctx: Context) -> dict[str, Any]:
    """Verdicts: `verified`, and `proof` (one line), `failed` (sentences), `measured`."""
    if job.options.verify is False:
        return {"verified": False, "why_not_verified": "--no-verify"}
    needed = 3 * 4 * sum(info.size for info in job.base.tensors.values()) + 16 * sum(map(_size, job.shapes.values()))
    if job.options.verify is None and not fits(needed):
        why = f"the proof takes {format_bytes(needed)} of memory; --verify does it anyway"
        ctx.warn(f"not verified: {why}")
        return {"verified": False, "why_not_verified": why}
    with using("reference"), torch.random.fork_rng(devices=[]):
        return _Proof(job, written, ctx).run()


def _size(shape: tuple[int, ...]) -> int:
    return int(torch.Size(shape).numel())


class _PeftRefuses(Exception):
    """PEFT has no LoRA for a linear map that has one here."""


class _Proof:
    def __init__(self, job: Job, written: Path, ctx: Context) -> None:
        self.job, self.written, self.ctx = job, written, ctx
        self.failed: list[str] = []
        self.measured: dict[str, Any] = {}
        torch.manual_seed(0)
        vocabulary = (
            job.base.config.get("vocab_size") or job.base.config.get("text_config", {}).get("vocab_size") or 100
        )
        self.ids = torch.randint(vocabulary, TOKENS)

    def run(self) -> dict[str, Any]:
        job, said = self.job, []
        before = job.base.provenance()["digest"]
        base = load(job.base, dtype="float32")
        alone = self._logits(base)
        with open_checkpoint(str(self.written)) as adapter:
            model: Any = load(adapter, dtype="float32")
            # the base's own float type may be shorter than the adapter's
        trained = {name: p for name, p in model.named_parameters() if _is_own(name, model)}
        if job.content is None:
            error = _relative(self._logits(model), alone)
            self.measured["step_0_relative_error"] = error
            self._require(error <= TOLERANCE, f"step 0 is not the base model: relative error {error:.1e} of the logits")
            said.append(f"step 0 relative error {error:.1e}")
        self.ctx.check()
        with torch.no_grad():
            for name, parameter in trained.items():
                if name.endswith("lora_B"):
                    parameter.add_(0.05 * torch.randn_like(parameter))
        self._saved_and_loaded(model)
        said.append("saved and loaded bit for bit")
        self.ctx.check()
        said.append(self._alone(model))
        self.ctx.check()
        said.append(self._gradients(model, base))
        after = job.base.provenance()["digest"]
        self._require(before == after, f"the base changed on disk meanwhile: {before} became {after}")
        return {"verified": True, "proof": "; ".join(said), "failed": self.failed, "measured": self.measured}

    def _require(self, holds: bool, otherwise: str) -> None:
        if not holds:
            self.failed.append(otherwise)

    @torch.no_grad()
    def _logits(self, model: Any) -> Tensor:
        # label routers are told that every token is about the first expert's domain; the others do not ask
        labels = {LABELS: torch.zeros_like(self.ids)} if hasattr(model, "mixtures") else {}
        return model.eval()(input_ids=self.ids, use_cache=False, **labels).logits.float()

    def _saved_and_loaded(self, model: Any) -> None:
        scratch = self.written / SCRATCH
        scratch.mkdir()
        try:
            values = {name: value.contiguous().numpy() for name, value in values_of(model).items()}
            ops = {
                name: (TensorInfo(name, "F32", value.shape), (lambda value=value: value))
                for name, value in values.items()
            }
            write_checkpoint(
                adapter_ops(ops), scratch, stem="adapter_model", max_shard_bytes=1 << 62, check=self.ctx.check
            )
            with open_checkpoint(str(self.written)) as first:
                write_settings(scratch, first.settings)  # pyright: ignore[reportAttributeAccessIssue]
            wanted = self._logits(model)
            with open_checkpoint(str(scratch)) as again:
                fill(model, again)  # pyright: ignore[reportArgumentType]
            self._require(torch.equal(self._logits(model), wanted), "saved and loaded, the adapter gives other logits")
        finally:
            shutil.rmtree(scratch)

    def _alone(self, model: Any) -> str:
        """Each expert, forced, beside PEFT's own LoRA with its weights."""
        if importlib.util.find_spec("peft") is None:
            return "PEFT is not installed, forced routes not compared"
        count = max(layer.experts.count for _, layer in model.mixtures.values())
        worst = 0.0
        for expert in range(min(count, ALONE)):
            with forced(model, expert):
                found = self._logits(model)
            try:
                worst = max(worst, _relative(found, self._peft(model, expert)))
            except _PeftRefuses as refused:
                self.measured["forced_not_compared"] = str(refused)
                return "forced routes not compared, as PEFT does not take this base"
            self.ctx.check()
        self.measured["forced_relative_error"] = worst
        self._require(
            worst <= TOLERANCE, f"an expert alone is not what PEFT makes of its weights: relative error {worst:.1e}"
        )
        return f"{min(count, ALONE)} forced routes beside PEFT {worst:.1e}"

    def _peft(self, model: Any, expert: int) -> Tensor:
        from peft import LoraConfig, get_peft_model

        base = load(self.job.base, dtype="float32")
        wanted: dict[str, tuple[Tensor, Tensor, Tensor | None, float]] = {}
        for site, layer in model.mixtures.values():
            experts = layer.experts
            e = expert % experts.count
            for role, projection in site.projections.items():
                prefix = "" if len(site.projections) == 1 and hasattr(experts, "lora_A") else f"{role}_"
                halves = [getattr(experts, f"{prefix}{half}", None) for half in ("lora_A", "lora_B", "magnitude")]
                if halves[0] is not None:
                    a, b, m = (
                        None if h is None else h[e] if h.ndim > own else h
                        for h, own in zip(halves, (2, 2, 1), strict=True)
                    )
                    assert a is not None and b is not None
                    wanted[projection.path] = (a, b, m, experts.scales[e])
        options = next(iter(model.mixtures.values()))[1].experts.options
        ranks = {path: a.shape[0] for path, (a, *_) in wanted.items()}  # imported LoRAs have one for each site
        config = LoraConfig(
            r=options.rank, rank_pattern=ranks, lora_alpha=1, target_modules=list(wanted), use_dora=options.dora
        )
        try:
            wrapped: Any = get_peft_model(base, config)
        except ValueError as error:  # linear maps that it leaves alone, such as the one that leads out of a Mamba mixer
            raise _PeftRefuses(one_line(error)) from error
        with torch.no_grad():
            for path, (a, b, m, scale) in wanted.items():
                module = wrapped.base_model.model.get_submodule(path)
                module.lora_A["default"].weight.copy_(a)
                module.lora_B["default"].weight.copy_(b)
                module.scaling["default"] = scale
                if m is not None:
                    module.lora_magnitude_vector["default"].weight.copy_(m)
        return self._logits(wrapped)

    def _gradients(self, model: Any, base: Any) -> str:
        """Every tensor that learns gets a gradient from text, or from routing all tokens to its expert; the base gets none."""
        learning = {name: p for name, p in model.named_parameters() if p.requires_grad}
        reached: set[str] = set()

        def backward() -> None:
            model.train()
            with model.mixture_context.record() as seen:
                logits = model(input_ids=self.ids, use_cache=False).logits.float()
            loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), self.ids[:, 1:].flatten())
            if any(routing.probabilities is not None for routing in seen.values()):
                loss = loss + Weights(balance=0.01).total(layer_losses(seen))
            if loss.requires_grad:  # nothing learns on a forced route through frozen experts
                loss.backward()
            for name, parameter in learning.items():
                if parameter.grad is not None and bool(parameter.grad.isfinite().all()) and bool(parameter.grad.any()):
                    reached.add(name)
            model.zero_grad(set_to_none=False)

        if all(
            getattr(layer.router, "config", None) is None or layer.router.config.kind != "label"
            for _, layer in model.mixtures.values()
        ):
            backward()
        for expert in range(max(layer.experts.count for _, layer in model.mixtures.values())):
            with forced(model, expert):
                backward()
            self.ctx.check()
        self.measured["tensors_learning"], self.measured["tensors_reached"] = len(learning), len(reached)
        missed = sorted(learning.keys() - reached)
        self._require(
            not missed,
            f"{len(missed)} of {len(learning)} trainable tensors get no gradient, {missed[0] if missed else ''} first",
        )
        torch.optim.AdamW(list(learning.values()), lr=0.01).step()
        moved = _changed(model, base)
        self._require(not moved, f"training moves the base: {moved}")
        return f"gradients reach {len(reached)} of {len(learning)} tensors; the base is untouched"


def _is_own(name: str, model: Any) -> bool:
    return any(
        name.startswith((f"{mount}.experts.", f"{mount}.router.")) and ".experts.base." not in name
        for mount in model.mixtures
    )


def _changed(model: Any, base: Any) -> str:
    """The first parameter of the base that is not what it was; empty where all are."""
    frozen = [(name, p) for name, p in model.named_parameters() if not _is_own(name, model)]
    held = {_plain_name(name, model): value for name, value in frozen}
    for name, value in base.named_parameters():
        if name not in held:
            return f"{name} is gone"
        if not torch.equal(held[name], value):
            return name
    return ""


def _plain_name(name: str, model: Any) -> str:
    """A parameter's name in the base alone."""
    for mount, (site, _) in model.mixtures.items():
        inside = f"{mount}.experts.base."
        if name.startswith(inside):
            return f"{site.root}.{name[len(inside) :]}"
    return name


def _relative(found: Tensor, wanted: Tensor) -> float:
    return (
        float((found - wanted).norm() / wanted.norm().clamp_min(1e-30))
        if bool(found.isfinite().all())
        else float("inf")
    )
