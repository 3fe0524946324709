"""What `--calibrate` measured of this machine, kept in `$MOEFORGE_HOME/plan-HASH.json`; HASH names the machine."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moeforge.errors import BadInput, UsageProblem
from moeforge.pipeline.context import Context

from .job import Hardware

SCHEMA = 1


@dataclass(frozen=True)
class Measured:
    """A calibration.

    Args:
        raw: what the probe returned: seconds by size.
    """

    hardware: Hardware
    raw: dict[str, Any]
    path: Path

    def data(self) -> dict[str, Any]:
        return {"path": str(self.path), "hardware": dataclasses.asdict(self.hardware), "measured": self.raw}

    def text(self) -> str:
        gpu, raw = self.hardware, self.raw
        lines = [
            f"{gpu.title}: {raw['ranks']} process{'' if raw['ranks'] == 1 else 'es'}, {raw['backend']}, {raw['dtype']}",
            f"  matrix products   {gpu.tflops:.3g} TFLOP/s, half of it at {gpu.small_rows:.3g} rows",
            f"  memory            {gpu.memory:.4g} GB, {gpu.hbm:.3g} GB/s",
        ]
        for name, title in (("all_to_all", "all-to-all"), ("all_gather", "all-gather")):
            if name in raw:
                found = raw[name]
                lines.append(f"  {title:<17} {1e6 * found['alpha_s']:.3g} us + bytes / {found['beta_gbs']:.3g} GB/s")
        return "\n".join([*lines, f"kept in {self.path}; used by --gpu local"])


def facts() -> dict[str, Any]:
    """What makes this machine this machine, without asking torch."""
    cpu = next(
        (line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")),
        platform.processor(),
    )
    cards = sorted(Path("/proc/driver/nvidia/gpus").glob("*/information"))
    gpus = [line.partition(":")[2].strip() for card in cards for line in _lines(card) if line.startswith("Model:")]
    return {"host": platform.node(), "machine": platform.machine(), "cpu": cpu, "cores": os.cpu_count(), "gpus": gpus}


def place(home: Path) -> Path:
    digest = hashlib.sha256(json.dumps(facts(), sort_keys=True).encode()).hexdigest()
    return home / f"plan-{digest[:16]}.json"


def calibrate(ctx: Context) -> Measured:
    """Measure this machine and keep the result.

    Raises:
        MachineLacks: the measuring processes failed.
    """
    from . import probe

    raw = probe.measure(ctx)
    found = Measured(from_raw(raw), raw, place(ctx.home))
    body = {"schema": SCHEMA, "facts": facts(), "hardware": dataclasses.asdict(found.hardware), "measured": raw}
    found.path.parent.mkdir(parents=True, exist_ok=True)
    partial = found.path.with_suffix(f".{os.getpid()}.partial")
    partial.write_text(json.dumps(body, indent=1) + "\n", "utf-8")
    partial.replace(found.path)
    return found


def from_raw(raw: dict[str, Any]) -> Hardware:
    """The measured numbers as hardware: efficiencies are in them, and the slower of the two collectives is the link."""
    links = [raw[name] for name in ("all_to_all", "all_gather") if name in raw]
    slow = min(links, key=lambda found: found["beta_gbs"], default={"alpha_s": 0.0, "beta_gbs": 0.0})
    return Hardware("local", raw["title"], raw["matmul"]["tflops"], raw["memory_gb"], raw["copy_gbs"], raw["ranks"], slow["beta_gbs"],
                    slow["beta_gbs"], slow["alpha_s"], slow["alpha_s"], 1.0, 1.0, raw["matmul"]["half_rows"])  # fmt: skip


def stored(home: Path) -> Hardware:
    """The hardware that was measured here.

    Raises:
        UsageProblem: nothing was.
        BadInput: the file is not one of ours.
    """
    path = place(home)
    try:
        body = json.loads(path.read_text("utf-8"))
        if body["schema"] != SCHEMA:
            raise ValueError(f"schema {body['schema']!r}, expected {SCHEMA}")
        return Hardware(**body["hardware"])
    except FileNotFoundError:
        raise UsageProblem(
            f"--gpu local: this machine was not measured ({path} is not there); run `moeforge plan --calibrate`"
        ) from None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise BadInput(f"{path}: unreadable calibration: {error}; run `moeforge plan --calibrate` again") from error


def _lines(path: str | Path) -> list[str]:
    try:
        return Path(path).read_text("utf-8", "replace").splitlines()
    except FileNotFoundError:
        return []
