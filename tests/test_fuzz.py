"""Bodies and headers that nobody would send, against the running server: nothing may give a 500, or end it.

Each example is a seed; a failing one is printed by hypothesis and is the whole story. CCMUX_FUZZ says how many requests
are sent (20,000 in CI, which takes about a minute; 2,000 elsewhere).
"""

from __future__ import annotations

import contextlib
import copy
import functools
import json
import os
import random
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from attacks import Answer, Victim, check_answer, read_answer, victim
from conftest import IN_CI
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from test_security import ADMIN_API, USER_API

import ccmux

TRANSLATIONS = 2_000
REQUESTS = int(os.environ.get("CCMUX_FUZZ") or (20_000 if IN_CI else 2_000))
BATCH = 100
EXPECTED = {200, 201, 400, 401, 402, 403, 404, 405, 408, 409, 411, 413, 415, 417, 421, 422, 429, 431, 501}

PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
CALL = {"type": "tool_use", "id": "toolu_1", "name": "Read", "input": {"path": "/etc/hosts"}}
RESULT = {
    "type": "tool_result", "tool_use_id": "toolu_1", "is_error": False,
    "content": [{"type": "text", "text": "127.0.0.1"}, {"type": "tool_reference", "tool_name": "Read"}],
}  # fmt: skip
SEEN = [
    {"type": "text", "text": "What is this?", "cache_control": {"type": "ephemeral", "ttl": "1h"}},
    {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": PIXEL}},
    {"type": "image", "source": {"type": "url", "url": "https://images.example/1.png"}},
    {
        "type": "document",
        "source": {"type": "text", "media_type": "text/plain", "data": "words"},
        "title": "t",
    },
]
MESSAGES_BODY: dict[str, Any] = {
    "model": "claude-o", "max_tokens": 4096, "stream": True, "temperature": 1.0, "top_p": 0.9, "top_k": 5,
    "system": [
        {"type": "text", "text": "x-anthropic-billing-header: cc_version=2.1.330; cc_is_subagent=true"},
        {"type": "text", "text": "You are kind. <CCM-SUBAGENT-MODEL>claude-a</CCM-SUBAGENT-MODEL>"},
    ],
    "messages": [
        {"role": "user", "content": "<system-reminder>Plan mode is active</system-reminder>use claude-d: hello"},
        {"role": "assistant", "content": [{"type": "thinking", "thinking": "hm", "signature": "x"}, CALL]},
        {"role": "user", "content": [RESULT, *SEEN]},
        {"role": "system", "content": "now this", "output_config": {"effort": "high"}},
        {"role": "assistant", "content": [{"type": "redacted_thinking", "data": "x"}, {"type": "text", "text": "ok"}]},
        {"role": "user", "content": "go on"},
    ],
    "tools": [
        {"name": "Read", "description": "reads", "input_schema": {
            "$schema": "x", "type": "object", "required": ["path"], "properties": {
                "path": {"type": "string"}, "n": {"exclusiveMinimum": 0, "maximum": 9007199254740991},
                "any": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/a"}]}}, "$defs": {"a": {"type": "integer"}}}},
        {"type": "web_search_20250305", "name": "web_search", "max_uses": 8, "allowed_domains": ["a.example"]},
        {"name": "Later", "defer_loading": True, "input_schema": {"type": "object"}},
    ],
    "tool_choice": {"type": "tool", "name": "Read", "disable_parallel_tool_use": True},
    "metadata": {"user_id": "{\"session_id\": \"s\"}"}, "stop_sequences": ["</block>"],
    "thinking": {"type": "enabled", "budget_tokens": 1024}, "context_management": {"edits": []},
    "output_config": {"effort": "max", "format": {"type": "json_schema", "schema": {"type": "object"}}},
}  # fmt: skip
CHAT_BODY: dict[str, Any] = {
    "model": "claude-a", "max_completion_tokens": 100, "stream": True, "stream_options": {"include_usage": True},
    "messages": [
        {"role": "developer", "content": "be kind"},
        {"role": "user", "content": [{"type": "text", "text": "hi"}, {"type": "image_url", "image_url": {"url": "https://x.example"}}]},
        {"role": "assistant", "content": None, "reasoning_content": "hm", "tool_calls": [
            {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{\"a\": 1}"}}]},
        {"role": "tool", "tool_call_id": "c1", "content": "done"},
    ],
    "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}],
    "tool_choice": "auto", "response_format": {"type": "json_object"}, "stop": ["x"], "reasoning_effort": "high",
    "temperature": 0, "n": 1, "user": "u", "parallel_tool_calls": False,
}  # fmt: skip
ADMIN_BODY: dict[str, Any] = {
    "name": "anna", "credit_microusd": 5, "budgets": {"day_microusd": 1}, "note": "n", "amount_microusd": 5, "key": "k",
    "disabled": False, "hash": "0", "body": {"model": "x"}, "headers": {"a": "b"}, "type": "anthropic", "text": "[server]",
    "base_url": "http://127.0.0.1:9", "api_key": "", "mappings": [{"provider": "demo", "actual_model": "demo"}],
    "default": "claude-d", "price": {"input": 1, "output": 2}, "enforce": False, "model": "demo/demo", "seconds": 5,
}  # fmt: skip
ODD: list[Any] = [
    None, True, False, 0, -1, 1, 0.5, -1e308, 10**30, -(2**63), "", " ", "\ud800", "\x00\x1b[2J", "x" * 3000, "claude-d", "\u202e",
    [], {}, [[]], [None], [[1]], [{}], {"type": None}, {"type": "text"}, {"type": "text", "text": None}, {"": ""}, {"type": []},
    {"type": "image", "source": 5}, {"type": "tool_result", "content": {}}, {"type": "tool_use", "input": []}, "tool_use",
    {"type": "base64"}, {"$ref": "#"}, {"$ref": "#/$defs/a"}, {"role": "user"}, [{"role": "assistant", "content": [5]}],
]  # fmt: skip
HEADERS = [
    "Content-Type", "Accept", "Authorization", "x-api-key", "User-Agent", "anthropic-beta", "anthropic-version", "X-App",
    "x-claude-code-session-id", "x-claude-code-agent-id", "x-claude-code-request-class", "Cookie", "Origin", "Host",
    "Sec-Fetch-Site", "Content-Encoding", "Transfer-Encoding", "Connection", "Expect", "Range", "If-Match", "X-\u00e9",
    "Upgrade", "Content-Length", "Accept-Encoding", "traceparent", "X-Forwarded-For", "Referer", "TE", "",
]  # fmt: skip
VALUES = [
    "", " ", "x", "*", "application/json", "text/plain", "gzip", "chunked", "100-continue", "close", "null", "none", "0", "-1",
    "\u00e9", "\udcff", "a" * 5000, "Bearer x", "Bearer \udcff", "main", "subagent", "auxiliary", "bytes=0-", "\x7f", "\x01",
    "application/json; charset=utf-16", "http://evil.example", "cross-site", "999999999999", "\t", "localhost",
]  # fmt: skip


def nodes(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) in a JSON value."""
    found: list[tuple[Any, Any]] = []
    waiting = [value]
    while waiting:
        box = waiting.pop()
        for key in list(box) if isinstance(box, dict) else range(len(box)):
            found.append((box, key))
            if isinstance(box[key], (dict, list)):
                waiting.append(box[key])
    return found


def mutated(body: dict[str, Any], chance: random.Random) -> dict[str, Any]:
    """The body with a few of its parts replaced, removed, doubled, moved or added."""
    body = copy.deepcopy(body)
    for _ in range(chance.choice((0, 1, 1, 2, 3, 6))):
        places = nodes(body)
        if not places:
            break
        box, key = chance.choice(places)
        change = chance.randrange(5)
        if change == 0:
            del box[key]
        elif change == 1:
            other, there = chance.choice(places)
            box[key] = copy.deepcopy(other[there]) if there in other or isinstance(other, list) else None
        elif change == 2 and isinstance(box, list):
            box.append(copy.deepcopy(chance.choice((box[key], chance.choice(ODD)))))
        else:
            box[key] = copy.deepcopy(chance.choice(ODD))
        try:
            json.dumps(body)
        except (ValueError, RecursionError):  # it contains itself
            return {}
    if chance.random() < 0.3:
        body["model"] = chance.choice(
            ("claude-a", "claude-o", "claude-d", "demo/x", "haiku", "anthropic/claude-o")
        )
    if str(body.get("model")) in ("claude-d", "demo/x"):
        body["stream"] = False  # the demo takes its time over a stream
    return body


def broken(data: bytes, chance: random.Random) -> bytes:
    """Bytes with some of them cut, changed or doubled."""
    at = chance.randrange(len(data) + 1)
    kind = chance.randrange(4)
    if kind == 0:
        return data[:at]
    if kind == 1:
        return data[:at] + chance.randbytes(chance.randrange(1, 9)) + data[at:]
    return data[:at] + bytes([chance.randrange(256)]) + data[at + 1 :] if kind == 2 else data + data[at:]


def request_of(ccm: Victim, chance: random.Random) -> bytes:
    """A request that is right in most ways and wrong in some."""
    kind = chance.random()
    if kind < 0.6:
        method, path, body = "POST", "/v1/messages?beta=true", mutated(MESSAGES_BODY, chance)
    elif kind < 0.7:
        method, path, body = "POST", "/v1/messages/count_tokens", mutated(MESSAGES_BODY, chance)
    elif kind < 0.85:
        method, path, body = "POST", "/v1/chat/completions", mutated(CHAT_BODY, chance)
    else:
        quick = [
            e
            for e in (*USER_API, *ADMIN_API)
            if "/events" not in e[1] and not e[1].endswith(("/test", "/own/models"))
        ]
        method, path = chance.choice(quick)
        kept = chance.sample(list(ADMIN_BODY), chance.randrange(5))
        body = mutated({key: ADMIN_BODY[key] for key in kept}, chance)
        path += chance.choice(
            ("", "?", "?limit=x", "?days=-1&by=z", "?since=2026", "?format=csv", "?before=%FF")
        )
    data = json.dumps(body).encode()
    if chance.random() < 0.15:
        data = broken(data, chance)
    headers = {"Connection": "keep-alive", **ccm.admin}
    for _ in range(chance.choice((0, 0, 1, 2, 5))):
        headers[chance.choice(HEADERS)] = chance.choice(VALUES)
    length = {"Content-Length": str(len(data))} if method != "GET" else {}
    return ccm.request(
        method, path, {**headers, **length, **({"Content-Length": "-"} if method == "GET" else {})}, data
    )


@pytest.fixture(scope="module")
def ccm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Victim]:
    with victim(tmp_path_factory.mktemp("fuzzed")) as running:
        yield running


FUZZ = settings(
    max_examples=max(REQUESTS // BATCH, 1), deadline=None, database=None, suppress_health_check=list(HealthCheck),
    phases=[Phase.generate], report_multiple_bugs=False,
)  # fmt: skip
SEEDS = st.integers(0, 2**64)


class Line:
    """A connection that is kept as long as the server keeps it."""

    def __init__(self, ccm: Victim) -> None:
        self.ccm = ccm
        self.client: socket.socket | None = None

    def send(self, data: bytes) -> Answer:
        was_used = self.client is not None
        self.client = self.client or socket.create_connection(("127.0.0.1", self.ccm.port), 10)
        with contextlib.suppress(ConnectionError):
            self.client.sendall(data)
        answer = Answer(read_answer(self.client, 0))
        if not answer.is_complete or answer.status >= 400:
            self.close()
        return self.send(data) if was_used and answer.status == 0 else answer

    def close(self) -> None:
        if self.client:
            self.client.close()
        self.client = None


@FUZZ
@given(seed=SEEDS)
def test_no_request_gives_a_500_or_ends_the_server(ccm: Victim, seed: int) -> None:
    """Four clients at once, each with a part of the batch."""
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(functools.partial(send_some, ccm), range(seed, seed + 4)))


def send_some(ccm: Victim, seed: int) -> None:
    chance = random.Random(seed)
    with contextlib.closing(Line(ccm)) as line:
        for number in range(BATCH // 4):
            data = request_of(ccm, chance)
            answer = line.send(data)
            told = f"request {number} of {seed}: {answer.raw[:700]!r} came of {data[:3000]!r}"
            assert answer.status in EXPECTED, told
            check_answer(answer)


def test_after_the_fuzz_it_is_well(ccm: Victim) -> None:
    assert ccm.process.poll() is None
    assert b"Traceback" not in ccm.log
    for model in ("claude-a", "claude-o", "claude-d"):
        assert ccm.message(model=model).status == 200


@settings(FUZZ, max_examples=TRANSLATIONS // BATCH)
@given(seed=SEEDS)
@pytest.mark.parametrize("format", [name for name, row in ccmux.DIALECTS.items() if row.request])
def test_translators_refuse_or_translate(format: str, seed: int) -> None:
    """Whatever JSON comes, a translator makes a JSON request of it or an ApiError."""
    chance = random.Random(seed)
    build = ccmux.DIALECTS[format].request
    assert build is not None
    to = ccmux.Upstream("up", ccmux.Quirks(), ccmux.Facts(), "s", frozenset())
    for _ in range(BATCH):
        body = mutated(MESSAGES_BODY, chance)
        try:
            json.loads(ccmux.compact(build(body, to)))
        except ccmux.ApiError as error:
            assert 400 <= error.status < 500
