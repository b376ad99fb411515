"""`python -m bench.checks.worker` whose spawned children begin with the libraries loaded, for a rehearsal."""

from __future__ import annotations

import multiprocessing
import sys
from typing import Any

from bench.checks.worker import main
from tests.making.warm.children import warm_get_context

if __name__ == "__main__":
    module: Any = multiprocessing
    module.get_context = warm_get_context()
    sys.exit(main())
