"""Translate: OpenAI Chat, the request side: a row for each row of the translation table."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from hypothesis import given, settings
from openai.types.chat.completion_create_params import CompletionCreateParamsStreaming
from pydantic import TypeAdapter
from translation import (
    BASH,
    BODIES,
    PDF,
    PNG,
    SEARCH,
    assistant,
    base64_source,
    drain,
    expect_400,
    text,
    thinking,
    tool_result,
    tool_use,
    upstream,
    user,
)

from ccmux import (
    ApiError,
    Elements,
    Facts,
    Json,
    Quirks,
    Run,
    Upstream,
    client_tool_id,
    gemini_request,
    gemini_schema,
    openai_request,
    responses_request,
    sign,
    tool_names,
    upstream_name,
    upstream_tool_id,
    with_tool_changes,
)

PARAMS: TypeAdapter[Any] = TypeAdapter(CompletionCreateParamsStreaming)
PLAIN = upstream("gpt-x")


def valid(out: Any) -> Any:
    """The request, once the openai package's own types have accepted it, unknown keys refused."""
    json.dumps(out)
    drain(PARAMS.validate_python(out, extra="forbid"))
    return out


def request_of(*messages: Any, to: Upstream = PLAIN, **body: Any) -> Any:
    return valid(openai_request({"model": "claude-x", "messages": list(messages), **body}, to))


def messages_of(*messages: Any, to: Upstream = PLAIN, **body: Any) -> Any:
    return request_of(*messages, to=to, **body)["messages"]


IMAGE_PART = {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}}
HI = {"role": "user", "content": "hi"}
CALLED = assistant("ok", tool_use("t1", command="ls"))
CALL = {"id": "t1", "type": "function", "function": {"name": "Bash", "arguments": '{"command": "ls"}'}}


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        pytest.param(
            {"system": "be brief"}, [{"role": "system", "content": "be brief"}, HI], id="system text"
        ),
        pytest.param(
            {"system": [text("a"), text("b", cache_control={"type": "x"})]},
            [{"role": "system", "content": "a\n\nb"}, HI],
            id="system blocks joined by blank lines, cache_control dropped",
        ),
        pytest.param(
            {"system": [text("x-anthropic-billing-header: v=1"), text("b")]},
            [{"role": "system", "content": "b"}, HI],
            id="billing header dropped",
        ),
        pytest.param({"system": []}, [HI], id="no system"),
    ],
)
def test_system(body: dict[str, Any], expected: Any) -> None:
    assert messages_of(user("hi"), **body) == expected


def test_cache_control_stays_for_models_that_take_it() -> None:
    to = upstream("anthropic/claude-x", cache_control="claude|gemini")
    mark = {"cache_control": {"type": "ephemeral"}}
    marked, result = text("s", **mark), tool_result("t1", "out", **mark)
    body = {"model": "m", "system": [marked], "messages": [user(marked), CALLED, user(result)]}
    out = openai_request(body, to)["messages"]
    assert out[0]["content"] == [marked]
    assert out[1]["content"] == [marked]
    assert out[3]["content"] == [text("out", **mark)]
    plain = openai_request(body, upstream("openai/gpt", cache_control="claude|gemini"))["messages"]
    assert "cache_control" not in json.dumps(plain)


def left_out(what: str) -> str:
    return f"[{what} was left out: this model cannot {'see' if what == 'an image' else 'read'} it]"


def document(source: Json, **more: Any) -> Json:
    return {"type": "document", "source": source, **more}


FOUND = {"type": "search_result", "title": "T", "source": "u", "content": [text("c")]}


