"""Gemini: requests as the google-genai package types them, golden streams; both fed anything at all."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from google.genai import types
from hypothesis import given, settings
from hypothesis import strategies as st
from translation import (
    BASH,
    BODIES,
    FIXTURES,
    PDF,
    PNG,
    SEARCH,
    assistant,
    check_cuts,
    check_failure,
    check_golden,
    check_grammar,
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

import ccmux
from ccmux import GeminiStream, Retry, Usage, collect, gemini_request, gemini_usage

FLASH = upstream("gemini-3.8-flash")
CASES = sorted(p.stem for p in (FIXTURES / "gemini").glob("*.sse"))
BODY_KEYS = {"contents", "systemInstruction", "tools", "toolConfig", "generationConfig"}
DUMMY = "skip_thought_signature_validator"
ADAPTIVE, OFF = {"thinking": {"type": "adaptive"}}, {"thinking": {"type": "disabled"}}


def valid(out: Any) -> Any:
    """The request, which the google-genai package would have typed the same."""
    json.dumps(out)
    assert out.keys() <= BODY_KEYS
    for content in out["contents"]:
        assert content["parts"]
        types.Content.model_validate(content)
    if "systemInstruction" in out:
        types.Content.model_validate(out["systemInstruction"])
    for tool in out.get("tools", ()):
        types.Tool.model_validate(tool)
    types.ToolConfig.model_validate(out.get("toolConfig", {}))
    types.GenerationConfig.model_validate(out.get("generationConfig", {}))
    return out


def request_of(*messages: Any, to: Any = FLASH, **body: Any) -> Any:
    return valid(gemini_request({"model": "claude-x", "messages": list(messages), **body}, to))


# Streams


@pytest.mark.parametrize("case", CASES)
def test_golden(case: str) -> None:
    events, error = read(flash(), (FIXTURES / "gemini" / f"{case}.sse").read_bytes())
    check_grammar(events, ended=error is None)
    check_golden(FIXTURES / "gemini" / f"{case}.json", golden(events, error))


@pytest.mark.parametrize("case", CASES)
def test_fixture_is_what_google_sends(case: str) -> None:
    for line in (FIXTURES / "gemini" / f"{case}.sse").read_text().splitlines():
        if line.startswith("data: ") and '"error"' not in line:
            types.GenerateContentResponse.model_validate_json(line[6:])


@pytest.mark.parametrize("case", CASES)
def test_cut_anywhere(case: str) -> None:
    check_cuts(flash, (FIXTURES / "gemini" / f"{case}.sse").read_bytes())


def flash() -> GeminiStream:
    return stream_of(GeminiStream, FLASH)


def said(*parts: Any, finish: str = "STOP") -> Any:
    content = {"role": "model", "parts": list(parts)}
    return {"candidates": [{"content": content, "finishReason": finish}]}


@pytest.mark.parametrize(
    ("finish", "stop"),
    [
        ("STOP", "end_turn"),
        ("MAX_TOKENS", "max_tokens"),
        ("SAFETY", "refusal"),
        ("RECITATION", "refusal"),
        ("PROHIBITED_CONTENT", "refusal"),
        ("A_NEW_ONE", "end_turn"),
    ],
)
def test_finish_reasons(finish: str, stop: str) -> None:
    events, error = read(flash(), sse(said({"text": "x"}, finish=finish)))
    assert error is None
    assert events[-2]["delta"]["stop_reason"] == stop


def test_a_whole_call_before_the_limit_is_one_to_run() -> None:
    call = said({"functionCall": {"name": "Bash", "args": {"command": "ls"}}}, finish="MAX_TOKENS")
    events, _ = read(flash(), sse(call))
    assert events[-2]["delta"]["stop_reason"] == "tool_use"


@pytest.mark.parametrize("id", [{}, {"id": "f1"}], ids=["no id", "the same id"])
def test_calls_that_their_ids_do_not_tell_apart_get_their_own_results(id: Any) -> None:
    calls = [{"functionCall": {"name": "Bash", "args": {"n": n}, **id}} for n in (1, 2)]
    events, _ = read(flash(), sse(said(*calls)))
    made = collect(events)["content"]
    first, second = (block["id"] for block in made)
    assert first != second
    results = user(tool_result(second, "two"), tool_result(first, "one"))
    sent = request_of(user("hi"), {"role": "assistant", "content": made}, results)["contents"]
    assert [p["functionCall"]["args"]["n"] for p in sent[1]["parts"]] == [1, 2]
    assert [p["functionResponse"]["response"]["output"] for p in sent[2]["parts"]] == ["one", "two"]


@pytest.mark.parametrize("reason", ["SAFETY", "OTHER", "JAILBREAK"])
def test_a_blocked_prompt_is_refused(reason: str) -> None:
    events, error = read(flash(), sse({"promptFeedback": {"blockReason": reason}}))
    assert error is None
    assert events[-2]["delta"]["stop_reason"] == "refusal"
    assert reason in collect(events)["content"][0]["text"]


def test_a_part_that_is_text_and_a_call_whose_arguments_are_text() -> None:
    part = {"text": "I look.", "functionCall": {"name": "Bash", "args": '{"command": "ls"}'}}
    events, error = read(flash(), sse(said(part)))
    assert error is None
    text, call = collect(events)["content"]
    assert (text["text"], call["input"]) == ("I look.", {"command": "ls"})


@pytest.mark.parametrize(
    ("events", "status", "retry", "cause"),
    [
        pytest.param([said()], 502, Retry.SAME, "empty", id="nothing in it"),
        pytest.param([said({"text": "x"}, finish="")], 502, Retry.SAME, "stream", id="cut off"),
        pytest.param([said({"text": "x"}, finish="OTHER")], 502, Retry.SAME, "stream", id="ended for no reason"),
        pytest.param([said(finish="MISSING_THOUGHT_SIGNATURE")], 400, Retry.NO, "stream", id="our mistake"),
        pytest.param([said({"functionCall": {"args": {}}})], 502, Retry.SAME, "stream", id="a call without a name"),
        pytest.param([said({"functionCall": {"name": "Bash", "args": "ls"}})], 502, Retry.SAME, "stream",
                     id="arguments of no form"),
        pytest.param(["<html>"], 502, Retry.SAME, "stream", id="not JSON"),
        pytest.param([[{"error": {"code": 429, "status": "RESOURCE_EXHAUSTED", "message": "quota"}}]], 429, Retry.KEY,
                     "http_429", id="in a list"),
        pytest.param([{"error": {"code": 400, "message": "The input token count (1200000) exceeds the maximum (1048576)."}}],
                     400, Retry.LARGER, "overflow", id="too long"),
    ],
)  # fmt: skip
def test_failures(events: list[Any], status: int, retry: Retry, cause: str) -> None:
    check_failure(flash(), sse(*events), status, retry, cause)


@pytest.mark.parametrize(
    ("usage", "expected"),
    [
        pytest.param(
            {
                "promptTokenCount": 100,
                "candidatesTokenCount": 5,
                "thoughtsTokenCount": 7,
                "cachedContentTokenCount": 60,
            },
            Usage(40, 12, 60),
            id="all",
        ),
        pytest.param(
            {"promptTokenCount": 100, "toolUsePromptTokenCount": 11},
            Usage(111, 0),
            id="what tools said is input",
        ),
        pytest.param(
            {"promptTokenCount": 60, "cachedContentTokenCount": 60}, Usage(0, 0, 60), id="all of it cached"
        ),
        pytest.param({"promptTokenCount": 1, "candidatesTokenCount": None}, Usage(1, 0), id="null is 0"),
        pytest.param({"promptTokenCount": 1, "candidatesTokenCount": -1}, None, id="absurd"),
        pytest.param({"candidatesTokenCount": 1}, None, id="no prompt"),
        pytest.param({"promptTokenCount": 0, "candidatesTokenCount": 0}, Usage(), id="a reported 0 stands"),
        pytest.param(None, None, id="none"),
    ],
)
def test_usage(usage: Any, expected: Usage | None) -> None:
    assert gemini_usage(usage) == expected


ANY_PART = maybe(
    text=st.sampled_from(["", "a", None, 3, "\ud800"]),
    thought=st.booleans(),
    thoughtSignature=st.sampled_from(["c2ln", "", None, 4]),
    functionCall=st.sampled_from([
        None, {"name": "Bash"}, {"name": "Bash", "args": {"a": 1}, "id": "x y"}, {"args": 3}, {"name": "B", "args": None},
    ]),
    inlineData=st.just({"mimeType": "image/png", "data": ""}),
)  # fmt: skip
GROUNDING = {"webSearchQueries": ["q", 3], "groundingChunks": [None, {"web": {"uri": "https://a.org"}}]}
ANY_CANDIDATE = maybe(
    content=st.one_of(st.none(), maybe(parts=st.one_of(st.none(), st.lists(ANY_PART, max_size=3)))),
    finishReason=st.sampled_from(["STOP", "SAFETY", "MAX_TOKENS", "MALFORMED_FUNCTION_CALL", "", None]),
    groundingMetadata=st.sampled_from([None, GROUNDING]),
)
ANY_CHUNK = maybe(
    candidates=st.lists(ANY_CANDIDATE, max_size=2),
    promptFeedback=st.sampled_from([None, {}, {"blockReason": "SAFETY"}]),
    usageMetadata=st.sampled_from([None, {}, {"promptTokenCount": 1}]),
    error=st.sampled_from([None, {"code": 500}, "x"]),
)


@given(st.lists(ANY_CHUNK, max_size=8))
@settings(max_examples=300, deadline=None)
def test_any_chunks_end_well_or_in_one_error(chunks: list[Any]) -> None:
    events, error = read(flash(), sse(*chunks))
    check_grammar(events, ended=error is None)


# Requests


def test_conversation_as_contents() -> None:
    kept = {"dialect": "gemini", "model": FLASH.model, "call": "call_1", "signature": "c2lnbmF0dXJl"}
    linked = {"type": "image", "source": {"type": "url", "url": "https://a.org/b.png"}}
    seen = tool_result("call_2", [text("see"), PNG], is_error=True)
    out = request_of(
        user("look", PNG, PDF, linked),
        assistant(
            thinking("hm", kept), "I look.", tool_use("call_1", command="ls"), tool_use("call_2", "Read")
        ),
        user(seen, tool_result("call_1", "a.txt"), tool_result("gone"), "and?"),
        {"role": "system", "content": "Plan mode is active"},
        assistant(tool_use("call_3")),
        system=[text("x-anthropic-billing-header: cc=1"), text("Be good.")],
    )

    def calls(id: str, name: str = "Bash", **args: Any) -> Any:
        return {"functionCall": {"id": id, "name": name, "args": args}}

    def answers(id: str, name: str = "Bash", **response: Any) -> Any:
        return {"functionResponse": {"id": id, "name": name, "response": response}}

    inline = {"inlineData": {"mimeType": "image/png", "data": "iVBORw0KGgo="}}
    pdf = {"inlineData": {"mimeType": "application/pdf", "data": "JVBERi0="}}
    url = {"fileData": {"mimeType": "image/png", "fileUri": "https://a.org/b.png"}}
    signed = {**calls("call_1", command="ls"), "thoughtSignature": "c2lnbmF0dXJl"}
    assert out["systemInstruction"] == {"parts": [{"text": "Be good."}]}
    assert [c["role"] for c in out["contents"]] == ["user", "model", "user", "model", "user"]
    assert [c["parts"] for c in out["contents"]] == [
        [{"text": "look"}, inline, pdf, url],
        [{"text": "I look."}, signed, calls("call_2", "Read")],
        [
            answers("call_1", output="a.txt"),
            answers("call_2", "Read", error="see\n\n[image: in the next user message]"),
            inline,
            {"text": "and?"},
            {"text": "<system-reminder>\nPlan mode is active\n</system-reminder>"},
        ],
        [{**calls("call_3"), "thoughtSignature": DUMMY}],
        [answers("call_3", output="No result was recorded for this call.")],
    ]


def test_a_document_of_blocks_keeps_its_images() -> None:
    document = {"type": "document", "title": "T", "source": {"type": "content", "content": ["see", PNG]}}
    parts = request_of(user(document))["contents"][0]["parts"]
    assert [p.get("text") or [*p] for p in parts] == ["T", "see", ["inlineData"]]


def test_answers_around_a_turn_that_comes_to_nothing_are_one() -> None:
    orphan = tool_result("nobody asked", "x")
    contents = request_of(user("a"), assistant("b"), user(orphan), assistant("c"), user("d"))["contents"]
    assert [(c["role"], [p["text"] for p in c["parts"]]) for c in contents] == [
        ("user", ["a"]), ("model", ["b", "c"]), ("user", ["d"]),
    ]  # fmt: skip


@pytest.mark.parametrize(("skip", "last"), [((), "model"), (("prefill",), "user")])
def test_an_answer_that_the_client_begins(skip: tuple[str, ...], last: str) -> None:
    to = upstream("gemini-3.8-flash", skip=frozenset(skip))
    assert request_of(user("hi"), assistant("{"), to=to)["contents"][-1]["role"] == last


def test_signature_comes_back_from_the_stream_that_made_it() -> None:
    events, _ = read(flash(), (FIXTURES / "gemini" / "thoughts_then_tool.sse").read_bytes())
    history = (user("hi"), assistant(*signatures_of(events), tool_use("fc-7f3a"), tool_use("other")))
    made = "CpcBAdHtim9TaWduYXR1cmUx"
    for model, first in ((FLASH.model, made), ("gemini-3.1-pro", DUMMY), ("gemini-2.5-pro", None)):
        parts = request_of(*history, to=upstream(model))["contents"][1]["parts"]
        assert [p.get("thoughtSignature") for p in parts] == [first, None]


@pytest.mark.parametrize(
    ("model", "body", "expected"),
    [
        pytest.param("gemini-3.8-flash", {**ADAPTIVE, "output_config": {"effort": "xhigh"}},
                     {"includeThoughts": True, "thinkingLevel": "high"}, id="level"),
        pytest.param("gemini-4-neon", {"output_config": {"effort": "max"}}, {"thinkingLevel": "xhigh"}, id="a level of its own"),
        pytest.param("gemini-3.8-flash", {"thinking": {"type": "enabled", "budget_tokens": 3000}},
                     {"includeThoughts": True, "thinkingLevel": "low"}, id="budget as level"),
        pytest.param("gemini-3.8-flash", OFF, {"thinkingLevel": "low"}, id="the least level"),
        pytest.param("gemini-3.8-flash", ADAPTIVE, {"includeThoughts": True}, id="its own measure"),
        pytest.param("gemini-3.8-flash", {}, None, id="nothing asked"),
        pytest.param("gemini-2.5-pro", {"thinking": {"type": "enabled", "budget_tokens": 99999}},
                     {"includeThoughts": True, "thinkingBudget": 24576}, id="budget"),
        pytest.param("gemini-2.5-flash", {"output_config": {"effort": "medium"}}, {"thinkingBudget": 12288},
                     id="effort as budget"),
        pytest.param("gemini-2.5-flash", OFF, {"thinkingBudget": 0}, id="off"),
        pytest.param("gemini-2.5-pro", OFF, {"thinkingBudget": 128}, id="the least budget"),
        pytest.param("gemini-2.0-flash", ADAPTIVE, None, id="a model that does not think"),
    ],
)  # fmt: skip
def test_thinking(model: str, body: Any, expected: Any) -> None:
    out = request_of(user("hi"), to=upstream(model), **body)
    assert out.get("generationConfig", {}).get("thinkingConfig") == expected


def test_a_refused_level_is_the_next_lower_one() -> None:
    to = upstream("gemini-3-pro", skip=frozenset({"effort.medium"}))
    out = request_of(user("hi"), to=to, output_config={"effort": "medium"})
    assert out["generationConfig"]["thinkingConfig"] == {"thinkingLevel": "low"}


def test_the_least_level_is_the_least_that_is_not_refused() -> None:
    out = request_of(user("hi"), to=upstream("gemini-3-pro", skip=frozenset({"effort.low"})), **OFF)
    assert out["generationConfig"]["thinkingConfig"] == {"thinkingLevel": "medium"}


def test_generation_config() -> None:
    schema = {"type": "object", "properties": {"title": {"type": "string"}}, "additionalProperties": False}
    asked = {
        "max_tokens": 99, "temperature": 0.5, "top_p": 0.9, "top_k": 7, "stop_sequences": list("abcdef"),
        "output_config": {"format": {"type": "json_schema", "schema": schema}}, "metadata": {}, "safeguards": [],
    }  # fmt: skip
    assert request_of(user("hi"), **asked)["generationConfig"] == {
        "temperature": 0.5, "topP": 0.9, "topK": 7, "maxOutputTokens": 99, "stopSequences": list("abcde"),
        "responseMimeType": "application/json", "responseJsonSchema": schema,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ({"type": "auto"}, {"mode": "AUTO"}),
        ({"type": "any"}, {"mode": "ANY"}),
        ({"type": "none"}, {"mode": "NONE"}),
        (None, None),
        ({"type": "tool", "name": "Bash"}, {"mode": "ANY", "allowedFunctionNames": ["Bash"]}),
        ({"type": "tool", "name": "web_search"}, {"mode": "AUTO"}),
    ],
)
def test_tool_choice(choice: Any, expected: Any) -> None:
    out = request_of(user("hi"), tools=[BASH], tool_choice=choice)
    assert out.get("toolConfig", {}).get("functionCallingConfig") == expected


def test_tools() -> None:
    schema = {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "type": "object",
        "additionalProperties": False,
        "$defs": {"N": {"type": "integer"}},
        "properties": {
            "n": {"$ref": "#/$defs/N", "exclusiveMinimum": 0, "maximum": 9007199254740991},
            "any": {},
            "k": {"const": "x"},
            "d": {"type": ["string", "null"], "format": "uri"},
            "l": {"type": "array"},
        },
        "required": ["n", "gone"],
    }
    out = request_of(
        user("hi"),
        tools=[{"name": "Big", "input_schema": schema}, {"name": "None", "input_schema": {"type": "object"}}],
    )
    big, none = out["tools"][0]["functionDeclarations"]
    assert none == {"name": "None", "description": ""}
    assert big["parameters"] == {
        "type": "object",
        "required": ["n"],
        "properties": {
            "n": {"type": "integer", "maximum": 9007199254740991},
            "any": {"type": "string"},
            "k": {"type": "string", "enum": ["x"]},
            "d": {"type": "string", "nullable": True},
            "l": {"type": "array", "items": {"type": "string"}},
        },
    }


@pytest.mark.parametrize(
    ("given", "sent"),
    [
        ({"type": "integer", "enum": [1, 2]}, {"type": "integer", "description": "One of 1, 2."}),
        ({"enum": [1, 2.5]}, {"type": "number", "description": "One of 1, 2.5."}),
        ({"const": True}, {"type": "boolean", "description": "One of true."}),
        ({"enum": [True, None]}, {"type": "boolean", "description": "One of true.", "nullable": True}),
        ({"type": ["string", "null"], "enum": ["a", None]}, {"type": "string", "nullable": True, "enum": ["a"]}),
        ({"type": "string", "enum": ["", "a"]}, {"type": "string", "enum": ["a"]}),
        ({"enum": [""]}, {"type": "string"}),
        ({"enum": ["a", 1, True]}, {"type": "string", "enum": ["a", "1", "true"]}),
    ],
)  # fmt: skip
def test_gemini_takes_no_enum_but_of_texts(given: Any, sent: Any) -> None:
    assert parameters({"properties": {"p": given}})["properties"]["p"] == sent


def parameters(schema: Any) -> Any:
    """A tool's schema as it goes out."""
    tool = {"name": "T", "input_schema": {"type": "object", **schema}}
    return request_of(user("hi"), tools=[tool])["tools"][0]["functionDeclarations"][0].get("parameters")


