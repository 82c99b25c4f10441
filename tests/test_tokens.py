"""Counting: requests of both forms, bad input, the cache, calibration, threads, and the vocabulary files."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import aiohttp
import attacks
import pytest
import vocabulary
from aiohttp import web
from fakes import serving
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from proxy_harness import ROOT, Proxy, ask, in_process, provider_row, until
from translation import tool_use

from ccmux import (
    CACHE_SIZE,
    ESTIMATE,
    LIMIT,
    SLICE,
    VOCABULARIES,
    Encoding,
    Json,
    RemoteEncoding,
    TokenCounter,
    Vocabulary,
    claude_encoding,
    compact,
    count_request_body,
    fetch_vocabularies,
    fetch_vocabulary,
    find_vocabulary,
    framing_of,
    image_size,
    is_surely_within,
    items_of,
    load_config,
    remote_encoding,
    slices,
    source_of,
    vocabulary_state,
)

if "TIKTOKEN_CACHE_DIR" not in os.environ:
    os.environ["TIKTOKEN_CACHE_DIR"] = str(vocabulary.filled(vocabulary.cache_dir()))
VOCABULARY = Vocabulary()
CL100K_FILE = Path(os.environ["TIKTOKEN_CACHE_DIR"]) / VOCABULARIES["cl100k_base"][0]


class Words(Encoding):
    """An encoding of a token a word, which remembers what it was asked and where."""

    name = "o200k_base"

    def __init__(self) -> None:
        super().__init__(self.name, str.split)
        self.texts: list[str] = []
        self.threads: set[int] = set()
        self.before: Callable[[], object] = bool

    def lengths(self, texts: list[str]) -> list[int]:
        self.before()
        self.texts += texts
        self.threads.add(threading.get_ident())
        return super().lengths(texts)


def counting_words() -> tuple[TokenCounter, Words]:
    words = Words()
    return TokenCounter(lambda name: words), words


def count(body: Json, model: str) -> int:
    return TokenCounter(VOCABULARY.load).count_now(body, "p", model)


def length(text: str, encoding: str = "o200k_base") -> int:
    made = VOCABULARY.load(encoding)
    assert made is not None
    return made.lengths([text])[0]


def user(content: Any, **rest: Any) -> Json:
    return {"messages": [{"role": "user", "content": content}], **rest}


def tool(name: str, description: str = "", **schema: Any) -> Json:
    return {"name": name, "description": description, "input_schema": {"type": "object", **schema}}


# Whole requests. What is counted beyond the texts is written out by hand.

PROPERTIES = {
    "path": {"type": "string", "description": "Where"},
    "mode": {"type": "string", "enum": ["r", "w"]},
    "lines": {"type": "array", "items": {"type": "integer"}},
    "more": {"type": "object", "properties": {"deep": {"type": "boolean", "description": "not shown"}}},
    "either": {"anyOf": [{"type": "string"}, {"type": "number"}]},
    "what": {},
}
RENDERED = """namespace functions {

// Reads a file
type Read = (_: {
// Where
path: string,
mode?: "r" | "w",
lines?: number[],
more?: {
  deep?: boolean,
},
either?: string | number,
what?: any,
}) => any;

type Stop = () => any;

} // namespace functions"""
TOOLS = [tool("Read", "Reads a file", properties=PROPERTIES, required=["path"]), tool("Stop")]
CHAT_TOOLS = [
    {
        "type": "function",
        "function": {"parameters": t["input_schema"], **{k: t[k] for k in ("name", "description")}},
    }
    for t in TOOLS
]
PROMPT = length("Say hello.")
NAMESPACE = length(RENDERED) + 9
OPENAI = {
    "one-message": (user("Say hello."), 3 + 4 + PROMPT),
    "blocks-are-the-same": (user([{"type": "text", "text": "Say hello."}]), 3 + 4 + PROMPT),
    "system": (user("Say hello.", system="Be brief."), 3 + 4 + PROMPT + 4 + length("Be brief.")),
    "tools": (user("Say hello.", tools=TOOLS), 3 + 4 + PROMPT + NAMESPACE),
    "tools-join-the-system-message": (
        user("Say hello.", tools=TOOLS, system=[{"type": "text", "text": "Be brief:"}]),
        3 + 4 + PROMPT + 4 + length("Be brief:\n") + NAMESPACE - 4,
    ),
    "forced-tool": (
        user("Say hello.", tools=TOOLS, tool_choice={"type": "tool", "name": "Read"}),
        3 + 4 + PROMPT + NAMESPACE + 4 + length("Read"),
    ),
    "no-tool-wanted": (
        user("Say hello.", tools=TOOLS, tool_choice={"type": "none"}),
        3 + 4 + PROMPT + NAMESPACE + 1,
    ),
    "server-tools-are-not-sent": (
        user("Say hello.", tools=[{"type": "web_search_20250305", "name": "web_search"}]),
        3 + 4 + PROMPT,
    ),
    "call-and-result": (
        user([tool_use("1", "Read", path="a"), {"type": "tool_result", "content": "ok"}]),
        3 + 4 + 3 + length('Read {"path": "a"}') + 4 + length("ok"),
    ),
    "openai-form-tools": (
        user("Say hello.", tools=CHAT_TOOLS, tool_choice={"type": "function", "function": {"name": "Read"}}),
        3 + 4 + PROMPT + NAMESPACE + 4 + length("Read"),
    ),
    "openai-form-name": (
        {"messages": [{"role": "system", "name": "example", "content": "Say hello."}]},
        3 + 4 + 1 + length("example") + PROMPT,
    ),
    "openai-form-call": (
        {
            "messages": [
                {"role": "assistant", "tool_calls": [{"function": {"name": "Read", "arguments": "{}"}}]}
            ]
        },
        3 + 4 + 3 + length("Read") + length("{}"),
    ),
    "openai-form-low-image": (
        user([{"type": "image_url", "image_url": {"url": "https://x/y.png", "detail": "low"}}]),
        3 + 4 + 85,
    ),
}


@pytest.mark.parametrize(("body", "expected"), OPENAI.values(), ids=OPENAI)
def test_openai_framing(body: Json, expected: int) -> None:
    assert count(body, "gpt-5") == expected


