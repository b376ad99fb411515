"""Errors of other libraries, told in one line."""

from __future__ import annotations

import httpx
import pytest

from tasks.core.errors import first_line


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (ValueError("wrong shape\nand a long table"), "wrong shape"),
        (httpx.ReadTimeout(""), "ReadTimeout"),
        (AssertionError(), "AssertionError"),
        (OSError("\n  no such device  \n"), "no such device  "),
        (RuntimeError("x" * 400), "x" * 300),
        (
            RuntimeError("[/w/gloo/transport/tcp/pair.cc:537] closed by peer [127.0.0.1]:99"),
            "closed by peer [127.0.0.1]:99",
        ),
        (RuntimeError("[a.json:3] is no row"), "[a.json:3] is no row"),
    ],
    ids=["several lines", "empty", "no message", "blank line first", "long", "native code", "no native code"],
)
def test_an_error_is_told_in_one_line_even_when_it_says_nothing(error: Exception, told: str) -> None:
    assert first_line(error).strip() == told.strip()
