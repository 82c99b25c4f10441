"""The Anthropic stream: what arrived -> events; events -> a message; bytes -> the same bytes and usage."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from anthropic.types import Message
from hypothesis import given, settings
from hypothesis import strategies as st
from translation import check_grammar

from ccmux import (
    AnthropicStream,
    AnthropicTap,
    ApiError,
    Retry,
    Usage,
    anthropic_usage,
    collect,
    encode_event,
    error_of_event,
    events_of,
    overflow,
    retry_class,
    scrub,
    sign,
    signed_payload,
    upstream_error,
    usage_json,
)

Json = dict[str, Any]
SEVEN = Usage(input=7)


def made(*said: tuple[Any, ...], usage: Usage = SEVEN) -> list[Json]:
    """The events of a stream to which this was said: (method, arguments...)."""
    stream = AnthropicStream("msg_1", "claude-x", usage)
    for method, *args in said:
        getattr(stream, method)(*args)
    return stream.take()


def shape(events: list[Json]) -> list[str]:
    """Events in short: start, +text, text=..., -, and the stop reason."""
    short = []
    for e in events:
        if e["type"] == "content_block_start":
            short.append(f"+{e['content_block']['type']}")
        elif e["type"] == "content_block_delta":
            short.append(str(next(v for k, v in e["delta"].items() if k != "type"))[:20])
        elif e["type"] == "message_delta":
            short.append(str(e["delta"]["stop_reason"]))
        else:
            short.append(SHORT[e["type"]])
    return short


SHORT = {"content_block_stop": "-", "message_start": "start", "message_stop": "stop"}


SIGNED = sign()[:20]


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        pytest.param([("finish", "end_turn")], ["start", "end_turn", "stop"], id="nothing at all"),
        pytest.param([("text", "a"), ("text", "b"), ("finish", "end_turn")],
                     ["start", "+text", "a", "b", "-", "end_turn", "stop"], id="text in pieces"),
        pytest.param([("text", ""), ("thinking", ""), ("finish", "end_turn")], ["start", "end_turn", "stop"],
                     id="empty pieces open nothing"),
        pytest.param([("thinking", "hm"), ("text", "a"), ("finish", "end_turn")],
                     ["start", "+thinking", "hm", SIGNED, "-", "+text", "a", "-", "end_turn", "stop"],
                     id="a thinking block is signed before the text opens"),
        pytest.param([("text", "a"), ("thinking", "hm"), ("text", "b"), ("finish", "end_turn")],
                     ["start", "+text", "a", "-", "+thinking", "hm", SIGNED, "-", "+text", "b", "-",
                      "end_turn",
                      "stop"], id="thinking after text"),
        pytest.param([("tool", "t1", "Bash"), ("tool_input", '{"a":'), ("tool_input", "1}"), ("finish",
                                                                                              "tool_use")],
                     ["start", "+tool_use", '{"a":', "1}", "-", "tool_use", "stop"], id="a tool call"),
        pytest.param([("tool", "t1", "A"), ("tool", "t2", "B"), ("tool_input", ""), ("finish", "tool_use")],
                     ["start", "+tool_use", "-", "+tool_use", "-", "tool_use", "stop"],
                     id="two calls, no input needs no delta"),
        pytest.param([("tool", "t1", "A"), ("finish", "end_turn")], ["start", "+tool_use", "-", "tool_use",
                                                                     "stop"],
                     id="a tool block means tool_use"),
        pytest.param([("text", "a"), ("finish", "tool_use")], ["start", "+text", "a", "-", "end_turn",
                                                               "stop"],
                     id="no tool block means no tool_use"),
        pytest.param([("tool", "t1", "A"), ("finish", "max_tokens")],
                     ["start", "+tool_use", "-", "tool_use", "stop"], id="a whole call in an answer that is cut"),
        pytest.param([("tool", "t1", "A"), ("finish", "refusal")],
                     ["start", "+tool_use", "-", "refusal", "stop"], id="a call that is refused"),
        pytest.param([("text", "a"), ("finish", "refusal")], ["start", "+text", "a", "-", "refusal", "stop"],
                     id="refusal"),
        pytest.param([("keep", {"x": 1}), ("text", "a"), ("finish", "end_turn")],
                     ["start", "+thinking", sign({"x": 1})[:20], "-", "+text", "a", "-", "end_turn", "stop"],
                     id="data to keep rides in a signature"),
    ],
)  # fmt: skip
def test_order_of_events(said: list[tuple[Any, ...]], expected: list[str]) -> None:
    events = made(*said)
    assert shape(events) == expected
    check_grammar(events, True)


SAID = st.one_of(
    st.tuples(st.just("text"), st.text(max_size=4)),
    st.tuples(st.just("thinking"), st.text(max_size=4)),
    st.tuples(st.just("tool"), st.sampled_from(["t1", "t2"]), st.just("Bash")),
    st.tuples(st.just("keep"), st.dictionaries(st.sampled_from("ab"), st.integers(), max_size=1)),
    st.tuples(st.just("close")),
    st.tuples(st.just("start")),
)


@settings(deadline=None)
@given(st.lists(SAID, max_size=12), st.sampled_from(["end_turn", "tool_use", "max_tokens", "refusal"]))
def test_whatever_is_said_obeys_the_grammar(said: list[tuple[Any, ...]], stop_reason: str) -> None:
    events = made(*said, ("finish", stop_reason))
    check_grammar(events, True)
    message = collect(events)
    Message.model_validate(message, strict=True)
    texts = "".join(b["text"] for b in message["content"] if b["type"] == "text")
    assert texts == "".join(s[1] for s in said if s[0] == "text")
    calls = [b for b in message["content"] if b["type"] == "tool_use"]
    assert len(calls) == sum(method == "tool" for method, *_ in said)


def test_message_start_names_the_message_and_its_estimate() -> None:
    [start, *_] = made(("text", "a"), usage=Usage(input=7, cache_read=3, estimated=True))
    assert start["message"] | {"usage": 0} == {
        "id": "msg_1", "type": "message", "role": "assistant", "model": "claude-x", "content": [],
        "stop_reason": None, "stop_sequence": None, "usage": 0,
    }  # fmt: skip
    assert start["message"]["usage"]["input_tokens"] == 7


def test_the_last_usage_is_the_true_one() -> None:
    stream = AnthropicStream("m", "x", Usage(input=7, estimated=True))
    stream.text("hello")
    stream.usage = Usage(input=10, output=5, cache_read=2, cache_write=1)
    stream.finish("end_turn")
    assert stream.take()[-2]["usage"] == {
        "input_tokens": 10, "output_tokens": 5, "cache_read_input_tokens": 2,
        "cache_creation_input_tokens": 1,
    }  # fmt: skip


def test_an_estimated_usage_counts_all_that_was_made() -> None:
    stream = AnthropicStream("m", "x", Usage(input=7, estimated=True), count=len)
    for method, *args in (("thinking", "hm"), ("text", "abc"), ("tool", "t", "Bash"), ("tool_input", "{}")):
        getattr(stream, method)(*args)
    stream.finish("end_turn")
    assert stream.usage == Usage(input=7, output=len("hmabcBash{}"), estimated=True)


def test_whole_blocks_come_in_one_piece() -> None:
    search = {"type": "server_tool_use", "id": "s1", "name": "web_search", "input": {"query": "x"}}
    found = {"type": "web_search_tool_result", "tool_use_id": "s1", "content": []}
    events = made(("whole", search), ("whole", found), ("text", "so"), ("finish", "end_turn"))
    assert shape(events)[:7] == ["start", "+server_tool_use", '{"query": "x"}', "-",
                                 "+web_search_tool_result",
                                 "-", "+text"]  # fmt: skip
    assert collect(events)["content"] == [search, found, {"type": "text", "text": "so"}]


def test_usage_json_tells_one_hour_writes_apart() -> None:
    assert usage_json(Usage(1, 2, 3, 4, 5)) == {
        "input_tokens": 1, "output_tokens": 2, "cache_read_input_tokens": 3, "cache_creation_input_tokens": 9,
        "cache_creation": {"ephemeral_5m_input_tokens": 4, "ephemeral_1h_input_tokens": 5},
    }  # fmt: skip
    assert anthropic_usage(usage_json(Usage(1, 2, 3, 4, 5))) == Usage(1, 2, 3, 4, 5)


# collect


def test_collect_is_the_message_the_events_amount_to() -> None:
    events = made(
        ("thinking", "hm"), ("text", "a"), ("text", "b"), ("tool", "t1", "Bash"), ("tool_input", '{"x": [1'),
        ("tool_input", ", 2]}"), ("tool", "t2", "Ls"), ("finish", "tool_use", None),
    )  # fmt: skip
    message = collect(events)
    Message.model_validate(message, strict=True)
    assert message["content"] == [
        {"type": "thinking", "thinking": "hm", "signature": sign()},
        {"type": "text", "text": "ab"},
        {"type": "tool_use", "id": "t1", "name": "Bash", "input": {"x": [1, 2]}},
        {"type": "tool_use", "id": "t2", "name": "Ls", "input": {}},
    ]
    assert (message["stop_reason"], message["role"]) == ("tool_use", "assistant")


def test_collect_keeps_the_stop_sequence_and_the_last_usage() -> None:
    message = collect(made(("text", "a"), ("finish", "stop_sequence", "</block>")))
    assert (message["stop_reason"], message["stop_sequence"]) == ("stop_sequence", "</block>")
    assert message["usage"]["input_tokens"] == 7


def test_collect_leaves_the_events_as_they_are() -> None:
    events = made(("text", "a"), ("tool", "t", "B"), ("tool_input", '{"a": 1}'), ("finish", "tool_use"))
    before = json.dumps(events)
    collect(events)
    assert json.dumps(events) == before


def test_collect_ignores_pings() -> None:
    events = made(("text", "a"), ("finish", "end_turn"))
    assert collect([events[0], {"type": "ping"}, *events[1:]])["content"] == [{"type": "text", "text": "a"}]


# Signatures


@pytest.mark.parametrize("payload", [{}, {"a": [1, "é"]}, {"reasoning_details": [{"x": None}]}], ids=repr)
def test_a_signature_brings_its_payload_back(payload: Json) -> None:
    assert signed_payload({"signature": sign(payload)}) == payload
    assert signed_payload({"type": "redacted_thinking", "data": sign(payload)}) == payload


@pytest.mark.parametrize(
    ("block", "payload"),
    [
        pytest.param({"signature": "EqQBCgIYAhIM"}, None, id="Anthropic's"),
        pytest.param({"signature": ""}, None, id="empty"),
        pytest.param({}, None, id="none"),
        pytest.param({"signature": 5}, None, id="a number"),
        pytest.param({"signature": "ccmux.!!!"}, {}, id="ours, spoilt"),
        pytest.param({"signature": "ccmux.WzFd"}, {}, id="ours, not an object"),
    ],
)
def test_signed_payload(block: Json, payload: Json | None) -> None:
    assert signed_payload(block) == payload


# The tap


def upstream_bytes(*extra: bytes, end: bytes = b"\n", usage: Json | None = None) -> bytes:
    """An answer as Anthropic streams it, with a ping, a comment and an event of a kind nobody knows."""
    events = made(
        ("thinking", "hm"), ("text", "a message_stop is not an error"), ("tool", "t1", "Bash"),
        ("tool_input", '{"x": 1}'), ("finish", "tool_use"),
    )  # fmt: skip
    events[0]["message"]["usage"] = {"input_tokens": 9, "cache_read_input_tokens": 4, "output_tokens": 1}
    events[-2]["usage"] = usage or {"output_tokens": 33}
    blocks = [encode_event(e) for e in events]
    odd = [
        b": keep-alive\n\n",
        b'event: ping\ndata: {"type": "ping"}\n\n',
        b'event: new\ndata: {"type":"new"}\n\n',
    ]
    return b"".join([blocks[0], *odd, *blocks[1:-2], *extra, *blocks[-2:]]).replace(b"\n", end)


def drained(tap: AnthropicTap, *chunks: bytes) -> bytes:
    return b"".join(map(tap.feed, chunks)) + tap.finish()


def tap() -> AnthropicTap:
    return AnthropicTap(lambda text: scrub(text, ["the-secret"]))


STREAM = upstream_bytes()


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"], ids=["LF", "CR LF", "CR"])
def test_the_tap_cut_at_every_byte_relays_the_very_bytes(end: bytes) -> None:
    stream = upstream_bytes(end=end)
    for at in range(len(stream) + 1):
        t = tap()
        out = drained(t, stream[:at], stream[at:])
        assert out + t.ending == stream, f"cut at {at}"
        assert t.usage == Usage(input=9, output=33, cache_read=4)
        assert (t.stop_reason, t.ended, t.has_content, t.error) == ("tool_use", True, True, None)


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"], ids=["LF", "CR LF", "CR"])
def test_an_event_that_is_cut_off_is_not_relayed(end: bytes) -> None:
    """A client would fail at its JSON, and not hear of the error behind it."""
    stream = upstream_bytes(end=end)
    for at in range(len(stream)):
        t = tap()
        out = drained(t, stream[:at])
        assert (t.error is None) == t.ended
        if t.has_content:  # else nothing goes out
            assert all(json.loads(data or "{}") is not None for _, data in events_of(out))
            assert out.endswith((end * 2, b"\n\n"))


def test_the_tap_fed_byte_by_byte() -> None:
    t = tap()
    assert drained(t, *(bytes([b]) for b in STREAM)) + t.ending == STREAM
    assert t.usage == Usage(input=9, output=33, cache_read=4)


def test_the_tap_holds_message_stop_back() -> None:
    t = tap()
    assert t.feed(STREAM) == STREAM[: STREAM.index(b"event: message_stop")]
    assert t.ending.startswith(b"event: message_stop")
    assert not t.feed(b": late\n\n")
    assert t.ending.endswith(b": late\n\n")


def test_the_tap_knows_where_content_begins() -> None:
    t = tap()
    first_delta = STREAM.index(b"event: content_block_delta")
    t.feed(STREAM[:first_delta])
    assert not t.has_content
    t.feed(STREAM[first_delta:])
    assert t.has_content


@pytest.mark.parametrize(
    ("usage", "known", "broken"),
    [
        pytest.param({"output_tokens": 5}, Usage(input=9, output=5, cache_read=4), False, id="output only"),
        pytest.param({"input_tokens": 20, "output_tokens": 5}, Usage(20, 5, 4), False, id="input corrected"),
        pytest.param({"output_tokens": 5, "cache_read_input_tokens": 0}, Usage(9, 5, 0), False, id="a reported 0"),
        pytest.param({"output_tokens": 5, "input_tokens": 0, "cache_read_input_tokens": 0,
                      "cache_creation_input_tokens": 0}, Usage(9, 5, 4), False, id="no prompt told"),
        pytest.param({"output_tokens": 5, "input_tokens": 0, "cache_read_input_tokens": 13}, Usage(0, 5, 13),
                     False, id="all of it cached"),
        pytest.param({"output_tokens": None, "input_tokens": 20}, Usage(20, 1, 4), True, id="no output told"),
        pytest.param({"input_tokens": None, "output_tokens": 5}, Usage(9, 5, 4), False, id="null is ignored"),
        pytest.param({"output_tokens": 5, "cache_creation_input_tokens": 8}, Usage(9, 5, 4, 8), False, id="writes"),
        pytest.param({"output_tokens": 5, "cache_creation_input_tokens": 8, "cache_creation":
                      {"ephemeral_5m_input_tokens": 3, "ephemeral_1h_input_tokens": 5}}, Usage(9, 5, 4, 3, 5),
                     False, id="one-hour writes"),
        pytest.param({"input_tokens": 23, "output_tokens": 5, "cache_creation_input_tokens": 0, "iterations": [
                      {"type": "compaction", "input_tokens": 180, "output_tokens": 3, "cache_creation_input_tokens": 7},
                      {"type": "message", "input_tokens": 23, "output_tokens": 5}, None]}, Usage(203, 8, 4, 7), False,
                     id="compaction on the way"),
        pytest.param({"output_tokens": 5, "iterations": "x"}, Usage(9, 5, 4), False, id="iterations that are none"),
        pytest.param({"output_tokens": 5, "speed": "fast"}, Usage(9, 5, 4, fast=True), False, id="fast mode"),
        pytest.param({"output_tokens": 5, "speed": "standard"}, Usage(9, 5, 4), False, id="standard speed"),
        pytest.param({"output_tokens": -1}, Usage(9, 1, 4), True, id="negative"),
        pytest.param({"output_tokens": 1.5}, Usage(9, 1, 4), True, id="not whole"),
        pytest.param({"output_tokens": 10**9}, Usage(9, 1, 4), True, id="absurd"),
        pytest.param({"output_tokens": "5"}, Usage(9, 1, 4), True, id="a text"),
        pytest.param({"output_tokens": True}, Usage(9, 1, 4), True, id="a bool"),
    ],
)  # fmt: skip
def test_usage_is_read_off_the_bytes(usage: Json, known: Usage, broken: bool) -> None:
    t = tap()
    drained(t, upstream_bytes(usage=usage))
    assert (t.usage, t.usage_broken) == (known, broken)


def test_output_text_is_what_the_model_made() -> None:
    t = tap()
    drained(t, STREAM)
    assert t.output_text() == 'hma message_stop is not an error{"x": 1}'


ERROR = b'event: error\ndata: {"type":"error","error":{"type":"overloaded_error","message":"the-secret"}}\n\n'


def test_an_error_before_content_is_kept_back() -> None:
    t = tap()
    start = STREAM[: STREAM.index(b"event: content_block_start")]
    out = drained(t, start, ERROR)
    assert ERROR not in out
    assert (t.error.status, t.error.type, t.error.retry) == (529, "overloaded_error", Retry.NEXT)
    assert not t.error_relayed


def test_an_error_of_megabytes_is_cut_short() -> None:
    t = tap()
    head = STREAM[: STREAM.index(b"event: message_delta")]
    assert t.feed(head) + t.feed(ERROR.replace(b"the-secret", b"no " * 10**6)) == head
    assert not t.error_relayed  # it goes out in our words, without the rest
    assert (t.error.status, len(t.error.message)) == (529, 10_000)


def test_an_error_after_content_is_relayed_without_keys_and_ends_it() -> None:
    t = tap()
    head = STREAM[: STREAM.index(b"event: message_delta")]
    out = t.feed(head) + t.feed(ERROR) + t.feed(STREAM[len(head) :]) + t.finish()
    assert out == head + ERROR.replace(b"the-secret", b"[key]")
    assert t.error_relayed
    assert t.error.status == 529
    assert not t.ended


def test_nothing_goes_out_behind_an_error_that_came_with_it() -> None:
    head, delta = STREAM[: STREAM.index(b"event: message_delta")], b"event: content_block_delta\ndata: {}\n\n"
    assert drained(tap(), head + ERROR + delta) == head + ERROR.replace(b"the-secret", b"[key]")


@pytest.mark.parametrize("at", range(0, len(STREAM) - 60, 97))
def test_a_stream_that_ends_early_is_an_error(at: int) -> None:
    t = tap()
    out = drained(t, STREAM[:at])
    assert (t.error.status, t.error.retry, t.error.cause) == (502, Retry.SAME, "stream")
    assert STREAM.startswith(out.rstrip(b"\n"))


def test_a_last_event_without_its_blank_line_is_the_end() -> None:
    t = tap()
    drained(t, STREAM.rstrip())
    assert (t.ended, t.error) == (True, None)
    assert t.ending.rstrip().endswith(b'{"type":"message_stop"}')


@pytest.mark.parametrize(
    ("body", "status"),
    [
        pytest.param(b'{"type":"error","error":{"type":"overloaded_error","message":"busy"}}', 529, id="JSON error"),
        pytest.param(b'{"type":"error","error":{"type":"rate_limit_error","message":"slow"}}', 429, id="limit"),
        pytest.param(b'{"error":{"message":"no","code":400}}', 400, id="another vendor's"),
        pytest.param(b'{"error":{"message":"no","code":400}}\n\n', 400, id="JSON with a blank line behind it"),
        pytest.param(b"<html><body>502 Bad Gateway</body></html>", 502, id="HTML"),
        pytest.param(b"<html>\n\n502 Bad Gateway\n\n</html>", 502, id="HTML with blank lines"),
        pytest.param(b'data: {"error": {"message": "no", "type": "rate_limit_error"}}\n\n', 429, id="as an event"),
        pytest.param(b"data: not json\n\n", 502, id="an event that is not JSON"),
        pytest.param(b'{"ok": true}', 502, id="JSON that is no stream"),
        pytest.param(b"", 502, id="nothing"),
        pytest.param(b"\n\n", 502, id="blank lines"),
        pytest.param(b": ping\n\n", 502, id="only a comment"),
    ],
)  # fmt: skip
def test_what_is_not_a_stream_is_an_error(body: bytes, status: int) -> None:
    for chunks in ([body], [bytes([b]) for b in body]):
        t = tap()
        out = drained(t, *chunks)
        assert t.error.status == status, t.error.message
        assert not t.has_content
        assert b"Gateway" not in out
        assert "<" not in t.error.message  # Claude Code shows no words of a message with HTML in it


def test_blank_lines_too_many_are_relayed_too() -> None:
    stream = STREAM.replace(b"event: content_block_stop", b"\n\nevent: content_block_stop")
    for at in range(0, len(stream), 7):
        t = tap()
        assert drained(t, stream[:at], stream[at:]) + t.ending == stream


# Errors


@pytest.mark.parametrize(
    ("status", "retry"),
    [
        (400, Retry.NO), (401, Retry.KEY), (402, Retry.KEY), (403, Retry.KEY), (404, Retry.NEXT),
        (405, Retry.NO), (408, Retry.SAME), (409, Retry.SAME), (413, Retry.NO), (415, Retry.NO), (422, Retry.NO),
        (429, Retry.KEY), (431, Retry.NO), (500, Retry.SAME), (502, Retry.SAME), (503, Retry.SAME),
        (504, Retry.SAME), (520, Retry.SAME), (529, Retry.NEXT), (599, Retry.SAME), (600, Retry.NEXT),
        (199, Retry.NEXT), (201, Retry.NEXT), (204, Retry.NEXT), (301, Retry.NEXT), (302, Retry.NEXT),
        (307, Retry.NEXT),
    ],
)  # fmt: skip
def test_retry_class(status: int, retry: Retry) -> None:
    assert retry_class(status) is retry


@pytest.mark.parametrize(
    ("event", "status", "words"),
    [
        pytest.param({"type": "error", "error": {"type": "overloaded_error", "message": "busy"}}, 529,
                     "busy", id="type"),
        pytest.param({"error": {"code": 429, "message": "slow"}}, 429, "slow", id="code"),
        pytest.param({"error": {"code": "429", "message": "slow"}}, 429, "slow", id="code as text"),
        pytest.param({"error": {"status": "RESOURCE_EXHAUSTED", "code": 429, "message": "q"}}, 429, "q",
                     id="Google's"),
        pytest.param([{"error": {"status": "UNAVAILABLE", "message": "q"}}], 503, "q", id="Google's in a list"),
        pytest.param({"error": {"type": "insufficient_quota", "message": "pay"}}, 429, "pay", id="OpenAI's quota"),
        pytest.param({"error": "plain words"}, 502, "plain words", id="plain words"),
        pytest.param({"detail": "Not here"}, 502, "Not here", id="FastAPI's"),
        pytest.param({"success": False, "errors": [{"code": 5007, "message": "No such model"}]}, 502, "No such model",
                     id="Cloudflare's"),
        pytest.param({"errors": ["so", "so"]}, 502, '["so", "so"]', id="a list of words"),
        pytest.param({"message": "odd", "code": 503}, 503, "odd", id="flat"),
        pytest.param({"error": {"message": "Provider returned error", "code": 502,
                                "metadata": {"raw": "why"}}}, 502,
                     "Provider returned error: why", id="OpenRouter's"),
        pytest.param({}, 502, "the provider answered with status 502 and no message", id="nothing"),
        pytest.param({"error": {"code": 9999, "message": "x"}}, 502, "x", id="a code that is no status"),
        pytest.param({"error": {"code": 200, "message": "x"}}, 502, "x", id="a code that is no error"),
        pytest.param({"error": {"code": "9" * 5000, "message": "x"}}, 502, "x", id="an endless code"),
        pytest.param({"error": {"code": "²", "message": "x"}}, 502, "x", id="a digit that is no number"),
    ],
)  # fmt: skip
def test_error_of_an_event(event: Any, status: int, words: str) -> None:
    error = error_of_event(event)
    assert (error.status, error.message) == (status, words)


# (vendor, words, (sent, allowed)): None where the vendor names no numbers, or only one
OVERFLOWS = [
    ("Anthropic", "prompt is too long: 210000 tokens > 200000 maximum", (210000, 200000)),
    ("Anthropic, no numbers", "prompt is too long", None),
    ("OpenAI",
     "This model's maximum context length is 128000 tokens. However, your messages resulted in 130512 "
     "tokens. Please reduce the length of the messages.", (130512, 128000)),
    ("OpenAI Responses",
     "Your input exceeds the context window of this model. Please adjust your input and try "
     "again.", None),
    ("OpenRouter",
     "This endpoint's maximum context length is 262144 tokens. However, you requested about 300123 "
     "tokens (268123 of text input, 32000 in the output). Please reduce the length of either one, or use the "
     '"middle-out" transform to compress your prompt automatically.', (300123, 262144)),
    ("Gemini", "The input token count (1200000) exceeds the maximum number of tokens allowed (1048576).",
     (1200000, 1048576)),
    ("Gemini, older", "The input token count exceeds the maximum number of tokens allowed 1048576.", None),
    ("Copilot", "prompt token count of 140000 exceeds the limit of 128000", (140000, 128000)),
    ("vLLM",
     "This model's maximum context length is 32768 tokens. However, you requested 40000 tokens (36000 in the "
     "messages, 4000 in the completion).", (40000, 32768)),
    ("vLLM, prompt",
     "The decoder prompt (length 40123) is longer than the maximum model length of 32768. Make sure "
     "that `max_model_len` is no smaller than the number of text tokens.", (40123, 32768)),
    ("vLLM, with images",
     "The prompt (total length 40123) is too long to fit into the model (context length 32768). Make sure that "
     "`max_model_len` is no smaller than the number of text tokens plus multimodal tokens.", (40123, 32768)),
    ("llama.cpp", "the request exceeds the available context size, try increasing it", None),
    ("llama.cpp, newer",
     "request (9123 tokens) exceeds the available context size (8192 tokens), try increasing it",
     (9123, 8192)),
    ("Mistral",
     "Prompt contains 140001 tokens and 0 draft tokens, too large for model with 131072 maximum context "
     "length", (140001, 131072)),
    ("Groq", "Please reduce the length of the messages or completion.", None),
    ("DeepSeek",
     "This model's maximum context length is 131072 tokens. However, you requested 140000 tokens (132000 "
     "in the messages, 8000 in the completion). Please reduce the length of the messages or completion.",
     (140000, 131072)),
    ("Kimi", "Invalid request: Your request exceeded model token limit: 262144 (requested: 270001)",
     (270001, 262144)),
    ("Kimi, another", "Input token length too long", None),
    ("Z.ai", "Prompt exceeds max length", None),
    ("Z.ai, another", "Prompt too long", None),
    ("Z.ai in China", "Prompt 超长", None),
    ("SiliconFlow", "length of prompt_tokens (68957) must be less than max_seq_len (65536).", (68957, 65536)),
    ("SiliconFlow, with the output", "max_total_tokens (70000) must be less than or equal to max_seq_len (65536)",
     (70000, 65536)),
    ("TGI",
     "Input validation error: `inputs` tokens + `max_new_tokens` must be <= 32768. Given: 82004 `inputs` tokens and "
     "2048 `max_new_tokens`", (82004, 32768)),
    ("TGI, input", "Input validation error: `inputs` must have less than 4096 tokens. Given: 5000", (5000, 4096)),
    ("Poolside", "Input length 131393 exceeds the maximum allowed input length of 131040 tokens.", (131393, 131040)),
    ("ds4", "Prompt has 256468 tokens, but the configured context size is 256000 tokens", (256468, 256000)),
    ("OpenAI, another",
     "Input tokens exceed the configured limit of 272000 tokens. Your messages resulted in 301234 tokens.",
     (301234, 272000)),
    ("Ark", "Total tokens of image and text exceed max message tokens.", None),
    ("Amazon Nova",
     "Input Tokens Exceeded: Number of input tokens exceeds maximum length. Please update the input to try again.", None),
    ("LiteLLM", "litellm.ContextWindowExceededError: litellm.BadRequestError: too long", None),
    ("Qwen", "Range of input length should be [1, 129024]", None),
    ("MiniMax", "invalid params, context window exceeds limit (2013)", (150_000, 100_000)),
    ("xAI", "This model's maximum prompt length is 131072 but the request contains 140001 tokens.",
     (140001, 131072)),
    ("Bedrock", "Input is too long for requested model.", None),
    ("Together", "The input (131079 tokens) is longer than the model's context length (131072 tokens).",
     (131079, 131072)),
    ("Fireworks", "The prompt is too long: 140001, model maximum context length: 131071", (140001, 131071)),
    ("Cohere", "too many tokens: total number of tokens in the prompt cannot exceed 4081 - received 8241.",
     (8241, 4081)),
    ("Ollama", "prompt too long; exceeded max context length by 4 tokens", None),
    ("Ollama, embedding", "input length exceeds the context length", None),
    ("Z.ai, finish reason", "model_context_window_exceeded", None),
    ("LM Studio",
     "The number of tokens to keep from the initial prompt is greater than the context length. Try to "
     "load the model with a larger context length, or provide a shorter input", None),
    ("SGLang",
     "Requested token count exceeds the model's maximum context length of 32768 tokens. You requested a "
     "total of 40000 tokens: 36000 tokens from the input messages and 4000 tokens for the completion.",
     (40000, 32768)),
    ("Cerebras",
     "Please reduce the length of the messages or completion. Current length is 140001 while limit is "
     "131072", (140001, 131072)),
    ("with commas",
     "This model's maximum context length is 128,000 tokens, your messages resulted in 130,512 tokens",
     (130512, 128000)),
]  # fmt: skip


@pytest.mark.parametrize(
    ("words", "numbers"), [pytest.param(words, numbers, id=vendor) for vendor, words, numbers in OVERFLOWS]
)
def test_every_vendors_overflow_becomes_anthropics(words: str, numbers: tuple[int, int] | None) -> None:
    error = upstream_error(400, {"error": {"message": words}}, tokens=150_000, context=100_000)
    assert (error.status, error.type, error.retry) == (400, "invalid_request_error", Retry.LARGER), (
        error.message
    )
    match = re.fullmatch(r"prompt is too long: (\d+) tokens > (\d+) maximum", error.message)
    found = (int(match[1]), int(match[2]))
    assert found[0] > found[1] > 0
    assert numbers in (None, found)


@pytest.mark.parametrize(
    ("words", "numbers"),
    [
        pytest.param(
            "'max_tokens' or 'max_completion_tokens' is too large: 32000. This model's maximum context length is "
            "32768 tokens and your request has 17459 input tokens (32000 > 32768 - 17459).",
            "17459 + 32000 > 32768", id="vLLM",
        ),
        pytest.param(
            "This model's maximum context length is 32768 tokens. However, you requested 49459 tokens (17459 in the "
            "messages, 32000 in the completion). Please reduce the length of the messages or completion.",
            "17459 + 32000 > 32768", id="vLLM, older, and DeepSeek",
        ),
        pytest.param(
            "This model's maximum context length is 32768 tokens. However, you requested 32000 output tokens and your "
            "prompt contains at least 769 input tokens, for a total of at least 32769 tokens.",
            "18000 + 32000 > 32768", id="vLLM, newer: the input is only a least one, the count is nearer",
        ),
        pytest.param(
            "This endpoint's maximum context length is 131072 tokens. However, you requested about 148700 tokens "
            "(18000 of text input, 2700 of tool input, 128000 in the output). Please reduce the length of either one.",
            "20700 + 128000 > 131072", id="OpenRouter",
        ),
        pytest.param(
            "Requested token count exceeds the model's maximum context length of 32768 tokens. You requested a "
            "total of 49459 tokens: 17459 tokens from the input messages and 32000 tokens for the completion.",
            "17459 + 32000 > 32768", id="SGLang",
        ),
        pytest.param(
            "Input validation error: `inputs` tokens + `max_new_tokens` must be <= 32768. Given: 17459 `inputs` tokens "
            "and 32000 `max_new_tokens`", "17459 + 32000 > 32768", id="TGI",
        ),
        pytest.param(
            "This model's maximum context length is 32768 tokens. However, you requested 62000 tokens (30000 in the "
            "messages, 32000 in the completion).", None, id="too little room left for an answer",
        ),
        pytest.param(
            "This model's maximum context length is 32768 tokens. However, you requested 0 output tokens and your "
            "prompt contains at least 32769 input tokens.", None, id="the prompt alone is too long",
        ),
    ],
)  # fmt: skip
def test_too_much_output_asked_for_is_told_so_that_the_client_asks_for_less(
    words: str, numbers: str | None
) -> None:
    error = upstream_error(400, {"error": {"message": words}}, tokens=18_000, context=100_000)
    assert (error.status, error.retry) == (400, Retry.LARGER)
    start = (
        "prompt is too long: " if numbers is None else "input length and `max_tokens` exceed context limit: "
    )
    assert error.message.startswith(start + (numbers or ""))
    assert error.message.endswith("try again" if numbers else "maximum")


@pytest.mark.parametrize(
    ("words", "numbers"),
    [
        pytest.param(
            "max_tokens is too large: 32000. This model supports at most 16384 completion tokens, whereas you "
            "provided 32000.", "32000 > 16384", id="OpenAI",
        ),
        pytest.param(
            "max_tokens=128000 cannot be greater than max_model_len=max_total_tokens=32768. Please request fewer "
            "output tokens.", "128000 > 32768", id="vLLM",
        ),
        pytest.param(
            "max_completion_tokens=128000cannot be greater than max_model_len=32768. Please request fewer output "
            "tokens.", "128000 > 32768", id="vLLM, another",
        ),
        pytest.param(
            "`max_tokens` must be less than or equal to `8192`, the maximum value for `max_tokens` is less than the "
            "`context_window` for this model", "8193 > 8192", id="Groq",
        ),
        pytest.param(
            "max_tokens for `meta-llama/llama-4-maverick-17b-128e-instruct` must be less than or equal to 8192",
            "8193 > 8192", id="Groq, with the model's name",
        ),
        pytest.param(
            "Invalid 'max_tokens': integer above maximum value. Expected a value <= 16384, but got 32000 instead.",
            "16385 > 16384", id="OpenAI, another",
        ),
        pytest.param(
            "Invalid max_tokens value, the valid range of max_tokens is [1, 8192]", "8193 > 8192", id="DeepSeek"
        ),
        pytest.param(
            "<400> InternalError.Algo.InvalidParameter: Range of max_tokens should be [1, 65536]", "65537 > 65536", id="Qwen"
        ),
        pytest.param(
            "The parameter `max_tokens` specified in the request are not valid: integer above maximum value, expected a "
            "value <= 12288, but got 32000 instead.", "12289 > 12288", id="Ark",
        ),
        pytest.param("max_completion_tokens is limited to 16384 for glm-5.2", "16385 > 16384", id="a relay"),
        pytest.param(f"max_tokens={'9' * 5000} cannot be greater than 8192", f"{'9' * 20} > 8192", id="endless"),
        pytest.param(
            "max_tokens (98304) exceeds model's maximum output tokens (65536)", "65537 > 65536", id="another relay"
        ),
    ],
)  # fmt: skip
def test_a_max_tokens_above_the_models_is_told_in_anthropics_words(words: str, numbers: str) -> None:
    error = upstream_error(400, {"error": {"message": words, "param": "max_tokens"}}, tokens=5, context=5)
    told = f"max_tokens: {numbers}, which is the maximum allowed number of output tokens for this model"
    assert (error.status, error.message, error.retry) == (400, told, Retry.NO)


@pytest.mark.parametrize(
    "payload",
    [
        {"error": {"message": "Too much.", "code": "context_length_exceeded"}},
        {
            "error": {
                "message": "Request body too large. Max size: 8192 tokens.",
                "code": "tokens_limit_reached",
            }
        },
        {
            "error": {
                "message": "n",
                "type": "exceed_context_size_error",
                "n_prompt_tokens": 9123,
                "n_ctx": 8192,
            }
        },
    ],
    ids=["OpenAI's code", "GitHub's code", "llama.cpp's fields"],
)
def test_an_overflow_told_by_its_code(payload: Json) -> None:
    assert upstream_error(400, payload, tokens=9123, context=8192).message == (
        "prompt is too long: 9123 tokens > 8192 maximum"
    )


@pytest.mark.parametrize(
    ("words", "tokens", "context", "expected"),
    [
        pytest.param(
            "prompt is too long", 150, 100, (150, 100), id="none named: the count and the model's context"
        ),
        pytest.param(
            "prompt is too long", 50, 100, (101, 100), id="a count below the context: at least one more"
        ),
        pytest.param("prompt is too long", 50, 0, (50, 49), id="no context known: one below the count"),
        pytest.param("prompt is too long", 0, 0, (2, 1), id="nothing known"),
        pytest.param("maximum context length is 8192 tokens", 9000, 0, (9000, 8192), id="the limit alone"),
        pytest.param(
            "maximum context length is 8192 tokens", 50, 0, (8193, 8192), id="the limit above the count"
        ),
        pytest.param(
            "prompt is too long: [" + "1," * 5000 + "1]", 150, 100, (150, 100), id="tokens told one by one"
        ),
    ],
)
def test_overflow_numbers(words: str, tokens: int, context: int, expected: tuple[int, int]) -> None:
    assert overflow(words, {}, tokens, context) == expected


@pytest.mark.parametrize(
    "words",
    [
        "messages: at least one message is required",
        "input length and `max_tokens` exceed context limit: 190000 + 20000 > 200000, decrease input length "
        "or `max_tokens` and try again",
        "max_tokens: 64000 > 32000, which is the maximum allowed number of output tokens",
        "Rate limit reached: 30000 tokens per minute",
        "context_management: Extra inputs are not permitted",
        "Invalid `signature` in `thinking` block",
        "role 'system' is not supported on this model",
        "image exceeds 5 MB maximum",
        "max_output_tokens exceeds the maximum of this model",
    ],
    ids=lambda w: w[:30],
)
def test_other_errors_keep_their_words(words: str) -> None:
    error = upstream_error(400, {"error": {"message": words}}, tokens=5, context=5)
    assert (error.status, error.message, error.retry) == (400, words, Retry.NO)


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (413, "Request too large for model `x` in organization `o` service tier `on_demand` on tokens per minute (TPM): "
         "Limit 8000, Requested 32979, please reduce your message size and try again."),
        (429, "Request too large for gpt-4o on tokens per min (TPM): Limit 30000, Requested 342389. The input or output "
         "tokens must be reduced in order to run successfully."),
    ],
    ids=["Groq", "OpenAI"],
)  # fmt: skip
def test_a_request_above_a_minutes_tokens_is_a_limit_that_no_wait_helps(status: int, words: str) -> None:
    error = upstream_error(
        status, {"error": {"message": words, "code": "rate_limit_exceeded"}}, tokens=9, context=9
    )
    assert (error.status, error.message, error.retry, error.should_retry) == (429, words, Retry.KEY, False)


@pytest.mark.parametrize(
    ("words", "status", "says"),
    [
        ("model: foo", 404, ""),
        ("No endpoints found for foo/bar.", 404, ""),
        ("No endpoints found that support tool use. To learn more about provider routing, visit: https://a", 400, ""),
        ("No endpoints available matching your guardrail restrictions and data policy. Configure: https://a", 400, ""),
        ("No allowed providers are available for the selected model.", 400, ""),
        ("404 page not found", 400, "check its base_url"),
        ("Not Found", 400, "check its base_url"),
        ("", 400, "check its base_url"),
    ],
)  # fmt: skip
def test_a_404_that_is_not_of_the_model_shows_its_words(words: str, status: int, says: str) -> None:
    error = upstream_error(404, {"error": {"message": words}} if words else "")
    assert (error.status, error.retry) == (status, Retry.NEXT)
    assert words in error.message and says in error.message


@pytest.mark.parametrize("words", ["No endpoints found that support tool use.", "Not Found", ""])
def test_a_404_in_anthropics_form_stays_one(words: str) -> None:
    payload = {"type": "error", "error": {"type": "not_found_error", "message": words}}
    error = upstream_error(404, payload)
    assert (error.status, error.type, error.retry) == (404, "not_found_error", Retry.NEXT)


@pytest.mark.parametrize("status", [401, 403, 404, 429, 529])
def test_an_overflow_is_not_read_into_other_statuses(status: int) -> None:
    assert upstream_error(status, {"error": {"message": "context window"}}).status == status


@pytest.mark.parametrize("status", [204, 302, 600])
def test_a_status_that_is_no_answer_is_a_502(status: int) -> None:
    error = upstream_error(status, None)
    assert (error.status, str(status) in error.message) == (502, True)


def test_an_event_past_the_limit_is_an_error() -> None:
    t = tap()
    t.decoder.limit = 100
    with pytest.raises(ApiError):
        t.feed(b"data: " + b"x" * 200)


def test_a_long_answers_bytes_are_let_go_and_its_text_kept() -> None:
    tap = AnthropicTap(lambda text: text)
    delta = {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "x" * 1000}}
    block = encode_event(delta)
    for _ in range(2000):
        assert tap.feed(block) == block
        assert tap.unread <= tap.MOST_UNREAD
    assert tap.output_text() == "x" * 2_000_000
    assert tap.output_text() == "x" * 2_000_000