ENCODINGS = {
    "gpt-4": "cl100k_base", "gpt-4-0613": "cl100k_base", "gpt-4-turbo": "cl100k_base",
    "gpt-35-turbo": "cl100k_base", "openai/gpt-3.5-turbo": "cl100k_base",
    "gpt-4o": "o200k_base", "gpt-4.1": "o200k_base", "gpt-4.5": "o200k_base", "gpt-5": "o200k_base",
    "o3": "o200k_base", "glm-5.3": "o200k_base", "": "o200k_base",
}  # fmt: skip


@pytest.mark.parametrize(("model", "encoding"), ENCODINGS.items(), ids=ENCODINGS)
def test_encoding_by_model(model: str, encoding: str) -> None:
    text = "Ein Wörterbuch, словарь, 辞書"
    assert length(text) != length(text, "cl100k_base")
    assert count(user(text), model) == 7 + length(text, encoding)


CLAUDE = {
    "4.5": ("claude-sonnet-4-5-20250929", 1.18, 7, 497, 589),
    "old-order-of-names": ("claude-3-5-sonnet-latest", 1.18, 7, 497, 589),
    "dotted-with-vendor": ("anthropic/claude-opus-4.6", 1.18, 7, 497, 589),
    "4.7": ("claude-opus-4-7", 1.45, 12, 675, 804),
    "4.8": ("claude-opus-4-8", 1.45, 12, 290, 410),
    "5": ("claude-opus-5", 1.45, 7, 290, 410),
    "5.5": ("claude-sonnet-5-5", 1.45, 7, 290, 410),
    "a-date-is-no-version": ("claude-opus-4-20250514", 1.18, 7, 497, 589),
    "no-version": ("claude-next", 1.18, 7, 497, 589),
}


def test_a_name_of_5000_digits_has_a_framing() -> None:
    assert framing_of("claude-" + "1" * 5000).is_claude


@pytest.mark.parametrize(("model", "factor", "frame", "auto", "forced"), CLAUDE.values(), ids=CLAUDE)
def test_claude_framing(model: str, factor: float, frame: int, auto: int, forced: int) -> None:
    text = "Count these words, please. " * 40
    assert count(user(text), model) == pytest.approx(length(text) * factor + frame, abs=1)
    written = "".join(json.dumps({k: t[k] for k in ("name", "description", "input_schema")}) for t in TOOLS)
    texts = (length(text) + length(written)) * factor + frame
    assert count(user(text, tools=TOOLS), model) == pytest.approx(texts + auto, abs=1)
    counted = count(user(text, tools=TOOLS, tool_choice={"type": "any"}), model)
    assert counted == pytest.approx(texts + forced, abs=1)


# Images and documents.


def encoded(data: bytes) -> str:
    return base64.b64encode(data).decode()


def png(width: int, height: int) -> bytes:
    header = struct.pack(">I4sII", 13, b"IHDR", width, height)
    return b"\x89PNG\r\n\x1a\n" + header + b"\x08\x06" + bytes(90_000)


def jpeg(width: int, height: int, metadata: int = 0) -> bytes:
    exif = b"\xff\xe1" + struct.pack(">H", metadata + 2) + bytes(metadata) if metadata else b""
    frame = b"\xff\xc2" + struct.pack(">HBHH", 17, 8, height, width) + bytes(20)
    return b"\xff\xd8" + exif + b"\xff\xc4" + struct.pack(">H", 4) + b"\x00\x00" + frame


def webp(kind: bytes, payload: bytes) -> bytes:
    return b"RIFF" + struct.pack("<I", 100) + b"WEBP" + kind + struct.pack("<I", 40) + payload + bytes(40)


SIZES = {
    "png": (png(640, 480), (640, 480)),
    "gif": (b"GIF89a" + struct.pack("<HH", 33, 44) + bytes(9), (33, 44)),
    "jpeg": (jpeg(800, 600), (800, 600)),
    "jpeg-after-metadata": (jpeg(800, 600, 20_000), (800, 600)),
    "jpeg-metadata-too-long": (jpeg(800, 600, 60_000), None),
    "webp-lossy": (webp(b"VP8 ", bytes(3) + b"\x9d\x01\x2a" + struct.pack("<HH", 100, 200)), (100, 200)),
    "webp-lossless": (webp(b"VP8L", b"\x2f" + struct.pack("<I", 99 | 199 << 14)), (100, 200)),
    "webp-extended": (webp(b"VP8X", bytes(4) + b"\x63\x00\x00\xc7\x00\x00"), (100, 200)),
    "no-width": (png(0, 480), None),
    "cut-short": (png(640, 480)[:17], None),
    "not-an-image": (b"hello there, this is text", None),
    "empty": (b"", None),
}


@pytest.mark.parametrize(("data", "expected"), SIZES.values(), ids=SIZES)
def test_image_size(data: bytes, expected: tuple[int, int] | None) -> None:
    assert image_size(encoded(data)) == expected


def image(data: str, kind: str = "base64") -> Json:
    return user([{"type": "image", "source": {"type": kind, "media_type": "image/png", "data": data}}])


def low_detail(side: int) -> Json:
    url = f"data:image/png;base64,{encoded(png(side, side))}"
    return user([{"type": "image_url", "image_url": {"url": url, "detail": "low"}}])


IMAGES = {
    "claude-patches": (image(encoded(png(1000, 1000))), "claude-sonnet-4-5", 7 + 36 * 36),
    "claude-scaled-down-and-capped": (image(encoded(png(4000, 4000))), "claude-sonnet-4-5", 7 + 1568),
    "claude-scaled-down": (image(encoded(png(3136, 280))), "claude-sonnet-4-5", 7 + 56 * 5),
    "claude-4.7-sees-more": (image(encoded(png(4000, 4000))), "claude-opus-4-7", 12 + 4784),
    "openai-tiles": (image(encoded(png(1024, 1024))), "gpt-5", 7 + 85 + 170 * 4),
    "openai-fitted": (image(encoded(png(4096, 8192))), "gpt-5", 7 + 85 + 170 * 6),
    "gpt-4o-mini": (image(encoded(png(512, 512))), "gpt-4o-mini", 7 + 2833 + 5667),
    "unknown-size": (image("AAAA"), "gpt-5", 7 + 1500),
    "openai-form-low-detail": (low_detail(280), "gpt-5", 7 + 85),
    "openai-form-claude-has-no-detail": (low_detail(280), "claude-sonnet-4-5", 7 + 10 * 10),
    "not-base64": (image("%é%"), "gpt-5", 7 + 1500),
    "by-address": (image("", "url"), "claude-sonnet-4-5", 7 + 1500),
    "inside-a-tool-result": (
        user([{"type": "tool_result", "content": image(encoded(png(28, 28)))["messages"][0]["content"]}]),
        "gpt-5", 7 + 4 + 85 + 170,
    ),
}  # fmt: skip


