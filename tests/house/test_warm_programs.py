"""The programs that tests fork in place of new interpreters are to system and parent what those would be."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from typing import Any

import pytest

from tests.making.warm.children import warm_children  # noqa: F401
from tests.making.warm.descendants import COLD
from tests.making.warm.python import ROOT, run_python

# What a child can tell of itself, and what its parent and the system tell of it.
CHILD = """
import json, os, signal, sys, psutil
warm = "torch" in sys.modules
me = psutil.Process()
print(json.dumps({
    "warm": warm, "parent": os.getppid(), "is_leader": os.getsid(0) == os.getpid(), "group": os.getpgid(0),
    "mark": os.environ.get("MARK"), "shown_mark": me.environ().get("MARK"), "shown": [a for a in me.cmdline() if a],
    "cwd": os.getcwd(), "argv": sys.argv, "asked": sys.stdin.read(), "prefect": "prefect" in sys.modules,
    "unheard": signal.getsignal(signal.SIGINT) == signal.SIG_IGN, "safe": "tests" not in os.listdir(sys.path[0] or "."),
    "open": sorted(int(name) for name in os.listdir("/proc/self/fd") if int(name) > 2),
}))
sys.exit(int(sys.argv[1]))
"""
PARENT = """
import json, os, signal, subprocess, sys
child, folder, more = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
signal.signal(signal.SIGINT, signal.SIG_IGN)
reader, writer = os.pipe()
done = subprocess.run(
    [sys.executable, "-c", child, "7", "two words"], cwd=folder, env={**os.environ, "MARK": "x=y", **more},
    input="asked?", capture_output=True, text=True, pass_fds=[writer], start_new_session="NEW" in more,
)
os.close(writer)
assert os.read(reader, 1) == b""  # nobody holds it any more
print(json.dumps({
    "told": json.loads(done.stdout or "null"), "errors": done.stderr, "code": done.returncode, "passed": writer,
    "pid": os.getpid(), "group": os.getpgid(0),
}))
"""


def parent(code: str, *arguments: str) -> str:
    """What a program with warm children printed."""
    done = run_python(
        ["-c", code, *arguments], env={**os.environ, "PYTHONPATH": str(ROOT)}, warm_children=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "more", [{}, {"NEW": "session"}, {COLD: "1"}], ids=["warm", "of a new session", "cold"]
)
def test_a_child_has_the_parent_streams_folder_environment_and_descriptors_of_a_new_interpreter(
    more: dict[str, str], tmp_path: Any
) -> None:
    found = json.loads(parent(PARENT, CHILD, str(tmp_path), json.dumps(more)))
    told = found["told"]
    assert told is not None, found["errors"]
    assert told["warm"] == (COLD not in more)
    assert (found["code"], told["parent"], told["asked"], told["prefect"]) == (
        7,
        found["pid"],
        "asked?",
        False,
    )
    assert (told["mark"], told["shown_mark"], told["cwd"]) == ("x=y", "x=y", str(tmp_path))
    assert told["shown"][1:] == ["-c", CHILD, "7", "two words"] and told["argv"] == ["-c", "7", "two words"]
    assert told["is_leader"] == ("NEW" in more)
    assert told["group"] == found["group"] or told["is_leader"]
    assert told["unheard"]
    assert found["passed"] in told["open"]


SPAWNS = """
import multiprocessing, os, sys, time
if __name__ == "__main__":
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        print(pool.apply(eval, ("'torch' in __import__('sys').modules",)), pool.apply(os.getppid) == os.getpid())
    ends, sleeps = context.Process(target=sys.exit, args=(3,)), context.Process(target=time.sleep, args=(60,))
    ends.start(), sleeps.start()
    sleeps.kill()
    ends.join(), sleeps.join()
    print(ends.exitcode, sleeps.exitcode)
"""


def test_what_multiprocessing_spawns_is_warm_too_and_ends_as_others_do() -> None:
    assert parent(SPAWNS).splitlines() == ["True True", "3 -9"]


def tell(connection: Connection) -> None:
    """What a child of the test process is; it then waits to be ended."""
    unheard = signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    connection.send(("torch" in sys.modules, os.environ.get("MARK"), os.getpid(), unheard))
    time.sleep(60)


@pytest.mark.usefixtures("warm_children")
def test_what_the_test_process_spawns_is_warm_and_to_multiprocessing_as_others_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MARK", "x=y")
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    waits, ends = context.Process(target=tell, args=(theirs,)), context.Process(target=sys.exit, args=(3,))
    heard = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        waits.start()
        ends.start()
    finally:
        signal.signal(signal.SIGINT, heard)
    theirs.close()
    assert ours.recv() == (True, "x=y", waits.pid, True)
    waits.join(0.01)
    assert waits.is_alive() and waits in multiprocessing.active_children()
    waits.kill()
    with pytest.raises(EOFError):
        ours.recv()
    waits.join()
    ends.join()
    assert (waits.exitcode, ends.exitcode) == (-signal.SIGKILL, 3)
    assert not {waits, ends} & set(multiprocessing.active_children())


@pytest.mark.usefixtures("warm_children")
def test_those_that_threads_spawn_at_once_are_each_its_own_and_a_new_interpreter_can_still_be_spawned() -> (
    None
):
    warm, cold = (
        multiprocessing.get_context("spawn"),
        multiprocessing.get_context("fork").get_context("spawn"),
    )

    def begin_and_end(code: int) -> int | None:
        process = warm.Process(target=sys.exit, args=(code,))
        process.start()
        process.join()
        return process.exitcode

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(begin_and_end, range(12))) == list(range(12))
    process = cold.Process(target=sys.exit, args=(5,))
    process.start()
    process.join()
    assert process.exitcode == 5


BECOMES = """
import os, signal, subprocess, sys
becomes = "import os, sys; os.execvpe(sys.executable, [sys.executable, '-c', sys.argv[1]], {**os.environ, 'A': 'b'})"
ends = "import os, sys; print('torch' in sys.modules, os.environ['A'], flush=True); sys.exit(5)"
waits = "import time; print('there', flush=True); time.sleep(60)"
done = subprocess.run([sys.executable, "-c", becomes, ends], capture_output=True, text=True)
print(done.stdout.strip(), done.returncode)
command = [sys.executable, "-c", becomes, waits]
with subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True) as process:
    process.stdout.readline()
    os.killpg(process.pid, signal.SIGTERM)
    print(process.wait(30), process.stdout.read())
"""


def test_what_a_program_becomes_by_exec_is_warm_and_ends_for_it() -> None:
    assert parent(BECOMES).splitlines() == ["True b 5", "-15 b''"]


FAMILY = """
import os, subprocess, sys, time
command = [sys.executable, "-c", "import time; print('there', flush=True); time.sleep(60)"]
child = subprocess.Popen(command, stdout=subprocess.PIPE)
child.stdout.readline()
child.terminate()
print(child.wait(30), flush=True)
more = "import subprocess, sys; sys.exit(subprocess.run([sys.executable, '-c', 'import sys; sys.exit(9)']).returncode)"
print(subprocess.run([sys.executable, "-c", more]).returncode)
print(subprocess.run([sys.executable, "-P", "-m", "tests.none"], capture_output=True, text=True).stderr.strip())
"""


def test_children_are_ended_by_signals_and_have_warm_children_of_their_own() -> None:
    terminated, of_its_child, *error = parent(FAMILY).splitlines()
    assert (terminated, of_its_child) == ("-15", "9")
    assert "No module named" in error[-1]
