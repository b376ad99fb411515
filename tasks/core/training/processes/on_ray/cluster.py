"""What a Ray cluster has, and what one of its workers says."""

from __future__ import annotations

import logging
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, TypeVar

from tasks.core.config import FineTunerConfig
from tasks.core.errors import ConfigError, TrainingError, first_line
from tasks.core.interruption import raise_if_interrupted

logger = logging.getLogger(__name__)
Answer = TypeVar("Answer")

POLL_SECONDS = 0.5


def require_ray() -> None:
    """Raise ConfigError where Ray Train cannot be imported."""
    if find_spec("ray") is None:
        raise ConfigError(
            'fine_tuner.runner = "ray", but Ray is not installed',
            "pip install -c constraints.txt 'tuneproof[ray]' here and on every machine of the cluster, "
            'or set runner to "local"',
        )
    try:
        import ray.train.torch  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f'fine_tuner.runner = "ray", but Ray Train does not start: {first_line(error)}',
            "pip install -c constraints.txt 'tuneproof[ray]' here and on every machine of the cluster",
        ) from error


def cluster_process_count(config: FineTunerConfig) -> int:
    """How many workers share the rows: one for each GPU of the cluster, one without, or as the settings say.

    Raises ConfigError where the cluster has fewer. Needs a connection.
    """
    gpus = _gpus(config)
    if config.processes == "auto":
        return max(1, gpus)
    kind, there = ("GPUs", gpus) if gpus else ("CPUs", int(_resources().get("CPU", 0)))
    if config.processes > there:
        raise ConfigError(
            f"fine_tuner.processes = {config.processes}, but the Ray cluster has {there} {kind}",
            'set processes = "auto" or a smaller number, or add machines to the cluster (see `ray status`)',
        )
    return config.processes


def device_on_cluster(config: FineTunerConfig) -> str:
    """What a worker of the cluster computes on. Raises ConfigError for a device that a cluster does not have."""
    if config.device not in ("auto", "cpu", "cuda"):
        raise ConfigError(
            f'fine_tuner.device = "{config.device}" names a device of one machine, and runner is "ray"',
            'set device to "auto", "cuda" or "cpu"; Ray gives each process a GPU of its own',
        )
    if config.device == "cuda" and not _gpus(config):
        raise ConfigError(
            'fine_tuner.device = "cuda", but the Ray cluster has no GPU', 'set device to "auto"'
        )
    return "cuda:0" if _gpus(config) else "cpu"


def asked_of_worker(config: FineTunerConfig, question: Callable[..., Answer], *arguments: Any) -> Answer:
    """What a function gives on a machine of the cluster that would train; this machine may be of another kind."""
    import ray

    needs = {"num_cpus": 1, "num_gpus": 1 if _gpus(config) else 0}
    answer = ray.remote(**needs, max_retries=0)(question).remote(*arguments)
    try:
        _wait_for([answer], "a free worker of the Ray cluster")
        given: Answer = ray.get(answer)
    except ray.exceptions.RayError as error:
        raise as_ours(error) from error
    return given


def _gpus(config: FineTunerConfig) -> int:
    return 0 if config.device == "cpu" else int(_resources().get("GPU", 0))


def _resources() -> dict[str, float]:
    import ray

    return dict(ray.cluster_resources())


def _wait_for(refs: list[Any], what: str) -> None:
    import ray

    seconds = 0.0
    while not ray.wait(refs, num_returns=len(refs), timeout=POLL_SECONDS)[0]:
        raise_if_interrupted()
        seconds += POLL_SECONDS
        if seconds % 60 == 0:
            logger.info("waiting for %s", what)


def as_ours(error: Exception) -> BaseException:
    """What Ray raises here, as an error that says what to do."""
    cause = root_cause(error)
    if isinstance(cause, ModuleNotFoundError) or "No module named 'tasks'" in str(error):
        return ConfigError(
            f"a worker of the Ray cluster cannot import what this machine has: {first_line(cause)}",
            "install this project with its dependencies on every machine of the cluster, in the same versions",
        )
    return TrainingError(
        f"the training on the Ray cluster ended: {type(cause).__name__}: {first_line(cause)}",
        "the same command goes on from the newest checkpoint; `ray status` shows the cluster, and its logs say more",
    )


def root_cause(error: BaseException) -> BaseException:
    """What a worker raised, out of what Ray has wrapped it into."""
    for name in ("_base_exc", "health_check_failure", "controller_failure", "cause"):
        inner = getattr(error, name, None)
        if isinstance(inner, BaseException) and inner is not error:
            return root_cause(inner)
    failures = getattr(error, "worker_failures", None)
    if isinstance(failures, dict) and failures:
        return root_cause(failures[min(failures)])
    return error
