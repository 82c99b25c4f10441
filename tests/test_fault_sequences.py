"""What failures teach: cool-downs, breakers, pools, stickiness, budgets; and clients that leave or dawdle."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import gc
import json
import logging
import math
import random
import socket
import ssl
import time
import weakref
import zlib
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import fault_server as fs
import psutil
import pytest
from fault_server import FaultServer
from proxy_harness import (
    ADMIN_TOKEN,
    FULL,
    Proxy,
    Reply,
    as_process,
    ask,
    ask_many,
    config_text,
    in_process,
    message_body,
    opens_gates,
    soon_enough,
    until,
)
from test_faults import (
    HELLO,
    LIMITED_30,
    NO_MONEY,
    PART,
    TOO_LONG,
    Check,
    breaks_off,
    check_ledger,
    fails,
    full,
    stage,
)
from translation import PDF, PNG, SEARCH, assistant, tool_result, tool_use, user

import ccmux

OK = (fs.answer(),)
BOTH = pytest.mark.parametrize("wire", ["anthropic", "openai"])
NO_RETRY = {"providers": {"A": {"max_retries": 0}, "B": {"max_retries": 0}}}


# Limits and cool-downs.


@pytest.mark.parametrize(
    ("headers", "least", "most"),
    [
        ([("retry-after", "nan")], 0, 0.6),
        ([("retry-after", "-1")], 0, 0.6),
        ([("retry-after-ms", "700")], 0.7, 1.3),
        ([("retry-after", "soon")], 1.0, 1.6),
        ([], 1.0, 1.6),
    ],
)
@BOTH
async def test_a_short_limit_is_waited_for(
    headers: list[tuple[str, str]], least: float, most: float, wire: str, tmp_path: Path
) -> None:
    async def go(folder: Path) -> float:
        async with stage(folder, (fs.status(429, headers), fs.answer()), formats=wire) as (proxy, (a,)):
            reply = await ask(proxy)
        full()(reply)
        assert a.count == 2 and least <= reply.seconds
        return reply.seconds

    await soon_enough(go, tmp_path, most)


@BOTH
async def test_a_limited_target_rests_and_the_next_is_asked(wire: str, tmp_path: Path) -> None:
    async with stage(tmp_path, (fs.status(429, [("retry-after", "30")]),), OK, formats=wire) as (
        proxy,
        (a, b),
    ):
        for _ in range(3):
            full("B")(await ask(proxy))
    assert (a.count, b.count) == (1, 3)


def gemini_limit(delay: Any) -> Any:
    info = {"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": delay}
    error = {"code": 429, "message": "Quota exceeded.", "status": "RESOURCE_EXHAUSTED", "details": [{}, info]}
    return [{"error": error}]


def openrouter_limit(seconds: Any) -> Any:
    reset = str(round((time.time() + seconds) * 1000)) if isinstance(seconds, int) else seconds
    headers = {"X-RateLimit-Limit": "16", "X-RateLimit-Remaining": "0", "X-RateLimit-Reset": reset}
    message = "Rate limit exceeded: free-models-per-min."
    return {"error": {"message": message, "code": 429, "metadata": {"headers": headers}}}


def worded_limit(wait: Any) -> Any:
    """OpenAI's and Groq's, without their headers."""
    limit = "Rate limit reached for m on tokens per min (TPM): Limit 30000, Used 28000, Requested 9000."
    message = f"{limit} Please try again in {wait}. Visit https://a to learn more."
    return {"error": {"message": message, "type": "tokens", "param": None, "code": "rate_limit_exceeded"}}


@pytest.mark.parametrize(
    ("limit", "wait", "least", "most"),
    [
        (worded_limit, "7.66s", 7, 8),
        (worded_limit, "1m30.72s", 90, 91),
        (worded_limit, "6h0m0s", 3590, 3600),
        (gemini_limit, "38s", 37, 38),
        (gemini_limit, "38.837906927s", 38, 39),
        (openrouter_limit, 50, 40, 51),
        (openrouter_limit, 60_000, 3590, 3600),
    ],
)
async def test_a_limit_that_only_the_body_tells(
    limit: Callable[[Any], Any], wait: Any, least: int, most: int, tmp_path: Path
) -> None:
    body = json.dumps(limit(wait)).encode()
    async with stage(tmp_path, (fs.raw(429, [fs.JSON_TYPE], body),), formats="openai") as (proxy, (a,)):
        for _ in range(2):
            fails(429, "rate_limit_error", retry_after=(least, most))(await ask(proxy))
    assert a.count == 1


@pytest.mark.parametrize(
    "payload",
    [
        gemini_limit("soon"),
        gemini_limit({}),
        openrouter_limit("soon"),
        openrouter_limit(None),
        worded_limit("a moment"),
        worded_limit("5"),
        worded_limit("2 months"),
        worded_limit("9" * 5000 + "s"),
        {"error": {"details": "x"}},
    ],
)
def test_a_wait_in_a_body_may_be_none(payload: Any) -> None:
    assert ccmux.retry_after(ccmux.wait_in_body(payload)) is None


@pytest.mark.parametrize(
    ("words", "seconds"),
    [
        ("Please try again in 320ms.", 0.32),
        ("Please retry after 6 seconds.", 6),
        ("Please retry in 32.5s.", 32.5),
        ("try again in 1 minute", 60),
        ("Try again in 2 hours 3 minutes 4 seconds.", 7384),
        ("Please try again in 1m0s, or in 5s", 60),
    ],
)
def test_a_wait_in_words(words: str, seconds: float) -> None:
    assert ccmux.wait_in_body({"error": words}) == {"retry-after": str(float(seconds))}


async def test_a_limit_that_is_told_amid_an_answer_rests_nobody(tmp_path: Path) -> None:
    """Whoever had content was let in."""
    limit = fs.cut_after(5, extra=lambda call: fs.error_event(call, "rate_limit_error"))
    async with stage(tmp_path, (limit, fs.answer()), OK) as (proxy, (a, b)):
        breaks_off("rate_limit_error")(await ask(proxy, on_data=opens_gates([a])))
        full("A")(await ask(proxy))
    assert (a.count, b.count) == (2, 0)


@BOTH
async def test_when_all_targets_rest_no_call_is_made(wire: str, tmp_path: Path) -> None:
    async with stage(tmp_path, (fs.status(429, [("retry-after", "30")]),), formats=wire) as (proxy, (a,)):
        fails(429)(await ask(proxy))
        fails(429, "rate_limit_error", retry_after=(28, 30))(await ask(proxy))
        fails(429, "rate_limit_error", retry_after=(28, 30))(await ask(proxy, stream=False))
    assert a.count == 1
    assert len(proxy.books.requests()) == 3 and proxy.books.holds() == []


@pytest.mark.parametrize("code", [301, 302, 303, 307, 308])
@BOTH
async def test_a_redirect_is_not_followed(code: int, wire: str, tmp_path: Path) -> None:
    async with FaultServer(fs.answer()) as elsewhere:
        script = (fs.redirect(f"{elsewhere.url}/v1/messages", code),)
        async with stage(tmp_path, script, formats=wire) as (proxy, (a,)):
            fails(502, "api_error")(await ask(proxy))
            fails(502, "api_error")(await ask(proxy, stream=False))
    assert (a.count, elsewhere.connections) == (2, 0)


# Keys.

POOL = {"providers": {"A": {"api_key": ["sk-test-key-one", "sk-test-key-two"]}}}


def key_of(call: fs.UpstreamCall) -> str:
    return call.header("x-api-key") or (call.header("authorization") or "").removeprefix("Bearer ")


@pytest.mark.parametrize(
    "refusal", [*map(fs.status, (401, 402, 403)), LIMITED_30, NO_MONEY], ids=["401", "402", "403", "429", "no money"]
)  # fmt: skip
@BOTH
async def test_a_bad_key_rests_and_the_next_key_is_tried_first(
    refusal: fs.Behaviour, wire: str, tmp_path: Path
) -> None:
    script = (fs.by_key("sk-test-key-one", refusal=refusal, otherwise=fs.answer()),)
    async with stage(tmp_path, script, OK, formats=wire, **POOL) as (proxy, (a, b)):
        for _ in range(4):
            full("A")(await ask(proxy))
    keys = [key_of(call) for call in a.calls]
    assert keys.count("sk-test-key-one") == 1 and keys.count("sk-test-key-two") == 4
    assert b.count == 0


async def test_a_pool_of_bad_keys_leads_to_the_next_target(tmp_path: Path) -> None:
    async with stage(tmp_path, (fs.status(401),), OK, **POOL) as (proxy, (a, b)):
        full("B")(await ask(proxy))
        full("B")(await ask(proxy))
    assert (a.count, b.count) == (2, 2)


@pytest.mark.parametrize(
    "refusal",
    [fs.status(401), LIMITED_30, fs.status(429, [("retry-after", "1")])],
    ids=["refused", "limited", "limited-for-a-moment"],
)
async def test_the_next_key_of_a_pool_has_its_two_tries(refusal: fs.Behaviour, tmp_path: Path) -> None:
    refused = fs.by_key("sk-test-key-one", refusal=refusal, otherwise=fs.status(500))
    well = fs.by_key("sk-test-key-one", refusal=refusal, otherwise=fs.answer())
    async with stage(tmp_path, (refused, refused, well), **POOL) as (proxy, (a,)):
        full("A")(await ask(proxy))
    assert [key_of(call)[-3:] for call in a.calls] == ["one", "two", "two"]


async def test_what_a_key_has_tried_is_not_taken_from_the_next(tmp_path: Path) -> None:
    script = (fs.status(500), fs.status(401), fs.status(500), fs.answer())
    async with stage(tmp_path, script, **POOL) as (proxy, (a,)):
        full("A")(await ask(proxy))
    assert [key_of(call)[-3:] for call in a.calls] == ["one", "one", "two", "two"]


@BOTH
async def test_after_a_failure_the_other_keys_of_a_pool_are_not_tried(wire: str, tmp_path: Path) -> None:
    async with stage(tmp_path, (fs.status(500),), OK, formats=wire, **POOL) as (proxy, (a, b)):
        full("B")(await ask(proxy))
    assert (len({key_of(call) for call in a.calls}), a.count, b.count) == (1, 2, 1)


@pytest.mark.parametrize(("code", "times"), [(429, 1), (401, 2), (403, 2), (500, 2)])
async def test_a_clients_own_key_rests_for_that_client_alone(code: int, times: int, tmp_path: Path) -> None:
    refusal = fs.status(code, [("retry-after", "30")] if code == 429 else [])
    script = (fs.by_key("sk-test-of-anna", refusal=refusal, otherwise=fs.answer()),)
    own = {"providers": {"A": {"api_key": "passthrough", "max_retries": 0}}}
    async with stage(tmp_path, script, **own) as (proxy, (a,)):
        for _ in range(2):
            fails(code)(await ask(proxy, headers={"x-api-key": "sk-test-of-anna"}))
            full("A")(await ask(proxy, headers={"x-api-key": "sk-test-of-bert"}))
    assert [key_of(call)[-4:] for call in a.calls].count("anna") == times


async def test_a_refused_key_rests_for_every_model_and_a_limit_for_one(tmp_path: Path) -> None:
    for code, calls in ((401, 1), (429, 2)):
        folder = tmp_path / str(code)
        folder.mkdir()
        refusal = fs.status(code, [("retry-after", "30")])
        async with stage(folder, (refusal,), **NO_RETRY) as (proxy, (a,)):
            await ask(proxy, body=message_body(model="A/one"))
            reply = await ask(proxy, body=message_body(model="A/two"))
            rest = 300 if code == 401 else 30
            says = f"limits requests or refuses its key (A said {code})"
            fails(429, says=says, retry_after=(rest - 10, rest))(
                await ask(proxy, body=message_body(model="A/one"))
            )
        assert (a.count, reply.status) == (calls, 429)


async def test_keys_of_a_pool_take_turns(tmp_path: Path) -> None:
    async with stage(tmp_path, OK, **POOL) as (proxy, (a,)):
        for _ in range(4):
            full("A")(await ask(proxy))
    assert sorted(key_of(call) for call in a.calls) == ["sk-test-key-one"] * 2 + ["sk-test-key-two"] * 2


async def test_at_most_four_tries_of_one_request(tmp_path: Path) -> None:
    keys = {"providers": {"A": {"api_key": [f"sk-test-key-{n}" for n in range(9)]}}}
    async with stage(tmp_path, (fs.status(401),), OK, **keys) as (proxy, (a, b)):
        await ask(proxy)
        assert a.count + b.count <= 4


# Breakers.


async def break_a(proxy: Proxy, sees: Check) -> None:
    """Five failures of A, which are seen so, and then the time after which its breaker is half-open."""
    for _ in range(5):
        sees(await ask(proxy))
    age(proxy)


def age(proxy: Proxy) -> None:
    """Lets the time pass after which open breakers become half-open."""
    for breaker in proxy.state.relay.breakers.values():
        breaker.open_until = min(breaker.open_until, time.monotonic())


@BOTH
async def test_five_failures_in_a_row_open_the_breaker(wire: str, tmp_path: Path) -> None:
    async with stage(tmp_path, (fs.status(500),), OK, formats=wire, **NO_RETRY) as (proxy, (a, b)):
        for _ in range(8):
            full("B")(await ask(proxy))
    assert (a.count, b.count) == (5, 8)


@BOTH
async def test_a_request_above_a_minutes_tokens_is_told_at_once(wire: str, tmp_path: Path) -> None:
    words = "Request too large for model `x` on tokens per minute (TPM): Limit 8000, Requested 32979"
    async with stage(tmp_path, (fs.status(413, message=words),), formats=wire) as (proxy, (a,)):
        fails(429, "rate_limit_error", says=words, should_retry="false")(await ask(proxy))
    assert a.count == 1


async def test_a_404_that_shows_its_words_opens_no_breaker(tmp_path: Path) -> None:
    script = (fs.status(404, message="No endpoints found that support tool use."),)
    async with stage(tmp_path, script, formats="openai", **NO_RETRY) as (proxy, (a,)):
        for _ in range(7):  # Claude Code sends six for an unknown 400
            fails(400, "invalid_request_error", says="No endpoints found")(await ask(proxy))
    assert a.count == 7


async def test_a_404_of_anthropics_format_goes_on_as_it_came(tmp_path: Path) -> None:
    body = b'{"type":"error", "error":{"type":"not_found_error","message":"No allowed providers"}, "request_id":"r"}'
    async with stage(tmp_path, (fs.raw(404, [fs.JSON_TYPE], body),)) as (proxy, (a,)):
        reply = await ask(proxy)
    assert (reply.status, reply.body, a.count) == (404, body, 1)


@pytest.mark.parametrize("asked", [0, 1], ids=["it is known", "it is learnt"])
async def test_a_web_search_goes_to_a_target_that_can(asked: int, tmp_path: Path) -> None:
    quirks = {"web_search": "options" if asked else ""}
    providers = {"A": {"quirks": quirks}, "B": {"type": "anthropic"}}
    script = (fs.status(400, message="Unknown parameter: 'web_search_options'."),)
    async with stage(tmp_path, script, OK, formats="openai", providers=providers) as (proxy, (a, b)):
        for _ in range(2):
            full("B")(await ask(proxy, body=message_body(tools=[SEARCH])))
    assert (a.count, b.count) == (asked, 2)


async def test_what_an_open_breaker_guards_is_not_tried_last_either(tmp_path: Path) -> None:
    async with stage(tmp_path, (fs.status(500),), (*OK * 5, fs.status(503)), **NO_RETRY) as (proxy, (a, b)):
        for _ in range(5):
            full("B")(await ask(proxy))
        fails(503)(await ask(proxy))
    assert (a.count, b.count) == (5, 6)


@BOTH
async def test_a_breaker_that_opens_between_two_tries_leads_to_the_next_target(
    wire: str, tmp_path: Path
) -> None:
    async with stage(tmp_path, (fs.status(500),), OK, formats=wire) as (proxy, (a, b)):
        for _ in range(4):  # of two tries each, but the third, whose first try is the fifth failure
            full("B")(await ask(proxy))
        assert (a.count, b.count) == (5, 4)
        assert proxy.state.relay.health_of("A").retrying == 0


async def test_a_breaker_that_opens_during_back_off_leads_to_the_next_target(tmp_path: Path) -> None:
    async with stage(tmp_path, (fs.status(503, [("retry-after", "1")]),), OK) as (proxy, (a, b)):
        asked = asyncio.create_task(ask(proxy))
        await until(lambda: proxy.state.relay.health_of("A").retrying == 1, "it waits")
        for breaker in proxy.state.relay.breakers.values():
            breaker.trip(time.monotonic())
        full("B")(await asked)
        assert (a.count, b.count, proxy.state.relay.health_of("A").retrying) == (1, 1, 0)


async def test_half_of_ten_failures_open_the_breaker(tmp_path: Path) -> None:
    script = [fs.status(500) if n % 2 else fs.answer() for n in range(10)]
    async with stage(tmp_path, tuple(script), OK, **NO_RETRY) as (proxy, (a, _)):
        for _ in range(14):
            assert (await ask(proxy)).status == 200
    assert a.count == 10


@pytest.mark.parametrize(("code", "words"), [(400, ""), (400, TOO_LONG), (413, ""), (422, ""), (429, "")])
async def test_faults_of_the_request_do_not_open_the_breaker(code: int, words: str, tmp_path: Path) -> None:
    behaviour = fs.status(code, [("retry-after", "0")] if code == 429 else [], message=words)
    async with stage(tmp_path, (behaviour,), **NO_RETRY) as (proxy, (a,)):
        for _ in range(12):
            fails(code)(await ask(proxy))
    assert a.count == 12


async def test_clients_that_hang_up_do_not_open_the_breaker(tmp_path: Path) -> None:
    async with stage(tmp_path, (*[fs.stall()] * 7, fs.answer()), **NO_RETRY) as (proxy, (a,)):
        for number in range(1, 8):
            await hang_up(proxy, a.called(number))
            await a.cancelled(number)
            await proxy.idle()
        full("A")(await ask(proxy))


@BOTH
async def test_a_half_open_breaker_lets_one_probe_through(wire: str, tmp_path: Path) -> None:
    script = (*[fs.status(500)] * 5, fs.gated_answer(0))
    async with stage(tmp_path, script, OK, formats=wire, **NO_RETRY) as (proxy, (a, b)):
        await break_a(proxy, full("B"))
        asked = [asyncio.create_task(ask(proxy)) for _ in range(20)]
        await a.called(6)
        await until(lambda: sum(task.done() for task in asked) == 19, "the others were answered by B")
        a.open_gate()
        replies = await asyncio.gather(*asked)
        assert sorted(reply.headers["x-ccmux-provider"] for reply in replies) == ["A"] + ["B"] * 19
        assert all(reply.text == HELLO for reply in replies)
        assert (a.count, b.count) == (6, 24)
        full("A")(await ask(proxy))  # the probe has closed it
        await proxy.idle()
    assert sum(-entry["amount_microusd"] for entry in proxy.books.ledger()) == 24 * FULL["B"] + 2 * FULL["A"]


async def test_a_failed_probe_opens_the_breaker_again_for_longer(tmp_path: Path) -> None:
    async with stage(tmp_path, (fs.status(500),), OK, **NO_RETRY) as (proxy, (a, _)):
        for expected in (5, 6, 7):
            for _ in range(8):
                full("B")(await ask(proxy))
            assert a.count == expected
            age(proxy)
        (breaker,) = [b for (name, *_), b in proxy.state.relay.breakers.items() if name == "A"]
        assert breaker.interval == 40


@BOTH
async def test_with_all_breakers_open_the_answer_comes_at_once(wire: str, tmp_path: Path) -> None:
    broken = (fs.status(500),)
    async with stage(tmp_path, broken, broken, formats=wire, **NO_RETRY) as (proxy, servers):
        for _ in range(5):
            fails(500)(await ask(proxy))
        replies = [await ask(proxy) for _ in range(20)]
        for reply in replies:
            fails(529, "overloaded_error", retry_after=(1, 60))(reply)
        assert min(reply.seconds for reply in replies) < 0.05
        assert [server.count for server in servers] == [5, 5]
        for breaker in proxy.state.relay.breakers.values():
            breaker.open_until += 200
        fails(529, retry_after=(60, 60))(await ask(proxy))
        age(proxy)
        await ask(proxy)
        assert [server.count for server in servers] == [6, 6]


async def test_a_single_target_gets_one_probe_per_interval(tmp_path: Path) -> None:
    script = (*[fs.status(500)] * 5, fs.gated_answer(0))
    async with stage(tmp_path, script, **NO_RETRY) as (proxy, (a,)):
        await break_a(proxy, fails(500))
        probe = asyncio.create_task(ask(proxy))
        await a.called(6)
        for reply in await ask_many(proxy, 10):
            fails(529, "overloaded_error", retry_after=(1, 60))(reply)
        a.open_gate()
        full("A")(await probe)
        assert a.count == 6


async def test_a_probe_that_streams_holds_nobody_up(tmp_path: Path) -> None:
    script = (*[fs.status(500)] * 5, fs.gated_answer(), fs.answer())
    async with stage(tmp_path, script, **NO_RETRY) as (proxy, (a,)):
        await break_a(proxy, fails(500))
        probe = asyncio.create_task(ask(proxy))
        await until(lambda: any(c.first_content for c in proxy.state.calls.values()), "the probe has content")
        full("A")(await ask(proxy))
        a.open_gate()
        full("A")(await probe)


async def test_failures_of_one_moment_open_the_breaker_once(tmp_path: Path) -> None:
    first = fs.bytes_then(fs.Gate(), *fs.status(500).steps(fs.UpstreamCall(0, 0)))
    async with stage(tmp_path, (first,), **NO_RETRY) as (proxy, (a,)):
        asked = [asyncio.create_task(ask(proxy)) for _ in range(20)]
        await a.called(20)
        a.open_gate()
        for reply in await asyncio.gather(*asked):
            fails(500)(reply)
        (breaker,) = proxy.state.relay.breakers.values()
        assert breaker.interval == 10


async def test_a_probe_whose_client_hangs_up_makes_way_for_the_next(tmp_path: Path) -> None:
    script = (*[fs.status(500)] * 5, fs.stall(), fs.answer())
    async with stage(tmp_path, script, **NO_RETRY) as (proxy, (a,)):
        await break_a(proxy, fails(500))
        await hang_up(proxy, a.called(6))
        await a.cancelled(6)
        await proxy.idle()
        full("A")(await ask(proxy))


@pytest.mark.parametrize("code", [400, 429])
async def test_a_probe_that_is_refused_makes_way_for_the_next(code: int, tmp_path: Path) -> None:
    refusal = fs.status(code, [("retry-after", "0")])
    async with stage(tmp_path, (*[fs.status(500)] * 5, refusal, fs.answer()), **NO_RETRY) as (proxy, _):
        await break_a(proxy, fails(500))
        fails(code)(await ask(proxy))
        full("A")(await ask(proxy))


# Connections and budgets.


async def test_a_provider_without_tls_is_one_that_cannot_be_reached(tmp_path: Path) -> None:
    plain = fs.Behaviour(lambda call: [fs.Send(b"220 mail ready\r\n"), fs.End()], at_accept=True)
    async with FaultServer(plain) as a, FaultServer() as b:
        text = config_text({"A": a.url.replace("http", "https"), "B": b.url})
        async with in_process(tmp_path, text) as proxy:
            full("B")(await ask(proxy))
            assert [o["error"] for o in proxy.state.relay.health_of("A").outcomes] == ["connect"]


@BOTH
async def test_a_provider_has_a_proxy_of_its_own(wire: str, tmp_path: Path) -> None:
    async with FaultServer() as way, FaultServer() as b:
        urls = {"A": "http://a.invalid/v1" if wire == "openai" else "http://a.invalid", "B": b.url}
        text = config_text(urls, formats=wire, providers={"A": {"proxy": way.url}})
        async with in_process(tmp_path, text) as proxy:
            full("A")(await ask(proxy))
            full("A")(await ask(proxy, stream=False))
    assert all(call.path.startswith("http://a.invalid/v1/") for call in way.calls)
    assert (way.count, b.count) == (2, 0)


@pytest.mark.parametrize(
    ("base", "behaviour", "words"),
    [
        (
            "https://a.invalid",
            fs.status(407),
            "the proxy on the way to provider A answered 407; check proxy of",
        ),
        (
            "https://a.invalid",
            None,
            "the proxy on the way to provider A could not be reached; check proxy of",
        ),
        ("http://a.invalid", None, "the proxy on the way to provider A could not be reached; check proxy of"),
    ],
    ids=["refuses", "is not there", "is not there, without TLS"],
)
async def test_a_proxy_that_fails_is_named(
    base: str, behaviour: fs.Behaviour | None, words: str, tmp_path: Path
) -> None:
    async with FaultServer(behaviour or fs.answer()) as way:
        with fs.refusing_address() as nowhere:
            limits = {"A": {"proxy": way.url if behaviour else nowhere}}
            async with in_process(tmp_path, config_text({"A": base}, providers=limits)) as proxy:
                fails(502, says=words)(await ask(proxy))


async def test_a_proxy_whose_name_is_unknown_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    resolve = socket.getaddrinfo

    def unknown(host: Any, *more: Any, **options: Any) -> Any:
        if host == "way.invalid":
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return resolve(host, *more, **options)

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    for limits, words in (
        ({}, "provider A could"),
        ({"proxy": "http://way.invalid"}, "the proxy on the way to provider A could"),
    ):
        folder = tmp_path / str(len(limits))
        folder.mkdir()
        text = config_text({"A": "http://way.invalid"}, providers={"A": limits})
        async with in_process(folder, text) as proxy:
            fails(502, says=f"{words} not be reached")(await ask(proxy))


async def test_a_proxy_of_another_kind_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    async with FaultServer(fs.close_before_status()) as way:
        monkeypatch.setenv("http_proxy", way.url.replace("http", "socks5h"))
        async with in_process(tmp_path, config_text({"A": "http://socks.invalid"})) as proxy:
            fails(502, says="provider A speaks socks5h: name an http one in HTTPS_PROXY")(await ask(proxy))


@pytest.mark.parametrize(
    ("said", "words"),
    [
        (b"SSH-2.0-OpenSSH_9.2\r\n", "Bad status line"),
        (fs.head(200, [("x", "sk-test-key-of-A\0")]), "Invalid HTTP header"),
    ],
)
async def test_what_is_no_http_is_called_so(said: bytes, words: str, tmp_path: Path) -> None:
    async with stage(tmp_path, (fs.bytes_then(fs.Send(said), fs.End()),)) as (proxy, _):
        wanted = f"what provider A answers is no good HTTP ({words}); check its base_url"
        fails(502, says=wanted)(await ask(proxy))


@BOTH
async def test_a_long_header_of_an_upstream_is_read(wire: str, tmp_path: Path) -> None:
    policy = ("Content-Security-Policy", "default-src " + "'sha256-abc' " * 2000)
    async with stage(tmp_path, (fs.answer(headers=[policy]),), formats=wire) as (proxy, _):
        full()(await ask(proxy))


@BOTH
async def test_a_stale_connection_is_replaced_at_once_and_uncounted(wire: str, tmp_path: Path) -> None:
    async def go(folder: Path) -> float:
        script = (fs.answer(), fs.reset_on_reuse(), fs.answer())
        async with stage(folder, script, formats=wire) as (proxy, (a,)):
            full()(await ask(proxy))
            again = await ask(proxy)
            full()(again)
            await proxy.idle()
            assert a.count == 3
            assert a.calls[0].connection == a.calls[1].connection != a.calls[2].connection
            assert again.headers["x-ccmux-attempts"] == "1"
            assert [b.failures for b in proxy.state.relay.breakers.values()] == [0]
        assert [entry["amount_microusd"] for entry in proxy.books.ledger()] == [-FULL["A"]] * 2
        return again.seconds

    await soon_enough(go, tmp_path, 0.25)


def test_a_connection_is_asked_for_signs_of_life() -> None:
    with ccmux.open_socket((socket.AF_INET, socket.SOCK_STREAM, 0, "", ("127.0.0.1", 1))) as made:
        assert made.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        options = {
            getattr(socket, name): value for name, value in ccmux.KEEP_ALIVE.items() if hasattr(socket, name)
        }
        assert {o: made.getsockopt(socket.IPPROTO_TCP, o) for o in options} == options != {}


async def test_the_retry_after_a_stale_connection_does_not_take_another_stale_one(tmp_path: Path) -> None:
    stale = fs.reset_on_reuse()
    async with stage(tmp_path, (fs.gated_whole(), fs.gated_whole(), stale, stale, fs.answer())) as (
        proxy,
        (a,),
    ):
        asked = [asyncio.create_task(ask(proxy, stream=False)) for _ in range(2)]
        await a.called(2)
        a.open_gate()
        await asyncio.gather(*asked)
        reply = await ask(proxy)
        full()(reply)
        assert (a.count, reply.headers["x-ccmux-attempts"]) == (4, "1")


@BOTH
async def test_what_an_upstream_says_unasked_is_no_answer(wire: str, tmp_path: Path) -> None:
    """On a connection that is kept for the next request."""

    def steps(call: fs.UpstreamCall) -> Any:
        yield from fs.stream_of(fs.events_for(call))
        yield fs.Gate()
        yield from fs.stream_of(fs.events_for(call, pieces=("another's words",)))

    async with stage(tmp_path, (fs.Behaviour(steps), fs.answer()), formats=wire) as (proxy, (a,)):
        full()(await ask(proxy))
        a.open_gate()
        kept = proxy.state.relay.session.connector._conns
        await until(lambda: any(c.should_close for c, _ in next(iter(kept.values()))), "it has come")
        reply = await ask(proxy)
        full()(reply)
        assert (a.count, a.connections, reply.headers["x-ccmux-attempts"]) == (2, 2, "1")


async def test_a_failing_provider_costs_little_time(tmp_path: Path) -> None:
    """Connection refused, then an open breaker: less than 50 ms more than the healthy one alone."""
    async with stage(tmp_path, fs.refusing_address, OK) as (proxy, _):
        slowed = [(await ask(proxy)).seconds for _ in range(12)]
    other = tmp_path / "healthy"
    other.mkdir()
    async with stage(other, OK) as (proxy, _):
        plain = [(await ask(proxy)).seconds for _ in range(12)]
    assert min(slowed[:5]) - min(plain) < 0.05
    assert min(slowed[6:]) - min(plain) < 0.05


@BOTH
async def test_a_full_provider_counts_as_resting(wire: str, tmp_path: Path) -> None:
    limits = {"providers": {"A": {"max_concurrent": 2}}}
    async with stage(tmp_path, (fs.gated_answer(),), OK, formats=wire, **limits) as (proxy, (a, b)):
        asked = [asyncio.create_task(ask(proxy)) for _ in range(2)]
        await a.called(2)
        for reply in await ask_many(proxy, 3):
            full("B")(reply)
        a.open_gate()
        for reply in await asyncio.gather(*asked):
            full("A")(reply)
    assert (a.count, b.count) == (2, 3)


async def test_a_request_that_waits_to_be_tried_again_keeps_its_place(tmp_path: Path) -> None:
    script = (fs.status(503, [("retry-after", "1")]), fs.answer())
    async with stage(tmp_path, script, OK, providers={"A": {"max_concurrent": 1}}) as (proxy, (a, b)):
        asked = asyncio.create_task(ask(proxy))
        await until(lambda: proxy.state.relay.health_of("A").retrying == 1, "it waits")
        full("B")(await ask(proxy))
        full("A")(await asked)
    assert (a.count, b.count) == (2, 1)


async def test_with_every_provider_full_the_answer_is_529(tmp_path: Path) -> None:
    limits = {"providers": {"A": {"max_concurrent": 2}}}
    async with stage(tmp_path, (fs.gated_answer(),), **limits) as (proxy, (a,)):
        asked = [asyncio.create_task(ask(proxy)) for _ in range(2)]
        await a.called(2)
        fails(529, "overloaded_error", retry_after=(1, 60))(await ask(proxy))
        a.open_gate()
        await asyncio.gather(*asked)


async def test_retries_do_not_multiply(tmp_path: Path) -> None:
    """Twenty requests that fail at once: three may be tried again, and while those wait nobody else is."""
    first = fs.bytes_then(fs.Gate(), *fs.status(500).steps(fs.UpstreamCall(0, 0)))
    async with stage(tmp_path, (*[first] * 20, fs.stall())) as (proxy, (a,)):
        asked = {asyncio.create_task(ask(proxy)) for _ in range(20)}
        await a.called(20)
        a.open_gate()
        await a.called(23)
        ended: set[asyncio.Task[Any]] = set()
        while len(ended) < 17:
            ended |= (await asyncio.wait(asked - ended, return_when=asyncio.FIRST_COMPLETED))[0]
        assert [task.result().status for task in ended] == [500] * 17
        assert a.count == 23 and proxy.state.relay.health_of("A").retrying == 3
        for task in asked - ended:
            task.cancel()
        await proxy.idle()
        assert proxy.state.relay.health_of("A").retrying == 0


async def test_a_retry_that_has_content_leaves_the_budget(tmp_path: Path) -> None:
    async with stage(tmp_path, (fs.status(500), fs.gated_answer())) as (proxy, (a,)):
        asked = asyncio.create_task(ask(proxy))
        await a.called(2)
        await until(lambda: all(c.first_content for c in proxy.state.calls.values()), "content has come")
        assert proxy.state.relay.health_of("A").retrying == 0
        a.open_gate()
        full()(await asked)


async def test_every_retry_leaves_the_budget(tmp_path: Path) -> None:
    script = (fs.status(500), fs.status(500), fs.answer())
    async with stage(tmp_path, script, providers={"A": {"max_retries": 2}}) as (proxy, (a,)):
        full()(await ask(proxy))
        await proxy.idle()
        assert (a.count, proxy.state.relay.health_of("A").retrying) == (3, 0)


# What is told of it.


async def get(proxy: Proxy, path: str) -> str:
    headers = {"Authorization": f"Bearer {ADMIN_TOKEN}"}
    async with aiohttp.ClientSession(headers=headers) as client, client.get(f"{proxy.url}{path}") as reply:
        assert reply.status == 200
        return await reply.text()


async def health(proxy: Proxy, provider: str = "A") -> dict[str, Any]:
    """What /health says of a provider; the admin page is told the same."""
    found: dict[str, Any] = json.loads(await get(proxy, "/health"))["providers"][provider]
    told = json.loads(await get(proxy, "/admin/api/state"))["providers"][provider]
    assert found | {"next_try_s": None} == {key: told[key] for key in found} | {"next_try_s": None}
    return found


async def test_health_keeps_the_last_fifty_tries(tmp_path: Path) -> None:
    script = (fs.status(500), *[fs.answer()] * 3, fs.status(500), *OK)
    async with stage(tmp_path, script, **NO_RETRY) as (proxy, _):
        assert await health(proxy) == {
            "state": "ok", "problem": "", "active": 0, "latency_ms": None, "next_try_s": None, "outcomes": [],
        }  # fmt: skip
        for _ in range(54):
            await ask(proxy)
        told = await health(proxy)
    outcomes = told["outcomes"]
    assert len(outcomes) == 50 and [o["ok"] for o in outcomes[:2]] == [False, True]
    assert (outcomes[0]["status"], outcomes[0]["error"], outcomes[1]["status"]) == (500, "http_500", 200)
    good = [o["ms"] for o in outcomes if o["ok"]]
    assert (told["state"], told["latency_ms"]) == ("ok", round(sum(good) / len(good)))
    assert abs(outcomes[-1]["time"] - time.time()) < 60


async def test_health_tells_what_rests_and_what_is_broken(tmp_path: Path) -> None:
    limited = (fs.status(429, [("retry-after", "30")]),)
    async with stage(tmp_path, (fs.status(500),), limited, **NO_RETRY) as (proxy, _):
        for _ in range(5):
            await ask(proxy)
        told = await health(proxy)
        assert told["state"] == "open" and 4 < told["next_try_s"] <= 11
        told = await health(proxy, "B")
        assert told["state"] == "cooling" and 20 < told["next_try_s"] <= 30
        fails(529, retry_after=(4, 11))(await ask(proxy))  # until the earlier of the two
        age(proxy)
        told = await health(proxy)
        assert (told["state"], told["next_try_s"]) == ("half-open", 0)
        a = proxy.state.config.provider("A")
        text = config_text({"A": a.base_url}, providers={"A": {"api_key": "sk-test-another"}})
        proxy.config_file.write_text(text)
        ccmux.reload_config(proxy.state)
        assert (await health(proxy))["state"] == "ok"  # another key has another breaker
        proxy.config_file.write_text(config_text({"A": a.base_url}, providers={"A": {"enabled": False}}))
        ccmux.reload_config(proxy.state)
        assert (await health(proxy))["state"] == "disabled"
        fails(500, says="enabled = false", should_retry="false")(await ask(proxy))


@BOTH
async def test_metrics_count_what_happened(wire: str, tmp_path: Path) -> None:
    script = (*[fs.status(500)] * 5, fs.gated_answer())
    limits = {"providers": {"A": {"max_retries": 0}}}
    async with stage(tmp_path, script, OK, formats=wire, **limits) as (proxy, (a, _)):
        for _ in range(6):
            full("B")(await ask(proxy))
        age(proxy)
        asked = asyncio.create_task(ask(proxy))
        await a.called(6)
        during = samples(await get(proxy, "/metrics"))
        a.open_gate()
        await asked
        await proxy.idle()
        after = samples(await get(proxy, "/metrics"))
    key = ccmux.key_id("sk-test-key-of-A")
    state = f'ccmux_breaker_state{{provider="A",model="up-A",key="{key}"}}'
    assert (during["ccmux_requests_in_flight"], during[state]) == (1, 1)
    for name, value in {
        'ccmux_requests_total{provider="A",model="up-A",status="200"}': 1,
        'ccmux_requests_total{provider="B",model="up-B",status="200"}': 6,
        'ccmux_upstream_attempts_total{provider="A",model="up-A"}': 6,
        'ccmux_upstream_attempts_total{provider="B",model="up-B"}': 6,
        'ccmux_upstream_errors_total{provider="A",error="http_500"}': 5,
        'ccmux_tokens_total{kind="input",model="up-B"}': 600,
        'ccmux_tokens_total{kind="output",model="up-A"}': 50,
        'ccmux_cost_microusd_total{model="up-A"}': FULL["A"],
        'ccmux_cost_microusd_total{model="up-B"}': 6 * FULL["B"],
        'ccmux_first_token_seconds_count{provider="B"}': 6,
        "ccmux_requests_in_flight": 0,
        state: 0,
    }.items():
        assert after[name] == value, name


def samples(text: str) -> dict[str, float]:
    lines = [line.rpartition(" ") for line in text.splitlines() if not line.startswith("#")]
    return {name: float(value) for name, _, value in lines}


# Sessions.


def session(name: str) -> dict[str, Any]:
    return {"headers": {"x-claude-code-session-id": name}}


@BOTH
async def test_a_session_stays_where_it_was_answered(wire: str, tmp_path: Path) -> None:
    script = (fs.status(529), fs.answer())
    async with stage(tmp_path, script, OK, formats=wire) as (proxy, (a, b)):
        full("B")(await ask(proxy, **session("one")))
        for _ in range(3):
            full("B")(await ask(proxy, **session("one")))
        full("A")(await ask(proxy, **session("two")))
        full("A")(await ask(proxy))
        for given in ('{"session_id": "one"}', "user_x_account__session_one"):  # older clients
            full("B")(await ask(proxy, body=message_body(metadata={"user_id": given})))
    assert (a.count, b.count) == (3, 6)


async def test_a_session_stays_with_its_key_of_a_pool(tmp_path: Path) -> None:
    """What an upstream has cached of a conversation belongs to the key that paid for it."""
    script = [fs.answer()] * 6 + [fs.status(429, [("retry-after", "30")]), fs.answer()]
    async with stage(tmp_path, script, OK, **POOL) as (proxy, (a, _)):
        for name in ("one", "two", "one", "one", "two", "two", "one", "one"):
            full("A")(await ask(proxy, **session(name)))
    keys = "".join(key_of(call)[-3] for call in a.calls)  # of one and two: o and t
    assert keys in ("otoottott", "tottootoo")


async def test_a_session_leaves_a_target_that_fell_ill(tmp_path: Path) -> None:
    script_b = (fs.answer(), fs.status(529), fs.answer())
    async with stage(tmp_path, (fs.status(529), fs.answer()), script_b) as (proxy, _):
        full("B")(await ask(proxy, **session("one")))
        full("A")(await ask(proxy, **session("one")))
        full("A")(await ask(proxy, **session("one")))


# Overflow.

WORDINGS = [
    "prompt is too long: 250000 tokens > 200000 maximum",
    "This model's maximum context length is 8192 tokens. However, your messages resulted in 9000 tokens.",
    "input is too long for requested model",
    "The request exceeds the available context size",
]


@pytest.mark.parametrize("words", WORDINGS)
@BOTH
async def test_an_overflow_goes_to_a_larger_target(words: str, wire: str, tmp_path: Path) -> None:
    sizes = {"context": {"A": 8192, "B": 1_000_000}}
    script = (fs.status(400, type="invalid_request_error", message=words),)
    async with stage(tmp_path, script, OK, formats=wire, **sizes) as (proxy, (a, b)):
        full("B")(await ask(proxy))
        full("B")(await ask(proxy, stream=False))
    assert (a.count, b.count) == (2, 2)


@pytest.mark.parametrize("words", WORDINGS)
@BOTH
async def test_an_overflow_without_a_larger_target_is_told_in_the_clients_words(
    words: str, wire: str, tmp_path: Path
) -> None:
    sizes = {"context": {"A": 8192, "B": 8192}}
    script = (fs.status(400, type="invalid_request_error", message=words),)
    async with stage(tmp_path, script, OK, formats=wire, **sizes) as (proxy, (a, b)):
        reply = await ask(proxy)
    fails(400, "invalid_request_error", says="prompt is too long: ")(reply)
    assert (a.count, b.count) == (1, 0)


@pytest.mark.parametrize("stream", [True, False])
@BOTH
async def test_an_overflow_told_in_a_200_is_told_by_the_models_context(
    stream: bool, wire: str, tmp_path: Path
) -> None:
    told = b'{"type": "error", "error": {"type": "invalid_request_error", "message": "Input is too long"}}'
    script = (fs.raw(200, [("Content-Type", "application/json")], told),)
    async with stage(tmp_path, script, formats=wire, context={"A": 8192}) as (proxy, _):
        reply = await ask(proxy, stream=stream)
    fails(400, "invalid_request_error", says="prompt is too long: 8193 tokens > 8192 maximum")(reply)


@BOTH
async def test_a_beta_request_is_one_upstream_too(wire: str, tmp_path: Path) -> None:
    async with stage(tmp_path, OK, formats=wire) as (proxy, (a,)):
        for query in ("?beta=true", "?x=1", ""):
            full()(await ask(proxy, f"/v1/messages{query}", stream=False))
    asked = [call.path.partition("?")[2] for call in a.calls]
    assert asked == (["beta=true", "", ""] if wire == "anthropic" else ["", "", ""])


async def test_beta_stands_behind_the_query_of_an_address(tmp_path: Path) -> None:
    async with FaultServer(*OK) as a:
        text = config_text({"A": f"{a.url}?version=1"}, formats="anthropic")
        async with in_process(tmp_path, text) as proxy:
            full()(await ask(proxy, "/v1/messages?beta=true", stream=False))
    assert a.calls[0].path.partition("?")[2] == "version=1&beta=true"


async def test_an_answer_of_no_content_that_ends_well_is_not_taken_for_none(tmp_path: Path) -> None:
    begin, *_, delta, stop = fs.anthropic_events()
    script = (fs.Behaviour(lambda call: fs.stream_of([begin, delta, stop])),)
    async with stage(tmp_path, script, OK) as (proxy, (a, b)):
        reply = await ask(proxy)
    assert (reply.status, reply.headers["x-ccmux-provider"]) == (200, "A")
    assert reply.kinds == ["message_start", "message_delta", "message_stop"]
    assert (a.count, b.count) == (1, 0)


@BOTH
async def test_auto_mode_needs_an_upstream_of_anthropics_format(wire: str, tmp_path: Path) -> None:
    """Claude Code asks again without `safeguards`, once a 400 names them, and classifies by itself."""
    guards = [{"type": "x", "classifier_context": {"permission_mode": "auto"}}]
    async with stage(tmp_path, OK, formats=wire) as (proxy, (a,)):
        reply = await ask(proxy, body=message_body(safeguards=guards))
    if wire == "openai":
        fails(400, "invalid_request_error", says="safeguards: Extra inputs are not permitted")(reply)
        assert a.count == 0
    else:
        full()(reply)
        assert a.calls[0].json["safeguards"] == guards


@pytest.mark.parametrize("kind", ["anthropic", "openai", "own"])
async def test_a_thread_is_kept_by_anthropics_own_api_alone(kind: str, tmp_path: Path) -> None:
    """Its SDKs send the whole conversation after that code; what ignored the field would lose what was said."""
    thread = {"type": "continue", "previous_message_id": "msg_1"}
    providers = {"A": {"type": "anthropic" if kind == "own" else kind}}
    async with stage(tmp_path, OK, providers=providers) as (proxy, (a,)):
        if kind == "own":
            there = {"A": {"proxy": a.url}}
            text = config_text({"A": "http://api.anthropic.com"}, providers=there)
            proxy.state.config = ccmux.load_config(text, {})
        reply = await ask(proxy, body=message_body(thread=thread))
        if kind == "own":
            full()(reply)
            assert a.calls[0].json["thread"] == thread
            return
        fails(400, "invalid_request_error", says="send all of it, without `thread`")(reply)
        assert reply.json["error"]["details"] == {"error_code": "thread_unsupported_request"}
        assert a.count == 0
        full()(await ask(proxy, body=message_body(thread=None)))


@pytest.mark.parametrize("first", ["anthropic", "openai"])
async def test_auto_mode_goes_to_no_target_of_another_format(first: str, tmp_path: Path) -> None:
    """Nobody would classify: the field has no form there."""
    formats = {"A": {"type": first}, "B": {"type": "openai"}, "C": {"type": "anthropic"}}
    async with stage(tmp_path, (fs.status(529), fs.status(529), fs.answer()), OK, providers=formats) as (
        proxy,
        (a, b),
    ):
        if first == "openai":  # and an Anthropic-format target behind it
            text = config_text({"A": a.url, "C": b.url}, providers=formats)
            proxy.state.config = ccmux.load_config(text, {})
        reply = await ask(proxy, body=message_body(safeguards=[{"type": "x"}]))
        fails(400, "invalid_request_error", says="safeguards: Extra inputs are not permitted")(reply)
        assert (a.count, b.count) == ((1, 0) if first == "anthropic" else (0, 0))
        full("B" if first == "anthropic" else "C")(await ask(proxy))  # as Claude Code asks then
        assert all(o["ok"] for o in proxy.state.relay.health_of("B").outcomes)


@BOTH
async def test_server_tools_that_are_left_out_are_logged(
    wire: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tools = [
        {"name": "a", "input_schema": {"type": "object"}},
        {"type": "web_fetch_20250910\x1b[2J", "name": "b"},
    ]
    with caplog.at_level(logging.INFO, "ccmux"):
        async with stage(tmp_path, OK, formats=wire) as (proxy, (a,)):
            full()(await ask(proxy, body=message_body(tools=tools)))
    assert len(a.calls[0].json["tools"]) == (1 if wire == "openai" else 2)
    logged = [line for line in caplog.messages if "left out" in line]
    assert len(logged) == (1 if wire == "openai" else 0)
    assert all("'web_fetch_20250910\\x1b[2J'" in line and line.isprintable() for line in logged)


# A 400 that names what this request can do without is tried again, and not counted.


MISTRAL = '{"detail": [{"type": "extra_forbidden", "loc": ["body", "temperature"], "msg": "Extra inputs are not permitted"}]}'


@pytest.mark.parametrize(
    ("status", "words"),
    [(400, "Unsupported parameter: 'temperature' is not supported with this model."), (422, MISTRAL)],
    ids=["openai", "mistral"],
)
async def test_a_parameter_that_is_refused_is_left_out(status: int, words: str, tmp_path: Path) -> None:
    refusal = fs.status(status, message=words)
    script = (refusal, fs.status(500), fs.answer())
    async with stage(tmp_path, script, formats="openai") as (proxy, (a,)):
        for _ in range(2):
            full("A")(await ask(proxy, body=message_body(temperature=0.5)))
    assert ["temperature" in call.json for call in a.calls] == [True, False, False, False]


LIMITS = ("max_tokens", "max_completion_tokens")


def affords(tokens: int | str) -> str:
    """OpenRouter's."""
    return (
        "This request requires more credits, or fewer max_tokens. You requested up to 32000 tokens, but can only "
        f"afford {tokens}. To increase, visit https://openrouter.ai/settings/credits and upgrade to a paid account"
    )


