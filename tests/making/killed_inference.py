"""Run by test_inferencer.py in a process that is then killed: `python -m tests.making.killed_inference`."""

from __future__ import annotations

import json
import sys
import time

from tasks.core.config import load_config
from tasks.core.runs.progress import GenerationProgress
from tasks.inferencer import Inferencer


def main() -> None:
    """Infer with the overrides given as JSON, slowly enough to be killed in the middle."""
    overrides, delay_seconds = json.loads(sys.argv[1]), float(sys.argv[2])

    def report(progress: GenerationProgress) -> None:
        print(progress.rows_done, flush=True)

    class Slow(Inferencer):
        """Sleeps after each finished row, so that a signal meets it half-way."""

        def generate_responses(self, prepared):  # type: ignore[no-untyped-def]
            from tasks.core.runs.ledger import Ledger

            plain_append = Ledger.append

            def slow_append(ledger, completion):  # type: ignore[no-untyped-def]
                offset = plain_append(ledger, completion)
                print("row", flush=True)
                time.sleep(delay_seconds)
                return offset

            Ledger.append = slow_append  # type: ignore[method-assign]
            return super().generate_responses(prepared)

    Slow(load_config(None, overrides), on_progress=report).infer()


if __name__ == "__main__":
    main()
