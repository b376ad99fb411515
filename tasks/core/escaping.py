"""Text of data, models and answers as it may be shown: what steers a terminal or hides text is written out."""

from __future__ import annotations

import logging
import re

# C0 and C1 controls but line break and tab, half surrogates, and what is invisible or turns the direction of writing.
# The joiners U+200C and U+200D stay: Persian and many emoji are written with them.
_STEERING = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\ud800-\udfff\U000e0000-\U000e007f]"
)


def visible(text: str) -> str:
    r"""The text with every such character as an escape (`\x1b`, `\u202e`); line breaks and tabs stay."""
    return _STEERING.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)


def escape_record(record: logging.LogRecord) -> bool:
    """A filter for handlers of logs: every message leaves them `visible`. Lets all records through."""
    told = record.getMessage()
    shown = visible(told)
    if shown != told:
        record.msg, record.args = shown, ()
    return True
