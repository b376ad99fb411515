"""Memory for slots, which come and go: on CPU it costs nothing until it is written, and resizing copies nothing."""

from __future__ import annotations

import math
import mmap
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# Private: pages that are shared, which is Python's default, take half as long again to touch, and cannot grow.
_FLAGS = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS


class Slab:
    """A tensor of zeros, [count, ...], whose first dimension grows and shrinks; what both sizes have stays.

    On CPU its pages take no memory until they are written, go back to the system when they are cut off or freed,
    and where the system can move them (Linux) growing moves them instead of copying.
    """

    def __init__(self, shape: tuple[int, ...], like: torch.Tensor) -> None:
        """Make it on the device and in the type of `like`. Raises OSError when the process may not have as much."""
        self._pages: mmap.mmap | None = None
        self.tensor = self._zeros(shape, like)

    def resize(self, count: int) -> None:
        """Give the first dimension `count` places; views of the tensor from before must not be used any more."""
        old = self.tensor
        kept = min(count, len(old))
        if self._move(count):
            return
        new = self._zeros((count, *old.shape[1:]), old)
        new[:kept] = old[:kept]
        self.tensor = new

    def _move(self, count: int) -> bool:
        """Let the system resize the pages; False where it cannot."""
        old, size = self.tensor, count * self.tensor[:1].nbytes
        if self._pages is None or not size or not sys.platform.startswith("linux"):
            return False
        self._pages.resize(size)
        self.tensor = _over(self._pages, (count, *old.shape[1:]), old.dtype)
        return True

    def _zeros(self, shape: tuple[int, ...], like: torch.Tensor) -> torch.Tensor:
        import torch

        count = math.prod(shape)
        if like.device.type != "cpu" or count == 0:
            self._pages = None
            return torch.zeros(shape, dtype=like.dtype, device=like.device)
        self._pages = mmap.mmap(-1, count * like.dtype.itemsize, flags=_FLAGS)
        return _over(self._pages, shape, like.dtype)


def _over(pages: mmap.mmap, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Return a tensor that lies in `pages` and keeps them alive."""
    import torch

    return torch.frombuffer(pages, dtype=dtype, count=math.prod(shape)).view(shape)
