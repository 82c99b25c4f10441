"""OpenAI Responses: requests as the openai package types them, golden streams; both fed anything at all."""

from __future__ import annotations

import copy
import itertools
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai.types.responses import ResponseStreamEvent
from openai.types.responses.response_create_params import ResponseCreateParamsStreaming
from pydantic import TypeAdapter
from translation import (
    BASH,
    BODIES,
    COMMAND,
    FIXTURES,
    PDF,
    PNG,
    SEARCH,
    assistant,
    base64_source,
    check_cuts,
    check_failure,
    check_golden,
    check_grammar,
    drain,
    golden,
    maybe,
    read,
    signatures_of,
    sse,
    stream_of,
    text,
    thinking,
    tool_result,
    tool_use,
    upstream,
    user,
)

from ccmux import ResponsesStream, Retry, Usage, collect, responses_request, responses_usage

CODEX = upstream("gpt-5.3-codex", effort=("low", "medium", "high"))
LONG = "mcp__server__a_long_tool_name_that_does_not_fit_into_64_characters_at_all"
NAMES = {LONG[:55] + "_0a1b2c3d": LONG}
CASES = sorted(p.stem for p in (FIXTURES / "responses").glob("*.sse"))


PARAMS: TypeAdapter[Any] = TypeAdapter(ResponseCreateParamsStreaming)


def valid(out: Any) -> Any:
    """The request, as the openai package would type it; iterables are drained, or nothing is checked."""
    json.dumps(out)
    # The package wants the id of a reasoning item; what is not stored is replayed without, as Codex does.
    named = [{"id": "rs_1", **i} if i["type"] == "reasoning" else i for i in out["input"]]
    drain(PARAMS.validate_python({**out, "input": named}, extra="forbid"))
    return out


def request_of(*messages: Any, to: Any = CODEX, **body: Any) -> Any:
    return valid(responses_request({"model": "claude-x", "messages": list(messages), **body}, to))


# Streams


@pytest.mark.parametrize("case", CASES)
def test_golden(case: str) -> None:
    data = (FIXTURES / "responses" / f"{case}.sse").read_bytes()
    events, error = read(stream_of(ResponsesStream, CODEX, NAMES), data)
    check_grammar(events, ended=error is None)
    check_golden(FIXTURES / "responses" / f"{case}.json", golden(events, error))


@pytest.mark.parametrize("case", CASES)
def test_fixture_is_what_openai_sends(case: str) -> None:
    adapter: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
    for line in (FIXTURES / "responses" / f"{case}.sse").read_text().splitlines():
        if line.startswith("data: "):
            adapter.validate_json(line[6:])


@pytest.mark.parametrize("case", CASES)
def test_cut_anywhere(case: str) -> None:
    data = (FIXTURES / "responses" / f"{case}.sse").read_bytes()
    check_cuts(lambda: stream_of(ResponsesStream, CODEX, NAMES), data)


def told(*events: Any) -> Any:
    """The message that these events amount to."""
    found, error = read(stream_of(ResponsesStream, CODEX), sse(*events))
    assert error is None
    check_grammar(found, ended=True)
    return collect(found)


def done(item: Any, index: int = 0) -> Any:
    return {"type": "response.output_item.done", "output_index": index, "item": item}


def completed(*output: Any, **more: Any) -> Any:
    return {"type": "response.completed", "response": {"status": "completed", "output": list(output), **more}}


def text_delta(words: str, index: int = 0) -> Any:
    return {"type": "response.output_text.delta", "output_index": index, "delta": words}


def piece_of(arguments: str) -> Any:
    return {"type": "response.function_call_arguments.delta", "output_index": 0, "delta": arguments}


def added(item: Any, index: int = 0) -> Any:
    return {"type": "response.output_item.added", "output_index": index, "item": item}


MESSAGE = {"type": "message", "content": [{"type": "output_text", "text": "hi"}]}
CALL = {"type": "function_call", "call_id": "c1", "name": "Bash", "arguments": '{"a":1}'}

BEGUN = added({**CALL, "arguments": ""})
REASONING = {"type": "reasoning", "summary": [{"type": "summary_text", "text": "hm"}]}


