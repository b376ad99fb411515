"""Loading foreign files can fail in any way; here each way becomes an error that a person can act on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from tasks.core.errors import ModelLoadError, OutOfMemoryError, TuneproofError


@contextmanager
def explained(model_id: str) -> Iterator[None]:
    """Turn whatever transformers, peft or safetensors raise into ModelLoadError or OutOfMemoryError.

    The model libraries' progress bars and tables are off inside: they mean nothing to a log.
    """
    from tasks.core.memory.device_memory import forget_traceback, is_out_of_memory

    out_of_memory: BaseException | None = None
    try:
        with _without_progress_bars():
            yield
    except TuneproofError:
        raise
    except Exception as error:
        if not is_out_of_memory(error):
            raise ModelLoadError(
                f"{model_id} cannot be loaded: {_first_lines(error)}", _advice(error)
            ) from error
        out_of_memory = error
    if out_of_memory is not None:
        forget_traceback(out_of_memory)  # its frames hold the weights loaded so far
        raise OutOfMemoryError(
            f"memory ran out while {model_id} was loaded: {_first_lines(out_of_memory)}",
            'set load_in_4bit = true or dtype = "bfloat16", or take a smaller model',
        )


def _first_lines(error: BaseException, limit: int = 400) -> str:
    text = " ".join(str(error).split()) or "no message"
    shortened = text if len(text) <= limit else text[:limit] + " …"
    return f"{type(error).__name__}: {shortened}"


def _advice(error: Exception) -> str:
    text = str(error)
    if "trust_remote_code" in text:
        return "it needs Python code of its own; read it, and if you trust it, set trust_remote_code = true"
    if isinstance(error, ImportError):
        return "install the missing package named above, then run the same command again"
    if "does not recognize this architecture" in text or "not supported yet" in text:
        return "this version of transformers does not know the architecture; take another model or upgrade it"
    if "Unrecognized configuration class" in text:
        return "only causal language models (text in, text out) can be used; take one"
    return "check that the model loads with transformers' AutoModelForCausalLM.from_pretrained"


@contextmanager
def _without_progress_bars() -> Iterator[None]:
    from transformers.utils import logging as transformers_logging

    was_enabled = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            transformers_logging.enable_progress_bar()
