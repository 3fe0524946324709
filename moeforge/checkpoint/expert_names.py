"""What the tensors of a mixture are called in a checkpoint of our own runtime, told from the names of the dense model.

A site has a root: the smallest module that holds all of its projections (`model.layers.0.mlp`; in BERT, whose feed-forward block
is spread over `intermediate` and `output`, the layer itself). An expert's tensor keeps its path below the root:

    {root}.experts.3.gate_proj.weight    {root}.shared_expert.gate_proj.weight    {root}.router.weight

So taking `experts.3.` or `shared_expert.` out of a name gives the dense tensor that it came from, whatever the family calls it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

ROUTER, EXPERTS, SHARED = "router", "experts", "shared_expert"
_MEMBER = re.compile(rf"(?:^|(?<=\.))(?:{EXPERTS}\.(\d+)|{SHARED})\.")


def root(tensors: Iterable[str]) -> str:
    """The smallest module that holds the modules of all these tensors; empty where that is the top."""
    paths = [name.split(".")[:-1] for name in tensors]
    shared = []
    for level, *others in zip(*(path[:-1] for path in paths), strict=False):
        if any(other != level for other in others):
            break
        shared.append(level)
    return ".".join(shared)


def inside(tensor: str, root: str, member: str) -> str:
    """`tensor`, a dense projection's, as `member` (`experts.3`, `shared_expert`) of the mixture at `root` has it."""
    return below(root, f"{member}.{tensor[len(root) + 1 if root else 0 :]}")


def below(root: str, path: str) -> str:
    """`path` with the root before it."""
    return f"{root}.{path}" if root else path


def dense_name(tensor: str) -> tuple[str, int | str | None]:
    """(the dense tensor that it came from, the expert's number or `shared_expert`); (itself, None) for any other tensor."""
    found = _MEMBER.search(tensor)
    if found is None:
        return tensor, None
    member = SHARED if found[1] is None else int(found[1])
    return tensor[: found.start()] + tensor[found.end() :], member
