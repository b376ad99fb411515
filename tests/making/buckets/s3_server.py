"""A local S3 server in a process of its own, which can be stopped, fail at random and count: moto's, made atomic.

`python -m tests.making.buckets.s3_server` prints its port. moto looks at a condition and writes in two steps, so
requests are served one at a time. A request fails before it is done, or after: then the answer is lost, as on a bad
line.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[3]
_CONTROL = "/control-of-the-tests"
BUCKET = "tuneproof"


@dataclass
class _Server:
    """A WSGI application around moto's."""

    app: Any
    rate: float = 0.0
    knows_conditions: bool = True
    source: random.Random = field(default_factory=random.Random)
    counts: Counter[str] = field(default_factory=Counter)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Any:
        with self.lock:
            if environ["PATH_INFO"].startswith(_CONTROL):
                return self._controlled(environ, start_response)
            self.counts[environ["REQUEST_METHOD"]] += 1
            if not self.knows_conditions:  # as stores that take any write in silence
                environ.pop("HTTP_IF_MATCH", None)
                environ.pop("HTTP_IF_NONE_MATCH", None)
            self.counts["bytes"] += int(environ.get("CONTENT_LENGTH") or 0)
            fails = self.source.random() < self.rate
            if fails and self.source.random() < 0.5:
                self.counts["failed before"] += 1
                return self._fail(environ, start_response)
            answer = list(self.app(environ, start_response if not fails else _nobody))
            if fails:
                self.counts["failed after"] += 1
                return self._fail(environ, start_response)
            return answer

    def _fail(self, environ: dict[str, Any], start_response: Any) -> list[bytes]:
        start_response("500 Internal Server Error", [("Content-Type", "application/xml")])
        return (
            []
            if environ["REQUEST_METHOD"] == "HEAD"
            else [b"<Error><Code>InternalError</Code><Message>a fault of the tests</Message></Error>"]
        )

    def _controlled(self, environ: dict[str, Any], start_response: Any) -> list[bytes]:
        content = environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        wanted = json.loads(content or b"{}")
        if "rate" in wanted:
            self.rate, self.source = wanted["rate"], random.Random(wanted.get("seed"))
        self.knows_conditions = wanted.get("knows_conditions", self.knows_conditions)
        counts = json.dumps(self.counts).encode()
        if wanted.get("reset"):
            self.counts.clear()
        start_response("200 OK", [("Content-Type", "application/json")])
        return [counts]


def _nobody(*_: Any) -> None:
    """Takes the answer that is lost."""


def main() -> None:
    """Serve until the process is ended or its parent is gone."""
    import logging

    from moto.moto_server.werkzeug_app import create_backend_app
    from werkzeug.serving import make_server

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    # moto's own dispatcher looks through all services it knows, on the disk, at each request.
    server = make_server("127.0.0.1", 0, _Server(create_backend_app("s3")), threaded=True)
    print(server.server_port, flush=True)
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()
    server.serve_forever()


def _end_with_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(0)


@dataclass
class S3Server:
    """The server, for those who use it."""

    process: subprocess.Popen[str]
    port: int

    @property
    def environ(self) -> Mapping[str, str]:
        """What a client's environment needs."""
        return {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.port}",
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
        }

    def control(self, **wanted: Any) -> dict[str, int]:
        """Set the share of requests that fail (`rate`, `seed`), give the counts, `reset` them."""
        address = f"http://127.0.0.1:{self.port}{_CONTROL}"
        with urllib.request.urlopen(address, json.dumps(wanted).encode(), timeout=30) as answer:
            counts: dict[str, int] = json.load(answer)
        return counts

    @contextlib.contextmanager
    def stopped(self) -> Iterator[None]:
        """Let the server stand still: its connections stay and nothing answers."""
        self.process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self.process.send_signal(signal.SIGCONT)


@contextlib.contextmanager
def s3_server() -> Iterator[S3Server]:
    """Start a server with one bucket, and end it."""
    import s3fs

    command = [sys.executable, "-m", "tests.making.buckets.s3_server"]
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, cwd=ROOT, env=environ, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        server = S3Server(process, int(process.stdout.readline()))
        bucket = f"http://127.0.0.1:{server.port}/{BUCKET}"
        urllib.request.urlopen(urllib.request.Request(bucket, method="PUT"), timeout=60).close()
        s3fs.S3FileSystem.clear_instance_cache()  # clients of a server that was there before
        yield server
    finally:
        s3fs.S3FileSystem.clear_instance_cache()
        process.kill()
        process.wait()


if __name__ == "__main__":
    main()
