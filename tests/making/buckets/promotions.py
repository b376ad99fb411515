"""Promotions at a URL by several machines: `python -m tests.making.buckets.promotions URL CACHES PLAN…`.

Each PLAN is of a machine, a process with a cache of its own in CACHES: it promotes the models that the plan names, with
commas between, in turn (`rollback` goes back), each as a command would. All begin at once, when each is connected; one
JSON line tells how each step ended. They are forked from one process that has imported what they need.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import traceback
from pathlib import Path

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


def machine(url: str, cache: Path, steps: list[str]) -> None:
    """What one machine does."""
    os.environ["TUNEPROOF_CACHE"] = str(cache)
    for step in steps:
        line = json.dumps({"by": cache.name, "step": step, "told": change(url, cache.name, step)}) + "\n"
        os.write(sys.stdout.fileno(), line.encode())


def main(url: str, caches: str, *plans: str) -> int:
    """Let the machines go, wait for them, and give the worst of their exit codes."""
    if url.startswith("s3:"):
        importlib.import_module("s3fs")
    waiting, begin = os.pipe()
    connected, tell = os.pipe()
    children = []
    for number, plan in enumerate(plans):
        children.append(os.fork())
        if children[-1] == 0:
            os.close(begin)
            try:
                Store(url).files_below("")
                os.write(tell, b".")
                os.read(waiting, 1)
                machine(url, Path(caches) / f"machine-{number}", plan.split(","))
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
    os.close(tell)
    for _ in children:
        os.read(connected, 1)
    os.close(begin)
    return max(abs(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])) for child in children)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
