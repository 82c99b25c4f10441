"""OpenAI-format clients: requests as the anthropic package types them, answers as the openai package does."""

from __future__ import annotations

import copy
import datetime
import functools
import hashlib
import itertools
import json
from typing import Any, Literal

import anthropic
import anthropic.types
import pydantic
import pytest
import translation
from anthropic.types.message_create_params import MessageCreateParamsStreaming
from hypothesis import given, settings
from hypothesis import strategies as st
from openai.types.chat import ChatCompletion as Completion
from openai.types.chat import ChatCompletionChunk
from openai.types.chat.completion_create_params import CompletionCreateParamsStreaming
from pydantic import TypeAdapter
from translation import (
    FIXTURES,
    IDS,
    SCALARS,
    TEXTS,
    assistant,
    base64_source,
    drain,
    expect_400,
    maybe,
    read,
    stream_of,
    text,
    tool_result,
    tool_use,
    upstream,
    user,
)

from ccmux import (
    AnthropicEvents,
    AnthropicStream,
    ApiError,
    ChatWriter,
    Facts,
    GeminiStream,
    Quirks,
    ResponsesStream,
    Retry,
    Translation,
    Upstream,
    Usage,
    WholeAnswer,
    chat_completion,
    chat_error,
    claude_schema,
    facts_of,
    fitting_request,
    gemini_request,
    messages_request,
    responses_request,
    upstream_error,
    without_foreign_thinking,
)

PARAMS: TypeAdapter[Any] = TypeAdapter(MessageCreateParamsStreaming)
ASKED: TypeAdapter[Any] = TypeAdapter(CompletionCreateParamsStreaming)
EMPTY = {"type": "object", "properties": {}}
PNG = {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}}
CALL = {"id": "call 1", "type": "function", "function": {"name": "Bash", "arguments": '{"command": "ls"}'}}
BASH = {"type": "function", "function": {"name": "Bash", "description": "Runs", "parameters": EMPTY}}
PICK_BASH = {"type": "function", "function": {"name": "Bash"}}
HI = {"role": "user", "content": "hi"}


def valid(out: Any) -> Any:
    """The request, which the anthropic package would have typed the same."""
    json.dumps(out)
    # The package no longer types what its newest models refuse; older models and other providers take it.
    fitted = fitting_request(out, Upstream("m", Quirks(), Facts()))
    known = {k: v for k, v in fitted.items() if k not in ("temperature", "top_p", "stream")}
    drain(PARAMS.validate_python({**known, "stream": True}, extra="forbid"))
    return out


def request_of(*messages: Any, **body: Any) -> Any:
    asked = {"model": "sonnet", "messages": list(messages), **body}
    ASKED.validate_python({**asked, "stream": True})
    return valid(messages_request(asked))


def file(**keys: str) -> Any:
    return {"type": "file", "file": keys}


def deltas_of(chunks: list[ChatCompletionChunk]) -> list[Any]:
    return [c.choices[0].delta.model_dump(exclude_unset=True) for c in chunks]


# Requests

CLOSED = {"type": "object", "properties": {}, "additionalProperties": False}


class Point(pydantic.BaseModel):
    x: float
    y: Literal[1, 2]


class Answer(pydantic.BaseModel):
    """What a client of OpenAI's may ask for."""

    count: int = pydantic.Field(ge=0, le=9, description="How many.")
    name: str | None = pydantic.Field(default=None, pattern="^a")
    kinds: list[Literal["a", "b"]] = pydantic.Field(min_length=1, max_length=3)
    points: list[Point | None] = []
    when: datetime.date
    more: dict[str, int]


def test_a_schema_is_as_anthropics_own_client_makes_it() -> None:
    assert claude_schema(Answer.model_json_schema()) == anthropic.transform_schema(Answer)


def test_conversation() -> None:
    pdf = file(filename="a.pdf", file_data="data:application/pdf;base64,JVBERi0=")
    other = {**CALL, "id": "b", "function": {"name": "Bash", "arguments": "oh"}}
    out = request_of(
        {"role": "system", "content": "Be good."},
        {"role": "developer", "content": [text("Be brief.")]},
        {"role": "user", "content": "look"},
        {"role": "user", "content": [text("at this"), PNG, pdf]},
        {"role": "assistant", "content": None, "tool_calls": [CALL, other]},
        {"role": "tool", "tool_call_id": "call 1", "content": "a.txt"},
        {"role": "tool", "tool_call_id": "b", "content": [text("none")]},
        {"role": "user", "content": "and?"},
        {"role": "system", "content": "Hurry."},
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]},
    )
    id = out["messages"][1]["content"][0]["id"]
    assert id.startswith("ccx_")
    assert out["system"] == [text("Be good."), text("Be brief.")]
    assert out["messages"] == [
        user("look", "at this", translation.PNG, translation.PDF),
        assistant(tool_use(id, command="ls"), tool_use("b", arguments="oh")),
        user(
            tool_result(id, [text("a.txt")]),
            tool_result("b", [text("none")]),
            "and?",
            "<system-reminder>\nHurry.\n</system-reminder>",
        ),
        assistant("No."),
        user("Continue."),
    ]