@pytest.mark.parametrize(
    ("events", "kinds"),
    [
        pytest.param([done(MESSAGE), completed()], ["text"], id="no deltas: text from the whole item"),
        pytest.param([completed(MESSAGE, CALL)], ["text", "tool_use"], id="all of it in the last event"),
        pytest.param(
            [done(CALL), completed(CALL, {**CALL, "call_id": "c2"})],
            ["tool_use", "tool_use"],
            id="a second call in the last event",
        ),
        pytest.param(
            [done(REASONING), completed(REASONING, MESSAGE, CALL)],
            ["thinking", "text", "tool_use"],
            id="all but the thinking in the last event",
        ),
        pytest.param(
            [text_delta("hi"), done(CALL, 1), completed({**REASONING, "summary": []}, MESSAGE, CALL)],
            ["text", "tool_use"],
            id="the last event counts otherwise",
        ),
        pytest.param([done({**CALL, "arguments": ""}), completed()], ["tool_use"], id="no arguments are {}"),
        pytest.param(
            [done({**CALL, "arguments": {"a": 1}}), completed()], ["tool_use"], id="arguments as an object"
        ),
        pytest.param(
            [done({**CALL, "arguments": '"{}"'}), completed()], ["tool_use"], id="arguments encoded twice"
        ),
        pytest.param([BEGUN, completed()], ["tool_use"], id="a call that is never told done"),
        pytest.param(
            [done({"type": "image_generation_call"}), done(MESSAGE, 1), completed()],
            ["text"],
            id="unknown items pass",
        ),
        pytest.param([done(MESSAGE), done(MESSAGE), completed()], ["text"], id="an item told twice"),
    ],
)
def test_answers(events: list[Any], kinds: list[str]) -> None:
    assert [block["type"] for block in told(*events)["content"]] == kinds


WAYS = st.sampled_from(["in pieces", "whole", "last"])
NUMBERS: dict[str, Any] = {  # what tells items from each other
    "numbers": lambda place: {"output_index": place},
    "both": lambda place: {"output_index": place, "item_id": f"i{place}"},
    "ids": lambda place: {"item_id": f"i{place}"},
    "ids, numbered alike": lambda place: {"output_index": 0, "item_id": f"i{place}"},
    "the same number": lambda place: {"output_index": 0},
    "nothing": lambda place: {},
    "ids, numbered by their beginning and end": lambda place: {"output_index": place, "item_id": f"i{place}"},
}


def numbered(event: Any, place: int, numbers: str) -> Any:
    """The event as a server tells it that counts items so."""
    mark = NUMBERS[numbers](place)
    told = {k: v for k, v in event.items() if k != "output_index"} | mark
    if "item" not in told and numbers.endswith("end"):
        del told["output_index"]
    if "item" in told and "item_id" in told:
        told["item"] = {**told["item"], "id": told.pop("item_id")}
    return told


def told_of(item: Any, way: str) -> list[Any]:
    """The events that tell of an item before the last one."""
    if way == "last":
        return []
    if way == "whole":
        return [done(item)]
    kind = "output_text" if item["type"] == "message" else "function_call_arguments"
    whole = item["content"][0]["text"] if item["type"] == "message" else item["arguments"]
    pieces = [{"type": f"response.{kind}.delta", "delta": letter} for letter in whole]
    return [added({**item, "arguments": "", "content": []}), *pieces, done(item)]


