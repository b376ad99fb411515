"""`python -m flows.cli`: the command without what its installed form does about an end that must not wait."""

from __future__ import annotations

import sys

from flows.cli.commands import main

if __name__ == "__main__":
    sys.exit(main())
