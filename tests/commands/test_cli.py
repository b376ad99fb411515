"""The command line as a person meets it: in a process of its own, with exit codes and what is printed."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flows.cli.options import split_settings
from tasks.core.errors import ConfigError
from tests.making.prefect_api import give_database
from tests.making.warm.python import run_python

ROOT = Path(__file__).resolve().parents[2]
HEAVY = {"torch", "transformers", "datasets", "prefect", "peft", "pandas", "scipy"}


def environment(folder: Path, **more: str) -> dict[str, str]:
    """The command's environment: no settings or tokens of the machine, Prefect's files beside `folder`.

    They are shared by the tests of one session, since making Prefect's database takes seconds.
    """
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("TUNEPROOF_", "PREFECT_")) and name != "HF_TOKEN"
    }
    home = folder.parent / "prefect"
    give_database(home, home.parent)
    return {**kept, "PYTHONPATH": str(ROOT), "PREFECT_HOME": str(home), "COLUMNS": "150", **more}


def tuneproof(folder: Path, *tokens: str, **more: str) -> subprocess.CompletedProcess[str]:
    """Run a command to its end in `folder`."""
    return run_python(["-m", "flows.cli", *tokens], cwd=folder, env=environment(folder, **more))


@pytest.fixture
def folder(tmp_path: Path, tiny_model_dir: Path) -> Path:
    return make_folder(tmp_path, tiny_model_dir)


def make_folder(folder: Path, model_dir: Path) -> Path:
    """Write a config.toml for the tiny model, 12 training rows and 6 test rows."""
    rows = [{"question": f"How many legs have {n} dogs?", "answer": str(4 * n)} for n in range(18)]
    for name, part in (("train.jsonl", rows[:12]), ("test.jsonl", rows[12:])):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in part))
    (folder / "config.toml").write_text(
        f"""
        [fine_tuner]
        base_model_id = "{model_dir}"
        training_data_id = "train.jsonl"
        run_name = "tuned"
        max_sequence_length = 128
        epochs = 1

        [inferencer]
        testing_data_id = "test.jsonl"
        max_sequence_length = 128
        max_new_tokens = 8
        temperature = 0

        [evaluator]
        metrics = ["exact_match"]
        bootstrap_resamples = 100
        """
    )
    return folder


# Starting


@pytest.mark.parametrize("tokens", [("--help",), ("pipeline", "--help"), ("ask", "--help")])
def test_help_loads_none_of_the_heavy_libraries(tmp_path: Path, tokens: tuple[str, ...]) -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "flows.cli", *tokens],
        env=environment(tmp_path),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0
    assert "Usage: tuneproof" in done.stdout
    loaded = {line.rsplit("|", 1)[-1].strip().split(".")[0] for line in done.stderr.splitlines()}
    assert "cyclopts" in loaded
    assert not loaded & HEAVY


def test_help_names_every_command_and_the_settings(tmp_path: Path) -> None:
    text = tuneproof(tmp_path, "--help").stdout
    commands = (
        "demo",
        "pipeline",
        "finetune",
        "infer",
        "evaluate",
        "ask",
        "promote",
        "rollback",
        "models",
        "runs",
    )
    for word in (*commands, "--inferencer.max-new-tokens"):
        assert word in text


# A person's own mistakes


@pytest.mark.parametrize(
    ("tokens", "words"),
    [
        (["infer", "nowhere.toml"], "no configuration file nowhere.toml"),
        (["infer", "--inferencer.max-new-token", "64"], "nearest is max_new_tokens"),
        (["infer", "--inferencer.max-new-tokens", "many"], "option --inferencer.max-new-tokens"),
        (["infer", "--inferencer.max-new-tokens"], "--inferencer.max-new-tokens has no value"),
        (["infer", "--inferencer.load-in-4bit", "--inferencer.load-in-8bit"], "are both true"),
        (["infer", "--inferencer.testing-data-id", "${NOT_SET_ANYWHERE}"], "${NOT_SET_ANYWHERE}"),
        (["pipeline", "--fine-tuner.seed", "-1"], "at least 0"),
        (["infer", "--no-such-option"], "--no-such-option"),
        (["infer", "config.toml", "more.toml"], "more.toml"),
        (["invent"], "Unknown command"),
        (["--inferencer.seed", "1"], "put a command first"),
        (["ask"], "QUESTION"),
    ],
)
def test_a_mistake_is_told_on_stderr_with_exit_code_2_and_no_traceback(
    folder: Path, tokens: list[str], words: str
) -> None:
    done = tuneproof(folder, *tokens)
    assert done.returncode == 2
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert not (folder / "runs").exists()


def test_a_wrong_environment_variable_is_named(folder: Path) -> None:
    done = tuneproof(folder, "runs", TUNEPROOF_INFERENCER__TOP_P="2")
    assert done.returncode == 2
    assert "environment variable TUNEPROOF_INFERENCER__TOP_P" in done.stderr


def test_a_warning_about_a_setting_is_one_plain_line(folder: Path) -> None:
    config = folder / "config.toml"
    config.write_text(config.read_text().replace("epochs = 1", "epochs = 1,\nuse_flash_attention = true"))
    done = tuneproof(folder, "runs")
    assert done.returncode == 0
    assert [line.split(":")[0] for line in done.stderr.splitlines()] == ["warning", "warning"]
    assert "line 7: the comma" in done.stderr


def test_an_unreachable_prefect_server_is_explained(folder: Path, tiny_model_dir: Path) -> None:
    done = tuneproof(
        folder, "infer", "--inferencer.model", str(tiny_model_dir), PREFECT_API_URL="http://127.0.0.1:9/api"
    )
    assert done.returncode == 1
    assert "PREFECT_API_URL" in done.stderr
    assert "Traceback" not in done.stderr


# The token


def test_the_hub_key_reaches_the_environment_and_no_output(folder: Path) -> None:
    key = "hf_" + "k" * 34
    code = (
        "import os, sys; from flows.cli.commands import main; key = sys.argv[3]; "
        "print('code', main(sys.argv[1:])); print('set' if os.environ['HF_TOKEN'] == key else 'not set')"
    )
    tokens = ["infer", "--hf-key", key, "--dry-run", "--inferencer.model", "nowhere"]
    done = run_python(["-c", code, *tokens], cwd=folder, env=environment(folder, HF_TOKEN="before"))
    assert done.stdout.endswith("code 2\nset\n")
    assert "nowhere" in done.stderr
    assert key not in done.stdout + done.stderr


# Settings on the command line


def test_settings_are_parted_from_what_belongs_to_the_command() -> None:
    settings = ["--inferencer.top-k", "5", "--fine-tuner.run_name=x=y", "--evaluator.seed="]
    assert split_settings(["infer", "a.toml", *settings, "--dry-run"]) == (
        {"inferencer.top-k": "5", "fine-tuner.run_name": "x=y", "evaluator.seed": ""},
        ["infer", "a.toml", "--dry-run"],
    )


def test_a_switch_may_stand_alone_and_does_not_swallow_the_path() -> None:
    tokens = [
        "--inferencer.load-in-4bit",
        "a.toml",
        "--inferencer.do-sample",
        "false",
        "--fine-tuner.packing",
    ]
    assert split_settings(tokens) == (
        {"inferencer.load-in-4bit": "true", "inferencer.do-sample": "false", "fine-tuner.packing": "true"},
        ["a.toml"],
    )


def test_a_negative_number_is_a_value_and_a_following_option_is_not() -> None:
    assert split_settings(["--inferencer.length-penalty", "-1"]) == ({"inferencer.length-penalty": "-1"}, [])
    with pytest.raises(ConfigError, match=r"--inferencer\.top-k has no value"):
        split_settings(["--inferencer.top-k", "--dry-run"])


@given(st.dictionaries(st.from_regex(r"[a-z]{1,8}\.[a-z-]{1,8}", fullmatch=True), st.text(max_size=20)))
def test_every_setting_with_an_equals_sign_comes_through_unchanged(settings: dict[str, str]) -> None:
    tokens = [f"--{name}={value}" for name, value in settings.items()]
    assert split_settings(tokens) == (settings, [])


# Dry run and lists


def test_a_dry_run_tells_the_plan_and_writes_nothing(folder: Path) -> None:
    before = sorted(folder.iterdir())
    done = tuneproof(folder, "pipeline", "--dry-run", "--skip-evaluation")
    assert done.returncode == 0, done.stderr
    for words in (
        "training rows: 12",
        "updates: 2",
        "models/tuned",
        "test rows: 6",
        "greedy, up to 8 tokens",
    ):
        assert words in done.stdout
    assert "evaluation" not in done.stdout
    assert sorted(folder.iterdir()) == before


def test_a_dry_run_lists_all_that_stands_in_the_way(folder: Path) -> None:
    done = tuneproof(
        folder,
        "pipeline",
        "--dry-run",
        "--fine-tuner.base-model-id=./nowhere",
        "--fine-tuner.optimizer=adamw_anyprecision",
        "--inferencer.question-column=quesion",
        "--gate.primary-metric=nonsense",
    )
    assert done.returncode == 2
    for words in ("4 things stand", "nowhere", "torchdistx", "'quesion'", "'nonsense'", "training rows: 12"):
        assert words in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


def test_a_dry_run_of_the_demo_works_from_any_folder(tmp_path: Path) -> None:
    done = tuneproof(
        tmp_path, "demo", "--dry-run", "--skip-finetuning", "--skip-inference", "--skip-evaluation"
    )
    assert (done.returncode, done.stdout) == (0, "Nothing was run: --dry-run.\n")


def test_models_and_runs_say_how_to_get_the_first_one(tmp_path: Path) -> None:
    assert "`tuneproof finetune` makes one" in tuneproof(tmp_path, "models").stdout
    assert "`tuneproof infer` makes one" in tuneproof(tmp_path, "runs").stdout


@pytest.mark.parametrize("tokens", [("ask", " "), ("ask", "How many?", "--dry-run")])
def test_ask_refuses_what_it_cannot_do(folder: Path, tokens: tuple[str, ...]) -> None:
    done = tuneproof(folder, *tokens)
    assert done.returncode != 0 and "Traceback" not in done.stderr
    assert "the question is empty" in done.stderr or "--dry-run" in done.stdout + done.stderr


def test_ask_prints_an_answer(folder: Path, tiny_model_dir: Path) -> None:
    done = tuneproof(folder, "ask", "How many legs?", "--inferencer.model", str(tiny_model_dir))
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.strip()) > 0


# Whole commands, with the flows on Prefect's local server


@pytest.mark.server
def test_infer_then_evaluate_print_files_and_scores_and_the_second_infer_generates_nothing(
    folder: Path, tiny_model_dir: Path, prefect_server: str
) -> None:
    model = ("--inferencer.model", str(tiny_model_dir))
    first = tuneproof(folder, "infer", *model, PREFECT_API_URL=prefect_server)
    assert first.returncode == 0, first.stderr
    assert "inferencer_output.jsonl (6 rows)" in first.stdout
    predictions = next((folder / "runs").glob("*/inferencer_output.jsonl"))
    content = predictions.read_bytes()

    second = tuneproof(folder, "infer", *model, PREFECT_API_URL=prefect_server)
    assert second.returncode == 0
    assert "nothing to generate" in second.stderr
    assert predictions.read_bytes() == content

    other = tuneproof(
        folder, "infer", *model, "--inferencer.max-new-tokens", "9", PREFECT_API_URL=prefect_server
    )
    assert other.returncode == 2
    assert "max_new_tokens: 8 -> 9" in other.stderr
    assert "Traceback" not in other.stderr
    assert predictions.read_bytes() == content

    scored = tuneproof(folder, "evaluate", PREFECT_API_URL=prefect_server)
    assert scored.returncode == 0, scored.stderr
    assert "exact_match" in scored.stdout
    report = scored.stdout.rsplit("report: ", 1)[-1].strip()
    assert Path(report).read_text().lstrip().startswith("<!")
    assert "exact_match" in tuneproof(folder, "runs").stdout


@pytest.mark.server
def test_the_pipeline_ends_with_scores_before_and_after(folder: Path) -> None:
    done = tuneproof(folder, "pipeline")
    assert done.returncode == 0, done.stderr
    for words in ("model: models/tuned", "before", "after", "report: "):
        assert words in done.stdout
    assert "Traceback" not in done.stderr
    listed = tuneproof(folder, "models").stdout
    assert "tuned" in listed
    assert "complete" in listed


@pytest.mark.server
def test_a_phase_that_fails_ends_the_command_with_its_exit_code(folder: Path, prefect_server: str) -> None:
    (folder / "train.jsonl").write_text('{"question": "torn')
    done = tuneproof(folder, "pipeline", PREFECT_API_URL=prefect_server)
    assert done.returncode == 2
    assert "train.jsonl" in done.stderr
    assert "Traceback" not in done.stderr


# What names nothing


NOTHING = (
    (["evaluate", "--run", "nope"], "there is no run 'nope'"),
    (["evaluate", "--dry-run", "--run", "nope"], "there is no run 'nope'"),
    (["evaluate", "--dry-run", "--baseline", "nope"], "no finished run"),
    (["evaluate", "--gate.primary-metric", "nope"], "'nope'"),
    (["infer", "--inferencer.model", "nope"], "no usable model 'nope'"),
    (["infer", "--inferencer.model", "x" * 4000], "no usable model"),
    (["infer", "--inferencer.testing-data-id", "nope.jsonl"], "no file nope.jsonl"),
    (["infer", "--inferencer.testing-data-id", "x" * 4000], "neither a file or folder here"),
    (["infer", "--pipeline.runs-dir", "config.toml/runs"], "config.toml"),
    (["finetune", "--fine-tuner.training-data-id", "nope.jsonl"], "no file nope.jsonl"),
    (["finetune", "--fine-tuner.base-model-id", "x" * 4000], "no file or directory"),
    (["pipeline", "--inferencer.testing-data-id", "nope.jsonl"], "no file nope.jsonl"),
    (["pipeline", "--inferencer.run-name-prefix", "p" * 95], "is not allowed"),
    (["compare", "nope", "x" * 4000], "there is no run 'nope'"),
    (["promote", "x" * 4000], "next:"),
    (["report", "x" * 4000], "there is no run"),
)

# A new interpreter with nothing loaded but the command line becomes, by fork, each of the commands.
COMMANDS = """
import json, os, sys
from flows.cli.commands import main
for number, tokens in enumerate(json.loads(sys.argv[1])):
    if not os.fork():
        with open(f"{number}.out", "wb") as out, open(f"{number}.err", "wb") as err:
            os.dup2(out.fileno(), 1), os.dup2(err.fileno(), 2)
        code = main(tokens)
        sys.stdout.flush(), sys.stderr.flush()
        with open(f"{number}.json", "w") as end:
            json.dump({"code": code, "loaded": sorted({name.split(".")[0] for name in sys.modules})}, end)
        os._exit(0)
    os.wait()
