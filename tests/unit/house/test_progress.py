"""What goes to stderr, and how a run stops."""

import io
import json
import os

import pytest

from moeforge import cli, launch
from moeforge.errors import ExitCode, Interrupted, ReaderGone
from moeforge.pipeline.context import Context
from moeforge.pipeline.progress import Progress


def context(style="lines", **kw):
    stream = io.StringIO()
    return Context("tune", Progress("tune", style, stream=stream, **kw), home=None), stream


def test_every_line_starts_with_the_verb():
    ctx, stream = context()
    ctx.say("hello")
    ctx.warn("careful")
    assert stream.getvalue() == "tune: hello\ntune: warning: careful\n"


def test_quiet_keeps_warnings():
    ctx, stream = context(quiet=True)
    ctx.say("hello")
    ctx.warn("careful")
    assert stream.getvalue() == "tune: warning: careful\n"


def test_events_are_json_lines(monkeypatch):
    ctx, stream = context("json")
    clock = iter(range(100))
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    with ctx.bar("steps", 4, "steps") as bar:
        bar.advance(1, note="loss 3.2")
    events = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [e["event"] for e in events] == ["progress", "finished"]
    assert events[0]["done"] == 1
    assert events[0]["eta_s"] > 0
    assert events[0]["note"] == "loss 3.2"


def test_a_bar_describes_bytes_share_and_time_left():
    ctx, _ = context()
    with ctx.bar("writing", 2e9, "B") as bar:
        bar.advance(5e8, note="shard 1")
        assert bar.describe().startswith("500 MB of 2 GB, 25 %")
        assert bar.describe().endswith("shard 1")


def test_a_bar_stops_when_the_user_or_the_reader_is_gone():
    ctx, _ = context()
    ctx.interrupted = True
    with pytest.raises(Interrupted), ctx.bar("x", None) as bar:
        bar.advance()
    ctx, _ = context()
    ctx._reader_check = lambda: False
    with pytest.raises(ReaderGone), ctx.bar("x", None) as bar:
        bar.advance()


@pytest.mark.parametrize(("resumes", "told"), [(True, "run the same command again to resume"),
                                               (False, "the same command starts from the beginning")])  # fmt: skip
def test_whoever_stops_a_run_is_told_what_the_same_command_would_do(resumes, told, monkeypatch, capsys):
    ctx, _ = context()
    ctx.resumes, stop = resumes, launch._stopper(ctx)
    stop(2, None)
    with pytest.raises(Interrupted, match=f"^stopped; {told}$"):
        ctx.check()
    # a second Ctrl-C ends at once, on its way through click
    monkeypatch.setattr(cli.forge, "invoke", lambda _: stop(2, None))
    monkeypatch.setattr("sys.argv", ["moeforge", "plugins"])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == ExitCode.INTERRUPTED
    assert capsys.readouterr().err.strip() == f"plugins: error: interrupted; {told}"


def test_a_closed_pipe_is_noticed_and_an_open_one_is_not(monkeypatch):
    reading, writing = os.pipe()
    saved = os.dup(1)
    try:
        os.dup2(writing, 1)
        alive = launch.reader_alive()
        os.close(reading)
        gone = launch.reader_alive()
    finally:
        os.dup2(saved, 1)
        os.close(saved)
        os.close(writing)
    assert alive
    assert not gone
