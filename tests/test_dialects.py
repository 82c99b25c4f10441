"""Dialects and presets: URLs, rows, what is forwarded and how, what a 400 teaches."""

from __future__ import annotations

import contextlib
import email.utils
import json
import time
from typing import Any

import pytest
from proxy_harness import provider_row
from translation import (
    COMMAND,
    PDF,
    PNG,
    assistant,
    check_grammar,
    thinking,
    tool_result,
    tool_use,
    upstream,
    user,
)

import ccmux
from ccmux import DIALECTS, PRESETS, Call, Config, Route, endpoint_url, with_model


@pytest.mark.parametrize(
    ("format", "base_url", "url"),
    [
        ("openai", "https://a.test", "https://a.test/v1/chat/completions"),
        ("openai", "https://a.test/", "https://a.test/v1/chat/completions"),
        ("openai", "https://a.test/v1", "https://a.test/v1/chat/completions"),
        ("openai", "https://a.test/v1/", "https://a.test/v1/chat/completions"),
        ("openai", "https://a.test/api/paas/v4", "https://a.test/api/paas/v4/chat/completions"),
        ("openai", "https://a.test/v1beta/openai", "https://a.test/v1beta/openai/chat/completions"),
        ("openai", "https://a.test/inference", "https://a.test/inference/chat/completions"),
        ("openai", "https://a.test/x/chat/completions", "https://a.test/x/chat/completions"),
        ("openai", "https://a.test/chat/completions", "https://a.test/chat/completions"),
        ("openai", "https://a.test/v1/chat/completions/", "https://a.test/v1/chat/completions"),
        ("openai", "https://a.test/my/models", "https://a.test/my/models/chat/completions"),
        ("openai", "https://a.test/v1?version=2", "https://a.test/v1/chat/completions?version=2"),
        ("anthropic", "https://a.test", "https://a.test/v1/messages"),
        ("anthropic", "https://a.test/v1", "https://a.test/v1/messages"),
        ("anthropic", "https://a.test/v1/messages", "https://a.test/v1/messages"),
        ("anthropic", "https://a.test/api/anthropic/", "https://a.test/api/anthropic/v1/messages"),
        ("anthropic", "https://a.test/coding", "https://a.test/coding/v1/messages"),
        ("responses", "https://a.test", "https://a.test/v1/responses"),
        ("responses", "https://a.test/v1/responses", "https://a.test/v1/responses"),
        ("responses", "https://a.test/v1/chat/completions", "https://a.test/v1/responses"),
        ("gemini", "https://a.test", "https://a.test/v1beta/models/m:streamGenerateContent?alt=sse"),
        ("gemini", "https://a.test/v1beta", "https://a.test/v1beta/models/m:streamGenerateContent?alt=sse"),
        ("gemini", "https://a.test/v1/models", "https://a.test/v1/models/m:streamGenerateContent?alt=sse"),
        (
            "gemini",
            "https://a.test/v1/models/x:generateContent",
            "https://a.test/v1/models/m:streamGenerateContent?alt=sse",
        ),
    ],
)
def test_endpoint_url(format: str, base_url: str, url: str) -> None:
    assert endpoint_url(base_url, DIALECTS[format], model="m") == url
    assert endpoint_url(base_url, DIALECTS[format], model="models/m") == url


def test_a_models_name_cannot_leave_its_place_in_the_url() -> None:
    url = endpoint_url("https://a.test", DIALECTS["gemini"], model="../../x?y#z")
    assert url.startswith("https://a.test/v1beta/models/")
    assert "?y" not in url
    assert "#" not in url


