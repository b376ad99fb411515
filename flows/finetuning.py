"""finetune: training rows -> a model directory."""

from __future__ import annotations

from prefect import flow

from flows.naming import began_at, name_of_run, rename_run, told_rows
from flows.parameters import (
    ConfigSource,
    Count,
    Epochs,
    LearningRate,
    Method,
    Settings,
    Text,
    chosen_method,
    load_settings,
)
from flows.server.steady import SteadyFlow
from tasks.answering import check_inference
from tasks.core.storage.store import Store
from tasks.core.training.processes.choosing import count_here
from tasks.core.training.run import TrainedModel  # Prefect reads the annotation for the form
from tasks.server.devices import held_device
from tasks.server.events import emit_model_trained
from tasks.server.telling import is_phase
from tasks.training import train_model
from tasks.ui.run_logs import send_core_logs_to_prefect


@SteadyFlow.of
@flow(name="finetune", flow_run_name=name_of_run)
def finetune(
    config: ConfigSource = "",
    model: Text = "",
    dataset: Text = "",
    run_name: Text = "",
    method: Method = "as configured",
    epochs: Epochs = 0,
    learning_rate: LearningRate = 0,
    max_rows: Count = 0,
    settings: Settings = (),
) -> TrainedModel:
    """Fine-tune a base model on training data. A run that was interrupted goes on from its newest checkpoint.

    Args:
        config: TOML file with settings; empty = ./config.toml if there is one.
        model: Folder, Hub id or package: name of the base model; empty = as configured.
        dataset: Hub id, JSONL, JSON, CSV or Parquet file, or a folder with the training rows; empty = as configured.
        run_name: Name of the run and of the model's folder; empty = made of base model and time.
        method: lora = small added weights; qlora = the same on a base in 4 bits (GPU); full = all weights.
        epochs: Passes over the training data; 0 = as configured.
        learning_rate: Peak learning rate; 0 = as configured (3e-4 unless the file says otherwise).
        max_rows: Use only the first rows of the dataset; 0 = as configured.
        settings: Any other setting as section.key=value, e.g. fine_tuner.rank=32; beats the file.
    """
    send_core_logs_to_prefect()
    loaded = load_settings(
        config,
        settings,
        fine_tuner__base_model_id=model,
        fine_tuner__training_data_id=dataset,
        fine_tuner__run_name=run_name,
        fine_tuner__max_rows=max_rows,
        fine_tuner__epochs=epochs,
        fine_tuner__learning_rate=learning_rate,
        **chosen_method(method),
    )
    if loaded.inferencer.testing_data_id is not None and not is_phase():
        check_inference(loaded, is_next=False)  # a pipeline has done it
    count = count_here(loaded.fine_tuner)
    limit = loaded.pipeline.gpu_concurrency_limit
    device = loaded.fine_tuner.device if count else "cpu"  # Ray gives out the GPUs of its cluster itself
    with held_device(device, limit, all_of_them=count > 1, most=count):
        trained = train_model(loaded, started_at=began_at())
    rename_run(trained.manifest.run_name, told_rows(trained.manifest.training_row_count))
    emit_model_trained(Store(loaded.pipeline.models_dir).url_of(trained.model_dir), trained.manifest)
    return trained
