"""Small pictures as SVG, for places that show images but run no scripts, such as the artifacts of the Prefect UI."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from tasks.core.records import LossPoint

_FONT = 'font-family="system-ui, Segoe UI, Roboto, Helvetica, Arial, sans-serif"'
_INK, _SOFT, _LINE, _BLUE, _AMBER = "#1c2026", "#5b6470", "#e4e6ea", "#2f5bd0", "#b8741a"
_TONES = {"good": "#14734a", "bad": "#b3372b", "open": "#9a5f10", "plain": "#c3c8d0"}
_MOST_POINTS = 300
_WIDTH, _HEIGHT = 720, 260
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 16, 30, 34


@dataclass(frozen=True, slots=True)
class Box:
    """A box of a chain: a heading and up to three lines; `tone` is plain, good, bad or open."""

    heading: str
    lines: tuple[str, ...]
    tone: str = "plain"


def data_uri(svg: str) -> str:
    """The picture as an address that holds it whole, so that no server has to."""
    return f"data:image/svg+xml;base64,{base64.b64encode(svg.encode()).decode('ascii')}"


def loss_plot(losses: Sequence[LossPoint], best_step: int | None = None) -> str:
    """The course of training and validation loss over the steps, from zero up. SVG of 720 by 260 pixels.

    `best_step` is the step whose weights became the model; a ring marks it.
    """
    curves = {
        "training": [(point.step, point.loss) for point in losses if point.loss is not None],
        "validation": [
            (point.step, point.validation_loss) for point in losses if point.validation_loss is not None
        ],
    }
    points = [point for curve in curves.values() for point in curve]
    last_step = max((step for step, _ in points), default=1)
    highest = _round_up(max((loss for _, loss in points), default=1.0))

    def at(step: float, loss: float) -> tuple[float, float]:
        x = _LEFT + (_WIDTH - _LEFT - _RIGHT) * step / last_step
        y = _HEIGHT - _BOTTOM - (_HEIGHT - _TOP - _BOTTOM) * loss / highest
        return round(x, 1), round(y, 1)

    parts = [_grid_line(*at(0, highest * i / 4), f"{highest * i / 4:.3g}") for i in range(5)]
    parts += [
        _text(at(last_step * i / 4, 0)[0], _HEIGHT - 12, f"{last_step * i / 4:,.0f}", anchor="middle")
        for i in range(1, 5)
    ]
    parts.append(_text(_LEFT, _HEIGHT - 12, "step", anchor="middle"))
    for number, ((name, curve), colour) in enumerate(zip(curves.items(), (_BLUE, _AMBER), strict=True)):
        if not curve:
            continue
        course = " ".join("{},{}".format(*at(*point)) for point in _thinned(curve))
        parts.append(f'<polyline points="{course}" fill="none" stroke="{colour}" stroke-width="2"/>')
        x = _LEFT + 180 * number
        parts.append(f'<circle cx="{x + 4}" cy="14" r="4" fill="{colour}"/>')
        parts.append(_text(x + 14, 18, f"{name} loss, last {curve[-1][1]:.3f}", colour=_INK))
    for step, loss in curves["validation"]:
        if step == best_step:
            centre = at(step, loss)
            parts.append(
                f'<circle cx="{centre[0]}" cy="{centre[1]}" r="6" fill="none" stroke="{_AMBER}" stroke-width="2"/>'
                + _text(_LEFT + 374, 18, f"the model: step {step}, {loss:.3f}", colour=_INK)
            )
    return _picture(_WIDTH, _HEIGHT, parts)


def chain(boxes: Sequence[Box]) -> str:
    """Boxes from left to right with arrows between them. SVG, 192 pixels for each box."""
    width, gap, height = 168, 24, 104
    parts = []
    for number, box in enumerate(boxes):
        x = 8 + number * (width + gap)
        colour = _TONES[box.tone]
        parts.append(
            f'<rect x="{x}" y="8" width="{width}" height="{height - 16}" rx="8" fill="#fff" '
            f'stroke="{colour}" stroke-width="{1 if box.tone == "plain" else 2}"/>'
        )
        parts.append(_text(x + 12, 30, box.heading, size=11, colour=_SOFT))
        for line_number, line in enumerate(box.lines[:3]):
            size, tint = (13, _INK) if line_number == 0 else (11, _SOFT)
            parts.append(_text(x + 12, 50 + 17 * line_number, _shortened(line, size), size=size, colour=tint))
        if number:
            y = height / 2
            parts.append(
                f'<path d="M{x - gap + 3} {y}H{x - 5}m-6 -4l6 4l-6 4" fill="none" stroke="{_SOFT}" '
                'stroke-width="1.5"/>'
            )
    return _picture(8 + len(boxes) * (width + gap) - gap + 8, height, parts)


def _picture(width: int, height: int, parts: Sequence[str]) -> str:
    """The page behind is light or dark; the picture brings its own ground."""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}"><rect width="100%" height="100%" rx="8" fill="#fbfbfa"/>'
        f"{''.join(parts)}</svg>"
    )


def _text(
    x: float, y: float, text: str, *, anchor: str = "start", size: int = 11, colour: str = _SOFT
) -> str:
    weight = ' font-weight="600"' if size > 12 else ""
    return (
        f'<text x="{x}" y="{y}" {_FONT} font-size="{size}" fill="{colour}" text-anchor="{anchor}"{weight}>'
        f"{escape(text)}</text>"
    )


def _grid_line(x: float, y: float, label: str) -> str:
    line = f'<line x1="{x}" x2="{_WIDTH - _RIGHT}" y1="{y}" y2="{y}" stroke="{_LINE}"/>'
    return line + _text(x - 8, y + 4, label, anchor="end")


def _shortened(text: str, size: int) -> str:
    """As much as fits into a box, also in a wide font; the middle left out: the ends of names tell most."""
    room = 16 if size > 12 else 21
    return text if len(text) <= room else f"{text[: room // 2]}…{text[-(room - room // 2 - 1) :]}"


def _thinned(curve: Sequence[tuple[int, float]]) -> Sequence[tuple[int, float]]:
    if len(curve) <= _MOST_POINTS:
        return curve
    stride = -(-len(curve) // _MOST_POINTS)
    return [*curve[:-1:stride], curve[-1]]


def _round_up(value: float) -> float:
    """The next of 1, 2, 2.5, 4, 5, 8 or 10 times a power of ten, so that a quarter of it is a plain number."""
    if not value > 0 or value == float("inf"):
        return 1.0
    power = 1.0
    while power * 10 < value:
        power *= 10
    while power >= value:
        power /= 10
    return next(step * power for step in (1, 2, 2.5, 4, 5, 8, 10, 20) if step * power >= value)