CALLED = {
    "anthropic": "https://api.anthropic.com/v1/messages",
    "openai": "https://api.openai.com/v1/chat/completions",
    "openrouter": "https://openrouter.ai/api/v1/chat/completions",
    "openrouter-anthropic": "https://openrouter.ai/api/v1/messages",
    "zai": "https://api.z.ai/api/anthropic/v1/messages",
    "zai-openai": "https://api.z.ai/api/paas/v4/chat/completions",
    "kimi-coding": "https://api.kimi.com/coding/v1/messages",
    "deepseek": "https://api.deepseek.com/anthropic/v1/messages",
    "github": "https://models.github.ai/inference/chat/completions",
    "gemini-openai": "https://generativelanguage.googleapis.com/v1beta/openai/chat/completions",
    "ollama": "http://localhost:11434/v1/chat/completions",
}


def provider_of(type: str, env: dict[str, str] | None = None, **keys: Any) -> ccmux.Provider:
    """What the only row of a config makes."""
    [provider] = ccmux.load_config(provider_row("p", type, **keys), env or {}).providers
    return provider


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_loads(name: str) -> None:
    variable = PRESETS[name]["api_key"].strip("${}").partition(":")[0]
    provider = provider_of(name, {variable: "key-1"} if variable else {})
    assert provider.usable
    assert provider.format == PRESETS[name]["type"]
    assert provider.api_key == (("key-1",) if variable else ())
    if name in CALLED:
        assert endpoint_url(provider.base_url, DIALECTS[provider.format]) == CALLED[name]


DIFFERENCES: dict[str, Any] = {  # of a vendor, beside its address and key
    "anthropic": {"auth": "", "count_tokens": "auto", "drop": ()},
    "openai": {"effort": ccmux.EFFORTS, "max_tokens_key": "auto", "codex": "codex", "prompt_cache_key": True, "files": True},
    "openrouter": {"effort": ccmux.EFFORTS, "cache_control": "claude|gemini|qwen", "reasoning_key": "reasoning_details",
                   "transient": "Provider returned error", "web_search": "plugin"},
    "openrouter-anthropic": {"auth": "bearer"},
    "zai": {"drop": ("billing_header",)},
    "zai-openai": {"effort": ("low", "high", "max"), "reasoning_replay": "tool_turns"},
    "moonshot": {"effort": ("low", "high", "max"), "drop": ("billing_header",)},
    "moonshot-openai": {"effort": ("low", "high", "max"), "reasoning_replay": "tool_turns"},
    "kimi-coding": {"count_tokens": "upstream"},
    "deepseek": {"drop": ("billing_header", "tool_type", "media"), "vision_models": "flash"},
    "deepseek-openai": {"reasoning_replay": "tool_turns"},
    "gemini-openai": {"schema": "gemini"},
    "deepinfra": {"forced_tool": False},
    "cerebras": {"effort": ("low", "medium", "high"), "lax_finish": True},
    "mistral": {"tool_id": "[A-Za-z0-9]{9}"},
    "ollama": {"reasoning_replay": "all", "reasoning_key": "reasoning"},
    "llamacpp": {"drop": ("billing_header", "files")},
    "litellm": {"auth": "bearer"},
}  # fmt: skip


@pytest.mark.parametrize("name", DIFFERENCES)
def test_how_a_vendor_differs(name: str) -> None:
    provider = provider_of(name, api_key="k")
    assert {key: getattr(provider.quirks, key) for key in DIFFERENCES[name]} == DIFFERENCES[name]
    named = {"HTTP-Referer", "X-Title"} if name == "openrouter" else set()
    assert provider.headers.keys() == named


@pytest.mark.parametrize("name", PRESETS)
def test_a_model_on_this_machine_may_be_loaded_first(name: str) -> None:
    timeout = provider_of(name, api_key="k").first_byte_timeout
    assert timeout == (600 if name in ("ollama", "lmstudio", "llamacpp") else 120)


@pytest.mark.parametrize("name", ["lmstudio", "vllm"])
def test_a_local_preset_needs_no_key(name: str) -> None:
    assert provider_of(name).usable


