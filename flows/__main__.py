"""The command `tuneproof` as a process: Ctrl-C is heard before anything else is imported."""

import sys

from flows.ending import run_to_end


def _run() -> int:
    from flows.cli import run

    return run(sys.argv[1:])


def main() -> int:
    """Run the command line of this process; return its exit code."""
    return run_to_end(_run)


if __name__ == "__main__":
    sys.exit(main())