def limit_of(call: fs.UpstreamCall) -> int:
    return int(next(call.json[name] for name in LIMITS if name in call.json))


@BOTH
async def test_an_account_is_asked_for_the_output_that_it_can_pay_for(wire: str, tmp_path: Path) -> None:
    script = (fs.refusing(affords(8123), lambda asked: asked.get("max_tokens", 0) > 8123, 402),)
    body = message_body(max_tokens=32000, thinking={"type": "enabled", "budget_tokens": 31999})
    async with stage(tmp_path, script, formats=wire) as (proxy, (a,)):
        for _ in range(2):  # its key does not rest
            full("A")(await ask(proxy, body=body))
    assert [limit_of(call) for call in a.calls] == [32000, 8123, 32000, 8123]
    if wire == "anthropic":
        assert [call.json["thinking"]["budget_tokens"] for call in a.calls[:2]] == [31999, 4061]


@pytest.mark.parametrize(
    ("tokens", "calls", "status"),
    [
        pytest.param("4000", 2, 400, id="and refuses again"),
        pytest.param("3999", 1, 402, id="too little"),
        pytest.param("9" * 5000, 1, 402, id="no number that Python reads"),
    ],
)
async def test_an_account_that_can_pay_for_too_little_is_refused(
    tokens: str, calls: int, status: int, tmp_path: Path
) -> None:
    async with stage(tmp_path, (fs.status(402, message=affords(tokens)),), formats="openai") as (proxy, (a,)):
        reply = await ask(proxy, body=message_body(max_tokens=32000))
        assert (reply.status, a.count) == (status, calls)
        assert f"can only afford {tokens}" in reply.error["message"]