@pytest.mark.parametrize(
    ("messages", "content"),
    [
        pytest.param([user("hi")], "hi", id="only text is a string"),
        pytest.param([user("a", "b")], "a\n\nb", id="two texts"),
        pytest.param([user("look", PNG)], [text("look"), IMAGE_PART], id="image base64"),
        pytest.param(
            [user({"type": "image", "source": {"type": "url", "url": "https://a.test/b.png"}})],
            [{"type": "image_url", "image_url": {"url": "https://a.test/b.png"}}],
            id="image url is passed, never fetched",
        ),
        pytest.param(
            [user(document({"type": "text", "data": "body"}, title="T"))],
            "T\n\nbody",
            id="text document inlined with its title",
        ),
        pytest.param(
            [user(document({"type": "content", "content": [text("c")]}))], "c", id="content document"
        ),
        pytest.param(
            [user(document({"type": "content", "content": [text("c"), PNG]}, title="T"))],
            [text("T"), text("c"), IMAGE_PART],
            id="content document with an image",
        ),
        pytest.param([user(PDF)], left_out("a PDF named a.pdf"), id="PDF where files are not taken"),
        *(
            pytest.param(
                [user({**PDF, "source": base64_source(media_type, data)})], told, id=f"a file of {media_type}"
            )
            for media_type, data, told in (
                ("text/plain", "w7xibGU=", "a.pdf\n\nüble"),
                ("text/csv", "broken", left_out("a file of type text/csv named a.pdf")),
                ("application/zip", "w7xibGU=", left_out("a file of type application/zip named a.pdf")),
            )
        ),
        pytest.param([user(FOUND)], "T\nu\nc", id="search_result as text"),
        pytest.param(
            [user({"type": "tool_reference", "tool_name": "Grep"})],
            "[tool: Grep]",
            id="tool_reference as text",
        ),
        pytest.param(
            [user({"type": "hologram", "x": 1})], '{"type": "hologram", "x": 1}', id="unknown block as text"
        ),
        pytest.param(
            [user({"type": "image", "source": {"type": "file", "file_id": "f"}})],
            left_out("an image"),
            id="an image that is not here",
        ),
        pytest.param([user("a"), user("b")], "a\n\nb", id="turns of one role are merged"),
        pytest.param(
            [user("a"), assistant(thinking("hm")), user("b")],
            "a\n\nb",
            id="turns around one of nothing but thinking are merged",
        ),
        pytest.param(
            [user("a"), assistant({"type": "web_search_tool_result"}), user("b")],
            "a\n\nb",
            id="turns around one of a search that found nothing are merged",
        ),
        pytest.param(
            [user("a"), {"role": "system", "content": "mode on"}],
            "a\n\n<system-reminder>\nmode on\n</system-reminder>",
            id="system in mid-conversation",
        ),
    ],
)
def test_user_content(messages: list[Any], content: Any) -> None:
    assert messages_of(*messages) == [{"role": "user", "content": content}]


def test_what_is_kept_of_a_conversation_may_end_anywhere_in_it() -> None:
    silent = assistant(thinking("hm"))
    results = user(tool_result("t1", "out"))
    turns = [
        user("a"),
        silent,
        user("b"),
        CALLED,
        results,
        silent,
        user("c"),
        silent,
        silent,
        user("d"),
        silent,
    ]
    expected = openai_request({"messages": turns}, PLAIN)["messages"]
    assert [m["role"] for m in expected] == ["user", "assistant", "tool", "user"]
    for translate in (openai_request, responses_request, gemini_request):
        expected = translate({"messages": turns}, PLAIN)
        for end in range(len(turns) + 1):
            elements = Elements(turns, Run(turns[:end]))
            assert translate({"messages": elements}, PLAIN) == expected


@pytest.mark.parametrize("translate", [openai_request, responses_request, gemini_request])
def test_an_image_that_a_model_does_not_take_is_said_to_be_left_out(translate: Any) -> None:
    body = {"messages": [user("x", PNG), CALLED, user(tool_result("t1", [PNG]))]}
    sent = json.dumps(translate(body, upstream("m", vision=False)))
    assert sent.count(left_out("an image")) == 2
    assert "iVBORw0KGgo=" not in sent


@pytest.mark.parametrize("translate", [openai_request, responses_request, gemini_request])
def test_nothing_untrue_is_said_of_a_model_where_an_image_is_not_in_the_request(translate: Any) -> None:
    image = {"type": "image", "source": {"type": "file", "file_id": "f"}}
    sent = json.dumps(translate({"messages": [user(image)]}, upstream("m", vision=True)))
    assert left_out("an image") in sent


def test_files_and_vision_by_quirk() -> None:
    [message] = messages_of(user(PDF), to=upstream("m", files=True))
    file = {"filename": "a.pdf", "file_data": "data:application/pdf;base64,JVBERi0="}
    assert message["content"] == [{"type": "file", "file": file}]
    for to in (upstream("m", vision=False), upstream("m", skip=frozenset({"media"}))):
        [message] = messages_of(user("x", PNG), to=to)
        assert message["content"] == "x\n\n" + left_out("an image")
    [message] = messages_of(user(PDF), to=upstream("m", skip=frozenset({"files"}), files=True))
    assert "was left out" in message["content"]


