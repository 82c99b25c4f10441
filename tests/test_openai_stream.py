"""Translate: OpenAI Chat, the stream side: a row for each row of the table, every stream cut anywhere."""

from __future__ import annotations

import itertools
import json
from typing import Any

import hypothesis.strategies as st
import pytest
import translation
from hypothesis import given, settings
from translation import check_cuts, check_grammar, maybe, read, sse, stream_of, tool_result, upstream, user

from ccmux import (
    ApiError,
    ChunkPattern,
    EventWriter,
    Json,
    OpenAIStream,
    Retry,
    Translation,
    Usage,
    WholeAnswer,
    collect,
    openai_request,
    openai_usage,
    signed_payload,
    upstream_tool_id,
    without_cut_off,
)

TO = upstream("gpt-x")
NAMES = {"short_1a2b3c4d": "mcp__a long name"}


def chunk(delta: Json | None = None, finish: str | None = None, **more: Any) -> Json:
    return {"id": "c", "choices": [{"index": 0, "delta": delta or {}, "finish_reason": finish}], **more}


def text(content: str) -> Json:
    return chunk({"content": content})


def call(index: Any, id: str | None = None, name: str | None = None, arguments: Any = None) -> Json:
    function = {k: v for k, v in (("name", name), ("arguments", arguments)) if v is not None}
    piece = {k: v for k, v in (("index", index), ("id", id)) if v is not None}
    return {**piece, "function": function}


def calls(*pieces: Json) -> Json:
    return chunk({"tool_calls": list(pieces)})


def end(reason: str = "stop") -> tuple[Any, ...]:
    return (chunk({}, reason), "[DONE]")


def counts(prompt: Any, completion: int, **more: Any) -> Json:
    return {"prompt_tokens": prompt, "completion_tokens": completion, **more}


USAGE = counts(100, 7, prompt_tokens_details={"cached_tokens": 60})


def outcome(*events: Any, **quirks: Any) -> tuple[Any, ApiError | None]:
    """The message that a stream amounts to (content, stop_reason, usage), and the error it ends with."""
    raw = events[0] if len(events) == 1 and isinstance(events[0], bytes) else sse(*events)

    def make() -> OpenAIStream:
        return stream_of(OpenAIStream, upstream("gpt-x", **quirks), NAMES)

    found, error = read(make(), raw)
    check_grammar(found, error is None)
    check_cuts(make, raw)
    return (collect(found) if error is None else found), error


def content_of(*events: Any, **quirks: Any) -> Any:
    message, error = outcome(*events, **quirks)
    assert error is None, error
    return [
        {k: v for k, v in block.items() if k in ("type", "text", "thinking", "name", "input")}
        for block in message["content"]
    ]


def said(words: str) -> Json:
    return {"type": "text", "text": words}


def thought(words: str) -> Json:
    return {"type": "thinking", "thinking": words}


def used(name: str, **input: Any) -> Json:
    return {"type": "tool_use", "name": name, "input": input}


LS = '{"command": "ls"}'
BASH = used("Bash", command="ls")


