"""Settings: what loads, what is refused, and what the message says; always through the real loader."""

import logging
import os
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.core.config import (
    Config,
    EvaluatorConfig,
    FineTunerConfig,
    InferencerConfig,
    as_config,
    load_config,
)
from tasks.core.config.catalogues import DEFAULT_METRICS
from tasks.core.config.sections import (
    SECTIONS,
    OptimizerName,
    ReportTarget,
    RunNaming,
    SchedulerName,
)
from tasks.core.errors import ConfigError

ORIGINAL = Path(__file__).parent / "original_config.toml"

Load = Callable[..., Config]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    """Write a file, load it; nothing of the real environment gets in."""

    def write_and_load(text: str, overrides: dict[str, object] | None = None, **environ: str) -> Config:
        path = tmp_path / "config.toml"
        path.write_text(text, encoding="utf-8")
        return load_config(path, overrides, environ)

    return write_and_load


def message_of(load: Load, text: str, overrides: dict[str, object] | None = None, **environ: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(text, overrides, **environ)
    assert caught.value.exit_code == 2
    return str(caught.value)


# What loads


def test_every_key_has_a_default_and_a_description() -> None:
    Config()
    for section in SECTIONS.values():
        for key, field in section.model_fields.items():
            assert not field.is_required(), key
            assert field.description and field.description.endswith("."), key


def test_the_original_configuration_file_loads_and_keeps_its_values() -> None:
    config = load_config(ORIGINAL, environ={})
    assert config.fine_tuner.base_model_id == "unsloth/gemma-3-4b-it"
    assert config.fine_tuner.question_part == "<start_of_turn>user\n"
    assert config.fine_tuner.answer_part == "<start_of_turn>model\n"
    assert config.fine_tuner.optimizer == "paged_adamw_8bit"
    assert config.fine_tuner.dtype is None
    assert config.fine_tuner.target_modules[-1] == "down_proj"
    assert config.inferencer.hf_user_id == "acme"
    assert config.evaluator.cost_per_million_output_tokens == 0.60


def test_meaningless_keys_of_the_original_warn_by_name(caplog: pytest.LogCaptureFixture) -> None:
    load_config(ORIGINAL, environ={})
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    for word in (
        "use_flash_attention",
        "wandb_project_name",
        "[mlflow]",
        '"unsloth"',
        "is_multimodel",
        "hf_user_id",
    ):
        assert sum(word in warning for warning in warnings) == 1, word


def test_a_trailing_comma_is_read_with_a_warning_that_names_the_line(
    load: Load, caplog: pytest.LogCaptureFixture
) -> None:
    config = load('[fine_tuner]\nrank = 8,  # eight\nquestion_part = "a,b",\nanswer_part = "c"\n')
    assert (config.fine_tuner.rank, config.fine_tuner.question_part) == (8, "a,b")
    assert [record.getMessage().split(":")[0].split(", ")[-1] for record in caplog.records] == [
        "line 2",
        "line 3",
    ]


@pytest.mark.parametrize(
    ("overrides", "environ"),
    [
        ({"inferencer.chat-template-kwargs.enable_thinking": "false"}, {}),
        ({"inferencer.chat-template-kwargs": '{"enable_thinking": false}'}, {}),
        ({"inferencer.chat-template-kwargs": "{ enable_thinking = false }"}, {}),
        ({"inferencer": {"chat_template_kwargs": {"enable_thinking": False}}}, {}),
        ({}, {"TUNEPROOF_INFERENCER__CHAT_TEMPLATE_KWARGS__ENABLE_THINKING": "false"}),
    ],
)
def test_a_table_can_be_set_whole_or_entry_by_entry(
    load: Load, overrides: dict[str, object], environ: dict[str, str]
) -> None:
    loaded = load('[inferencer]\nrun_name = "a"\n', overrides, **environ)
    assert loaded.inferencer.chat_template_kwargs == {"enable_thinking": False}


def test_an_entry_is_added_to_the_table_of_the_file_and_kept_as_text_where_it_is_one(load: Load) -> None:
    text = "[inferencer]\nchat_template_kwargs = { enable_thinking = true, effort = 3 }\n"
    added = {
        "inferencer.chat_template_kwargs.enable_thinking": "false",
        "inferencer.chat_template_kwargs.tone": "dry",
    }
    wanted = {"enable_thinking": False, "effort": 3, "tone": "dry"}
    assert load(text, added).inferencer.chat_template_kwargs == wanted
    message = message_of(load, text, {"inferencer.seed.more": "1"})
    assert "[inferencer] seed is one value, not a table with an entry more" in message


def test_a_chat_template_is_text_or_a_file_with_it(load: Load, tmp_path: Path) -> None:
    path = tmp_path / "own.jinja"
    path.write_text("{{ messages[0].content }}\n", encoding="utf-8")
    for setting in (str(path), "{{ messages[0].content }}\n"):
        assert (
            load("", {"fine_tuner": {"chat_template": setting}}).fine_tuner.chat_template == path.read_text()
        )
    message = message_of(load, "", {"fine_tuner.chat_template": "missing.jinja"})
    assert "must be Jinja text, or the path of a file with it" in message
    path.write_text("no template", encoding="utf-8")
    assert "must be a file with a Jinja template" in message_of(
        load, "", {"fine_tuner.chat_template": str(path)}
    )


def test_null_means_none_also_in_lists(load: Load) -> None:
    config = load('[inferencer]\nmin_p = "null"\n[fine_tuner]\nrun_name = "null"\n')
    assert config.inferencer.min_p is None
    assert config.fine_tuner.run_name is None
    # As text it would be a fine stop string; as None it is not.
    assert "a list of texts" in message_of(load, '[inferencer]\nstop_strings = ["null"]\n')
    assert InferencerConfig.model_validate({"top_k": "null"}).top_k is None


def test_environment_beats_file_and_command_line_beats_environment(load: Load) -> None:
    text = "[inferencer]\nmax_new_tokens = 1\nmin_new_tokens = 1\nseed = 1\n"
    config = load(
        text,
        {"inferencer.seed": "3"},
        TUNEPROOF_INFERENCER__MIN_NEW_TOKENS="0",
        TUNEPROOF_INFERENCER__MAX_NEW_TOKENS="2",
        TUNEPROOF_INFERENCER__SEED="2",
    )
    assert (config.inferencer.min_new_tokens, config.inferencer.max_new_tokens, config.inferencer.seed) == (
        0,
        2,
        3,
    )


def test_without_a_path_the_file_of_the_current_folder_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert as_config(None) == Config()
    (tmp_path / "config.toml").write_text("[fine_tuner]\nrank = 3\n")
    assert as_config(None).fine_tuner.rank == 3
    (tmp_path / "other.toml").write_text("[fine_tuner]\nrank = 4\n")
    assert as_config("other.toml").fine_tuner.rank == 4
    assert as_config(as_config(tmp_path / "other.toml")).fine_tuner.rank == 4


def test_text_from_shell_or_environment_becomes_lists_tables_and_null(load: Load) -> None:
    overrides = {
        "fine-tuner.target-modules": "q_proj, v_proj",
        "evaluator.metrics": "f1",
        "inferencer.stop-strings": '["a,b", "\\n"]',
        "fine_tuner.loftq_config": "{ loftq_bits = 4 }",
        "inferencer.min-p": "null",
        "inferencer": {"top_k": 5},
    }
    config = load("", overrides, TUNEPROOF_FINE_TUNER__PACKING="true")
    assert config.fine_tuner.target_modules == ("q_proj", "v_proj")
    assert config.fine_tuner.loftq_config == {"loftq_bits": 4}
    assert config.fine_tuner.packing is True
    assert config.evaluator.metrics == ("f1",)
    assert config.inferencer.stop_strings == ("a,b", "\n")
    assert (config.inferencer.min_p, config.inferencer.top_k) == (None, 5)
    assert load("", {"fine_tuner.target_modules": "all-linear"}).fine_tuner.target_modules == "all-linear"


def test_other_tuneproof_variables_are_not_settings(load: Load) -> None:
    assert load("", TUNEPROOF_CACHE="/x", TUNEPROOF_SHARED_DATA="/y") == Config()


def test_variables_are_put_in_anywhere_in_a_value_also_several(load: Load) -> None:
    text = '[inferencer]\ntesting_data_id = "${HOST}/rows-${PART}.jsonl"\nstop_strings = ["${END}"]\nseed = "${S}"\n'
    config = load(text, HOST="acme", PART="7", END="###", S="9")
    assert config.inferencer.testing_data_id == "acme/rows-7.jsonl"
    assert config.inferencer.stop_strings == ("###",)
    assert config.inferencer.seed == 9


def test_a_doubled_dollar_keeps_the_braces_as_text(load: Load) -> None:
    text = '[inferencer]\nsystem_prompt_override_text = "Fill $${NAME} in for 5 $"\n'
    assert load(text).inferencer.system_prompt_override_text == "Fill ${NAME} in for 5 $"


def test_a_file_with_byte_order_mark_and_windows_lines_loads(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_bytes(b'\xef\xbb\xbf[fine_tuner]\r\nquestion_part = "q",\r\nanswer_part = "a"\r\nrank = 5\r\n')
    assert load_config(path, environ={}).fine_tuner.rank == 5


@given(
    rank=st.integers(1, 512),
    dropout=st.floats(0, 0.99),
    name=st.from_regex(r"[a-z][a-z0-9_-]{0,30}", fullmatch=True),
)
def test_what_the_models_dump_validates_to_the_same_config(rank: int, dropout: float, name: str) -> None:
    config = Config(fine_tuner=FineTunerConfig(rank=rank, lora_dropout=dropout, run_name=name))
    assert Config.model_validate(config.model_dump(mode="json")) == config
    assert Config.model_validate_json(config.model_dump_json()) == config


def test_prefix_and_suffix_frame_the_run_name() -> None:
    assert FineTunerConfig(run_name_prefix="a-", run_name_suffix="-z").full_run_name("auto") == "a-auto-z"
    assert FineTunerConfig(run_name="x", run_name_suffix="-z").full_run_name("auto") == "x-z"
    assert FineTunerConfig(run_name="").full_run_name("auto") == "auto"


@pytest.mark.parametrize(
    ("temperature", "do_sample", "samples"),
    [(0.7, None, True), (0, None, False), (0.7, False, False), (0, True, False), (0.7, True, True)],
)
def test_sampling_needs_temperature_and_no_veto(
    temperature: float, do_sample: bool | None, samples: bool
) -> None:
    assert InferencerConfig(temperature=temperature, do_sample=do_sample).samples is samples


# What is refused


def test_an_unknown_key_is_reported_with_file_line_section_value_and_nearest_key(load: Load) -> None:
    message = message_of(load, "[inferencer]\nseed = 1\nmax_new_token = 64\n")
    for word in ("config.toml, line 3", "[inferencer]", "max_new_token = 64", "nearest is max_new_tokens"):
        assert word in message


def test_an_unknown_section_names_the_nearest_one(load: Load) -> None:
    assert "no section [infrencer]; the nearest is [inferencer]" in message_of(
        load, "[infrencer]\nseed = 1\n"
    )
    assert "[fine_tuner]" in message_of(load, "[training]\nlayers = 1\n")


def test_a_key_of_another_section_says_where_it_belongs(load: Load) -> None:
    assert "it belongs to [evaluator]" in message_of(load, '[inferencer]\nmetrics = ["f1"]\n')
    assert "it belongs to [fine_tuner]" in message_of(load, "rank = 16\n")
    assert "write [fine_tuner]" in message_of(load, "fine_tuner = 16\n")


@pytest.mark.parametrize(
    ("line", "allowed"),
    [
        ('rank = "sixteen"', "a whole number, at least 1"),
        ("rank = 16.5", "a whole number"),
        ("rank = true", "a whole number"),
        ("rank = 0", "at least 1"),
        ("rank = nan", "a whole number"),
        ("load_in_4bit = 3", "true or false"),
        ('load_in_4bit = "maybe"', "true or false"),
        ("lora_dropout = 1.0", "at least 0, below 1"),
        ("learning_rate = inf", "above 0, at most 1"),
        ("seed = -1", "at least 0"),
        ("base_model_id = 3", "text"),
        ('base_model_id = ""', "not empty"),
        ('base_model_id = "null"', "text"),
        ('lr_scheduler_type = "linaer"', 'you may mean "linear"'),
        ('optimizer = "adamw_trch"', 'you may mean "adamw_torch"'),
        ('device = "gpu"', "cuda"),
        ("target_modules = 3", 'a list of texts, or "all-linear"'),
        ("target_modules = []", "target_modules is empty"),
        ("loftq_config = { bits = 4 }", "a table with loftq_bits and loftq_iter"),
        ('run_name = "../elsewhere"', "usable as a folder name"),
        ('run_name_suffix = "/x"', "usable as a folder name"),
    ],
)
def test_a_wrong_value_is_reported_with_its_line_and_what_is_allowed(
    load: Load, line: str, allowed: str
) -> None:
    message = message_of(load, f"[fine_tuner]\n{line}\n")
    assert "config.toml, line 2" in message
    assert "[fine_tuner]" in message
    assert line.split(" = ")[0] in message
    assert allowed in message


def test_use_cache_of_the_original_pipeline_is_ignored_with_a_warning(
    load: Load, caplog: pytest.LogCaptureFixture
) -> None:
    load("[inferencer]\nuse_cache = false\n")
    assert "[inferencer] use_cache is ignored" in caplog.text


def test_an_engine_that_is_none_is_told_how_one_of_ones_own_is_named(load: Load) -> None:
    message = message_of(load, '[inferencer]\nengine = "foo"\n')
    assert 'must be "auto", "inflight"' in message and ", or module:Class (an engine of your own)" in message


def test_a_wrong_item_of_a_list_names_what_was_meant(load: Load) -> None:
    assert '"blue_score" you may mean "bleu_score"' in message_of(
        load, '[evaluator]\nmetrics = ["f1", "blue_score"]'
    )


def test_several_problems_are_all_in_one_message(load: Load) -> None:
    message = message_of(
        load,
        '[inferencer]\nwhatever = 1\nmax_new_tokens = "many"\n[fine_tuner]\nbase_model_id = "${NOWHERE}"\n',
        {"evaluator.confidence": "2"},
        TUNEPROOF_PIPELINE__RUN_DIR="x",
    )
    assert message.startswith("5 settings are wrong")
    for word in (
        "whatever",
        "max_new_tokens",
        "${NOWHERE}",
        "--evaluator.confidence",
        "TUNEPROOF_PIPELINE__RUN_DIR",
    ):
        assert word in message


def test_four_and_eight_bits_together_are_refused_naming_both_lines(load: Load) -> None:
    message = message_of(load, "[fine_tuner]\nload_in_4bit = true\n\nload_in_8bit = true\n")
    for word in ("load_in_4bit and load_in_8bit are both true", "line 2", "line 4", "[fine_tuner]"):
        assert word in message


def test_conflicts_are_listed_beside_wrong_values_unless_these_cause_them(load: Load) -> None:
    message = message_of(
        load,
        "[fine_tuner]\nload_in_4bit = true\nload_in_8bit = true\nrank = 0\n"
        '[inferencer]\nmax_new_tokens = "few"\nmax_sequence_length = 300\n[evaluator]\nmetrics = ["preference"]\n',
    )
    assert message.startswith("4 settings are wrong")
    for words in ("are both true", "rank = 0", 'max_new_tokens = "few"', "llm is not set"):
        assert message.count(words) == 1


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[fine_tuner]\nfull_finetuning = true\nload_in_4bit = true\n", "full_finetuning cannot train"),
        ("[fine_tuner]\nload_in_8bit = true\nloftq_config = { loftq_bits = 4 }\n", "unquantised"),
        ('[fine_tuner]\nquestion_part = "q"\n', "question_part and answer_part go together"),
        (
            "[inferencer]\nmin_new_tokens = 9\nmax_new_tokens = 8\n",
            "min_new_tokens = 9 is above max_new_tokens = 8",
        ),
        ("[inferencer]\nmax_new_tokens = 4096\n", "leaves no room for a prompt"),
        ("[evaluator]\nmetrics = []\n", "at least one of exact_match"),
        ('[evaluator]\nmetrics = ["answer_accuracy"]\n', "set llm to the name of a model"),
        ("[evaluator]\njudge_budget_dollars = 1\n", "needs cost_per_million_input_tokens"),
        ('[evaluator]\njudge_base_url = "https://me:word@host/v1"\n', "without a password"),
        (
            '[evaluator]\njudge_base_url = "https://host/v1?api-key=word"\n',
            "(a key belongs where judge_api_key says)",
        ),
        (
            '[evaluator]\nembedding_base_url = "https://host/v1#word"\n',
            "(a key belongs where judge_api_key says)",
        ),
    ],
)
def test_settings_that_do_not_fit_each_other_are_refused(load: Load, text: str, words: str) -> None:
    assert words in message_of(load, text)


