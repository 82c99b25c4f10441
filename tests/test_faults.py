"""The fault matrix: what a client, the upstreams and the ledger see when a provider misbehaves.

MATRIX is the table of the design as data; one row, mode and wire format is one test. A is the first target, B
the second. Below it stand the cases that need more than one request, or a process of their own.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fault_server as fs
import pytest
from fault_server import Behaviour, FaultServer
from proxy_harness import FULL, Proxy, Reply, ask, config_text, in_process, opens_gates, soon_enough

HELLO = "".join(fs.PIECES)
Check = Callable[[Reply], None]
Place = Callable[[], Any]  # an address instead of a server: refusing_address or silent_address


# What a client may see.


def full(by: str = "A") -> Check:
    def check(reply: Reply) -> None:
        assert (reply.status, reply.broken) == (200, False), reply
        assert reply.text == HELLO
        assert reply.headers["x-ccmux-provider"] == by
        if "event-stream" in reply.headers["content-type"]:
            assert reply.kinds[0] == "message_start"
            assert reply.kinds.count("message_start") == reply.kinds.count("message_stop") == 1
            assert reply.kinds[-1] == "message_stop"

    return check


def fails(
    status: int,
    type: str = "",
    *,
    says: str = "",
    retry_after: tuple[float, float] | None = None,
    should_retry: str | None = None,
) -> Check:
    """An Anthropic error body with that status; no key in it."""

    def check(reply: Reply) -> None:
        assert (reply.status, reply.broken) == (status, False), reply
        body = reply.json
        assert body["type"] == "error"
        assert not type or body["error"]["type"] == type
        assert says in body["error"]["message"]
        assert b"sk-test" not in reply.body
        if retry_after:
            assert retry_after[0] <= float(reply.headers["retry-after"]) <= retry_after[1]
        if should_retry is not None:
            assert reply.headers.get("x-should-retry") == should_retry

    return check


def breaks_off(type: str = "") -> Check:
    """Content, then one `error` event, and no made-up ending."""

    def check(reply: Reply) -> None:
        assert (reply.status, reply.broken) == (200, False), reply
        assert HELLO.startswith(reply.text) and 0 < len(reply.text) < len(HELLO)
        assert reply.kinds.count("error") == 1 and reply.kinds[-1] == "error"
        assert not {"message_stop", "message_delta"} & set(reply.kinds)
        assert not type or reply.error["type"] == type

    return check


# What the ledger may hold of the one request: (entries, least, most) in micro-dollars charged.

NOTHING = "0"
PART = "part"
FULL_A, FULL_B = "A", "B"


def check_ledger(proxy: Proxy, expected: str) -> None:
    charged = [-entry["amount_microusd"] for entry in proxy.books.ledger() if entry["amount_microusd"]]
    if expected == NOTHING:
        assert charged == []
    elif expected == PART:  # the input, and some of the output; once
        assert len(charged) == 1 and 0 < charged[0] < FULL["A"], charged
    else:
        assert charged == [FULL[expected]]
    assert proxy.books.holds() == []
    proxy.books.check_sums()


@dataclass(frozen=True)
class Row:
    id: str
    a: tuple[Behaviour, ...] | Place
    sees: Check
    calls: tuple[int, int]  # at A, least and most; of an address what ccmux counts
    ledger: str
    b: tuple[Behaviour, ...] | None = None
    calls_b: int = 0
    modes: str = "s"  # s streaming client, n not
    formats: tuple[str, ...] = ("anthropic", "openai")
    seconds: tuple[float, float] = (0.0, 3.0)
    limits: dict[str, Any] = field(default_factory=dict)  # keys of provider A
    log_error: str | None = None  # what the request log says


B = (fs.answer(),)
FIRST_BYTE, WHOLE, IDLE = {"first_byte_timeout": 1}, {"response_timeout": 1}, {"idle_timeout": 1}
POOL = {"api_key": ["sk-test-key-one", "sk-test-key-two"]}
ANTHROPIC, OPENAI = ("anthropic",), ("openai",)

LIMITED_30 = fs.status(429, [("retry-after", "30")])
DOWN_10 = fs.status(503, [("retry-after", "10")])
SPEND_LIMIT = fs.status(429, [("x-should-retry", "false")], message="spend limit reached")
NO_MONEY = fs.raw(
    429, [fs.JSON_TYPE], b'{"error": {"message": "Check your plan", "type": "insufficient_quota"}}'
)
TOO_LOW = fs.status(400, message="Your credit balance is too low to access the Anthropic API.")
BAD_TOOL = fs.status(400, type="invalid_request_error", message="bad tool")
MANY_TOOLS = fs.status(400, message="'tools' : maximum number of items is 128")
TOO_LONG = "prompt is too long: 250000 tokens > 200000 maximum"
OVERFLOW = fs.status(400, type="invalid_request_error", message=TOO_LONG)
NOT_HTTP = fs.bytes_then(fs.Send(b"SSH-2.0-OpenSSH_9.2\r\n\r\n"), fs.End())
HUGE_HEADER = fs.raw(200, [fs.JSON_TYPE, ("X-Big", "x" * 100_000)], b"{}")
NO_ANSWERS = {
    "html": fs.html(),
    "truncated-json": fs.truncated_json(),
    "truncated-body": fs.truncated_body(),
    "empty": fs.empty(),
    "empty-json": fs.empty("application/json"),
    "not-http": NOT_HTTP,
    "huge-header": HUGE_HEADER,
    "deep-json": fs.raw(200, [fs.JSON_TYPE], b"[" * 99_999),
}
NO_STATUSES = [(204, b""), (206, b"{}"), (300, b"{}"), (304, b""), (600, b'{"error": {}}'), (999, b"x")]
ODD_BODIES = {
    "empty": b"",
    "object": b"{}",
    "list": b"[]",
    "null-error": b'{"error": null}',
    "deep": b"[" * 9999,
}
SILENCES = {  # each with the only limit that ends it
    "no-headers": (fs.stall(), FIRST_BYTE),
    "partial-headers": (fs.stall_in_headers(), FIRST_BYTE),
    "headers-then-silence": (fs.stall_after_headers(), FIRST_BYTE),
    "start-then-silence": (fs.cut_after(1, fs.Stall(), gate=False), IDLE),
}
ENDINGS: dict[str, list[fs.Step]] = {
    "reset": [fs.Reset()],
    "end": [fs.End()],
    "last-chunk": [fs.Send(fs.LAST_CHUNK)],
    "silence": [fs.Stall()],
    "broken-chunk": [fs.Send(b"zz\r\nnonsense\r\n"), fs.Stall()],
}


def timed_out(reply: Reply) -> None:
    assert (reply.status, reply.broken) == (200, False), reply
    assert reply.kinds[-1] == "error" and reply.error["type"] == "timeout_error"
    assert "message_stop" not in reply.kinds


ONE, TWO, ONE_OR_TWO = (1, 1), (2, 2), (1, 2)

# fmt: off
MATRIX = [
    Row("healthy", (fs.answer(),), full(), ONE, FULL_A, modes="sn"),
    Row("healthy-with-a-second-target", (fs.answer(),), full(), ONE, FULL_A, B, modes="sn"),

    # Before a status.
    Row("refused", fs.refusing_address, fails(502, "api_error"), TWO, NOTHING, modes="sn", seconds=(0, 2)),
    Row("refused-with-a-pool-of-keys", fs.refusing_address, fails(502), TWO, NOTHING, limits=POOL),
    Row("refused-then-B", fs.refusing_address, full("B"), ONE, FULL_B, B, 1, modes="sn", seconds=(0, 0.5)),
    Row("connect-timeout-then-B", fs.silent_address, full("B"), ONE, FULL_B, B, 1, modes="sn",
        seconds=(0.9, 2), limits={"connect_timeout": 1}),
    Row("connect-timeout", fs.silent_address, fails(502, "api_error"), TWO, NOTHING, modes="sn",
        seconds=(1.9, 4), limits={"connect_timeout": 1}),
    Row("reset-at-accept", (fs.reset_at_accept(),), fails(502, "api_error"), TWO, NOTHING, modes="sn"),
    Row("reset-before-status", (fs.reset_before_status(),), fails(502), TWO, NOTHING, modes="sn"),
    Row("close-before-status", (fs.close_before_status(),), fails(502), TWO, NOTHING, modes="sn"),
    Row("close-before-status-then-B", (fs.close_before_status(),), full("B"), TWO, FULL_B, B, 1, modes="sn"),
    Row("close-before-status-once", (fs.close_before_status(), fs.answer()), full(), TWO, FULL_A, modes="sn"),

    # Statuses.
    Row("500-once", (fs.status(500), fs.answer()), full(), TWO, FULL_A, modes="sn"),
    Row("500-always", (fs.status(500),), fails(500, "api_error"), TWO, NOTHING, modes="sn"),
    Row("500-always-then-B", (fs.status(500),), full("B"), TWO, FULL_B, B, 1, modes="sn"),
    Row("503-always-then-B", (fs.status(503),), full("B"), TWO, FULL_B, B, 1),
    Row("503-retry-after-10", (DOWN_10,), fails(503, retry_after=(10, 10)), ONE, NOTHING, modes="sn"),
    Row("503-retry-after-10-then-B", (DOWN_10,), full("B"), ONE, FULL_B, B, 1),
    Row("529-retry-after-10", (fs.status(529, [("retry-after", "10")]),), fails(529, retry_after=(10, 10)), ONE,
        NOTHING),
    Row("408-once", (fs.status(408), fs.answer()), full(), TWO, FULL_A),
    Row("409-once", (fs.status(409), fs.answer()), full(), TWO, FULL_A),
    Row("529-always", (fs.status(529),), fails(529, "overloaded_error", retry_after=(1, 60)), TWO, NOTHING,
        modes="sn"),
    Row("529-with-a-pool-of-keys", (fs.status(529), fs.answer()), full(), TWO, FULL_A, limits=POOL),
    Row("529-then-B", (fs.status(529),), full("B"), ONE, FULL_B, B, 1, modes="sn"),
    Row("429-retry-after-1", (fs.status(429, [("retry-after", "1")]), fs.answer()), full(), TWO, FULL_A,
        seconds=(1.0, 1.6)),
    Row("429-retry-after-30", (LIMITED_30,), fails(429, "rate_limit_error", retry_after=(29, 30)), ONE,
        NOTHING, modes="sn"),
    Row("429-retry-after-30-then-B", (LIMITED_30,), full("B"), ONE, FULL_B, B, 1),
    Row("429-spend-limit", (SPEND_LIMIT,), fails(429, says="spend limit", should_retry="false"), ONE, NOTHING,
        modes="sn"),
    Row("429-no-money", (NO_MONEY,), fails(429, says="Check your plan", should_retry="false"), ONE, NOTHING, modes="sn"),
    Row("429-no-money-then-B", (NO_MONEY,), full("B"), ONE, FULL_B, B, 1),
    Row("400-no-money", (TOO_LOW,), fails(400, says="credit balance", should_retry="false"), ONE, NOTHING),
    Row("400-no-money-then-B", (TOO_LOW,), full("B"), ONE, FULL_B, B, 1),
    Row("400", (BAD_TOOL,), fails(400, says="bad tool"), ONE, NOTHING, B, modes="sn"),
    Row("400-prompt-too-long", (OVERFLOW,), fails(400, says=TOO_LONG), ONE, NOTHING, B, modes="sn"),
    Row("400-no-key-in-the-text", (fs.status(400, message="bad key sk-test-key-of-A"),), fails(400, says="bad key"),
        ONE, NOTHING, modes="sn"),
    Row("400-too-many-tools", (MANY_TOOLS,), fails(400, says="is 128"), ONE, NOTHING, modes="sn"),
    Row("400-too-many-tools-then-B", (MANY_TOOLS,), full("B"), ONE, FULL_B, B, 1, modes="sn"),
    Row("413", (fs.status(413, message="too large"),), fails(413), ONE, NOTHING, B, modes="sn"),
    Row("422", (fs.status(422, message="no"),), fails(422), ONE, NOTHING, B),
    *(Row(f"{code}-then-B", (fs.status(code),), full("B"), ONE, FULL_B, B, 1, modes="sn")
      for code in (401, 402, 403, 404)),
    *(Row(f"{code}-no-key-in-the-text", (fs.status(code, message="sk-test-key-of-A is bad"),),
          fails(500, "api_error", should_retry="false"), ONE, NOTHING, modes="sn") for code in (401, 403)),
    *(Row(f"status-{code}", (fs.raw(code, [], body),), fails(502, "api_error"), ONE, NOTHING, modes="sn")
      for code, body in NO_STATUSES),
    *(Row(f"status-{code}-then-B", (fs.raw(code, [], body),), full("B"), ONE, FULL_B, B, 1)
      for code, body in NO_STATUSES),
    *(Row(f"400-body-{name}", (fs.raw(400, [], body),), fails(400), ONE, NOTHING, modes="sn")
      for name, body in ODD_BODIES.items()),

    # Several targets.
    Row("last-error-is-told", (fs.status(500),), fails(503), TWO, NOTHING, (fs.status(503),), 2, modes="sn"),
    Row("four-tries-in-all", (fs.status(500),), fails(503), (3, 3), NOTHING, (fs.status(503),), 1,
        limits={"max_retries": 2}),
    Row("429-spend-limit-then-B", (SPEND_LIMIT,), full("B"), ONE, FULL_B, B, 1),

    # A 200 that is none.
    *(Row(f"200-{name}-then-B", (behaviour,), full("B"), ONE_OR_TWO, FULL_B, B, 1, modes="sn")
      for name, behaviour in NO_ANSWERS.items()),
    *(Row(f"200-{name}", (behaviour,), fails(502), ONE_OR_TWO, NOTHING, modes="sn")
      for name, behaviour in NO_ANSWERS.items()),
    Row("error-event-first", (fs.error_first(),), fails(529, "overloaded_error"), ONE_OR_TWO, NOTHING),
    Row("error-event-first-then-B", (fs.error_first(),), full("B"), ONE_OR_TWO, FULL_B, B, 1),
    Row("error-event-after-start-then-B", (fs.error_after_start(),), full("B"), ONE_OR_TWO, FULL_B, B, 1),

    # Silence.
    *(Row(f"{name}-then-B", (behaviour,), full("B"), ONE, FULL_B, B, 1, seconds=(0.9, 3), limits=limits)
      for name, (behaviour, limits) in SILENCES.items()),
    *(Row(f"no-headers-{mode}", (fs.stall(),), fails(504, "timeout_error"), ONE, NOTHING, modes=mode,
          formats=formats, seconds=(0.9, 3), limits=limits, log_error="timeout")
      for mode, formats, limits in (("s", ANTHROPIC, FIRST_BYTE), ("n", ANTHROPIC, WHOLE),
                                    ("sn", OPENAI, FIRST_BYTE))),
    Row("total-timeout", (fs.slow_answer(0, 0.25, ("x",) * 40),), timed_out, ONE, PART,
        seconds=(0.9, 3), limits={"total_timeout": 1}),

    Row("total-timeout-in-back-off", (fs.status(429, [("retry-after", "4")]),), fails(504, "timeout_error"), ONE,
        NOTHING, modes="sn", seconds=(0.9, 3), limits={"total_timeout": 1}),

    # After content.
    *(Row(f"{name}-after-content", (fs.cut_after(5, *ending),), breaks_off(), ONE, PART, B, limits=IDLE)
      for name, ending in ENDINGS.items()),
    Row("reset-of-what-is-not-streamed", (fs.cut_after(5, fs.Reset(), gate=False),), fails(502), TWO, NOTHING, modes="n",
        formats=OPENAI),
    Row("error-event-midway", (fs.error_midway(),), breaks_off("overloaded_error"), ONE, PART, B),
    Row("broken-json-in-event-6", (fs.broken_json(6),), breaks_off(), ONE, PART, formats=OPENAI),

    # Slow, but alive: what comes within the limit keeps it going, be it a ping or a comment.
    Row("pings-before-content", (fs.with_signs_of_life(0),), full(), ONE, FULL_A, seconds=(1.5, 5),
        limits=FIRST_BYTE | IDLE),
    Row("pings-amid-content", (fs.with_signs_of_life(5),), full(), ONE, FULL_A, seconds=(1.5, 5),
        limits=FIRST_BYTE | IDLE),

    # No faults: whatever way bytes arrive, the answer is the same.
    Row("one-byte-chunks", (fs.dripping(1),), full(), ONE, FULL_A),
    Row("seven-byte-chunks", (fs.dripping(7),), full(), ONE, FULL_A),
    Row("crlf", (fs.dripping(64, b"\r\n"),), full(), ONE, FULL_A),
    Row("one-byte-crlf", (fs.dripping(1, b"\r\n"),), full(), ONE, FULL_A),
    Row("cr", (fs.dripping(3, b"\r"),), full(), ONE, FULL_A),
]
# fmt: on

CASES = [
    pytest.param(row, mode, wire, id=f"{row.id}-{mode}-{wire}")
    for row in MATRIX
    for wire in row.formats
    for mode in row.modes
]


@contextlib.asynccontextmanager
async def stage(
    folder: Path, a: tuple[Behaviour, ...] | Place, b: tuple[Behaviour, ...] | None = None, **options: Any
) -> AsyncIterator[tuple[Proxy, list[FaultServer]]]:
    """A ccmux whose model has target A and perhaps B; the servers behind them."""
    async with contextlib.AsyncExitStack() as stack:
        servers: list[FaultServer] = []
        urls: dict[str, str] = {}
        for name, script in (("A", a), ("B", b)):
            if callable(script):
                urls[name] = stack.enter_context(script())
            elif script is not None:
                servers.append(await stack.enter_async_context(FaultServer(*script)))
                urls[name] = servers[-1].url
        yield await stack.enter_async_context(in_process(folder, config_text(urls, **options))), servers


@pytest.mark.parametrize(("row", "mode", "wire"), CASES)
async def test_fault_matrix(row: Row, mode: str, wire: str, tmp_path: Path) -> None:
    await soon_enough(lambda folder: play(row, mode, wire, folder), tmp_path, row.seconds[1])


async def play(row: Row, mode: str, wire: str, folder: Path) -> float:
    """One request against a row's upstreams, and all that must be true of it; the seconds it took."""
    async with stage(folder, row.a, row.b, formats=wire, providers={"A": row.limits}) as (proxy, servers):
        reply = await ask(proxy, stream=mode == "s", on_data=opens_gates(servers))
        await proxy.idle()
    row.sees(reply)
    (logged,) = proxy.books.requests()
    counts = [server.count for server in servers]
    at_a = logged["attempts"] - sum(counts) if callable(row.a) else counts.pop(0)
    assert row.calls[0] <= at_a <= row.calls[1]
    assert counts == ([] if row.b is None else [row.calls_b])
    assert logged["attempts"] == at_a + row.calls_b
    assert row.seconds[0] <= reply.seconds
    check_ledger(proxy, row.ledger)
    assert row.log_error in (None, logged["error"])
    return reply.seconds
