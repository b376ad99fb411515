"""What writers that were killed left beside the files they wrote: `.<name>.<process id>-<hex>.tmp`, file or folder."""

from __future__ import annotations

import os
import re
import shutil
import time
from contextlib import suppress
from pathlib import Path

_TEMPORARY = re.compile(r"\..+\.(?P<pid>\d{1,10})-[0-9a-f]{8}\.tmp")
# Of a process with this number that lives: it may be another one by now, or the writer is on another machine.
_OLD_SECONDS = 24 * 3600.0


def remove_leftovers(folder: Path, *, older_than_seconds: float = 0.0) -> None:
    """Remove temporary files and folders in a folder whose writer is dead; of others only those that are a day old.

    `older_than_seconds` is for a folder that other machines may be writing into: their processes are not seen here.
    What cannot be removed stays, without an error.
    """
    with suppress(OSError):
        for path in list(folder.iterdir()):
            found = _TEMPORARY.fullmatch(path.name)
            if found is None:
                continue
            with suppress(OSError):
                least = _OLD_SECONDS if _lives(int(found["pid"])) else older_than_seconds
                if time.time() - path.lstat().st_mtime >= least:
                    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def _lives(pid: int) -> bool:
    """Whether a process of this machine has that number."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return True