@pytest.mark.parametrize(("body", "model", "expected"), IMAGES.values(), ids=IMAGES)
def test_images(body: Json, model: str, expected: int) -> None:
    assert count(body, model) == expected


def document(source: Json) -> Json:
    return user([{"type": "document", "source": source}])


PDF = b"%PDF-1.7\n1 0 obj<</Type/Pages/Count 3>>endobj" + b"<</Type /Page/Parent 1 0 R>>" * 3
DOCUMENTS = {
    "pdf-pages": ({"type": "base64", "data": encoded(PDF)}, 3 * 2500),
    "pdf-without-page-objects": ({"type": "base64", "data": encoded(b"%PDF-1.7")}, 2500),
    "broken-pdf": ({"type": "base64", "data": "x"}, 2500),
    "text": ({"type": "text", "data": "Say hello."}, PROMPT),
    "content": ({"type": "content", "content": [{"type": "text", "text": "Say hello."}]}, PROMPT),
    "by-file-id": ({"type": "file", "file_id": "f"}, 0),
    "null": (None, 0),
}


@pytest.mark.parametrize(("source", "expected"), DOCUMENTS.values(), ids=DOCUMENTS)
def test_documents(source: Json, expected: int) -> None:
    assert count(document(source), "gpt-5") == 7 + expected


def test_pdf_pages_cost_the_same_for_claude() -> None:
    counter, body = TokenCounter(VOCABULARY.load), document({"type": "base64", "data": encoded(PDF)})
    assert counter.count_now(body, "p", "claude-sonnet-4-5") in range(7507, 7510)
    assert counter.count_now(body, "p", "claude-opus-4-7") in range(7512, 7515)


def test_pdfs_that_differ_in_the_middle_are_two() -> None:
    page, other = (b"<</Type /Page>>" + bytes(8000), b"<</Type/Pages>>" + bytes(8000))
    counter = TokenCounter(VOCABULARY.load)
    for middle, pages in ((page, 3), (other, 2)):
        data = encoded(page + middle + page)
        assert counter.count_now(document({"type": "base64", "data": data}), "p", "gpt-5") == 7 + 2500 * pages


# Bad input: always a count.


def nested(depth: int) -> Json:
    value: Any = "end"
    for _ in range(depth):
        value = {"a": [value]}
    return {"value": value}


def results(depth: int) -> Any:
    content: Any = "end"
    for _ in range(depth):
        content = [{"type": "tool_result", "content": content}]
    return content


BAD = {
    "empty": {},
    "messages-null": {"messages": None},
    "messages-of-rubbish": {
        "messages": [None, 1, "x", {}, {"content": 7}, {"content": [None, 3, {"type": 4}]}]
    },
    "system-a-number": user("x", system=5),
    "tools-of-rubbish": user(
        "x", tools=[None, {}, {"name": 5}, {"name": "a", "input_schema": "b"}], tool_choice="any"
    ),
    "schema-of-rubbish": user(
        "x", tools=[tool("a", properties={"b": 1, "c": {"type": ["x"], "enum": 3}}, required=9)]
    ),
    "deep-schema": user("x", tools=[tool("a", properties=nested(400))]),
    "deep-input": user([{"type": "tool_use", "name": "a", "input": nested(3000)}]),
    "deep-results": user(results(3000)),
    **{
        f"deep-{block['type']}": user([block])
        for block in (
            {"type": "text", "text": nested(3000)},
            {"type": "thinking", "thinking": nested(3000)},
            {"type": "document", "source": {"type": "base64", "data": nested(3000)}},
            {"type": "image_url", "image_url": {"url": nested(3000)}},
        )
    },
    "deep-system-with-tools": user("x", system=[{"type": "text", "text": nested(3000)}], tools=TOOLS),
    "deep-call": {"messages": [{"function_call": {"name": nested(3000), "arguments": nested(3000)}}]},
    "deep-choice": user("x", tools=TOOLS, tool_choice={"name": nested(3000)}),
    "unknown-block": user([{"type": "hologram", "data": {"x": [1, 2, None]}}]),
    "deep-unknown-block": user([{"type": "hologram", "data": nested(3000)}]),
    "special-tokens": user("<|endoftext|><|fim_prefix|><|endofprompt|>"),
    "lone-surrogates": user("a\ud800b\udfff" * 9, system="\udc00"),
    "surrogates-in-a-call": user([{"type": "tool_use", "name": "\ud800", "input": {"\ud800": "\udfff"}}]),
    "control-characters": user("\x00\x01\u2028\ufeff" * 50),
    "megabyte-of-spaces": user(" " * 1_000_000),
    "megabyte-of-newlines": user("\n" * 1_000_000),
    "megabyte-of-one-letter": user("a" * 1_000_000),
    "megabyte-of-base64": user(encoded(bytes(range(256)) * 3000)),
    "megabyte-of-ideographs": user("漢字" * 170_000),
    "megabyte-of-emoji": user("\U0001f600" * 250_000),
    "tabs-and-newlines": user("\t\n" * 200_000),
}


@pytest.mark.parametrize("model", ["gpt-5", "gpt-4", "claude-sonnet-4-5"])
@pytest.mark.parametrize("body", BAD.values(), ids=BAD)
async def test_bad_input_is_counted(body: Json, model: str) -> None:
    assert await TokenCounter(VOCABULARY.load).count(body, "p", model) > 0
    assert TokenCounter(lambda name: None).count_now(body, "p", model) > 0


scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20)
kinds = st.sampled_from(
    ["text", "tool_use", "tool_result", "thinking", "image", "image_url", "document", "search_result", "x"]
)
keys = st.sampled_from(
    ["type", "text", "content", "source", "data", "name", "input", "role", "system", "messages", "tools",
     "image_url", "function", "tool_calls", "function_call", "tool_choice", "input_schema", "properties",
     "enum", "items", "anyOf"]
)  # fmt: skip
values = st.recursive(
    scalars | kinds, lambda inner: st.lists(inner) | st.dictionaries(keys, inner), max_leaves=30
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(keys, values), st.sampled_from(["gpt-5", "claude-opus-4-7"]))
def test_any_json_is_counted(body: Json, model: str) -> None:
    once = count(body, model)
    assert once > 0
    counter = TokenCounter(VOCABULARY.load)
    assert [counter.count_now(body, "p", model), counter.count_now(body, "p", model)] == [once, once]


dense = st.one_of(  # much to count in few bytes
    st.text(min_size=1, max_size=8).map(lambda text: user(text * 800)),
    st.text(max_size=8).map(lambda text: user([{"type": "tool_use", "name": "t", "input": {"n": [text] * 900}}])),
    st.dictionaries(keys, values).map(lambda each: user("", tools=[tool("t", properties={"n": each})] * 90)),
    st.dictionaries(keys, values).map(lambda block: user([{"type": "text", "text": "a"}, block] * 400)),
    st.just({"messages": [{"role": "user", "content": ""}] * 900}),
    st.just(user("", tools=[{"name": "t", "input_schema": {}}] * 300)),
)  # fmt: skip


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(dense, st.sampled_from(["gpt-5", "gpt-4", "claude-sonnet-4-5", "claude-opus-4-7"]))
def test_a_request_that_is_surely_within_a_limit_counts_no_more(body: Json, model: str) -> None:
    assert not is_surely_within(compact(body), body, count(body, model) - 1)


IMAGE = {"type": "image", "source": {"type": "url", "url": "https://a.test/a.png"}}


@pytest.mark.parametrize(
    ("content", "limit", "within"),
    [
        pytest.param("a" * 113_000, 180_000, True, id="of Claude Code's usual size"),
        pytest.param("a" * 125_000, 180_000, False, id="large enough to be counted"),
        pytest.param("a" * 1000, 2_000, False, id="near a small limit"),
        pytest.param([{"type": "text", "text": "image"}], 180_000, True, id="a text"),
        pytest.param([IMAGE], 180_000, False, id="an image is not counted by its bytes"),
        pytest.param([{"type": "tool_result", "content": [IMAGE]}], 180_000, False, id="an image of a tool"),
        pytest.param([{"type": "document", "source": {}}], 180_000, False, id="a document"),
    ],
)
def test_whether_the_bytes_tell(content: Any, limit: int, within: bool) -> None:
    assert is_surely_within(compact(user(content)), user(content), limit) is within


def test_an_image_in_the_system_prompt_is_not_counted_by_its_bytes() -> None:
    body = {"system": [IMAGE], **user("short")}
    assert not is_surely_within(compact(body), body, 180_000)


def test_bytes_that_are_not_at_hand_tell_nothing() -> None:
    assert not is_surely_within(b"", user("short"), 180_000)


def test_content_nested_too_deeply_to_look_at_is_counted() -> None:
    assert not is_surely_within(compact(user(results(400))), user(results(400)), 180_000)


@given(st.text(alphabet="ab \n", max_size=50).map(lambda text: text * 9000))
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_slices_join_to_the_text(text: str) -> None:
    parts = list(slices(text))
    assert "".join(parts) == text
    assert all(0 < len(part) <= SLICE for part in parts)


# The cache and the threads.


def conversation(turns: int) -> Json:
    messages: list[Json] = []
    for turn in range(turns):
        call = {"type": "tool_use", "id": f"t{turn}", "name": "Read", "input": {"path": f"file {turn}"}}
        result = {"type": "tool_result", "tool_use_id": f"t{turn}", "content": f"what file {turn} says"}
        messages += [{"role": "assistant", "content": [call]}, {"role": "user", "content": [result]}]
    return {"system": "the rules", "messages": messages, "tools": TOOLS}


def test_only_what_is_new_is_encoded() -> None:
    counter, words = counting_words()
    before = counter.count_now(conversation(20), "p", "gpt-5")
    assert len(words.texts) == 20 * 2 + 2
    words.texts.clear()
    after = counter.count_now(conversation(21), "p", "gpt-5")
    assert words.texts == ['Read {"path": "file 20"}', "what file 20 says"]
    assert after == TokenCounter(lambda name: words).count_now(conversation(21), "p", "gpt-5") > before


def test_equal_bytes_of_another_kind_are_no_hit() -> None:
    counter, words = counting_words()
    counter.count_now(user("a b", tools=TOOLS), "p", "gpt-5")
    asked = user("a b", tools=TOOLS), "p", "claude-sonnet-4-5"
    assert counter.count_now(*asked) == TokenCounter(lambda name: words).count_now(*asked)


def test_cache_is_bounded_and_oldest_go_first() -> None:
    counter, words = counting_words()
    many = {"messages": [{"role": "user", "content": f"message {n}"} for n in range(CACHE_SIZE + 100)]}
    assert counter.count_now(many, "p", "gpt-5") == 3 + 6 * (CACHE_SIZE + 100)
    assert len(counter.cache) == CACHE_SIZE == 20_000
    words.texts.clear()
    counter.count_now({"messages": many["messages"][99:101]}, "p", "gpt-5")
    assert words.texts == ["message 99"]


@pytest.mark.parametrize("size", [10, 20_000], ids=["short", "long"])
async def test_texts_are_counted_in_a_thread(size: int) -> None:
    counter, words = counting_words()
    assert await counter.count(user("word\n" * size), "p", "gpt-5") == 7 + size
    assert counter.count_now(user("what else"), "p", "gpt-5") == 9
    assert counter.count_text("an answer", "gpt-5") == 2
    assert words.threads and threading.get_ident() not in words.threads


async def test_a_short_text_waits_for_a_slice_of_a_long_one() -> None:
    counter, words = counting_words()
    bodies = [user("word\n" * 200_000), user("short")]
    assert await asyncio.gather(*(counter.count(b, "p", "gpt-5") for b in bodies)) == [200_007, 8]
    assert words.texts.index("short") == 1 and len(words.texts) == 17


