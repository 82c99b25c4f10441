"""What the tests of the translated formats share: streams in pieces, the event grammar, any conversation."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import anthropic.types
import hypothesis.strategies as st
import pytest
from pydantic import TypeAdapter

from ccmux import (
    AnthropicStream,
    ApiError,
    Facts,
    Json,
    Quirks,
    Retry,
    SseDecoder,
    Upstream,
    Usage,
    collect,
    event_of,
    sign,
)

FIXTURES = Path(__file__).parent / "fixtures"
EVENT: TypeAdapter[Any] = TypeAdapter(anthropic.types.RawMessageStreamEvent)


def drain(value: Any) -> None:
    """Reads all there is in a validated value: pydantic validates iterables only when they are read."""
    if isinstance(value, Mapping):
        for inner in value.values():
            drain(inner)
    elif isinstance(value, Iterable) and not isinstance(value, str):
        for inner in value:
            drain(inner)


def upstream(model: str, session: str = "", skip: frozenset[str] = frozenset(), **quirks: Any) -> Upstream:
    return Upstream(model, Quirks(**quirks), Facts(), session, skip)


def read(stream: Any, data: bytes, cut: int | None = None) -> tuple[list[Json], ApiError | None]:
    """The events a stream makes of upstream bytes, whole or in two pieces, and the error it ends with."""
    decoder = SseDecoder()
    pieces = [data] if cut is None else [data[:cut], data[cut:]]
    try:
        for blocks in (*map(decoder.feed, pieces), decoder.finish()):
            for block in blocks:
                name, text = event_of(block)
                if text:
                    stream.feed(name, text)
        stream.finish()
    except ApiError as error:
        return stream.out.take(), error
    return stream.out.take(), None


def decoded(data: bytes, cut: int) -> list[tuple[str, str]]:
    """The events that two pieces of a stream hold."""
    decoder = SseDecoder()
    pieces = (*map(decoder.feed, (data[:cut], data[cut:])), decoder.finish())
    return [event_of(block) for blocks in pieces for block in blocks]


def check_cuts(make: Callable[[], Any], data: bytes) -> None:
    """A stream cut at any byte is the same stream: all cuts decode alike, each eighth is read through."""
    whole, told = golden(*read(make(), data)), decoded(data, 0)
    for cut in range(len(data)):
        assert decoded(data, cut) == told
        if cut % 8 == 0:
            assert golden(*read(make(), data, cut)) == whole


def stream_of(make: Any, to: Upstream, names: dict[str, str] | None = None) -> Any:
    return make(
        AnthropicStream("msg_1", "claude-sonnet-5-5", Usage(input=7, estimated=True)), names or {}, to
    )


def golden(events: list[Json], error: ApiError | None) -> Json:
    """A reading as the fixtures' .json files have it."""
    told = error and {
        "status": error.status,
        "message": error.message,
        "retry": error.retry.value,
        "cause": error.cause,
    }
    return {"events": events, "error": told}


def sse(*events: Any) -> bytes:
    """A stream of these events, each one's data a JSON text or what becomes one."""
    texts = (e if isinstance(e, str) else json.dumps(e) for e in events)
    return b"".join(b"data: %s\n\n" % text.encode() for text in texts)


def check_failure(stream: Any, data: bytes, status: int, retry: Retry, cause: str) -> None:
    _, error = read(stream, data)
    assert error is not None
    assert (error.status, error.retry, error.cause) == (status, retry, cause)


def signatures_of(events: list[Json]) -> list[Json]:
    """The thinking blocks as which a client sends a stream's signatures back."""
    deltas = [e["delta"] for e in events if e["type"] == "content_block_delta"]
    return [{"type": "thinking", "signature": d["signature"]} for d in deltas if "signature" in d]


def check_golden(path: Path, found: Json) -> None:
    assert found == json.loads(path.read_text())


DELTAS = {"text": {"text_delta", "citations_delta"}, "thinking": {"thinking_delta", "signature_delta"}}


