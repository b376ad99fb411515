"""A metric of the user's own: `module:function`, called once per row with its Prediction."""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.machinery import BuiltinImporter, PathFinder
from pathlib import Path
from typing import Any, get_args

import numpy as np

from tasks.core.errors import EvaluationError
from tasks.core.metrics.metric import BatchScores, Direction, Kind, Metric, MetricFamily, single
from tasks.core.records import Prediction

NO_VALUE = "the function gave no value"


@dataclass(frozen=True, slots=True)
class UserScore:
    """Calls a user's function; it gives a bool, a number, or None for a row that it cannot score."""

    metric: Metric
    function: Callable[[Prediction], Any]

    def __call__(self, rows: Sequence[Prediction]) -> BatchScores:
        """Score a batch. Raises EvaluationError when the function fails or leaves its stated range or kind."""
        values = np.full(len(rows), np.nan)
        reasons: list[str | None] = [None] * len(rows)
        for i, row in enumerate(rows):
            if row.error is not None:
                values[i] = self.metric.worst if math.isfinite(self.metric.worst) else 0.0
                continue
            value = self._value(row)
            if value is None:
                reasons[i] = NO_VALUE
            else:
                values[i] = value
        return BatchScores({self.metric.name: values}, reasons)

    def _value(self, row: Prediction) -> float | None:
        name = self.metric.name
        try:
            given = self.function(row)
        except Exception as error:
            raise EvaluationError(
                f"metric {name!r} failed on row {row.id!r}: {type(error).__name__}: {error}",
                "correct the function; for a row that it cannot score it may return None",
            ) from error
        if given is None:
            return None
        if not isinstance(given, (bool, int, float, np.number, np.bool_)) or not math.isfinite(given):
            raise EvaluationError(
                f"metric {name!r} gave {given!r} for row {row.id!r}",
                "return a bool, a finite number, or None for a row that cannot be scored",
            )
        value = float(given)
        if not self.metric.minimum <= value <= self.metric.maximum:
            raise EvaluationError(
                f"metric {name!r} gave {value:g} for row {row.id!r}, outside of "
                f"[{self.metric.minimum:g}, {self.metric.maximum:g}]",
                "set minimum and maximum on the function, e.g. my_metric.maximum = 10",
            )
        if self.metric.kind == "binary" and value not in (0.0, 1.0):
            raise EvaluationError(
                f"metric {name!r} gave {value:g} for row {row.id!r}, but its kind is binary",
                'return True or False (1 or 0), or set its kind to "continuous"',
            )
        return value


def user_family(name: str) -> MetricFamily:
    """The metric `module:function`; the module is looked for in the working directory too.

    Attributes of the function describe it: kind ("continuous"), direction ("higher"), minimum (0),
    maximum (1), errors_are_wrong (True); its docstring's first line is the description.
    Raises EvaluationError when there is no such module or function, the module cannot be imported, or an attribute
    says nothing that is meant.
    """
    module_name, _, function_name = name.partition(":")
    function = _find(name, module_name, function_name)
    described = (getattr(function, "__doc__", None) or "").strip() or f"The function {name}."
    kind: Kind = getattr(function, "kind", "continuous")
    direction: Direction = getattr(function, "direction", "higher")
    if kind not in get_args(Kind) or direction not in get_args(Direction):
        raise EvaluationError(
            f"metric {name!r} has kind {kind!r} and direction {direction!r}",
            'kind is "binary" or "continuous"; direction is "higher", "lower" or "none"',
        )
    minimum, maximum = _range(name, function)
    if kind == "binary" and (minimum, maximum) != (0.0, 1.0):
        raise EvaluationError(
            f"metric {name!r} is binary with values from {minimum:g} to {maximum:g}",
            'a binary metric gives 0 or 1; leave minimum and maximum out, or set its kind to "continuous"',
        )
    metric = Metric(
        name,
        described.splitlines()[0],
        f"your function {name}",
        kind=kind,
        direction=direction,
        minimum=minimum,
        maximum=maximum,
        unscored_when="the function returns None",
        errors_are_wrong=bool(getattr(function, "errors_are_wrong", True)),
    )
    return single(metric, UserScore(metric, function), in_process=True)


def unread_family(name: str) -> MetricFamily:
    """The metric `module:function` for a dry run: its module, whose code would run, is looked for, not imported.

    Raises EvaluationError when there is no such module.
    """
    module_name, _, _ = name.partition(":")
    if not _is_there(module_name):
        raise _not_importable(name, module_name, f"No module named {module_name!r}")
    metric = Metric(name, f"The function {name}.", f"your function {name}")
    return single(metric, UserScore(metric, _not_run), in_process=True)


def _not_run(_: Prediction) -> float | None:
    raise AssertionError("a dry run scores nothing")


def _is_there(module_name: str) -> bool:
    """Whether a module can be found; packages above it are not imported, as importlib's own search would."""
    top, *below = module_name.split(".")
    with suppress(ImportError, ValueError):
        found = PathFinder.find_spec(top, [*sys.path, str(Path.cwd())]) or BuiltinImporter.find_spec(top)
        if found is None or not below:
            return found is not None
        places = [Path(place, *below) for place in found.submodule_search_locations or ()]
        return any(place.is_dir() or any(place.parent.glob(f"{place.name}.*")) for place in places)
    return False


def _not_importable(name: str, module_name: str, why: object) -> EvaluationError:
    return EvaluationError(
        f"metric {name!r}: the module {module_name!r} cannot be imported: {why}",
        f"write it as module:function, with {module_name.replace('.', '/')}.py in the working directory or installed",
    )


def _range(name: str, function: Callable[[Prediction], Any]) -> tuple[float, float]:
    """Smallest and largest value that the function says it gives."""
    given = getattr(function, "minimum", 0.0), getattr(function, "maximum", 1.0)
    try:
        minimum, maximum = map(float, given)
        if minimum < maximum:
            return minimum, maximum
    except (TypeError, ValueError, OverflowError):
        pass
    raise EvaluationError(
        f"metric {name!r} has minimum {given[0]!r} and maximum {given[1]!r}",
        "set them to numbers, the smaller one first; float('inf') where there is no limit",
    )


def _find(name: str, module_name: str, function_name: str) -> Callable[[Prediction], Any]:
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise _not_importable(name, module_name, error) from error
    except (Exception, SystemExit) as error:
        raise EvaluationError(
            f"metric {name!r}: the module {module_name!r} fails when it is imported: "
            f"{type(error).__name__}: {error}",
            "correct the module",
        ) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise EvaluationError(
            f"metric {name!r}: {module_name} has no function {function_name!r}",
            f"define `def {function_name}(row: Prediction) -> float | bool | None` there",
        )
    return function  # type: ignore[no-any-return]
