"""Server-sent events: bytes cut anywhere -> whole blocks; blocks -> name and data; events -> bytes."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ccmux import MAX_EVENT, PING, ApiError, Retry, SseDecoder, encode_event, event_of, events_of


def blocks_of_stream(*chunks: bytes) -> list[bytes]:
    decoder = SseDecoder()
    return [*(b for chunk in chunks for b in decoder.feed(chunk)), *filter(None, [decoder.finish()])]


def events(*chunks: bytes) -> list[tuple[str, str]]:
    """The events that carry data, as a client's reader sees them."""
    decoder = SseDecoder()
    cuts = [*map(decoder.cut, chunks), decoder.finish()]
    found = [event for cut in cuts for event in events_of(cut) if event[1]]
    assert found == [event for event in map(event_of, blocks_of_stream(*chunks)) if event[1]]
    return found


EVENTS = [
    pytest.param(b"data: a\n\n", [("", "a")], id="one event"),
    pytest.param(b"data:a\n\n", [("", "a")], id="no space after the colon"),
    pytest.param(b"data:  a\n\n", [("", " a")], id="only one space is taken off"),
    pytest.param(b'data: {"a": 1}\n\n', [("", '{"a": 1}')], id="the fast shape"),
    pytest.param(b"event: ping\ndata: {}\n\n", [("ping", "{}")], id="a name"),
    pytest.param(b"data: {}\nevent: ping\n\n", [("ping", "{}")], id="name after data"),
    pytest.param(b"error: {}\n\n", [("error", "{}")], id="llama.cpp's error"),
    pytest.param(b"data: a\n\ndata: b\n\n", [("", "a"), ("", "b")], id="two events"),
    pytest.param(b"data: a\r\n\r\ndata: b\r\n\r\n", [("", "a"), ("", "b")], id="CR LF"),
    pytest.param(b"data: a\r\rdata: b\r\r", [("", "a"), ("", "b")], id="CR"),
    pytest.param(b"data: a\n\r\ndata: b\r\n\n", [("", "a"), ("", "b")], id="mixed line ends"),
    pytest.param(b"data: a\ndata: b\n\n", [("", "a\nb")], id="data of two lines"),
    pytest.param(b'data: {"a":\ndata: 1}\n\n', [("", '{"a":\n1}')], id="JSON over two lines"),
    pytest.param(b"data: {}\ndata: {}\n\n", [("", "{}\n{}")], id="two lines that look like the fast shape"),
    pytest.param(b": keep-alive\n\ndata: a\n\n", [("", "a")], id="a comment is no event"),
    pytest.param(b": x\ndata: a\n\n", [("", "a")], id="a comment within an event"),
    pytest.param(b"id: 7\nretry: 5\ndata: a\n\n", [("", "a")], id="fields we have no use for"),
    pytest.param(b"data\n\ndata: a\n\n", [("", "a")], id="a field without a colon"),
    pytest.param(b"data: a:b: c\n\n", [("", "a:b: c")], id="colons in the data"),
    pytest.param(b"\n\n\ndata: a\n\n\n\n\ndata: b\n\n", [("", "a"), ("", "b")], id="blank lines too many"),
    pytest.param(b"data: a", [("", "a")], id="a last event without its blank line"),
    pytest.param(b"data: a\n", [("", "a")], id="a last event with half of it"),
    pytest.param(b"data: a\r", [("", "a")], id="a last event that ends in CR"),
    pytest.param(b"data: a\n\n  \n", [("", "a")], id="white space at the end is no event"),
    pytest.param(b"\xef\xbb\xbfevent: x\ndata: a\n\n", [("x", "a")], id="a byte order mark at the start"),
    pytest.param(b"\xef\xbb\xbfdata: a\n\n", [("", "a")], id="a byte order mark before data"),
    pytest.param("data: é🌹\n\n".encode(), [("", "é🌹")], id="UTF-8"),
    pytest.param(b"data: \xff\n\n", [("", "\ufffd")], id="bytes that are not UTF-8"),
    pytest.param(b"", [], id="nothing"),
]


@pytest.mark.parametrize(("data", "expected"), EVENTS)
def test_events(data: bytes, expected: list[tuple[str, str]]) -> None:
    assert events(data) == expected