GROQ_NO_CALL = {
    "message": "Failed to call a function. Please adjust your prompt. See 'failed_generation' for more details.",
    "type": "invalid_request_error",
    "code": "tool_use_failed",
    "failed_generation": "Tool use failed: JSON does not match the expected schema for tool calls",
    "status_code": 400,
}


async def test_a_call_that_groq_could_not_read_is_tried_again(tmp_path: Path) -> None:
    refusal = fs.raw(400, [fs.JSON_TYPE], json.dumps({"error": GROQ_NO_CALL}).encode())
    event = fs.Behaviour(
        lambda call: fs.stream_of([b"event: error\n" + fs.sse_data({"error": GROQ_NO_CALL})])
    )
    async with stage(tmp_path, (refusal, OK[0], event, OK[0], refusal), formats="openai") as (proxy, (a,)):
        for _ in range(2):
            full("A")(await ask(proxy))
        fails(502, "api_error")(await ask(proxy))  # Claude Code asks again
        assert a.count == 6


@pytest.mark.parametrize(("refused", "used"), [LIMITS, LIMITS[::-1]])
@pytest.mark.parametrize("client", ["claude-code", "openai"])
async def test_an_output_limit_goes_by_the_name_that_a_refusal_tells(
    client: str, refused: str, used: str, tmp_path: Path
) -> None:
    words = f"Unsupported parameter: '{refused}' is not supported with this model. Use '{used}' instead."
    script = (fs.refusing(words, lambda asked: refused in asked),)
    providers = {"A": {"quirks": {"max_tokens_key": refused}}}
    async with stage(tmp_path, script, formats="openai", providers=providers) as (proxy, (a,)):
        for _ in range(2):
            if client == "openai":
                assert await chat(proxy, **{refused: 99}) == HELLO
            else:
                full("A")(await ask(proxy, body=message_body(max_tokens=99)))
    assert [[(k, v) for k, v in call.json.items() if k in LIMITS] for call in a.calls] == [
        [(refused, 99)], [(used, 99)], [(used, 99)]
    ]  # fmt: skip