def changing(*changes: tuple[str, dict[str, Any]]) -> dict[str, Any]:
    return {"role": "system", "content": [{"type": kind, "tool": tool} for kind, tool in changes]}


def named(name: str) -> dict[str, Any]:
    return {"type": "tool_reference", "name": name}


DEFINED = {"type": "tool_definition", "definition": {"name": "c", "input_schema": {"type": "object"}}}


@pytest.mark.parametrize(
    ("changes", "left", "told"),
    [
        pytest.param([("tool_addition", DEFINED)], ["a", "b", "c"], "[tool added: c]", id="defined"),
        pytest.param([("tool_addition", named("b"))], ["a", "b"], "[tool added: b]", id="declared already"),
        pytest.param([("tool_removal", named("a"))], ["b"], "[tool removed: a]", id="removed"),
        pytest.param(
            [("tool_addition", DEFINED), ("tool_removal", named("c"))], ["a", "b"],
            "[tool added: c]\n[tool removed: c]", id="added and removed",
        ),
        pytest.param(
            [("tool_removal", named("a")), ("tool_addition", named("a"))], ["a", "b"],
            "[tool removed: a]\n[tool added: a]", id="back again",
        ),
        pytest.param([("tool_removal", {})], ["a", "b"], "[tool removed: ]", id="of nothing"),
        pytest.param([({}, {})], ["a", "b"], '{"type": {}, "tool": {}}', id="of no kind"),
    ],
)  # fmt: skip
def test_tools_changed_in_mid_conversation(
    changes: list[tuple[str, dict[str, Any]]], left: list[str], told: str
) -> None:
    tools = [{"name": name, "input_schema": {"type": "object"}} for name in ("a", "b")]
    body = {"messages": [user("hi"), changing(*changes)], "tools": tools}
    sent = openai_request(with_tool_changes(body), PLAIN)
    assert [t["function"]["name"] for t in sent["tools"]] == left
    assert sent["messages"][-1]["content"] == f"hi\n\n<system-reminder>\n{told}\n</system-reminder>"


def test_a_request_that_changes_no_tools_stays_the_same_object() -> None:
    body = {"messages": [user("hi"), {"role": "system", "content": "s"}], "tools": [{"name": "a"}]}
    assert with_tool_changes(body) is body


def test_midway_system_by_quirk() -> None:
    turns = user("a"), {"role": "system", "content": "s"}, user("b")
    out = messages_of(*turns, to=upstream("m", midway_system=True))
    assert [(m["role"], m["content"]) for m in out] == [("user", "a"), ("system", "s"), ("user", "b")]


def tool(id: str, content: str) -> Any:
    return {"role": "tool", "tool_call_id": id, "content": content}


RESULTS_READ = {"role": "assistant", "content": "I have the results."}


@pytest.mark.parametrize(
    ("blocks", "expected"),
    [
        pytest.param(
            [tool_result("t1", "out"), text("and")], [tool("t1", "out\n\nand")], id="text joins the result"
        ),
        pytest.param(
            [tool_result("t1", ""), text("and")], [tool("t1", "and")], id="text joins an empty result"
        ),
        pytest.param(
            [tool_result("t1", [PNG])],
            [
                tool("t1", "[image: in the next user message]"),
                RESULTS_READ,
                {"role": "user", "content": [IMAGE_PART]},
            ],
            id="an image cannot",
        ),
    ],
)
@pytest.mark.parametrize(
    "to",
    [upstream("m", user_after_tool=False), upstream("m", skip=frozenset({"user_after_tool"}))],
    ids=["by quirk", "learnt"],
)
def test_no_user_message_behind_a_tools(to: Upstream, blocks: list[Any], expected: Any) -> None:
    turns = [user("hi"), CALLED, user(*blocks)]
    assert messages_of(*turns, to=to)[2:] == expected
    kept = Elements(turns, Run(turns))
    assert openai_request({"messages": kept}, PLAIN)["messages"][2:] != expected
    assert openai_request({"messages": kept}, to)["messages"][2:] == expected


