"""The engines by the name used in `inferencer.engine`, in the order in which "auto" tries them.

Settings are checked by this table and engines are chosen by it; a class is imported when it is to answer.
"""

from __future__ import annotations

ENGINES = {
    "inflight": "tasks.core.generation.engines.inflight:InflightEngine",
    "generate": "tasks.core.generation.engines.sorted_batches:SortedBatchEngine",
    "continuous": "tasks.core.generation.engines.paged_batches:PagedBatchEngine",
}
REMOVED: dict[str, str] = {}
"""Names of engines that are gone, with what to write in their place."""