async def test_a_user_message_behind_a_tools_that_is_refused_joins_it(tmp_path: Path) -> None:
    """As it is said by Mistral's own models wherever they are served."""
    answered = user(tool_result("toolu_1", "out"), "And now?")
    messages = [user("Say hello."), assistant(tool_use("toolu_1")), answered]
    refusal = fs.status(400, message="Unexpected role 'user' after role 'tool'")
    async with stage(tmp_path, (refusal, fs.answer()), formats="openai") as (proxy, (a,)):
        for _ in range(2):
            full("A")(await ask(proxy, body=message_body(messages=messages)))
    assert [len(call.json["messages"]) for call in a.calls] == [4, 3, 3]


PNG_DATA = PNG["source"]["data"]
LOOK = message_body(messages=[user(PNG, "Say hello.")])
NO_IMAGES = "No endpoints found that support image input"


@pytest.mark.parametrize("formats", ["openai", "anthropic"])
async def test_an_image_that_a_model_cannot_see_is_left_out(formats: str, tmp_path: Path) -> None:
    refusal = fs.status(404, message=NO_IMAGES)
    async with stage(tmp_path, (refusal, fs.answer()), formats=formats) as (proxy, (a,)):
        for _ in range(2):
            full("A")(await ask(proxy, body=LOOK))
    assert [PNG_DATA in json.dumps(call.json) for call in a.calls] == [True, False, False]
    assert "left out" in json.dumps(a.calls[-1].json)


@pytest.mark.parametrize("others", ["keys", "targets"])
async def test_an_image_that_nobody_can_see_is_left_out(others: str, tmp_path: Path) -> None:
    """Another key is not another model, and what has refused it already is not asked again."""
    script = (fs.refusing(NO_IMAGES, lambda asked: PNG_DATA in json.dumps(asked), 404),)
    scripts = [script] * (2 if others == "targets" else 1)
    providers = {"A": {"api_key": ["k1", "k2"]}} if others == "keys" else {}
    async with stage(tmp_path, *scripts, formats="openai", providers=providers) as (proxy, servers):
        full("A" if others == "keys" else "B")(await ask(proxy, body=LOOK))
    assert [a.count for a in servers] == ([2] if others == "keys" else [1, 2])


async def test_a_document_that_a_server_of_anthropics_format_refuses_is_left_out(tmp_path: Path) -> None:
    """As vLLM 0.33 and SGLang 0.5 do: a conversation that a PDF got into ended there."""
    words = "messages.0.content.1: Input tag 'document' found using 'type' does not match"
    async with stage(tmp_path, (fs.status(400, message=words), fs.answer())) as (proxy, (a,)):
        for _ in range(2):
            full("A")(await ask(proxy, body=message_body(messages=[user(PNG, PDF, "Say hello.")])))
    assert [PDF["source"]["data"] in json.dumps(call.json) for call in a.calls] == [True, False, False]
    assert PNG_DATA in json.dumps(a.calls[-1].json)


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (500, b'{"status":"failure","message":"messages is not supported by openai"}'),  # Portkey 1.15
        (400, b'{"error":{"code":400,"message":"messages is not supported by openai"}}'),
        (
            500,
            b'data: {"error": {"message": "messages is not supported by openai", "code": "500"}}\n\ndata: [DONE]\n\n',
        ),
    ],
    ids=["flat", "no type", "litellm"],
)
@pytest.mark.parametrize("formats", ["openai", "anthropic"])
async def test_an_error_of_another_form_becomes_anthropics(
    status: int, body: bytes, formats: str, tmp_path: Path
) -> None:
    answer = fs.raw(status, [fs.JSON_TYPE], body)
    async with stage(tmp_path, (answer, answer), formats=formats) as (proxy, _):
        reply = await ask(proxy)
    fails(status)(reply)
    assert reply.json["error"]["message"] == "messages is not supported by openai"


async def test_an_image_goes_to_the_next_target_where_the_first_cannot_see_it(tmp_path: Path) -> None:
    async with stage(tmp_path, (fs.status(404, message=NO_IMAGES),), OK, formats="openai") as (proxy, (a, b)):
        full("B")(await ask(proxy, body=LOOK))
    assert (a.count, b.count) == (1, 1)
    assert PNG_DATA in json.dumps(b.calls[0].json)


async def test_a_search_that_is_refused_is_not_left_out_for_openai_clients_either(tmp_path: Path) -> None:
    script = (
        fs.refusing("Unknown parameter: 'web_search_options'", lambda asked: "web_search_options" in asked),
    )
    async with stage(tmp_path, script, OK, formats="openai") as (proxy, (a, b)):
        for _ in range(2):
            assert await chat(proxy, web_search_options={}) == HELLO
        assert (a.count, b.count) == (1, 2)
        proxy.state.config = ccmux.load_config(config_text({"A": a.url}, formats="openai"), {})
        assert "cannot search the web" in await chat(proxy, web_search_options={})
        assert await chat(proxy) == HELLO


async def test_a_parameter_is_left_out_once(tmp_path: Path) -> None:
    refusal = fs.status(400, message="Unsupported parameter: 'temperature'")
    async with stage(tmp_path, (refusal,), OK, formats="openai") as (proxy, (a, b)):
        fails(400, says="temperature")(await ask(proxy, body=message_body(temperature=0.5)))
    assert (a.count, b.count) == (2, 0)


async def test_requests_of_one_moment_are_all_mended(tmp_path: Path) -> None:
    """The second is refused for what the first has just taught."""

    def refuses(call: fs.UpstreamCall) -> Any:
        refusal = fs.status(400, message="Unsupported parameter: 'temperature'")
        return [fs.Gate(), *(refusal if "temperature" in call.json else fs.answer()).steps(call)]

    async with stage(tmp_path, (fs.Behaviour(refuses),), formats="openai") as (proxy, (a,)):
        asked = [asyncio.create_task(ask(proxy, body=message_body(temperature=0.5))) for _ in range(3)]
        await a.called(3)
        a.open_gate()
        for reply in await asyncio.gather(*asked):
            full("A")(reply)
    assert a.count == 6