class Watched(TokenCounter):
    """Remembers in which round of the event loop it took a request apart."""

    round = 0

    def take_apart(self, looked: Any) -> Any:
        self.rounds.append(self.round)
        return super().take_apart(looked)

    async def count_rounds(self) -> None:
        self.rounds: list[int] = []
        while True:
            await asyncio.sleep(0)
            self.round += 1


@pytest.mark.parametrize("encoding", [Words(), None], ids=["counted", "estimated"])
async def test_the_loop_comes_round_between_two_long_requests(encoding: Encoding | None) -> None:
    """50 requests of 60 KB at once; the bench measures the stall."""
    counter = Watched(lambda name: encoding)
    rounds = asyncio.create_task(counter.count_rounds())
    bodies = [user(f"{n} some words to count\n" * 2700) for n in range(50)]
    await asyncio.gather(*(counter.count(body, "p", "gpt-5") for body in bodies))
    rounds.cancel()
    assert len(counter.rounds) == len(set(counter.rounds)) == 50


def test_a_part_that_stands_twice_is_encoded_once() -> None:
    words = Words()
    again = {"messages": [{"role": "user", "content": [{"type": "text", "text": "two words"}] * 3}] * 2}
    assert TokenCounter(lambda name: words).count_now(again, "p", "gpt-5") == 3 + 2 * (4 + 3 * 2)
    assert words.texts == ["two words"]


def test_what_is_forgotten_during_a_count_is_counted() -> None:
    counter, words = counting_words()
    counter.count_now(user("an old text"), "p", "gpt-5")
    words.before = counter.cache.clear  # as if other requests had driven it out
    both = user([{"type": "text", "text": text} for text in ("an old text", "a new one")])
    assert counter.count_now(both, "p", "gpt-5") == 7 + 6


# Who cannot wait.


class Stuck(Words):
    """An encoding that does not answer until it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.go = threading.Event()
        self.before = lambda: self.go.wait(20)


@pytest.fixture
def stuck() -> Iterator[Stuck]:
    encoding = Stuck()
    yield encoding
    encoding.go.set()


async def test_nobody_waits_long_for_a_count(stuck: Stuck) -> None:
    counter = TokenCounter(lambda name: stuck, 0.01)
    assert counter.limit == LIMIT
    counter.limit = 0.01
    text = "a text of 37 characters, and no more."
    assert [
        await counter.count(user(text), "p", "gpt-5"),
        counter.count_now(user(text), "p", "gpt-5"),
        counter.count_text(text, "gpt-5") + 7,
    ] == [17] * 3
    assert not knows(counter, text, stuck) and not counter.recent


def knows(counter: TokenCounter, text: str, encoding: Encoding) -> bool:
    """Whether a text, or a message of it, passes for one that this encoding has counted."""
    looked = counter.look_up(items_of(user(text)), framing_of("gpt-5"), encoding)
    return not looked.new or not counter.take_apart(looked)


class Gone(Words):
    """An encoding whose process has been killed."""

    def lengths(self, texts: list[str]) -> list[int]:
        raise ConnectionError


async def test_an_estimate_where_the_counting_process_is_gone() -> None:
    gone = Gone()
    counter, asked = TokenCounter(lambda name: gone), (user("x" * 37), "p", "gpt-5")
    assert await counter.count(*asked) == counter.count_now(*asked)
    assert counter.count_text("x" * 37, "gpt-5") == 10 and not knows(counter, "x" * 37, gone)


def test_an_estimate_of_an_answer_is_the_same_whatever_could_not_count_it() -> None:
    gone, text = Gone(), "x" * 3700
    gone.name = "claude"
    without = TokenCounter(lambda name: None).count_text(text, "claude-sonnet-4-5")
    assert TokenCounter(lambda name: gone).count_text(text, "claude-sonnet-4-5") == without == 1180


# The process that counts for a server.


@pytest.fixture
def apart() -> Iterator[Vocabulary]:
    made = Vocabulary(remote_encoding)
    yield made
    made.close()


def child_of(found: Vocabulary) -> RemoteEncoding:
    encoding = found.load("cl100k_base")
    assert isinstance(encoding, RemoteEncoding)
    return encoding


async def test_a_process_counts_the_same(apart: Vocabulary) -> None:
    child_of(apart)
    counter = TokenCounter(apart.load)
    bodies = list(BAD.values())
    counts = await asyncio.gather(*(counter.count(body, "p", "gpt-4") for body in bodies))
    assert counts == [count(body, "gpt-4") for body in bodies]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_process_outlives_a_signal_that_its_server_hears_as_well(number: int, apart: Vocabulary) -> None:
    child = child_of(apart)
    child.child.send_signal(number)
    assert child.lengths(["Say hello."]) == [3]
    assert child.lengths(["Say hello."]) == [3]


async def test_a_killed_process_is_started_again(apart: Vocabulary) -> None:
    counter, text = TokenCounter(apart.load), "antidisestablishmentarianism " * 20
    child = child_of(apart)
    child.child.kill()
    estimate = TokenCounter(lambda _: None).count_now(user(text), "p", "gpt-4")
    assert await counter.count(user(text), "p", "gpt-4") == estimate
    apart.forget_missing()
    assert await counter.count(user(text), "p", "gpt-4") == count(user(text), "gpt-4")
    assert child.is_gone and child_of(apart) is not child


def test_a_process_that_does_not_come_up_is_tried_again(folder: Path) -> None:
    found = Vocabulary(RemoteEncoding)
    assert found.load("cl100k_base") is None and found.missing() == []
    shutil.copy(CL100K_FILE, folder)
    assert child_of(found).lengths(["Say hello."]) == [3]
    found.close()


def test_no_process_where_there_is_no_file(folder: Path, apart: Vocabulary) -> None:
    assert apart.load("cl100k_base") is None and apart.missing() == ["cl100k_base"]


PARENT = """
import sys
sys.path.insert(0, sys.argv[1])
import ccmux
made = ccmux.remote_encoding("cl100k_base")
print(made.child.pid, flush=True)
sys.stdin.read()
"""


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks into /proc")
def test_a_process_ends_with_a_parent_that_was_killed() -> None:
    command = [sys.executable, "-c", PARENT, str(ROOT)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        child = Path("/proc") / parent.stdout.readline().decode().strip() / "stat"
        assert child.exists()
        parent.kill()
    attacks.until(lambda: not child.exists() or child.read_text().split()[2] == "Z", "it has ended", 30)


async def counted(proxy: Proxy, body: Json) -> int:
    """What a server says of a request."""
    return int((await ask(proxy, "/v1/messages/count_tokens", body=body)).json["input_tokens"])


def children_of(pid: int) -> list[Path]:
    """The /proc folders of a process's children."""
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    return [Path("/proc") / child for task in tasks for child in task.read_text().split()]


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks into /proc")
async def test_a_server_counts_in_a_process_of_its_own(start_ccmux: Any) -> None:
    body = {"model": "gpt-4", **user("antidisestablishmentarianism " * 20)}
    exact = count(body, "gpt-4")
    async with start_ccmux(provider_row()) as running:
        pid = running.process.pid
        assert children_of(pid) == []  # and so no encoding anywhere: nothing has been counted
        counts = [0]
        async with asyncio.timeout(60):
            while counts[-1] != exact:
                counts.append(await counted(running, body))
        child = children_of(pid)
        assert set(counts[1:]) == {TokenCounter(lambda _: None).count_now(body, "p", "gpt-4"), exact}
        assert len(child) == 1 and child[0].exists()
    assert not child[0].exists()


