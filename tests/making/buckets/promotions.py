"""Promotions at a URL by several machines: `python -m tests.making.buckets.promotions URL CACHE BY MODEL…`.

Promotes the models in turn (`rollback` goes back), each as a command would. One JSON line tells how each ended.
"""

from __future__ import annotations

import json
import os
import sys

from tasks.core.errors import PromotionError
from tasks.core.promotion.promotion import Actor, promote, roll_back
from tasks.core.storage.store import Store


def change(url: str, by: str, step: str) -> str | None:
    """Do one step; give what was told where it was refused."""
    try:
        if step == "rollback":
            roll_back(Store(url), Actor(by))
        else:
            promote(Store(url), step, Actor(by, "because"), None, force=True)
    except PromotionError as error:
        return error.what
    return None


def main(url: str, cache: str, by: str, *steps: str) -> None:
    """Wait for a line on stdin, so that all begin at once."""
    os.environ["TUNEPROOF_CACHE"] = cache
    print("ready", flush=True)
    sys.stdin.readline()
    for step in steps:
        print(json.dumps({"by": by, "step": step, "told": change(url, by, step)}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
