"""The two filters of lm-evaluation-harness's task gsm8k, to compare figures with published ones.

`strict` takes what stands behind the first `####`, `flexible` the last thing that looks like a number; both are then
compared as texts, without commas, dollar signs and a full stop at the end (the task's `gsm8k.yaml`, version 3).
"""

from __future__ import annotations

import re
from collections import deque
from typing import Literal

_STRICT = re.compile(r"#### (\-?[0-9\.\,]+)")
_FLEXIBLE = re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)")
_INVALID = "[invalid]"


def extracted(answer: str, how: Literal["strict", "flexible"]) -> str:
    """What the filter takes out of an answer; "[invalid]" where it finds nothing."""
    if how == "strict":
        found = _STRICT.search(answer)
        return _INVALID if found is None else found[1].strip()
    last = deque(_FLEXIBLE.finditer(answer), maxlen=1)
    return last[0][0].strip() if last else _INVALID


def _forgiven(text: str) -> str:
    """The task's `regexes_to_ignore`, in its order, and `ignore_case`."""
    text = text.replace(",", "").replace("$", "")
    mark = text.rfind("#### ")  # (?s).*#### is greedy: all up to the last one
    text = text if mark < 0 else text[mark + 5 :]
    return re.sub(r"\.$", "", text).lower()


def gsm8k_match(answer: str, reference: str, how: Literal["strict", "flexible"]) -> float:
    """1 when the filtered answer is the reference's result by the task's rules, else 0."""
    return float(_forgiven(extracted(answer, how)) == _forgiven(reference))