def test_a_panic_of_the_encoder_is_an_estimate() -> None:
    encoding = VOCABULARY.load("o200k_base")
    assert encoding is not None
    assert encoding.lengths([" " * 1_000_000, "Say hello."]) == [270_271, PROMPT]


# While there is no vocabulary.


def test_estimates_are_near_and_kept_apart() -> None:
    have: dict[str, Encoding | None] = {}
    counter = TokenCounter(have.get)
    text = (ROOT / "ccmux.py").read_text("utf-8")[:50_000]
    estimated = counter.count_now(user(text), "p", "gpt-5")
    assert counter.count_now(user(text), "p", "gpt-5") == estimated
    assert knows(counter, text, ESTIMATE)  # a second estimate is not made
    have["o200k_base"] = VOCABULARY.load("o200k_base")
    assert counter.count_now(user(text), "p", "gpt-5") == 7 + sum(map(length, slices(text)))
    assert estimated == pytest.approx(length(text), rel=0.25)


def test_text_of_an_answer() -> None:
    counter = TokenCounter(VOCABULARY.load)
    assert counter.count_text("Say hello.", "gpt-5") == PROMPT
    many = "Say hello. " * 100
    assert counter.count_text(many, "claude-opus-4-7") == pytest.approx(length(many) * 1.45, abs=1)
    assert counter.count_text("", "gpt-5") == 0


# Calibration.


def test_counts_follow_true_usage() -> None:
    counter = TokenCounter(lambda name: Words())
    text = user("a b c d e f g h i j " * 10)
    for _ in range(20):
        counted = counter.count_now(text, "p", "gpt-5")
        counter.observe("p", "gpt-5", counted, 150)
    assert counter.count_now(text, "p", "gpt-5") in (150, 151)
    assert counter.factors["p", "gpt-5"] == (pytest.approx(150 / 107), 20)
    assert counter.count_now(text, "other", "gpt-5") == 107


def test_answers_in_any_order_teach_the_same() -> None:
    counter = TokenCounter(lambda name: Words())
    counts = [counter.count_now(user("word " * n), "p", "gpt-5") for n in range(100, 130)]
    for counted in counts:
        counter.observe("p", "gpt-5", counted, counted * 2)
    assert counter.factors["p", "gpt-5"] == (pytest.approx(2.0), 30)


def test_average_is_over_the_last_50() -> None:
    counter = TokenCounter(lambda name: Words())
    counter.restore([("p", "gpt-5", 1.0, 50)])
    counted = counter.count_now(user("word " * 93), "p", "gpt-5")
    counter.observe("p", "gpt-5", counted, 200)
    assert counter.factors["p", "gpt-5"] == (pytest.approx(1.02), 50)


@pytest.mark.parametrize(("true", "factor"), [(10**7, 2.5), (1, 0.5)], ids=["far-above", "far-below"])
def test_factor_is_clamped(true: int, factor: float) -> None:
    counter = TokenCounter(lambda name: Words())
    counter.observe("p", "gpt-5", counter.count_now(user("word " * 93), "p", "gpt-5"), true)
    assert counter.factors["p", "gpt-5"] == (factor, 1)


def test_nothing_is_learnt_from() -> None:
    counter = TokenCounter(lambda name: None)
    counter.observe("p", "gpt-5", counter.count_now(user("an estimate"), "p", "gpt-5"), 50)
    counter.load = lambda name: Words()
    counted = counter.count_now(user("a count"), "p", "gpt-5")
    counter.observe("p", "gpt-5", counted, 0)
    counter.observe("elsewhere", "gpt-5", counted, 50)  # the target that answered is not the one counted for
    counter.observe("p", "gpt-5", 12345, 50)
    counter.load = lambda name: None
    assert counter.count_now(user("estimated"), "p", "gpt-5") == counted + 1
    counter.load = lambda name: Words()
    assert counter.count_now(user("a count now"), "p", "gpt-5") == counted + 1
    counter.load = lambda name: None
    assert counter.count_now(user("estimated"), "p", "gpt-5") == counted + 1
    counter.observe("p", "gpt-5", counted + 1, 50)
    assert counter.factors == {}


def test_factors_of_the_last_thousand_models_are_kept() -> None:
    counter = TokenCounter(lambda name: Words())
    for model in ["first", *map(str, range(999)), "first", "one more"]:
        counter.observe("p", model, counter.count_now(user("word"), "p", model), 10)
    assert len(counter.factors) == 1000
    assert ("p", "first") in counter.factors and ("p", "0") not in counter.factors


def test_factors_survive_a_restart() -> None:
    counter, again = TokenCounter(lambda name: Words()), TokenCounter(lambda name: Words())
    counter.observe("p", "gpt-5", counter.count_now(user("word " * 93), "p", "gpt-5"), 150)
    again.restore(json.loads(json.dumps(counter.export())))
    assert again.count_now(user("word " * 93), "p", "gpt-5") == 150


# The upstream's own count.