"""


@pytest.fixture(scope="module")
def nothing_named(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> Path:
    """A folder with what each of the commands printed, its code and what it had loaded."""
    folder = make_folder(tmp_path_factory.mktemp("nothing"), tiny_model_dir)
    commands = json.dumps([tokens for tokens, _ in NOTHING])
    subprocess.run(
        [sys.executable, "-c", COMMANDS, commands], cwd=folder, env=environment(folder), check=True
    )
    return folder


@pytest.mark.parametrize("number", range(len(NOTHING)), ids=["-".join(tokens)[:40] for tokens, _ in NOTHING])
def test_what_names_nothing_is_refused_before_prefect_is_imported(nothing_named: Path, number: int) -> None:
    tokens, words = NOTHING[number]
    end = json.loads((nothing_named / f"{number}.json").read_text())
    told = (nothing_named / f"{number}.err").read_text()
    assert end["code"] in (1, 2)
    assert words in told and "Traceback" not in told and len(told) < 3000
    assert "cyclopts" in end["loaded"]
    assert not set(end["loaded"]) & ({"prefect"} if "--dry-run" in tokens else HEAVY)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
@pytest.mark.parametrize("command", ["infer", "finetune", "pipeline"])
def test_a_folder_that_cannot_be_written_is_told_before_the_work(
    folder: Path, tiny_model_dir: Path, command: str
) -> None:
    (folder / "locked").mkdir(mode=0o500)
    places = ["--pipeline.runs-dir", "locked/runs", "--pipeline.models-dir", "locked/models"]
    done = tuneproof(folder, command, *places, "--inferencer.model", str(tiny_model_dir))
    assert done.returncode == 1
    assert "cannot be written" in done.stderr and "Traceback" not in done.stderr


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines()


def test_the_module_and_the_installed_command_are_the_same(tmp_path: Path) -> None:
    installed = shutil.which("tuneproof", path=str(Path(sys.executable).parent))
    if installed is None:
        pytest.skip("the project is not installed in this environment")
    done = subprocess.run(
        [installed, "--help"], env=environment(tmp_path), capture_output=True, text=True, check=True
    )
    assert done.stdout == tuneproof(tmp_path, "--help").stdout


@pytest.mark.server
def test_a_run_of_nothing_but_errors_is_published_and_ends_with_exit_code_2(
    folder: Path, model_copy: Path, prefect_server: str
) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(model_copy / "model.safetensors")
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, model_copy / "model.safetensors", metadata={"format": "pt"})
    chosen = (f"--inferencer.model={model_copy}", "--inferencer.run-name=run")
    done = tuneproof(folder, "infer", *chosen, PREFECT_API_URL=prefect_server)
    assert done.returncode == 2
    assert "all 6 rows of run ended in an error: the model's logits are NaN at new token 1" in done.stderr
    assert "model.norm.weight" in done.stderr and "Traceback" not in done.stderr
    rows = [
        json.loads(line) for line in (folder / "runs/run/inferencer_output.jsonl").read_text().splitlines()
    ]
    assert len(rows) == 6 and all("NaN" in row["error"] and not row["predicted_answer"] for row in rows)
    asked = tuneproof(folder, "ask", "How many legs has a dog?", *chosen)
    assert asked.returncode == 2 and not asked.stdout.strip()
    assert "there is no answer: the model's logits are NaN at new token 1" in asked.stderr
