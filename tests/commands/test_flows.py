"""The flows on a real Prefect API: what they do, show, reuse, leave out, and how they fail."""

from __future__ import annotations

import errno
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from prefect.client.schemas.objects import State

from flows.parameters import load_settings
from tasks.core.config import load_config
from tasks.core.errors import ConfigError, DataError, EvaluationError, RunKeyMismatchError, StorageError
from tasks.server.retrying import is_passing

if TYPE_CHECKING:
    from flows.pipeline import PipelineResult

pytestmark = pytest.mark.usefixtures("prefect_api")

QUESTIONS = 6


@pytest.fixture
def settings(tmp_path: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A settings file for the tiny model; the working directory and the cache are the test's own."""
    enter(tmp_path, monkeypatch)
    return write_settings(tmp_path, tiny_model_dir)


def enter(folder: Path, patch: pytest.MonkeyPatch) -> None:
    patch.chdir(folder)
    patch.setenv("TUNEPROOF_CACHE", str(folder / "cache"))


def write_settings(folder: Path, model_dir: Path) -> Path:
    questions, path = folder / "questions.jsonl", folder / "settings.toml"
    rows = [{"question": f"How many legs have {n} dogs?", "answer": str(4 * n)} for n in range(QUESTIONS)]
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    path.write_text(f"""
[fine_tuner]
base_model_id = "{model_dir}"
training_data_id = "{questions}"
run_name = "tuned"
epochs = 1
max_sequence_length = 128
[inferencer]
testing_data_id = "{questions}"
max_sequence_length = 128
max_new_tokens = 4
temperature = 0
[evaluator]
metrics = ["exact_match", "f1"]
bootstrap_resamples = 200
""")
    return path


def logs_with(expected: str) -> str:
    """All messages in the logs of all runs. They are sent in batches, so wait until `expected` is there."""
    from prefect.client.orchestration import get_client

    deadline = time.monotonic() + 15
    with get_client(sync_client=True) as client:
        while True:
            found = client._client.post("/logs/filter", json={"limit": 200, "sort": "TIMESTAMP_DESC"}).json()
            text = "\n".join(str(log["message"]) for log in found)
            if expected in text or time.monotonic() > deadline:
                return text
            time.sleep(0.2)


def artifacts(since: datetime) -> dict[str, str]:
    """Type of each artifact by key."""
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        found = client._client.post("/artifacts/filter", json={"limit": 200, "sort": "CREATED_DESC"}).json()
    return {
        artifact["key"]: artifact["type"]
        for artifact in found
        if datetime.fromisoformat(artifact["created"]) >= since
    }


@dataclass(frozen=True)
class Done:
    """What a flow gave and the name of its state, where it told that, its settings, what it showed and emitted."""

    result: Any
    state_name: str | None
    settings: Path
    shown: dict[str, str]
    events: list[str]


def do(flow: Callable[[str], Any], folder: Path, model_dir: Path) -> Done:
    """Run a flow in a folder of its own."""
    began, events, settings = datetime.now(UTC), list[str](), write_settings(folder, model_dir)
    with pytest.MonkeyPatch.context() as patch:
        enter(folder, patch)
        note_events(events, patch)
        given = flow(str(settings))
    result, state_name = (given.result(), given.name) if isinstance(given, State) else (given, None)
    return Done(result, state_name, settings, artifacts(began), events)


@pytest.fixture(scope="module")
def answered_once(prefect_api: str, tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> Done:
    from flows.inference import infer

    def infer_first(settings: str) -> Any:
        return infer(settings, model=str(tiny_model_dir), run_name="First_Run", return_state=True)

    return do(infer_first, tmp_path_factory.mktemp("answered"), tiny_model_dir)


@pytest.fixture
def answered(answered_once: Done, monkeypatch: pytest.MonkeyPatch) -> Done:
    """An inference; the working directory is its folder, which other tests work in too."""
    enter(answered_once.settings.parent, monkeypatch)
    return answered_once


def test_infer_answers_every_row_and_shows_sample_progress_and_file(answered: Done) -> None:
    published = Path("runs/First_Run/inferencer_output.jsonl").read_text().splitlines()
    assert (answered.result.row_count, len(published)) == (QUESTIONS, QUESTIONS)
    shown = answered.shown
    assert shown["sample-first-run"] == "table"
    assert shown["predictions-first-run"] == "markdown"  # how Prefect stores links
    assert shown["generation-first-run"] == shown["reference-scores-first-run"] == "progress"


def test_what_the_core_logs_is_in_the_logs_of_the_run(answered: Done, tiny_model_dir: Path) -> None:
    expected = f"loaded {tiny_model_dir}"
    assert expected in logs_with(expected)


def test_a_second_infer_generates_nothing_and_leaves_the_file_as_it_is(
    answered: Done, tiny_model_dir: Path
) -> None:
    from flows.inference import infer

    files = {path: path.read_bytes() for path in Path("runs/First_Run").glob("*.json*")}
    second = infer(str(answered.settings), model=str(tiny_model_dir), run_name="First_Run")
    assert files and answered.result == second
    assert files == {path: path.read_bytes() for path in Path("runs/First_Run").glob("*.json*")}


def test_infer_refuses_to_mix_and_its_log_says_what_differs_without_a_traceback(
    answered: Done, tiny_model_dir: Path
) -> None:
    from flows.inference import infer

    given = {"model": str(tiny_model_dir), "run_name": "First_Run"}
    with pytest.raises(RunKeyMismatchError, match="max_new_tokens: 4 -> 3"):
        infer(str(answered.settings), **given, max_new_tokens=3)
    logs = logs_with("max_new_tokens: 4 -> 3")
    assert "max_new_tokens: 4 -> 3" in logs
    assert "Traceback" not in logs


@pytest.fixture(scope="module")
def piped_once(prefect_api: str, tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> Done:
    from flows.pipeline import finetune_infer_evaluate

    return do(finetune_infer_evaluate, tmp_path_factory.mktemp("piped"), tiny_model_dir)


@pytest.fixture
def piped(piped_once: Done, monkeypatch: pytest.MonkeyPatch) -> Done:
    """A whole pipeline; the working directory is its folder, which other tests work in too."""
    enter(piped_once.settings.parent, monkeypatch)
    return piped_once


def test_the_pipeline_trains_answers_before_and_after_and_compares(piped: Done) -> None:
    result: PipelineResult = piped.result
    # So that nothing is started twice.
    assert piped.events and all(name.startswith("tuneproof.pipeline.") for name in piped.events)
    assert result.trained is not None and result.candidate is not None and result.baseline is not None
    assert result.trained.model_dir.resolve() == Path("models/tuned").resolve()
    assert result.candidate.identity.model.adapter_sha256 is not None
    assert result.baseline.identity.model.adapter_sha256 is None
    assert result.baseline.identity.rows_sha256 == result.candidate.identity.rows_sha256
    assert result.baseline.run_name.endswith(result.baseline.run_key[:8])
    assert result.evaluation is not None and result.evaluation.comparison is not None
    assert result.evaluation.comparison.paired_rows == QUESTIONS
    assert result.evaluation.training is not None
    assert (Path("runs") / result.candidate.run_name / "report.html").is_file()
    shown, run_name = piped.shown, result.candidate.run_name
    assert {shown[f"{kind}-{run_name}"] for kind in ("scores", "verdict", "lineage")} == {"markdown"}
    assert (shown["loss-tuned"], shown["loss-plot-tuned"]) == ("table", "image")
    # The base answered last, yet an evaluation that names no run is of the fine-tuned model.
    from flows.evaluation import evaluate

    assert evaluate(str(piped.settings)).candidate.run_name == run_name


def test_a_pipeline_run_again_trains_again_or_reuses_but_never_fails_on_its_own_files(piped: Done) -> None:
    from flows.pipeline import finetune_infer_evaluate

    second = finetune_infer_evaluate(str(piped.settings))
    assert second.evaluation is not None and piped.result.baseline == second.baseline


def test_work_that_is_done_ends_at_once_and_is_told_apart(answered: Done, tiny_model_dir: Path) -> None:
    from flows.evaluation import evaluate
    from flows.inference import infer

    settings, run = str(answered.settings), "First_Run"

    def evaluate_new() -> str | None:
        state: State = evaluate(settings, run=run, only_new=True, return_state=True)
        return state.name

    again: State = infer(settings, model=str(tiny_model_dir), run_name=run, return_state=True)
    assert [answered.state_name, again.name] == ["Completed", "Already done"]
    assert [evaluate_new(), evaluate_new()] == ["Completed", "Already done"]
    assert evaluate(settings, run=run, return_state=True).name == "Completed"


def test_the_noise_is_measured_later_when_the_process_ended_before_it_was(
    settings: Path, tiny_model_dir: Path
) -> None:
    from flows.inference import infer

    def infer_with(noise_rows: int) -> str | None:
        chosen = ("inferencer.engine=generate", f"gate.noise_rows={noise_rows}")
        given = {"model": str(tiny_model_dir), "run_name": "noisy", "settings": chosen}
        state: State = infer(str(settings), **given, return_state=True)
        return state.name

    repeated = Path("runs/noisy/repeat-3/manifest.json")
    assert infer_with(0) == "Completed" and not repeated.exists()  # as after a death behind the publishing
    assert infer_with(0) == "Already done" and not repeated.exists()
    assert infer_with(3) == "Already done" and repeated.is_file()


def test_a_phase_that_is_left_out_counts_as_success(settings: Path, tiny_model_dir: Path) -> None:
    from flows.pipeline import finetune_infer_evaluate

    nothing = tuple(f"pipeline.enable_{phase}=false" for phase in ("finetuning", "inference", "evaluation"))
    state = finetune_infer_evaluate(str(settings), settings=nothing, return_state=True)
    assert state.is_completed()
    stopped = finetune_infer_evaluate(
        str(settings),
        settings=(
            "pipeline.enable_finetuning=false",
            "pipeline.stop_after_inference=true",
            f"inferencer.model={tiny_model_dir}",
        ),
    )
    assert stopped.trained is None and stopped.evaluation is None
    assert stopped.candidate is not None and stopped.baseline is None  # no fine-tuned model, no base


def test_a_phase_that_fails_fails_the_pipeline_and_keeps_what_was_done(settings: Path) -> None:
    from flows.pipeline import finetune_infer_evaluate

    Path("runs").write_text("no folder")
    with pytest.raises(StorageError, match="runs"):
        finetune_infer_evaluate(str(settings))
    assert Path("models/tuned/tuneproof_manifest.json").is_file()
    assert finetune_infer_evaluate(str(settings), return_state=True).is_failed()


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ("inferencer.testing_data_id=/nope/test.jsonl", "/nope/test.jsonl"),
        ("inferencer.question_column=nonsense", "nonsense"),
    ],
)
def test_test_data_that_cannot_be_read_is_told_before_the_training(
    settings: Path, wrong: str, told: str
) -> None:
    from flows.pipeline import finetune_infer_evaluate

    with pytest.raises(DataError, match=told):
        finetune_infer_evaluate(str(settings), settings=(wrong,))
    assert not Path("models").exists()


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the resources whose events were emitted, in order."""
    names: list[str] = []
    note_events(names, monkeypatch)
    return names


def note_events(names: list[str], patch: pytest.MonkeyPatch) -> None:
    def emit(event: str, resource: dict[str, str], payload: dict[str, str]) -> None:
        names.append(resource["prefect.resource.id"])

    patch.setattr("tasks.server.events.emit_event", emit)


def test_a_pipeline_that_stops_early_emits_at_its_end_the_event_that_others_wait_for(
    settings: Path, events: list[str]
) -> None:
    from flows.pipeline import finetune_infer_evaluate

    finetune_infer_evaluate(str(settings), phases="fine-tuning")
    assert events == ["tuneproof.pipeline.model.tuned", "tuneproof.model.tuned"]
    events.clear()
    only = ("pipeline.enable_finetuning=false", "pipeline.enable_evaluation=false")
    result = finetune_infer_evaluate(str(settings), settings=only)
    assert result.candidate is not None and result.baseline is not None
    runs = [result.candidate.run_name, result.baseline.run_name]
    assert events == [
        *(f"tuneproof.pipeline.run.{run}" for run in runs), f"tuneproof.run.{runs[0]}"
    ]  # fmt: skip


def test_an_evaluation_that_would_be_refused_is_refused_before_the_training(settings: Path) -> None:
    from flows.pipeline import finetune_infer_evaluate

    with pytest.raises(EvaluationError, match="'nonsense', which is not computed"):
        finetune_infer_evaluate(str(settings), settings=("gate.primary_metric=nonsense",))
    assert not Path("models").exists()


def test_a_run_neither_waits_for_the_ui_nor_fails_because_of_it(tmp_path: Path) -> None:
    from prefect.settings import PREFECT_API_URL, temporary_settings

    from tasks.server.telling import courier
    from tasks.ui.artifacts import show_file

    with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:9/api"}):
        began = time.monotonic()
        show_file("report", "run", tmp_path / "report.html")
        assert time.monotonic() - began < 20
        assert not courier().is_empty_within(0.5)  # it waits for the server instead
        assert courier().forget() == 1


def test_settings_given_as_text_beat_the_file_and_named_parameters_beat_both(settings: Path) -> None:
    loaded = load_settings(
        str(settings), ("inferencer.top_p=0.5", "inferencer.max_new_tokens=9"), inferencer__max_new_tokens=7
    )
    assert (loaded.inferencer.top_p, loaded.inferencer.max_new_tokens) == (0.5, 7)


def test_settings_that_are_loaded_already_can_be_overridden_too() -> None:
    base = load_config(overrides={"inferencer.seed": 5}, environ={})
    loaded = load_settings(base, ("evaluator.metrics=f1,chrf",), inferencer__model=None)
    assert (loaded.inferencer.seed, loaded.evaluator.metrics) == (5, ("f1", "chrf"))


def test_a_setting_without_section_or_value_is_refused_with_an_example() -> None:
    with pytest.raises(ConfigError, match=r"inferencer\.max_new_tokens=64"):
        load_settings(None, ("temperature",))


def http_error(status: int) -> httpx.HTTPStatusError:
    request = httpx.Request("GET", "https://example.org")
    return httpx.HTTPStatusError("no", request=request, response=httpx.Response(status, request=request))


@pytest.mark.parametrize(
    ("error", "passing"),
    [
        (http_error(503), True),
        (http_error(429), True),
        (http_error(404), False),
        (httpx.ReadTimeout("slow"), True),
        (ConnectionResetError("gone"), True),
        (OSError(errno.EIO, "disk"), True),
        (OSError(errno.ENOENT, "no such file"), False),
        (DataError("no such column"), False),
        (ValueError("bug"), False),
    ],
)
def test_the_network_and_disks_are_worth_a_retry_and_mistakes_are_not(
    error: Exception, passing: bool
) -> None:
    assert is_passing(error) is passing


def test_an_error_of_ours_is_worth_a_retry_only_when_the_network_or_a_disk_caused_it() -> None:
    def raised(cause: Exception) -> Exception:
        try:
            raise StorageError("could not write") from cause
        except StorageError as error:
            return error

    assert is_passing(raised(OSError(errno.EIO, "disk")))
    assert not is_passing(raised(OSError(errno.ENOSPC, "full")))


def test_the_hub_being_switched_off_is_not_worth_a_retry() -> None:
    from huggingface_hub.errors import OfflineModeIsEnabled

    assert not is_passing(OfflineModeIsEnabled("HF_HUB_OFFLINE=1"))