async def test_a_parameter_is_left_out_at_each_target(tmp_path: Path) -> None:
    refusal = fs.status(400, message="Unsupported parameter: 'temperature'")
    scripts = (refusal, fs.status(529)), (refusal, fs.answer())
    async with stage(tmp_path, *scripts, formats="openai") as (proxy, (a, b)):
        full("B")(await ask(proxy, body=message_body(temperature=0.5)))
    assert (a.count, b.count) == (2, 2)


@pytest.mark.parametrize(
    "words",
    [
        "litellm.UnsupportedParamsError: gpt-4o doesn't support `reasoning.effort` (its model cost map entry lacks",
        "litellm.UnsupportedParamsError: ollama does not support parameters: ['thinking'], for model=llama3.1",
        '"llama3.1:8b" does not support thinking',
    ],
)
@pytest.mark.parametrize("client", ["claude-code", "openai"])
async def test_thinking_is_left_out_for_a_model_that_has_none(
    client: str, words: str, tmp_path: Path
) -> None:
    """As LiteLLM and Ollama say on /v1/messages; an effort asks for it, too."""
    script = (
        fs.refusing(words, lambda asked: "thinking" in asked or "effort" in asked.get("output_config", {})),
    )
    body = message_body(thinking={"type": "adaptive"}, output_config={"effort": "high"})
    async with stage(tmp_path, script) as (proxy, (a,)):
        for _ in range(2):
            if client == "openai":
                assert await chat(proxy, reasoning_effort="high") == HELLO
            else:
                full("A")(await ask(proxy, body=body))
    assert a.count == 3


async def test_what_is_only_forwarded_keeps_its_parameters(tmp_path: Path) -> None:
    refusal = fs.status(400, message="Unsupported parameter: 'temperature'")
    async with stage(tmp_path, (refusal,)) as (proxy, (a,)):
        fails(400, says="temperature")(await ask(proxy, body=message_body(temperature=0.5)))
    assert a.count == 1


async def test_what_an_openai_client_sends_to_an_anthropic_upstream_is_left_out_of_its_requests(
    tmp_path: Path,
) -> None:
    """And of no one's who speaks the upstream's own format: those bytes are not ours."""
    script = (
        fs.refusing("temperature: Extra inputs are not permitted", lambda asked: "temperature" in asked),
    )
    async with stage(tmp_path, script) as (proxy, (a,)):
        for _ in range(2):
            assert await chat(proxy, temperature=0.5, stop=["x"]) == HELLO
        fails(400, says="temperature")(await ask(proxy, body=message_body(temperature=0.5)))
    assert ["temperature" in call.json for call in a.calls] == [True, False, False, True]
    assert all(call.json.get("stop_sequences") == ["x"] for call in a.calls[:3])


async def chat(proxy: Proxy, **more: Any) -> str:
    """What an OpenAI client gets to read: the answer's text, or an error's."""
    asked = {"model": "claude-opus-4-8", "messages": [{"role": "user", "content": "hi"}], **more}
    told = (await ask(proxy, "/v1/chat/completions", body=asked)).json
    return str(told["error"]["message"] if "error" in told else told["choices"][0]["message"]["content"])


async def test_a_thinking_that_an_openai_client_may_not_ask_for_is_claude_codes_all_the_same(
    tmp_path: Path,
) -> None:
    words = '"thinking.type.enabled" is not supported for this model.'
    script = (fs.refusing(words, lambda asked: asked.get("thinking", {}).get("type") == "enabled"),)
    async with stage(tmp_path, script) as (proxy, (a,)):
        assert await chat(proxy, thinking={"type": "enabled", "budget_tokens": 2000}) == HELLO
        full("A")(await ask(proxy, body=message_body(thinking={"type": "adaptive"})))
    assert [call.json.get("thinking", {}).get("type") for call in a.calls] == ["enabled", None, "adaptive"]


LEVELS = ["low", "medium", "high"]


@pytest.mark.parametrize(("effort", "taken"), [("max", "high"), ("minimal", "low")])
@pytest.mark.parametrize("client", ["claude-code", "openai"])
async def test_an_effort_that_a_model_has_not_becomes_the_nearest_that_it_has(
    client: str, effort: str, taken: str, tmp_path: Path
) -> None:
    words = f"Unsupported value: 'reasoning_effort' does not support '{effort}' with this model. Supported values are: "
    words += "'low', 'medium', and 'high'."
    script = (fs.refusing(words, lambda asked: asked["reasoning_effort"] not in LEVELS),)
    async with stage(tmp_path, script, formats="openai") as (proxy, (a,)):
        for wanted in (effort, effort, "medium"):
            if client == "openai":
                assert await chat(proxy, reasoning_effort=wanted) == HELLO
            else:
                full("A")(await ask(proxy, body=message_body(output_config={"effort": wanted})))
    assert [call.json["reasoning_effort"] for call in a.calls] == [effort, taken, taken, "medium"]


async def test_a_wrong_value_of_one_openai_client_takes_nothing_from_the_next(tmp_path: Path) -> None:
    words = "max_tokens: Input should be greater than or equal to 1"
    script = (fs.refusing(words, lambda asked: asked.get("max_tokens", 0) < 1),)
    async with stage(tmp_path, script) as (proxy, (a,)):
        assert "max_tokens" in await chat(proxy, max_tokens=-5)
        assert await chat(proxy, max_tokens=100) == HELLO
    assert [call.json["max_tokens"] for call in a.calls] == [-5, 100]


@pytest.mark.parametrize(
    ("status", "words"),
    [
        pytest.param(404, NO_IMAGES, id="an image"),
        pytest.param(400, "Invalid part type: file", id="a file"),
        pytest.param(400, "Unexpected role 'user' after role 'tool'", id="an order of roles"),
        pytest.param(400, "Thought signature is not valid", id="a signature"),
    ],
)
async def test_what_is_passed_on_is_not_sent_again_unchanged(status: int, words: str, tmp_path: Path) -> None:
    async with stage(tmp_path, (fs.status(status, message=words),), formats="openai") as (proxy, (a,)):
        assert await chat(proxy) == words
    assert a.count == 1


async def test_an_effort_that_is_refused_takes_no_schema_with_it(tmp_path: Path) -> None:
    words = 'output_config.effort "xhigh" is not supported by model m; supported values: [low]'
    script = (fs.refusing(words, lambda asked: "effort" in asked["output_config"]),)
    schema = {"name": "n", "schema": {"type": "object", "properties": {}}}
    form = {"type": "json_schema", "json_schema": schema}
    async with stage(tmp_path, script) as (proxy, (a,)):
        assert await chat(proxy, reasoning_effort="xhigh", response_format=form) == HELLO
    assert [[*call.json["output_config"]] for call in a.calls] == [["effort", "format"], ["format"]]


THOUGHT = {"type": "thinking", "thinking": "hm", "signature": "c2lnbmVk"}
THOUGHTS = [
    {"role": "user", "content": "Hello."},
    {"role": "assistant", "content": [THOUGHT, {"type": "text", "text": "Hi."}]},
    {"role": "user", "content": "Go on."},
]


@pytest.mark.parametrize("mended", [True, False])
async def test_thinking_whose_signature_is_refused_is_left_out_once(mended: bool, tmp_path: Path) -> None:
    refusal = fs.status(400, message="messages.1.content.0: Invalid `signature` in `thinking` block")
    async with stage(tmp_path, (refusal, *(OK if mended else [refusal])), OK) as (proxy, (a, b)):
        reply = await ask(proxy, body=message_body(messages=THOUGHTS))
    (full("A") if mended else fails(400, says="signature"))(reply)
    assert ["hm" in json.dumps(call.json) for call in a.calls] == [True, False]
    assert b.count == 0


@pytest.mark.parametrize(
    "words",
    [
        "messages.1.content.0.type: Expected `thinking` or `redacted_thinking`, but found `tool_use`.",
        "The `content[].thinking` in the thinking mode must be passed back to the API.",
    ],
    ids=["anthropic", "deepseek"],
)
async def test_a_call_of_another_model_goes_on_without_thinking(words: str, tmp_path: Path) -> None:
    body = message_body(
        messages=THOUGHTS,
        thinking={"type": "enabled", "budget_tokens": 2000},
        context_management={"edits": []},
    )
    async with stage(tmp_path, (fs.status(400, message=words), *OK), OK) as (proxy, (a, b)):
        full("A")(await ask(proxy, body=body))
    assert [call.json["thinking"]["type"] for call in a.calls] == ["enabled", "disabled"]
    assert ["context_management" in call.json for call in a.calls] == [True, False]
    assert ["hm" in json.dumps(call.json) for call in a.calls] == [True, False]
    assert b.count == 0


@pytest.mark.parametrize("passes", [True, False])
@BOTH
async def test_a_400_that_means_a_passing_fault_is_tried_once_more(
    passes: bool, wire: str, tmp_path: Path
) -> None:
    fault = fs.status(400, message="Provider returned error")
    quirks = {"providers": {"A": {"quirks": {"transient": "Provider returned error"}}}}
    async with stage(tmp_path, (fault, *(OK if passes else [fault])), formats=wire, **quirks) as (
        proxy,
        (a,),
    ):
        reply = await ask(proxy)
    (full("A") if passes else fails(400))(reply)
    assert a.count == 2


# Pings.


@BOTH
async def test_pings_keep_a_client_waiting_and_failover_possible(wire: str, tmp_path: Path) -> None:
    limits = {"providers": {"A": {"first_byte_timeout": 1}}}
    async with stage(tmp_path, (fs.stall(),), OK, formats=wire, **limits) as (proxy, (a, b)):
        proxy.state.relay.ping_interval = 0.1
        reply = await ask(proxy)
    assert reply.body.startswith(b"event: ping\n") and reply.body.count(b"event: ping\n") >= 5
    assert reply.text == HELLO and reply.kinds.count("message_start") == 1
    assert reply.kinds[-1] == "message_stop"
    assert (a.count, b.count) == (1, 1)


@pytest.mark.parametrize("told", [0, 4], ids=["before content", "amid content"])
@pytest.mark.parametrize("keep_alive", [b"", b": OPENROUTER PROCESSING\n\n"], ids=["silent", "comments"])
@pytest.mark.parametrize(
    ("path", "wire", "ping"),
    [("/v1/messages", "openai", b"event: ping\n"), ("/v1/chat/completions", "anthropic", b": ping\n")],
    ids=["messages", "chat"],
)
async def test_a_ping_comes_within_the_interval(
    path: str, wire: str, ping: bytes, keep_alive: bytes, told: int, tmp_path: Path
) -> None:
    def steps(call: fs.UpstreamCall) -> Any:
        events = fs.events_for(call)
        yield fs.Send(fs.head(200, fs.STREAM_HEAD) + b"".join(map(fs.chunked, events[:told])))
        for _ in range(5):
            yield fs.Pause(0.1)
            if keep_alive:
                yield fs.Send(fs.chunked(keep_alive))
        yield fs.Send(b"".join(map(fs.chunked, events[told:])) + fs.LAST_CHUNK)

    async with stage(tmp_path, (fs.Behaviour(steps),), formats=wire) as (proxy, _):
        proxy.state.relay.ping_interval = 0.4
        reply = await ask(proxy, path)
    assert ping in reply.body
    assert reply.body.endswith((b"data: [DONE]\n\n", b'"message_stop"}\n\n'))


async def test_after_a_ping_a_failure_is_an_error_event(tmp_path: Path) -> None:
    limits = {"providers": {"A": {"first_byte_timeout": 1}}}
    async with stage(tmp_path, (fs.stall(),), **limits) as (proxy, _):
        proxy.state.relay.ping_interval = 0.1
        reply = await ask(proxy)
        await proxy.idle()
    assert (reply.status, reply.broken, reply.kinds) == (200, False, ["error"])
    assert reply.error["type"] == "timeout_error"
    check_ledger(proxy, "0")


@BOTH
async def test_after_a_ping_an_error_beside_the_first_content_is_told(wire: str, tmp_path: Path) -> None:
    """They come in one piece, so all of it counts as a try that failed, and none of it goes out."""

    def steps(call: fs.UpstreamCall) -> Any:
        yield fs.Pause(0.3)
        yield fs.Send(fs.head(200, [("Content-Type", "text/event-stream")]))
        yield fs.Send(b"".join(fs.events_for(call)[:5]) + fs.error_event(call))
        yield fs.End()

    async with stage(tmp_path, (fs.Behaviour(steps),), formats=wire) as (proxy, _):
        proxy.state.relay.ping_interval = 0.1
        reply = await ask(proxy)
        await proxy.idle()
    assert (reply.status, reply.broken, reply.kinds) == (200, False, ["error"])
    check_ledger(proxy, "0")


@BOTH
async def test_pings_fall_between_whole_events(wire: str, tmp_path: Path) -> None:
    half = fs.Behaviour(lambda call: half_an_event(call))
    async with stage(tmp_path, (half,), formats=wire) as (proxy, (a,)):
        proxy.state.relay.ping_interval = 0.05

        def look(reply: Reply) -> None:
            if reply.body.count(b"event: ping") >= 3:
                a.open_gate()

        reply = await ask(proxy, on_data=look)
    assert reply.body.count(b"event: ping") >= 3
    full()(reply)


def half_an_event(call: fs.UpstreamCall) -> list[fs.Step]:
    blocks = fs.events_for(call)
    cut = len(blocks[4]) // 2
    return [
        fs.Send(fs.head(200, fs.STREAM_HEAD) + b"".join(map(fs.chunked, [*blocks[:4], blocks[4][:cut]]))),
        fs.Gate(),
        fs.Send(b"".join(map(fs.chunked, [blocks[4][cut:], *blocks[5:]])) + fs.LAST_CHUNK),
    ]


# Usage.


@pytest.mark.parametrize(
    "usage",
    [{}, {"input_tokens": -5, "output_tokens": -5, "prompt_tokens": -5, "completion_tokens": -5},
     {"input_tokens": 10**12, "output_tokens": 1, "prompt_tokens": 10**12, "completion_tokens": 1},
     {"input_tokens": "many", "output_tokens": None, "prompt_tokens": "many", "completion_tokens": []},
     "none", [1]],
    ids=["missing", "negative", "absurd", "words", "text", "list"],
)  # fmt: skip
@pytest.mark.parametrize("mode", ["s", "n"])
@BOTH
async def test_usage_that_is_none_is_counted_here_and_marked(
    usage: Any, mode: str, wire: str, tmp_path: Path
) -> None:
    async with stage(tmp_path, (fs.answer(usage=usage),), formats=wire) as (proxy, _):
        full()(await ask(proxy, stream=mode == "s"))
        await proxy.idle()
    (row,) = proxy.books.requests()
    assert row["estimated"] and 0 < row["charge_microusd"] < FULL["A"]
    assert len(proxy.books.ledger()) == 1