STRICT = {"schema": {"type": "object"}, "strict": True}
READ = {"type": "function", "function": {"name": "Read"}}


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        pytest.param(
            {},
            {"max_tokens": None, "stream": False, "model": "sonnet", "tools": None, "thinking": None},
            id="nothing asked",
        ),
        pytest.param({"max_completion_tokens": 9, "max_tokens": 8}, {"max_tokens": 9}, id="limit"),
        pytest.param(
            {"temperature": 1.7, "top_p": 0.5, "stop": "x", "user": "u"},
            {"temperature": 1.7, "top_p": 0.5, "stop_sequences": ["x"], "metadata": {"user_id": "u"}},
            id="sampling",
        ),
        pytest.param(
            {"stop": ["a", "b"], "frequency_penalty": 1, "seed": 3, "logit_bias": {}},
            {"stop_sequences": ["a", "b"], "seed": None},
            id="dropped",
        ),
        pytest.param({"stop": ["\n\n", "", "x"]}, {"stop_sequences": ["\n\n", "x"]}, id="stops of blanks"),
        pytest.param(
            {"stop": "", "max_tokens": -1}, {"stop_sequences": None, "max_tokens": None}, id="no limit"
        ),
        pytest.param(
            {"user": "me@example.org"},
            {"metadata": {"user_id": hashlib.sha256(b"me@example.org").hexdigest()}},
            id="a mail address",
        ),
        pytest.param({"reasoning_effort": "minimal"}, {"output_config": {"effort": "minimal"}}, id="effort"),
        pytest.param(
            {"reasoning_effort": "none"},
            {"output_config": None, "thinking": {"type": "disabled"}},
            id="no thinking",
        ),
        pytest.param(
            {"response_format": {"type": "json_schema", "json_schema": {"name": "n", **STRICT}}},
            {"output_config": {"format": {"type": "json_schema", **STRICT}}},
            id="schema",
        ),
        pytest.param(
            {"response_format": {"type": "json_object"}},
            {"system": [text("Answer with one JSON object and nothing else.")]},
            id="json",
        ),
        pytest.param(
            {"tools": [BASH], "tool_choice": "required", "parallel_tool_calls": False},
            {
                "tools": [{"name": "Bash", "description": "Runs", "input_schema": EMPTY}],
                "tool_choice": {"type": "any", "disable_parallel_tool_use": True},
            },
            id="tools",
        ),
        pytest.param(
            {"tools": [BASH], "tool_choice": PICK_BASH},
            {"tool_choice": {"type": "tool", "name": "Bash"}},
            id="one",
        ),
        pytest.param(
            {"tools": [BASH], "tool_choice": "none", "parallel_tool_calls": False},
            {"tool_choice": {"type": "none"}},
            id="none",
        ),
        pytest.param(
            {
                "tools": [BASH, READ],
                "tool_choice": {
                    "type": "allowed_tools",
                    "allowed_tools": {"mode": "required", "tools": [READ]},
                },
            },
            {"tools": [{"name": "Read", "input_schema": EMPTY}], "tool_choice": {"type": "any"}},
            id="some of them",
        ),
        pytest.param(
            {"functions": [BASH["function"]], "function_call": {"name": "Bash"}},
            {"tool_choice": {"type": "tool", "name": "Bash", "disable_parallel_tool_use": True}},
            id="the old form",
        ),
        pytest.param(
            {"web_search_options": {}},
            {"tools": [{"type": "web_search_20250305", "name": "web_search"}]},
            id="web search",
        ),
        pytest.param(
            {"tools": [{"type": "web_search_20250305", "name": "web_search"}]},
            {"tools": [{"type": "web_search_20250305", "name": "web_search"}]},
            id="Anthropic's web search",
        ),
    ],
)
def test_parameters(body: Any, expected: Any) -> None:
    out = request_of(HI, **body)
    assert {k: out.get(k) for k in expected} == expected