def test_a_new_provider_is_one_row() -> None:
    """An OpenAI-compatible vendor that ccmux has never heard of: a row, and it serves."""
    name, row = ccmux.preset("newcomer openai https://api.newcomer.test/v1 NEWCOMER_API_KEY fast-1")
    text = '[router]\ndefault = "n/fast-1"\n[[providers]]\nname = "n"\ntype = "newcomer"\n'
    config = ccmux.parse_config(text, {"NEWCOMER_API_KEY": "k"}, {**PRESETS, name: row}, DIALECTS)
    ccmux.check_routes(config)
    [provider] = config.providers
    assert (provider.format, provider.api_key, provider.default_model) == ("openai", ("k",), "fast-1")


def test_codex_models_of_openai_are_served_by_responses() -> None:
    provider = provider_of("openai", {"OPENAI_API_KEY": "k"})
    assert ccmux.dialect_of(provider, "gpt-5.3-codex") is DIALECTS["responses"]
    assert ccmux.dialect_of(provider, "gpt-5.6") is DIALECTS["openai"]
    assert ccmux.dialect_of(provider, "gpt-5.6", {ccmux.CHAT}) is DIALECTS["responses"]


@pytest.mark.parametrize(
    ("name", "model", "tools", "format"),
    [
        ("openai", "gpt-5.1", [{"type": "web_search_20250305", "name": "web_search"}], "responses"),
        ("openai", "gpt-5-search-api", [{"type": "web_search_20250305", "name": "web_search"}], "openai"),
        ("openai", "o4-mini-deep-research", [{"type": "web_search_20250305"}], "responses"),
        ("openai", "gpt-5.1", [{"name": "web_search", "input_schema": {}}], "openai"),
        ("xai", "grok-4.7", [{"type": "web_search_20260209", "name": "web_search"}], "responses"),
        ("openrouter", "openai/gpt-5.1", [{"type": "web_search_20250305", "name": "web_search"}], "openai"),
    ],
)
def test_who_searches_the_web_by_responses_is_asked_there(
    name: str, model: str, tools: list[Any], format: str
) -> None:
    provider = provider_of(name, api_key="k")
    assert ccmux.dialect_of(provider, model, (), {"tools": tools}) is DIALECTS[format]


@pytest.mark.parametrize(
    ("base_url", "is_openais"),
    [
        ("https://api.openai.com", True),
        ("https://API.openai.com/v1/", True),
        ("https://eu.api.openai.com/v1", True),
        ("https://mine.openai.azure.com/openai/v1", True),
        ("https://mine.services.ai.azure.com:443/openai/v1", True),
        ("http://192.168.1.20:8000/v1", False),
        ("https://api.openai.com.example/v1", False),
        ("https://relay.test/api.openai.com", False),
        ("https://notazure.com/v1", False),
    ],
)
def test_a_server_of_openais_format_needs_no_key_and_searches_by_chat(
    base_url: str, is_openais: bool
) -> None:
    """What else it does not take is learnt from its refusal: a relay to OpenAI's models takes it."""
    env = {"OPENAI_API_KEY": "k"}
    provider = provider_of("openai", env, base_url=base_url)
    assert (provider.format, provider.api_key, provider.quirks.effort) == ("openai", ("k",), ccmux.EFFORTS)
    assert provider.quirks.web_search == ("responses" if is_openais else "options")
    assert provider_of("openai", env, base_url=base_url, quirks={"effort": []}).quirks.effort == ()
    keyless = provider_of("openai", base_url=base_url)
    assert keyless.usable is not is_openais
    assert [*keyless.api_key] == [""]


def test_a_vendors_other_address_keeps_its_quirks() -> None:
    china = "https://open.bigmodel.cn/api/paas/v4"
    provider = provider_of("zai-openai", {"ZAI_API_KEY": "k"}, base_url=china)
    assert provider.quirks.reasoning_replay == "tool_turns"


