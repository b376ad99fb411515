"""The work itself: plain Python without Prefect, in the rooms that docs/architecture.md lists."""

import logging

# It warns of optional kernels whenever it is imported, whether or not it is used, in each process anew.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