def test_anthropic_blocks_and_tools_in_a_chat_request() -> None:
    tool = {"name": "Read", "description": "Reads", "input_schema": EMPTY}
    image = {"type": "image", "source": {"type": "url", "url": "https://a.org/b.png"}}
    call, result = tool_use("toolu_1", "Read", path="a"), tool_result("toolu_1", [text("b"), image])
    asked = {
        "model": "claude-x",
        "tools": [tool, {"type": "function", "name": "flat"}, {"type": "custom", "name": "grammar"}],
        "tool_choice": {"type": "any"},
        "messages": [HI, assistant({"type": "thinking", "thinking": "hm"}, "I read.", call), user(result)],
    }
    out = valid(messages_request(asked))
    assert out["messages"][1:] == [assistant("I read.", call), user(result)]
    assert out["tools"] == [tool, {"name": "flat", "input_schema": EMPTY}]
    assert out["tool_choice"] == {"type": "any"}


@pytest.mark.parametrize(
    ("data", "source"),
    [
        ("text/csv;base64,YSxi", {"type": "text", "media_type": "text/plain", "data": "a,b"}),
        ("application/pdf;name=a%20b.pdf;base64,JVBERi0=", base64_source("application/pdf", "JVBERi0=")),
    ],
    ids=["text", "named"],
)
def test_files(data: str, source: Any) -> None:
    part = file(filename="a", file_data=f"data:{data}")
    [block] = request_of({"role": "user", "content": [part]})["messages"][0]["content"]
    assert block == {"type": "document", "title": "a", "source": source}


def test_cache_control_goes_on() -> None:
    mark = {"cache_control": {"type": "ephemeral"}}
    asked = {
        "model": "m",
        "messages": [
            {"role": "system", "content": "Be good.", **mark},
            {"role": "user", "content": [{**text("look"), **mark}, {**PNG, **mark}, text("hi")]},
        ],
        "tools": [{**BASH, **mark}],
        **mark,
    }
    out = valid(messages_request(asked))
    assert out["system"] == [{**text("Be good."), **mark}]
    assert ["cache_control" in b for b in out["messages"][0]["content"]] == [True, True, False]
    assert out["tools"][0]["cache_control"] == out["cache_control"] == mark["cache_control"]


def test_what_anthropic_refuses_is_not_sent() -> None:
    begin = user("Begin.")
    out = request_of({"role": "system", "content": "Say hi."})
    assert (out["system"], out["messages"]) == ([text("Say hi.")], [begin])
    jpg = {"type": "image_url", "image_url": {"url": "data:image/jpg;base64,aGk="}}
    out = request_of(
        {"role": "assistant", "content": "Hello!"},
        {"role": "user", "content": [text("\n"), jpg]},
        {"role": "assistant", "content": "\n\n", "tool_calls": [{**CALL, "id": "c"}]},
        {"role": "tool", "tool_call_id": "c", "content": " "},
    )
    assert [m["role"] for m in out["messages"]] == ["user", "assistant"] * 2 + ["user"]
    assert out["messages"][0] == begin
    [image] = out["messages"][2]["content"]
    assert image["source"]["media_type"] == "image/jpeg"
    assert [b["type"] for b in out["messages"][3]["content"]] == ["tool_use"]
    assert out["messages"][4]["content"][0]["content"] == []


THINK, ADAPTIVE = {"type": "enabled", "budget_tokens": 20000}, {"type": "adaptive"}
LOW, SAMPLED = {"output_config": {"effort": "low"}}, {"temperature": 1, "top_p": 1}
OFF = {"thinking": {"type": "disabled"}}