@pytest.mark.parametrize(
    ("events", "expected"),
    [
        pytest.param([text(""), text("a"), text("b"), *end()], [said("ab")], id="text; empty strings open nothing"),
        pytest.param(
            [chunk({"reasoning_content": "r"}), text("a"), *end()], [thought("r"), said("a")], id="reasoning_content"
        ),
        pytest.param([chunk({"reasoning": "r"}), text("a"), *end()], [thought("r"), said("a")], id="reasoning"),
        pytest.param(
            [chunk({"reasoning_content": "", "reasoning": "r"}), text("a"), *end()],
            [thought("r"), said("a")],
            id="the reasoning field that is not empty wins",
        ),
        pytest.param(
            [chunk({"content": "a", "reasoning": "r", "tool_calls": [call(0, "c", "Bash", LS)]}), *end("tool_calls")],
            [thought("r"), said("a"), BASH],
            id="a chunk mixing kinds",
        ),
        pytest.param(
            [calls(call(0, "c", "Bash", "")), calls(call(0, None, None, '{"comm')), calls(call(0, arguments='and": "ls"}')),
             *end("tool_calls")],
            [BASH],
            id="arguments in pieces",
        ),
        pytest.param([calls(call(0, "c", "Bash", LS)), *end("tool_calls")], [BASH], id="arguments with the name"),
        pytest.param([calls(call(0, "c", "Bash", " ")), *end("tool_calls")], [used("Bash")], id="blank arguments"),
        pytest.param(
            [calls(call(0, "c", "Bash", " ")), text("and"), calls(call(0, arguments=LS)), *end("tool_calls")],
            [BASH, said("and")],
            id="text behind blank arguments",
        ),
        pytest.param(
            [calls(call(0, "c", "Bash", {"command": "ls"})), *end("tool_calls")], [BASH], id="arguments as an object"
        ),
        pytest.param(
            [calls(call(0, "c", "Bash", '{"comm')), calls(call(0, arguments='{"command"')), calls(call(0, arguments=LS)),
             *end("tool_calls")],
            [BASH],
            id="growing snapshots",
        ),
        pytest.param(
            [calls(call(0, "c", "Bash", '{"a":')), calls(call(0, arguments='{"a":')), calls(call(0, arguments="1}}")),
             *end("tool_calls")],
            [used("Bash", a={"a": 1})],
            id="an honest piece that looks like a snapshot",
        ),
        pytest.param(
            [calls(call(0, "c", "Bash", json.dumps(LS)[:9])), calls(call(0, arguments=json.dumps(LS)[9:])), *end()],
            [BASH],
            id="encoded twice",
        ),
        pytest.param(
            [calls(call(0, "c", "Bash", "{}")), calls(call(0, arguments=LS)), *end()], [BASH], id="an empty object first"
        ),
        pytest.param(
            [calls(call(0, "c", "Bash", "{}")), calls(call(0, arguments='{"comm')), calls(call(0, arguments='and": "ls"}')),
             *end()],
            [BASH],
            id="an empty object first, then pieces",
        ),
        pytest.param([calls(call(0, "c", "Bash", "")), *end()], [used("Bash")], id="no arguments are {}"),
        pytest.param(
            [calls(call(0, "c", "Bash", LS)), text("a"), calls(call(0, arguments=" ")), *end("tool_calls")],
            [BASH, said("a")],
            id="a blank piece behind a call that has ended",
        ),
        pytest.param([calls(call(0, "c", "Bash", "null")), *end()], [used("Bash")], id="null arguments are {}"),
        pytest.param(
            [calls(call(0, "c", "Bash", '{"command"')), calls(call(0, "c", "Bash", ': "ls"}')), *end()],
            [BASH],
            id="a repeated name or id is ignored",
        ),
        pytest.param(
            [calls(call(0, None, None, '{"command"')), calls(call(0, "c", "Bash", ': "ls"}')), *end()],
            [BASH],
            id="a call starts when its name is known",
        ),
        pytest.param(
            [calls(call(0, "a", "A", "{}"), call(1, "b", "B", '{"x":')), calls(call(1, arguments="1}")), *end()],
            [used("A"), used("B", x=1)],
            id="parallel calls",
        ),
        pytest.param(
            [calls(call(0, "a", "A", '{"x":')), calls(call(1, "b", "B", '{"y":')), calls(call(0, arguments="1}")),
             calls(call(1, arguments="2}")), *end()],
            [used("A", x=1), used("B", y=2)],
            id="interleaved pieces",
        ),
        pytest.param(
            [calls(call(None, "a", "A", '{"x":')), calls(call(None, None, None, "1}")), *end()],
            [used("A", x=1)],
            id="missing index: the last open",
        ),
        pytest.param(
            [calls(call(None, "a", "A", "{}")), calls(call(None, "b", "B", "{}")), calls(call(None, "a", None, " ")), *end()],
            [used("A"), used("B")],
            id="missing index: by id",
        ),
        pytest.param(
            [calls(call(0, "a", "A", '{"x": 1}')), calls(call(0, "b", "B", '{"y": 2}')), *end()],
            [used("A", x=1), used("B", y=2)],
            id="every call numbered 0",
        ),
        pytest.param(
            [calls(call(0, "a", "A", '{"x": 1}')), calls(call(0, "b", "B", '{"y": 2}')), calls(call(0, "c", "C", "{}")),
             *end()],
            [used("A", x=1), used("B", y=2), used("C")],
            id="every call numbered 0: three keep their order",
        ),
        *(
            pytest.param(
                [calls(call(index, id, "A", '{"x": 1}'), call(index, id, "A", '{"x": 2}')),
                 calls(call(index, id, "B", {"y": 3})), calls(call(index, id, "B", {"y": 3})), *end()],
                [used("A", x=1), used("A", x=2), used("B", y=3)],
                id=f"whole calls without ids, index {index}, id {id!r}",
            )
            for index, id in ((0, None), (None, ""), (None, None))
        ),
        pytest.param(
            [chunk({"function_call": {"name": "Bash", "arguments": '{"command"'}}),
             chunk({"function_call": {"arguments": ': "ls"}'}}), *end("function_call")],
            [BASH],
            id="legacy function_call",
        ),
        pytest.param(
            [calls(call(0, "c", "short_1a2b3c4d", "{}")), *end()], [used("mcp__a long name")], id="names map back"
        ),
        pytest.param(
            [calls(call(0, "c", "Bash", '{"comm')), text(" and"), calls(call(0, arguments='and": "ls"}')), *end()],
            [BASH, said(" and")],
            id="text beside an unfinished call waits",
        ),
        pytest.param(
            [calls(call(0, "c", "Bash", "")), text("\n"), calls(call(0, arguments=LS)), *end()],
            [BASH],
            id="blank text beside an unfinished call is dropped",
        ),
        pytest.param(
            [{"id": "c", "choices": [{"index": 1, "delta": {"content": "no"}}, {"index": 0, "delta": {"content": "yes"}}]},
             *end()],
            [said("yes")],
            id="several choices: choice 0",
        ),
        *(
            pytest.param(
                [*pieces, {"object": "chat.completion", "choices": [
                    {"index": 0, "message": {"content": "a", **calls(call(0, "c", "Bash", LS))["choices"][0]["delta"]},
                     "finish_reason": "tool_calls"}]}, "[DONE]"],
                [said("a"), BASH],
                id=f"a whole message {place}",
            )
            for pieces, place in (([], "alone"), ([text("a"), calls(call(0, "c", "Bash", LS))], "at the end, as MiniMax's"))
        ),
        pytest.param([text("a"), chunk({}, "stop")], [said("a")], id="end without [DONE] after a finish_reason"),
        pytest.param([text("a"), *end(), text("late")], [said("a")], id="nothing after [DONE]"),
        pytest.param([chunk({"content": [{"type": "text", "text": "a"}]}), *end()], [said("a")], id="content parts"),
        pytest.param(
            [chunk({"content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}), text("c"), *end()],
            [said("abc")],
            id="content parts are pieces of one text",
        ),
        pytest.param(
            [chunk({"content": [{"type": "thinking", "thinking": [{"type": "text", "text": "why"}]}]}),
             chunk({"content": [{"type": "thinking", "thinking": [{"type": "text", "text": "?"}]}, {"type": "text", "text": "a"}]}),
             text("b"), *end()],
            [thought("why?"), said("ab")],
            id="Mistral's thinking among the content parts",
        ),
        pytest.param([chunk({"content": "ü 😀"}), *end()], [said("ü 😀")], id="beyond ASCII"),
    ],
)  # fmt: skip
def test_content(events: list[Any], expected: Any) -> None:
    assert content_of(*events) == expected


def test_comments_are_passed_over() -> None:
    assert content_of(b": OPENROUTER PROCESSING\n\n" + sse(text("a"), *end())) == [said("a")]


@pytest.mark.parametrize(
    ("pieces", "expected"),
    [
        (["<think>why</think>\n\nso"], [thought("why"), said("so")]),
        (["<th", "ink>wh", "y</th", "ink>so"], [thought("why"), said("so")]),
        (["no <think>x</think>"], [said("no <think>x</think>")]),
        (["<thi", "s"], [said("<this")]),
        (["<think>only"], [thought("only")]),
        (["<think>why", "</think>", "\n", "\nso"], [thought("why"), said("so")]),
        (["<think>why</think>", "\n"], [thought("why")]),
    ],
)
def test_think_tags_by_quirk(pieces: list[str], expected: Any) -> None:
    assert content_of(*map(text, pieces), *end(), think_tags=True) == expected
    assert content_of(*map(text, pieces), *end()) == [said("".join(pieces))]


@pytest.mark.parametrize("begin", ["\n", "<", "<think"])
def test_what_might_have_been_a_think_tag_stands_before_the_call_behind_it(begin: str) -> None:
    events = [text(begin), calls(call(0, "c", "Bash", LS)), *end("tool_calls")]
    assert content_of(*events, think_tags=True) == [said(begin), BASH]


@pytest.mark.parametrize(
    ("events", "stop"),
    [
        ([text("a"), *end("stop")], "end_turn"),
        ([text("a"), *end("length")], "max_tokens"),
        ([text("a"), *end("content_filter")], "refusal"),
        ([calls(call(0, "c", "Bash", "{}")), *end("tool_calls")], "tool_use"),
        ([calls(call(0, "c", "Bash", "{}")), *end("stop")], "tool_use"),
        ([text("a"), *end("tool_calls")], "end_turn"),
        ([calls(call(0, "c", "Bash", LS)), *end("length")], "tool_use"),
        ([calls(call(0, "c", "Bash", LS)), text("and"), *end("length")], "tool_use"),
        ([calls(call(0, "c", "Bash", "")), *end("length")], "max_tokens"),
        ([calls(call(0, "c", "Bash", LS), call(1, "d", "Bash", "")), *end("length")], "max_tokens"),
        ([calls(call(0, "c", "Bash", LS)), *end("content_filter")], "refusal"),
        ([chunk({"refusal": "I will not"}), *end("stop")], "refusal"),
        ([text("a"), *end("model_length")], "max_tokens"),
        ([text("a"), *end("sensitive")], "refusal"),
        ([text("a"), *end("content_filter: PROHIBITED_CONTENT")], "refusal"),
        ([text("a"), *end("model_context_window_exceeded")], "model_context_window_exceeded"),
        ([text("a"), *end("of a kind of its own")], "end_turn"),
    ],
)
def test_stop_reason(events: list[Any], stop: str) -> None:
    message, error = outcome(*events)
    assert error is None
    assert message["stop_reason"] == stop


@pytest.mark.parametrize(
    ("usage", "expected"),
    [
        pytest.param(USAGE, Usage(input=40, output=7, cache_read=60), id="cached inside prompt_tokens"),
        pytest.param(counts(100, 7, prompt_cache_hit_tokens=30), Usage(70, 7, 30), id="DeepSeek's cache hits"),
        pytest.param(counts(100, 7, cached_tokens=30), Usage(70, 7, 30), id="Kimi's cache hits"),
        pytest.param(counts(60, 7, cached_tokens=60), Usage(0, 7, 60), id="all of it cached"),
        pytest.param(counts(10, 7, prompt_tokens_details={"cached_tokens": 60}), Usage(10, 7, 60),
                     id="more cached than prompted: not subtracted"),
        pytest.param({**USAGE, "prompt_tokens_details": {"cached_tokens": 60, "cache_write_tokens": 30}},
                     Usage(10, 7, 60, 30), id="cache writes"),
        pytest.param(counts(0, 0), Usage(), id="a reported 0 stands"),
        pytest.param(counts(12, 1, total_tokens=399, completion_tokens_details={"reasoning_tokens": 386}), Usage(12, 387),
                     id="xAI's thinking beside the output"),
        pytest.param(counts(12, 387, total_tokens=399, completion_tokens_details={"reasoning_tokens": 386}), Usage(12, 387),
                     id="OpenAI's thinking inside the output"),
        pytest.param(counts(98, 17, total_tokens=155), Usage(98, 57), id="Gemini's thinking in the total alone"),
        pytest.param(counts(98, 17, total_tokens=155, cached_tokens=40), Usage(58, 17, 40),
                     id="a total with the cached ones twice"),
        pytest.param(counts(-1, 7), None, id="negative"),
        pytest.param(counts(1.5, 7), None, id="no integer"),
        pytest.param(counts(10**8 + 1, 7), None, id="absurd"),
        pytest.param(counts(None, 7), None, id="null"),
        pytest.param(None, None, id="none"),
    ],
)  # fmt: skip
def test_usage(usage: Any, expected: Usage | None) -> None:
    assert openai_usage(usage) == expected


@pytest.mark.parametrize(
    "events",
    [
        pytest.param([text("a"), chunk({}, "stop"), {"choices": [], "usage": USAGE}, "[DONE]"], id="last chunk"),
        pytest.param([chunk({"content": "a"}, usage=USAGE), *end()], id="any chunk"),
        pytest.param([text("a"), chunk({}, "stop", x_groq={"usage": USAGE}), "[DONE]"], id="x_groq"),
        pytest.param(
            [text("a"), {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop", "usage": USAGE}]}, "[DONE]"],
            id="in the choice",
        ),
        pytest.param(
            [chunk({"content": "a"}, usage={"prompt_tokens": 1, "completion_tokens": 1}), chunk({}, "stop", usage=USAGE),
             {"choices": [], "usage": None}, "[DONE]"],
            id="overwritten, null ignored",
        ),
    ],
)  # fmt: skip
def test_usage_is_found_and_told(events: list[Any]) -> None:
    message, _ = outcome(*events)
    told = {k: message["usage"][k] for k in ("input_tokens", "output_tokens", "cache_read_input_tokens")}
    assert told == {"input_tokens": 40, "output_tokens": 7, "cache_read_input_tokens": 60}


def test_usage_that_nobody_told_is_counted() -> None:
    stream = stream_of(OpenAIStream, TO)
    found, _ = read(stream, sse(text("some words here"), *end()))
    assert stream.usage is None
    assert stream.out.usage.estimated
    assert collect(found)["usage"]["input_tokens"] == 7
    assert collect(found)["usage"]["output_tokens"] > 0


@pytest.mark.parametrize(
    ("raw", "status", "retry", "words"),
    [
        pytest.param(sse({"error": {"message": "slow down", "code": 429}}), 429, Retry.KEY, "slow down", id="code"),
        pytest.param(sse({"error": {"message": "x", "type": "overloaded_error"}}), 529, Retry.NEXT, "x", id="type"),
        pytest.param(sse({"error": {"message": "bad"}}), 502, Retry.SAME, "bad", id="no status of its own"),
        pytest.param(
            sse(text("a"), chunk({}, "stop", x_groq={"id": "r", "error": "over capacity"})), 502, Retry.SAME,
            "over capacity", id="Groq's",
        ),
        pytest.param(sse({"error": "text"}), 502, Retry.SAME, "text", id="error as text"),
        pytest.param(sse([{"error": {"message": "busy", "code": 503}}]), 503, Retry.SAME, "busy", id="Google's, in a list"),
        pytest.param(sse({"detail": "nope"}), 502, Retry.SAME, "nope", id="detail"),
        pytest.param(sse({"object": "error", "message": "nope", "type": "BadRequestError", "code": 400}), 400, Retry.NO,
                     "nope", id="vLLM's, bare"),
        pytest.param(
            sse(chunk({"content": ""}, "error", error={"message": "slow down", "code": 429})),
            429, Retry.KEY, "slow down", id="OpenRouter's, with a choice beside it",
        ),
        pytest.param(
            sse(text("a"), {"choices": [], "error": {"message": "gone", "code": "server_error"}}),
            500, Retry.SAME, "gone", id="with no choices",
        ),
        pytest.param(
            sse({"error": {"message": "This model's maximum context length is 8192 tokens. However, you requested 9000"}}),
            400, Retry.LARGER, "prompt is too long: 9000 tokens > 8192 maximum", id="overflow in a 200",
        ),
        pytest.param(
            b'error: {"code": 400, "message": "request (9000 tokens) exceeds the available context size (8192 tokens)"}\n\n',
            400, Retry.LARGER, "prompt is too long: 9000 tokens > 8192 maximum", id="llama.cpp's overflow in a 200",
        ),
        pytest.param(sse(text("a"), "{broken"), 502, Retry.SAME, "not an OpenAI stream", id="broken JSON"),
        pytest.param(sse(text("a")), 502, Retry.SAME, "ended before", id="no finish_reason"),
        pytest.param(sse(*end()), 502, Retry.SAME, "empty", id="empty answer"),
        *(
            pytest.param(sse(text("a"), *end(reason)), 502, Retry.SAME, reason, id=f"broke off: {reason}")
            for reason in (
                "error", "insufficient_system_resource", "network_error", "abort",
                "function_call_filter: MALFORMED_FUNCTION_CALL",
            )
        ),
        pytest.param(
            sse(*end("model_context_window_exceeded")), 400, Retry.LARGER, "prompt is too long: 7 tokens > 6 maximum",
            id="overflow told by the finish_reason",
        ),
        pytest.param(sse(*end("tool_calls")), 502, Retry.SAME, "empty", id="tool calls that never came"),
        pytest.param(
            sse(calls(call(0, "c", "Bash", '{"comm')), *end("tool_calls")), 502, Retry.SAME, "not a JSON object",
            id="arguments that cannot be parsed",
        ),
        pytest.param(
            sse(calls(call(0, "c", "Bash", "[1]")), *end("tool_calls")), 502, Retry.SAME, "not a JSON object",
            id="arguments that are a list",
        ),
        pytest.param(
            sse(calls(call(0, "c", None, "{}")), *end("tool_calls")), 502, Retry.SAME, "without a name", id="no name"
        ),
    ],
)  # fmt: skip
def test_errors(raw: bytes, status: int, retry: Retry, words: str) -> None:
    _, error = outcome(raw)
    assert error is not None
    assert (error.status, error.retry) == (status, retry)
    assert words in error.message


def test_a_call_that_max_tokens_cut_off_is_sent_as_far_as_it_came() -> None:
    events = [text("a"), calls(call(0, "c", "Bash", '{"comm')), *end("length")]
    found, error = read(stream_of(OpenAIStream, TO), sse(*events))
    assert error is None
    assert [e["delta"]["partial_json"] for e in found if "partial_json" in e.get("delta", {})] == ['{"comm']
    message = json.loads(WholeAnswer(without_cut_off).end(found))
    assert (message["stop_reason"], message["content"][1]["input"]) == ("max_tokens", {})


def test_a_refusal_without_words_gets_some() -> None:
    refusal = chunk({}, "content_filter: PROHIBITED_CONTENT")
    assert content_of(refusal) == [said("The provider refused (content_filter: PROHIBITED_CONTENT).")]


def test_lax_finish_by_quirk() -> None:
    assert content_of(text("a"), lax_finish=True) == [said("a")]


def test_openrouters_reasoning_details_ride_in_the_signature() -> None:
    details = [
        {"type": "reasoning.text", "text": "wh", "index": 0, "format": "f"},
        {"type": "reasoning.text", "text": "y", "index": 0, "signature": "s"},
        {"type": "reasoning.encrypted", "data": "e", "index": 1},
    ]
    events = [chunk({"reasoning_details": [d]}) for d in details]
    message, error = outcome(*events, text("so"), *end())
    assert error is None
    [thinking, spoken] = message["content"]
    assert (thinking["thinking"], spoken["text"]) == ("why", "so")
    payload = signed_payload(thinking)
    assert payload is not None
    merged = {"type": "reasoning.text", "text": "why", "index": 0, "format": "f", "signature": "s"}
    assert (payload["details"], payload["model"]) == ([merged, details[2]], "gpt-x")


def test_reasoning_details_behind_a_call_are_kept() -> None:
    details = [{"type": "reasoning.encrypted", "data": d, "id": d, "index": 0} for d in ("c0", "c1")]
    pieces = (
        piece
        for n, detail in enumerate(details)
        for piece in (calls(call(n, f"c{n}", "Bash", LS)), chunk({"reasoning_details": [detail]}))
    )
    message, error = outcome(*pieces, *end("tool_calls"))
    assert error is None
    body = {"model": "m", "messages": [{"role": "assistant", "content": message["content"]}]}
    back = openai_request(body, upstream("gpt-x", reasoning_key="reasoning_details"))["messages"][0]
    assert [c["id"] for c in back["tool_calls"]] == ["c0", "c1"]
    assert back["reasoning_details"] == details


def test_googles_thought_signatures_go_back_with_their_calls_to_their_own_model() -> None:
    extras = [{"google": {"thought_signature": s}} for s in ("s1", "s2")]
    pieces = [{**call(0, f"c{n}", "Bash", LS), "extra_content": extra} for n, extra in enumerate(extras)]
    message, error = outcome(*map(calls, pieces), *end("tool_calls"))
    assert error is None
    assert [b["type"] for b in message["content"]] == ["thinking", "tool_use"] * 2
    body = {"model": "m", "messages": [{"role": "assistant", "content": message["content"]}]}
    back = openai_request(body, TO)["messages"][0]["tool_calls"]
    assert [(c["id"], c["extra_content"]) for c in back] == [("c0", extras[0]), ("c1", extras[1])]
    others = openai_request(body, upstream("other"))["messages"][0]["tool_calls"]
    assert not any("extra_content" in c for c in others)


def test_ids_that_the_conversation_has_had_become_new_ones_and_go_back_as_they_came() -> None:
    stream = stream_of(OpenAIStream, TO)
    stream.out.tool_ids = {"call_0", "call_1"}
    found, _ = read(
        stream, sse(calls(*(call(n, id, "Bash", LS) for n, id in enumerate(("call_0", "new")))), *end())
    )
    ids = [b["id"] for b in collect(found)["content"]]
    assert len({*ids, "call_0", "call_1"}) == 4
    assert ids[1] == "new"
    assert [upstream_tool_id(id) for id in ids] == ["call_0", "new"]


@pytest.mark.parametrize("id", ["", "call_0"], ids=["no id", "the same id"])
@pytest.mark.parametrize("known", [set(), {"call_0"}], ids=["new", "had"])
def test_calls_that_their_ids_do_not_tell_apart_get_their_own_results(id: str, known: set[str]) -> None:
    stream = stream_of(OpenAIStream, TO)
    stream.out.tool_ids = {*known}
    pieces = [[call(n, id, "Bash", '{"n":'), call(n, id, "Bash", f"{n}}}")] for n in (0, 1)]
    found, _ = read(stream, sse(*(calls(*both) for both in zip(*pieces, strict=True)), *end()))
    made = collect(found)["content"]
    results = [tool_result(block["id"], str(block["input"]["n"])) for block in made]
    body = {"messages": [user("hi"), {"role": "assistant", "content": made}, user(*reversed(results))]}
    said, *told = openai_request(body, TO)["messages"][1:]
    sent = [(c["id"], json.loads(c["function"]["arguments"])["n"]) for c in said["tool_calls"]]
    assert sent == [(m["tool_call_id"], int(m["content"])) for m in told]
    assert len(dict(sent)) == 2


# Through `Translation`: bytes to bytes.


def to_events() -> Translation:
    stream = stream_of(OpenAIStream, TO)
    return Translation(stream, stream.out, EventWriter())


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"<html><body>502</body></html>", 502),
        (b'{"error": {"message": "quota", "code": 429}}', 429),
        (b'{"id": "x", "object": "chat.completion", "choices": []}', 502),
        (b"", 502),
        (b"   ", 502),
    ],
)
@pytest.mark.parametrize("cut", [None, 5])
def test_a_200_that_is_no_stream(body: bytes, status: int, cut: int | None) -> None:
    machine = to_events()
    pieces = [body] if cut is None else [body[:cut], body[cut:]]
    assert b"".join(map(machine.feed, pieces)) + machine.finish() == b""
    assert machine.error is not None
    assert machine.error.status == status
    assert not machine.has_content


@pytest.mark.parametrize("before", [[], [text("a")]], ids=["the first", "a later one"])
@pytest.mark.parametrize("lacks", [3, 20])
def test_a_last_event_that_is_cut_off_is_said_to_be(before: list[Any], lacks: int) -> None:
    machine = to_events()
    out = machine.feed(sse(*before, text("b"))[:-lacks]) + machine.finish()
    assert out.count(b"text_delta") == len(before)
    assert machine.error is not None
    assert machine.error.message == "the provider's stream ended before the answer did"


def test_an_answer_that_had_ended_stands_though_its_last_event_is_cut_off() -> None:
    machine = to_events()
    machine.feed(sse(text("a"), chunk({}, "stop"), {"choices": [], "usage": USAGE})[:-9])
    machine.finish()
    assert (machine.error, machine.ended) == (None, True)


def test_what_came_before_a_fault_still_goes_out_and_no_ending_is_made_up() -> None:
    machine = to_events()
    out = machine.feed(sse(text("a"), text("b"), "{broken", text("c")))
    assert out.count(b"text_delta") == 2
    assert machine.error is not None
    assert machine.ending == b""
    assert b"message_stop" not in out + machine.finish()


def test_streamed_and_whole_answers_agree() -> None:
    raw = sse(chunk({"reasoning": "r"}), text("a"), calls(call(0, "c", "Bash", LS)), *end("tool_calls"))
    stream = stream_of(OpenAIStream, TO)
    whole = Translation(stream, stream.out, WholeAnswer(without_cut_off))
    assert whole.feed(raw) + whole.finish() == b""
    events, _ = read(stream_of(OpenAIStream, TO), raw)
    assert json.loads(whole.ending) == collect(events)


# Any stream.

TEXTS = st.text(max_size=6)
ARGUMENTS = st.one_of(TEXTS, st.sampled_from(["{}", '{"a":', "1}", LS, None, {"a": 1}, [1]]))
FUNCTIONS = maybe(name=st.sampled_from(["Bash", "", None]), arguments=ARGUMENTS)
PIECES = maybe(
    index=st.sampled_from([0, 1, 2, None, "x", []]),
    id=st.sampled_from(["a", "b", "", None, 7]),
    function=st.one_of(st.none(), FUNCTIONS),
)
DETAILS = [None, [{"type": "reasoning.text", "text": "d"}], ["x"]]
DELTAS = maybe(
    content=st.one_of(TEXTS, st.none(), st.just([translation.text("p")])),
    reasoning_content=st.one_of(TEXTS, st.none(), st.just(3)),
    reasoning=st.one_of(TEXTS, st.none()),
    reasoning_details=st.sampled_from(DETAILS),
    refusal=st.one_of(TEXTS, st.none()),
    tool_calls=st.one_of(st.none(), st.lists(PIECES, max_size=2), st.just("x")),
    function_call=st.sampled_from([None, {"name": "f", "arguments": "{}"}]),
)
CHOICES = st.fixed_dictionaries(
    {"delta": st.one_of(st.none(), DELTAS)},
    optional={
        "index": st.sampled_from([0, 1, None]),
        "finish_reason": st.sampled_from([None, "stop", "length", "?", 3]),
    },
)
CHUNKS = st.one_of(
    st.fixed_dictionaries(
        {"choices": st.one_of(st.lists(CHOICES, max_size=2), st.none(), st.just("x"))},
        optional={"usage": st.sampled_from([None, USAGE, "x"]), "error": st.sampled_from([None, "x"])},
    ),
    st.sampled_from([None, [], "x", 3, {}]),
)


@settings(max_examples=250, deadline=None)
@given(
    chunks=st.lists(CHUNKS, max_size=8),
    tail=st.sampled_from([[], list(end()), ["[DONE]"]]),
    tags=st.booleans(),
)
def test_any_stream_is_well_formed_or_one_error(chunks: list[Any], tail: list[Any], tags: bool) -> None:
    stream = stream_of(OpenAIStream, upstream("gpt-x", think_tags=tags))
    found, error = read(stream, sse(*(json.dumps(c) for c in chunks), *tail))
    check_grammar(found, error is None)
    for block in collect(found)["content"] if error is None else ():
        if block["type"] == "tool_use":
            assert isinstance(block["input"], dict)


# Chunks that are alike are not parsed.

ALIKE = (
    lambda text: chunk({"content": text}),
    lambda text: chunk({"content": text}, usage=USAGE),
    lambda text: chunk({"content": text}, "stop"),
    lambda text: chunk(
        {"role": "assistant", "content": text, "refusal": None, "tool_calls": None}, created=1
    ),
    lambda text: chunk({"content": None, "reasoning_content": text}),
    lambda text: chunk({"content": "", "reasoning": text}),
    lambda text: chunk({"refusal": text}),
    lambda text: chunk({"content": text, "reasoning": "hm"}),
    lambda text: chunk({"content": "hm", "reasoning": text}),
    lambda text: chunk({"reasoning": text, "reasoning_details": [{"type": "reasoning.text", "text": text}]}),
    lambda text: chunk({"content": [{"type": "text", "text": text}]}),
    lambda text: chunk({"tool_calls": [call(0, "call_1", "Read", text)]}),
    lambda text: {"content": text, **chunk({"content": "a"})},
    lambda text: {**chunk({"content": text}), "content": "a"},
    lambda text: {"choices": [{"index": 1, "delta": {"content": text}}]},
    lambda text: {"choices": [{"delta": {"content": text}}, {"delta": {"content": "more"}}]},
    lambda text: {"choices": [{"delta": {"content": "more"}}, {"delta": {"content": text}}]},
    lambda text: {"choices": [{"delta": {"content": text}}, {"delta": {"reasoning": "more"}}]},
)
WRITTEN = (
    lambda chunk: json.dumps(chunk),
    lambda chunk: json.dumps(chunk, separators=(",", ":")),
    lambda chunk: json.dumps(chunk, separators=(",", ":\t"), ensure_ascii=False),
)
TEXTS = [
    "a",
    "b ",
    "é",
    "🌹",
    "\u2028",
    "\t",
    "\n",
    "\\",
    '"',
    "",
    "<think>",
    "</think>",
    '"content":"a"',
    "\x7f",
    "hm",
]
RAW = [
    f'"{t}"'
    for t in ('a","x":"b', 'a"}}]}', "a\x01b", "a\tb", "\\u0061", "\\", "a\\", "\\x", '\\"', '"', "", "a")
] + ['"', ""]


def all_told(events: list[tuple[str, str]], think_tags: bool, most: int) -> Any:
    """What a stream makes of events one by one, with patterns of chunks or (most 0) without."""
    stream = stream_of(OpenAIStream, upstream("gpt-x", think_tags=think_tags))
    told: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ChunkPattern, "MOST", most)
        try:
            for name, data in events:
                stream.feed(name, data)
                told.append((stream.out.take(), stream.usage, stream.finish_reason, stream.out.has_content))
        except ApiError as error:
            told.append((error.status, error.message, stream.out.take()))
    return told


def raw_text(written: str, text: str) -> str:
    """A chunk whose text "mark" is these very characters, quotes and all."""
    return written.replace('"mark"', text)


@settings(max_examples=1500, deadline=None)
@given(
    make=st.sampled_from(ALIKE),
    other=st.sampled_from(ALIKE),
    written=st.sampled_from(WRITTEN),
    texts=st.lists(st.sampled_from(TEXTS), min_size=2, max_size=8),
    raw=st.sampled_from(RAW),
    places=st.lists(st.integers(0, 10), min_size=3, max_size=3),
    tags=st.booleans(),
)
def test_chunks_that_are_alike_are_read_as_if_they_were_parsed(
    make: Any, other: Any, written: Any, texts: list[str], raw: str, places: list[int], tags: bool
) -> None:
    events = [("", written(make(text))) for text in texts]
    events.insert(places[0], ("", written(other("a"))))
    events.insert(places[1], ("", raw_text(written(make("mark")), raw)))
    if places[2] < len(events):
        events.insert(places[2], ("error", written(make("b"))))
    assert all_told(events, tags, 8) == all_told(events, tags, 0)


@pytest.mark.parametrize("make", range(len(ALIKE)))
@pytest.mark.parametrize("written", WRITTEN)
def test_a_chunk_behind_one_that_may_be_alike(make: int, written: Any) -> None:
    raw_texts = [*(json.dumps(text) for text in TEXTS), *RAW]
    for first, raw, name in itertools.product(TEXTS, raw_texts, ("", "error")):
        events = [("", written(ALIKE[make](first))), (name, raw_text(written(ALIKE[make]("mark")), raw))]
        assert all_told(events, False, 8) == all_told(events, False, 0)


@pytest.mark.parametrize("key", ["content", "reasoning_content", "reasoning"])
@pytest.mark.parametrize("separators", [(",", ":"), (", ", ": ")])
def test_a_stream_of_alike_chunks_is_parsed_once(
    key: str, separators: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    monkeypatch.setattr("ccmux.parsed", lambda data: seen.append(data) or json.loads(data))
    delta = {"role": "assistant", "content": None}
    chunks = [chunk({**delta, key: f"é{n} "}, created=n // 10) for n in range(200)]
    datas = [json.dumps(c, separators=separators, ensure_ascii=False) for c in chunks]
    told = all_told([("", data) for data in datas], False, 8)
    assert seen == datas[::10]
    deltas = [
        event["delta"] for events, *_ in told for event in events if event["type"] == "content_block_delta"
    ]
    assert [delta.get("text") or delta["thinking"] for delta in deltas] == [f"é{n} " for n in range(200)]


def test_streams_whose_chunks_are_never_alike_are_not_learnt_from_for_long() -> None:
    """OpenAI's own have a text of random length in each."""
    stream = stream_of(OpenAIStream, upstream("gpt-x"))
    for number in range(50):
        stream.feed("", json.dumps(chunk({"content": "a"}, obfuscation="x" * number)))
    assert stream.pattern.unlike == ChunkPattern.MOST and f'"{"x" * 7}"' in stream.pattern.after
