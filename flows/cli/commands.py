"""The command line `tuneproof`. Commands import what they need when they run, so that --help answers at once."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import App, Parameter, validators

from flows.cli import results
from flows.cli.console import complain, prepare_console, say, unreachable_prefect, unusable_place, warn
from flows.cli.options import split_settings
from tasks.core.errors import ConfigError, ModelLoadError, TuneproofError
from tasks.core.escaping import visible
from tasks.core.interruption import is_interrupted
from tasks.core.provenance import library_version

if TYPE_CHECKING:
    from tasks.core.config import Config
    from tasks.core.promotion.promotion import Promotion

QUICKSTART_DIR = Path(__file__).resolve().parents[2] / "examples" / "quickstart"

_SETTINGS_HELP = (
    "Every key of the configuration can be set as --section.key VALUE, for example "
    "--inferencer.max-new-tokens 64; docs/configuration.md lists them all."
)

app = App(
    name="tuneproof",
    help="Fine-tune a language model, prove that it got better, promote it.",
    help_epilogue=_SETTINGS_HELP,
    help_format="plaintext",
    version=lambda: library_version("tuneproof"),
    result_action="return_value",
)

ConfigPath = Annotated[Path | None, Parameter(help="TOML file; ./config.toml if it exists.")]
OpenReport = Annotated[bool, Parameter(name="--open", negative=(), help="Open the report in a browser.")]
HubKey = Annotated[str | None, Parameter(help="Access token of the Hugging Face Hub; better set HF_TOKEN.")]
# Filled in from --section.key VALUE, not by cyclopts.
Settings = Annotated[dict[str, Any] | None, Parameter(parse=False)]


@Parameter(name="*")
@dataclass(frozen=True)
class Common:
    """Options of all commands that run something."""

    hf_key: HubKey = None
    dry_run: Annotated[
        bool,
        Parameter(negative=(), help="Check settings, model, data and disk; print the plan; run nothing."),
    ] = False


@Parameter(name="*")
@dataclass(frozen=True)
class Phases:
    """Which phases of the pipeline run."""

    skip_finetuning: Annotated[bool, Parameter(negative=(), help="Leave fine-tuning out.")] = False
    skip_inference: Annotated[bool, Parameter(negative=(), help="Leave inference out.")] = False
    skip_evaluation: Annotated[bool, Parameter(negative=(), help="Leave evaluation out.")] = False
    stop_after_finetuning: Annotated[bool, Parameter(negative=(), help="End after fine-tuning.")] = False
    stop_after_inference: Annotated[bool, Parameter(negative=(), help="End after inference.")] = False

    def as_settings(self) -> dict[str, Any]:
        """Give the keys of [pipeline] that the options stand for."""
        chosen = {
            "pipeline.enable_finetuning": (self.skip_finetuning, False),
            "pipeline.enable_inference": (self.skip_inference, False),
            "pipeline.enable_evaluation": (self.skip_evaluation, False),
            "pipeline.stop_after_finetuning": (self.stop_after_finetuning, True),
            "pipeline.stop_after_inference": (self.stop_after_inference, True),
        }
        return {key: value for key, (given, value) in chosen.items() if given}


NO_COMMON, ALL_PHASES = Common(), Phases()


@app.command
def demo(*, common: Common = NO_COMMON, phases: Phases = ALL_PHASES, settings: Settings = None) -> None:
    """Run the whole job on a small packaged model and question set."""
    # Its file names the data relative to the checkout; the demo may be started from anywhere.
    data = {
        "fine_tuner.training_data_id": str(QUICKSTART_DIR / "train.jsonl"),
        "inferencer.testing_data_id": str(QUICKSTART_DIR / "test.jsonl"),
    }
    chosen = {**data, **(settings or {}), **phases.as_settings()}
    config = _prepare(QUICKSTART_DIR / "config.toml", common, chosen)
    if not _may_begin(config, common):
        return None
    result = _flow("flows.pipeline", "finetune_infer_evaluate")(config)
    results.show_pipeline(result, config)
    return results.show_where_to_look()


@app.command
def pipeline(
    config: ConfigPath = None,
    /,
    *,
    common: Common = NO_COMMON,
    phases: Phases = ALL_PHASES,
    settings: Settings = None,
) -> None:
    """Fine-tune, infer, evaluate, and promote the model if it is better."""
    loaded = _prepare(config, common, {**(settings or {}), **phases.as_settings()})
    if not _may_begin(loaded, common):
        return None
    result = _flow("flows.pipeline", "finetune_infer_evaluate")(loaded)
    return results.show_pipeline(result, loaded)


@app.command
def finetune(config: ConfigPath = None, /, *, common: Common = NO_COMMON, settings: Settings = None) -> None:
    """Fine-tune the base model on the training data."""
    loaded = _prepare(config, common, settings)
    if not _may_begin(loaded, common, "fine-tuning"):
        return None
    trained = _flow("flows.finetuning", "finetune")(loaded)
    return results.show_model(trained)


@app.command
def preview(
    config: ConfigPath = None,
    /,
    *,
    rows: Annotated[
        int, Parameter(help="How many rows of each section.", validator=validators.Number(gte=1))
    ] = 3,
    settings: Settings = None,
) -> None:
    """Show the first prompts with their special tokens, and what is learnt of them; loads no weights."""
    loaded = _prepare(config, NO_COMMON, settings)
    _check_data(loaded)
    from flows.cli.previews import show_previews
    from tasks.previewing import preview as previews_of

    show_previews(previews_of(loaded, rows))


@app.command
def infer(config: ConfigPath = None, /, *, common: Common = NO_COMMON, settings: Settings = None) -> None:
    """Let a model answer the test questions; a run that was interrupted goes on where it stopped."""
    loaded = _prepare(config, common, settings)
    if not _may_begin(loaded, common, "inference"):
        return None
    manifest = _flow("flows.inference", "infer")(loaded)
    return results.show_run(manifest, loaded)


@app.command
def evaluate(
    config: ConfigPath = None,
    /,
    *,
    run: Annotated[str | None, Parameter(help="Name or folder of the run, or a file of answers.")] = None,
    baseline: Annotated[
        str | None, Parameter(help="What to compare with; base, champion, none, or like --run.")
    ] = None,
    exit_code: Annotated[
        bool, Parameter(negative=(), help="Exit with 3 for reject, 4 for inconclusive, 5 without a verdict.")
    ] = False,
    common: Common = NO_COMMON,
    settings: Settings = None,
) -> None:
    """Score the answers of a run, compare them, reach a verdict and write the report."""
    loaded = _prepare(config, common, settings)
    if not _may_begin(loaded, common, "evaluation", run=run, baseline=baseline):
        return None
    summary = _flow("flows.evaluation", "evaluate")(loaded, run=run, baseline=baseline)
    results.show_scores(summary, loaded, run=run)
    return results.end_with_verdict(summary) if exit_code else None


@app.command
def ask(
    question: str, config: ConfigPath = None, /, *, hf_key: HubKey = None, settings: Settings = None
) -> None:
    """Ask the fine-tuned model one question; the answer appears as it is generated."""
    if not question.strip():
        raise ConfigError(
            "the question is empty", 'write it in quotes: tuneproof ask "How many legs has a dog?"'
        )
    loaded = _prepare(config, Common(hf_key), settings)
    from tasks.inferencer import Inferencer

    for piece in Inferencer(loaded).stream_inference(question):
        print(visible(piece), end="", flush=True)
    print()


@app.command
def promote(
    run: Annotated[str | None, Parameter(help="Model or evaluated run; none = the newest evaluated.")] = None,
    config: ConfigPath = None,
    /,
    *,
    force: Annotated[
        bool, Parameter(negative=(), help="Promote against the verdict; needs --reason.")
    ] = False,
    reason: Annotated[str | None, Parameter(help="Why; it is kept in the history.")] = None,
    settings: Settings = None,
) -> None:
    """Make a model the promoted one; refuses unless its verdict is promote."""
    loaded = _prepare(config, NO_COMMON, settings)
    from tasks.promoter import Promoter

    promoter = Promoter(loaded)
    try:
        before = promoter.present()
    except ModelLoadError:  # of a damaged file, which --force writes anew
        if not force:
            raise
        before = None
    promotion = promoter.promote(run, reason=reason, force=force)
    if promotion == before:
        say(f"{promotion.run_name} is the promoted model already: nothing was changed.")
        return
    _announce(loaded, promotion)
    results.show_promotion(promotion, loaded)


@app.command
def rollback(
    config: ConfigPath = None,
    /,
    *,
    reason: Annotated[str | None, Parameter(help="Why; it is kept in the history.")] = None,
    settings: Settings = None,
) -> None:
    """Go back to the model that was promoted before."""
    loaded = _prepare(config, NO_COMMON, settings)
    from tasks.promoter import Promoter

    promotion, _ = Promoter(loaded).roll_back(reason=reason, tell=results.show_rollback)
    _announce(loaded, promotion)


@app.command
def models(
    config: ConfigPath = None,
    /,
    *,
    history: Annotated[bool, Parameter(negative=(), help="List promotions and rollbacks instead.")] = False,
    settings: Settings = None,
) -> None:
    """List the fine-tuned models that are there, and which one is promoted."""
    loaded = _prepare(config, NO_COMMON, settings)
    (results.list_promotions if history else results.list_models)(loaded)


@app.command
def runs(
    config: ConfigPath = None,
    /,
    *,
    html: Annotated[
        list[Path] | None,
        Parameter(
            consume_multiple=True,
            negative=(),
            help="Write a page to sort and filter too; without PATH to leaderboard.html beside the runs.",
        ),
    ] = None,
    settings: Settings = None,
) -> None:
    """List the runs that are there, finished or not, best first among those over the same rows."""
    loaded = _prepare(config, NO_COMMON, settings)
    if html is not None and len(html) > 1:
        raise ConfigError(
            f"--html was given {len(html)} paths", "give one, or none for leaderboard.html beside the runs"
        )
    board = results.list_runs(loaded)
    if html is not None:
        results.write_leaderboard_page(loaded, board, html[0] if html else None)


@app.command
def compare(
    run_a: str,
    run_b: str,
    config: ConfigPath = None,
    /,
    *,
    out: Annotated[
        Path | None,
        Parameter(help="Folder for the report; compared-with-RUN_A in that of RUN_B if not given."),
    ] = None,
    open_report: OpenReport = False,
    settings: Settings = None,
) -> None:
    """Compare two runs on the rows that both answered; RUN_A is before, RUN_B after.

    Generates no answers; a model is used only where a metric of the settings needs one.
    """
    loaded = _prepare(config, NO_COMMON, settings)
    if out is not None and out.is_file():
        raise ConfigError(f"--out {out} is a file", "name a folder; it is made when it is not there")
    results.compare(run_a, run_b, loaded, directory=out, open_report=open_report)


@app.command
def report(
    run: str, config: ConfigPath = None, /, *, open_report: OpenReport = False, settings: Settings = None
) -> None:
    """Write the report and the spreadsheet of a run again from its scores."""
    results.rewrite_report(run, _prepare(config, NO_COMMON, settings), open_report=open_report)


judge = App(name="judge", help="Compare the judge model with people.", help_format="plaintext")
app.command(judge)


@judge.command
def calibrate(
    labels: Path,
    config: ConfigPath = None,
    /,
    *,
    metric: Annotated[str | None, Parameter(help="Judged metric of rows that name none.")] = None,
    out: Annotated[
        Path | None, Parameter(help="HTML page to write; LABELS.calibration.html if not given.")
    ] = None,
    settings: Settings = None,
) -> None:
    """Compare the judge with the labels of people; what it shows is kept, and a gate asks for it.

    LABELS is a file of JSON lines; see docs/judge.md.
    """
    from flows.cli.judging import calibrate as run

    run(labels, _prepare(config, NO_COMMON, settings), metric=metric, page_path=out)


@Parameter(name="*")
@dataclass(frozen=True)
class Serving:
    """What the project gets on a Prefect server."""

    config: Annotated[
        str | None, Parameter(help="Settings file of the deployments; config.toml, else the quickstart's.")
    ] = None
    runs_at_once: Annotated[int, Parameter(help="Runs at the same time, for a new work pool.")] = 2
    gpus: Annotated[int, Parameter(help="Runs that may use a GPU at once, where no limit is set yet.")] = 1
    notify_block: Annotated[
        str | None,
        Parameter(help="Prefect block that tells of failed, crashed and rejected runs: TYPE/NAME."),
    ] = None
    crashed_after_seconds: Annotated[
        int,
        Parameter(help="A run that is silent for so long is marked as crashed; heartbeats come every 30 s."),
    ] = 90


DEFAULT_SERVING = Serving()


@app.command
def setup(*, serving: Serving = DEFAULT_SERVING) -> None:
    """Create work pool, limits, variables and automations on the server of PREFECT_API_URL; again is harmless."""
    prepare_console()
    from flows.server.provisioning import Provisions
    from flows.server.serving import set_up

    set_up(Provisions(**asdict(serving)))


@app.command
def up(
    *,
    host: str = "127.0.0.1",
    port: int = 4200,
    serving: Serving = DEFAULT_SERVING,
) -> None:
    """Start a Prefect server and a worker on this machine, set up and deploy everything; see `down`.

    With PREFECT_API_URL set, that server is used and only the worker is started.
    """
    from flows.server import serving as local

    prepare_console()
    given = {name: value for name, value in asdict(serving).items() if value is not None}
    options = [part for name, value in given.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    local.up(host, port, setup_options=options)


@app.command
def down() -> None:
    """End what `up` started; answers, models and the server's database stay."""
    from flows.server.serving import down as end

    end()