@pytest.mark.parametrize(
    ("facts", "model", "given", "sent"),
    [
        (Facts(), "glm", SAMPLED, SAMPLED),
        (Facts(), "claude-haiku-4-5", SAMPLED, {"temperature": 1, "top_p": None}),
        (Facts(sampling=False), "claude-x", SAMPLED, {"temperature": None, "top_p": None}),
        (Facts(), "m", {}, {"max_tokens": 16384}),
        (Facts(max_output=64000), "m", {}, {"max_tokens": 32000}),
        (Facts(max_output=4096), "m", {}, {"max_tokens": 4096}),
        (Facts(max_output=4096), "m", {"max_tokens": 5000}, {"max_tokens": 4096}),
        (Facts(), "m", {"max_tokens": 40000}, {"max_tokens": 40000}),
        (Facts(), "m", {"thinking": THINK}, {"max_tokens": 36384, "thinking": THINK}),
        (Facts(), "claude-haiku-4-5-20251001", {"reasoning_effort": "low"}, {"output_config": {}}),
        (Facts(), "claude-opus-4-20250514", {"reasoning_effort": "low"}, {"output_config": {}}),
        (Facts(), "claude-haiku-5-5", {"reasoning_effort": "none"}, OFF),
        (None, "claude-sonnet-5-5", {"reasoning_effort": "none"}, {**LOW, "thinking": None}),
        (
            None,
            "claude-opus-5-5",
            {"thinking": THINK},
            {"output_config": {"effort": "high"}, "thinking": None},
        ),
        (None, "claude-fable-5", {"thinking": ADAPTIVE}, {"output_config": None, "thinking": ADAPTIVE}),
        (Facts(), "m", {"temperature": 1.7}, {"temperature": 1}),
        (Facts(), "m", {"stop": ["\n\n", "x"]}, {"stop_sequences": ["x"]}),
        (Facts(), "m", {"stop": "\n"}, {"stop_sequences": []}),
        (Facts(), "claude-opus-4-6", {"reasoning_effort": "minimal"}, LOW),
        (Facts(), "claude-opus-4-5", {"reasoning_effort": "low"}, LOW),
        (Facts(), "claude-haiku-5-5", {"reasoning_effort": "low"}, LOW),
        (Facts(), "m", {"reasoning_effort": "none"}, {**OFF, "output_config": None}),
        (Facts(forced_tool=False), "m", {"tool_choice": "required"}, {"tool_choice": {"type": "auto"}}),
        (
            Facts(forced_tool=False),
            "m",
            {"tool_choice": PICK_BASH, "parallel_tool_calls": False},
            {"tool_choice": {"type": "auto", "disable_parallel_tool_use": True}},
        ),
        (Facts(), "m", {"tool_choice": "required"}, {"tool_choice": {"type": "any"}}),
    ],
)
def test_a_model_is_not_sent_what_it_is_known_to_refuse(
    facts: Facts | None, model: str, given: Any, sent: Any
) -> None:
    """By these facts, or those that the table has of it."""
    body = request_of(HI, tools=[BASH], **given)
    out = fitting_request(body, Upstream(model, Quirks(), facts or facts_of(model)))
    assert {key: out.get(key) for key in sent} == sent


def test_a_schema_goes_to_others_than_claude_as_it_came() -> None:
    schema = {"type": "object", "additionalProperties": {"type": "integer", "minimum": 1}}
    wanted = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema, "strict": True}}
    body = request_of(HI, response_format=wanted)
    claude = fitting_request(body, upstream("claude-sonnet-5-5"))["output_config"]
    assert claude == {"format": {"type": "json_schema", "schema": CLOSED}}
    sent = responses_request(body, upstream("gpt-6-codex"))["text"]["format"]
    assert (sent["schema"], sent["strict"]) == (schema, True)
    gemini = gemini_request(body, upstream("gemini-3.8-flash"))["generationConfig"]
    assert gemini["responseJsonSchema"] == schema


def test_results_stand_first_in_their_turn() -> None:
    wait = {"role": "user", "content": "wait"}
    call = {"role": "assistant", "content": None, "tool_calls": [{**CALL, "id": "c"}]}
    out = request_of(wait, call, wait, {"role": "tool", "tool_call_id": "c", "content": "1"})
    assert [b["type"] for b in out["messages"][2]["content"]] == ["tool_result", "text"]


def test_thoughts_go_back_to_those_that_want_them() -> None:
    """As opencode, Qwen Code, Cline, Pydantic AI and the AI SDK send them."""
    thought = {"type": "thinking", "thinking": "Hm.", "signature": ""}
    call = {"role": "assistant", "content": None, "tool_calls": [{**CALL, "id": "c"}]}
    for key in ("reasoning_content", "reasoning"):
        out = request_of({**call, key: "Hm."}, {"role": "tool", "tool_call_id": "c", "content": "1"})
        assert [b["type"] for b in out["messages"][1]["content"]] == ["thinking", "tool_use"]
        assert out["messages"][1]["content"][0] == thought
        assert without_foreign_thinking(out, "deepseek-v4-pro") is out
        kept = without_foreign_thinking(out, "claude-sonnet-5-5")["messages"][1]["content"]
        assert [b["type"] for b in kept] == ["tool_use"]
    for nothing in ("", None, {"a": 1}):
        out = request_of({**call, "content": "hi", "reasoning": nothing})
        assert [b["type"] for b in out["messages"][1]["content"]] == ["text", "tool_use"]
    assert "assistant" not in {
        m["role"] for m in request_of({"role": "assistant", "reasoning": "Hm."})["messages"]
    }


