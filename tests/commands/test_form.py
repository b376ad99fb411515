"""The form that the Prefect UI makes of each flow: plain fields, bounds, choices, and what an empty field means."""

from __future__ import annotations

from typing import Any

import pytest
from prefect.exceptions import ParameterTypeError
from prefect.utilities.schema_tools import validate

from flows.evaluation import evaluate
from flows.finetuning import finetune
from flows.inference import infer
from flows.parameters import AS_CONFIGURED, chosen_method, chosen_phases, chosen_quantization, load_settings
from flows.pipeline import finetune_infer_evaluate
from tasks.core.metrics.catalogue import available

FLOWS = {flow.name: flow for flow in (finetune, infer, evaluate, finetune_infer_evaluate)}


def problems(flow: str, **values: Any) -> list[str]:
    """What the server says to values of the form, which it asks before a run is made."""
    schema = FLOWS[flow].parameters.model_dump_for_openapi()
    return [error.message for error in validate(values, schema)]


@pytest.mark.parametrize("flow", FLOWS)
def test_every_field_has_a_type_a_description_and_may_stay_as_it_is(flow: str) -> None:
    fields = FLOWS[flow].parameters.properties
    assert FLOWS[flow].parameters.required == []
    assert all(field["description"] for field in fields.values())
    switches = {name for name, field in fields.items() if "type" not in field}
    assert switches == ({"temperature"} if flow == "infer" else set())
    assert problems(flow, **{name: field["default"] for name, field in fields.items()}) == []


@pytest.mark.parametrize(
    ("flow", "field", "value"),
    [
        ("infer", "max_new_tokens", -1),
        ("infer", "max_rows", 2.5),
        ("infer", "temperature", 11),
        ("infer", "quantization", "3bit"),
        ("infer", "settings", ["top_p 0.9"]),
        ("finetune", "learning_rate", 2),
        ("finetune", "method", "magic"),
        ("evaluate", "confidence", 1),
        ("evaluate", "metrics", ["exactmatch"]),
        ("finetune-infer-evaluate", "phases", "some"),
    ],
)
def test_a_bad_value_is_refused_by_the_form(flow: str, field: str, value: Any) -> None:
    assert len(problems(flow, **{field: value})) == 1


@pytest.mark.parametrize("flow", FLOWS)
def test_fields_left_alone_reach_the_flow_as_not_given(flow: str) -> None:
    form = {name: field["default"] for name, field in FLOWS[flow].parameters.properties.items()}
    given = FLOWS[flow].validate_parameters(form)
    assert {value for value in given.values() if not isinstance(value, tuple)} <= {None, False, AS_CONFIGURED}


def test_callers_are_held_to_the_same_bounds() -> None:
    with pytest.raises(ParameterTypeError, match="max_new_tokens"):
        infer.validate_parameters({"max_new_tokens": -1})


def test_every_metric_can_be_chosen() -> None:
    names = [family.name for family in available()]
    assert problems("evaluate", metrics=names) == []
    assert len(problems("evaluate", metrics=["f1", "f1"])) == 1


def test_choices_become_settings() -> None:
    config = load_settings(
        None,
        (),
        **chosen_phases("inference and evaluation"),
        **chosen_method("qlora"),
        **chosen_quantization("8bit"),
    )
    pipeline = config.pipeline
    assert (pipeline.enable_finetuning, pipeline.enable_inference, pipeline.enable_evaluation) == (
        False,
        True,
        True,
    )
    assert (config.fine_tuner.load_in_4bit, config.fine_tuner.full_finetuning) == (True, False)
    assert (config.inferencer.load_in_4bit, config.inferencer.load_in_8bit) == (False, True)
    assert chosen_phases(AS_CONFIGURED) == chosen_method(AS_CONFIGURED) == {}
