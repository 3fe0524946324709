"""Bytes of memory that a conversion holds at once, phase by phase, foreseen from headers alone.

Upper bounds that lie near what is measured (tests/unit/upcycle/test_upcycle_memory.py): what the phase's libraries take, the
weights that are in memory together, and the arrays that are worked on. F: FFN width, D: model width, T: tokens.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence

from moeforge.checkpoint.base import Checkpoint
from moeforge.checkpoint.digest import cores
from moeforge.checkpoint.ops import TensorOp
from moeforge.checkpoint.tensor import TensorInfo
from moeforge.checkpoint.writer import MAX_MEMORY, op_memory
from moeforge.errors import MachineLacks
from moeforge.model import proof
from moeforge.options import format_bytes

from . import domains
from .calibrate import SAMPLES
from .job import Job
from .measure import LENGTH, PROOF_TOKENS, needs

PLAIN = 55_000_000
"""The interpreter with numpy and the command."""
IMPORTING = 300_000_000
"""The same while torch is imported beside the writing, for the proof that follows."""
RUNNING = 600_000_000
"""With torch, transformers' model classes and what a first forward leaves."""
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
    return RUNNING + TOKENIZING if _measured(job) else PLAIN


def _writing(job: Job, ops: Sequence[TensorOp]) -> int:
    """What is in memory beside the tensors that are being written."""
    return max(_resting(job), IMPORTING) if proves(job, ops) else _resting(job)


def proves(job: Job, ops: Sequence[TensorOp]) -> bool:
    """Whether the proof will be run: as asked, or if nothing was said, where it fits in memory."""
    if job.options.verify is not None:
        return job.options.verify
    # a limit above what the machine has makes it no larger
    memory = min(job.options.max_memory or math.inf, proof.available_memory() * 3 // 4)
    return proof_bytes(job, ops) <= memory


def proof_bytes(job: Job, ops: Iterable[TensorOp]) -> int:
    """What the proof takes: the larger model's largest layer (or embedding), one sequence's logits, all hidden states."""
    source = job.parents[0].checkpoint
    written = [info for op in ops for info in op.outputs]
    reading = max(_read(source, info) for info in source.tensors.values())
    # experts that are stored in one tensor are rearranged once they have been read
    placing = max(info.nbytes + (4 * info.size if len(info.shape) == 3 else 0) for info in written)
    weights = max(_unit(source.tensors.values()) + reading, _unit(written) + placing)
    texts = [PROOF_TOKENS] * (len(job.options.calibration) or len(domains.DEFAULT)) if not job.shape.exact else []
    lengths = [*proof.token_lengths(source.config), *texts]
    vocabulary, width, longest = job.settings.get("vocab_size", 0), job.settings["hidden_size"], max(lengths)
    hidden = 8 * 4 * sum(lengths) * width
    masks = 2 * 4 * sum(length**2 for length in lengths)
    logits = 4 * (longest + proof.HEAD) * vocabulary + 6 * 8 * proof.POSITIONS * vocabulary
    experts = 4 * 4 * longest * job.shape.top_k * job.settings["intermediate_size"]
    return RUNNING + weights + hidden + masks + max(logits, experts)


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
    weights = max(_unit(s.tensors.values()) + max(_read(s, info) for info in s.tensors.values()) for s in sources)
    kept = 8 * 2 * width**2 * ("gram" in wanted)
    kept += 8 * min(SAMPLES, texts) * (width * ("samples" in wanted) + ffn * ("activations" in wanted))
    states = 4 * texts * (2 * width + LENGTH)
    return RUNNING + TOKENIZING + weights + passes * (states + kept) + 4 * 4 * LENGTH * ffn


def _recipe(job: Job) -> int:
    """What the method works on in one layer, and the neurons and router rows that it decides for all of them."""
    width, ffn, shape = job.settings["hidden_size"], job.settings["intermediate_size"], job.shape
    ask = getattr(job.method.method, "work_bytes", lambda *_: 0)
    decided = len(job.sparse) * (8 * shape.experts * shape.width + 4 * shape.rows * width)
    return ask(width, ffn, job.method.options) + decided


def _unit(tensors: Iterable[TensorInfo]) -> int:
    """Bytes in float32 of the largest decoder layer, or of the largest tensor outside the layers where that is more."""
    layers: dict[str, int] = {}
    for info in tensors:
        found = re.match(r"(?:.*?\.)?(?:layers?|h)\.(\d+)\.", info.name)
        key = found[1] if found else info.name
        layers[key] = layers.get(key, 0) + 4 * info.size
    return max(layers.values())


def _read(checkpoint: Checkpoint, info: TensorInfo) -> int:
    """Bytes that reading a whole tensor takes; what does not lie in a file as it is, is computed in float32."""
    beside = 0 if checkpoint.extent(info.name) is not None else 4 * info.size
    return max(checkpoint.read_memory(info.name, info.nbytes), info.nbytes + beside)