TEXT, NUMBER = {"type": "string"}, {"type": "number"}
A, B = {"properties": {"a": TEXT}, "required": ["a"]}, {"properties": {"b": NUMBER}, "required": ["b"]}


@pytest.mark.parametrize(
    ("given", "sent"),
    [
        pytest.param({"allOf": [A, B]}, {"type": "object", "properties": {"a": TEXT, "b": NUMBER}, "required": ["a", "b"]},
                     id="allOf is one object"),
        pytest.param({**B, "allOf": [A, {"required": ["b"]}]},
                     {"type": "object", "properties": {"a": TEXT, "b": NUMBER}, "required": ["b", "a"]}, id="allOf beside its own"),
        pytest.param({"allOf": [{"$ref": "#/$defs/Kind"}], "description": "which"},
                     {"type": "integer", "maximum": 3, "description": "which"}, id="allOf of one reference"),
        pytest.param({"$ref": "#/$defs/Base", **B}, {"type": "object", "properties": {"a": TEXT, "b": NUMBER},
                     "required": ["b", "a"]}, id="a reference beside its own"),
        pytest.param({"description": "d"}, {"type": "string", "description": "d"}, id="no type"),
        pytest.param({"anyOf": [NUMBER, {"type": "null"}], "description": "d"},
                     {"type": "number", "nullable": True, "description": "d"}, id="optional"),
        pytest.param({"anyOf": [TEXT, {"type": "array", "items": TEXT}, {"type": "null"}], "description": "d"},
                     {"anyOf": [{"type": "string", "nullable": True, "description": "d"}, {"type": "array", "items": TEXT}]},
                     id="a union stands alone"),
        pytest.param({"type": "array", "items": TEXT, "anyOf": [{"minItems": 1}]}, {"type": "array", "items": TEXT},
                     id="a union of no types"),
        pytest.param({"type": "object", "oneOf": [A, B]}, {"type": "object", "properties": {"a": TEXT, "b": NUMBER}},
                     id="an object's union"),
        pytest.param({"$ref": "#/$defs/Tree"}, {"type": "array", "items": TEXT}, id="a reference to where it stands"),
    ],
)  # fmt: skip
def test_schemas_of_several_parts(given: Any, sent: Any) -> None:
    known = {
        "Kind": {"type": "integer", "maximum": 3},
        "Base": A,
        "Tree": {"items": {"$ref": "#/$defs/Tree"}},
    }
    assert parameters({"$defs": known, "properties": {"p": given}})["properties"]["p"] == sent


