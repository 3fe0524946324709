"""The four published mixtures, by family and back end, beside a loop over whole networks in float64: worst relative errors, as a table.

    python tests/benchmarks/attach/parity.py [--families llama,phi3] [--seeds 3]

Tiny models of three layers; the loop knows nothing of moeforge.mixture (moeforge.testing.whole_experts). Each cell is the error of the
logits, in the norm of all, and the worst error of a gradient, in the norm of its tensor, over every tensor of the adapter and the inputs.
`float32 alone` is the loop itself in float32: what the width costs whoever computes. `decoding` is the logits alone, token after token
with a cache and without gradients.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from common import heading, settle_process, table  # beside this file

from moeforge.testing.adapters import save_adapter
from moeforge.testing.models import save_tiny, tiny_dense
from moeforge.testing.whole_experts import BACKENDS, Answer, ask_mixture, ask_whole, decode, layers_of, presets, worst

FAMILIES = "llama,mistral,qwen2,qwen3,gemma,phi3,gpt_neox,gpt2"
GOAL = 1e-5
ALONE, DECODING = "float32 alone", "decoding"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", default=FAMILIES)
    parser.add_argument("--seeds", type=int, default=1, help="adapters, each with inputs of its own")
    words = parser.parse_args()
    settle_process()
    rows: list[list[str]] = []
    columns = [ALONE, *BACKENDS, DECODING]
    over = cells = 0
    with tempfile.TemporaryDirectory() as scratch:
        for family in words.families.split(","):
            base = save_tiny(Path(scratch) / family, family)
            for preset, entries in presets(layers_of(tiny_dense(family)[0])[1]).items():
                seen: dict[str, list[tuple[float, ...]]] = {}
                for seed in range(words.seeds):
                    adapter = save_adapter(Path(scratch) / f"{family}-{preset}-{seed}", base, entries, seed=seed)
                    wanted = ask_whole(adapter, training=True, seed=seed)
                    alone = ask_whole(adapter, training=True, seed=seed, dtype="float32")
                    seen.setdefault(ALONE, []).append(_errors(wanted, alone))
                    seen.setdefault(DECODING, []).append(_decoding(adapter, seed))
                    for name, backends in BACKENDS.items():
                        try:
                            found = ask_mixture(adapter, backends, training=True, seed=seed)
                        except ValueError:  # that back end cannot run on this machine
                            continue
                        seen.setdefault(name, []).append(_errors(wanted, found))
                rows.append([preset, family])
                for name in columns:
                    errors = seen.get(name, [])
                    cells += len(errors) > 0 and name != ALONE
                    over += name != ALONE and not all(value <= GOAL for e in errors for value in e)  # nan is above
                    rows[-1].append(" / ".join(f"{max(e):.1e}" for e in zip(*errors, strict=True)) or "-")
    print(heading(), end="\n\n")
    print(table(["mixture", "family", *columns], rows))
    print(f"\nlogits / gradients, worst of {words.seeds}; {over} of {cells} cells above {GOAL:.0e}")
    return 1 if over else 0


def _errors(wanted: Answer, found: Answer) -> tuple[float, float]:
    errors = wanted.errors(found)
    return errors["logits"], worst(errors, sorted(errors.keys() - {"logits"}))[1]


def _decoding(adapter: Path, seed: int) -> tuple[float]:
    found = decode(adapter, seed=seed).double()
    wanted = ask_whole(adapter, training=False, seed=seed).logits[: len(found)]
    return (float((found - wanted).norm() / wanted.norm()),)


if __name__ == "__main__":
    raise SystemExit(main())