@pytest.mark.parametrize(
    ("results", "expected"),
    [
        pytest.param([tool_result("t1", "out")], [tool("t1", "out")], id="string"),
        pytest.param(
            [tool_result("t1", [text("a"), text("b")])], [tool("t1", "a\n\nb")], id="text blocks joined"
        ),
        pytest.param([{"type": "tool_result", "tool_use_id": "t1"}], [tool("t1", "")], id="absent content"),
        pytest.param([tool_result("t1", "no", is_error=True)], [tool("t1", "Error: no")], id="is_error"),
        pytest.param(
            [tool_result("t1", [text("see"), PNG])],
            [
                tool("t1", "see\n\n[image: in the next user message]"),
                {"role": "user", "content": [IMAGE_PART]},
            ],
            id="an image moves to the user message after",
        ),
        pytest.param(
            [tool_result("t1", [{"type": "tool_reference", "tool_name": "Grep"}])],
            [tool("t1", "[tool: Grep]")],
            id="tool_reference",
        ),
        pytest.param(
            [tool_result("other", "x"), text("go on")],
            [tool("t1", "No result was recorded for this call."), {"role": "user", "content": "go on"}],
            id="orphan dropped, unanswered call answered",
        ),
        pytest.param(
            [tool_result("t1", "first"), tool_result("t1", "last")],
            [tool("t1", "last")],
            id="of duplicates the last",
        ),
        pytest.param(
            [text("and"), tool_result("t1", "out")],
            [tool("t1", "out"), {"role": "user", "content": "and"}],
            id="the rest of the turn comes after the results",
        ),
    ],
)
def test_tool_results(results: list[Any], expected: Any) -> None:
    called = {"role": "assistant", "content": "ok", "tool_calls": [CALL]}
    assert messages_of(user("hi"), CALLED, user(*results)) == [HI, called, *expected]


def test_results_come_in_the_order_of_the_calls() -> None:
    calls = assistant(tool_use("a"), tool_use("b"), tool_use("c"))
    out = messages_of(
        user("hi"), calls, user(tool_result("c", "3"), tool_result("a", "1"), tool_result("b", "2"))
    )
    assert [(m["tool_call_id"], m["content"]) for m in out[2:]] == [("a", "1"), ("b", "2"), ("c", "3")]


def test_a_call_at_the_very_end_is_answered_neutrally() -> None:
    assert messages_of(user("hi"), CALLED)[-1] == tool("t1", "No result was recorded for this call.")


@pytest.mark.parametrize(
    ("blocks", "expected"),
    [
        pytest.param(
            [tool_use("t1", command="ls")], {"content": None, "tool_calls": [CALL]}, id="no text is null"
        ),
        pytest.param([text(""), text("a")], {"content": "a"}, id="empty text skipped"),
        pytest.param(
            [{**tool_use("t1"), "input": None}],
            {"content": None, "tool_calls": [{**CALL, "function": {"name": "Bash", "arguments": "{}"}}]},
            id="null input",
        ),
        pytest.param(
            [{"type": "tool_use", "id": "t1", "name": "Bash", "input": [1]}],
            {"content": None, "tool_calls": [{**CALL, "function": {"name": "Bash", "arguments": "{}"}}]},
            id="input that is no object",
        ),
        pytest.param(
            [thinking("why"), {"type": "redacted_thinking", "data": "x"}, text("a")],
            {"content": "a"},
            id="thinking and redacted thinking dropped",
        ),
        pytest.param(
            [text("a"), {"type": "web_search_tool_result"}, text("b")],
            {"content": "a\n\nb"},
            id="a search that found nothing is no blank paragraph",
        ),
        pytest.param([PNG], {"content": left_out("an image")}, id="an image is not written out"),
    ],
)
def test_assistant_turn(blocks: list[Any], expected: Any) -> None:
    assert messages_of(user("hi"), assistant(*blocks))[1] == {"role": "assistant", **expected}


@pytest.mark.parametrize(
    ("replay", "blocks", "expected"),
    [
        ("none", [thinking("why"), tool_use("t1")], None),
        ("tool_turns", [thinking("why"), tool_use("t1")], "why"),
        ("tool_turns", [tool_use("t1")], " "),
        ("tool_turns", [thinking("why"), text("a")], None),
        ("all", [thinking("why"), text("a")], "why"),
        ("all", [text("a")], None),
    ],
)
def test_reasoning_replay(replay: str, blocks: list[Any], expected: str | None) -> None:
    body = {"model": "m", "messages": [user("hi"), assistant(*blocks)]}
    message = openai_request(body, upstream("m", reasoning_replay=replay))["messages"][1]
    assert message.get("reasoning_content") == expected