@pytest.mark.parametrize(
    "address", ["https://me:hush@host/v1", "https://host/v1?api-key=hush", "http://h/#hush"]
)
def test_what_an_address_carries_is_not_shown_in_the_message_about_it(load: Load, address: str) -> None:
    message = message_of(load, f'[evaluator]\njudge_base_url = "{address}"\n')
    assert "hush" not in message and "judge_base_url" in message


def test_an_unset_variable_is_named(load: Load) -> None:
    message = message_of(load, '[fine_tuner]\nbase_model_id = "${ORG}/x-${SIZE}"\n', ORG="acme")
    assert "${SIZE}: no such environment variable" in message
    assert "uses ${ORG}" not in message


def test_a_problem_from_environment_or_command_line_names_the_variable_or_option(load: Load) -> None:
    message = message_of(load, "", {"inferencer.top-k": "0"}, TUNEPROOF_INFERENCER__TOP_P="2")
    assert "option --inferencer.top-k: [inferencer] top_k" in message
    assert "environment variable TUNEPROOF_INFERENCER__TOP_P: [inferencer] top_p" in message


@pytest.mark.parametrize(
    ("line", "variable"),
    [
        ('hf_key = "abc"', "HF_TOKEN"),
        ('openai_api_key = "abc"', "OPENAI_API_KEY"),
        ('base_model_id = "hf_abcDEFghiJKLmno"', "HF_TOKEN"),
        ('system_prompt_override_text = "use sk-abcdefghijklmnopqrstuvwxyz"', "OPENAI_API_KEY"),
        ('target_modules = ["hf_abcdefghijklmnopqrstuvwxyz"]', "HF_TOKEN"),
        ('base_model_id = "${SECRET}"', "HF_TOKEN"),
    ],
)
def test_a_secret_in_the_settings_is_refused_without_showing_it(load: Load, line: str, variable: str) -> None:
    message = message_of(load, f"[fine_tuner]\n{line}\n", SECRET="hf_abcdefghijklmnopqrstuvwxyz")
    assert variable in message
    assert "abc" not in message.lower().replace("hf_token", "")


