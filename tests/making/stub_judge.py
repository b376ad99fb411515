"""A local server that speaks enough of OpenAI's protocol to judge and embed, and misbehaves on request."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Call:
    """One request: what was asked, and the handler to answer through."""

    path: str
    body: dict[str, Any]
    authorization: str
    handler: BaseHTTPRequestHandler

    @property
    def texts(self) -> dict[str, Any]:
        """The JSON object to judge."""
        _mark, data, _mark_again, _reminder = self.body["messages"][1]["content"].split("\n")
        texts: dict[str, Any] = json.loads(data)
        return texts

    @property
    def form(self) -> str | None:
        """Kind of response_format."""
        kind: str | None = self.body.get("response_format", {}).get("type")
        return kind

    def send(self, status: int, content: bytes, **headers: str) -> None:
        self.handler.send_response(status)
        for name, value in {"Content-Type": "application/json", **headers}.items():
            self.handler.send_header(name.replace("_", "-"), value)
        self.handler.send_header("Content-Length", str(len(content)))
        self.handler.end_headers()
        self.handler.wfile.write(content)

    def refuse(self, status: int, message: str, **headers: str) -> None:
        self.send(status, json.dumps({"error": {"message": message, "code": None}}).encode(), **headers)

    def say(self, text: str | None, finish: str = "stop", *, usage: bool = True, **message: Any) -> None:
        """A chat completion with this text; 100 tokens in, 20 out."""
        choice = {
            "index": 0,
            "finish_reason": finish,
            "message": {"role": "assistant", "content": text, **message},
        }
        completion: dict[str, Any] = {"id": "c", "object": "chat.completion", "created": 0, "model": "stub"}
        completion |= {"choices": [choice]}
        if usage:
            completion["usage"] = {"prompt_tokens": 100, "completion_tokens": 20, "total_tokens": 120}
        self.send(200, json.dumps(completion).encode())


def good_verdict(call: Call) -> str:
    """A verdict by plain comparison of the texts."""
    texts, instruction = call.texts, call.body["messages"][0]["content"]
    if "answer_claims" in instruction:
        same = texts["answer"].strip() == texts["reference"].strip()
        claims = [{"claim": texts["answer"], "supported": same}]
        wanted = [{"claim": texts["reference"], "covered": same}]
        return json.dumps({"answer_claims": claims, "reference_claims": wanted})
    if "rating" in instruction:
        rating = 2 if texts["first"].strip() == texts["second"].strip() else 0
        return json.dumps({"reason": "compared", "rating": rating})
    if "noncommittal" in instruction:
        evades = "do not know" in texts["answer"]
        return json.dumps({"questions": [f"What is {texts['answer']}?"] * 3, "noncommittal": evades})
    right = [texts[name].strip() == texts.get("reference", "").strip() for name in ("first", "second")]
    better = "tie" if right[0] == right[1] else "first" if right[0] else "second"
    return json.dumps({"reason": "compared", "better": better})


def vector(text: str, width: int = 16) -> list[float]:
    """A vector made of the text's hash, for the embeddings call."""
    digest = hashlib.sha256(text.encode()).digest()
    return [byte / 255 - 0.3 for byte in digest[:width]]


@dataclass
class StubJudge:
    """What was asked of the server so far, and how it is to misbehave."""

    url: str = ""
    calls: list[Call] = field(default_factory=list)
    trouble: Callable[[Call, int], bool] = lambda call, attempt: False
    """Answers a call itself and gives True, or gives False; `attempt` counts calls about the same texts."""
    attempts: Counter[str] = field(default_factory=Counter)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def answer(self, call: Call) -> None:
        key = json.dumps([call.path, call.body.get("messages", [])[:2], call.body.get("input")])
        with self.lock:
            self.calls.append(call)
            self.attempts[key] += 1
            attempt = self.attempts[key]
        if self.trouble(call, attempt):
            return
        if call.path.endswith("/embeddings"):
            data = [
                {"object": "embedding", "index": i, "embedding": vector(text)}
                for i, text in enumerate(call.body["input"])
            ]
            usage = {"prompt_tokens": len(data), "total_tokens": len(data)}
            body = {"object": "list", "model": "stub", "data": data, "usage": usage}
            call.send(200, json.dumps(body).encode())
        else:
            call.say(good_verdict(call))


@contextmanager
def stub_judge(delay_seconds: float = 0.0) -> Iterator[StubJudge]:
    """Run the server on a free port of this machine."""
    stub = StubJudge()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            time.sleep(delay_seconds)
            try:
                stub.answer(Call(self.path, body, self.headers.get("Authorization", ""), self))
            except (BrokenPipeError, ConnectionResetError):  # the client stopped waiting
                self.close_connection = True

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    class Server(ThreadingHTTPServer):
        request_queue_size = 64
        daemon_threads = True

        def handle_error(self, *_: object) -> None:
            """A cut connection is no news."""

    server = Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    stub.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    try:
        yield stub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
