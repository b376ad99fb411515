"""Messages to Prefect's server go beside the work: the newest of a kind counts, and what no longer fits is dropped."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from uuid import uuid4

import httpx
import pytest

from tasks.server import telling
from tasks.server.telling import Courier, is_away


@pytest.fixture(autouse=True)
def server_that_comes_and_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(telling, "_ASK_AGAIN_SECONDS", 0.01)
    monkeypatch.setattr(telling, "server_answers", lambda: True)
    monkeypatch.setattr(telling, "_own_client", lambda: None)


@pytest.fixture
def busy() -> Iterator[tuple[Courier, threading.Event]]:
    """A courier that is held up by its first message until the event is set."""
    courier, go_on = Courier(), threading.Event()
    begun = threading.Event()

    def hang() -> None:
        begun.set()
        go_on.wait(120)

    courier.send("first", hang)
    begun.wait(120)
    yield courier, go_on
    go_on.set()


def test_who_sends_does_not_wait_and_only_the_newest_of_a_kind_is_sent(
    busy: tuple[Courier, threading.Event],
) -> None:
    courier, go_on = busy
    seen: list[object] = []
    began = time.monotonic()
    for number in range(1000):
        courier.send("progress", lambda number=number: seen.append(number), replaces="bar")  # type: ignore[misc]
    courier.send("table", lambda: seen.append("table"))
    assert time.monotonic() - began < 30 and not seen
    go_on.set()
    assert courier.is_empty_within(10)
    assert seen == [999, "table"]


def test_no_more_waits_than_fits_and_the_work_is_not_stopped_by_it(
    busy: tuple[Courier, threading.Event], monkeypatch: pytest.MonkeyPatch
) -> None:
    courier, go_on = busy
    monkeypatch.setattr(telling, "_MOST_WAITING", 5)
    seen: list[int] = []
    for number in range(20):
        courier.send("table", lambda number=number: seen.append(number))  # type: ignore[misc]
    go_on.set()
    assert courier.is_empty_within(10)
    assert seen == [0, 1, 2, 3]


def test_what_a_server_that_is_away_did_not_take_is_sent_again_and_what_it_refused_is_not() -> None:
    courier, tries = Courier(), {"away": 0, "refused": 0}

    def away() -> None:
        tries["away"] += 1
        if tries["away"] < 3:
            raise httpx.ConnectError("nobody there")

    def refused() -> None:
        tries["refused"] += 1
        raise ValueError("no such thing")

    courier.send("one", away)
    courier.send("two", refused)
    assert courier.is_empty_within(10)
    assert tries == {"away": 3, "refused": 1}


def http_error(status: int) -> httpx.HTTPStatusError:
    request = httpx.Request("GET", "http://localhost")
    return httpx.HTTPStatusError("no", request=request, response=httpx.Response(status, request=request))


@pytest.mark.parametrize(
    ("error", "away"),
    [
        (httpx.ReadTimeout("slow"), True),
        (httpx.ConnectError("gone"), True),
        (http_error(503), True),
        (http_error(404), False),
        (ValueError("bug"), False),
        (None, False),
    ],
)
def test_an_outage_is_told_from_a_refusal(error: Exception | None, away: bool) -> None:
    assert is_away(error) is away


def test_an_outage_is_found_below_the_error_that_prefect_makes_of_it() -> None:
    try:
        try:
            raise httpx.ConnectTimeout("slow")
        except httpx.HTTPError as error:
            raise RuntimeError("Failed to reach API") from error
    except RuntimeError as error:
        assert is_away(error)


def test_a_run_goes_on_when_its_slot_of_the_deployments_limit_cannot_be_renewed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Prefect would end it: a server that was restarted may have forgotten the slot."""
    from prefect import flow_engine
    from prefect.concurrency import _leases
    from prefect.settings import PREFECT_API_URL, temporary_settings

    import flows.server.steady  # noqa: F401

    asked = threading.Event()

    def refuse(*_: object) -> bool:
        asked.set()
        raise httpx.ConnectError("nobody there")

    monkeypatch.setattr(_leases, "_renew_concurrency_lease_with_retries", refuse)
    with (
        temporary_settings({PREFECT_API_URL: "http://127.0.0.1:9/api"}),
        vars(flow_engine)["maintain_concurrency_lease"](uuid4(), 300, raise_on_lease_renewal_failure=True),
    ):
        assert asked.wait(60)
        time.sleep(0.5)  # the time in which it would be ended


def test_what_prefect_says_at_the_end_is_told_as_it_is_and_the_work_counts(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from prefect import Flow, flow
    from prefect.exceptions import ObjectNotFound

    from flows.server import steady

    def refused_at_the_end(own: Flow[[], int]) -> int:
        own.fn()
        raise ObjectNotFound(KeyError("the run is gone"))

    monkeypatch.setattr(steady, "server_answers", lambda: True)
    monkeypatch.setattr(steady, "_can_be_told", lambda: True)
    monkeypatch.setattr(Flow, "__call__", refused_at_the_end)

    @flow(name="three")
    def three() -> int:
        return 3

    assert steady.SteadyFlow.of(three)() == 3
    assert "Prefect could not end three" in caplog.text
    assert "does not answer" not in caplog.text
