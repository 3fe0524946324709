"""Plans in words: every fact in its unit, files one a line, nothing that a terminal would obey."""

from random import Random

import pytest

from moeforge.options import format_bytes
from moeforge.pipeline.artifact import Artifact, Plan
from moeforge.pipeline.describe import FILES_SHOWN, describe_outcome, describe_plan
from moeforge.pipeline.run import Outcome


def test_files_that_are_counted_stay_a_count():
    assert describe_plan(Plan("v", None, "s", facts={"files": 3, "write_bytes": 5_000_000})) == [
        "plan: s",
        "  files:       3",
        "  write bytes: 5 MB",
    ]


def test_tables_of_bytes_are_told_as_sizes():
    facts = {"bytes_by_role": {"experts": {"nf4": 358_422_480}}, "peak_memory_by_phase_bytes": {"writing": 2_000_000}}
    _, roles, phases = describe_plan(Plan("v", None, "s", facts=facts))
    assert roles.split(": ")[1].strip() == "experts nf4 358 MB"
    assert phases.split(": ")[1].strip() == "writing 2 MB"


def test_files_that_are_listed_stand_one_a_line_the_largest_first():
    sizes = {
        f"file-{number}": size for number, size in enumerate(Random(7).sample(range(1000, 10**9), FILES_SHOWN + 4))
    }
    first, *told, rest = describe_plan(Plan("v", None, "s", facts={"files": sizes}))[1:]
    assert first == "  files:"
    ranked = sorted(sizes, key=lambda name: -sizes[name])
    assert [line.split()[-1] for line in told] == ranked[:FILES_SHOWN]
    assert all(format_bytes(sizes[line.split()[-1]]) in line for line in told)
    assert rest.split("  ")[-2:] == [format_bytes(sum(sizes[name] for name in ranked[FILES_SHOWN:])), "in 4 more"]


@pytest.mark.parametrize("reused", [True, False])
@pytest.mark.parametrize("verdicts", [{}, {"verified": True}, {"verified": False, "why_not_verified": "it takes 9 GB"}])
@pytest.mark.parametrize("exact", [True, False])
def test_what_was_never_verified_says_so_when_it_is_found_done(tmp_path, reused, verdicts, exact):
    """A run whose proof was skipped warned once; the same command must not pass for a proof later."""
    outcome = Outcome(
        Artifact("checkpoint", str(tmp_path), tmp_path), {"verdicts": {"exact": exact, **verdicts}}, reused
    )
    told = "\n".join(describe_outcome(outcome))
    wanted = reused and verdicts.get("verified") is False
    how = f"`moeforge verify {tmp_path}` proves it" if exact else "--verify --force measures it"
    assert (f"never verified (it takes 9 GB); {how}" in told) == wanted == ("warning" in told)
    assert ("already done" in told) == reused


def test_a_plan_writes_control_characters_out():
    (line,) = describe_plan(Plan("v", None, "copy \x1b[2J of it"))
    assert line == "plan: copy \\x1b[2J of it"