@pytest.mark.parametrize(
    ("type", "key", "auth", "is_refused"),
    [
        ("openai", "k", "", True),
        ("openai", "", "", False),
        ("openai", "${UNSET:-}", "", False),
        ("openai", "$UNSET", "", False),  # it is switched off for that
        ("openai", "k", "x-api-key", False),
        ("anthropic", "k", "", False),
        ("anthropic", "k", "both", True),
        ("gemini", "k", "", False),
    ],
)
def test_a_user_in_the_address_and_a_key_cannot_share_a_header(
    type: str, key: str, auth: str, is_refused: bool
) -> None:
    told = pytest.raises(ccmux.ConfigError, match="'base_url' has a user")
    with told if is_refused else contextlib.nullcontext():
        provider_of(type, api_key=key, base_url="http://me:pw@p.test", quirks={"auth": auth})


# What an Anthropic-format upstream gets.


@pytest.mark.parametrize(
    "raw",
    [
        b'{"model":"old","messages":[]}',
        b'{ "model" : "old" , "messages": [] }',
        b'{"messages":[{"role":"user","content":"\\"model\\":\\"old\\""}],"model":"old"}',
        b'{"messages":[{"content":[{"type":"tool_use","input":{"model":"old"}}]}],"model":"old"}',
        b'{"tools":[{"input_schema":{"properties":{"model":{"type":"string"}}}}],"model":"old","x":{"model":"old"}}',
        b'{"metadata":{"model":"old"},"model":"old"}',
        b'{"a":"}]\\\\","model":"old"}',
        '{"a":"ü😀","model":"old"}'.encode(),
    ],
)
def test_with_model_changes_the_top_level_name_and_nothing_else(raw: bytes) -> None:
    new = with_model(raw, "old", 'new "x"')
    assert json.loads(new) == {**json.loads(raw), "model": 'new "x"'}
    name = json.dumps('new "x"').encode()
    at = next(n for n, (a, b) in enumerate(zip(raw, new, strict=False)) if a != b)
    assert raw[:at] + raw[at + 3 :] == new[:at] + new[at + len(name) - 2 :]


def test_with_model_where_the_name_is_written_with_escapes() -> None:
    assert json.loads(with_model(b'{"mod\\u0065l":"old"}', "old", "new"))["model"] == "new"
    assert json.loads(with_model(b'{"model":"\\u006fld"}', "old", "new"))["model"] == "new"


def call_of(body: Any, raw: bytes = b"", format: str = "anthropic") -> Call:
    return Call("req_1", body, raw, {}, Route("m", "default", (), ()), Config(), stream=True, format=format)


def test_the_clients_own_bytes_go_on_where_nothing_must_change() -> None:
    raw = b'{ "model":"m",  "odd" : [1.0e2, "\\u00fc"] }'
    assert ccmux.forwarded(call_of(json.loads(raw), raw), upstream("m")) is raw


@pytest.mark.parametrize(
    ("model", "asked", "sent"),
    [
        ("claude-opus-4-6", "xhigh", "high"),
        ("claude-sonnet-4-6", "max", "max"),
        ("anthropic/claude-opus-4.6", "xhigh", "high"),
        ("claude-opus-4-5-20251101", "max", "high"),
        ("claude-opus-4-7", "xhigh", "xhigh"),
        ("claude-sonnet-5-5", "xhigh", "xhigh"),
        ("glm-5.3", "xhigh", "xhigh"),
    ],
)
def test_a_claude_that_does_not_know_an_effort_gets_the_next_lower_one(
    model: str, asked: str, sent: str
) -> None:
    body = {"model": model, "messages": [user("hi")], "output_config": {"effort": asked}}
    raw = ccmux.compact(body)
    found = ccmux.forwarded(call_of(body, raw), upstream(model))
    assert json.loads(found)["output_config"]["effort"] == sent
    assert (found is raw) == (asked == sent)
    by_chat = ccmux.openai_request(body, upstream(model, effort=ccmux.EFFORTS))
    assert by_chat["reasoning_effort"] == sent