@pytest.mark.parametrize("numbers", NUMBERS)
@given(
    st.lists(st.tuples(st.sampled_from(["hi", "ho", ""]), WAYS), min_size=1, max_size=4), *[st.booleans()] * 2
)
@settings(max_examples=60, deadline=None)
def test_each_item_is_told_once_whichever_events_tell_it(
    numbers: str, plan: list[tuple[str, str]], at_once: bool, ends: bool
) -> None:
    """Messages and calls, each in pieces, whole, or in the last event alone, which has them all; one after another, or
    all of them at once where each event says what item it is of. Some servers end none of them.
    """
    output = [
        {**MESSAGE, "content": [{"type": "output_text", "text": words}]}
        if words
        else {**CALL, "call_id": f"c{n}"}
        for n, (words, _) in enumerate(plan)
    ]
    events = [
        [numbered(e, n, numbers) for e in told_of(item, way)]
        for n, (item, (_, way)) in enumerate(zip(output, plan, strict=True))
    ]
    events = [[e for e in item if ends or e["type"] != done({})["type"]] for item in events]
    is_clear = numbers != "ids, numbered alike" or "whole" not in [way for _, way in plan]
    is_told_apart = is_clear and numbers not in ("the same number", "nothing")
    turns = itertools.zip_longest(*events) if at_once and is_told_apart else events
    content = told(*filter(None, itertools.chain.from_iterable(turns)), completed(*output))["content"]
    calls = [(b["id"], b["input"]) for b in content if b["type"] == "tool_use"]
    assert sorted(calls) == sorted((i["call_id"], {"a": 1}) for i in output if i["type"] != "message")
    texts = "".join(b["text"] for b in content if b["type"] == "text")
    assert sorted(texts) == sorted("".join(words for words, _ in plan))


@pytest.mark.parametrize("id", ["", "c1"], ids=["no id", "the same id"])
def test_calls_that_their_ids_do_not_tell_apart_get_their_own_results(id: str) -> None:
    calls = [{**CALL, "call_id": id, "arguments": json.dumps({"n": n})} for n in (1, 2)]
    made = told(done(calls[0]), done(calls[1], 1), completed())["content"]
    first, second = (block["id"] for block in made)
    assert first != second
    results = user(tool_result(second, "two"), tool_result(first, "one"))
    items = request_of(user("hi"), {"role": "assistant", "content": made}, results)["input"][1:]
    assert [i.get("arguments") or i["output"] for i in items] == ['{"n": 1}', '{"n": 2}', "one", "two"]


def test_thoughts_told_whole_come_back_each() -> None:
    thoughts = [{"type": "reasoning", "summary": [], "encrypted_content": f"enc{n}"} for n in (1, 2)]
    made = told(done(thoughts[0]), done(thoughts[1], 1), done(MESSAGE, 2), completed())["content"]
    assert request_of(user("hi"), {"role": "assistant", "content": made})["input"][1:3] == thoughts


@pytest.mark.parametrize("way", ["in pieces", "whole", "last"])
def test_messages_stay_apart_each_in_its_phase(way: str) -> None:
    phases = ("commentary", "commentary", "final_answer")
    output = [{**MESSAGE, "role": "assistant", "phase": phase} for phase in phases]
    events = [numbered(e, n, "numbers") for n, item in enumerate(output) for e in told_of(item, way)]
    made = told(*events, completed(*output))["content"]
    items = request_of(user("hi"), {"role": "assistant", "content": made})["input"][1:]
    assert items == [{**item, "content": "hi"} for item in output]


def test_a_call_that_is_begun_twice_goes_out_once() -> None:
    message = told(BEGUN, piece_of('{"a":'), BEGUN, done(CALL), completed(CALL))
    assert [b["input"] for b in message["content"]] == [{"a": 1}]


def test_a_call_that_has_the_number_of_the_text_before_it() -> None:
    """As Ollama 0.17 tells it, which never ends the text's item."""
    message = told(text_delta("Looking."), BEGUN, piece_of('{"a":1}'), done(CALL), completed(MESSAGE, CALL))
    assert [b.get("text") or b.get("input") for b in message["content"]] == ["Looking.", {"a": 1}]


@pytest.mark.parametrize(
    "place", [{"item_id": "m1"}, {"output_index": 3}], ids=["by id", "counted otherwise"]
)
@pytest.mark.parametrize("words", ["hi", "h"], ids=["whole", "in part"])
def test_a_text_whose_item_is_never_told_done_goes_out_once(place: Any, words: str) -> None:
    piece = {"type": "response.output_text.delta", **place, "delta": words}
    (block,) = told(piece, completed({**MESSAGE, "id": "m1"}))["content"]
    assert block["text"] == "hi"


