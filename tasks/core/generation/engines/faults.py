"""Logits that are no numbers: NaN, infinite, or minus infinity for every token. Such a row has no answer.

A row whose largest logit is finite can be answered: NaN and infinity are larger than every number, and minus
infinity alone only rules a token out.
"""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING

from tasks.core.generation.engines.base import GeneratedRow

if TYPE_CHECKING:
    import torch

    from tasks.core.generation.batching import Request
    from tasks.core.models.loading import LoadedModel

logger = logging.getLogger(__name__)

NAN, INFINITE, IMPOSSIBLE = -1, -2, -3
"""Marks in the place of a token id, which is never negative."""
_SEEN = {NAN: "NaN", INFINITE: "infinite", IMPOSSIBLE: "minus infinity for every token"}


def marked(token_ids: torch.Tensor, largest: torch.Tensor) -> torch.Tensor:
    """Return the token ids, with a mark where the row's `largest` logit is no number; shapes [rows], int64.

    Computed on the device, so that nobody waits for it.
    """
    import torch

    infinite = torch.where(largest > 0, INFINITE, IMPOSSIBLE)
    marks = torch.where(largest.isnan(), NAN, infinite)
    return torch.where(largest.isfinite(), token_ids, marks)


class Faults:
    """Makes error rows of rows whose logits are no numbers; looks for the cause once. Any thread may use it."""

    def __init__(self, model: LoadedModel) -> None:
        self._model = model
        self._lock = threading.Lock()
        self._cause: str | None = None

    def row(self, request: Request, mark: int, token: int, seconds: float, batch_size: int) -> GeneratedRow:
        """Return the error row of a request whose logits were as `mark` says for its new token number `token`."""
        text = f"the model's logits are {_SEEN[mark]} at new token {token} ({self.cause()})"
        return GeneratedRow(request.position, (), text, "error", seconds, batch_size)

    def cause(self) -> str:
        """What probably made the logits so; all weights are read when it is asked for first."""
        with self._lock:
            if self._cause is None:
                from tasks.core.models.broken_weights import why_not_finite

                self._cause = why_not_finite(self._model)
                logger.warning("%s gives NaN or infinity: %s", self._model.identity.model_id, self._cause)
            return self._cause