def test_openrouters_details_go_back_verbatim_to_their_own_model_only() -> None:
    details = [{"type": "reasoning.encrypted", "data": "e"}]
    block = {"type": "thinking", "thinking": "w", "signature": sign({"details": details, "model": "m"})}
    body = {"model": "m", "messages": [user("hi"), assistant(block, tool_use("t1"))]}
    to = upstream("m", reasoning_key="reasoning_details")
    assert openai_request(body, to)["messages"][1]["reasoning_details"] == details
    other = upstream("n", reasoning_key="reasoning_details")
    assert "reasoning_details" not in openai_request(body, other)["messages"][1]


@pytest.mark.parametrize(
    ("model", "signed"), [("gemini-3.8-flash", [True, False]), ("gemini-2.5-pro", [False, False])]
)
def test_gemini_is_told_of_calls_that_another_model_made(model: str, signed: list[bool]) -> None:
    to = upstream(model, reasoning_key="extra_content")
    calls = assistant(
        thinking("why", {"model": "other", "extra": {"a": {"x": 1}}}), tool_use("a"), tool_use("b")
    )
    sent = openai_request({"messages": [user("hi"), calls]}, to)["messages"][1]["tool_calls"]
    dummy = {"google": {"thought_signature": "skip_thought_signature_validator"}}
    assert [c.get("extra_content") for c in sent] == [dummy if s else None for s in signed]
    own = assistant(thinking("why", {"model": model, "extra": {"a": {"x": 1}}}), tool_use("a"))
    sent = openai_request({"messages": [user("hi"), own]}, to)["messages"][1]["tool_calls"]
    assert [c.get("extra_content") for c in sent] == [{"x": 1}]


# Tools.


def test_tools() -> None:
    given = [
        {**BASH, "cache_control": {"type": "ephemeral"}, "defer_loading": True},
        {"type": "custom", "name": "mcp__" + "x" * 70, "input_schema": {}},
        {"type": "text_editor_20250728", "name": "str_replace_based_edit_tool"},
    ]
    tools = request_of(user("hi"), tools=given)["tools"]
    bash = {"name": "Bash", "description": "Runs", "parameters": BASH["input_schema"]}
    assert tools[0] == {"type": "function", "function": bash}
    assert len(tools) == 2
    assert len(tools[1]["function"]["name"]) <= 64
    assert tools[1]["function"]["parameters"] == {"type": "object", "properties": {}}


@pytest.mark.parametrize("name", ["Bash", "x" * 65, "a b", "ü", "mcp__s__" + "y" * 90, "\ud800"])
def test_names_map_back_exactly(name: str) -> None:
    names = tool_names({"tools": [{"name": name}, {"name": name + "2"}]})
    assert len(set(names.values())) == 2
    assert all(
        len(v) <= 64 and v.replace("_", "").replace("-", "").isalnum() and v.isascii() for v in names.values()
    )
    assert upstream_name(name) == names[name]


@pytest.mark.parametrize("id", ["call_1", "functions.Read:0", "ü/1", "x" * 44 + ".", ""])
def test_ids_map_back_exactly(id: str) -> None:
    client = client_tool_id(id)
    assert len(client) <= 64
    if id:
        assert client.replace("_", "").replace("-", "").isalnum()
        assert upstream_tool_id(client) == id


def test_an_id_too_long_to_pack_is_hashed_alike_everywhere() -> None:
    long = "call." + "x" * 200
    assert client_tool_id(long) == client_tool_id(long)
    assert len(client_tool_id(long)) <= 64
    call, result = messages_of(user("hi"), assistant(tool_use(long)), user(tool_result(long)))[1:]
    assert call["tool_calls"][0]["id"] == result["tool_call_id"]


def test_ids_of_a_pattern() -> None:
    to = upstream("m", tool_id="[A-Za-z0-9]{9}")
    out = messages_of(user("hi"), assistant(tool_use("toolu_1")), user(tool_result("toolu_1")), to=to)
    id = out[1]["tool_calls"][0]["id"]
    assert len(id) == 9
    assert id.isalnum()
    assert out[2]["tool_call_id"] == id