@pytest.mark.parametrize(("data", "expected"), EVENTS)
def test_events_cut_at_every_byte(data: bytes, expected: list[tuple[str, str]]) -> None:
    for at in range(len(data) + 1):
        assert events(data[:at], data[at:]) == expected, f"cut at {at}"
    assert events(*(bytes([b]) for b in data)) == expected


@pytest.mark.parametrize(("data", "expected"), EVENTS)
def test_no_byte_is_lost(data: bytes, expected: list[tuple[str, str]]) -> None:
    for at in range(len(data) + 1):
        assert b"".join(blocks_of_stream(data[:at], data[at:])).rstrip() == data.rstrip(), f"cut at {at}"


LINES = st.sampled_from(
    [b"data: {}", b"data: a", b"data:", b"event: x", b": c", b"id: 1", "data: é🌹".encode(), b""]
)
STREAMS = st.lists(st.tuples(LINES, st.sampled_from([b"\n", b"\r\n", b"\r"])), max_size=20).map(
    lambda lines: b"".join(line + end for line, end in lines)
)


@settings(max_examples=300, deadline=None)
@example(b"data: a\n\n\ndata: b\n\n", [10])
@example(b"data: a\r\n\r\ndata: b\n\n", [10])
@given(STREAMS, st.lists(st.integers(0, 200), max_size=8))
def test_any_chunking_gives_the_same_events_and_bytes(stream: bytes, cuts: list[int]) -> None:
    edges = [0, *sorted(min(c, len(stream)) for c in cuts), len(stream)]
    chunks = [stream[a:b] for a, b in pairwise(edges)]
    assert events(*chunks) == events(stream)
    decoder = SseDecoder()
    fed = [b for chunk in chunks for b in decoder.feed(chunk)]
    assert b"".join(fed) + decoder.rest == stream


def test_cut_gives_what_feed_gives() -> None:
    data = b"data: a\n\ndata: b\r\n\r\ndata: c\n"
    decoder = SseDecoder()
    assert decoder.cut(data) + decoder.rest == data
    assert decoder.rest == b"data: c\n"


@pytest.mark.parametrize("end", [b"", b"\r\n"], ids=["LF", "CR LF"])
def test_an_event_past_the_limit_is_refused(end: bytes) -> None:
    decoder = SseDecoder(limit=1000)
    decoder.feed(b"data: a" + end)
    with pytest.raises(ApiError) as caught:
        for _ in range(20):
            decoder.feed(b"x" * 100)
    assert (caught.value.status, caught.value.retry, caught.value.cause) == (502, Retry.SAME, "stream")


def test_an_event_of_many_lines_costs_no_time() -> None:
    decoder = SseDecoder()
    for _ in range(16_000):  # minutes, where all that has come is looked at again with each
        assert decoder.cut(b"data: " + b"x" * 1000 + b"\n") == b""
    assert len(decoder.rest) == 16_000 * 1007


def test_many_events_past_the_limit_together_are_fine() -> None:
    assert len(SseDecoder(limit=1000).feed(b"data: a\n\n" * 1000)) == 1000


def test_the_limit_is_16_megabytes() -> None:
    assert MAX_EVENT == 16 * 2**20
    decoder = SseDecoder()
    decoder.feed(b"data: " + b"x" * (MAX_EVENT - 100))
    with pytest.raises(ApiError):
        decoder.feed(b"x" * 200)


@pytest.mark.parametrize(
    "event",
    [
        {"type": "content_block_delta", "index": 3, "delta": {"type": "text_delta",
                                                              "text": 'a "b"\n\\ é 🌹 \ud800'}},
        {"type": "content_block_delta", "index": 0, "delta": {"type": "thinking_delta", "thinking": "hm"}},
        {"type": "message_stop"},
        {"type": "error", "error": {"type": "api_error", "message": "two\n\nlines"}},
    ],
    ids=["text by hand", "thinking", "stop", "a blank line in a text"],
)  # fmt: skip
def test_an_encoded_event_decodes_to_itself(event: dict) -> None:
    [block] = SseDecoder().feed(encode_event(event))
    name, data = event_of(block)
    assert (name, json.loads(data)) == (event["type"], event)


def test_ping_is_an_event() -> None:
    assert event_of(PING) == ("ping", '{"type": "ping"}')