def test_a_tool_whose_parameters_are_a_union() -> None:
    assert parameters({"anyOf": [A, B]}) == {"type": "object", "properties": {"a": TEXT, "b": NUMBER}}


LEAVES = st.sampled_from([
    {}, TEXT, {"type": "null"}, {"type": ["string", "null"]}, {"const": 1}, {"enum": ["", "a"]}, {"required": ["a"]},
    {"minItems": 1}, {"$ref": "#/$defs/R"}, {"type": "object"}, None, True,
])  # fmt: skip
SCHEMAS = st.recursive(
    LEAVES,
    lambda inner: maybe(
        type=st.sampled_from(["object", "array", "string", ["array", "null"], 3]),
        description=st.just("d"),
        properties=st.dictionaries(st.sampled_from("ab"), inner, max_size=2),
        required=st.just(["a", "gone", 1]),
        items=inner,
        **{key: st.lists(inner, max_size=3) for key in ("anyOf", "oneOf", "allOf")},
    ),
    max_leaves=12,
)


def check_node(node: Any) -> None:
    """What Gemini refuses all tools for: "type: must be specified", "only allowed for OBJECT type", "property is not
    defined", "when using any_of, it must be the only field set".
    """
    if "anyOf" in node:
        assert len(node) == 1
    else:
        assert isinstance(node["type"], str)
    only = {"properties": "object", "required": "object", "items": "array", "enum": "string"}
    assert all(node["type"] == kind for key, kind in only.items() if key in node)
    assert set(node.get("required", ())) <= set(node.get("properties", ()))
    assert ("items" in node) == (node.get("type") == "array")
    inner = [*node.get("anyOf", ()), *node.get("properties", {}).values(), node.get("items")]
    for each in filter(None, inner):
        check_node(each)