def test_a_misspelled_key_that_ends_like_a_secret_still_gets_its_nearest_key(load: Load) -> None:
    assert "max_new_tokens" in message_of(load, "[inferencer]\nmax_new_token = 1\n")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[fine_tuner]\nrank = \n", "line 2, column"),
        ("[fine_tuner\nrank = 1\n", "line 1, column"),
        ('[fine_tuner]\nrun_name = "x\n', "line 2, column"),
        ("[fine_tuner]\nrank = 1\nrank = 2\n", "line 3, column"),
        ("[fine_tuner]\ntarget_modules = [\n", "not valid TOML"),
        ("[fine_tuner]\nrank = 1,,\n", "line 2, column"),
    ],
)
def test_a_syntax_error_is_reported_with_line_and_column(load: Load, text: str, words: str) -> None:
    with pytest.raises(tomllib.TOMLDecodeError):
        tomllib.loads(text)
    assert words in message_of(load, text)


def test_a_missing_file_names_the_files_that_are_there(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").touch()
    with pytest.raises(ConfigError, match=r"mine\.toml"):
        load_config(tmp_path / "my.toml")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path)
    (tmp_path / "mine.toml").write_bytes(b'run_name = "caf\xe9"')
    with pytest.raises(ConfigError, match="not UTF-8"):
        load_config(tmp_path / "mine.toml")


