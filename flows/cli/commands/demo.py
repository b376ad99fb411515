"""`tuneproof demo`: the whole job on what is packaged."""

from __future__ import annotations

import sys
from pathlib import Path

from flows.cli.commands.pipeline import show_pipeline
from flows.cli.console import say
from flows.cli.options import ALL_PHASES, NO_COMMON, Common, Phases, Settings
from flows.cli.starting import flow, loads_models, may_begin, prepare

QUICKSTART_DIR = Path(__file__).resolve().parents[3] / "examples" / "quickstart"


def demo(*, common: Common = NO_COMMON, phases: Phases = ALL_PHASES, settings: Settings = None) -> None:
    """Run the whole job on a small packaged model and question set."""
    # Its file names the data relative to the checkout; the demo may be started from anywhere.
    data = {
        "fine_tuner.training_data_id": str(QUICKSTART_DIR / "train.jsonl"),
        "inferencer.testing_data_id": str(QUICKSTART_DIR / "test.jsonl"),
    }
    chosen = {**data, **(settings or {}), **phases.as_settings()}
    config = prepare(QUICKSTART_DIR / "config.toml", common, chosen)
    if not may_begin(config, common):
        return None
    pipeline_flow = flow("flows.pipeline", "finetune_infer_evaluate", loads_models=loads_models(config))
    result = pipeline_flow(config)
    show_pipeline(result, config)
    return show_where_to_look()


def show_where_to_look() -> None:
    """Tell how to see the runs in the Prefect UI, and how the command is called with one's own data."""
    scripts = Path(sys.executable).parent
    if scripts.is_relative_to(Path.cwd()):
        scripts = scripts.relative_to(Path.cwd())
    say(
        f"Prefect UI: run `{scripts}/prefect server start` and open http://127.0.0.1:4200; these runs are in it."
    )
    say(f"your own data: {scripts}/tuneproof pipeline my.toml (`. {scripts}/activate` makes it `tuneproof`)")
