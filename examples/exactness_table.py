"""Measure every dense-to-mixture pair by every method on tiny random models and write docs/upcycle-exactness.md.

    python examples/exactness_table.py [--output docs/upcycle-exactness.md]

Both models are run by transformers in float32 on the same random tokens or pixels; norms and biases are perturbed, so a tensor
that is dropped or swapped shows. Takes about three minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers

import moeforge
from moeforge.errors import BadInput
from moeforge.model.runtime import HEADS
from moeforge.testing import inprocess
from moeforge.testing.models import FAMILIES, OTHERS, save_tiny
from moeforge_upcycle import pairs

COLUMNS: dict[str, tuple[str, dict[str, Any]]] = {
    "copy": ("copy", {}),
    "split G=2": ("split", {"granularity": 2, "experts": 8, "top_k": 4}),
    "split G=4": ("split", {"granularity": 4, "experts": 8, "top_k": 4, "partition": "random"}),
    "shared 1+1": ("shared", {"rank": "norm"}),
    "shared half": ("shared", {"fill": "half"}),
    "shared 1+3": ("shared", {"rank": "norm", "granularity": 3, "experts": 6, "top_k": 3}),
    "last half sparse": ("copy", {"layers": "last-half"}),
    "every 2nd sparse": ("copy", {"layers": "every:2"}),
    "noise": ("noise", {}),
    "drop r=0.5": ("drop", {"r": 0.5}),
    "cuberoot G=4": ("split", {"granularity": 4, "experts": 8, "top_k": 4, "scale": "cuberoot"}),
    "btx, equal": ("btx", {"experts": 2}),
    "btx, unequal": ("btx", {"experts": 2}),
    "carve 2 of 4": ("carve", {"partition": "kmeans", "router": "stage", "top_k": 2}),
}
SECOND = {"btx, equal": "twin", "btx, unequal": "other"}
"""Column -> the second parent: a copy of the dense model, or one of other weights."""
EXACT = 1e-5

HEAD = """# Which pairs are exact, measured

Relative error `max|dlogit| / max|logit|` between the dense model and its mixture, both run by transformers in float32 on tiny
random models with perturbed norms and biases; `moeforge` is the layout of our own runtime, which transformers loads where moeforge is
installed, every other one needs stock transformers alone. Up to {exact:.0e}, with the same favourite everywhere, it is the same
function; **bold** is not. `-`: the layout lacks what the method asks for, and the command says so before it writes anything.
The last columns change the function on purpose: `noise` and `drop` so that experts differ, `cuberoot` for parity with
Megatron-Core, whose scaling reaches inside the activation, `btx` because its two parents differ (of equal ones it is the same
function, which headers cannot promise), `carve` because a token visits half of the FFN.

Written by `python examples/exactness_table.py` with moeforge {moeforge}, transformers {transformers}, torch {torch}, {machine}.

"""


def logits(directory: Path) -> torch.Tensor:
    """[2, 40, V] of the class that config.json names, float32; [2, labels] of a classifier of images.

    Raises:
        RuntimeError: keys are missing or left over.
    """
    (name,) = json.loads((directory / "config.json").read_text())["architectures"]
    ours = next((head.auto for head in HEADS if head.__name__ == name), name)
    model, loading = getattr(transformers, ours).from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    if any(loading.values()):
        raise RuntimeError(f"{directory}: {loading}")
    random = torch.Generator().manual_seed(1)
    if model.main_input_name == "pixel_values":
        given = torch.randn(2, 3, 16, 16, generator=random)
    else:
        given = torch.randint(3, model.config.vocab_size, (2, 40), generator=random)
    with torch.no_grad():
        return model.eval()(given).logits


def cell(reference: torch.Tensor, source: Path, target: str, column: str, scratch: Path) -> str:
    """The error of one way of upcycling, as the table shows it."""
    method, options = COLUMNS[column]
    options = {"experts": 4, "router_std": 0.5, "verify": False, "target": target, **options}
    if column in SECOND:
        options["expert"] = (str(scratch / f"{source.name}-{SECOND[column]}"),)
    try:
        done = inprocess.run(
            "upcycle", source, scratch / f"{source.name}-{target}-{column}".replace(" ", "-"), method, **options
        )
    except BadInput:
        return "-"
    found = logits(done.path)
    error = float((found - reference).abs().max() / reference.abs().max())
    same = error <= EXACT and bool((found.argmax(-1) == reference.argmax(-1)).all())
    if same != (done.manifest["verdicts"]["exact"] or column == "btx, equal"):
        raise RuntimeError(
            f"{source.name} to {target} by {column}: promised {done.manifest['verdicts']['exact']}, found {error}"
        )
    return f"{error:.1e}" if same else f"**{error:.2g}**"


def table(scratch: Path) -> str:
    lines = ["| dense | mixture | " + " | ".join(COLUMNS) + " |", "| --- " * (2 + len(COLUMNS)) + "|"]
    for family in (*FAMILIES, *OTHERS):
        source = scratch / family
        save_tiny(source, family)
        shutil.copytree(source, scratch / f"{family}-{SECOND['btx, equal']}")
        save_tiny(scratch / f"{family}-{SECOND['btx, unequal']}", family, seed=1)
        reference = logits(source)
        for target in (*(pair.target.model_type for pair in pairs.load(family)[0]), "moeforge"):
            cells = [cell(reference, source, target, column, scratch) for column in COLUMNS]
            lines.append(f"| {family} | {target} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def conditions() -> str:
    """The conditions of every pair and the reasons for what is never exact, from the data that the command uses."""
    lines = [
        "\n## Conditions\n",
        "What the config must say for a native pair to be exact; anything else is refused by its key where that target is asked for, and "
        "becomes `moeforge` by itself, which has no conditions but that the experts' kernels know the activation.\n",
    ]
    lines += ["| dense | mixture | condition | because |", "| --- | --- | --- | --- |"]
    refused = ["\n## Never\n", "| dense | native mixture | key | because |", "| --- | --- | --- | --- |"]
    for family in FAMILIES:
        usable, never = pairs.load(family)
        for pair in usable:
            for rule in pair.require:
                wanted = f"`{rule.key}` {rule.op} `{rule.value}`".replace("|", "\\|")
                unless = ", or those tensors are zero" if rule.drops else ""
                lines.append(f"| {family} | {pair.target.model_type} | {wanted}{unless} | {rule.because} |")
        never = tuple(n for n in never if n.target != "*" or not usable)
        refused += [f"| {family} | {'any' if n.target == '*' else n.target} | `{n.key}` | {n.because} |" for n in never]
    return "\n".join([*lines, *refused]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("docs/upcycle-exactness.md"))
    output = parser.parse_args().output
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    head = HEAD.format(
        exact=EXACT,
        moeforge=moeforge.__version__,
        transformers=transformers.__version__,
        torch=torch.__version__,
        machine=f"{platform.machine()} CPU",
    )
    with tempfile.TemporaryDirectory() as scratch:
        text = head + table(Path(scratch)) + conditions()
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(text, "utf-8")
    print(f"wrote {output}")


if __name__ == "__main__":
    main()