@pytest.mark.parametrize(
    ("choice", "quirks", "expected"),
    [
        ({"type": "auto"}, {}, {"tool_choice": "auto"}),
        ({"type": "any"}, {}, {"tool_choice": "required"}),
        ({"type": "none"}, {}, {"tool_choice": "none"}),
        (
            {"type": "tool", "name": "Bash"},
            {},
            {"tool_choice": {"type": "function", "function": {"name": "Bash"}}},
        ),
        ({"type": "any"}, {"forced_tool": False}, {"tool_choice": "auto"}),
        ({"type": "tool", "name": "Bash"}, {"forced_tool": False}, {"tool_choice": "auto"}),
        (
            {"type": "auto", "disable_parallel_tool_use": True},
            {},
            {"tool_choice": "auto", "parallel_tool_calls": False},
        ),
        (None, {}, {}),
    ],
)
def test_tool_choice(choice: Any, quirks: dict[str, Any], expected: Any) -> None:
    out = request_of(user("hi"), tools=[BASH], tool_choice=choice, to=upstream("m", **quirks))
    assert {k: out[k] for k in ("tool_choice", "parallel_tool_calls") if k in out} == expected


def test_no_tool_choice_without_tools() -> None:
    assert "tool_choice" not in request_of(user("hi"), tool_choice={"type": "any"})


def test_models_that_refuse_forced_calls() -> None:
    to = Upstream("m", Quirks(), Facts(forced_tool=False))
    assert request_of(user("hi"), tools=[BASH], tool_choice={"type": "any"}, to=to)["tool_choice"] == "auto"


@pytest.mark.parametrize(
    ("schema", "expected"),
    [
        pytest.param(
            {"$schema": "x", "exclusiveMinimum": 1, "type": "number"}, {"type": "number"}, id="keywords"
        ),
        pytest.param({"const": "a"}, {"type": "string", "enum": ["a"]}, id="const"),
        pytest.param({"type": ["string", "null"]}, {"type": "string", "nullable": True}, id="nullable"),
        pytest.param({"type": "string", "format": "uri"}, {"type": "string"}, id="format beyond its list"),
        pytest.param(
            {"type": "string", "format": "date-time"}, {"type": "string", "format": "date-time"}, id="format"
        ),
        pytest.param(
            {"type": "array"}, {"type": "array", "items": {"type": "string"}}, id="array without items"
        ),
        pytest.param(
            {
                "$defs": {"P": {"type": "integer"}},
                "type": "object",
                "properties": {"p": {"$ref": "#/$defs/P"}},
            },
            {"type": "object", "properties": {"p": {"type": "integer"}}},
            id="$ref inlined",
        ),
        pytest.param(
            {"oneOf": [{"type": "string"}, {"type": "integer"}]},
            {"anyOf": [{"type": "string"}, {"type": "integer"}]},
            id="oneOf",
        ),
        pytest.param(
            {"type": "object", "properties": {"a": {}}, "required": ["a", "gone"], "propertyNames": {}},
            {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]},
            id="required names what is there",
        ),
        pytest.param(
            {"type": "string", "enum": ["", "a", None]},
            {"type": "string", "enum": ["a"], "nullable": True},
            id="no empty value",
        ),
        pytest.param({"enum": [""]}, {"type": "string"}, id="no empty enum"),
        pytest.param(
            {"type": "integer", "enum": [1, 2], "description": "How many."},
            {"type": "integer", "description": "How many. One of 1, 2."},
            id="an enum of numbers",
        ),
        pytest.param(
            {"const": True}, {"type": "boolean", "description": "One of true."}, id="a const of no string"
        ),
        pytest.param(
            {"properties": {"a": {"type": "string"}}, "required": ["a"]},
            {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]},
            id="an object without a type",
        ),
        pytest.param(
            {"type": "string", "properties": {"a": {}}, "required": ["a"], "items": {"$id": "x"}},
            {"type": "string"},
            id="a string with properties",
        ),
        pytest.param(
            {"items": {"type": "string", "$id": "x"}},
            {"type": "array", "items": {"type": "string"}},
            id="an array without a type",
        ),
        pytest.param(
            {"type": "array", "items": {"additionalProperties": True}},
            {"type": "array", "items": {"type": "string"}},
            id="items of nothing known",
        ),
    ],
)
def test_schema_cleaning_for_gemini(schema: Any, expected: Any) -> None:
    before = copy.deepcopy(schema)
    assert gemini_schema(schema) == expected
    assert schema == before


def test_a_schema_that_refers_to_itself_ends() -> None:
    again = {"$ref": "#/$defs/N"}
    json.dumps(gemini_schema({"$defs": {"N": {"type": "object", "properties": {"n": again}}}, **again}))


