"""The command `tuneproof` as a process: Ctrl-C is heard before anything else is imported."""

import sys
from typing import NoReturn

from flows.cli.ending import exit_in_time, run_to_end


def _run() -> int:
    from flows.cli.commands import run

    return run(sys.argv[1:])


def main() -> NoReturn:
    """Run the command line of this process and exit with its code."""
    exit_in_time(run_to_end(_run))


if __name__ == "__main__":
    main()
