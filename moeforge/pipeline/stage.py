"""The contracts between the core and a plugin: Stage, Method, Query.

Instances are made by the command line with no arguments; classes must import no torch at module level (import it inside
`run`). Attributes are class attributes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

from .artifact import Artifact, Plan

if TYPE_CHECKING:
    from .context import Context
    from .workspace import Workspace


@dataclass(frozen=True)
class Bound:
    """A method with its resolved options: what a stage gets as `method`."""

    name: str
    method: Any
    options: Any
    pinned: tuple[str, ...] | None = None
    """`parents` with moving Hub branches pinned to their commits; None before a run has pinned them."""

    @property
    def parents(self) -> tuple[str, ...]:
        """Refs of the checkpoints that the method reads beside SRC, as they are to be opened."""
        if self.pinned is not None:
            return self.pinned
        return tuple(self.method.parents(self.options)) if hasattr(self.method, "parents") else ()


@dataclass(frozen=True)
class Written:
    """What `Stage.run` reports about the files that it left in the workspace; the core writes the manifest from it."""

    kind: str
    counts: dict[str, Any] = field(default_factory=dict)
    """Measured numbers: tensors, parameters, losses, tokens/s ... Goes into the manifest and the summary."""
    verdicts: dict[str, Any] = field(default_factory=dict)
    """What was proven or measured of the result, e.g. {"exact": true, "relative_error": 4e-7}."""
    digests: dict[str, str] = field(default_factory=dict)
    """File name -> `sha256:...` where the stage knows it already; the core hashes the files that are missing here."""
    tensor_digests: dict[str, str] = field(default_factory=dict)
    """Tensor name -> sha256 (hex), as the writer returns them; lets `verify` name the tensor that changed."""
    parents: tuple[dict[str, Any], ...] = ()
    """`Checkpoint.provenance()` of every source."""
    notes: tuple[str, ...] = ()
    """Lines for the human summary."""


class Stage(Protocol):
    """A verb that turns an artifact into another artifact.

    A stage that reads more than SRC and its options also has

        def inputs(self, options, method: Bound | None) -> Sequence[Any]: ...

    JSON-able identities (digests, or names with sizes and times) of the other files that decide the output's bytes. They
    are part of the run's key: a change in them is another run, never "already done" and never a resume. It is called
    before `plan`; without it nothing but SRC, the method's `parents` and the options is assumed to matter. Options that
    name such files are declared with `opt(..., reads=True)`, so that the output cannot be put over them.

    A stage that several processes of a launcher (torchrun, accelerate launch) can do together has

        def follow(self, plan: Plan, ctx: Context) -> None: ...
        def dismiss(self) -> None: ...

    The first process calls `run`, all others `follow`, which writes nothing; `dismiss` is called by the first one in the place of
    `run` where the output turned out to be there already.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    examples: ClassVar[Mapping[str, str]]
    """Command line -> what it shows, in a few words; for `--help` and the docs."""
    api_version: ClassVar[int]
    consumes: ClassVar[frozenset[str]]
    """Artifact kinds accepted as SRC."""
    produces: ClassVar[str]
    output: ClassVar[Literal["directory", "file"]]
    """`file`: `-o` names one file (a receipt), written by rename; `Workspace.path` is then a scratch directory whose
    single file becomes the output."""
    default_method: ClassVar[str | None]
    """None: the verb has no methods and takes no `--method`."""
    Options: ClassVar[type]

    def plan(self, src: Artifact, options: Any, method: Bound | None) -> Plan:
        """Pure: reads config and headers, writes nothing, imports no torch.

        Raises:
            BadInput, UsageProblem: what was asked cannot be done; names the key and value in the way.
        """
        ...

    def run(self, plan: Plan, out: Workspace, ctx: Context) -> Written:
        """Does the work: writes files into `out.path` only."""
        ...


class Method(Protocol):
    """One way of doing a verb. Each verb adds its own small protocol to this.

    Two more are optional, and the core knows them:

        def parents(self, options) -> Sequence[str]: ...
        def inputs(self, stage_options, method_options) -> Sequence[Any]: ...

    `parents` are refs of checkpoints read beside SRC. The core pins and digests them; open `Bound.parents`, never the
    options. `inputs` is what `Stage.inputs` is, for files that only this method reads.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    reference: ClassVar[str]
    """Paper or origin; goes to the manifest and the model card."""
    api_version: ClassVar[int]
    Options: ClassVar[type]


@dataclass(frozen=True)
class Answer:
    """The result of a query."""

    data: dict[str, Any]
    """Printed as one line with `--json` (and whenever stdout is not a terminal if `json_by_default`)."""
    text: str
    """Printed otherwise."""
    exit_code: int = 0
    page: str = ""
    """The file's text, of a query that writes one."""


class Query(Protocol):
    """A verb that reads artifacts and answers on stdout; it writes no artifact.

    One that also writes a page for people has

        page: ClassVar[str]

    the file's name where `-o` gives none, and leaves its text in `Answer.page`; the core checks the place and writes it.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    examples: ClassVar[Mapping[str, str]]
    api_version: ClassVar[int]
    consumes: ClassVar[frozenset[str]]
    sources: ClassVar[int]
    """How many SRC arguments it takes (`diff` takes 2, `bench` none). With 1, SRC may come from stdin."""
    Options: ClassVar[type]

    def answer(self, sources: list[Artifact], options: Any, ctx: Context) -> Answer: ...


def is_stage(cls: type) -> bool:
    """True for a Stage class, False for a Query class."""
    return hasattr(cls, "run")


def page_of(stage: Any) -> str | None:
    """The default name of the page that a query writes, None where it writes none."""
    return None if is_stage(type(stage)) else getattr(stage, "page", None)


__all__ = ["Answer", "Artifact", "Bound", "Method", "Path", "Plan", "Query", "Stage", "Written", "is_stage", "page_of"]