def test_missing_data_is_refused_where_it_is_needed() -> None:
    with pytest.raises(ConfigError, match=r"\[inferencer\] testing_data_id is not set"):
        _ = InferencerConfig().required_testing_data_id
    with pytest.raises(ConfigError, match=r"--fine-tuner\.training-data-id"):
        _ = FineTunerConfig().required_training_data_id
    assert InferencerConfig(testing_data_id="x").required_testing_data_id == "x"


def test_the_originals_judged_metrics_are_kept_and_a_missing_key_is_told_early(
    caplog: pytest.LogCaptureFixture,
) -> None:
    evaluator = load_config(ORIGINAL, environ={}).evaluator
    assert evaluator.metrics == ("bleu_score", "rouge_score", "factual_correctness")
    assert evaluator.judged_metrics == ("factual_correctness",)
    assert "score factual_correctness need a key, and OPENAI_API_KEY is not set" in caplog.text
    caplog.clear()
    load_config(ORIGINAL, environ={"OPENAI_API_KEY": "anything"})
    assert "need a key" not in caplog.text


@pytest.mark.parametrize("place", ["${OTHER_KEY}", "secret:my-judge"])
def test_the_key_of_the_judge_is_named_by_its_place_and_not_read(load: Load, place: str) -> None:
    config = load(f'[evaluator]\njudge_api_key = "{place}"\n', OTHER_KEY="geheim-1234")
    assert config.evaluator.judge_api_key == place
    assert "geheim" not in config.model_dump_json()