@pytest.mark.parametrize(
    ("model", "format", "kept"),
    [
        ("claude-sonnet-4-6", "chat", {"temperature"}),
        ("claude-sonnet-4-6", "anthropic", {"temperature", "top_p"}),
        ("glm-5.3", "chat", {"temperature", "top_p"}),
    ],
)
def test_claude_gets_one_sampling_parameter_of_an_openai_client(
    model: str, format: str, kept: set[str]
) -> None:
    body = {"model": "m", "messages": [], "temperature": 0.2, "top_p": 1}
    sent = json.loads(ccmux.forwarded(call_of(body, format=format), upstream(model)))
    assert sent.keys() - {"model", "messages", "max_tokens"} == kept


@pytest.mark.parametrize(
    ("model", "block", "stays"),
    [
        ("claude-x", thinking("made by ccmux"), False),
        ("claude-x", {"type": "thinking", "thinking": "t", "signature": ""}, False),
        ("claude-x", {"type": "thinking", "thinking": "t"}, False),
        ("claude-x", {"type": "thinking", "thinking": "t", "signature": "EqQB"}, True),
        ("claude-x", {"type": "redacted_thinking", "data": "EmwK"}, True),
        ("claude-x", {"type": "redacted_thinking", "data": ccmux.sign({"x": 1})}, False),
        ("glm-x", thinking("made by ccmux"), False),
        ("glm-x", {"type": "thinking", "thinking": "t", "signature": ""}, True),  # llama.cpp's own
        ("glm-x", {"type": "thinking", "thinking": "t"}, True),
        ("glm-x", {"type": "redacted_thinking", "data": ccmux.sign({"x": 1})}, False),
    ],
)
def test_thinking_goes_only_to_whoever_signed_it(model: str, block: Any, stays: bool) -> None:
    body = {"model": model, "messages": [user("q"), assistant(block, "a"), user("r")]}
    raw = json.dumps(body, separators=(",", ":")).encode()
    sent = ccmux.forwarded(call_of(body, raw), upstream(model))
    assert (sent is raw) == stays
    assert json.loads(sent)["messages"][1] == (assistant(block, "a") if stays else assistant("a"))


@pytest.mark.parametrize(
    ("type", "model", "skip", "kinds"),
    [
        ("deepseek", "deepseek-flash", (), {"image"}),
        ("deepseek", "deepseek-v4-flash-vision-exp", (), {"image"}),
        ("deepseek", "deepseek-v4-pro", (), set()),
        ("deepseek", "deepseek-flash", ("media",), set()),
        ("deepseek-openai", "deepseek-flash", (), {"image_url"}),
        ("deepseek-openai", "deepseek-v4-pro", (), set()),
        ("deepseek-openai", "deepseek-flash", ("media",), set()),
    ],
)
def test_of_deepseeks_models_flash_gets_images(
    type: str, model: str, skip: tuple[str, ...], kinds: set[str]
) -> None:
    quirks = provider_of(type, api_key="k").quirks
    to = ccmux.Upstream(model, quirks, ccmux.Facts(), skip=frozenset(skip))
    body = {"model": "m", "messages": [user("look", PNG, PDF)]}
    forwards = type == "deepseek"
    sent = json.loads(ccmux.forwarded(call_of(body), to)) if forwards else ccmux.openai_request(body, to)
    content = sent["messages"][0]["content"]
    blocks = content if isinstance(content, list) else []
    assert {b["type"] for b in blocks} - {"text"} == kinds


def test_a_turn_of_nothing_but_foreign_thinking_is_left_out() -> None:
    body = {"model": "m", "messages": [user("q"), assistant(thinking("t")), user("r")]}
    assert len(ccmux.without_foreign_thinking(body, "m")["messages"]) == 2


