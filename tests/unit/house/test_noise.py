"""Whatever a library says on stderr, each line there starts with the verb."""

import io
import json
import logging
import sys
import warnings

import pytest

from moeforge.pipeline.noise import tamed
from moeforge.pipeline.progress import Progress
from moeforge.testing.command import environment, run


def said(make_noise, style="lines", quiet=False):
    stream = io.StringIO()
    with tamed(Progress("tune", style, quiet, stream)):
        make_noise()
    return stream.getvalue().splitlines()


def test_a_python_warning_is_one_line_and_is_said_once():
    def noise():
        for count in range(3):
            warnings.warn_explicit("overflow\n  in exp", RuntimeWarning, "numpy.py", count)

    assert said(noise) == ["tune: warning: overflow in exp"]


def test_a_log_record_names_its_library():
    lines = said(lambda: logging.getLogger("somelib.core.deep").warning("weights %d\nlost", 5))
    assert lines == ["tune: warning: somelib: weights 5 lost"]


def test_what_is_below_a_warning_is_not_said():
    assert said(lambda: logging.getLogger("somelib").info("hello")) == []


def test_plain_writes_get_the_prefix_and_half_lines_wait():
    def noise():
        sys.stderr.write("half a ")
        sys.stderr.write("line\nand the end")
        print("!", file=sys.stderr)
        sys.stderr.write("no newline")

    assert said(noise) == ["tune: warning: " + line for line in ("half a line", "and the end!", "no newline")]


def test_a_handler_that_was_made_meanwhile_is_caught_too():
    def noise():
        logger = logging.getLogger("own-handler")
        logger.propagate = False
        handler = logging.StreamHandler()
        logger.addHandler(handler)
        logger.warning("mind this")
        logger.removeHandler(handler)

    assert said(noise) == ["tune: warning: mind this"]


@pytest.mark.parametrize(
    "noise",
    [
        lambda: warnings.warn("old spelling", FutureWarning, stacklevel=1),
        lambda: warnings.warn("old spelling", DeprecationWarning, stacklevel=1),
        lambda: print("`torch_dtype` is deprecated! Use `dtype` instead!", file=sys.stderr),
        lambda: logging.getLogger("bitsandbytes").warning(
            "Failed to load CPU gemm_4bit_forward from kernels-community: offline. Please make sure ..."
        ),
        lambda: sys.stderr.write("\rLoading weights:  50%|#####     | 5/10\rLoading weights: 100%|##########| 10/10\n"),
        lambda: print("\n\n", file=sys.stderr),
    ],
)
def test_what_says_nothing_to_the_user_is_dropped(noise):
    assert said(noise) == []


@pytest.mark.parametrize(
    ("noise", "line"),
    [
        (lambda: print("\x1b[31mout of range\x1b[0m", file=sys.stderr), "out of range"),
        (lambda: sys.stderr.write("\rLoading:  50%|##   | 5/10 [00:01<00:01, 4.0it/s]out of range\n"), "out of range"),
        (lambda: logging.getLogger("lib").error("3 files will be removed in /x"), "lib: 3 files will be removed in /x"),
    ],
)
def test_colour_a_bar_or_a_word_hides_no_warning(noise, line):
    assert said(noise) == [f"tune: warning: {line}"]


def test_quiet_keeps_warnings_and_events_stay_json():
    def noise():
        warnings.warn("mind this", UserWarning, stacklevel=1)

    assert said(noise, quiet=True) == ["tune: warning: mind this"]
    (line,) = said(noise, "json")
    assert json.loads(line) == {"event": "warning", "verb": "tune", "text": "mind this"}


def test_everything_is_as_before_afterwards():
    before = sys.stderr, warnings.showwarning, list(logging.getLogger().handlers)
    with pytest.raises(ValueError, match="x"), tamed(Progress("tune", stream=io.StringIO())):
        raise ValueError("x")
    assert (sys.stderr, warnings.showwarning, list(logging.getLogger().handlers)) == before


NOISY = """
import logging, sys, warnings
from dataclasses import dataclass
from moeforge.pipeline.stage import Answer

@dataclass(frozen=True)
class Options:
    pass

class Shout:
    name, summary, api_version, sources = "shout", "make noise", 1, 1
    consumes, Options = frozenset({"checkpoint"}), Options

    def answer(self, sources, options, ctx):
        import numpy as np

        ctx.say("a message")
        np.float32(3e38) * np.float32(10)
        logging.getLogger("lib").error("from logging")
        handler = logging.StreamHandler()
        logging.getLogger("own").addHandler(handler)
        logging.getLogger("own").propagate = False
        logging.getLogger("own").warning("from its own handler")
        print("from print\\nin two lines", file=sys.stderr)
        warnings.warn("soon gone", FutureWarning)
        return Answer({}, "answer")
"""


@pytest.fixture
def shout(tmp_path):
    """The environment that has a verb which makes every kind of noise."""
    (tmp_path / "noisy.py").write_text(NOISY)
    info = tmp_path / "noisy-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: noisy\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[moeforge.verbs]\nshout = noisy:Shout\n")
    return environment(PYTHONPATH=str(tmp_path), MOEFORGE_PLUGINS="noisy")


def test_in_a_real_process_every_line_starts_with_the_verb(shout, tmp_path):
    (tmp_path / "src").mkdir()
    loud = run("shout", tmp_path / "src", env=shout, check=True)
    assert loud.out == "answer\n"
    assert all(line.startswith("shout: ") for line in loud.err.splitlines())
    for word in ("a message", "overflow", "lib: from logging", "from its own handler", "from print", "in two lines"):
        assert word in loud.err
    assert "soon gone" not in loud.err
    quiet = run("shout", tmp_path / "src", "-q", env=shout, check=True)
    assert "a message" not in quiet.err
    assert all(line.startswith("shout: warning: ") for line in quiet.err.splitlines())
    assert "overflow" in quiet.err