@pytest.mark.parametrize("key", ["judge_api_key", "openai_api_key", "api_key"])
@pytest.mark.parametrize("value", ["geheim-1234", "sk-geheim1234567890abcdef", "x${HOME}geheim"])
def test_a_key_in_the_place_of_its_place_is_refused_without_being_shown(
    load: Load, key: str, value: str
) -> None:
    assert "geheim" not in message_of(load, f'[evaluator]\n{key} = "{value}"\n', HOME="h")
    assert "geheim" not in message_of(load, "", {f"evaluator.{key}": value}, HOME="h")
    with pytest.raises(ValueError) as caught:
        EvaluatorConfig.model_validate({key: value})
    assert "geheim" not in str(caught.value)


def test_every_metric_of_the_catalogue_can_be_named_and_the_default_ones_ask_no_model() -> None:
    from tasks.core.metrics.catalogue import available

    names = tuple(family.name for family in available())
    assert EvaluatorConfig(metrics=names, llm="judge").metrics == names
    assert not [family.name for family in available() if family.models and family.name in DEFAULT_METRICS]


def test_a_run_name_that_the_settings_accept_is_one_that_the_registry_accepts() -> None:
    from tasks.core.models.trained.registry import check_run_name

    for name in ("a", "A.b_c-9", "9" * 100):
        assert check_run_name(RunNaming(run_name=name).full_run_name("x")) == name


