"""What processes share without any process: rows, pieces, memory that a device needs, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from tasks.core.config import FineTunerConfig
from tasks.core.errors import ConfigError
from tasks.core.records import MemoryEvent, ModelManifest, TrainingRestart
from tasks.core.training.job import BatchPlan
from tasks.core.training.methods.batches import LengthGroupedOrder
from tasks.core.training.precision import Precision
from tasks.core.training.processes.choosing import process_count
from tasks.core.training.processes.journal import Journal
from tasks.core.training.processes.sharing import SharedOrder, shares
from tasks.core.training.processes.strategy import DeviceNeed, choose_strategy, fitting_strategy

FLOAT32 = Precision("float32", "float32")


@pytest.mark.parametrize("processes", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("rows", [1, 5, 16, 23, 101])
def test_each_row_is_one_processs_and_all_come_to_the_end_of_an_update_together(
    rows: int, processes: int
) -> None:
    plan = BatchPlan(3, 4, 3, processes)
    orders = [
        SharedOrder(LengthGroupedOrder([index % 17 + 1 for index in range(rows)], 12, 7), plan, rank)
        for rank in range(processes)
    ]
    pieces = [list(order) for order in orders]
    assert sorted(row for own in pieces for piece in own for row in piece) == list(range(rows))
    assert {len(own) for own in pieces} == {len(orders[0])}
    assert max(len(piece) for own in pieces for piece in own) <= plan.rows_at_once <= 3
    whole = list(LengthGroupedOrder([index % 17 + 1 for index in range(rows)], 12, 7))
    for update in range(0, len(pieces[0]), plan.pieces):  # the rows of an update are the same for any number
        together = [row for own in pieces for piece in own[update : update + plan.pieces] for row in piece]
        at = update // plan.pieces * 12
        assert sorted(together) == sorted(whole[at : at + 12])


def test_one_process_has_the_pieces_that_it_always_had() -> None:
    assert shares(list(range(10)), BatchPlan(4, 3, 1)) == [[[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]]


def test_the_work_of_an_update_is_dealt_out_evenly_where_its_rows_stand_longest_first() -> None:
    lengths = [40 - row for row in range(32)]
    dealt = shares(list(range(32)), BatchPlan(4, 8, 1, 4))
    tokens = [sum(lengths[row] for piece in own for row in piece) for own in dealt]
    assert max(tokens) - min(tokens) <= 0.2 * max(tokens)


def test_a_smaller_plan_of_several_processes_computes_fewer_rows_at_once() -> None:
    plan: BatchPlan | None = BatchPlan(8, 2, 1, 8)
    assert plan is not None and plan.rows_at_once == 2
    plan = plan.smaller()
    assert plan is not None and (plan.rows_at_once, plan.rows_in_update) == (1, 16)


def config(**changes: Any) -> FineTunerConfig:
    return FineTunerConfig(device="cpu", **changes)


def test_a_cpu_has_one_process_unless_more_are_asked_for() -> None:
    assert process_count(config()) == 1
    assert process_count(config(processes=3)) == 3


def test_a_gpu_that_is_named_is_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tasks.core.models.placement.available_devices", lambda: ["cuda:0", "cuda:1", "cpu"])
    assert process_count(FineTunerConfig()) == 2
    assert process_count(FineTunerConfig(device="cuda:1")) == 1
    with pytest.raises(ConfigError, match=r"processes = 3, but device = .auto. is 2 GPUs"):
        process_count(FineTunerConfig(processes=3))


def test_dask_is_refused_for_training() -> None:
    with pytest.raises(ValidationError, match="Dask is for answers only"):
        FineTunerConfig(runner="dask")


def test_under_torchrun_the_number_of_processes_is_torchruns(monkeypatch: pytest.MonkeyPatch) -> None:
    given = {"RANK": "0", "WORLD_SIZE": "4", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert process_count(config()) == 4
    with pytest.raises(ConfigError, match="torchrun has started 4"):
        process_count(config(processes=2))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"load_in_4bit": True}, "bitsandbytes keeps quantised weights in blocks"),
        ({"optimizer": "adafactor"}, "the optimizer adafactor wants whole weights"),
        ({"neftune_noise_alpha": 5.0}, "neftune_noise_alpha"),
    ],
    ids=["QLoRA", "optimizer", "NEFTune"],
)
def test_what_cannot_be_shared_out_is_refused_with_the_reason_and_auto_is_ddp(
    changes: dict[str, Any], reason: str, tiny_model: Any
) -> None:
    arguments = (tiny_model.config, FLOAT32, "cpu", 2)
    with pytest.raises(ConfigError, match=reason):
        choose_strategy(config(strategy="fsdp", **changes), *arguments)
    assert choose_strategy(config(**changes), *arguments).strategy == "ddp"


def test_weights_are_shared_out_where_a_device_cannot_hold_them(tiny_model: Any) -> None:
    need = DeviceNeed(weights=40, learning=120, activations=10, layer=5)
    assert (need.on_each("ddp", 4), need.on_each("fsdp", 4)) == (170, 60)
    assert fitting_strategy(need, 4, 170, None) == "ddp"
    assert fitting_strategy(need, 4, 169, None) == "fsdp"
    assert fitting_strategy(need, 4, 169, "a reason") == "ddp"
    choice = choose_strategy(config(full_finetuning=True), tiny_model.config, FLOAT32, "cpu", 2)
    assert choice.need.weights == pytest.approx(4 * tiny_model.num_parameters(), rel=0.01)  # without norms
    assert "on each of 2 devices" in choice.described and choice.described.endswith(": ddp")


def test_a_journal_is_read_whole_up_to_a_line_that_a_death_has_cut(tmp_path: Path) -> None:
    (tmp_path / ".group-older.jsonl").write_text("{}")
    journal = Journal.of(tmp_path, "one", tidies=True)
    event = MemoryEvent(kind="out_of_memory", rows=4, limit_rows=2)
    restart = TrainingRestart(cause="signal SIGKILL", rank=1, step=6)
    journal.note(event)
    journal.note(restart)
    with journal.path.open("a") as file:
        file.write('{"TrainingRestart": {"cause')
    assert (journal.memory_events, journal.restarts) == ((event,), (restart,))
    assert [path.name for path in tmp_path.iterdir()] == [".group-one.jsonl"]


def test_a_manifest_of_an_older_version_tells_of_its_memory_events() -> None:
    old = {
        "run_name": "old", "kind": "adapter", "base_model_id": "base", "base_weights_sha256": "0",
        "chat_template_sha256": "0", "training_data_id": "rows", "training_rows_sha256": "0",
        "training_row_count": 1, "losses": [], "final_loss": None, "steps": 1, "trained_tokens": 1, "seconds": 1.0,
        "started_at": "", "finished_at": "", "device": "cpu", "tuneproof_version": "0",
        "settings": {
            "memory_events": [
                {"event": "out of memory", "rows_at_once": 64, "next_rows_at_once": 32, "message": "no memory"}
            ]
        },
    }  # fmt: skip
    manifest = ModelManifest.model_validate(old)
    assert manifest.memory_events == (
        MemoryEvent(kind="out_of_memory", rows=64, limit_rows=32, message="no memory"),
    )
    assert (manifest.processes, manifest.strategy) == (1, "one")
    again = ModelManifest.model_validate_json(manifest.model_dump_json())
    assert again.memory_events == manifest.memory_events