def test_schemas_are_cleaned_only_where_needed() -> None:
    loud = {"type": "object", "properties": {"a": {"type": "number", "exclusiveMinimum": 0}}, "$schema": "x"}
    body = {"messages": [user("hi")], "tools": [{"name": "T", "input_schema": loud}]}
    kept = openai_request(body, PLAIN)["tools"][0]["function"]["parameters"]
    assert kept == loud
    cleaned = openai_request(body, upstream("m", schema="gemini"))["tools"][0]["function"]["parameters"]
    assert cleaned == {"type": "object", "properties": {"a": {"type": "number"}}}


# Limits, sampling, thinking.


@pytest.mark.parametrize(
    ("model", "key"),
    [
        ("gpt-4o", "max_tokens"),
        ("gpt-5", "max_completion_tokens"),
        ("gpt-6.1-terra", "max_completion_tokens"),
        ("o3", "max_completion_tokens"),
        ("openai/gpt-5-mini", "max_completion_tokens"),
        ("glm-5.3", "max_tokens"),
    ],
)
def test_name_of_the_output_limit(model: str, key: str) -> None:
    assert request_of(user("hi"), max_tokens=20, to=upstream(model))[key] == 20


@pytest.mark.parametrize(
    ("model", "refused", "sent"),
    [
        ("deployed", ["max_tokens"], {"max_completion_tokens": 20}),
        ("gpt-5", ["max_completion_tokens"], {"max_tokens": 20}),
        ("m", ["max_tokens", "max_completion_tokens"], {}),
    ],
)
def test_an_output_limit_that_was_refused_has_its_other_name(
    model: str, refused: list[str], sent: dict[str, int]
) -> None:
    out = request_of(user("hi"), max_tokens=20, to=upstream(model, skip=frozenset(refused)))
    assert {k: v for k, v in out.items() if k.startswith("max_")} == sent


@pytest.mark.parametrize(("model", "limit"), [("gpt-4o", 1), ("gpt-5", 16), ("openai/o3", 16)])
def test_a_reasoning_model_gets_room_to_begin(model: str, limit: int) -> None:
    sent = request_of(user("Hi"), max_tokens=1, to=upstream(model))
    assert limit in (sent.get("max_tokens"), sent.get("max_completion_tokens"))


def test_output_limit_is_clamped_to_what_the_model_can_make() -> None:
    to = Upstream("m", Quirks(max_tokens_key="max_completion_tokens"), Facts(max_output=100))
    assert request_of(user("hi"), max_tokens=32000, to=to)["max_completion_tokens"] == 100


def test_sampling() -> None:
    given = {"temperature": 0.5, "top_p": 0.9, "top_k": 5}
    out = request_of(user("hi"), **given)
    assert (out["temperature"], out["top_p"]) == (0.5, 0.9)
    assert "top_k" not in out
    assert openai_request({"messages": [], **given}, upstream("m", top_k=True))["top_k"] == 5
    refusing = Upstream("m", Quirks(), Facts(sampling=False))
    assert not {"temperature", "top_p"} & request_of(user("hi"), to=refusing, **given).keys()


def test_stop_sequences_are_the_first_four() -> None:
    assert request_of(user("hi"), stop_sequences=list("abcdef"))["stop"] == list("abcd")


ALL = ("minimal", "low", "medium", "high", "xhigh", "max")


@pytest.mark.parametrize(
    ("body", "allowed", "expected"),
    [
        ({"thinking": {"type": "enabled", "budget_tokens": 1023}}, ALL, "minimal"),
        ({"thinking": {"type": "enabled", "budget_tokens": 4096}}, ALL, "low"),
        ({"thinking": {"type": "enabled", "budget_tokens": 12288}}, ALL, "medium"),
        ({"thinking": {"type": "enabled", "budget_tokens": 24576}}, ALL, "high"),
        ({"thinking": {"type": "enabled", "budget_tokens": 24577}}, ALL, "xhigh"),
        ({"thinking": {"type": "adaptive"}, "output_config": {"effort": "max"}}, ALL, "max"),
        ({"output_config": {"effort": "max"}}, ("low", "high"), "high"),
        ({"output_config": {"effort": "medium"}}, ("low", "high", "max"), "low"),
        ({"thinking": {"type": "enabled", "budget_tokens": 5}}, ("low", "high"), "low"),
        ({"thinking": {"type": "adaptive"}}, ALL, None),
        ({"thinking": {"type": "disabled"}, "output_config": {"effort": "high"}}, ALL, None),
        ({"output_config": {"effort": "high"}}, (), None),
        ({"output_config": {"effort": "?"}}, ALL, None),
    ],
)
def test_effort(body: Any, allowed: tuple[str, ...], expected: str | None) -> None:
    out = openai_request({"messages": [user("hi")], **body}, upstream("m", effort=allowed))
    assert out.get("reasoning_effort") == expected