@pytest.mark.parametrize(
    ("message", "param", "expected"),
    [
        ("Unsupported parameter: 'temperature' is not supported with this model.", "temperature", "temperature"),
        ("Unsupported value: 'temperature' does not support 0.5 with this model. Only the default (1) value is supported.",
         "temperature", "temperature"),
        ("Unrecognized request argument supplied: reasoning_effort", "", "reasoning_effort"),
        ("Unknown parameter: 'stream_options'.", "stream_options", "stream_options"),
        ("parallel_tool_calls is not supported by this model", "", "parallel_tool_calls"),
        ("Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead.",
         "max_tokens", "max_tokens"),
        ("stop: Extra inputs are not permitted", "", "stop"),
        ("Encrypted content is not supported with this model.", "include", "include"),
        ("Your organization must be verified to generate reasoning summaries.", "", "reasoning.summary"),
        ("Model grok-4-latest does not support parameter reasoningEffort.", "", "reasoning_effort"),
        ("Argument not supported on this model: stop", "", "stop"),
        ("`reasoning_effort` must be one of `none` or `default`", "", "reasoning_effort"),
        ("invalid temperature: only 1 is allowed for this model", "", "temperature"),
        ("This response_format type is unavailable now", "", "response_format"),
        ("This model does not support response format `json_schema`. See supported models at", "", "response_format"),
        ("tool_choice 'specified' is incompatible with thinking enabled", "", "tool_choice"),
        ("Unexpected role 'user' after role 'tool'", "", "user_after_tool"),
        ("After the optional system message, conversation roles must alternate user and assistant roles except for tool calls "
         "and results.", "", "user_after_tool"),
        ("Provider returned error: {\"message\":\"Unexpected role 'user' after role 'tool'\"}", "", "user_after_tool"),
        ("Unsupported value: 'low' is not supported with the 'm' model.", "text.verbosity", "text"),
        ("[{'type': 'literal_error', 'loc': ('body', 'reasoning_effort'), 'msg': \"Input should be 'low' or 'high'\"}]", "",
         "reasoning_effort"),  # vLLM
        ('"llama3.1:8b" does not support thinking', "", "reasoning_effort"),
        ('think value "high" is not supported for this model', "", "reasoning_effort"),
        ("thinking_config is not supported.", "", "reasoning_effort"),
        ("Thinking level is not supported for this model.", "", "reasoning_effort"),
        ("Unable to submit request because thinking is not supported by this model. Learn more: https://cloud.google.com/",
         "", "reasoning_effort"),
        ("Unable to submit request because thinking is not configurable in this model; please remove the thinking_config "
         "setting and try it again.", "", "reasoning_effort"),
        ("Thinking_config.include_thoughts is only enabled when thinking is enabled..", "", "reasoning_effort"),
        ("Thinking is not enabled for models/gemini-2.0-flash-preview-image-generation", "", "reasoning_effort"),
        ('Invalid JSON payload received. Unknown name "topK" at \'generation_config\': Cannot find field.', "", "top_k"),
        ("Tool use with function calling is unsupported by the model.", "", "googleSearch"),
        ("Built-in tools ({google_search}) and Custom tools (Function Calling) cannot be combined in the same request.", "",
         "googleSearch"),
        ("Multiple tools are supported only when they are all search tools.", "", "googleSearch"),
        ('Invalid JSON payload received. Unknown name "includeServerSideToolInvocations" at \'tool_config\': Cannot find field.',
         "", "googleSearch"),
        ("Requests ending with a model turn are not supported unless the last part is a function response.", "", "prefill"),
        ("Unsupported parameter: max_output_tokens", "", "max_output_tokens"),
        ("output_config.effort: Input should be 'low', 'medium', 'high' or 'max'", "", "output_config.effort"),
        ('output_config.effort "high" is not supported by model m; supported values: [medium]', "", "output_config.effort"),
        ("output_config: Extra inputs are not permitted", "", "output_config"),
        ('"thinking.type.enabled" is not supported for this model. Use "thinking.type.adaptive" and "output_config.effort".',
         "", "thinking"),
        ("max_tokens: Input should be greater than or equal to 1", "", ""),
        ("temperature: Input should be a valid number", "", ""),
        ("registry.ollama.ai/library/m does not support tools", "", ""),
        ("Invalid 'messages[3].content': expected a string", "messages[3].content", ""),
        ("the weather parameter is nice", "", ""),
        ("Rate limit reached", "", ""),
    ],
)  # fmt: skip
def test_refused_parameter(message: str, param: str, expected: str) -> None:
    assert ccmux.refused_parameter(message, param) == expected