def test_a_text_that_goes_on_beside_a_call() -> None:
    whole = {"type": "message", "content": [{"type": "output_text", "text": "abcdefg"}]}
    begun = added({**CALL, "arguments": ""}, 1)
    beside = [text_delta("abc"), begun, text_delta("de"), done(CALL, 1), text_delta("fg"), done(whole)]
    content = told(*beside, completed())["content"]
    assert "".join(b["text"] for b in content if b["type"] == "text") == "abcdefg"


def test_arguments_told_only_in_the_event_that_ends_them() -> None:
    end = {"type": "response.function_call_arguments.done", "output_index": 0, "arguments": '{"a":1}'}
    assert told(BEGUN, end, completed())["content"][0]["input"] == {"a": 1}


def cut_off(*output: Any) -> Any:
    details = {"status": "incomplete", "incomplete_details": {"reason": "max_output_tokens"}}
    return {"type": "response.incomplete", "response": {**details, "output": list(output)}}


@pytest.mark.parametrize("is_told", [True, False], ids=["told done", "never told done"])
def test_a_call_that_the_outputs_limit_cut_off_is_sent_as_far_as_it_came(is_told: bool) -> None:
    cut = {**CALL, "arguments": '{"a":', "status": "incomplete"}
    data = sse(BEGUN, piece_of('{"a":'), *([done(cut)] if is_told else []), cut_off(cut))
    found, error = read(stream_of(ResponsesStream, CODEX), data)
    assert error is None
    message = collect(found)
    assert (message["stop_reason"], message["content"][0]["input"]) == ("max_tokens", '{"a":')


@pytest.mark.parametrize(("arguments", "stop"), [('{"a":1}', "tool_use"), ("", "max_tokens")])
def test_a_call_of_an_answer_that_the_outputs_limit_cut_off(arguments: str, stop: str) -> None:
    call = {**CALL, "arguments": arguments, "status": "completed" if arguments else "incomplete"}
    assert told(BEGUN, done(call), cut_off(call))["stop_reason"] == stop


@pytest.mark.parametrize(
    ("data", "status", "retry", "cause"),
    [
        pytest.param(sse(completed()), 502, Retry.SAME, "empty", id="nothing in it"),
        pytest.param(sse(done(MESSAGE)), 502, Retry.SAME, "stream", id="cut off"),
        pytest.param(sse({"type": "response.failed"}), 502, Retry.SAME, "http_502", id="failed, and nothing more"),
        pytest.param(b"", 502, Retry.SAME, "stream", id="no bytes at all"),
        pytest.param(sse("{nonsense"), 502, Retry.SAME, "stream", id="not JSON"),
        pytest.param(sse([1]), 502, Retry.SAME, "http_502", id="no object"),
        pytest.param(sse(done({**CALL, "arguments": "[1]"})), 502, Retry.SAME, "stream", id="arguments that are no object"),
        pytest.param(sse(done({**CALL, "name": ""})), 502, Retry.SAME, "stream", id="a call without a name"),
        pytest.param(sse({"error": {"code": 429, "message": "slow"}}), 429, Retry.KEY, "http_429", id="a bare error"),
        pytest.param(sse({"type": "error", "code": "context_length_exceeded", "message": "Your input exceeds the context window"}),
                     400, Retry.LARGER, "overflow", id="too long"),
    ],
)  # fmt: skip
def test_failures(data: bytes, status: int, retry: Retry, cause: str) -> None:
    check_failure(stream_of(ResponsesStream, CODEX), data, status, retry, cause)


TOLD = {"input_tokens": 100, "output_tokens": 5}


@pytest.mark.parametrize(
    ("usage", "expected"),
    [
        pytest.param(
            {**TOLD, "input_tokens_details": {"cached_tokens": 60}}, Usage(40, 5, 60), id="cached apart"
        ),
        pytest.param(
            {**TOLD, "input_tokens_details": {"cached_tokens": 60, "cache_write_tokens": 30}},
            Usage(10, 5, 60, 30),
            id="writes apart",
        ),
        pytest.param(
            {**TOLD, "input_tokens_details": {"cached_tokens": 100}}, Usage(0, 5, 100), id="all of it cached"
        ),
        pytest.param({**TOLD, "input_tokens_details": None}, Usage(100, 5), id="no details"),
        pytest.param({"input_tokens": -3, "output_tokens": 0}, None, id="absurd"),
        pytest.param(None, None, id="none"),
    ],
)
def test_usage(usage: Any, expected: Usage | None) -> None:
    assert responses_usage(usage) == expected


