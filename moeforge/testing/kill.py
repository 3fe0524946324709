"""Stop a command at random moments, run it again, and compare the bytes: killed without warning, or by Ctrl-C.

python -m moeforge.testing.kill --times 20 -- upcycle smol.gguf --experts 8 -o out
python -m moeforge.testing.kill --times 20 --signal int -- tune out --data text.jsonl --save-every 2 -o tuned
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import ExitCode
from ..pipeline.journal import JOURNAL
from .command import environment, moeforge_argv


@dataclass(frozen=True)
class Kill:
    """One interrupted run."""

    after_s: float
    died: bool
    """False when the run had already finished, or finished all the same (Ctrl-C after its last safe point)."""
    whole_too_early: bool
    """An output directory was there although the run had been killed before it finished: must never be."""
    resumed: bool
    """The second run found finished files."""
    digest: str


def timed(argv: Sequence[str], env: dict[str, str]) -> tuple[float, str]:
    """Seconds and digest of one undisturbed run."""
    started = time.monotonic()
    done = subprocess.run(argv, capture_output=True, text=True, env=env, stdin=subprocess.DEVNULL)
    if done.returncode:
        raise AssertionError(f"exit {done.returncode}: {done.stderr}")
    return time.monotonic() - started, json.loads(done.stdout.splitlines()[-1])["digest"]


def kill_and_resume(words: Sequence[object], output: Path, times: int, seed: int = 0,
                    sent: signal.Signals = signal.SIGKILL) -> tuple[str, list[Kill]]:  # fmt: skip
    """Digest of an undisturbed run of `moeforge WORDS -o OUTPUT`, and what each of `times` stopped and repeated runs gave.

    `output` is removed before and after each.

    Args:
        sent: SIGKILL, or SIGINT as Ctrl-C sends it.

    Raises:
        AssertionError: a run failed, or ended by the signal with an exit code of its own.
    """
    argv, env = moeforge_argv(*words, "-o", output), environment()
    partial = output.with_name(output.name + ".partial")

    def clear() -> None:
        for path in (output, partial):
            shutil.rmtree(path, ignore_errors=True)

    clear()
    seconds, expected = timed(argv, env)
    rng, kills = random.Random(seed), []
    for _ in range(times):
        clear()
        after_s = rng.uniform(0.05, seconds)
        child = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=env,
                                 stdin=subprocess.DEVNULL, start_new_session=True)  # fmt: skip
        time.sleep(after_s)
        if child.poll() is None:
            os.killpg(child.pid, sent)
        _, told = child.communicate()
        # Python itself dies of a SIGINT that comes before the command has begun
        if child.returncode not in (0, -sent, ExitCode.INTERRUPTED):
            raise AssertionError(f"exit {child.returncode} after {sent.name}: {told}")
        died = child.returncode != 0
        # The rename is the last thing a run does to the disk, so a killed one may only just have finished.
        whole_too_early = died and output.exists() and not (output / "moeforge.json").exists()
        journal = partial / JOURNAL
        resumed = journal.exists() and len(journal.read_text("utf-8").splitlines()) > 1
        _, digest = timed(argv, env)
        kills.append(Kill(after_s, died, whole_too_early, resumed, digest))
    clear()
    return expected, kills


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--signal", choices=("kill", "int"), default="kill")
    parser.add_argument("words", nargs="+", help="-- VERB SRC OPTIONS -o OUTPUT")
    args = parser.parse_args()
    at = args.words.index("-o")
    output = Path(args.words[at + 1]).absolute()
    expected, kills = kill_and_resume(args.words[:at] + args.words[at + 2 :], output, args.times, args.seed,
                                      signal.SIGKILL if args.signal == "kill" else signal.SIGINT)  # fmt: skip
    for kill in kills:
        same = "same bytes" if kill.digest == expected else f"OTHER BYTES {kill.digest}"
        print(f"stopped after {kill.after_s:5.2f} s{'' if kill.died else ' (had finished)'}"
              f"{', resumed' if kill.resumed else ''}: {same}")  # fmt: skip
    bad = [k for k in kills if k.digest != expected or k.whole_too_early]
    print(f"{len(kills) - len(bad)} of {len(kills)} runs ended in the bytes of an undisturbed run; "
          f"{sum(k.died for k in kills)} were stopped, {sum(k.resumed for k in kills)} resumed")  # fmt: skip
    raise SystemExit(bool(bad))


if __name__ == "__main__":
    main()
