"""The command `tuneproof` as a process: Ctrl-C is heard before anything else is imported."""

import os
import signal
import sys
from types import FrameType
from typing import NoReturn


def _run() -> int:
    from flows.cli.commands import run

    return run(sys.argv[1:])


def main() -> NoReturn:
    """Run the command line of this process and exit with its code."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _end_early)
    from flows.cli.ending import exit_in_time, run_to_end

    exit_in_time(run_to_end(_run))


def _end_early(number: int, _frame: FrameType | None) -> NoReturn:
    """End with one line before, or after, the command has handlers of its own."""
    os.write(2, b"\ninterrupted\n" if number == signal.SIGINT else b"\nended by SIGTERM\n")
    os._exit(128 + number)


if __name__ == "__main__":
    main()