@given(st.dictionaries(st.sampled_from("ab"), SCHEMAS, min_size=1), SCHEMAS)
@settings(max_examples=200, deadline=None)
def test_any_schema_is_one_that_gemini_takes(properties: Any, referred: Any) -> None:
    schema = {"$defs": {"R": referred}, "properties": properties}
    before = copy.deepcopy(schema)
    check_node(parameters(schema))
    assert schema == before


def test_web_search() -> None:
    out = request_of(user("hi"), tools=[SEARCH], tool_choice={"type": "tool", "name": "web_search"})
    assert out["tools"] == [{"googleSearch": {}}]


@pytest.mark.parametrize(
    ("format", "model", "tools", "left"),
    [
        ("gemini", "gemini-2.5-pro", [SEARCH], []),
        ("gemini", "gemini-2.5-pro", [SEARCH, BASH], ["web_search_20250305"]),
        ("gemini", "gemini-3.8-flash", [SEARCH, BASH], []),
        ("responses", "gpt-5", [SEARCH, BASH], []),
        ("gemini", "m", [{"type": "code_execution_20250825", "name": "c"}], ["code_execution_20250825"]),
    ],
)
def test_server_tools_that_are_left_out_are_told(
    format: str, model: str, tools: list[Any], left: list[str]
) -> None:
    assert ccmux.left_out({"tools": tools}, ccmux.DIALECTS[format], upstream(model)) == left