@pytest.mark.parametrize("stream", [True, False])
async def test_an_answer_in_fast_mode_costs_twice_as_much(stream: bool, tmp_path: Path) -> None:
    usage = {"input_tokens": 100, "output_tokens": 50, "speed": "fast"}
    async with stage(tmp_path, (fs.answer(usage=usage),)) as (proxy, _):
        full()(await ask(proxy, stream=stream))
        await proxy.idle()
    (row,) = proxy.books.requests()
    assert (row["charge_microusd"], row["estimated"]) == (2 * FULL["A"], 0)
    assert json.loads(row["price"]) == {"input": "2", "output": "4"}


async def test_who_leaves_pays_for_an_input_that_message_start_tells_as_0(tmp_path: Path) -> None:
    def steps(call: fs.UpstreamCall) -> list[fs.Step]:
        blocks = fs.anthropic_events(start_usage={"input_tokens": 0, "output_tokens": 0})[:5]
        return [fs.Send(fs.head(200, fs.STREAM_HEAD) + b"".join(map(fs.chunked, blocks))), fs.Stall()]

    async with stage(tmp_path, (fs.Behaviour(steps),)) as (proxy, _):
        await hang_up(proxy, after_text(3))
        await proxy.idle()
    (row,) = proxy.books.requests()
    assert row["estimated"] and row["input_tokens"] > 0 and row["output_tokens"] > 0


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("path", ["messages", "chat/completions"])
@pytest.mark.parametrize("usage", [{"output_tokens": 50}, {"input_tokens": 0, "output_tokens": 50}])
async def test_an_input_that_is_not_told_is_counted_here(
    usage: ccmux.Json, path: str, stream: bool, tmp_path: Path
) -> None:
    """As of gateways in front of models that do not stream their usage."""
    async with stage(tmp_path, (fs.answer(usage=usage),)) as (proxy, _):
        assert (await ask(proxy, f"/v1/{path}", stream=stream)).status == 200
        await proxy.idle()
    (row,) = proxy.books.requests()
    assert row["estimated"] and row["input_tokens"] > 0 and row["output_tokens"] >= 50


@pytest.mark.parametrize("path", ["messages", "chat/completions"])
async def test_an_output_that_only_message_start_tells_is_counted_here(path: str, tmp_path: Path) -> None:
    """Of an answer that ended well: the 1 there is that of a beginning."""
    blocks = fs.anthropic_events(end_usage={"input_tokens": 100})
    script = (fs.Behaviour(lambda call: fs.stream_of(blocks)),)
    async with stage(tmp_path, script) as (proxy, _):
        assert (await ask(proxy, f"/v1/{path}")).status == 200
        await proxy.idle()
    (row,) = proxy.books.requests()
    assert (row["status"], row["input_tokens"], row["estimated"]) == (200, 100, 1)
    assert row["output_tokens"] > 1


class SlowCounter:
    """In place of a server's counter: a count of 777 that ends when the test says so."""

    def __init__(self, proxy: Proxy) -> None:
        self.begun = self.ended = 0
        self.may_end = asyncio.Event()
        proxy.state.counter.count = self.count

    async def count(self, *asked: Any) -> int:
        self.begun += 1
        try:
            await self.may_end.wait()
        finally:
            self.ended += 1
        return 777


@pytest.mark.parametrize("stream", [True, False])
async def test_a_translated_request_is_counted_while_its_answer_is_awaited(
    stream: bool, tmp_path: Path
) -> None:
    script = (fs.status(500), fs.answer(usage="none"))
    async with stage(tmp_path, script, formats="openai") as (proxy, (a,)):
        counter = SlowCounter(proxy)
        asked = asyncio.create_task(ask(proxy, stream=stream))
        await a.called(2)
        assert counter.begun == 1 and not counter.ended
        counter.may_end.set()
        reply = await asked
        await proxy.idle()
    message = reply.events[0]["message"] if stream else reply.json
    assert message["usage"]["input_tokens"] == 777
    assert proxy.books.requests()[0]["input_tokens"] == 777 and counter.begun == 1


async def test_a_refusal_for_length_tells_the_count(tmp_path: Path) -> None:
    refusal = fs.status(400, message="This model's maximum context length is 500 tokens")
    async with stage(tmp_path, (refusal,), formats="openai") as (proxy, (a,)):
        counter = SlowCounter(proxy)
        asked = asyncio.create_task(ask(proxy))
        await a.called(1)
        counter.may_end.set()
        reply = await asked
    assert "777 tokens > " in reply.error["message"]


async def test_a_count_ends_with_its_request(tmp_path: Path) -> None:
    async with stage(tmp_path, (fs.stall(),), formats="openai") as (proxy, (a,)):
        counter = SlowCounter(proxy)
        asked = asyncio.create_task(ask(proxy))
        await a.called(1)
        await until(lambda: counter.begun, "it is counted")
        asked.cancel()
        await until(lambda: counter.ended, "no more")


async def test_the_count_is_there_for_a_translated_target_behind_a_forwarded_one(tmp_path: Path) -> None:
    script, mixed = (fs.status(500),), {"A": {"max_retries": 0}, "B": {"type": "openai"}}
    async with stage(tmp_path, script, OK, providers=mixed) as (proxy, _):
        SlowCounter(proxy).may_end.set()
        reply = await ask(proxy)
    full("B")(reply)
    assert reply.events[0]["message"]["usage"]["input_tokens"] == 777


async def test_no_count_begins_behind_its_request(tmp_path: Path) -> None:
    """Which has failed before anything was awaited: that is no name of a host."""
    nowhere = {"A": {"base_url": f"http://{chr(228) * 70}/v1", "max_retries": 0}}
    async with stage(tmp_path, OK, formats="openai", providers=nowhere) as (proxy, _):
        counter = SlowCounter(proxy)
        fails(502)(await ask(proxy))
    assert counter.begun == 0


async def test_what_is_only_forwarded_is_not_counted(tmp_path: Path) -> None:
    async with stage(tmp_path, OK) as (proxy, _):
        counter = SlowCounter(proxy)
        full()(await ask(proxy))
        full()(await ask(proxy, stream=False))
    assert counter.begun == 0


async def test_no_provider_is_blamed_for_a_count_that_takes_long(tmp_path: Path) -> None:
    limits = {"A": {"first_byte_timeout": 1}}
    async with stage(tmp_path, OK, OK, formats="openai", providers=limits) as (proxy, (a, b)):
        counter = SlowCounter(proxy)
        asyncio.get_running_loop().call_later(2.5, counter.may_end.set)
        full()(await ask(proxy))
    assert (a.count, b.count) == (1, 0)


async def test_a_crash_charges_the_count_however_long_it_took(tmp_path: Path) -> None:
    async with stage(tmp_path, (fs.gated_answer(),), formats="openai") as (proxy, (a,)):
        counter = SlowCounter(proxy)
        asked = asyncio.create_task(ask(proxy))
        await until(lambda: any(h["floor_microusd"] for h in proxy.books.holds()), "a floor is noted")
        counter.may_end.set()
        await until(lambda: [h["floor_microusd"] for h in proxy.books.holds()] == [777], "the count's price")
        a.open_gate()
        full()(await asked)


class Body(dict[str, Any]):
    """A request as it was read, of which can be told how long it is kept."""


@BOTH
async def test_of_a_request_that_streams_its_bytes_alone_are_kept(wire: str, tmp_path: Path) -> None:
    """What they say takes five times as much memory."""
    bodies: list[weakref.ref[Body]] = []

    def read(raw: bytes) -> Body:
        bodies.append(weakref.ref(body := Body(json.loads(raw))))
        return body

    async with stage(tmp_path, (fs.gated_answer(),), formats=wire) as (proxy, (a,)):
        proxy.state.requests.read = read
        asked = asyncio.create_task(ask(proxy))
        await until(lambda: bodies and bodies[0]() is None, "its answer has content")
        a.open_gate()
        full()(await asked)


@pytest.mark.parametrize("stream", [True, False])
async def test_a_request_does_not_wait_for_the_collector(
    stream: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Which runs seldom."""
    requests: list[weakref.ref[Any]] = []
    guard = ccmux.guard

    def noted(request: Any, config: ccmux.Config) -> None:
        requests.append(weakref.ref(request))
        guard(request, config)

    monkeypatch.setattr(ccmux, "guard", noted)
    async with stage(tmp_path, OK) as (proxy, _):
        gc.disable()
        try:
            full()(await ask(proxy, stream=stream))
            await until(lambda: requests[0]() is None, "it is gone")
        finally:
            gc.enable()


@BOTH
async def test_where_credits_are_enforced_the_count_comes_first(wire: str, tmp_path: Path) -> None:
    async with stage(tmp_path, OK, formats=wire, credits={"enforce": True}) as (proxy, (a,)):
        counter = SlowCounter(proxy)
        asked = asyncio.create_task(ask(proxy))
        await until(lambda: counter.begun, "it is counted")
        assert a.count == 0
        counter.may_end.set()
        full()(await asked)


@BOTH
async def test_who_leaves_before_content_pays_for_the_count_not_the_size(wire: str, tmp_path: Path) -> None:
    image = {"type": "base64", "media_type": "image/png", "data": "A" * 100_000}
    content = [{"type": "image", "source": image}]
    async with stage(tmp_path, (fs.stall_after_headers(),), formats=wire) as (proxy, _):
        SlowCounter(proxy)
        body = message_body(messages=[{"role": "user", "content": content}])
        asked = asyncio.create_task(ask(proxy, body=body))
        await until(lambda: any(h["floor_microusd"] for h in proxy.books.holds()), "A has answered")
        asked.cancel()
        await proxy.idle()
    (row,) = proxy.books.requests()
    assert row["error"] == "client_gone" and 1000 < row["input_tokens"] < 3000


# Clients that leave.


def plain_request(proxy: Proxy, stream: bool = True) -> bytes:
    """A request as its bytes on the wire."""
    body = ccmux.compact(message_body(stream))
    lines = [
        "POST /v1/messages HTTP/1.1",
        f"Host: 127.0.0.1:{proxy.port}",
        "Content-Type: application/json",
        f"Content-Length: {len(body)}",
    ]
    return "\r\n".join([*lines, "", ""]).encode() + body


@contextlib.asynccontextmanager
async def raw_client(
    proxy: Proxy, request: bytes = b"", **options: Any
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A client that has sent these bytes, by default those of a plain request."""
    reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port, **options)
    writer.write(request or plain_request(proxy))
    try:
        yield reader, writer
    finally:
        writer.close()


async def read_chunk(reader: asyncio.StreamReader) -> bytes:
    """The next chunk of an answer's body; empty at its end."""
    size = int(await reader.readuntil(b"\r\n"), 16)
    return (await reader.readexactly(size + 2))[:-2]


async def hang_up(proxy: Proxy, when: Any, *, stream: bool = True) -> float:
    """A client that closes its connection once `when` has come; the moment it did."""
    async with raw_client(proxy, plain_request(proxy, stream)) as (reader, writer):
        await (when(reader) if callable(when) else when)
        closed = time.monotonic()
    with contextlib.suppress(OSError):
        await writer.wait_closed()
    return closed


def after_text(pieces: int) -> Callable[[asyncio.StreamReader], Any]:
    async def wait(reader: asyncio.StreamReader) -> None:
        for _ in range(pieces):
            await reader.readuntil(b"text_delta")

    return wait


LEAVING = {
    "before-headers": (fs.stall(), None, "0"),
    "before-headers-whole": (fs.stall(), None, "0"),
    "in-headers": (fs.stall_in_headers(), None, "0"),
    "after-headers": (fs.stall_after_headers(), None, "0 or floor"),
    "after-message-start": (fs.cut_after(1, fs.Stall(), gate=False), None, "0 or floor"),
    "after-content": (fs.cut_after(5, fs.Stall(), gate=False), after_text(3), PART),
    "after-content-whole": (fs.cut_after(5, fs.Stall(), gate=False), None, "0 or floor"),
    "amid-content": (fs.slow_answer(0, 0.05, ("x ",) * 400), after_text(3), PART),
}


@pytest.mark.parametrize("phase", LEAVING)
@BOTH
async def test_a_client_that_leaves_closes_the_upstream(phase: str, wire: str, tmp_path: Path) -> None:
    """Within 50 ms, and settled within 100: once in ten goes, as a shared machine may be away for longer."""
    took = []
    for go in range(10):
        took.append(await times_of_leaving(phase, wire, tmp_path / str(go)))
        if took[-1][0] < 0.05 and took[-1][1] < 0.1:
            return
    pytest.fail(f"closed and settled after (seconds): {took}")


async def times_of_leaving(phase: str, wire: str, folder: Path) -> tuple[float, float]:
    """Seconds until the upstream was closed, and until all was settled."""
    behaviour, when, ledger = LEAVING[phase]
    folder.mkdir()
    async with stage(folder, (behaviour,), OK, formats=wire) as (proxy, (a, b)):
        left = await hang_up(proxy, when or a.called(1), stream=not phase.endswith("-whole"))
        cut = await a.cancelled(1) - left
        assert a.calls[0].was_cancelled
        await proxy.idle()
        settled = time.monotonic() - left
    assert (a.count, b.count) == (1, 0)
    (row,) = proxy.books.requests()
    assert row["error"] == "client_gone"
    if ledger == "0 or floor":
        assert sum(-e["amount_microusd"] for e in proxy.books.ledger()) <= FULL["A"] // 2
    else:
        check_ledger(proxy, ledger)
    return cut, settled


async def test_a_client_may_leave_while_its_upstream_is_connected_to(tmp_path: Path) -> None:
    async with stage(tmp_path, fs.silent_address, OK) as (proxy, (b,)):
        health = proxy.state.relay.health_of("A")
        await hang_up(proxy, until(lambda: health.active == 1, "ccmux connects"))
        await proxy.idle()
        assert (health.active, b.count) == (0, 0)
    check_ledger(proxy, "0")


@BOTH
async def test_a_client_that_leaves_during_back_off_ends_the_retries(wire: str, tmp_path: Path) -> None:
    limited = (fs.status(429, [("retry-after", "4")]),)
    async with stage(tmp_path, limited, OK, formats=wire) as (proxy, (a, b)):

        async def answered() -> None:
            call = await a.called(1)
            await until(lambda: call.answered is not None, "A has refused")
            await until(lambda: proxy.state.relay.health_of("A").retrying == 1, "ccmux waits")

        left = await hang_up(proxy, answered())
        await proxy.idle()
        assert time.monotonic() - left < 0.7
        assert (a.count, b.count) == (1, 0) and proxy.state.relay.health_of("A").retrying == 0
    check_ledger(proxy, "0")


async def test_who_leaves_after_an_answer_that_failed_pays_nothing(tmp_path: Path) -> None:
    """Nor for the next target, which has not answered yet."""
    async with stage(tmp_path, (fs.error_first(),), (fs.stall(),)) as (proxy, (_, b)):
        await hang_up(proxy, b.called(1))
        await proxy.idle()
    check_ledger(proxy, "0")


