"""A training on a Ray cluster. What needs no Ray runs always, the rest where Ray is installed."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tasks.core.config import FineTunerConfig
from tasks.core.config.loading import load_config
from tasks.core.errors import ConfigError, RunKeyMismatchError
from tasks.core.training.processes import choosing
from tasks.core.training.processes.on_ray import cluster, place
from tasks.core.training.run import TrainedModel, train
from tests.training.test_training_processes import difference, settings  # noqa: F401

HERE = Path("/models/run")


def on_ray(**more: Any) -> FineTunerConfig:
    return FineTunerConfig(runner="ray", **more)


# --- without Ray


def test_a_cluster_address_without_ray_is_refused() -> None:
    with pytest.raises(ConfigError, match='runner is "local"'):
        load_config(None, {"fine_tuner.runner_address": "head:6379"})


def test_without_ray_the_line_that_installs_it_is_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(cluster, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install .*tuneproof\[ray\]"):
        train(on_ray(base_model_id="nowhere"), models_dir=tmp_path)


def test_torchrun_and_ray_together_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "x", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="torchrun has started 2 processes"):
        choosing.choose_trainers(on_ray())


@pytest.mark.parametrize(
    ("there", "processes", "count"),
    [
        ({"CPU": 8}, "auto", 1),
        ({"CPU": 8}, 4, 4),
        ({"CPU": 8, "GPU": 3}, "auto", 3),
        ({"CPU": 1, "GPU": 3}, 2, 2),
    ],
)
def test_the_workers_are_as_many_as_the_cluster_has_gpus_or_the_settings_say(
    monkeypatch: pytest.MonkeyPatch, there: dict[str, float], processes: Any, count: int
) -> None:
    monkeypatch.setattr(cluster, "_resources", lambda: there)
    assert choosing.process_count(on_ray(processes=processes)) == count
    assert choosing.device_of(on_ray()) == ("cuda:0" if "GPU" in there else "cpu")
    assert choosing.count_here(on_ray()) == 0  # no GPU of this machine is held for it


@pytest.mark.parametrize("there", [{"CPU": 2}, {"CPU": 16, "GPU": 2}])
def test_more_workers_than_the_cluster_has_are_refused(
    monkeypatch: pytest.MonkeyPatch, there: dict[str, float]
) -> None:
    monkeypatch.setattr(cluster, "_resources", lambda: there)
    with pytest.raises(ConfigError, match="the Ray cluster has 2"):
        choosing.process_count(on_ray(processes=3))


@pytest.mark.parametrize(("device", "told"), [("cuda:1", "a device of one machine"), ("cuda", "has no GPU")])
def test_a_device_that_a_cluster_does_not_have_is_refused(
    monkeypatch: pytest.MonkeyPatch, device: str, told: str
) -> None:
    monkeypatch.setattr(cluster, "_resources", lambda: {"CPU": 2})
    with pytest.raises(ConfigError, match=told):
        choosing.device_of(on_ray(device=device))


class _Work:
    """What is looked at of a work."""

    def __init__(self, strategy: str = "ddp", home: Any = None) -> None:
        self.model_dir, self.strategy, self.home, self.job = HERE, strategy, home, self
        self.config = on_ray(base_model_id="base")
        self.base = self
        self.weights_sha256, self.adapter_sha256, self.chat_template_sha256 = "w", None, "t"


SEEN = place._Seen("one", True, HERE, {"torch": "2"}, ("w", None, "t"), None)


def problem(other: place._Seen, **work: Any) -> str | None:
    found = place._problem(_Work(**work), [SEEN, other])  # type: ignore[arg-type]
    return None if found is None else f"{type(found).__name__}: {found}"


def test_workers_that_have_the_same_may_train() -> None:
    assert problem(replace(SEEN, host="two")) is None


def test_a_machine_that_does_not_see_the_models_directory_is_named() -> None:
    told = problem(replace(SEEN, host="two", folder=False))
    assert told is not None and told.startswith("ConfigError") and "not seen on: two" in told


def test_at_a_url_machines_need_not_share_a_directory_unless_each_writes_parts_of_a_checkpoint() -> None:
    elsewhere = replace(SEEN, host="two", folder=False)
    assert problem(elsewhere, home=object()) is None
    assert "fsdp" in str(problem(elsewhere, home=object(), strategy="fsdp"))
    blind = replace(SEEN, folder=False)  # all on one machine, which is not the one that began it
    assert place._problem(_Work("fsdp", object()), [blind, blind]) is None  # type: ignore[arg-type]


def test_other_versions_or_another_base_on_a_machine_are_refused() -> None:
    assert "torch 3" in str(problem(replace(SEEN, host="two", versions={"torch": "3"})))
    assert str(problem(replace(SEEN, host="two", base=("x", None, "t")))).startswith(
        RunKeyMismatchError.__name__
    )


def test_what_a_worker_raised_is_found_in_what_ray_wraps_it_into() -> None:
    class WrappedError(Exception):
        def __init__(self, **attributes: Any) -> None:
            self.__dict__.update(attributes)

    cause = ValueError("the cause")
    failures = {1: ConnectionError("reset"), 0: WrappedError(_base_exc=cause)}
    assert cluster.root_cause(WrappedError(cause=WrappedError(worker_failures=failures))) is cause


# --- with Ray


@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
    """A Ray of this machine with two CPUs; training finds it connected and leaves it so."""
    ray = pytest.importorskip("ray")
    os.environ["RAY_ENABLE_UV_RUN_RUNTIME_ENV"] = "0"
    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=10**8)
    yield
    ray.shutdown()


def run(settings: dict[str, Any], models_dir: Path, **changes: Any) -> TrainedModel:  # noqa: F811
    on_progress = changes.pop("on_progress", None)
    config = FineTunerConfig(**{**settings, **changes})
    return train(config, models_dir=models_dir, run_name="run", on_progress=on_progress)


def workers() -> list[int]:
    import psutil

    return [
        p.pid
        for p in psutil.process_iter(["cmdline"])
        if "RayTrainWorker" in " ".join(p.info["cmdline"] or [])
    ]


def test_two_workers_of_which_one_is_killed_learn_what_one_process_learns(
    local_ray: None,
    settings: dict[str, Any],  # noqa: F811
    tmp_path: Path,
) -> None:
    killed: list[int] = []

    def kill(progress: Any) -> None:
        if progress.step >= 2 and not killed:
            killed.append(max(workers()))
            os.kill(killed[0], signal.SIGKILL)

    alone = run(settings, tmp_path / "alone", save_steps=1)
    shared = run(settings, tmp_path / "shared", save_steps=1, runner="ray", processes=2, on_progress=kill)
    assert shared.manifest.processes == 2 and len(shared.manifest.restarts) == 1
    assert shared.manifest.restarts[0].step >= 1
    assert difference(alone, shared) < 1e-5
    assert not workers()
    assert not list(shared.model_dir.glob(f"{place.TOKEN_PREFIX}*"))


def test_an_error_of_a_worker_is_told_as_itself_and_nothing_is_begun_again(
    local_ray: None,
    settings: dict[str, Any],  # noqa: F811
    tmp_path: Path,
) -> None:
    with pytest.raises(ConfigError, match="q_proj") as caught:
        run(settings, tmp_path, target_modules=("query",), runner="ray", processes=2)
    assert "query" in caught.value.what
    assert not workers()
