"""What methods and routers ask to have measured, in one pass over the calibration text for each parent."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moeforge.checkpoint.base import Checkpoint
from moeforge.errors import BadInput, UsageProblem
from moeforge.model.tokenizer import has_tokenizer

from . import domains, routers
from .job import Job
from .recipe import LayerStats
from .trunk import Trunk

if TYPE_CHECKING:
    from moeforge.pipeline.context import Context

LENGTH = 512
"""Tokens in one calibration sequence."""
PROOF_TOKENS = 512
"""Tokens of each text on which the drift of an inexact method is measured."""
Text = list[list[list[int]]]
"""For each domain, its sequences of token ids."""


@dataclass(frozen=True)
class Measured:
    """The figures of one sparse layer."""

    index: int
    parents: tuple[LayerStats | None, ...]
    """For the method: what each parent does on the calibration text."""
    router: LayerStats | None
    """For the router rows: the model around the mixture on the calibration text, or on the prompts."""


def needs(job: Job) -> tuple[frozenset[str], frozenset[str]]:
    """What (the method, the router) wants measured."""
    kind = job.options.router_init
    return job.method.method.needs(job.options, job.method.options), routers.NEEDS[kind]


def check(job: Job) -> None:
    """Refuse calibration that cannot work, before a byte of weights is read.

    Raises:
        BadInput: text is needed, and the source has no tokenizer.
        UsageProblem: an unknown router start, texts or prompts that do not fit the router rows, unreadable files.
    """
    options, rows = job.options, job.shape.experts // job.shape.tied
    routers.check(
        options.router_init,
        rows,
        len(options.calibration) or None,
        options.router_top1,
        std=options.router_std,
        untie=options.untie,
        scoring=job.target.scoring,
    )
    for_method, for_router = needs(job)
    if for_method or for_router:
        source = job.parents[0].checkpoint
        if not has_tokenizer(source):
            wanted = ", ".join(sorted(for_method | for_router))
            raise BadInput(f"{source.ref} has no tokenizer, so no text can be read to measure {wanted} for --method "
                           f"{job.method.name} with --router-init {options.router_init}")  # fmt: skip
        domains.load(options.calibration)
    if options.prompts is not None and len(domains.read_prompts(options.prompts)) != rows:
        found = len(domains.read_prompts(options.prompts))
        raise UsageProblem(f"--prompts {options.prompts} is for {found} experts, the router has {rows} rows")


def measure(job: Job, ctx: Context) -> Iterator[Measured]:
    """The figures of every sparse layer, in order, one layer in memory at a time; empty ones when nobody needs any."""
    for_method, for_router = needs(job)
    by_prompts = job.options.prompts is not None
    # one pass serves both where the router's model is the only parent, on the same text
    together = len(job.parents) == 1 and not by_prompts
    text = _text(job, ctx) if for_method or (for_router and not by_prompts) else None
    passes = [
        _pass(job, p.checkpoint, for_method | (for_router if together else set()), text, ctx) for p in job.parents
    ]
    if together:
        passes.append(iter([(index, None) for index in job.sparse]))
    else:
        first = job.parents[0].checkpoint
        model = first if len(job.parents) == 1 else Trunk(job.parents, job.method.method, job.method.options)
        passes.append(_pass(job, model, for_router, _prompts(job, ctx) if by_prompts and for_router else text, ctx))
    for found in zip(*passes, strict=True):
        *parents, router = (stats for _, stats in found)
        yield Measured(found[0][0], tuple(parents), parents[0] if together else router)


def _pass(
    job: Job, checkpoint: Checkpoint, wanted: Collection[str], text: Text | None, ctx: Context
) -> Iterator[tuple[int, LayerStats | None]]:
    if not wanted:
        return iter([(index, None) for index in job.sparse])
    from .calibrate import calibrate

    assert text is not None
    return calibrate(checkpoint, job.sparse, wanted, text, seed=job.options.seed, ctx=ctx)


def sources(job: Job) -> dict[str, Any]:
    """Name and digest of every text that takes part, for the manifest."""
    for_method, for_router = needs(job)
    if for_method or (for_router and job.options.prompts is None):
        return {domain.name: domain.digest for domain in domains.load(job.options.calibration)}
    return {}


def _text(job: Job, ctx: Context) -> Text:
    encode = starting_encoder(job.parents[0].checkpoint, ctx)
    return [d.sequences(encode, job.options.calibration_tokens, LENGTH) for d in domains.load(job.options.calibration)]


def _prompts(job: Job, ctx: Context) -> Text:
    """Positive and negative prompts of each router row in turn, as routers.make wants them.

    Raises:
        UsageProblem: nothing of a prompt would be measured.
    """
    path = job.options.prompts
    assert path is not None
    encode = starting_encoder(job.parents[0].checkpoint, ctx)
    found = []
    for number, row in enumerate(domains.read_prompts(path)):
        for texts in (row.positive, row.negative):
            found.append([encode(text)[:LENGTH] for text in texts])
            for text, ids in zip(texts, found[-1], strict=True):
                if len(ids) < 2:
                    raise UsageProblem(f"--prompts {path}: expert {number}: {text!r} is {len(ids)} token, and a sequence's first "
                                       "token is not measured; write a longer prompt")  # fmt: skip
    return found


def drift_text(job: Job) -> dict[str, list[list[int]]]:
    """Real text to measure the drift of an inexact method on, by domain: none without a tokenizer."""
    source = job.parents[0].checkpoint
    if not has_tokenizer(source):
        return {}
    encode = encoder(source)
    return {d.name: d.sequences(encode, PROOF_TOKENS, PROOF_TOKENS) for d in domains.load(job.options.calibration)}


def encoder(checkpoint: Checkpoint) -> domains.Encode:
    """Text -> ids as the checkpoint's tokenizer begins a text, without an end-of-text token behind it."""
    from moeforge.model.tokenizer import load_tokenizer

    return _encode(load_tokenizer(checkpoint))


def starting_encoder(checkpoint: Checkpoint, ctx: Context) -> domains.Encode:
    """Text -> ids that begin with a token which is no part of the text: calibration leaves the first token of a sequence out.

    Where the tokenizer puts none there, its start token is taken, or else the one that ends a document and so precedes
    the next one in packed training data. Where there is neither, a warning says that first tokens are lost.
    """
    from moeforge.model.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(checkpoint)
    encode = _encode(tokenizer)
    if encode("text")[:1] != tokenizer("text", add_special_tokens=False)["input_ids"][:1]:
        return encode
    start: Any = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    if start is None:
        ctx.warn(f"{checkpoint.ref}: its tokenizer has no token to begin a text with, so the first token of every text and "
                 "prompt is not measured")  # fmt: skip
        return encode
    return lambda text: [start, *encode(text)]


def _encode(tokenizer: Any) -> domains.Encode:
    def encode(text: str) -> list[int]:
        ids = list(tokenizer(text, verbose=False)["input_ids"])
        return ids[:-1] if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id else ids

    return encode