@pytest.mark.parametrize(
    ("model", "skip", "searches"),
    [
        ("gemini-2.5-pro", (), False),
        ("gemini-3.1-pro-preview", (), True),
        ("gemini-3.8-flash", ("googleSearch",), False),
    ],
)
def test_a_web_search_beside_functions(model: str, skip: tuple[str, ...], searches: bool) -> None:
    to = upstream(model, skip=frozenset(skip))
    out = request_of(user("hi"), to=to, tools=[SEARCH, BASH], tool_choice={"type": "auto"})
    [tool] = out["tools"]
    assert [f["name"] for f in tool["functionDeclarations"]] == ["Bash"]
    assert ("googleSearch" in tool) == searches
    mode = {"functionCallingConfig": {"mode": "VALIDATED" if searches else "AUTO"}}
    assert out["toolConfig"] == ({**mode, "includeServerSideToolInvocations": True} if searches else mode)


def test_what_a_search_beside_functions_found_comes_back_in_its_place() -> None:
    searched = {"toolType": "GOOGLE_SEARCH_WEB", "id": "s1"}
    parts = [
        {"text": "I look."},
        {"toolCall": {**searched, "args": {"queries": ["q"]}}, "thoughtSignature": "c2lnMQ=="},
        {"toolResponse": {**searched, "response": {"search_suggestions": "<div></div>"}}},
        {
            "functionCall": {"id": "f1", "name": "Bash", "args": {"command": "ls"}},
            "thoughtSignature": "c2lnMg==",
        },
    ]
    events, error = read(flash(), sse(said(*parts[:2], finish=""), said(*parts[2:])))
    assert error is None
    check_grammar(events, ended=True)
    contents = request_of(user("hi"), {"role": "assistant", "content": collect(events)["content"]})[
        "contents"
    ]
    assert contents[1]["parts"] == parts


