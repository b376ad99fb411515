"""The engines by the name used in `inferencer.engine`, in the order in which "auto" tries them.

Settings are checked by this table and engines are chosen by it; a class is imported when it is to answer.
"""

from __future__ import annotations

ENGINES = {
    "inflight": "tasks.core.generation.engines.inflight:InflightEngine",
    "generate": "tasks.core.generation.engines.sorted_batches:SortedBatchEngine",
}
REMOVED = {
    "continuous": 'must be another engine: "continuous" is gone, "inflight" covers all that it did and is faster; '
    'write "auto" or "inflight"',
}
"""Names that old settings may hold, with what to write in their place; a run keeps its key with another engine."""