@pytest.mark.parametrize(
    ("message", "param", "refused"),
    [
        pytest.param(
            "Unsupported value: 'reasoning_effort' does not support 'minimal' with this model. Supported values are: 'low', "
            "'medium', and 'high'.", "reasoning_effort", "minimal xhigh max", id="OpenAI's Chat",
        ),
        pytest.param(
            "Unsupported value: 'minimal' is not supported with the 'gpt-5.1-codex' model. Supported values are: 'low', "
            "'medium', 'high', and 'xhigh'.", "reasoning.effort", "minimal max", id="OpenAI's Responses",
        ),
        pytest.param(
            "Invalid value: 'max'. Supported values are: 'none', 'minimal', 'low', 'medium', 'high', and 'xhigh'.", "",
            "max", id="that no model has",
        ),
        pytest.param("`reasoning_effort` must be one of `low`, `medium`, or `high`", "", "minimal xhigh max", id="Groq"),
        pytest.param(
            "'reasoning_effort' : value is not one of the allowed values ['none','default','low','medium','high']", "",
            "minimal xhigh max", id="Groq's schema",
        ),
        pytest.param(
            "[{'type': 'literal_error', 'loc': ('body', 'reasoning_effort'), 'msg': \"Input should be 'low', 'medium' or "
            "'high'\", 'input': 'xhigh'}]", "", "minimal xhigh max", id="vLLM",
        ),
        pytest.param(
            "Validation error for `reasoning_effort`: expected one of `'low' | 'medium' | 'high'`, received `'xhigh'`.", "",
            "minimal xhigh max", id="Kimi",
        ),
        pytest.param('level "max" not supported, valid levels: low, medium, high, xhigh', "", "minimal max", id="CLIProxyAPI"),
        pytest.param(
            "Thinking level MEDIUM is not supported for this model. Please retry with other thinking level.", "", "medium",
            id="Gemini",
        ),
        pytest.param("`reasoning_effort` must be one of `none` or `default`", "", "", id="a model without levels"),
        pytest.param(
            "Unsupported value: 'reasoning_effort' does not support 'none' with this model. Supported values are: 'low'.", "",
            "", id="no level",
        ),
        pytest.param("Model grok-4 does not support parameter reasoningEffort.", "", "", id="none at all"),
        pytest.param("Unsupported value: 'low' is not supported with the 'm' model.", "text.verbosity", "", id="verbosity"),
        pytest.param("Unsupported value: 'temperature' does not support 0.5 with this model.", "", "", id="temperature"),
        pytest.param("output_config.effort: Input should be 'low' or 'high'", "", "", id="Anthropic's"),
        pytest.param("tool_choice must be one of auto, none", "", "", id="a choice"),
    ],
)  # fmt: skip
def test_refused_efforts(message: str, param: str, refused: str) -> None:
    assert ccmux.refused_efforts(message, param) == [f"effort.{level}" for level in refused.split()]


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("Invalid content type. image_url is only supported by certain models.", True),
        ("No endpoints found that support image input", True),
        ("this model does not support image input (ref: b8bd630e)", True),
        ("messages[3]: unknown variant `image_url`, expected `text` at line 1 column 1234", True),
        ("zai-org/GLM-5.3 is not a multimodal model", True),
        ("At most 0 image(s) may be provided in one prompt.", True),
        (
            "image input is not supported - hint: if this is unexpected, you may need to provide the mmproj",
            True,
        ),
        ("Model does not support images. Please use a model that does.", True),
        ("Unsupported content part type for text-only server: image_url", True),
        ("image exceeds 5 MB maximum", False),
        ("This API does not support image/heic", False),
        ("The model does not support image urls, only base64", False),
        ("Image format is not supported", False),
    ],
)
def test_a_model_that_reads_only_text_says_so(message: str, expected: bool) -> None:
    assert bool(ccmux.PARTS_REFUSED["media"].search(message)) == expected