@pytest.mark.parametrize("refused", ["temperature", "top_p", "stop_sequences", "reasoning_effort"])
def test_what_an_upstream_refuses_is_left_out(refused: str) -> None:
    asked = {"temperature": 1, "top_p": 1, "stop_sequences": ["x"], **ADAPTIVE}
    names = {"top_p": "topP", "stop_sequences": "stopSequences", "reasoning_effort": "thinkingConfig"}
    to = upstream("gemini-3-pro", skip=frozenset({refused}))
    sent, all_sent = (request_of(user("hi"), to=t, **asked)["generationConfig"] for t in (to, FLASH))
    assert all_sent.keys() - sent.keys() == {names.get(refused, refused)}


@given(BODIES)
@settings(max_examples=200, deadline=None)
def test_any_conversation_makes_a_valid_request(body: Any) -> None:
    before = copy.deepcopy(body)
    contents = valid(gemini_request(body, upstream("m")))["contents"]
    assert body == before
    assert contents[0]["role"] == "user"
    for content, answer in zip(contents, [*contents[1:], {"parts": []}], strict=True):
        calls = [p["functionCall"]["id"] for p in content["parts"] if "functionCall" in p]
        assert [p["functionResponse"]["id"] for p in answer["parts"] if "functionResponse" in p] == calls
