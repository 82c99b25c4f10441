"""Upstream: the parts that need no socket."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import math
import re
from collections.abc import Callable
from typing import Any

import h11
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from multidict import CIMultiDict
from proxy_harness import config_text, message_body, provider_row
from translation import PDF, PNG, text, tool_result, user

import ccmux


def a_call() -> ccmux.Call:
    route = ccmux.Route("m", "default", (), ())
    return ccmux.Call("req_1", {}, b"", {}, route, ccmux.Config(), stream=False)


def a_slot(key: str, **quirks: Any) -> ccmux.Slot:
    provider = ccmux.Provider(name="p", api_key=(key,), quirks=ccmux.Quirks(**quirks))
    return ccmux.Slot(ccmux.Target("p", "m"), provider, key)


def record(breaker: ccmux.Breaker, now: float, ok: bool) -> None:
    """A try that took no time."""
    breaker.record(a_call(), now, now, ok)


def tripped(failures: int = 5) -> ccmux.Breaker:
    breaker = ccmux.Breaker()
    for second in range(failures):
        record(breaker, float(second), False)
    return breaker


@pytest.mark.parametrize(
    ("outcomes", "state"),
    [
        pytest.param([False] * 4, "closed", id="four failures in a row"),
        pytest.param([False] * 5, "open", id="five failures in a row"),
        pytest.param(
            [False] * 4 + [True] + [False] * 4, "closed", id="a success between: 8 of 9 are too few"
        ),
        pytest.param([True, False] * 5, "open", id="half of ten"),
        pytest.param([True, True, False] * 6, "closed", id="a third of eighteen"),
        pytest.param([True] * 20, "closed", id="all well"),
    ],
)
def test_breaker_opens(outcomes: list[bool], state: str) -> None:
    breaker = ccmux.Breaker()
    for second, ok in enumerate(outcomes):
        record(breaker, float(second), ok)
    assert breaker.state(len(outcomes)) == state


def test_breaker_forgets_after_a_minute() -> None:
    breaker = ccmux.Breaker()
    for second in range(0, 20, 2):
        record(breaker, float(second), True)
    for second in range(4):
        record(breaker, 100.0 + second, False)
    assert breaker.state(104) == "closed"
    assert breaker.bad == 4
    assert len(breaker.recent) == 4


def test_half_open_lets_exactly_one_probe_through() -> None:
    breaker, probe, other = tripped(), a_call(), a_call()
    assert not breaker.allows(5)
    later = breaker.open_until + 0.1
    assert breaker.state(later) == "half-open"
    assert breaker.allows(later)
    breaker.begin(later, probe)
    breaker.begin(later, other)
    assert not breaker.allows(later)
    breaker.leave(other)
    record(breaker, later, False)
    assert not breaker.allows(later) and breaker.interval == 10
    breaker.record(probe, later, later, True)
    assert breaker.state(later) == "closed"
    assert breaker.allows(later)


def test_a_probe_that_has_content_lets_the_others_through() -> None:
    breaker, probe = tripped(), a_call()
    later = breaker.open_until + 0.1
    breaker.begin(later, probe)
    probe.first_content = later
    assert breaker.allows(later)
    record(breaker, later, True)
    assert breaker.state(later) == "closed"


def test_a_breaker_that_closed_starts_anew() -> None:
    breaker, probe = tripped(), a_call()
    later = breaker.open_until + 0.1
    breaker.begin(later, probe)
    breaker.record(probe, later, later, True)
    record(breaker, later, False)
    for _ in range(8):
        record(breaker, later, True)
    assert breaker.state(later) == "closed" and (breaker.bad, len(breaker.recent)) == (1, 10)


@pytest.mark.parametrize("ok", [True, False])
def test_tries_from_before_the_opening_change_nothing(ok: bool) -> None:
    breaker = tripped()
    before = (breaker.interval, breaker.open_until, breaker.failures)
    for _ in range(20):
        breaker.record(a_call(), 3.9, 6.0, ok)
    assert (breaker.interval, breaker.open_until, breaker.failures) == before


def test_open_interval_doubles_up_to_five_minutes() -> None:
    breaker, probe = tripped(), a_call()
    intervals = [breaker.interval]
    for _ in range(8):
        now = breaker.open_until + 1
        breaker.begin(now, probe)
        breaker.record(probe, now, now, False)
        intervals.append(breaker.interval)
        assert abs(breaker.open_until - now - breaker.interval) <= 0.1 * breaker.interval
    assert intervals == [10, 20, 40, 80, 160, 300, 300, 300, 300]


def test_breakers_that_open_together_are_not_tried_again_together() -> None:
    ends = [tripped().open_until - 4 for _ in range(50)]
    assert all(9 <= end <= 11 for end in ends) and max(ends) - min(ends) > 0.5


def test_retry_budget_is_a_fifth_of_what_is_active_but_at_least_three() -> None:
    health = ccmux.Health(active=1, retrying=2)
    assert health.may_retry()
    health.retrying = 3
    assert not health.may_retry()
    health.active = 100
    assert health.may_retry()
    health.retrying = 20
    assert not health.may_retry()


def a_plan(tries: int = 1, slept: float = 0.0, formats: str = "anthropic") -> tuple[ccmux.Plan, ccmux.Slot]:
    """A plan after so many tries of its only target, which may have a lot; the slot of the last."""
    rows = config_text({"A": "http://127.0.0.1:1"}, formats=formats, providers={"A": {"max_retries": 9}})
    config, body = ccmux.load_config(rows, {}), message_body()
    call = ccmux.Call("req_1", body, b"", {}, ccmux.choose_route(body, {}, config), config, stream=False)
    plan = ccmux.Plan(ccmux.Relay(None, None, ccmux.Metrics()), call)  # type: ignore[arg-type]
    slot = plan.next_slot()
    assert plan.relay.ping_interval == 15
    for _ in range(tries - 1):
        plan.again = slot
        plan.next_slot()
    plan.slept = slept
    return plan, slot


@pytest.mark.parametrize(
    ("base", "learnt"), [("https://api.anthropic.com", set()), ("http://127.0.0.1:1", {"files"})]
)
def test_a_document_in_the_wrong_place_teaches_nothing_of_anthropics_own_models(
    base: str, learnt: set[str]
) -> None:
    plan, slot = a_plan()
    slot = dataclasses.replace(slot, provider=dataclasses.replace(slot.provider, base_url=base))
    words = "messages.1.content.0: Input tag 'document' found using 'type' does not match any of the expected tags"
    assert plan.mends(slot, ccmux.ApiError(400, words)) == bool(learnt)
    assert plan.relay.not_taken(plan.call, slot) == learnt


@pytest.mark.parametrize(
    ("status", "learnt"), [(400, True), (422, True), (403, False), (404, False), (500, False)]
)
def test_only_what_refuses_the_request_teaches_what_it_can_do_without(status: int, learnt: bool) -> None:
    plan, slot = a_plan(formats="openai")
    error = ccmux.ApiError(status, "Unsupported parameter: 'temperature'")
    assert plan.mends(slot, error) is learnt
    assert plan.relay.not_taken(plan.call, slot) == ({"temperature"} if learnt else set())


def failure(status: int, retry_after: float | None = None) -> ccmux.ApiError:
    error = ccmux.upstream_error(status, {})
    error.retry_after = retry_after
    return error


@pytest.mark.parametrize(
    ("tries", "status", "retry_after", "least", "most"),
    [
        pytest.param(1, 500, None, 0, 0.25, id="first"),
        pytest.param(2, 500, None, 0, 0.5, id="second"),
        pytest.param(3, 500, None, 0, 1, id="third"),
        pytest.param(1, 500, 0.5, 0.5, 0.75, id="a 500 that says when"),
        pytest.param(1, 429, 0.5, 0.5, 0.75, id="a limit that says when"),
        pytest.param(1, 429, None, 1, 1.25, id="a limit that does not"),
    ],
)
async def test_back_off_has_full_jitter(
    tries: int, status: int, retry_after: float | None, least: float, most: float
) -> None:
    async def wait() -> float:
        plan, slot = a_plan(tries)
        assert await plan.goes_on(slot, failure(status, retry_after))
        return plan.slept

    waits = await asyncio.gather(*(wait() for _ in range(40)))
    assert all(least <= wait <= most for wait in waits)
    assert min(waits) < least + (most - least) / 3 and max(waits) > most - (most - least) / 3


@pytest.mark.parametrize(
    ("tries", "retry_after", "slept", "goes_on"),
    [
        pytest.param(3, 0.0, 0.0, True, id="the fourth try"),
        pytest.param(4, 0.0, 0.0, False, id="no fifth try"),
        pytest.param(1, 5.01, 0.0, False, id="a wait above five seconds"),
        pytest.param(1, 0.5, 14.6, False, id="above 15 s of sleep in all"),
        pytest.param(1, 0.0, 14.7, True, id="below 15 s of sleep in all"),
    ],
)
async def test_how_long_a_request_goes_on(
    tries: int, retry_after: float, slept: float, goes_on: bool
) -> None:
    plan, slot = a_plan(tries, slept)
    assert await plan.goes_on(slot, failure(429, retry_after)) is goes_on
    assert (plan.call.retries_at is not None) is goes_on


@pytest.mark.parametrize(
    ("status", "retry_after", "here", "elsewhere"),
    [
        pytest.param(429, None, 1, 0, id="a limit that does not say"),
        pytest.param(429, 30.0, 30, 0, id="a limit that says"),
        pytest.param(429, 0.0, 0, 0, id="a limit that is over"),
        *(pytest.param(status, None, 300, 300, id=f"{status}") for status in (401, 402, 403)),
        *(pytest.param(status, 30.0, 0, 0, id=f"{status}") for status in (400, 404, 500, 529)),
    ],
)
def test_how_long_a_key_rests(status: int, retry_after: float | None, here: float, elsewhere: float) -> None:
    """For the model that was asked for, and for others."""
    plan, slot = a_plan()
    plan.relay.cool(slot, failure(status, retry_after), 1000.0)
    other = dataclasses.replace(slot, target=ccmux.Target("A", "another"))
    assert (plan.relay.rests(slot, 1000.0), plan.relay.rests(other, 1000.0)) == (here, elsewhere)


QUOTA = "You exceeded your current quota, please check your plan and billing details."
KIMI = "Your account org-1 <ak-1> is suspended due to insufficient balance, please recharge your account"
GROK = (
    "Your team 1f2 has either used all available credits or reached its monthly spending limit. To continue"
)


SUSPENDED = "Account a is suspended, possibly due to reaching the monthly spending limit or failure to pay past invoices."
TOO_LOW = "Your credit balance is too low to access the Anthropic API. Please go to Plans & Billing to purchase credits."


@pytest.mark.parametrize(
    ("status", "error"),
    [
        pytest.param(429, {"message": QUOTA, "type": "insufficient_quota", "code": "insufficient_quota"}, id="OpenAI"),
        pytest.param(429, {"message": QUOTA, "type": "insufficient_quota", "code": None}, id="OpenAI's older"),
        pytest.param(429, {"message": KIMI, "type": "exceeded_current_quota_error"}, id="Moonshot"),
        pytest.param(429, {"code": "1113", "message": "Insufficient balance or no resource package."}, id="Z.ai"),
        pytest.param(429, {"type": "rate_limit_error", "code": "1113", "message": "[1113][Insufficient balance]"},
                     id="Z.ai in Anthropic's format"),
        pytest.param(429, GROK, id="xAI"),
        pytest.param(403, GROK, id="xAI's 403"),
        pytest.param(403, {"message": "Key limit exceeded (total limit).", "code": 403}, id="OpenRouter"),
        pytest.param(412, {"message": SUSPENDED, "code": "PRECONDITION_FAILED", "type": "error"}, id="Fireworks"),
        pytest.param(429, {"message": "Your account is not active", "type": "billing_not_active", "code": None},
                     id="OpenAI's not active"),
        pytest.param(429, {"message": "insufficient balance (1008)", "type": "insufficient_balance_error"}, id="MiniMax"),
        pytest.param(403, {"message": "user quota is not enough", "type": "v_api_error", "param": "",
                           "code": "insufficient_user_quota"}, id="New API"),
        pytest.param(429, {"message": "Budget has been exceeded! Current cost: 10.51, Max budget: 10.00", "code": "429",
                           "type": "budget_exceeded"}, id="LiteLLM"),
        pytest.param(400, {"message": "Budget has been exceeded! Current cost: 26.075", "type": "auth_error", "code": 400},
                     id="LiteLLM's older"),
        pytest.param(400, {"type": "invalid_request_error", "message": TOO_LOW}, id="Anthropic"),
        pytest.param(400, {"type": "invalid_request_error", "message": "You have reached your specified API usage limits. "
                           "You will regain access on 2026-04-01 at 00:00 UTC."}, id="Anthropic's limit of a month"),
        pytest.param(500, {"type": "api_error", "message": "insufficient balance (1008)"},
                     id="MiniMax in Anthropic's format"),
    ],
)  # fmt: skip
def test_an_account_without_money_rests_as_for_a_402(status: int, error: Any) -> None:
    plan, slot = a_plan()
    told = ccmux.upstream_error(status, {"error": error})
    plan.relay.cool(slot, told, 1000.0)
    another = dataclasses.replace(slot, target=ccmux.Target("A", "another"))
    assert (plan.relay.rests(slot, 1000.0), plan.relay.rests(another, 1000.0)) == (300, 300)
    assert (told.retry, told.should_retry) == (ccmux.Retry.KEY, False)
    kinds = {400: (400, "invalid_request_error"), 500: (500, "api_error")}
    assert (told.status, told.type) == kinds.get(status, (429, "billing_error"))


@pytest.mark.parametrize(
    "error",
    [
        pytest.param({"message": QUOTA, "code": 429, "status": "RESOURCE_EXHAUSTED"}, id="Gemini's limit of a minute"),
        pytest.param({"message": f"{QUOTA} See https://help.aliyun.com/", "code": "insufficient_quota"},
                     id="Alibaba's, of a minute's tokens"),
        pytest.param({"message": "Allocated quota exceeded, please", "code": "insufficient_quota"}, id="Alibaba's, too"),
        pytest.param({"message": "Provider returned error", "code": 429,
                      "metadata": {"raw": '{"error":{"type":"exceeded_current_quota_error"}}'}}, id="OpenRouter's own"),
    ],
)  # fmt: skip
def test_a_limit_that_sounds_like_an_empty_account_is_one(error: Any) -> None:
    told = ccmux.upstream_error(429, {"error": error})
    assert (told.type, told.cause, told.should_retry) == ("rate_limit_error", "http_429", None)


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (401, "bad key"),
        (401, "invalid x-api-key"),
        (400, "API key not valid. Please pass a valid API key."),
        (400, "Incorrect API key provided: sk***YA. You can obtain an API key from https://console.x.ai."),
        (400, "Access denied, please make sure your account is in good standing."),
        (400, "API key expired. Please renew the API key."),
        (400, "No connected db."),
    ],
)
def test_client_sees_a_refused_provider_key_as_ccmux_trouble(status: int, words: str) -> None:
    refusal = ccmux.upstream_error(status, {"error": {"message": words}})
    assert refusal.retry is ccmux.Retry.KEY
    seen = ccmux.client_error(refusal, a_slot("sk-secret-value"), a_call())
    assert (seen.status, seen.type, seen.should_retry) == (500, "api_error", False)
    assert "sk-secret" not in seen.message
    assert "'p'" in seen.message
    assert "x-api-key" not in seen.message  # Claude Code would say "Invalid API key", meaning its own


def test_passthrough_keeps_the_upstreams_word_on_the_clients_own_login() -> None:
    refusal = ccmux.upstream_error(401, {})
    assert ccmux.client_error(refusal, a_slot("passthrough"), a_call()).status == 401


def test_an_overloaded_provider_that_does_not_say_when_is_asked_again_in_five_seconds() -> None:
    for said, told in ((None, 5), (2.0, 2)):
        assert ccmux.client_error(failure(529, said), a_slot("k"), a_call()).retry_after == told
    assert ccmux.client_error(failure(500), a_slot("k"), a_call()).retry_after is None


@pytest.mark.parametrize(
    "payload",
    [
        {
            "error": "/v1/messages: Invalid model name passed in model=x. Call `/v1/models` to view available models."
        },
        {"error": {"message": "a/b is not a valid model ID", "code": 400}},
        {"error": {"message": "Model Not Exist", "code": "invalid_request_error"}},
        {"object": "error", "message": "Invalid model: x", "type": "invalid_model", "code": "1500"},
        {"error": {"code": "1211", "message": "Unknown Model, please check the model code."}},
        {"error": {"message": "The requested model 'x' does not exist.", "code": "model_not_found"}},
        {"error": {"message": "The model `x` has been decommissioned.", "code": "model_decommissioned"}},
        {"error": {"message": "Unable to access non-serverless model x.", "code": "model_not_available"}},
        {"message": "The provided model identifier is invalid."},
        {"error": 'Invalid model identifier "x". Please specify a valid downloaded model'},
    ],
)
def test_an_unknown_model_is_a_404_whatever_the_status(payload: ccmux.Json) -> None:
    error = ccmux.upstream_error(400, payload)
    assert (error.status, error.type, error.retry) == (404, "not_found_error", ccmux.Retry.NEXT)


@pytest.mark.parametrize(
    "words",
    [
        "Invalid 'tools': array too long. Expected an array with maximum length 128, but got an array with length 130 instead.",
        "'tools' : maximum number of items is 128",
        "Maximum tools limit reached. 219 tools have been provided but the maximum is 200.",
        "The GenerateContentRequest proto is invalid:\n  * tools[0].function_declarations: [FIELD_INVALID] At most 512 "
        "function declarations can be specified.",
        "You may not include more than 128 tools in your request.",
        "Upstream request failed: [unsupported_tool_schema] The tool schema is not supported (tool_count_limit).",
        "tools.0: Input tag 'web_search_20250305' found using 'type' does not match any of the expected tags: 'custom'",
        "Hosted tool 'web_search_preview' is not supported with m.",
    ],
    ids=["OpenAI", "Groq", "xAI", "Gemini", "Copilot", "OpenCode", "Bedrock", "search"],
)  # fmt: skip
def test_what_another_vendor_may_take_is_a_400_that_goes_to_the_next_target(words: str) -> None:
    error = ccmux.upstream_error(400, {"error": {"message": words, "param": "tools"}})
    assert (error.status, error.type, error.retry) == (400, "invalid_request_error", ccmux.Retry.NEXT)
    assert error.message.startswith(words) and "in Claude Code" in error.message
    assert ccmux.refused_parameter(error.message, error.param) == ""


@pytest.mark.parametrize(
    "words",
    [
        "registry.ollama.ai/library/m does not support tools",
        "deepseek-reasoner does not support Function Calling",
        '"auto" tool choice requires --enable-auto-tool-choice and --tool-call-parser to be set',
        "Your organization must be verified to stream this model. Please go to: https://a and click on Verify.",
        "User location is not supported for the API use.",
    ],
)
def test_what_a_model_or_an_account_has_not_goes_to_the_next_target_in_its_words(words: str) -> None:
    error = ccmux.upstream_error(400, {"error": {"message": words}})
    assert (error.status, error.message, error.retry) == (400, words, ccmux.Retry.NEXT)
    assert ccmux.refused_parameter(words) == ""


@pytest.mark.parametrize(
    "words", ["Unknown model_settings", "model: Extra inputs are not permitted", "invalid model output"]
)
def test_other_refusals_that_name_the_model_stay_a_400(words: str) -> None:
    assert ccmux.upstream_error(400, {"error": {"message": words}}).status == 400


@pytest.mark.parametrize(
    ("style", "expected"),
    [
        ("", {"x-api-key": "k"}),
        ("bearer", {"authorization": "Bearer k"}),
        ("both", {"x-api-key": "k", "authorization": "Bearer k"}),
        ("none", {}),
    ],
)
def test_auth_styles(style: str, expected: dict[str, str]) -> None:
    assert ccmux.auth_headers(a_slot("k", auth=style), ccmux.DIALECTS["anthropic"]) == expected


def test_metrics_are_prometheus_text() -> None:
    metrics = ccmux.Metrics()
    odd = (("provider", 'a"b\n\\'), ("status", "200"))
    metrics.add("ccmux_requests_total", odd)
    metrics.add("ccmux_requests_total", odd, 123_456_789)
    for seconds, provider in ((0.3, "a"), (7, "a"), (500, "a"), (0.1, "b")):
        metrics.observe("ccmux_first_token_seconds", (("provider", provider),), seconds)
    gauges = {
        "ccmux_requests_in_flight": 1,
        'ccmux_breaker_state{key="a"}': 0,
        'ccmux_breaker_state{key="b"}': 2,
    }
    lines = metrics.render(gauges).splitlines()
    assert lines[:2] == [
        "# TYPE ccmux_requests_total counter",
        'ccmux_requests_total{provider="a\\"b\\n\\\\",status="200"} 123456790',
    ]
    assert lines[2] == "# TYPE ccmux_first_token_seconds histogram"
    bounds = ["0.1", "0.25", "0.5", "1", "2.5", "5", "10", "30", "60", "120", "+Inf"]
    for provider, first, below, total in (
        ("a", 3, (0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3), "507.3"),
        ("b", 16, (1,) * 11, "0.1"),
    ):
        assert lines[first : first + 13] == [
            *(f'ccmux_first_token_seconds_bucket{{provider="{provider}",le="{le}"}} {count}'
              for le, count in zip(bounds, below, strict=True)),
            f'ccmux_first_token_seconds_sum{{provider="{provider}"}} {total}',
            f'ccmux_first_token_seconds_count{{provider="{provider}"}} {below[-1]}',
        ]  # fmt: skip
    assert lines[29:] == [
        "# TYPE ccmux_requests_in_flight gauge",
        "ccmux_requests_in_flight 1",
        "# TYPE ccmux_breaker_state gauge",
        'ccmux_breaker_state{key="a"} 0',
        'ccmux_breaker_state{key="b"} 2',
    ]


LOST_IMAGE = text("[image left out: this model takes only text]")
LOST_PDF = text("[a PDF named a.pdf was left out: this model cannot read it]")
WORDS = {"type": "document", "source": {"type": "text", "data": "words"}}


def said(*blocks: Any) -> ccmux.Json:
    return {"messages": [user(*blocks)]}


@pytest.mark.parametrize(
    ("drop", "body", "expected"),
    [
        pytest.param(("foo",), {"foo": 1, "model": "m"}, {"model": "m"}, id="a key"),
        pytest.param(("foo",), {"model": "m"}, {"model": "m"}, id="nothing to drop"),
        pytest.param(
            ("billing_header",),
            {"system": [text("x-anthropic-billing-header: v"), text("s")]},
            {"system": [text("s")]},
            id="billing header",
        ),
        pytest.param(
            ("tool_type",),
            {"tools": [{"name": "a", "type": "custom"}, {"name": "w", "type": "web_search_20250305"}]},
            {"tools": [{"name": "a"}, {"name": "w", "type": "web_search_20250305"}]},
            id="type of client tools",
        ),
        pytest.param(
            ("media",),
            said(tool_result("t", [PNG])),
            said(tool_result("t", [LOST_IMAGE])),
            id="images in tool results",
        ),
        pytest.param(("files",), said(PNG, PDF, WORDS), said(PNG, LOST_PDF, "words"), id="documents"),
        pytest.param(
            ("reasoning",),
            {
                "thinking": {"type": "adaptive"},
                "context_management": {"edits": []},
                "output_config": {"effort": "low", "format": {}},
            },
            {"output_config": {"format": {}}},
            id="thinking and effort",
        ),
        pytest.param(("reasoning",), {"output_config": {"effort": "low"}}, {}, id="nothing but an effort"),
    ],
)
def test_drop_list(drop: tuple[str, ...], body: ccmux.Json, expected: ccmux.Json) -> None:
    to = ccmux.Upstream("m", ccmux.Quirks(drop=drop), ccmux.Facts())
    assert ccmux.without_dropped(body, to) == expected


@pytest.mark.parametrize(
    ("preset", "asked", "sent"),
    [
        ("moonshot", {"effort": "medium", "format": {}}, {"effort": "low", "format": {}}),
        ("moonshot", {"effort": "xhigh"}, {"effort": "high"}),
        ("kimi-coding", {"effort": "medium"}, {"effort": "low"}),
        ("moonshot", {"effort": "max"}, {"effort": "max"}),
        ("moonshot", {"format": {}}, {"format": {}}),
        ("anthropic", {"effort": "medium"}, {"effort": "medium"}),
    ],
)
def test_an_effort_that_an_anthropic_format_upstream_lacks(
    preset: str, asked: ccmux.Json, sent: ccmux.Json
) -> None:
    [provider] = ccmux.load_config(provider_row("p", preset, api_key="k"), {}).providers
    body = {"model": "m", "thinking": {"type": "adaptive"}, "output_config": asked}
    found = ccmux.without_dropped(body, ccmux.Upstream("m", provider.quirks, ccmux.Facts()))
    assert found == {**body, "output_config": sent}
    assert (found is body) == (asked == sent)


@pytest.mark.parametrize("named", ["http://proxy.test:3128", "proxy.test:3128"])
def test_environment_proxy(named: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("https_proxy", named)
    monkeypatch.setenv("no_proxy", "inside.test")
    ccmux.environment_proxy.cache_clear()
    assert ccmux.environment_proxy("https://api.test/v1") == "http://proxy.test:3128"
    for direct in (
        "https://inside.test/v1",
        "https://localhost",
        "https://127.0.0.1:8080/v1",
        "https://[::1]",
    ):
        assert ccmux.environment_proxy(direct) is None
    ccmux.environment_proxy.cache_clear()


def test_what_clients_name_is_remembered_within_bounds() -> None:
    kept = {n: n for n in range(ccmux.MOST_KEPT + 5)}
    ccmux.forget_oldest(kept)
    assert len(kept) == ccmux.MOST_KEPT - 1
    assert 0 not in kept
    metrics = ccmux.Metrics()
    for number in range(ccmux.MOST_KEPT + 5):
        metrics.add("ccmux_requests_total", (("model", str(number)),))
    assert len(metrics.counts) == ccmux.MOST_KEPT


def test_what_errors_teach_is_remembered_within_bounds() -> None:
    plan, slot = a_plan()
    learnt = plan.relay.learnt
    learnt |= {("", "A", str(n)): frozenset({"stop"}) for n in range(ccmux.MOST_KEPT)}
    assert plan.learns(slot, "temperature")
    assert plan.relay.not_taken(plan.call, slot) == {"temperature"}
    assert len(learnt) == ccmux.MOST_KEPT and ("", "A", "0") not in learnt


async def watched(watch_of: Callable[[], ccmux.Watch], then: Callable[[ccmux.Watch], None]) -> str:
    """What a watch says that cancelled a task; "" where it was not the watch."""
    watch = watch_of()
    then(watch)
    try:
        await asyncio.sleep(30)
    except asyncio.CancelledError:
        return watch.take_back()
    finally:
        watch.close()
    return "never"


@pytest.mark.parametrize(
    ("total", "then", "over"),
    [
        pytest.param(30, lambda w: w.wait(0.02, "first byte"), "first byte", id="shorter than a tick"),
        pytest.param(30, lambda w: w.wait(0.2, "next byte"), "next byte", id="longer than a tick"),
        pytest.param(0.02, lambda w: w.wait(20, "next byte"), ccmux.TOTAL, id="all of it"),
        pytest.param(30, lambda w: w.end(ccmux.STOPPED), ccmux.STOPPED, id="the server stops"),
        pytest.param(30, lambda w: w.task.cancel(), "", id="somebody else"),
        pytest.param(30, lambda w: (w.end("client"), w.task.cancel()), "", id="somebody else as well"),
    ],
)
async def test_a_watch_ends_a_task_and_says_why(total: float, then: Any, over: str) -> None:
    task = asyncio.create_task(watched(lambda: ccmux.Watch(0.05, total), then))
    assert await asyncio.wait_for(task, 10) == over
    assert task.cancelling() == (0 if over else 1)


async def test_a_watch_watches_on_after_it_was_taken_back() -> None:
    async def tries() -> list[str]:
        watch, seen = ccmux.Watch(0.02, 30), []
        for what in ("first", "second"):
            try:
                watch.wait(0.03, what)
                await asyncio.sleep(30)
            except asyncio.CancelledError:
                seen.append(watch.take_back())
                watch.wait(math.inf, "")
                await asyncio.sleep(0.06)  # nothing to end
        watch.close()
        return seen

    assert await asyncio.wait_for(asyncio.create_task(tries()), 10) == ["first", "second"]


async def test_progress_keeps_a_watch_quiet() -> None:
    async def steps() -> str:
        watch = ccmux.Watch(0.02, 30)
        for _ in range(20):
            watch.limit, watch.what, watch.last = 0.08, "next byte", 0.0
            await asyncio.sleep(0.02)
        watch.close()
        return "done"

    assert await asyncio.wait_for(asyncio.create_task(steps()), 10) == "done"


@pytest.mark.parametrize(
    ("given", "passed"),
    [
        pytest.param([("Retry-After", "3"), ("X-Other", "1")], {"retry-after": "3"}, id="only what is allowed"),
        pytest.param([("Retry-After", "3"), ("Connection", "close, Retry-After")], {}, id="named by Connection"),
        pytest.param([("Connection", "retry-after"), ("Connection", "x"), ("retry-after", "3")], {}, id="twice"),
        pytest.param([("retry-after", "é")], {}, id="not ASCII"),
        pytest.param([("retry-after", "3\x0b"), ("request-id", "a\x1bb")], {}, id="not printable"),
        pytest.param([("request-id", "a\tb ~")], {"request-id": "a\tb ~"}, id="a tab"),
        pytest.param([("anthropic-ratelimit-" + "x" * 90, "1")], {"anthropic-ratelimit-" + "x" * 90: "1"}, id="long"),
    ],
)  # fmt: skip
def test_headers_that_pass_down(given: list[tuple[str, str]], passed: dict[str, str]) -> None:
    assert ccmux.answer_headers(CIMultiDict(given), ccmux.DIALECTS["anthropic"]) == passed


CHUNKED_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
EVENT = b'data: {"choices": [{"delta": {"content": "word"}}]}\n\n'


def chunk(data: bytes, size: str = "%x") -> bytes:
    return size.encode() % len(data) + b"\r\n" + data + b"\r\n"


def cut(data: bytes, *places: int) -> list[bytes]:
    ends = [*sorted(place % (len(data) + 1) for place in places), len(data)]
    return [data[a:b] for a, b in zip([0, *ends], ends, strict=False)]


def joined(pieces: list[bytes]) -> list[bytes]:
    chunks = ccmux.Chunks()
    return [chunks.joined(piece) for piece in pieces]


def number_of_chunks(pieces: list[bytes]) -> int:
    """In whole chunks that hold no CR LF themselves."""
    return (b"".join(pieces).removeprefix(CHUNKED_HEAD).count(b"\r\n") - 2) // 2


@pytest.mark.parametrize(
    ("places", "left"),
    [
        pytest.param((), 1, id="all in one piece"),
        pytest.param((len(CHUNKED_HEAD),), 1, id="the head alone"),
        pytest.param(
            (len(CHUNKED_HEAD) + 20_020,), 3, id="cut within an event: that one, and those on both sides"
        ),
        pytest.param((len(CHUNKED_HEAD) + len(chunk(EVENT)) * 300,), 2, id="cut between two"),
        pytest.param((len(CHUNKED_HEAD) + len(chunk(EVENT)) * 300 - 1,), 3, id="cut within the end of one"),
        pytest.param(
            (len(CHUNKED_HEAD) + len(chunk(EVENT)) * 300 + 1,), 701, id="cut within a size: it stops"
        ),
        pytest.param((20,), 1000, id="a head in two pieces"),
        pytest.param((len(CHUNKED_HEAD) + 10, len(CHUNKED_HEAD) + 40), 2, id="two cuts within an event"),
    ],
)
def test_chunks_that_arrive_together_are_joined(places: tuple[int, ...], left: int) -> None:
    stream = CHUNKED_HEAD + chunk(EVENT) * 1000 + chunk(b"")
    pieces = joined(cut(stream, *places))
    assert number_of_chunks(pieces) == left
    assert heard(pieces)[-1] == (EVENT * 1000, "end")


def heard(pieces: list[bytes], chunks: ccmux.Chunks | None = None) -> list[tuple[bytes, str]]:
    """What h11, an HTTP client that others wrote, has read after each piece: the content, and how it ended.

    With `chunks` it sees only those pieces that are not whole chunks.
    """
    client = h11.Connection(h11.CLIENT)
    client.send(h11.Request(method="POST", target="/", headers=[("Host", "x")]))
    client.send(h11.EndOfMessage())
    body, state, steps = b"", "", []
    for piece in pieces:
        if chunks and not state and (content := chunks.content(piece)):
            body += content
        elif (data := chunks.joined(piece) if chunks else piece) and not state:
            client.receive_data(data)
        try:
            while not state and (event := client.next_event()) not in (h11.NEED_DATA, h11.PAUSED):
                body += bytes(event.data) if isinstance(event, h11.Data) else b""
                state = "end" if isinstance(event, h11.EndOfMessage) else ""
        except h11.RemoteProtocolError:
            state = "fault"
        steps.append((body, state))
    return steps


HEADS = [
    CHUNKED_HEAD,
    CHUNKED_HEAD.lower().replace(b"http", b"HTTP"),
    CHUNKED_HEAD.replace(b": chunked", b":chunked"),
    b"HTTP/1.1 100 Continue\r\n\r\n" + CHUNKED_HEAD,
    b"HTTP/1.1 200 OK\r\nContent-Length: 60\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nX-Transfer-Encoding: chunked\r\n\r\n",
    b"HTTP/1.1 204 No Content\r\n\r\n",
]
CONTENT = st.sampled_from(
    [EVENT, b"5\r\nhello\r\n", b"data: x\r\n\r\n", b"a", b"\r\n", b"0\r\n\r\n", b"x" * 300]
)
CHUNKS = st.one_of(
    st.lists(CONTENT, max_size=3).map(lambda parts: chunk(b"".join(parts))),
    st.tuples(CONTENT, st.sampled_from(["%X", "0%x", "%x;name=value", "+%x", "%x ", "1%x"])).map(
        lambda c: chunk(*c)
    ),
)
ENDS = st.sampled_from(
    [chunk(b""), b"0\r\nX-Trailer: 1\r\n\r\n", b"00\r\n\r\n", b"", b"0\r\n", b"5\r\nhe", b"g\r\n"]
)


@pytest.mark.parametrize("head", HEADS)
def test_what_stands_behind_any_head_is_heard_alike(head: bytes) -> None:
    pieces = [head + chunk(EVENT) * 100 + chunk(b"")]
    assert heard(pieces) == heard(joined(pieces)) == heard(pieces, ccmux.Chunks())


@settings(max_examples=1000)
@given(
    st.sampled_from(HEADS), st.lists(CHUNKS, max_size=12), ENDS, st.lists(st.integers(0, 5000), max_size=4)
)
def test_a_client_hears_the_same_at_each_piece_whatever_chunks_do(
    head: bytes, chunks: list[bytes], end: bytes, places: list[int]
) -> None:
    pieces = cut(head + b"".join(chunks) + end, *places)
    assert heard(pieces) == heard(joined(pieces)) == heard(pieces, ccmux.Chunks())


@pytest.mark.parametrize("content", [chunk(EVENT) * 5, chunk(EVENT) * 3 + chunk(b"") + chunk(EVENT)])
def test_content_that_looks_like_chunks_is_content(content: bytes) -> None:
    stream = CHUNKED_HEAD + chunk(content) + chunk(EVENT) + chunk(b"")
    ends = [match.end() for match in re.finditer(b"\r\n", stream)]
    for places in itertools.combinations(ends, 3):
        pieces = cut(stream, *places)
        assert heard(pieces) == heard(joined(pieces)) == heard(pieces, ccmux.Chunks())