def test_metrics_are_kept_once_each_in_order() -> None:
    assert EvaluatorConfig(metrics=("f1", "chrf", "f1")).metrics == ("f1", "chrf")


# What the settings rely on


def test_optimizers_schedules_and_trackers_are_names_that_transformers_knows() -> None:
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
    from transformers.trainer_utils import SchedulerType
    from transformers.training_args import OptimizerNames

    assert set(get_args(OptimizerName)) <= {name.value for name in OptimizerNames}
    assert set(get_args(SchedulerName)) <= {name.value for name in SchedulerType}
    assert set(get_args(ReportTarget)) - {"none", "all"} <= set(INTEGRATION_TO_CALLBACK)


@pytest.mark.parametrize("name", ["configuration", "metrics"])
def test_the_reference_pages_are_what_the_code_says(name: str) -> None:
    root = Path(__file__).parents[2]
    written = (root / "docs" / f"{name}.md").read_text(encoding="utf-8")
    code = f"import generate_{name} as page; print(page.render(), end='')"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(root), str(root / "docs")])},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == written, f"stale: run `python docs/generate_{name}.py`"


def test_the_settings_load_neither_torch_nor_prefect() -> None:
    code = "import sys, tasks.core.config; print([m for m in ('torch', 'prefect', 'transformers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# Data and columns


def test_data_may_be_one_name_or_a_list(load: Load) -> None:
    text = '[fine_tuner]\ntraining_data_id = ["a.jsonl", "b/*.jsonl"]\n[inferencer]\ntesting_data_id = "c.jsonl"\n'
    config = load(text)
    assert config.fine_tuner.required_training_data_id == ("a.jsonl", "b/*.jsonl")
    assert config.inferencer.required_testing_data_id == "c.jsonl"
    assert "testing_data_id = []" in message_of(load, "[inferencer]\ntesting_data_id = []\n")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a, b.jsonl", "a, b.jsonl"),
        ('["a.jsonl", "b.jsonl"]', ("a.jsonl", "b.jsonl")),
        ("[ab].jsonl", "[ab].jsonl"),
    ],
)
def test_a_name_with_a_comma_or_bracket_stays_one_name(load: Load, text: str, expected: object) -> None:
    assert load("", {"inferencer.testing_data_id": text}).inferencer.testing_data_id == expected


def test_a_template_is_checked_before_anything_runs(load: Load) -> None:
    template = "{instruction}\\n\\n{input}"
    config = load(f'[inferencer]\nquestion_template = "{template}"\n')
    assert config.inferencer.question_template == "{instruction}\n\n{input}"
    assert load("", {"inferencer.question_template": "{a}"}).inferencer.question_template == "{a}"
    assert "names no column" in message_of(load, '[inferencer]\nquestion_template = "input"\n')
    both = message_of(load, '[inferencer]\nquestion_template = "{a}"\nquestion_column = "b"\n')
    assert "question_template and question_column are both set" in both
    columns = load('[fine_tuner]\nquestion_column = ["a", "b"]\n').fine_tuner.question_column
    assert columns == ("a", "b")
