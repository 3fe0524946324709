"""Which runtimes compute the same function from the written files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .predicates import Predicate
from .targets import Target


def verdicts(target: Target, settings: Mapping[str, Any]) -> dict[str, str]:
    """{runtime: "exact", "inexact: sentence" or "unsupported: sentence"} under the layout's rules.

    `exact` means: the runtime computes what transformers computes, from the written files, or for llama.cpp from the file
    that `moeforge export --to gguf` makes of them. Where that writes no such layout, the verdict says whose converter does. `settings`: the output config and everything that
    the templates may name.
    """
    found = {}
    for runtime, own in target.portability.items():
        rules = [*target.portability_first.get(runtime, ()), *own]
        rule = next(r for r in rules if all(Predicate.parse(p).holds(settings) for p in r.get("when", ())))
        found[runtime] = ": ".join(filter(None, (rule["verdict"], rule.get("because"))))
    return found