def check_grammar(events: list[Json], ended: bool) -> None:
    """Every event is one that the anthropic package knows, and they come in the one order there is: message_start;
    blocks in a row, each a start, deltas of its kind, a stop; message_delta; message_stop.
    """
    open_kind, index = "", -1
    for number, event in enumerate(events):
        EVENT.validate_python(event, strict=True)
        kind = event["type"]
        assert (kind == "message_start") == (number == 0)
        if kind == "content_block_start":
            assert not open_kind, "blocks interleave"
            open_kind, index = event["content_block"]["type"], index + 1
        elif kind == "content_block_delta":
            assert event["delta"]["type"] in DELTAS.get(open_kind, {"input_json_delta"})
        else:
            assert bool(open_kind) == (kind == "content_block_stop"), "a block never ends, or none has begun"
            open_kind = ""
        assert event.get("index", index) == index
    kinds = [e["type"] for e in events]
    assert kinds[-2:] == ["message_delta", "message_stop"] if ended else "message_stop" not in kinds
    assert kinds.count("message_delta") == kinds.count("message_stop") == int(ended)
    if ended:
        message = anthropic.types.Message.model_validate(collect(events))
        calls = any(b.type == "tool_use" for b in message.content)
        assert (message.stop_reason == "tool_use") == calls or message.stop_reason in (
            "max_tokens",
            "refusal",
        )


def expect_400(call: Any, words: str) -> None:
    with pytest.raises(ApiError, match=words) as caught:
        call()
    assert caught.value.status == 400


def text(words: str, **more: Any) -> Json:
    return {"type": "text", "text": words, **more}


def turn(role: str, blocks: Iterable[Json | str]) -> Json:
    return {"role": role, "content": [text(b) if isinstance(b, str) else b for b in blocks]}


def assistant(*blocks: Json | str) -> Json:
    return turn("assistant", blocks)


def user(*blocks: Json | str) -> Json:
    return turn("user", blocks)


def base64_source(media_type: str, data: str) -> Json:
    return {"type": "base64", "media_type": media_type, "data": data}


def tool_use(id: str, name: str = "Bash", **input: Any) -> Json:
    return {"type": "tool_use", "id": id, "name": name, "input": input}


def tool_result(id: str, content: Any = "done", **more: Any) -> Json:
    return {"type": "tool_result", "tool_use_id": id, "content": content, **more}


def thinking(text: str = "", payload: Json | None = None) -> Json:
    return {"type": "thinking", "thinking": text, "signature": sign(payload)}


PNG = {"type": "image", "source": base64_source("image/png", "iVBORw0KGgo=")}
PDF = {"type": "document", "title": "a.pdf", "source": base64_source("application/pdf", "JVBERi0=")}
COMMAND = {"type": "object", "properties": {"command": {"type": "string"}}}
BASH = {"name": "Bash", "description": "Runs", "input_schema": COMMAND}
SEARCH = {
    "type": "web_search_20250305", "name": "web_search", "allowed_domains": ["a.org"],
    "user_location": {"city": "Oslo"},
}  # fmt: skip


# Conversations of any shape.

IDS = st.sampled_from(["a", "b", "toolu_1", "ccx_Zm9v", "x" * 80, "ü", "", None, 3])
TEXTS = st.one_of(st.text(max_size=8), st.sampled_from(["", "\ud800", "x-anthropic-billing-header: 1"]))
SCALARS = st.one_of(st.none(), st.booleans(), st.integers(-5, 5), TEXTS)
PLAIN = st.dictionaries(
    st.sampled_from(["type", "text", "source", "content", "id", "title", "url"]), SCALARS, max_size=4
)


def maybe(**fields: Any) -> st.SearchStrategy[Json]:
    """A dictionary that has any of these keys."""
    return st.fixed_dictionaries({}, optional=fields)