async def test_who_leaves_during_back_off_after_an_answer_that_failed_pays_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ccmux.random, "uniform", lambda least, most: most)
    async with stage(tmp_path, (fs.error_first(), fs.stall())) as (proxy, _):
        await hang_up(proxy, until(lambda: proxy.state.relay.health_of("A").retrying == 1, "ccmux waits"))
        await proxy.idle()
    check_ledger(proxy, "0")


@BOTH
async def test_a_connection_is_used_again_where_an_answers_end_comes_late(wire: str, tmp_path: Path) -> None:
    """As servers send it that write the last chunk apart."""
    async with stage(tmp_path, (fs.slow_answer(0, 0.01),), formats=wire) as (proxy, (a,)):
        for _ in range(3):
            full()(await ask(proxy))
            await until(lambda: not busy_connections(proxy), "the answer's end has come")
        assert a.connections == 1


@BOTH
async def test_a_connection_whose_answer_does_not_end_is_closed(
    wire: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(ccmux, "LAST_BYTES", 0.2)
    async with stage(tmp_path, (fs.cut_after(99, fs.Stall(), gate=False),), formats=wire) as (proxy, (a,)):
        full()(await ask(proxy))
        await a.cancelled(1)
        assert not busy_connections(proxy)


def busy_connections(proxy: Proxy) -> int:
    """Connections to upstreams that are not free for the next request."""
    connector = proxy.state.relay.session.connector
    assert connector is not None
    return len(connector._acquired)


async def test_a_stream_of_http_1_0_ends_with_its_connection(tmp_path: Path) -> None:
    """Also where the client asks to keep that: without chunks there is no other end."""
    async with stage(tmp_path, OK) as (proxy, _), asyncio.timeout(20):
        asked = plain_request(proxy).replace(b" HTTP/1.1", b" HTTP/1.0\r\nConnection: keep-alive", 1)
        async with raw_client(proxy, asked) as (reader, _):
            _, _, body = (await reader.read()).partition(b"\r\n\r\n")
    full()(Reply(200, {"content-type": "text/event-stream", "x-ccmux-provider": "A"}, body))


# Clients that dawdle.


@contextlib.asynccontextmanager
async def dawdler(proxy: Proxy, stream: bool = True) -> AsyncIterator[socket.socket]:
    """A client that asks and does not read the answer."""
    loop = asyncio.get_running_loop()
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.setblocking(False)
        await loop.sock_connect(client, ("127.0.0.1", proxy.port))
        await loop.sock_sendall(client, plain_request(proxy, stream))
        yield client


@pytest.fixture
def behind_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """From its settlement on, a client has more to read than all buffers take."""
    settle = ccmux.Exchange.settle

    def behind(self: ccmux.Exchange, error: ccmux.ApiError | None) -> None:
        if self.settled is None:
            self.request.transport.write(b" " * 16_000_000)
        settle(self, error)

    monkeypatch.setattr(ccmux.Exchange, "settle", behind)


ENDINGS = pytest.mark.parametrize(
    "script", [fs.answer(), fs.cut_after(5, fs.End(), gate=False)], ids=["good", "broken"]
)


@ENDINGS
async def test_a_client_that_stalls_at_the_end_is_aborted_at_the_limit(
    script: fs.Behaviour, behind_at_the_end: None, tmp_path: Path
) -> None:
    async with (
        stage(tmp_path, (script,), server={"client_stall_timeout": 0.5}) as (proxy, (a,)),
        dawdler(proxy),
    ):
        await a.called(1)
        await proxy.idle()
        await until(lambda: not proxy.connections, "the client was cut off")
    assert len(proxy.books.requests()) == 1


LARGE = fs.answer(pieces=("x" * 20_000_000,))


async def test_a_whole_answer_does_not_wait_for_who_does_not_read(tmp_path: Path) -> None:
    async with (
        stage(tmp_path, (LARGE,), server={"client_stall_timeout": 1}) as (proxy, _),
        dawdler(proxy, stream=False),
    ):
        await until(lambda: len(proxy.books.requests()) == 1 and not proxy.connections, "it was cut off")


async def test_a_whole_answer_waits_for_who_reads_however_slowly(tmp_path: Path) -> None:
    async def go(folder: Path) -> float:
        """For longer than the limit in all, and never for so long at a time."""
        loop, began, got = asyncio.get_running_loop(), time.monotonic(), b""
        async with (
            stage(folder, (LARGE,), server={"client_stall_timeout": 1}) as (proxy, _),
            dawdler(proxy, stream=False) as client,
        ):
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**20)
            while not got.endswith(b"}"):
                if not (data := await loop.sock_recv(client, 1_000_000)):
                    return math.inf
                got += data
                await asyncio.sleep(0.1)
        assert len(got) > 20_000_000 and time.monotonic() - began > 1
        return 0

    await soon_enough(go, tmp_path, 0)


@ENDINGS
async def test_no_ping_follows_the_end(script: fs.Behaviour, behind_at_the_end: None, tmp_path: Path) -> None:
    """It would stand before the next answer on that connection."""
    async with stage(tmp_path, (script,)) as (proxy, _):
        proxy.state.relay.ping_interval = 0.02
        asked = plain_request(proxy).replace(b"\r\n", b"\r\nConnection: close\r\n", 1)
        async with raw_client(proxy, asked) as (reader, _):
            await until(lambda: len(proxy.books.requests()) == 1, "it is settled")
            await asyncio.sleep(0.3)  # the time of some pings
            assert (await reader.read()).endswith(b"\r\n0\r\n\r\n")


@BOTH
async def test_a_client_that_stalls_is_aborted_at_the_limit(wire: str, tmp_path: Path) -> None:
    async def go(folder: Path) -> float:
        server = {"client_stall_timeout": 1}
        async with stage(folder, (fs.endless(),), formats=wire, server=server) as (proxy, (a,)):
            async with dawdler(proxy):
                call = await a.called(1)
                took = await a.cancelled(1) - call.began
            await proxy.idle()
            assert not proxy.state.relay.health_of("A").outcomes  # it was not A that failed
        (row,) = proxy.books.requests()
        assert row["error"] == "client_stall"
        assert len(proxy.books.ledger()) == 1 and took > 0.9
        return took

    await soon_enough(go, tmp_path, 4)


@BOTH
async def test_a_client_that_pauses_is_not_its_providers_silence(wire: str, tmp_path: Path) -> None:
    """It reads nothing for longer than `idle_timeout`, while more waits for it than buffers hold."""
    script = (fs.slow_answer(pieces=["x" * 60_000] * 200),)
    async with stage(tmp_path, script, formats=wire, providers={"A": {"idle_timeout": 0.5}}) as (proxy, (a,)):
        async with raw_client(proxy, limit=4096) as (reader, _):
            await a.called(1)
            await still(lambda: a.sent, 1.0)
            assert a.sent < 200 * 60_000
            answer = b""
            while not answer.endswith(b"0\r\n\r\n") and (data := await reader.read(2**20)):
                answer += data
        await proxy.idle()
    (row,) = proxy.books.requests()
    assert answer.count(b"text_delta") == 200 and b"message_stop" in answer
    assert (row["status"], row["error"]) == (200, "")


@BOTH
async def test_events_that_come_together_go_out_together(wire: str, tmp_path: Path) -> None:
    pieces = ["x "] * 400
    async with (
        stage(tmp_path, (fs.answer(pieces=pieces),), formats=wire) as (proxy, _),
        raw_client(proxy) as (reader, _),
    ):
        await reader.readuntil(b"\r\n\r\n")
        chunks = [await read_chunk(reader)]
        while chunks[-1]:
            chunks.append(await read_chunk(reader))
    assert b"".join(chunks).count(b"text_delta") == 400 and len(chunks) < 20


@BOTH
async def test_an_event_of_a_megabyte_passes(wire: str, tmp_path: Path) -> None:
    async with stage(tmp_path, (fs.answer(pieces=["x" * 2**20]),), formats=wire) as (proxy, _):
        assert (await ask(proxy)).text == (await ask(proxy, stream=False)).text == "x" * 2**20


