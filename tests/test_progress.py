"""The progress line: drawn on a terminal, silent elsewhere."""

import io
import logging
import sys

import pytest

from blockswap import progress as module
from blockswap.progress import Progress, progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_nothing_is_written_when_stderr_is_no_terminal(capsys, caplog):
    with progress("moving weights", 100) as tick:
        tick(50)
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""
    assert not caplog.records


def test_a_long_task_away_from_a_terminal_becomes_one_line_of_logging(monkeypatch, caplog):
    monkeypatch.setattr(module, "_SECONDS_WORTH_A_LOG_LINE", -1.0)
    with caplog.at_level(logging.INFO, "blockswap"), progress("moving weights", 2**30) as tick:
        tick(2**29)
        tick(2**30)
    assert len(caplog.records) == 1
    assert caplog.records[0].getMessage().startswith("moving weights: 1.00 GiB in ")


def test_a_terminal_sees_the_line_and_gets_it_taken_away(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", Terminal())
    with Progress("swapped run", 6, "steps") as tick:
        for step in range(1, 7):
            tick(step)
    text = sys.stderr.getvalue()
    assert "swapped run" in text
    assert "6/6" in text
    assert text.rstrip().endswith(("\x1b[2K", "\x1b[?25h"))  # line erased, cursor back


def test_an_interrupt_passes_through_and_the_cursor_is_back(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", Terminal())

    def interrupted():
        with progress("moving weights", 10) as tick:
            tick(1)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    text = sys.stderr.getvalue()
    assert text.count("\x1b[?25h") == text.count("\x1b[?25l")