ANY_ITEM = maybe(
    type=st.sampled_from(["message", "reasoning", "function_call", "web_search_call", "?"]),
    id=st.sampled_from(["i1", "i2", "\ud800", None]),
    call_id=st.sampled_from(["c1", "", None, "c d"]),
    name=st.sampled_from(["Bash", "", None]),
    phase=st.sampled_from(["commentary", None]),
    arguments=st.sampled_from(["", "{}", '{"a":', '{"a":1}', "null", None, {"a": 1}, "x"]),
    content=st.sampled_from([[], None, MESSAGE["content"], [{"type": "refusal", "refusal": "no"}], [None]]),
    summary=st.sampled_from([[], [{"text": "so"}], None]),
    encrypted_content=st.sampled_from(["enc", None]),
    action=st.sampled_from([None, {"query": "q", "sources": [{"url": "https://a.org"}, None]}, {"url": "https://b.org"}]),
)  # fmt: skip
ANY_TYPE = st.sampled_from([
    "response.created", "response.output_item.added", "response.output_item.done", "response.output_text.delta",
    "response.refusal.delta", "response.reasoning_summary_text.delta", "response.reasoning_summary_part.added",
    "response.function_call_arguments.delta", "response.output_text.annotation.added", "response.completed",
    "response.incomplete", "?", None,
])  # fmt: skip
ANY_RESPONSE = maybe(
    status=st.sampled_from(["completed", "incomplete", "failed"]),
    output=st.lists(ANY_ITEM, max_size=2),
    usage=st.sampled_from([None, {"input_tokens": 1, "output_tokens": 1}]),
    error=st.sampled_from([None, {"code": "x"}]),
    incomplete_details=st.sampled_from([None, {"reason": "content_filter"}]),
)
ANY_EVENT = maybe(
    type=ANY_TYPE,
    output_index=st.sampled_from([0, 1, 2, None, "0"]),
    item_id=st.sampled_from(["i1", None]),
    item=ANY_ITEM,
    delta=st.sampled_from(["a", "{", '{"a":', "1}", "", None, {}]),
    annotation=st.sampled_from([None, {"type": "url_citation", "url": "https://a.org", "title": "A"}]),
    response=ANY_RESPONSE,
)


@given(st.lists(ANY_EVENT, max_size=12))
@settings(max_examples=300, deadline=None)
def test_any_events_end_well_or_in_one_error(events: list[Any]) -> None:
    found, error = read(stream_of(ResponsesStream, CODEX), sse(*events))
    check_grammar(found, ended=error is None)


# Requests


def test_a_file_of_text_is_inlined() -> None:
    source = base64_source("text/plain", "aGk=")
    [said] = request_of(user({"type": "document", "source": source}))["input"]
    assert said["content"] == [{"type": "input_text", "text": "hi"}]


def test_a_document_of_blocks_keeps_its_images() -> None:
    document = {"type": "document", "source": {"type": "content", "content": ["see", PNG]}}
    items = request_of(user(document), assistant(tool_use("c1")), user(tool_result("c1", [document])))[
        "input"
    ]
    kinds = ["input_text", "input_image"]
    assert [[p["type"] for p in items[n].get("content", items[n].get("output"))] for n in (0, 2)] == [
        kinds
    ] * 2