def test_body_for_an_upstream_count() -> None:
    kept = {
        "model": "m",
        "messages": [],
        "system": "s",
        "thinking": {"type": "adaptive"},
        "tool_choice": {"type": "auto"},
    }
    server_tool = {"type": "web_search_20250305", "name": "web_search"}
    dropped = {
        "max_tokens": 5, "stream": True, "metadata": {}, "context_management": {}, "safeguards": {},
        "temperature": 1, "output_config": {}, "stop_sequences": [],
    }  # fmt: skip
    body = {**kept, **dropped, "tools": [server_tool, TOOLS[1]]}
    assert count_request_body(body) == {**kept, "tools": [TOOLS[1]]}
    assert count_request_body({"messages": []}) == {"messages": []}


@pytest.mark.parametrize("others", [[], [TOOLS[1]]], ids=["alone", "among others"])
def test_the_choice_of_a_server_tool_is_not_sent_to_be_counted(others: list[Json]) -> None:
    search = {"type": "web_search_20250305", "name": "web_search"}
    forced = {"type": "tool", "name": "web_search"}
    body = {"messages": [], "tools": [search, *others], "tool_choice": forced}
    assert count_request_body(body) == {"messages": [], "tools": others}
    body = {"messages": [], "tools": [search, *others], "tool_choice": {"type": "any"}}
    assert ("tool_choice" in count_request_body(body)) is bool(others)


def counts_at(url: str, **keys: Any) -> str:
    return provider_row("a", "anthropic", base_url=url, api_key="k", **keys)


UPSTREAM_COUNTS = {  # what the quirk says; the answer -> whose count, and how often it was asked in two counts
    "auto": ("auto", 200, b'{"input_tokens": 4321}', 4321, 2),
    "auto-400": ("auto", 400, b'{"input_tokens": 4321}', None, 1),
    "auto-404": ("auto", 404, b"<html>not found</html>", None, 1),
    "auto-405": ("auto", 405, b"", None, 1),
    "auto-501": ("auto", 501, b"", None, 1),
    "auto-429-passes": ("auto", 429, b"{}", None, 2),
    "auto-500-passes": ("auto", 500, b"{}", None, 2),
    "auto-no-number": ("auto", 200, b'{"input_tokens": "many"}', None, 2),
    "auto-nothing": ("auto", 200, b'{"input_tokens": 0}', None, 2),
    "auto-no-json": ("auto", 200, b"<html>", None, 2),
    "auto-deep-json": ("auto", 200, b"[" * 100_000, None, 2),
    "upstream": ("upstream", 200, b'{"input_tokens": 4321}', 4321, 2),
    "upstream-404-is-asked-again": ("upstream", 404, b"", None, 2),
    "local": ("local", 200, b'{"input_tokens": 4321}', None, 0),
}


@pytest.mark.parametrize(
    ("quirk", "status", "answer", "upstreams", "times"), UPSTREAM_COUNTS.values(), ids=UPSTREAM_COUNTS
)
async def test_who_counts(
    quirk: str, status: int, answer: bytes, upstreams: int | None, times: int, tmp_path: Path
) -> None:
    asked: list[Json] = []

    async def upstream(request: web.Request) -> web.Response:
        asked.append(await request.json())
        return web.Response(status=status, body=answer)

    async with (
        serving(web.post("/v1/messages/count_tokens", upstream)) as url,
        in_process(tmp_path, counts_at(url, models=["gpt-5"], quirks={"count_tokens": quirk})) as proxy,
    ):
        proxy.state.vocabulary.load("o200k_base")
        for _ in range(2):
            body = {"model": "gpt-5", "metadata": {}, **user("Say hello.")}
            assert await counted(proxy, body) == (upstreams or 7 + PROMPT)
        relay = proxy.state.relay
        assert not relay.breakers and not relay.cooling  # a failed count says nothing of the provider
        books = proxy.books
        assert books.ledger() == books.holds() == books.requests() == []  # and a count is free
    assert asked == [{"model": "gpt-5", **user("Say hello.")}] * times


async def test_nobody_waits_long_for_an_upstreams_count(tmp_path: Path) -> None:
    """And only now and then for one that hangs."""
    ended = asyncio.Event()
    asked: list[str] = []

    async def upstream(request: web.Request) -> web.Response:
        asked.append(request.path)
        await ended.wait()
        return web.Response()

    async with serving(web.post("/v1/messages/count_tokens", upstream)) as url:
        async with in_process(tmp_path, counts_at(url, models=["gpt-5"])) as proxy, asyncio.timeout(30):
            proxy.state.vocabulary.load("o200k_base")
            for _ in range(2):
                assert await counted(proxy, {"model": "gpt-5", **user("Say hello.")}) == 7 + PROMPT
            [end] = proxy.state.refused_counts.values()
            assert 200 < end - time.monotonic() <= 300
        ended.set()
    assert len(asked) == 1


async def test_a_refusal_holds_for_its_address(tmp_path: Path) -> None:
    async def upstream(request: web.Request) -> web.Response:
        return web.json_response({"input_tokens": 4321})

    async with serving(web.post("/new/v1/messages/count_tokens", upstream)) as url:
        old, new = (counts_at(f"{url}/{path}", models=["m"]) for path in ("old", "new"))
        async with in_process(tmp_path, old) as proxy:
            counts = []
            for text in (old, new, old, new):
                proxy.state.config = load_config(text, {})
                counts.append(await counted(proxy, {"model": "m", **user("Say hello.")}) == 4321)
            assert counts == [False, True, False, True]
            [end] = proxy.state.refused_counts.values()
            assert 86_300 < end - time.monotonic() <= 86_400


async def test_a_refusal_holds_for_its_model(tmp_path: Path) -> None:
    """A mistyped one is a 404 as well, and says nothing of the others."""

    async def upstream(request: web.Request) -> web.Response:
        known = (await request.json())["model"] == "m"
        return web.Response(status=200 if known else 404, body=b'{"input_tokens": 4321}')

    async with (
        serving(web.post("/v1/messages/count_tokens", upstream)) as url,
        in_process(tmp_path, counts_at(url)) as proxy,
    ):
        models = ("a/m", "a/mistyped", "a/m")
        counts = [await counted(proxy, {"model": model, **user("Say hello.")}) for model in models]
    assert [count == 4321 for count in counts] == [True, False, True]


