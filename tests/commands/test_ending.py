"""How commands end that are asked to: soon, with one line and an exit code, leaving no process."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.commands.test_cli import environment, folder  # noqa: F401
from tests.making.terminals import Terminal

Start = Callable[..., Terminal]

# Work that hears nothing: the exception is swallowed, the next wait is in C, a child is there.
DEAF = """
import subprocess, sys, time
import flows.cli.ending as ending
from tasks.core import interruption
ending.GRACE_SECONDS = {grace}
def work():
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
    interruption.keeps(lambda: "3 of 9 answers are kept")
    told = iter(["working"])
    while True:
        try:  # before it is told that there is work, so that no interrupt comes past it
            for word in told:
                print(word, flush=True)
            {wait}
        except KeyboardInterrupt:
            pass
sys.exit(ending.run_to_end(work))
"""
SLEEPS = "time.sleep(60)"
# Computes without giving Python a moment to handle a signal in the main thread.
COMPUTES = "import hashlib; hashlib.pbkdf2_hmac('sha256', b'x' * 10**6, b'y', 10**8)"


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start Python with these arguments in a terminal."""
    begun: list[Terminal] = []

    def begin(*arguments: str, cwd: Path = tmp_path, warm_children: bool = True) -> Terminal:
        begun.append(Terminal(arguments, cwd, environment(tmp_path), warm_children=warm_children))
        return begun[-1]

    yield begin
    for terminal in begun:
        terminal.close()


def deaf(start: Start, wait: str, grace: float) -> Terminal:
    terminal = start("-c", DEAF.format(wait=wait, grace=grace))
    terminal.wait_until(lambda: "working" in terminal.output, 120)
    return terminal


@pytest.mark.parametrize("wait", [SLEEPS, COMPUTES])
def test_work_that_swallows_ctrl_c_or_computes_on_is_ended_when_its_time_is_up(
    start: Start, wait: str
) -> None:
    terminal = deaf(start, wait, grace=1)
    terminal.press_ctrl_c()
    assert terminal.wait(50) < 25
    assert terminal.exit_code == 130
    assert terminal.processes() == []
    assert terminal.output.rstrip().endswith("\ninterrupted: 3 of 9 answers are kept")
    assert "Traceback" not in terminal.output


def test_a_second_ctrl_c_ends_it_at_once(start: Start) -> None:
    terminal = deaf(start, SLEEPS, grace=60)
    terminal.press_ctrl_c()
    terminal.wait_until(lambda: "^C" in terminal.output, 30)
    with pytest.raises(AssertionError, match="did not happen"):
        terminal.wait(1)  # one is not enough: its time is not up
    terminal.press_ctrl_c()
    assert terminal.wait(50) < 25
    assert (terminal.exit_code, terminal.processes()) == (130, [])


def test_sigterm_ends_it_likewise_with_its_own_code(start: Start) -> None:
    terminal = deaf(start, SLEEPS, grace=0.5)
    terminal.kill(signal.SIGTERM)
    terminal.wait(60)
    assert (terminal.exit_code, terminal.processes()) == (143, [])
    assert "ended by SIGTERM: 3 of 9 answers are kept" in terminal.output


def test_an_error_that_the_interrupted_work_raises_is_not_told(start: Start) -> None:
    code = """
import sys, time
from flows.cli.ending import run_to_end
def work():
    print("working", flush=True)
    try:
        time.sleep(60)
    finally:
        raise OSError("the server is gone")
sys.exit(run_to_end(work))
"""
    terminal = start("-c", code)
    terminal.wait_until(lambda: "working" in terminal.output, 120)
    terminal.press_ctrl_c()
    assert terminal.wait(50) < 25
    assert terminal.exit_code == 130
    assert "server is gone" not in terminal.output


def test_a_command_that_is_not_interrupted_gives_its_code_and_its_errors(start: Start) -> None:
    terminal = start(
        "-c", "import sys; from flows.cli.ending import run_to_end; sys.exit(run_to_end(lambda: 5))"
    )
    terminal.wait(120)
    assert terminal.exit_code == 5
    failing = start("-c", "from flows.cli.ending import run_to_end; run_to_end(lambda: 1 / 0)")
    failing.wait(120)
    assert failing.exit_code == 1 and "ZeroDivisionError" in failing.output