async def test_the_floor_is_at_the_price_of_the_target_that_answers(tmp_path: Path) -> None:
    """A's answer breaks before content, B's goes on: three times A's price an input token."""
    calls = (fs.error_after_start(),), (fs.cut_after(5, fs.Stall(), gate=False),)
    async with stage(tmp_path, *calls, providers={"A": {"max_retries": 0}}) as (proxy, (_, b)):
        asked = asyncio.create_task(ask(proxy))
        await b.called(1)
        size = len(json.dumps(message_body(stream=True)))

        def floor() -> int:
            return int(proxy.books.holds()[0]["floor_microusd"])

        await until(lambda: floor() > 0, "the floor was noted")
        await until(lambda: floor() > size // 2, "it is B's")
        asked.cancel()
        await asyncio.gather(asked, return_exceptions=True)


async def test_a_try_that_failed_leaves_no_floor_to_a_crash(tmp_path: Path) -> None:
    calls = fs.cut_after(1, fs.Send(fs.LAST_CHUNK)), fs.stall()  # the second is not answered
    async with stage(tmp_path, calls) as (proxy, (a,)):
        asked = asyncio.create_task(ask(proxy))
        await until(lambda: [h["floor_microusd"] > 0 for h in proxy.books.holds()] == [True], "it was noted")
        a.open_gate()
        await a.called(2)
        await until(lambda: proxy.books.holds()[0]["floor_microusd"] == 0, "it was taken back")
        asked.cancel()
        await asyncio.gather(asked, return_exceptions=True)


async def test_however_long_a_name_is_little_is_remembered_of_it(tmp_path: Path) -> None:
    name, refused = "A/" + "m" * 100_000, fails(400, says="model: String should have at most 256 characters")
    tagged = message_body(system=f"<CCM-SUBAGENT-MODEL>{name}</CCM-SUBAGENT-MODEL>")
    async with stage(tmp_path, OK, credits={"enforce": True}) as (proxy, _):
        refused(await ask(proxy, body=message_body(model=name)))
        full("A")(await ask(proxy, body=tagged))
        await proxy.idle()
        relay, counter = proxy.state.relay, proxy.state.counter
        kept = [*relay.breakers, *relay.learnt, *counter.recent, *counter.factors]
    assert kept and all(len(str(each)) < 1000 for each in kept)


async def test_a_request_is_timed_from_when_it_has_come(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What is counted before it has a route is part of what its client waits for."""
    count = ccmux.TokenCounter.count

    async def slow(self: ccmux.TokenCounter, *given: Any) -> int:
        await asyncio.sleep(0.2)
        return await count(self, *given)

    monkeypatch.setattr(ccmux.TokenCounter, "count", slow)
    async with fs.FaultServer(fs.answer()) as a:
        router = 'default = "m"\nlong_context = "m"\nlong_context_tokens = 1'
        text = config_text({"A": a.url}).replace('default = "m"', router)
        async with in_process(tmp_path, text) as proxy:
            full("A")(await ask(proxy))
            await proxy.idle()
            (row,) = proxy.books.requests()
    assert 390 < row["first_token_ms"] <= row["duration_ms"]  # two counts


@BOTH
async def test_a_whole_answer_above_64_mb_is_refused(wire: str, tmp_path: Path) -> None:
    large = fs.answer(pieces=["x" * 2**20] * 65)
    async with stage(tmp_path, (large,), formats=wire) as (proxy, _):
        fails(502, says="larger than")(await ask(proxy, stream=False))
    (tmp_path / "again").mkdir()
    async with stage(tmp_path / "again", (large,), (fs.answer(),), formats=wire) as (proxy, _):
        full("B")(await ask(proxy, stream=False))


@BOTH
async def test_a_stream_that_has_no_content_is_refused_in_the_end(
    wire: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(ccmux, "MAX_ANSWER", 2**20)
    comments = fs.Behaviour(lambda call: fs.stream_of([b": wait\n\n"] * 2**18))
    async with stage(tmp_path, (comments,), OK, formats=wire) as (proxy, _):
        full("B")(await ask(proxy))


@pytest.fixture
def shortcuts(monkeypatch: pytest.MonkeyPatch) -> list[ccmux.Shortcut]:
    """An entry each time that a request's task leaves its answer to a shortcut."""
    runs: list[ccmux.Shortcut] = []
    run = ccmux.Shortcut.run

    def noted(self: ccmux.Shortcut) -> Any:
        runs.append(self)
        return run(self)

    monkeypatch.setattr(ccmux.Shortcut, "run", noted)
    return runs


@BOTH
async def test_events_wake_no_task(wire: str, shortcuts: list[ccmux.Shortcut], tmp_path: Path) -> None:
    script = (fs.slow_answer(0, 0.002, ["x "] * 40),)
    async with stage(tmp_path, script, formats=wire) as (proxy, (a,)):
        for number in range(1, 4):
            assert (await ask(proxy)).text == "x " * 40
            assert len(shortcuts) == number
            await until(lambda: not busy_connections(proxy), "the answer's end has come")
            assert not isinstance(shortcuts[-1].protocol.transport.get_protocol(), ccmux.Shortcut)
        assert a.connections == 1


@pytest.fixture
def joinings(monkeypatch: pytest.MonkeyPatch) -> list[tuple[bytes, bytes]]:
    """The pieces of responses that came for aiohttp, each with what it got of it."""
    pieces: list[tuple[bytes, bytes]] = []
    joined = ccmux.Chunks.joined

    def noted(self: ccmux.Chunks, data: bytes) -> bytes:
        pieces.append((data, joined(self, data)))
        return pieces[-1][1]

    monkeypatch.setattr(ccmux.Chunks, "joined", noted)
    return pieces


@BOTH
async def test_whole_chunks_are_sent_on_without_aiohttp(
    wire: str, joinings: list[tuple[bytes, bytes]], tmp_path: Path
) -> None:
    script = (fs.slow_answer(0, 0.002, ["x "] * 40),)
    async with stage(tmp_path, script, formats=wire) as (proxy, (a,)):
        for _ in range(3):
            joinings.clear()
            assert (await ask(proxy)).text == "x " * 40
            await until(lambda: not busy_connections(proxy), "the answer's end has come")
            assert len(joinings) < 15
        assert a.connections == 1


@BOTH
async def test_streams_are_sent_on_where_aiohttp_takes_no_handler_of_ours(
    wire: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The place where it does is none of its promises."""
    monkeypatch.setattr(ccmux, "upstream_connector", lambda: aiohttp.TCPConnector)
    script = (fs.slow_answer(0, 0.002, ["x "] * 40),)
    async with stage(tmp_path, script, formats=wire) as (proxy, _):
        for _ in range(2):
            assert (await ask(proxy)).text == "x " * 40


def packed_answer(call: fs.UpstreamCall) -> Iterator[fs.Step]:
    """A good stream whose every event is packed by itself, and comes by itself."""
    packer = zlib.compressobj(wbits=31)
    yield fs.Send(fs.head(200, [*fs.STREAM_HEAD, ("Content-Encoding", "gzip")]))
    for block in fs.events_for(call, pieces=["x "] * 40):
        yield fs.Send(fs.chunked(packer.compress(block) + packer.flush(zlib.Z_SYNC_FLUSH)))
        yield fs.Pause(0.002)
    yield fs.Send(fs.chunked(packer.flush()) + fs.LAST_CHUNK)


@BOTH
async def test_a_stream_that_is_packed_is_unpacked(wire: str, tmp_path: Path) -> None:
    """ccmux asks for it as it is; some send it packed all the same."""
    async with stage(tmp_path, (fs.Behaviour(packed_answer),), formats=wire) as (proxy, _):
        assert (await ask(proxy)).text == "x " * 40


@BOTH
async def test_events_that_arrive_together_are_read_together(
    wire: str, joinings: list[tuple[bytes, bytes]], tmp_path: Path
) -> None:
    async with stage(tmp_path, (fs.answer(["x "] * 500),), formats=wire) as (proxy, (a,)):
        for _ in range(3):
            joinings.clear()
            assert (await ask(proxy)).text == "x " * 500
            came, went = (
                sum(data.count(b"\r\n") for data in pieces) for pieces in zip(*joinings, strict=True)
            )
            assert came > 1000 and went < came / 4
        assert a.connections == 1


@BOTH
async def test_a_connection_is_left_before_it_may_serve_another_answer(
    wire: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """And not by the task, which wakes up later."""
    left: list[bool] = []
    take = ccmux.Shortcut.data_received

    def noted(self: ccmux.Shortcut, data: bytes) -> None:
        take(self, data)
        if self.over.done():
            transport = self.protocol.transport
            left.append(transport is None or transport.get_protocol() is self.protocol)

    monkeypatch.setattr(ccmux.Shortcut, "data_received", noted)
    script = (fs.slow_answer(), fs.error_midway(), fs.slow_answer())
    async with stage(tmp_path, script, formats=wire) as (proxy, servers):
        for _ in script:
            await ask(proxy, on_data=opens_gates(servers))
    assert left and all(left)


def all_but(events: int) -> Callable[[fs.UpstreamCall], bytes]:
    return lambda call: b"".join(fs.events_for(call)[events:])


@pytest.mark.parametrize(
    ("rest", "sees"),
    [(all_but(5), full()), (fs.error_event, breaks_off("overloaded_error"))],
    ids=["its end", "an error"],
)
@BOTH
async def test_an_answer_is_over_where_it_says_so(wire: str, rest: Any, sees: Any, tmp_path: Path) -> None:
    """And not when its connection, which the upstream keeps open, would have been silent for too long."""
    script = (fs.cut_after(5, fs.Stall(), extra=rest),)
    async with stage(tmp_path, script, formats=wire) as (proxy, servers), asyncio.timeout(20):
        sees(await ask(proxy, on_data=opens_gates(servers)))


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("ending", [fs.End(), fs.Stall()], ids=["closed", "silent"])
@pytest.mark.parametrize("events", [7, 8])  # with and without its usage
async def test_an_answer_that_breaks_off_after_its_finish_reason_is_whole(
    events: int, ending: fs.Step, stream: bool, tmp_path: Path
) -> None:
    script, limits = (
        (fs.cut_after(events, ending, gate=False),),
        {"A": {"idle_timeout": 0.5, "max_retries": 0}},
    )
    async with stage(tmp_path, script, formats="openai", providers=limits) as (proxy, _), asyncio.timeout(20):
        full()(await ask(proxy, stream=stream))
        await proxy.idle()
        assert [outcome["ok"] for outcome in proxy.state.relay.health_of("A").outcomes] == [True]


@pytest.mark.parametrize("seed", range(4))
@BOTH
async def test_a_client_that_reads_by_fits_and_starts_gets_all(wire: str, seed: int, tmp_path: Path) -> None:
    rand = random.Random(seed)
    pieces = [chr(97 + n % 26) * rand.choice([1, 1, 1, 1, 5_000, 40_000, 300_000]) for n in range(120)]
    async with (
        stage(tmp_path, (fs.slow_answer(pieces=pieces),), formats=wire) as (proxy, _),
        raw_client(proxy, limit=2**14) as (reader, _),
    ):
        await reader.readuntil(b"\r\n\r\n")
        body = b""
        while chunk := await read_chunk(reader):
            body += chunk
            await asyncio.sleep(rand.choice([0, 0, 0.001, 0.02]))
    assert Reply(200, {"content-type": "text/event-stream"}, body).text == "".join(pieces)


@BOTH
async def test_crumbs_pass(wire: str, tmp_path: Path) -> None:
    """So many HTTP chunks at once that aiohttp stops to read until they are taken."""
    pieces = ["y" * 100] * 500

    def steps(call: fs.UpstreamCall) -> Any:
        blocks = fs.events_for(call, pieces=pieces)
        begin, rest = b"".join(map(fs.chunked, blocks[:5])), b"".join(blocks[5:])
        yield fs.Send(fs.head(200, fs.STREAM_HEAD) + begin)
        yield fs.Gate()
        crumbs = b"".join(fs.chunked(rest[at : at + 1]) for at in range(len(rest)))
        yield fs.Send(crumbs + fs.LAST_CHUNK)

    script, limits = (fs.Behaviour(steps),), {"providers": {"A": {"idle_timeout": 5}}}
    async with stage(tmp_path, script, formats=wire, **limits) as (proxy, servers):
        reply = await ask(proxy, on_data=opens_gates(servers))
    assert reply.text == "y" * 50_000 and reply.kinds[-1] == "message_stop"


@BOTH
async def test_a_fault_of_ccmux_itself_ends_a_stream(
    wire: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    reader: Any = ccmux.AnthropicTap if wire == "anthropic" else ccmux.Translation
    feed, script = reader.feed, fs.cut_after(5, fs.Stall(), extra=lambda call: b": broken\n\n")

    def breaks(self: Any, data: bytes) -> bytes:
        if b"broken" in data:
            raise KeyError("a mistake")
        return feed(self, data)

    monkeypatch.setattr(reader, "feed", breaks)
    async with stage(tmp_path, (script,), formats=wire) as (proxy, servers), asyncio.timeout(20):
        breaks_off("api_error")(await ask(proxy, on_data=opens_gates(servers)))
        await servers[0].cancelled(1)
        await proxy.idle()
    check_ledger(proxy, PART)
    (row,) = proxy.books.requests()
    assert (row["status"], row["error"]) == (500, "internal")


@pytest.mark.parametrize("stream", [True, False])
@BOTH
async def test_a_fault_of_ccmux_before_an_answer_is_no_client_that_left(
    wire: str, stream: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    def breaks(*given: Any) -> Any:
        raise KeyError("a mistake")

    monkeypatch.setattr(ccmux.Attempt, "reader_of_answer", breaks)
    async with stage(tmp_path, OK, formats=wire) as (proxy, _):
        fails(500, "api_error", says="its log says why")(await ask(proxy, stream=stream))
    assert caplog.text.count("failed inside ccmux") == caplog.text.count("KeyError: 'a mistake'") == 1
    (row,) = proxy.books.requests()
    assert (row["status"], row["error"], row["charge_microusd"]) == (500, "internal", 0)
    assert proxy.books.holds() == []


@pytest.mark.parametrize("stream", [True, False])
async def test_an_answer_whose_settlement_can_never_be_written_goes_out(
    stream: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    def fails_always(*_: Any) -> None:
        raise ValueError("a mistake")

    monkeypatch.setattr(ccmux.Store, "write_settlement", fails_always)
    async with stage(tmp_path, OK) as (proxy, _):
        full()(await ask(proxy, stream=stream))
    assert "a settlement cannot be written" in caplog.text


@contextlib.asynccontextmanager
async def tls_stage(
    folder: Path, script: fs.Behaviour, wire: str
) -> AsyncIterator[tuple[Proxy, FaultServer]]:
    """A ccmux whose target speaks TLS, with a certificate that it trusts."""
    async with FaultServer(script, tls=True) as server:
        limits = {"A": {"idle_timeout": 20}}
        async with in_process(
            folder, config_text({"A": server.url}, formats=wire, providers=limits)
        ) as proxy:
            connector: Any = proxy.state.relay.session.connector
            connector._ssl = ssl.create_default_context(cafile=fs.CERTIFICATE)
            yield proxy, server


TLS_STREAMS = {
    "chunked": (fs.gated_answer(), full()),
    "reset": (fs.cut_after(5, fs.Reset()), breaks_off("api_error")),
    "end": (fs.cut_after(5, fs.End()), breaks_off("api_error")),
    "until-closed": (fs.until_closed(fs.End()), full()),
    "until-closed-midway": (fs.until_closed(fs.End(), events=5), breaks_off("api_error")),
    "until-reset-midway": (fs.until_closed(fs.Reset(), events=5), breaks_off("api_error")),
}


@pytest.mark.parametrize("stream", TLS_STREAMS)
@BOTH
async def test_streams_over_tls(wire: str, stream: str, tmp_path: Path) -> None:
    """asyncio's transport of TLS forgets its protocol, and then all, before aiohttp's is done with it."""
    script, sees = TLS_STREAMS[stream]
    async with tls_stage(tmp_path, script, wire) as (proxy, server):
        async with asyncio.timeout(15):
            sees(await ask(proxy, on_data=opens_gates([server], 1)))
        await proxy.idle()
        assert len(proxy.books.ledger()) == 1


@BOTH
async def test_a_tls_connection_that_is_just_lost_takes_no_shortcut(
    wire: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Between asyncio's noticing and aiohttp's being told, which goes by the protocol of before."""
    run, windows = ccmux.Shortcut.run, []

    async def late(self: ccmux.Shortcut) -> bytes:
        connection = self.response.connection
        while connection and connection.transport and connection.transport.get_protocol() is not None:
            await asyncio.sleep(0)
        windows.append(bool(connection and connection.transport))
        return await run(self)

    monkeypatch.setattr(ccmux.Shortcut, "run", late)
    async with tls_stage(tmp_path, fs.cut_after(5, fs.End(), gate=False), wire) as (proxy, _):
        async with asyncio.timeout(15):  # its silence would end it after twenty
            breaks_off("api_error")(await ask(proxy))
    assert windows[0]


async def test_slow_readers_cost_little_memory(tmp_path: Path) -> None:
    """Ten clients that do not read, an upstream that sends all it can: less than 2 MB each."""
    async with FaultServer(fs.endless()) as a, as_process(tmp_path, config_text({"A": a.url})) as proxy:
        assert proxy.process is not None
        server = psutil.Process(proxy.process.pid)
        await hang_up(proxy, after_text(1))
        await still(lambda: server.memory_info().rss // 2**20)  # what is loaded once is loaded
        before = server.memory_info().rss
        async with contextlib.AsyncExitStack() as stack:
            for _ in range(10):
                await stack.enter_async_context(dawdler(proxy))
            await a.called(11)
            await still(lambda: a.sent)
            assert server.memory_info().rss - before < 10 * 2 * 2**20


async def still(value: Callable[[], int], seconds: float = 0.5) -> None:
    """Until a number has not changed for a while: everything that fits into buffers is in them."""
    last, since = value(), time.monotonic()
    while time.monotonic() - since < seconds:
        await asyncio.sleep(0.02)
        if value() != last:
            last, since = value(), time.monotonic()


# Many at once, and a config that changes.


# fmt: off
FAULTS = [
    fs.status(500), fs.status(529), fs.status(400), fs.reset_at_accept(), fs.reset_before_status(),
    fs.close_before_status(), fs.html(), fs.empty(), fs.error_first(), fs.error_after_start(),
    fs.error_midway_at_once(), fs.cut_after(5, fs.Reset(), gate=False), fs.cut_after(5, fs.End(), gate=False),
]
# fmt: on


def mixed_faults(share: float, seed: int) -> list[fs.Behaviour]:
    """A script for many calls: a share of them fails, each in its own way. No connection serves twice."""
    chance = random.Random(seed)

    def closing(fault: fs.Behaviour) -> fs.Behaviour:
        return dataclasses.replace(fault, steps=lambda call: [*fault.steps(call), fs.End()])

    faults = [closing(fault) for fault in FAULTS]
    return [chance.choice(faults) if chance.random() < share else fs.answer(last=True) for _ in range(1000)]


@BOTH
async def test_of_200_streams_each_ends_well_or_with_an_error(wire: str, tmp_path: Path) -> None:
    limits = {"providers": {name: {"max_concurrent": 500} for name in "AB"}}
    scripts = mixed_faults(0.1, 1), mixed_faults(0.1, 2)
    async with stage(tmp_path, *map(tuple, scripts), formats=wire, **limits) as (proxy, (a, b)):
        replies = await ask_many(proxy, 200)
        await proxy.idle()
        for reply in replies:
            assert not reply.broken
            if reply.status != 200:
                assert reply.json["type"] == "error" and reply.json["error"]["message"]
            elif reply.kinds[-1] == "error":
                assert HELLO.startswith(reply.text) and "message_stop" not in reply.kinds
            else:
                assert reply.text == HELLO and reply.kinds[-1] == "message_stop"
        good = [r for r in replies if r.status == 200 and r.kinds[-1] == "message_stop"]
        assert len(good) > 180
        rows = proxy.books.requests()
        assert len(rows) == len({row["request_id"] for row in rows}) == 200
        assert sum(row["attempts"] for row in rows) == a.count + b.count
        paid = {row["request_id"] for row in rows if row["charge_microusd"]}
        assert paid == {entry["request_id"] for entry in proxy.books.ledger() if entry["amount_microusd"]}
        assert {reply.headers["request-id"] for reply in good} <= paid
        assert proxy.books.holds() == []
        proxy.books.check_sums()


async def test_a_reload_leaves_live_streams_alone(tmp_path: Path) -> None:
    async with contextlib.AsyncExitStack() as stack:
        a = await stack.enter_async_context(FaultServer(fs.gated_answer()))
        b = await stack.enter_async_context(FaultServer(fs.answer()))
        proxy = await stack.enter_async_context(in_process(tmp_path, config_text({"A": a.url})))
        asked = asyncio.create_task(ask(proxy))
        await a.called(1)
        proxy.config_file.write_text(config_text({"B": b.url}))
        ccmux.reload_config(proxy.state)
        full("B")(await ask(proxy))
        a.open_gate()
        full("A")(await asked)
        await proxy.idle()
    assert [entry["amount_microusd"] for entry in proxy.books.ledger()] == [-FULL["B"], -FULL["A"]]


async def test_a_broken_config_keeps_the_old_one(tmp_path: Path) -> None:
    async with stage(tmp_path, OK) as (proxy, _):
        proxy.config_file.write_text("[server\n")
        ccmux.reload_config(proxy.state)
        assert proxy.state.config_error
        full("A")(await ask(proxy))
