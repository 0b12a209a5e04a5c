"""Progress: quiet in logs, bars on terminals, seconds for people."""

from __future__ import annotations

import io

import pytest

from raylign.runtime.progress import format_seconds, phase_line, progress_bar, step


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0.416, "0.42 s"), (37.12, "37.1 s"), (59.97, "60.0 s"), (185.2, "3 min 05 s"), (7800, "2 h 10 min")],
)
def test_seconds(seconds, shown):
    assert format_seconds(seconds) == shown


def test_lines_go_to_stderr_and_leave_stdout_for_results(capsys):
    phase_line("features", "done", 21.53)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "features     done  21.5 s\n"


def test_bar_only_on_a_terminal_or_when_forced():
    stream = io.StringIO()
    assert list(progress_bar([1, 2], label="train", stream=stream)) == [1, 2]
    assert stream.getvalue() == ""
    assert list(progress_bar(iter([1, 2]), label="train", total=2, is_forced=True, stream=stream)) == [1, 2]
    assert "train" in stream.getvalue()


def test_step_is_silent_about_a_failure():
    stream = io.StringIO()
    with pytest.raises(ValueError), step("report", "written", stream=stream):
        raise ValueError
    assert stream.getvalue() == ""
    with step("report", "written", stream=stream):
        pass
    assert stream.getvalue().startswith("report       written  0.")
