"""A process that brings a model from a URL over a slow network, for test_storage.py; prints the digest it got."""

from __future__ import annotations

import hashlib
import sys
import time
from pathlib import Path
from typing import Any

from fsspec.implementations.local import LocalFileSystem

from tasks.core.storage.store import local_copy

PIECES = 10


def get_slowly(files: LocalFileSystem, address: str, path: str, **_options: Any) -> None:
    """Copy a file in pieces, half a second in all."""
    content = Path(files._strip_protocol(address)).read_bytes()
    length = len(content) // PIECES + 1
    with Path(path).open("wb", buffering=0) as target:
        for start in range(0, len(content), length):
            target.write(content[start : start + length])
            time.sleep(0.5 / PIECES)


def main(url: str) -> None:
    """Wait for a line, so that several of these begin together; then bring the model."""
    LocalFileSystem.get_file = get_slowly
    print("ready", flush=True)
    sys.stdin.readline()
    for path in sorted(local_copy(url).iterdir()):
        print(hashlib.sha256(path.read_bytes()).hexdigest())


if __name__ == "__main__":
    main(sys.argv[1])