@pytest.mark.parametrize(
    ("arguments", "given"),
    [({"a": 1}, {"a": 1}), ('{"a": 1}', {"a": 1}), ("", {}), (None, {}), ("oh", {"arguments": "oh"})],
)
def test_arguments_of_earlier_calls(arguments: Any, given: Any) -> None:
    said = {"name": "f", "arguments": arguments}, {"name": "f", "input": arguments}
    for call in ({"id": "c", "function": said[0]}, {"id": "c", "type": "custom", "custom": said[1]}):
        out = valid(
            messages_request({"model": "m", "messages": [{"role": "assistant", "tool_calls": [call]}]})
        )
        assert out["messages"][1]["content"] == [tool_use("c", "f", **given)]


def test_an_earlier_refusal_is_what_was_said() -> None:
    out = request_of(HI, {"role": "assistant", "content": None, "refusal": "I will not."}, HI)
    assert out["messages"][1] == assistant("I will not.")


def test_calls_of_the_old_form_have_an_id_each() -> None:
    call = {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": "{}"}}
    result = {"role": "function", "name": "f", "content": "1"}
    out = request_of(HI, call, result, call, result)
    blocks = [m["content"][0] for m in out["messages"][1:]]
    assert [b.get("id") or b["tool_use_id"] for b in blocks] == ["f_1", "f_1", "f_2", "f_2"]


@pytest.mark.parametrize(
    ("body", "words"),
    [
        pytest.param({}, "messages", id="no messages"),
        pytest.param({"messages": [], "n": 2}, "n: only one", id="two choices"),
        pytest.param({"messages": [user({"type": "input_audio"})]}, "input_audio", id="audio"),
        pytest.param({"messages": [], "modalities": ["text", "audio"]}, "only text", id="an answer in audio"),
        *(
            pytest.param(
                {"messages": [], "tools": [tool]}, f"'{tool['type']}' cannot be served", id=tool["type"]
            )
            for tool in ({"type": "custom", "custom": {"name": "patch"}}, {"type": "browser_search"})
        ),
        pytest.param(
            {"messages": [user({"type": "image_url", "image_url": "/etc/passwd"})]}, "http", id="a path"
        ),
        pytest.param({"messages": [user(file(file_id="file-1"))]}, "data: URL", id="a stored file"),
        pytest.param(
            {"messages": [user(file(file_data="data:text/csv;base64,a"))]}, "not base64", id="no base64"
        ),
    ],
)
def test_refused(body: Any, words: str) -> None:
    expect_400(lambda: messages_request(body), words)


def test_a_deep_schema_is_refused() -> None:
    deep = functools.reduce(lambda s, _: {"items": s}, range(99), {})
    body = {"messages": [], "response_format": {"json_schema": {"schema": deep}}}
    expect_400(lambda: fitting_request(messages_request(body), upstream("anthropic")), "nested too deeply")


ANY_PART = maybe(
    type=st.sampled_from(["text", "image_url", "refusal"]),
    text=SCALARS,
    refusal=SCALARS,
    image_url=st.sampled_from([None, {"url": "https://a.org"}, "data:image/png;base64,aGk="]),
)
ANY_FUNCTION = maybe(name=SCALARS, arguments=st.one_of(SCALARS, st.just("{}")))
ANY_CALL = maybe(id=IDS, function=st.one_of(st.none(), ANY_FUNCTION))
ANY_MESSAGE = maybe(
    role=st.sampled_from(["user", "assistant", "system", "tool", "function", None]),
    content=st.one_of(TEXTS, st.none(), st.lists(ANY_PART, max_size=3)),
    tool_calls=st.one_of(SCALARS, st.lists(ANY_CALL, max_size=3)),
    tool_call_id=IDS,
    function_call=st.sampled_from([None, {"name": "a"}]),
    reasoning_content=SCALARS,
)
ANY_VALUE = st.one_of(
    SCALARS, st.lists(SCALARS, max_size=2), st.just({"type": "json_schema"}), st.just([BASH])
)
PARAMETERS = st.sampled_from(
    ["n", "max_tokens", "temperature", "stop", "user", "tools", "functions", "tool_choice", "response_format"]
)


@pytest.mark.parametrize("role", ["system", "assistant"])
def test_only_users_have_pictures(role: str) -> None:
    out = valid(messages_request({"model": "m", "messages": [{"role": role, "content": [PNG, text("hi")]}]}))
    assert (out.get("system") or out["messages"][1]["content"]) == [text("hi")]


@given(st.lists(st.one_of(ANY_MESSAGE, st.none()), max_size=6))
@settings(max_examples=200, deadline=None)
def test_any_conversation_is_valid_or_a_400(messages: list[Any]) -> None:
    body = {"model": "m", "messages": messages}
    before = copy.deepcopy(body)
    try:
        out = messages_request(body)
    except ApiError as error:
        assert error.status == 400
    else:
        roles = [m["role"] for m in valid(out)["messages"]]
        assert all(a != b for a, b in itertools.pairwise(roles))
    assert body == before


@given(st.dictionaries(PARAMETERS, ANY_VALUE))
@settings(max_examples=100, deadline=None)
def test_any_parameters_make_a_request_or_a_400(body: Any) -> None:
    try:
        json.dumps(messages_request({"messages": [], **body}))
    except ApiError as error:
        assert error.status == 400


# Answers

SOURCES = {"responses": (ResponsesStream, "gpt-5.3-codex"), "gemini": (GeminiStream, "gemini-3.8-flash")}
ENDED = [
    pytest.param(path.parent.name, path, id=f"{path.parent.name} {path.stem}")
    for path in sorted(FIXTURES.glob("*/*.sse"))
    if path.parent.name in SOURCES and json.loads(path.with_suffix(".json").read_text())["error"] is None
]


def events_of(format: str, path: Any) -> list[Any]:
    make, model = SOURCES[format]
    return read(stream_of(make, upstream(model)), path.read_bytes())[0]


def completion(model: str, created: int, old_form: bool = False) -> WholeAnswer:
    return WholeAnswer(lambda answer: chat_completion(answer, model, created, old_form))


def chunks_of(data: bytes) -> list[ChatCompletionChunk]:
    *lines, done, end = data.decode().split("\n\n")
    assert (done, end) == ("data: [DONE]", "")
    return [ChatCompletionChunk.model_validate_json(line.removeprefix("data: ")) for line in lines]


@pytest.mark.parametrize(("format", "path"), ENDED)
def test_streamed_and_whole_answers_agree(format: str, path: Any) -> None:
    events = events_of(format, path)
    writer, whole = ChatWriter("sonnet", 1794000000, include_usage=True), completion("sonnet", 1794000000)
    chunks = chunks_of(writer.feed(events[:-1]) + writer.end(events[-1:]))
    whole.feed(events[:-1])
    answer = Completion.model_validate_json(whole.end(events[-1:]))
    deltas = [c.choices[0].delta for c in chunks if c.choices]
    message = answer.choices[0].message
    assert "".join(d.content or "" for d in deltas) == (message.content or "")
    calls: dict[int, list[str]] = {}
    for piece in (p for d in deltas for p in d.tool_calls or []):
        told = (piece.id, piece.function.name, piece.function.arguments)
        known = calls.setdefault(piece.index, ["", "", ""])
        known[:] = [have + (more or "") for have, more in zip(known, told, strict=True)]
    assert [(id, name, json.loads(arguments)) for id, name, arguments in calls.values()] == [
        (c.id, c.function.name, json.loads(c.function.arguments)) for c in message.tool_calls or []
    ]
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == answer.choices[0].finish_reason
    assert chunks[-1].usage == answer.usage
    assert {c.id for c in chunks} == {answer.id} == {"chatcmpl-1"}


def test_chunks_of_an_answer() -> None:
    out = AnthropicStream("msg_1", "m", Usage(input=10, cache_read=5))
    out.thinking("hm")
    out.text("hi")
    out.tool("t1", "Bash")
    out.whole({"type": "server_tool_use", "id": "s", "name": "web_search", "input": {"query": "q"}})
    out.tool("t2", "Read")
    out.tool_input('{"a":1}')
    out.usage = Usage(input=10, output=3, cache_read=5, cache_write=1, cache_write_1h=1)
    out.finish("end_turn")
    events = out.take()
    writer = ChatWriter("sonnet", 7)

    def begins(index: int, id: str, name: str) -> Any:
        function = {"name": name, "arguments": ""}
        return {"tool_calls": [{"index": index, "id": id, "type": "function", "function": function}]}

    chunks = chunks_of(writer.feed(events[:-1]) + writer.end(events[-1:]))
    assert deltas_of(chunks) == [
        {"role": "assistant", "content": ""},
        {"reasoning_content": "hm"},
        {"content": "hi"},
        begins(0, "t1", "Bash"),
        {"tool_calls": [{"index": 0, "function": {"arguments": "{}"}}]},
        begins(1, "t2", "Read"),
        {"tool_calls": [{"index": 1, "function": {"arguments": '{"a":1}'}}]},
        {},
    ]
    assert chunks[-1].choices[0].finish_reason == "tool_calls"
    whole = completion("sonnet", 7)
    usage = Completion.model_validate_json(whole.end(events)).usage
    assert usage is not None
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (17, 3, 20)
    assert usage.prompt_tokens_details is not None
    told = usage.prompt_tokens_details.model_dump(exclude_none=True)
    assert told == {"cached_tokens": 5, "cache_write_tokens": 2}


def test_who_asks_in_the_old_form_is_answered_in_it() -> None:
    out = AnthropicStream("msg_1", "m", Usage())
    out.tool("t1", "Bash")
    out.tool_input('{"a":1}')
    out.tool("t2", "Bash")  # not asked for, and there is no place for it
    out.finish("tool_use")
    events = out.take()
    writer = ChatWriter("sonnet", 7, old_form=True)
    chunks = chunks_of(writer.feed(events[:-1]) + writer.end(events[-1:]))
    assert deltas_of(chunks) == [
        {"role": "assistant", "content": ""},
        {"function_call": {"name": "Bash", "arguments": ""}},
        {"function_call": {"arguments": '{"a":1}'}},
        {},
    ]
    [choice] = Completion.model_validate_json(completion("sonnet", 7, old_form=True).end(events)).choices
    assert choice.message.function_call is not None
    assert choice.message.function_call.model_dump() == {"name": "Bash", "arguments": '{"a": 1}'}
    assert choice.message.tool_calls is None
    assert choice.finish_reason == chunks[-1].choices[0].finish_reason == "function_call"


@pytest.mark.parametrize(
    ("stop", "finish"),
    [
        ("end_turn", "stop"),
        ("max_tokens", "length"),
        ("refusal", "content_filter"),
        ("pause_turn", "stop"),
        ("stop_sequence", "stop"),
    ],
)
def test_finish_reasons(stop: str, finish: str) -> None:
    delta = {"stop_reason": stop, "stop_sequence": None}
    event = {"type": "message_delta", "delta": delta, "usage": {"output_tokens": 1}}
    anthropic.types.RawMessageDeltaEvent.model_validate(event)
    [chunk] = chunks_of(ChatWriter("m", 1).feed([event]) + b"data: [DONE]\n\n")
    assert chunk.choices[0].finish_reason == finish


@pytest.mark.parametrize(
    ("error", "type", "code"),
    [
        (
            ApiError(400, "prompt is too long: 9 tokens > 8 maximum", cause="overflow", retry=Retry.LARGER),
            "invalid_request_error",
            "context_length_exceeded",
        ),
        (ApiError(400, "max_tokens: 9 > 8", cause="overflow"), "invalid_request_error", None),
        (ApiError(401, "no"), "authentication_error", "invalid_api_key"),
        (ApiError(429, "slow"), "rate_limit_error", "rate_limit_exceeded"),
        (ApiError(429, "pay", type="billing_error"), "billing_error", "insufficient_quota"),
        (ApiError(502, "broken"), "api_error", None),
    ],
)
def test_errors(error: ApiError, type: str, code: str | None) -> None:
    assert chat_error(error, "req_1") == {
        "error": {"message": error.message, "type": type, "param": None, "code": code},
        "request_id": "req_1",
    }


def test_an_error_names_the_parameter_that_the_upstream_did() -> None:
    error = upstream_error(400, {"error": {"message": "Not a map.", "param": "logit_bias"}})
    assert chat_error(error, "req_1")["error"]["param"] == "logit_bias"


# From an Anthropic-format upstream


def relayed(client: Any, *events: Any) -> tuple[Translation, bytes]:
    """What an OpenAI client gets of an Anthropic stream."""
    out = AnthropicStream("msg_1", "m", Usage())
    translation = Translation(AnthropicEvents(out, {}, upstream("m")), out, client)
    said = translation.feed(b"".join(b"data: %s\n\n" % json.dumps(e).encode() for e in (START, *events)))
    return translation, said + translation.ending


def block(content: Any, *deltas: Any) -> list[Any]:
    pieces = [{"type": "content_block_delta", "index": 0, "delta": d} for d in deltas]
    start = {"type": "content_block_start", "index": 0, "content_block": content}
    return [start, *pieces, {"type": "content_block_stop", "index": 0}]


def ended(stop: str, **usage: Any) -> list[Any]:
    delta = {"type": "message_delta", "delta": {"stop_reason": stop}, "usage": {"output_tokens": 3, **usage}}
    return [delta, {"type": "message_stop"}]


BEGUN = {"id": "msg_1", "usage": {"input_tokens": 9, "output_tokens": 1}}
START = {"type": "message_start", "message": BEGUN}
TOOL = {"type": "tool_use", "id": "t", "name": "Bash", "input": {}}
HELLO = {"type": "text_delta", "text": "hello"}


def test_an_answer_that_is_broken_off_can_be_counted() -> None:
    words = {"type": "text_delta", "text": "some words"}
    pieces = {"type": "input_json_delta", "partial_json": '{"a'}
    translation, _ = relayed(ChatWriter("m", 1), *block(text(""), words), *block(TOOL, pieces))
    assert translation.output_text() == 'some wordsBash{"a'


@pytest.mark.parametrize(
    ("content", "deltas", "expected", "finish"),
    [
        (TOOL, ['{"command": "ec'], '{"command": "ec', "length"),
        (TOOL, ['{"command": ', '"ls"}'], '{"command": "ls"}', "tool_calls"),
        ({**TOOL, "input": {"command": "ls"}}, [], '{"command": "ls"}', "tool_calls"),
        (TOOL, [], "{}", "length"),
    ],
    ids=["cut off by the limit", "in pieces", "whole in the block's start", "none"],
)
def test_arguments_of_a_call_before_the_limit(
    content: Any, deltas: list[str], expected: str, finish: str
) -> None:
    pieces = [{"type": "input_json_delta", "partial_json": d} for d in deltas]
    events = [*block(content, *pieces), *ended("max_tokens")]
    _, streamed = relayed(ChatWriter("m", 1), *events)
    told = [p for c in chunks_of(streamed) for p in c.choices[0].delta.tool_calls or []]
    assert "".join(p.function.arguments or "" for p in told if p.function) == expected
    _, whole = relayed(completion("m", 1), *events)
    [choice] = Completion.model_validate_json(whole).choices
    assert choice.finish_reason == finish
    assert [c.function.arguments for c in choice.message.tool_calls or [] if c.type == "function"] == [
        expected
    ]


@pytest.mark.parametrize(
    "events",
    [
        pytest.param([START, *block({"type": "text"}, HELLO), *ended("end_turn")], id="a block without its text"),
        pytest.param([START, *block(text("hel"), {"type": "text_delta", "text": "lo"}), *ended("end_turn")],
                     id="text in the block's start"),
        pytest.param([{"type": "message_start", "message": {"id": "msg_1"}}, *block(text(""), HELLO), *ended("end_turn")],
                     id="no usage in message_start"),
        pytest.param([*block(text(""), HELLO), *ended("end_turn")], id="no message_start"),
        pytest.param([START, *block(text(""), HELLO), {"type": "message_delta", "usage": {"output_tokens": 3}},
                     *ended("end_turn")], id="usage in a message_delta of its own"),
        pytest.param([START, *block(None, None, HELLO, {"type": "text_delta"}), {"type": "?"}, *ended("end_turn")], id="odd ones"),
    ],
)  # fmt: skip
def test_events_of_other_servers(events: list[Any]) -> None:
    data = b"".join(b"data: %s\n\n" % json.dumps(e).encode() for e in events)
    for client in (ChatWriter("m", 1), completion("m", 1)):
        out = AnthropicStream("msg_1", "m", Usage())
        translation = Translation(AnthropicEvents(out, {}, upstream("m")), out, client)
        said = translation.feed(data) + translation.finish() + translation.ending
        assert translation.error is None
        if isinstance(client, ChatWriter):
            choices = [c.choices[0] for c in chunks_of(said)]
            assert "".join(c.delta.content or "" for c in choices) == "hello"
            assert [c.finish_reason for c in choices if c.finish_reason] == ["stop"]
        else:
            assert Completion.model_validate_json(said).choices[0].message.content == "hello"


def test_a_null_count_stays_as_it_was() -> None:
    _, whole = relayed(completion("m", 1), *block(text(""), {"type": "text_delta", "text": "a"}),
                       *ended("end_turn", input_tokens=None))  # fmt: skip
    usage = Completion.model_validate_json(whole).usage
    assert usage is not None
    assert (usage.prompt_tokens, usage.completion_tokens) == (9, 3)
