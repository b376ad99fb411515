"""Real faults against all that is kept: `make torture ARGS="--minutes 30 --seed 1"`.

Parts: kills at random moments, each file-system call killed or refused, full and read-only disks, damage of each file,
ten processes at once, clocks that are moved, a corpus of hostile inputs, secrets, a soak, a bucket
that fails, Prefect's server taken away.
After each fault the same command must end as an undisturbed one does, or refuse with one message.

Prints a table and writes a JSON file anew after every row. Ends with 0 when nothing was lost, doubled, mixed or
silently wrong and no traceback was seen, else with 1. What cannot be tried here is `skipped` with the reason.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository need not be installed

from bench.checks.results import Results
from bench.checks.rows import Row
from bench.checks.running import Task, run_checks
from bench.torture_parts.catalogue import CHECKS, HIDDEN, SHARES
from bench.torture_parts.trials import HARMS

MINUTES = 30.0
SHORT_SECONDS = 12.0
# For what does not go by its share: loading, secrets, the server.
GRACE_SECONDS = 900.0
QUIET = {
    "HF_HUB_OFFLINE": "1",
    "DO_NOT_TRACK": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": "1",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the parts; returns the exit code."""
    options = _options(arguments)
    seconds = SHORT_SECONDS if options.short else options.minutes * 60
    os.environ.update(QUIET)  # one thread, so that a process can be forked once torch is loaded
    os.environ["TORCH_CPP_LOG_LEVEL"] = "ERROR"
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"  # as the command sets it
    signal.signal(signal.SIGTERM, _interrupt)
    started = time.monotonic()
    about = {
        "started_at": datetime.now(UTC).isoformat(timespec="seconds"), "seconds": seconds, "seed": options.seed,
        "short": options.short,
    }  # fmt: skip
    results = Results(options.out, about)
    results.write()
    folder = Path(tempfile.mkdtemp(prefix="tuneproof-torture-"))
    task = Task(
        "catalogue",
        "cpu",
        options.short,
        folder,
        package="bench.torture_parts",
        seed=options.seed,
        seconds=seconds,
    )
    checks = [replace(check, limit_seconds=check.limit_seconds + seconds) for check in CHECKS]
    try:
        wanted = [check for check in checks if check.name in options.parts]
        run_checks(task, wanted, started + seconds + GRACE_SECONDS, results.add)
        results.finished = True
    except KeyboardInterrupt:
        print("interrupted; what was done is kept", file=sys.stderr)
    finally:
        results.write()
        _clear(folder)
    print("\n".join(table(results.rows)))
    print(
        f"\nseed {options.seed}, {time.monotonic() - started:.0f} s; each row of each part in {options.out}"
    )
    return int(not results.finished or not is_clean(results.rows))


def is_clean(rows: Sequence[Row]) -> bool:
    """Whether nothing went wrong: no harm in any row, and no part that died or hung."""
    return not any(row.outcome in ("failed", "not run") or _harms(row) for row in rows)


def table(rows: Sequence[Row]) -> Iterator[str]:
    """Yield the lines of a Markdown table: one for each part, then their sum."""
    columns = ("trials", "faults", *HARMS)
    names = [name.replace("_", " ") for name in ("part", *columns, "notes")]
    yield f"| {' | '.join(names)} |"
    yield "|---" * len(names) + "|"
    parts = list(dict.fromkeys(row.part for row in rows))
    for part in (*parts, "all"):
        own = [row for row in rows if part in (row.part, "all")]
        sums = [str(sum(int(row.figures.get(name, 0)) for row in own)) for name in columns]
        notes = "" if part == "all" else "; ".join(map(_note, own))
        yield f"| {part} | {' | '.join(sums)} | {notes} |"


def _note(row: Row) -> str:
    seen = row.seen.replace("|", "/").replace("\n", " ")
    return f"{row.check}: {'' if row.outcome == 'passed' else f'{row.outcome}: '}{seen}"


def _harms(row: Row) -> int:
    return sum(int(row.figures.get(name, 0)) for name in HARMS)


def _clear(folder: Path) -> None:
    """Remove the folder, whatever a killed process left mounted or without rights in it."""
    from bench.torture_parts.disks import _unmount

    place = folder / "stage" / "place"
    if place.is_mount():
        _unmount(place)
    shutil.rmtree(folder, ignore_errors=True)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="make torture", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=MINUTES, help="how long, about; default: 30")
    parser.add_argument("--seed", type=int, default=1, help="decides moments, places and order; default: 1")
    parser.add_argument("--short", action="store_true", help="half a minute: some faults of each kind")
    parser.add_argument(
        "--parts", type=_parts, default=tuple(SHARES), help=f"of {','.join(SHARES)}; default: all"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("torture.json"), help="the JSON file; default: torture.json"
    )
    return parser.parse_args(arguments)


def _parts(text: str) -> tuple[str, ...]:
    wanted = tuple(text.split(","))
    unknown = [name for name in wanted if name not in (*SHARES, *HIDDEN)]
    if unknown:
        raise argparse.ArgumentTypeError(f"no part {unknown[0]!r}; there are {', '.join(SHARES)}")
    return wanted


if __name__ == "__main__":
    sys.exit(main())
