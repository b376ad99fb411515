"""The page of a judge's calibration: figures, confusion table, and the rows on which judge and people differ."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from tasks.core.evaluation.calibrating import Calibrated
from tasks.core.files import replacing
from tasks.core.metrics.judge.calibration import JudgeStanding
from tasks.core.provenance import now
from tasks.core.report.html_page import render_page


def write_calibration(
    path: Path, found: Sequence[Calibrated], standings: Sequence[JudgeStanding], labels: str
) -> None:
    """Render and write the page, whole or not at all. Raises StorageError when it cannot be written."""
    html = render_page(
        "calibration.html.j2",
        ("theme.js",),
        labels=labels,
        written_at=now("minutes"),
        parts=[
            {"found": one, "standing": standing, "figures": list(figures(one))}
            for one, standing in zip(found, standings, strict=True)
        ],
    )
    with replacing(path) as partial_path:
        partial_path.write_text(html, encoding="utf-8")


def figures(found: Calibrated) -> Iterator[tuple[str, str, str]]:
    """Name, value and a remark of each figure."""
    record = found.record
    kappa = "cannot be told" if record.kappa is None else f"{record.kappa:.2f}"
    interval = "" if record.low is None else f"95 % interval {record.low:.2f} to {record.high:.2f}"
    yield "kappa, weighted", kappa, interval
    if record.plain_kappa is not None:
        yield "kappa, unweighted", f"{record.plain_kappa:.2f}", "of equal values"
    yield (
        "agreement",
        f"{100 * record.agreement:.1f} %",
        f"equal on {record.rows - len(found.differing):,} rows",
    )
    yield "judge less person", f"{found.mean_error:+.3f}", "on average; above 0 the judge is the milder one"
    if record.unjudged_rows:
        yield "no verdict", f"{record.unjudged_rows:,} rows", found.unjudged[0][1]
    if found.position is not None:
        place = found.position
        yield (
            "changes with the order",
            f"{place.changed:,} of {place.rows:,} rows",
            "when both texts change places",
        )
        if (first := place.first) is not None and first.is_share:
            yield first.name, f"{100 * first.value:.0f} %", f"{100 * first.unbiased:.0f} % without bias"
        elif first is not None:
            yield first.name, f"{first.value:+.3f}", f"{first.unbiased:g} without bias"
    if found.shorter is not None and found.longer is not None:
        surely = (
            "" if found.length is None else f"rho {found.length.rho:+.2f}, p = {found.length.p_value:.2g}"
        )
        yield "judge less person, longer half", f"{found.longer:+.3f}", surely
        yield "judge less person, shorter half", f"{found.shorter:+.3f}", ""