@pytest.mark.parametrize("strict", [None, True, False])
def test_output_format(strict: bool | None) -> None:
    schema = {"type": "object", "properties": {}}
    wanted = {"type": "json_schema", "schema": schema} | ({} if strict is None else {"strict": strict})
    out = request_of(user("hi"), output_config={"format": wanted})["response_format"]
    named = {"name": "answer", "schema": schema} | ({} if strict is None else {"strict": strict})
    assert out == {"type": "json_schema", "json_schema": named}


# What stays behind, and what is added.


def test_nothing_anthropic_only_leaks() -> None:
    extras = {
        "metadata": {"user_id": "u"}, "context_management": {}, "service_tier": "auto", "betas": ["x"],
        "container": "c", "unheard_of": 1, "thinking": {"type": "adaptive"},
    }  # fmt: skip
    kept = {"model": "gpt-x", "messages": [HI], "stream": True, "stream_options": {"include_usage": True}}
    assert request_of(user("hi"), **extras) == kept


def test_stream_options_by_quirk() -> None:
    assert "stream_options" not in request_of(user("hi"), to=upstream("m", stream_options=False))


def test_prompt_cache_key_is_the_session() -> None:
    to = upstream("m", session="s" * 80, prompt_cache_key=True)
    assert request_of(user("hi"), to=to)["prompt_cache_key"] == "s" * 64
    assert "prompt_cache_key" not in request_of(user("hi"), to=upstream("m", session="s"))


def test_extra_body_and_drop_and_learnt_parameters() -> None:
    to = upstream("m", skip=frozenset({"temperature"}), extra_body={"seed": 1}, drop=("top_p",))
    out = request_of(user("hi"), temperature=1, top_p=1, to=to)
    assert out["seed"] == 1
    assert not {"temperature", "top_p"} & out.keys()


def test_no_web_search_is_forced_as_a_function() -> None:
    to = upstream("m", web_search="options")
    out = request_of(
        user("hi"), tools=[SEARCH, BASH], tool_choice={"type": "tool", "name": "web_search"}, to=to
    )
    assert out["tool_choice"] == "auto"


def test_web_search() -> None:
    out = request_of(user("hi"), tools=[SEARCH], to=upstream("m", web_search="options"))
    place = {"type": "approximate", "approximate": {"city": "Oslo"}}
    assert out["web_search_options"] == {"user_location": place}
    assert "tools" not in out
    body = {"messages": [user("hi")], "tools": [SEARCH]}
    assert openai_request(body, upstream("m", web_search="plugin"))["plugins"] == [{"id": "web"}]
    expect_400(lambda: openai_request(body, PLAIN), "set `websearch` in")
    refused = upstream("m", skip=frozenset({"web_search_options"}), web_search="options")
    expect_400(lambda: openai_request(body, refused), "set `websearch` in")


# Any conversation.


@settings(max_examples=200, deadline=None)
@given(body=BODIES)
def test_any_conversation_becomes_a_valid_request(body: Any) -> None:
    before = copy.deepcopy(body)
    to = upstream("m", effort=("low", "high"), web_search="options", files=True)
    try:
        out = valid(openai_request(body, to))
    except ApiError as error:
        assert error.status == 400
        return
    finally:
        assert body == before
    open_calls: list[str] = []
    for message in out["messages"]:
        if message["role"] == "tool":
            assert message["tool_call_id"] == open_calls.pop(0)
            continue
        assert not open_calls
        open_calls = [c["id"] for c in message.get("tool_calls", ())]
        for call in message.get("tool_calls", ()):
            assert isinstance(json.loads(call["function"]["arguments"]), dict)
    assert not open_calls


@pytest.mark.parametrize(
    "messages",
    [[{"role": "user", "content": "x"}] * 60_000, [{"role": "user", "content": [text("x")] * 60_000}]],
    ids=["messages", "blocks"],
)
def test_many_neighbours_cost_no_time(messages: list[Json]) -> None:
    """Square where each is joined to all before it: 12 s."""
    (message,) = openai_request({"messages": messages}, upstream("m"))["messages"]
    assert message == {"role": "user", "content": "\n\n".join(["x"] * 60_000)}