def test_conversation_as_items() -> None:
    kept = {"dialect": "responses", "model": CODEX.model}
    item = {"type": "reasoning", "encrypted_content": "enc", "summary": []}
    foreign = {**kept, "model": "gpt-6-astra", "item": {**item, "encrypted_content": "other"}}
    thought = thinking("hm", {**kept, "item": item, "phase": "commentary"})
    seen = tool_result("call_2", [text("see"), PNG], is_error=True)
    calls = tool_use("call_1", command="ls"), tool_use("call_2", "a b")
    out = request_of(
        user("look", PNG, PDF),
        assistant(thinking("", foreign), thought, "I look.", *calls),
        user(seen, tool_result("call_1", "a.txt"), tool_result("gone"), "and?"),
        {"role": "system", "content": "Plan mode is active"},
        assistant(thinking("last", {**kept, "item": item})),
        system=[text("x-anthropic-billing-header: cc=1"), text("Be good.")],
    )

    def said(*content: Any) -> Any:
        parts = [{"type": "input_text", "text": c} if isinstance(c, str) else c for c in content]
        return {"type": "message", "role": "user", "content": parts}

    def called(id: str, name: str, arguments: str) -> Any:
        return {"type": "function_call", "call_id": id, "name": name, "arguments": arguments}

    def answered(id: str, output: Any) -> Any:
        return {"type": "function_call_output", "call_id": id, "output": output}

    image = {"type": "input_image", "image_url": "data:image/png;base64,iVBORw0KGgo=", "detail": "auto"}
    pdf = {"type": "input_file", "filename": "a.pdf", "file_data": "data:application/pdf;base64,JVBERi0="}
    assert out["instructions"] == "Be good."
    assert out["input"] == [
        said("look", image, pdf),
        item,
        {"type": "message", "role": "assistant", "content": "I look.", "phase": "commentary"},
        called("call_1", "Bash", '{"command": "ls"}'),
        called("call_2", "a_b_" + out["input"][4]["name"][-8:], "{}"),
        answered("call_1", "a.txt"),
        answered("call_2", said("Error:", "see", image)["content"]),
        said("and?", "<system-reminder>\nPlan mode is active\n</system-reminder>"),
    ]


def test_reasoning_comes_back_from_the_stream_that_made_it() -> None:
    data = (FIXTURES / "responses" / "reasoning_then_tool.sse").read_bytes()
    events, _ = read(stream_of(ResponsesStream, CODEX), data)
    blocks = signatures_of(events)
    items = request_of(user("hi"), assistant(*blocks, tool_use("call_A1b2C3")))["input"]
    assert [i["type"] for i in items] == ["message", "reasoning", "function_call", "function_call_output"]
    assert items[1]["encrypted_content"] == "gAAAAABo4Wq1-encrypted-reasoning-=="
    items = request_of(assistant(*blocks, tool_use("c")), to=upstream("gpt-6-astra"))["input"]
    assert [i["type"] for i in items] == ["function_call", "function_call_output"]


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        pytest.param({"max_tokens": 1}, {"max_output_tokens": 16}, id="the least it takes"),
        pytest.param(
            {"thinking": {"type": "adaptive"}, "output_config": {"effort": "max"}},
            {"reasoning": {"effort": "high", "summary": "auto"}, "include": ["reasoning.encrypted_content"]},
            id="effort clamped",
        ),
        pytest.param(
            {"thinking": {"type": "disabled"}, "output_config": {"effort": "max"}},
            {"reasoning": None},
            id="no thinking",
        ),
        pytest.param(
            {"thinking": {"type": "enabled", "budget_tokens": 2000}},
            {"reasoning": {"effort": "low", "summary": "auto"}},
            id="budget",
        ),
        pytest.param(
            {"output_config": {"format": {"type": "json_schema", "schema": {"type": "object"}}}},
            {"text": {"format": {"type": "json_schema", "name": "answer", "schema": {"type": "object"}, "strict": False}}},
            id="schema",
        ),
        pytest.param(
            {"tools": [BASH], "tool_choice": {"type": "any", "disable_parallel_tool_use": True}},
            {
                "tool_choice": "required",
                "parallel_tool_calls": False,
                "tools": [{"type": "function", "name": "Bash", "description": "Runs", "parameters": COMMAND, "strict": False}],
            },
            id="tools",
        ),
        pytest.param(
            {"tools": [BASH], "tool_choice": {"type": "tool", "name": "Bash"}},
            {"tool_choice": {"type": "function", "name": "Bash"}},
            id="one tool",
        ),
        pytest.param(
            {"tools": [SEARCH], "tool_choice": {"type": "tool", "name": "web_search"}},
            {
                "tool_choice": "required",
                "include": ["web_search_call.action.sources", "reasoning.encrypted_content"],
                "tools": [{"type": "web_search", "filters": {"allowed_domains": ["a.org"]},
                           "user_location": {"type": "approximate", "city": "Oslo"}}],
            },
            id="web search",
        ),
        pytest.param(
            {"stop_sequences": ["x"], "metadata": {"user_id": "u"}, "safeguards": [], "context_management": {}, "top_k": 3},
            {"stop": None, "metadata": None, "safeguards": None, "context_management": None, "top_k": None},
            id="what does not go up",
        ),
        pytest.param(
            {"temperature": 0.5, "top_p": 1},
            {"temperature": 0.5, "top_p": 1, "store": False, "stream": True},
            id="sampling",
        ),
    ],
)  # fmt: skip
def test_parameters(body: Any, expected: Any) -> None:
    out = request_of(user("hi"), **body)
    assert {k: out.get(k) for k in expected} == expected


