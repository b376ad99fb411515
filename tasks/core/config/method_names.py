"""The training methods that settings may name. The room of training comes later and knows them."""

from __future__ import annotations

from importlib import import_module

CATALOGUE = "tasks.core.training.methods.catalogue"
"""Asked by its name, and only when the method is not the usual one: settings stand below all that they are for."""
DEFAULT_METHOD = "sft"


def method_names() -> list[str]:
    """Their names."""
    return [method.name for method in import_module(CATALOGUE).METHODS]


def check_method_name(name: str) -> str:
    """Raise ValueError for a name that is no training method's."""
    if name != DEFAULT_METHOD and name not in method_names():
        raise ValueError("is no training method")
    return name