# Moments at which no code of the work can catch what the signal becomes.
AT_A_MOMENT = """
import atexit, gc, signal, sys, threading
NUMBER = signal.{name}
def ask(*_): signal.raise_signal(NUMBER)
class Finalised:
    def __del__(self): ask()
def in_thread(function):
    thread = threading.Thread(target=function)
    thread.start()
    thread.join()
def at_call(count, function):
    left = iter(range(count))
    def called(*args, **more):
        if next(left, None) == count - 1: ask()
        return function(*args, **more)
    return called
def while_importing(*_):
    def find(name, *_):
        if name == "flows.cli.ending":
            sys.meta_path.remove(finder)
            ask()
    finder = type("Finder", (), {{"find_spec": staticmethod(find)}})
    sys.meta_path.insert(0, finder)
{moment}
"""
BEGIN = "from flows.cli import ending\n"
RUN = "\nending.exit_in_time(ending.run_to_end(work))"
WORK = "def work(): return 3" + RUN
MOMENTS = {
    "while the command is imported": (
        "while_importing()\nsys.argv = ['tuneproof', '--version']\nfrom flows.__main__ import main\nmain()",
        True,
    ),
    "while signals are set up": (f"{BEGIN}signal.set_wakeup_fd = at_call(1, signal.set_wakeup_fd)\n{WORK}", True),
    "while signals are put back": (f"{BEGIN}signal.set_wakeup_fd = at_call(2, signal.set_wakeup_fd)\n{WORK}", False),
    "while the end is told": (
        f"{BEGIN}ending.interruption.keeps = lambda *_: None\n"
        f"def work():\n ending.interruption._kept = lambda: 'all'\n ask()\n"
        f"ending._told_in_time = at_call(1, ending._told_in_time){RUN}",
        True,
    ),
    "in a finaliser": (f"{BEGIN}def work():\n Finalised()\n return 3{RUN}", False),
    "in a callback of the collector": (
        f"{BEGIN}def work():\n gc.callbacks.append(ask)\n gc.collect()\n gc.callbacks.clear()\n return 3{RUN}",
        False,
    ),
    "in a thread that asks": (
        f"{BEGIN}from tasks.core.interruption import raise_if_interrupted, remember\n"
        f"def work():\n remember()\n in_thread(raise_if_interrupted)\n return 3{RUN}",
        False,
    ),
    "while there are semaphores": (
        f"{BEGIN}import multiprocessing\n"
        f"def work():\n work.kept = multiprocessing.get_context('spawn').Event()\n ask()\n return 3{RUN}",
        True,
    ),
    "at the exit": (f"{BEGIN}atexit.register(ask)\n{WORK}", False),
}  # fmt: skip


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_signal_at_any_moment_ends_the_command_without_a_traceback(name: str, moment: str) -> None:
    code, is_asked = MOMENTS[moment]
    done = subprocess.run(
        [sys.executable, "-c", AT_A_MOMENT.format(name=name, moment=code)],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr
    assert done.returncode == (128 + signal.Signals[name] if is_asked else 3)
    assert len(done.stderr.strip().splitlines()) == int(is_asked)


INFER = ("-m", "flows", "infer", "--inferencer.max-new-tokens", "64", "--inferencer.batch-size", "4")


def long_inference(
    start: Start,
    folder: Path,  # noqa: F811
    model: Path,
    *more: str,
    warm_children: bool = True,
) -> Terminal:
    """Begin to answer 400 questions; give the terminal when some are answered."""
    rows = "".join(
        f'{{"question": "How many legs have {n} dogs?", "answer": "{4 * n}"}}\n' for n in range(400)
    )
    (folder / "test.jsonl").write_text(rows)
    command = (*INFER, "--inferencer.model", str(model), *more)
    terminal = start(*command, cwd=folder, warm_children=warm_children)
    terminal.wait_until(lambda: _answered(folder) >= 4, 400)
    return terminal


def _answered(folder: Path) -> int:  # noqa: F811
    return sum(len(path.read_text().splitlines()) for path in folder.glob("runs/*/**/ledger.jsonl"))


@pytest.mark.server
def test_ctrl_c_in_a_terminal_keeps_the_answers_and_leaves_no_process(
    start: Start,
    folder: Path,  # noqa: F811
    tiny_model_dir: Path,
) -> None:
    terminal = long_inference(start, folder, tiny_model_dir, "--inferencer.isolation", "process")
    assert len(terminal.processes()) >= 3  # the command, its server, the process that answers
    terminal.press_ctrl_c()
    assert terminal.wait(60) < 25
    assert terminal.exit_code == 130
    assert terminal.processes() == []
    assert "Traceback" not in terminal.output
    kept = _answered(folder)
    last = terminal.output.rstrip().splitlines()[-1]
    assert (
        last == f"interrupted: {kept} of 400 answers are kept; the same command goes on from row {kept + 1}"
    )


@pytest.mark.server
def test_a_killed_command_takes_its_server_with_it(start: Start, folder: Path, tiny_model_dir: Path) -> None:  # noqa: F811
    terminal = long_inference(start, folder, tiny_model_dir)
    terminal.kill(signal.SIGKILL)
    terminal.wait(60)
    assert terminal.wait_until(lambda: terminal.processes() == [], 60) < 30


SHARDS = ("--inferencer.num-shards", "4", "--inferencer.shard-runner", "processes")
IN_TWO_CHILDREN_EACH = (*SHARDS, "--inferencer.shard-processes", "2", "--inferencer.isolation", "process")


@pytest.mark.server
@pytest.mark.slow
def test_a_killed_command_takes_the_processes_of_its_shards_and_their_children_with_it(
    start: Start,
    folder: Path,  # noqa: F811
    tiny_model_dir: Path,
) -> None:
    terminal = long_inference(start, folder, tiny_model_dir, *IN_TWO_CHILDREN_EACH)
    # The command, its server, two shards and what generates for them: none has a server of its own.
    assert len(terminal.processes()) >= 6
    assert (
        len([line for line in terminal.processes() if "serve_temporarily" in line or "uvicorn" in line]) == 1
    )
    terminal.kill(signal.SIGKILL)
    terminal.wait(60)
    assert terminal.wait_until(lambda: terminal.processes() == [], 60) < 30


@pytest.mark.server
@pytest.mark.slow
def test_a_killed_training_takes_its_server_with_it(start: Start, folder: Path) -> None:  # noqa: F811
    terminal = start("-m", "flows", "finetune", "--fine-tuner.epochs", "100000", cwd=folder)
    terminal.wait_until(lambda: "training" in terminal.output and "%" in terminal.output, 400)
    terminal.kill(signal.SIGKILL)
    terminal.wait(60)
    assert terminal.wait_until(lambda: terminal.processes() == [], 60) < 30


SCORING = """
import itertools
from tasks.core.metrics.catalogue import resolve
from tasks.core.evaluation.scoring import score_predictions
from tasks.core.records import Prediction

def rows():
    for n in itertools.count():
        if n == 20_000:
            print("scoring", flush=True)
        yield Prediction(id=str(n), question="?", predicted_answer="four", ground_truth="4")

if __name__ == "__main__":
    score_predictions(rows(), resolve(["exact_match"]), processes=2)
"""


def test_a_killed_evaluation_takes_the_processes_that_score_with_it(start: Start, tmp_path: Path) -> None:
    (tmp_path / "scoring.py").write_text(SCORING)
    terminal = start(str(tmp_path / "scoring.py"))
    terminal.wait_until(lambda: "scoring" in terminal.output, 120)
    assert len(terminal.processes()) >= 3
    terminal.kill(signal.SIGKILL)
    terminal.wait(60)
    assert terminal.wait_until(lambda: terminal.processes() == [], 60) < 30


def test_a_program_that_only_called_a_command_goes_on_when_that_has_ended(start: Start) -> None:
    code = """
import sys, time
import flows.cli.ending as ending
ending.EXIT_SECONDS = 0.1
ending.run_to_end(lambda: 3)
time.sleep(1)
sys.exit(4)
"""
    terminal = start("-c", code)
    terminal.wait(120)
    assert terminal.exit_code == 4


def test_a_process_that_hangs_at_its_exit_is_ended_with_its_code(start: Start) -> None:
    code = """
import sys, threading
import flows.cli.ending as ending
ending.EXIT_SECONDS = 1
threading.Thread(target=threading.Event().wait).start()  # the interpreter waits for it
ending.exit_in_time(ending.run_to_end(lambda: 3))
"""
    terminal = start("-c", code)
    assert terminal.wait(60) < 50
    assert terminal.exit_code == 3