@pytest.mark.parametrize(
    ("tools", "name", "expected"),
    [
        ([SEARCH], "web_search", "required"),
        ([SEARCH, BASH], "web_search", {"type": "web_search"}),
        ([SEARCH, BASH], "Bash", {"type": "function", "name": "Bash"}),
        ([SEARCH, BASH], "code_execution", "auto"),
        ([BASH], "web_search", "auto"),
    ],
)
def test_a_tool_that_must_be_called(tools: list[Any], name: str, expected: Any) -> None:
    body = {"messages": [user("hi")], "tools": tools, "tool_choice": {"type": "tool", "name": name}}
    assert responses_request(body, CODEX)["tool_choice"] == expected


@pytest.mark.parametrize(
    ("model", "asks"),
    [
        ("gpt-4.1", False),
        ("gpt-5-chat-latest", False),
        ("gpt-5", True),
        ("openai/o4-mini", True),
        ("codex-mini", True),
        ("gpt-6.1-terra", True),
    ],
)
def test_only_reasoning_models_are_asked_for_reasoning(model: str, asks: bool) -> None:
    out = request_of(user("hi"), to=upstream(model), thinking={"type": "adaptive"})
    assert ("include" in out) == ("reasoning" in out) == asks


def test_summaries_go_only_where_they_may() -> None:
    to = upstream("gpt-5", skip=frozenset({"reasoning.summary"}), effort=("low", "high"))
    out = request_of(user("hi"), to=to, thinking={"type": "adaptive"}, output_config={"effort": "high"})
    assert out["reasoning"] == {"effort": "high"}


def test_a_refused_effort_is_the_next_lower_one() -> None:
    to = upstream("gpt-5.1", skip=frozenset({"effort.xhigh"}), effort=("low", "high", "xhigh"))
    assert request_of(user("hi"), to=to, output_config={"effort": "max"})["reasoning"] == {"effort": "high"}


def test_a_pdf_is_left_out_where_the_server_takes_no_files() -> None:
    """As llama.cpp and Ollama, whose refusal teaches it."""
    for skip in ((), ("files",)):
        out = request_of(user(PDF), to=upstream("m", skip=frozenset(skip)))
        assert ("input_file" in json.dumps(out)) == (not skip)
    assert "a PDF named a.pdf was left out" in json.dumps(out)


def test_what_an_upstream_refuses_is_left_out() -> None:
    quirks = {"drop": ("store",), "prompt_cache_key": True, "extra_body": {"service_tier": "flex"}}
    to = upstream("gpt-5", session="s" * 80, skip=frozenset({"include"}), **quirks)
    out = request_of(user("hi"), to=to)
    assert not {"include", "store"} & out.keys()
    assert (out["prompt_cache_key"], out["service_tier"]) == ("s" * 64, "flex")


@given(BODIES)
@settings(max_examples=200, deadline=None)
def test_any_conversation_makes_a_valid_request(body: Any) -> None:
    before = copy.deepcopy(body)
    items = valid(responses_request(body, upstream("m", effort=("low", "high"))))["input"]
    assert body == before
    calls = [i["call_id"] for i in items if i["type"] == "function_call"]
    assert [i["call_id"] for i in items if i["type"] == "function_call_output"] == calls
    assert not items or items[-1]["type"] != "reasoning"
