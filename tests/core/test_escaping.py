"""What data and models bring never steers the terminal, nor hides in a log."""

from __future__ import annotations

import logging

import pytest

from flows.cli.console import ConsoleHandler, complain, say, show_table
from tasks.core.errors import DataError
from tasks.core.escaping import escape_record, visible

# Colour and title sequences, a link, the clipboard (OSC 52), a return that overwrites, backspaces, C1's CSI, bidi.
STEERING = [
    "\x1b[31mred\x1b[0m",
    "\x1b]0;title\x07",
    "\x1b]8;;http://example.org\x1b\\link",
    "\x1b]52;c;AAAA\x07",
    "error\rfine ",
    "no\b\byes",
    "\x9b31m",
    "\x85next",
    "abc\u202ecba",
    "\u2066isolated\u2069",
    "line\u2028separator",
    "hidden\u200b\ufeff\U000e0041",
    "half\ud800pair",
    "\x00\x7f",
]


def steers(text: str) -> bool:
    return visible(text) != text


@pytest.mark.parametrize("text", STEERING)
def test_text_that_steers_a_terminal_is_written_out_wherever_it_is_shown(
    text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    say(f"the run {text} is done")
    complain(DataError(f"there is no column {text}", f"set {text}"))
    show_table(f"runs of {text}", ["run"], [[text]])
    handler = ConsoleHandler()
    handler.handle(logging.makeLogRecord({"name": "tasks.x", "levelno": 30, "msg": "%s", "args": (text,)}))

    shown = capsys.readouterr()

    assert not steers(shown.out) and not steers(shown.err)
    assert "the run" in shown.out and "there is no column" in shown.err


@pytest.mark.parametrize(
    "text",
    ["two\nlines\tand a tab", "naïve 日本語\u3000 1\u202f000\xa0€", "\u0645\u06cc\u200c\u062e 👩\u200d🔬"],
)
def test_text_of_any_language_is_shown_as_it_is(text: str) -> None:
    assert visible(text) == text


def test_brackets_in_a_cell_are_no_markup(capsys: pytest.CaptureFixture[str]) -> None:
    show_table("models", ["model"], [["[red]x[/red] :smile: [link=http://example.org]y[/link]"]])

    assert "[red]x[/red] :smile: [link=http://example.org]y[/link]" in capsys.readouterr().out


def test_a_log_record_is_escaped_with_its_arguments_filled_in() -> None:
    record = logging.makeLogRecord({"msg": "model %s, %d rows", "args": ("\x1b[2J", 3)})

    assert escape_record(record)
    assert record.getMessage() == "model \\x1b[2J, 3 rows"