# Vocabulary files.


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only folder where vocabularies are looked for, empty."""
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("DATA_GYM_CACHE_DIR", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "cache").mkdir()
    return tmp_path / "cache"


def test_missing_vocabulary_is_found_once_it_is_there(folder: Path) -> None:
    found = Vocabulary()
    assert found.load("cl100k_base") is None and found.missing() == ["cl100k_base"]
    shutil.copy(CL100K_FILE, folder)
    assert found.load("cl100k_base") is None
    found.forget_missing()
    assert found.load("cl100k_base") is not None and found.missing() == []


def test_damaged_vocabulary_is_passed_over(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = VOCABULARIES["cl100k_base"][0]
    (folder / name).write_bytes(CL100K_FILE.read_bytes()[:-1])
    assert find_vocabulary("cl100k_base") is None
    monkeypatch.setenv("DATA_GYM_CACHE_DIR", str(CL100K_FILE.parent))
    assert find_vocabulary("cl100k_base") == CL100K_FILE
    assert vocabulary_state()["cl100k_base"] == str(CL100K_FILE)


def test_claude_needs_openais_vocabulary_where_there_is_no_other(folder: Path) -> None:
    found = Vocabulary()
    assert found.load("claude-4.5") is None and found.missing() == ["o200k_base"]


async def test_first_count_loads_in_a_thread() -> None:
    found = Vocabulary()
    counter = TokenCounter(found.get)
    assert found.loaded == {}
    assert counter.count_now(user("Say hello."), "p", "gpt-4") == 7 + 3  # an estimate: ten bytes
    await until(lambda: "cl100k_base" in found.loaded, "it is loaded")
    loud = "Say hello!!!!"
    assert counter.count_now(user(loud), "p", "gpt-4") == 7 + length(loud, "cl100k_base")


async def test_names_of_one_source_share_what_is_loaded() -> None:
    found = Vocabulary()
    names = ("claude-4.5", "o200k_base", "claude-5.0")
    assert found.get(names[0]) is None  # its thread has only just set out
    for name in names[1:]:
        found.get(name)
    await until(lambda: len(found.loaded) == 3, "all are loaded")
    assert len({id(found.get(name)) for name in names}) == 1 and found.get("o200k_base") is not None


NO_NETWORK = """
import sys
def hook(event, arguments):
    if event.startswith("socket."):
        print("opened a socket:", event, arguments)
sys.addaudithook(hook)
sys.path.insert(0, sys.argv[1])
import ccmux
for name in ("cl100k_base", "gpt-4"):
    counter = ccmux.TokenCounter(ccmux.Vocabulary().load)
    print(counter.count_now({"messages": [{"role": "user", "content": "hello"}]}, "p", "gpt-4"))
"""


@pytest.mark.parametrize("present", [True, False], ids=["with-the-file", "without"])
def test_counting_opens_no_socket(folder: Path, present: bool) -> None:
    if present:
        shutil.copy(CL100K_FILE, folder)
    command = [sys.executable, "-c", NO_NETWORK, str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split() == (["8", "8"] if present else ["9", "9"])


def test_claudes_own_vocabulary() -> None:
    letters = [base64.b64encode(bytes([byte])).decode() for byte in range(256)]
    words = [base64.b64encode(word.encode()).decode() for word in ("he", "ll", "hell", "hello")]
    data = {
        "pat_str": r"\S+|\s+", "special_tokens": {"<EOT>": 0}, "explicit_n_vocab": 9,
        "bpe_ranks": "! 5 " + " ".join([*letters, *words]),
    }  # fmt: skip
    encoding = claude_encoding(data)
    assert encoding.lengths(["hello", "ｈｅllo", "hello!"]) == [1, 1, 2]  # NFKC
    counter = TokenCounter(lambda name: encoding)
    assert counter.count_now(user("hello " * 100), "p", "claude-sonnet-4-5") == 7 + 226
    assert counter.count_now(user("hello " * 100), "p", "claude-opus-4-7") == 12 + 278


def test_ctok_is_used_where_it_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = "def token_count(text, version):\n    return len(text) + {'4.5': 7, '4.7': 12}[version]\n"
    (tmp_path / "ctok.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    assert source_of("claude-4.5") == "ctok-4.5" and source_of("gpt") == "gpt"
    found = Vocabulary()
    assert TokenCounter(found.load).count_now(user("hello"), "p", "claude-sonnet-4-5") == 12
    assert TokenCounter(found.load).count_now(user("hello"), "p", "claude-opus-4-7") == 17
    assert vocabulary_state()["ctok"] == str(tmp_path / "ctok.py")
    del sys.modules["ctok"]  # which monkeypatch would put back


async def test_a_download_that_fails_is_tried_again_in_an_hour(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    asked: list[str] = []

    async def answer(request: web.Request) -> web.Response:
        asked.append(request.path)
        return web.Response(status=404)

    found = Vocabulary()
    assert found.load("cl100k_base") is None
    async with serving(web.get("/{name}", answer)) as url, aiohttp.ClientSession() as session:
        state: Any = SimpleNamespace(vocabulary=found, relay=SimpleNamespace(session=session))
        task = asyncio.create_task(fetch_vocabularies(state, url))
        await until(lambda: asked, "it is asked for")
        await asyncio.sleep(1.5)  # it looks every second for what is missing
        task.cancel()
    assert asked == ["/cl100k_base.tiktoken"]
    assert caplog.text.count("no tiktoken vocabulary cl100k_base here yet") == 1


DOWNLOADS = {
    "the-file": (200, None, True), "another-file": (200, b"wrong", False), "not-there": (404, b"", False),
    "elsewhere": (302, b"", False),
}  # fmt: skip


@pytest.mark.parametrize(("status", "data", "good"), DOWNLOADS.values(), ids=DOWNLOADS)
async def test_download(folder: Path, status: int, data: bytes | None, good: bool) -> None:
    async def answer(request: web.Request) -> web.Response:
        body = CL100K_FILE.read_bytes() if data is None else data
        return web.Response(status=status, body=body, headers={"Location": "/elsewhere"})

    path = "/encodings/cl100k_base.tiktoken"
    async with serving(web.get(path, answer)) as url, aiohttp.ClientSession() as session:
        assert await fetch_vocabulary(session, url + path, "cl100k_base") is good
    kept = folder.parent / ".ccmux" / "tiktoken"
    assert (find_vocabulary("cl100k_base") == kept / VOCABULARIES["cl100k_base"][0]) is good
    assert list(kept.glob("*.part")) == []
