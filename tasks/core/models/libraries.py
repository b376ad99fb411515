"""The libraries that every process needs which trains or answers, imported at once."""

from __future__ import annotations

from tasks.core.garbage import uncollected


def import_model_libraries(*, weights: bool = True) -> None:
    """Import what every training and every run needs; transformers imports most of itself when it is asked for it.

    Without `weights` only what tells a model's identity.
    """
    with uncollected():
        import datasets  # noqa: F401
        import torch  # noqa: F401
        import transformers.activations  # noqa: F401
        from transformers import AutoConfig, AutoTokenizer  # noqa: F401

        if weights:
            from transformers import AutoModelForCausalLM, PreTrainedModel  # noqa: F401


def import_in_child(*, trains: bool = False) -> None:
    """Import them, and those of one that `trains`, in a process that was begun for this; see `uncollected`."""
    with uncollected(frozen=True):
        import_model_libraries()
        if trains:
            import peft  # noqa: F401
            from transformers import Trainer  # noqa: F401
