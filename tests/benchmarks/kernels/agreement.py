"""Prints how far every backend is from the reference in float64: op x backend x data type x shape, answers and gradients.

    python tests/benchmarks/kernels/agreement.py                               # every backend that runs on this machine
    TRITON_INTERPRET=1 python tests/benchmarks/kernels/agreement.py --backend triton
    python tests/benchmarks/kernels/agreement.py --device cuda

Errors are the largest difference over the largest true entry; `worst` names the tensor. Exit code 1: one is over its limit.
"""

from __future__ import annotations

import argparse
import json
import sys

import torch

from moeforge_kernels import agreement

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def rows(options: argparse.Namespace):
    for variant, (op, _) in agreement.VARIANTS.items():
        if options.op and not variant.startswith(tuple(options.op)):
            continue
        for backend in options.backend or op.backends:
            for dtype in options.dtype if backend in op.backends else ():
                for case in options.case or agreement.CASES:
                    found = agreement.errors(variant, backend, DTYPES[dtype], case, device=options.device)
                    row = {"op": variant, "backend": backend, "dtype": dtype, "case": case, "device": options.device}
                    if isinstance(found, str):
                        yield row | {"refused": found}
                        continue
                    worst = max(found, key=lambda name: found[name])
                    fits = found[worst] <= agreement.LIMITS[DTYPES[dtype]]
                    yield row | {"error": found[worst], "worst": worst, "fits": fits}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", action="append", help="how its name begins; may be repeated")
    parser.add_argument("--backend", action="append", help="may be repeated")
    parser.add_argument("--dtype", action="append", choices=DTYPES, help="may be repeated")
    parser.add_argument("--case", action="append", choices=agreement.CASES, help="may be repeated")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", action="store_true", help="one object a line")
    options = parser.parse_args()
    options.dtype = options.dtype or list(DTYPES)
    good = True
    if not options.json:
        print(f"torch {torch.__version__}, {options.device}\n")
        print("| op | back end | dtype | shape | worst error | in |\n| --- | --- | --- | --- | --- | --- |")
    for row in rows(options):
        good &= row.get("fits", True)
        if options.json:
            print(json.dumps(row), flush=True)
        else:
            told = f"{row['error']:.1e} | {row['worst']}" if "error" in row else f"refused | {row['refused']}"
            over = "" if row.get("fits", True) else " **over the limit**"
            print(f"| {row['op']} | {row['backend']} | {row['dtype']} | {row['case']} | {told}{over} |", flush=True)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
