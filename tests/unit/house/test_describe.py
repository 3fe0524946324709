"""Plans in words: every fact in its unit, files one a line, nothing that a terminal would obey."""

from random import Random

from moeforge.options import format_bytes
from moeforge.pipeline.artifact import Plan
from moeforge.pipeline.describe import FILES_SHOWN, describe_plan


def test_files_that_are_counted_stay_a_count():
    assert describe_plan(Plan("v", None, "s", facts={"files": 3, "write_bytes": 5_000_000})) == [
        "plan: s",
        "  files:       3",
        "  write bytes: 5 MB",
    ]


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


def test_a_plan_writes_control_characters_out():
    (line,) = describe_plan(Plan("v", None, "copy \x1b[2J of it"))
    assert line == "plan: copy \\x1b[2J of it"