def main(tokens: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; without tokens it is the command line of this process."""
    from flows.cli.ending import run_to_end

    return run_to_end(lambda: run(sys.argv[1:] if tokens is None else tokens))


def run(tokens: Sequence[str]) -> int:
    """Run one command and return its exit code; errors of a person's making are told without a traceback."""
    try:
        _run_command(tokens)
    except TuneproofError as error:
        if is_interrupted():
            raise
        return complain(error)
    except OSError as error:
        explained = unusable_place(error)
        if explained is None or is_interrupted():
            raise
        return complain(explained)
    except RuntimeError as error:
        explained = unreachable_prefect(error)
        if explained is None or is_interrupted():
            raise
        return complain(explained)
    return 0


def _run_command(tokens: Sequence[str]) -> None:
    settings, rest = split_settings(tokens)
    command, bound, unparsed = app.parse_args(rest)
    if "settings" in unparsed:
        bound.arguments["settings"] = settings
    elif settings:
        raise ConfigError(
            f"--{next(iter(settings))} belongs to a command.", "put a command first, see --help"
        )
    command(*bound.args, **bound.kwargs)


def _prepare(path: Path | None, common: Common, settings: dict[str, Any] | None) -> Config:
    """Make the terminal ready, take the token, load the settings."""
    from tasks.core.config import load_config

    prepare_console()
    if common.hf_key:
        os.environ["HF_TOKEN"] = common.hf_key
        warn("--hf-key can be read in the list of processes and in the shell's history: better set HF_TOKEN")
    return load_config(path, settings)


def _check_data(config: Config) -> None:
    """Refuse data that is not there before libraries are loaded that take seconds."""
    from tasks.core.data.sources import check_source

    for data_id in (config.fine_tuner.training_data_id, config.inferencer.testing_data_id):
        if data_id is not None:
            check_source(data_id)


def _flow(module: str, name: str) -> Callable[..., Any]:
    """Import a flow while the server that it needs starts."""
    from flows.server.temporary_server import server_for_flows

    server = server_for_flows()
    flow: Callable[..., Any] = getattr(import_module(module), name)
    if server is not None:
        server.wait()
    return flow


def _announce(config: Config, promotion: Promotion) -> None:
    """Tell a Prefect server, if the environment names one; Prefect is not even imported otherwise."""
    if "PREFECT_API_URL" in os.environ:
        from flows.promotion import announce

        announce(config, promotion)


def _may_begin(
    config: Config, common: Common, *phases: str, run: str | None = None, baseline: str | None = None
) -> bool:
    """Refuse what is not there, before Prefect is imported; with --dry-run print the plan instead and give False.

    Without phases they are those of [pipeline].
    """
    from tasks.core.config.phases import pipeline_phases

    phases = phases or pipeline_phases(config)
    if common.dry_run:
        from tasks.dry_run import make_plan

        results.show_plan(make_plan(config, phases, run=run, baseline=baseline))
        return False
    from tasks.server.presence import check_named

    check_named(config, phases, run=run, baseline=baseline)
    return True