@pytest.mark.parametrize(
    "message",
    [
        "messages.1.content.0: Invalid `signature` in `thinking` block",
        "Function call is missing a thought_signature in functionCall parts.",
        "The encrypted content gAAA...DQ== could not be verified.",
        f"The encrypted content for item rs_{'0f26baa4a8bfec6b' * 3} could not be verified.",
    ],
)
def test_a_signature_that_an_upstream_does_not_know(message: str) -> None:
    assert ccmux._SIGNATURE_REFUSED.search(message)


@pytest.mark.parametrize(
    "message",
    [
        "Unknown part type: file",
        "invalid message format",
        "messages[0]: unknown variant `file`, expected `text` at line 1 column 99",
        "Input tag 'file' found using 'type' does not match any of the expected tags: 'text', 'image_url'",
        "unsupported content[].type",
        "'input_file' is not supported by llamacpp at this moment",
        "input[0]: content[0]: unknown content type: input_file",
        "messages.0.content.list[tagged-union[TextBlock]].0: Input tag 'document' found using 'type' does not match",
        "2 validation errors:\n  {'type': 'literal_error', 'loc': 'body.messages.0.content.0.type', "
        "'msg': \"Input should be 'text', 'image' or 'tool_use'\", 'input': 'document'}",
    ],
)
def test_a_server_that_takes_no_files_says_so(message: str) -> None:
    assert ccmux.PARTS_REFUSED["files"].search(message)


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, None),
        ({"retry-after": "7"}, 7.0),
        ({"retry-after": " 30 "}, 30.0),
        ({"retry-after": "1.5"}, 1.5),
        ({"retry-after-ms": "1500"}, 1.5),
        ({"retry-after-ms": "250", "retry-after": "9"}, 0.25),
        ({"retry-after-ms": "x", "retry-after": "30"}, 30.0),
        ({"retry-after": "-3"}, 0.0),
        ({"retry-after": "nan"}, 0.0),
        ({"retry-after": "1e9"}, 3600.0),
        ({"retry-after": "inf"}, 3600.0),
        ({"retry-after": "Fri, 31 Dec 9999 23:59:59 GMT"}, 3600.0),
        ({"retry-after": "soon"}, None),
        ({"retry-after": ""}, None),
        ({"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}, 0.0),
    ],
)
def test_retry_after(headers: dict[str, str], seconds: float | None) -> None:
    assert ccmux.retry_after(headers) == seconds


def test_retry_after_as_a_date_to_come() -> None:
    told = ccmux.retry_after({"retry-after": email.utils.formatdate(time.time() + 60, usegmt=True)})
    assert told is not None
    assert 55 < told <= 60


# The demo provider.


@pytest.mark.parametrize(
    ("messages", "kinds"),
    [
        pytest.param([user("hello")], ["text"], id="words"),
        pytest.param([user("use Bash to run `ls -l`")], ["text", "tool_use"], id="a tool that the prompt names"),
        pytest.param(
            [user("use Bash"), assistant(tool_use("t")), user(tool_result("t", "out"))], ["text"],
            id="after the tool's result",
        ),
        pytest.param([], ["text"], id="nothing at all"),
    ],
)  # fmt: skip
def test_demo(messages: Any, kinds: list[str]) -> None:
    schema = {**COMMAND, "required": ["command"]}
    body = {"model": "m", "messages": messages, "tools": [{"name": "Bash", "input_schema": schema}]}
    events = ccmux.demo_events(body, "msg_0123456789abcdef01234567")
    check_grammar(events, True)
    content = ccmux.collect(events)["content"]
    assert [b["type"] for b in content] == kinds
    if "tool_use" in kinds:
        assert content[1]["input"] == {"command": "ls -l"}
