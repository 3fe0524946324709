"""Bytes of memory that a conversion holds at once, phase by phase, foreseen from headers alone.

Upper bounds that lie near what is measured (tests/unit/upcycle/test_upcycle_memory.py): what the phase's libraries take, the
weights that are in memory together, and the arrays that are worked on. F: FFN width, D: model width, T: tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from moeforge.checkpoint.digest import cores
from moeforge.checkpoint.ops import TensorOp
from moeforge.checkpoint.planned import PlannedCheckpoint
from moeforge.checkpoint.writer import MAX_MEMORY, op_memory
from moeforge.errors import MachineLacks
from moeforge.model import memory
from moeforge.options import format_bytes

from . import domains
from .calibrate import SAMPLES
from .job import Job
from .measure import LENGTH, PROOF_TOKENS, needs

PLAIN = 55_000_000
"""The interpreter with numpy and the command."""
IMPORTING = 300_000_000
"""The same while torch is imported beside the writing, for the proof that follows."""
TOKENIZING = 60_000_000
"""The tokenizer library with a vocabulary."""
WORKERS = 4
"""Threads of the writer unless --workers says otherwise, or the cores where there are fewer."""


def by_phase(job: Job, ops: Sequence[TensorOp]) -> dict[str, int]:
    """Phase -> bytes, in the order of the phases; `ops` as planned."""
    found: dict[str, int] = {}
    if _measured(job):
        found["measuring"] = _measuring(job)
    found["recipes"] = _resting(job) + _recipe(job)
    held = _held(job, ops)
    found["writing"] = _writing(job, ops) + max(held[0], min(in_flight(job, ops), sum(held[: workers(job, ops)])))
    if proves(job, ops):
        found["proof"] = proof_bytes(job, ops)
    return found


def check(job: Job, ops: Sequence[TensorOp], phases: Mapping[str, int]) -> None:
    """Refuse a --max-memory below what must be held at once.

    Raises:
        MachineLacks: naming the phase and what it takes.
    """
    limit = job.options.max_memory
    if limit is None:
        return
    least = {**phases, "writing": _writing(job, ops) + _held(job, ops)[0]}
    phase = max(least, key=lambda name: least[name])
    if least[phase] <= limit:
        return
    advice = "; --no-verify does without the proof" if phase == "proof" else ""
    raise MachineLacks(f"--max-memory {format_bytes(limit)} is too little: {phase} takes {format_bytes(least[phase])} at "
                       f"least{advice}")  # fmt: skip


def in_flight(job: Job, ops: Sequence[TensorOp]) -> int:
    """Bytes of tensors that the writer may hold at once, so that the process stays within --max-memory."""
    limit = job.options.max_memory
    return MAX_MEMORY if limit is None else max(1, limit - _writing(job, ops))


def workers(job: Job, ops: Sequence[TensorOp]) -> int:
    """Threads for the writer: no more than can work within --max-memory, as each keeps some of what it has used."""
    wanted = job.options.workers or min(cores(), WORKERS)
    if job.options.max_memory is None:
        return wanted
    return max(1, min(wanted, in_flight(job, ops) // _held(job, ops)[0]))


def _held(job: Job, ops: Sequence[TensorOp]) -> list[int]:
    """What each op holds, largest first.

    Only a recipe says how experts are made; planned ops copy them, which stands for no more than whole copies of the FFN.
    """
    held = [op_memory(op) for op in ops]
    if not job.shape.exact or job.shape.width != job.settings["intermediate_size"]:
        matrix = job.parents[0].info("up", job.sparse[0])
        held += [2 * matrix.nbytes + 12 * matrix.size] * (len(job.sparse) * len(job.parents[0].matrices))
    return sorted(held, reverse=True)


def _measured(job: Job) -> bool:
    return bool(set().union(*needs(job)))


def _resting(job: Job) -> int:
    """What is in memory between the measurements and the proof."""
    return memory.RUNNING + TOKENIZING if _measured(job) else PLAIN


def _writing(job: Job, ops: Sequence[TensorOp]) -> int:
    """What is in memory beside the tensors that are being written."""
    return max(_resting(job), IMPORTING) if proves(job, ops) else _resting(job)


def proves(job: Job, ops: Sequence[TensorOp]) -> bool:
    """Whether the proof will be run: as asked, or if nothing was said, where it fits in memory."""
    if job.options.verify is not None:
        return job.options.verify
    return memory.fits(proof_bytes(job, ops), job.options.max_memory)


def proof_bytes(job: Job, ops: Iterable[TensorOp]) -> int:
    """What the proof of the planned model takes, with the text on which the drift of an inexact method is measured."""
    tensors = {info.name: [info.dtype, list(info.shape)] for op in ops for info in op.outputs}
    texts = [PROOF_TOKENS] * (len(job.options.calibration) or len(domains.DEFAULT)) if not job.shape.exact else []
    planned = PlannedCheckpoint({"config": job.config, "tensors": tensors})
    return memory.proof_bytes(job.sources[0], planned, texts)


def _measuring(job: Job) -> int:
    """One pass over the text for each parent, side by side, one layer of one of them in memory."""
    for_method, for_router = needs(job)
    wanted, options = for_method | for_router, job.options
    width, ffn = job.settings["hidden_size"], job.settings["intermediate_size"]
    if options.prompts is not None:
        texts = 2 * job.shape.rows * LENGTH
    else:
        texts = options.calibration_tokens * (len(options.calibration) or len(domains.DEFAULT))
    passes = len(job.parents) + (len(job.parents) > 1 or options.prompts is not None)
    sources = [parent.checkpoint for parent in job.parents]
    weights = max(map(memory.weight_bytes, sources))
    kept = 8 * 2 * width**2 * ("gram" in wanted)
    kept += 8 * min(SAMPLES, texts) * (width * ("samples" in wanted) + ffn * ("activations" in wanted))
    states = 4 * texts * (2 * width + LENGTH)
    return memory.RUNNING + TOKENIZING + weights + passes * (states + kept) + 4 * 4 * LENGTH * ffn


def _recipe(job: Job) -> int:
    """What the method works on in one layer, and the neurons and router rows that it decides for all of them."""
    width, ffn, shape = job.settings["hidden_size"], job.settings["intermediate_size"], job.shape
    ask = getattr(job.method.method, "work_bytes", lambda *_: 0)
    decided = len(job.sparse) * (8 * shape.experts * shape.width + 4 * shape.rows * width)
    return ask(width, ffn, job.method.options) + decided