def block(kind: str, **fields: Any) -> st.SearchStrategy[Json]:
    """The same, of a type."""
    return st.fixed_dictionaries({"type": st.just(kind)}, optional=fields)


SOURCES = st.one_of(
    SCALARS,
    PLAIN,
    block("base64", media_type=SCALARS, data=st.sampled_from(["", "aGk=", None])),
    block("url", url=st.sampled_from(["", "https://a.org/b.png", None])),
    st.fixed_dictionaries({"type": st.just("text"), "data": SCALARS}),
)
PAYLOADS = st.one_of(
    st.none(),
    st.fixed_dictionaries(
        {"dialect": st.sampled_from(["gemini", "responses", "x"]), "model": st.sampled_from(["m", "other"])},
        optional={
            "call": IDS,
            "signature": st.sampled_from(["c2ln", "", None]),
            "phase": st.sampled_from(["commentary", None, "?"]),
            "item": st.just({"type": "reasoning", "encrypted_content": "e", "summary": []}),
        },
    ),
)
SMALL = st.one_of(
    block("text", text=SCALARS),
    block("image", source=SOURCES),
    block("document", source=SOURCES, title=SCALARS),
    block("search_result", title=SCALARS, content=SCALARS),
    block("tool_reference", tool_name=SCALARS),
    PLAIN,
)
RESULTS = st.one_of(SCALARS, st.lists(SMALL, max_size=3))
NAMES = st.one_of(SCALARS, st.just("mcp__a b__" + "n" * 70))
BLOCKS = st.one_of(
    SMALL,
    block("tool_use", id=IDS, name=NAMES, input=st.one_of(SCALARS, PLAIN)),
    block("tool_result", tool_use_id=IDS, content=RESULTS, is_error=SCALARS),
    block("server_tool_use", id=IDS, name=SCALARS, input=PLAIN),
    block("web_search_tool_result", content=st.lists(PLAIN, max_size=2)),
    PAYLOADS.map(lambda p: thinking("so", p)),
    block("thinking", thinking=SCALARS, signature=SCALARS),
    block("redacted_thinking", data=SCALARS),
)
CONTENT = st.one_of(SCALARS, st.lists(st.one_of(BLOCKS, SCALARS), max_size=5))
ROLES = st.sampled_from(["user", "assistant", "system", None])
MESSAGES = st.lists(st.one_of(SCALARS, maybe(role=ROLES, content=CONTENT)), max_size=6)
TOOLS = st.lists(st.sampled_from([BASH, SEARCH, {"name": "x y"}, {"name": None}, {}]), max_size=3)
CHOICES = st.fixed_dictionaries(
    {"type": st.sampled_from(["auto", "any", "tool", "none", None]), "name": SCALARS}
)
THINKING = st.fixed_dictionaries(
    {"type": st.sampled_from(["enabled", "disabled", "adaptive", None])}, optional={"budget_tokens": SCALARS}
)
FORMATS = st.one_of(SCALARS, st.just({"type": "json_schema", "schema": {"type": "object"}}))
OUTPUT = maybe(effort=st.sampled_from(["low", "max", "?", None]), format=FORMATS)
BODIES = st.fixed_dictionaries(
    {"model": st.just("claude-sonnet-5-5"), "messages": st.one_of(MESSAGES, MESSAGES, MESSAGES, SCALARS)},
    optional={
        "system": CONTENT,
        "max_tokens": st.one_of(SCALARS, st.just(32000)),
        "temperature": SCALARS,
        "top_k": SCALARS,
        "tools": st.one_of(SCALARS, TOOLS),
        "tool_choice": st.one_of(SCALARS, CHOICES),
        "stop_sequences": st.one_of(SCALARS, st.lists(SCALARS, max_size=6)),
        "thinking": st.one_of(SCALARS, THINKING),
        "output_config": st.one_of(SCALARS, OUTPUT),
        "metadata": SCALARS,
        "safeguards": SCALARS,
    },
)
