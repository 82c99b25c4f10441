"""Routing: the twelve steps in their order; names, prompt rules, the long-context pass-over and the 404."""

from __future__ import annotations

import copy

import pytest
from hypothesis import given
from hypothesis import strategies as st

import ccmux
from ccmux import ApiError, Config, ConfigError, Route, choose_route

FORMATS = ("anthropic", "openai")
STEPS = [
    "rule", "tag", "websearch", "image", "long_context", "compaction", "background", "asked",
    "subagent", "think", "model", "default",
]  # fmt: skip

SERVED = """
[[providers]]
name = "anthropic"
type = "anthropic"
base_url = "http://a.test"

[[providers]]
name = "or"
type = "openai"
base_url = "http://o.test"
models = ["glm-5", "shared"]

[[providers]]
name = "lab"
type = "openai"
base_url = "http://l.test"
models = ["shared"]
"""
ROWS = "".join(
    f'[[models]]\nname = "{name}"\n[[models.mappings]]\nprovider = "or"\nactual_model = "up-{name}"\n'
    for name in (
        "main", "small", "thinker", "searcher", "helper", "packer", "seer", "roomy", "ruled",
        "claude-opus-5-5",
    )
)  # fmt: skip
ALL_SLOTS = """
[router]
default = "main"
background = "small"
think = "thinker"
websearch = "searcher"
subagent = "helper"
compaction = "packer"
image = "seer"
long_context = "roomy"
long_context_tokens = 1000
"""


def config(router: str = ALL_SLOTS, rows: str = ROWS, served: str = SERVED) -> Config:
    made = ccmux.parse_config(router + served + rows, {}, {}, FORMATS)
    ccmux.check_routes(made)
    return made


def says(text: str, role: str = "user") -> dict:
    return {"role": role, "content": [{"type": "text", "text": text}]}


def ask(model: str = "claude-sonnet-5-5", *, messages: list | None = None, **more: object) -> dict:
    return {"model": model, "max_tokens": 9, "messages": messages or [says("hello")], **more}


def route(body: dict, headers: dict | None = None, tokens: int = 0, config: Config | None = None) -> Route:
    before = copy.deepcopy(body)
    found = choose_route(body, headers or {}, config or CONFIG, tokens)
    assert body == before, "the request was changed in place"
    return found


CONFIG = config()
CLASS = "x-claude-code-request-class"
IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "aGk="}}
SEEN = {"role": "user", "content": [IMAGE]}
SEARCH = {"type": "web_search_20250305", "name": "web_search"}
PLAN = [{"classifier_context": {"permission_mode": "plan"}}]
TAG = "<CCM-SUBAGENT-MODEL> helper </CCM-SUBAGENT-MODEL>"


def tool_result(*content: dict) -> dict:
    return {
        "role": "user",
        "content": [{"type": "tool_result", "tool_use_id": "t", "content": list(content)}],
    }


def beside_a_result(text: str) -> dict:
    return {"role": "user", "content": [*tool_result()["content"], {"type": "text", "text": text}]}


# As Claude Code 2.1.330 asks for ExitPlanMode, which it has to load.
PLANNED = [
    says("plan"),
    says("Plan mode is active. ...", "system"),
    says("", "assistant"),
    beside_a_result("Tool loaded."),
]


def test_the_steps_are_the_documented_twelve_in_order() -> None:
    assert [name for name, _ in ccmux.ROUTE_STEPS] == STEPS


@pytest.mark.parametrize(
    ("body", "headers", "tokens", "reason", "model"),
    [
        pytest.param(ask(), {}, 0, "default", "main", id="Claude's own name goes to the default"),
        pytest.param(ask("claude-sonnet-5-5[1m]"), {}, 0, "default", "main", id="[1m] is taken off"),
        pytest.param(ask("claude-opus-5-5"), {}, 0, "model", "claude-opus-5-5", id="a row of that very name"),
        pytest.param(ask("claude-opus-5-5[1M]"), {}, 0, "model", "claude-opus-5-5", id="[1M] as well"),
        pytest.param(ask("main"), {}, 0, "asked", "main", id="a row asked for"),
        pytest.param(ask("glm-5"), {}, 0, "asked", "glm-5", id="a provider's listed model"),
        pytest.param(ask("or/x/y"), {}, 0, "asked", "or/x/y", id="provider and model, cut at the first slash"),
        pytest.param(ask("anthropic/main"), {}, 0, "asked", "anthropic/main", id="the alias of a row"),
        pytest.param(ask("anthropic/claude-x"), {}, 0, "asked", "anthropic/claude-x", id="the alias is explicit"),
        pytest.param(ask(), {CLASS: "subagent"}, 0, "subagent", "helper", id="class subagent"),
        pytest.param(ask(), {CLASS: "workflow"}, 0, "subagent", "helper", id="class workflow"),
        pytest.param(ask(), {"x-claude-code-agent-id": "a1"}, 0, "subagent", "helper", id="an agent-id header"),
        pytest.param(ask(system=[{"type": "text", "text": "x; cc_is_subagent=true;"}]), {}, 0, "subagent", "helper",
                     id="cc_is_subagent in the first system block"),
        pytest.param(ask(system="x; cc_is_subagent=true;"), {}, 0, "subagent", "helper", id="in a system string"),
        pytest.param(ask(system=[{"type": "text", "text": "a"}, {"type": "text", "text": "cc_is_subagent=true"}]), {},
                     0, "default", "main", id="cc_is_subagent in another block says nothing"),
        pytest.param(ask(), {CLASS: "main"}, 0, "default", "main", id="class main says nothing"),
        pytest.param(ask(), {CLASS: "auxiliary"}, 0, "background", "small", id="class auxiliary"),
        pytest.param(ask(), {CLASS: "side_reply"}, 0, "background", "small", id="class side_reply"),
        pytest.param(ask("claude-haiku-4-5"), {}, 0, "background", "small", id="a haiku name"),
        pytest.param(ask("Claude-3-HAIKU"), {}, 0, "background", "small", id="a haiku name in any case"),
        pytest.param(ask(), {CLASS: "compaction"}, 0, "compaction", "packer", id="class compaction"),
        pytest.param(ask(), {}, 1001, "long_context", "roomy", id="more tokens than the limit"),
        pytest.param(ask(), {}, 1000, "default", "main", id="as many tokens as the limit"),
        pytest.param(ask(messages=[SEEN]), {}, 0, "image", "seer", id="an image"),
        pytest.param(ask(messages=[says("see"), says("ok", "assistant"), tool_result(IMAGE)]), {}, 0, "image", "seer",
                     id="an image in a tool result"),
        pytest.param(ask(messages=[tool_result({"type": "document", "source": {"type": "content", "content": [IMAGE]}})]),
                     {}, 0, "image", "seer", id="an image in a document in a tool result"),
        pytest.param(ask(messages=[SEEN, says("I see", "assistant"), says("so?")]), {}, 0, "default", "main",
                     id="an image of an older turn"),
        pytest.param(ask(messages=[SEEN, says("note", "system")]), {}, 0, "image", "seer",
                     id="a system message after the image"),
        pytest.param(ask(tools=[SEARCH]), {}, 0, "websearch", "searcher", id="web search is offered"),
        pytest.param(ask(tools=[{"name": "web_search", "input_schema": {}}]), {}, 0, "default", "main",
                     id="a client tool called web_search"),
        pytest.param(ask(system=[{"type": "text", "text": TAG}]), {}, 0, "tag", "helper", id="the tag"),
        pytest.param(ask(system="be brief " + TAG), {}, 0, "tag", "helper", id="the tag in a system string"),
        pytest.param(ask(system=[{"type": "text", "text": "a"}, {"type": "text", "text": "b" + TAG}]), {}, 0, "tag", "helper",
                     id="the tag in a later block"),
        pytest.param(ask(messages=[says(TAG)]), {}, 0, "default", "main", id="the tag in a message says nothing"),
        pytest.param(ask(output_config={"effort": "xhigh"}), {}, 0, "think", "thinker", id="effort xhigh"),
        pytest.param(ask(output_config={"effort": "max"}), {}, 0, "think", "thinker", id="effort max"),
        pytest.param(ask(output_config={"effort": "high"}), {}, 0, "default", "main", id="effort high is not named"),
        pytest.param(ask(thinking={"type": "adaptive"}), {}, 0, "default", "main", id="thinking alone says nothing"),
        pytest.param(ask(thinking={"type": "enabled", "budget_tokens": 9000}), {}, 0, "default", "main",
                     id="a budget is not named in think_on"),
        pytest.param(ask(safeguards=PLAN), {}, 0, "think", "thinker", id="plan mode in safeguards"),
        pytest.param(ask(messages=[says("go"), says("Plan mode is active. ...", "system")]), {}, 0, "think", "thinker",
                     id="plan mode in a system message"),
        pytest.param(ask(messages=[says("Plan mode is active.", "system"), says("a"), says("b", "assistant"), says("c")]),
                     {}, 0, "default", "main", id="plan mode of an older prompt"),
        pytest.param(ask(messages=[*PLANNED, tool_result(), says("Plan mode is active.", "assistant")]), {},
                     0, "think", "thinker", id="plan mode goes on after a tool round"),
        pytest.param(ask(messages=[*PLANNED, tool_result(), says("## Exited Plan Mode", "system")]), {}, 0, "default", "main",
                     id="plan mode ends where the plan is approved"),
        pytest.param(ask(messages=[says("plan"), says("Plan mode is active.", "assistant")]), {}, 0,
                     "default",
                     "main", id="the assistant's own words about plan mode"),
    ],
)  # fmt: skip
def test_where_a_request_goes(body: dict, headers: dict, tokens: int, reason: str, model: str) -> None:
    found = route(body, headers, tokens)
    assert (found.reason, found.model) == (reason, model), found.trail
    assert [step for step, _ in found.trail] == STEPS[: STEPS.index(reason) + 1]
    assert found.targets
    assert all(note for _, note in found.trail)


# Each request is one that its own step and every later one would take: the earlier wins.
BEFORE = {
    "tag": {"system": TAG, "tools": [SEARCH]},
    "websearch": {"tools": [SEARCH], "messages": [SEEN]},
    "image": {"messages": [SEEN]},
}


@pytest.mark.parametrize(
    ("body", "headers", "tokens", "reason"),
    [
        pytest.param(ask(**BEFORE["tag"]), {}, 2000, "tag", id="tag before websearch"),
        pytest.param(ask(**BEFORE["websearch"]), {}, 2000, "websearch", id="websearch before image"),
        pytest.param(ask(**BEFORE["image"]), {}, 2000, "image", id="image before long_context"),
        pytest.param(ask(), {CLASS: "compaction"}, 2000, "long_context", id="long_context before compaction"),
        pytest.param(ask("claude-haiku-4"), {CLASS: "compaction"}, 0, "compaction",
                     id="compaction before background"),
        pytest.param(ask("glm-5"), {CLASS: "auxiliary"}, 0, "background", id="background before asked"),
        pytest.param(ask("glm-5"), {CLASS: "subagent"}, 0, "asked", id="asked before subagent"),
        pytest.param(ask(safeguards=PLAN), {CLASS: "subagent"}, 0, "subagent", id="subagent before think"),
        pytest.param(ask("claude-opus-5-5", safeguards=PLAN), {}, 0, "think", id="think before model"),
    ],
)  # fmt: skip
def test_the_earlier_step_wins(body: dict, headers: dict, tokens: int, reason: str) -> None:
    assert route(body, headers, tokens).reason == reason


@pytest.mark.parametrize(
    ("body", "headers", "tokens"),
    [
        pytest.param(ask(tools=[SEARCH]), {}, 0, id="websearch"),
        pytest.param(ask(messages=[SEEN]), {}, 0, id="image"),
        pytest.param(ask(), {}, 10**6, id="long_context"),
        pytest.param(ask(), {CLASS: "compaction"}, 0, id="compaction"),
        pytest.param(ask("claude-haiku-4"), {}, 0, id="background"),
        pytest.param(ask(), {CLASS: "subagent"}, 0, id="subagent"),
        pytest.param(ask(safeguards=PLAN), {}, 0, id="think"),
    ],
)
def test_a_step_without_a_model_is_passed_over(body: dict, headers: dict, tokens: int) -> None:
    bare = config('[router]\ndefault = "main"\n')
    found = route(body, headers, tokens, bare)
    assert (found.reason, found.model) == ("default", "main")
    assert ("websearch", "not set") in found.trail


@pytest.mark.parametrize(
    ("think_on", "body", "reason"),
    [
        ('["budget"]', ask(thinking={"type": "enabled", "budget_tokens": 9000}), "think"),
        ('["budget"]', ask(thinking={"type": "adaptive"}), "default"),
        ('["budget"]', ask(thinking={"type": "disabled", "budget_tokens": 1}), "default"),
        ('["budget"]', ask(safeguards=PLAN), "default"),
        ('["low"]', ask(output_config={"effort": "low"}), "think"),
        ('["low"]', ask(output_config={"effort": "max"}), "default"),
        ('["plan"]', ask(output_config={"effort": "max"}), "default"),
        ("[]", ask(safeguards=PLAN, output_config={"effort": "max"}), "default"),
        ('["plan"]', ask(safeguards=[{"classifier_context": {"permission_mode": "auto"}}]), "default"),
        ('["plan"]', ask(safeguards="x", output_config=3, thinking=[]), "default"),
    ],
)
def test_think_on(think_on: str, body: dict, reason: str) -> None:
    router = f'[router]\ndefault = "main"\nthink = "thinker"\nthink_on = {think_on}\n'
    assert route(body, config=config(router)).reason == reason


# Prompt rules

RULES = """
[router]
default = "main"
[[router.rules]]
pattern = '(?i)^use (\\S+):'
model = "$1"
strip = true
[[router.rules]]
pattern = 'deep (?P<what>thought)'
model = "${what}er-x"
[[router.rules]]
pattern = 'quick(ly)?'
model = "ruled"
[[router.rules]]
pattern = 'ask (?P<who>\\w+)'
model = "$who"
"""
RULED = config(RULES + "")
REMIND = "<system-reminder>quickly, use small: it</system-reminder>"


@pytest.mark.parametrize(
    ("messages", "reason", "model"),
    [
        pytest.param([says("use small: go")], "rule", "small", id="$1"),
        pytest.param([says("ask small")], "rule", "small", id="$name"),
        pytest.param([says("USE small: go")], "rule", "small", id="flags in the pattern"),
        pytest.param([says("use or/abc: go")], "rule", "or/abc", id="$1 with a provider"),
        pytest.param([{"role": "user", "content": "quickly now"}], "rule", "ruled", id="a string content"),
        pytest.param([says("quick")], "rule", "ruled", id="a group that took no part"),
        pytest.param([says("use nobody: quickly")], "default", "main", id="the first match decides, even unserved"),
        pytest.param([says(REMIND + "hello")], "default", "main", id="reminder text is not the user's"),
        pytest.param([says(REMIND)], "default", "main", id="nothing but a reminder"),
        pytest.param([says("hello <system-reminder>quickly")], "default", "main", id="a reminder that never ends"),
        pytest.param([says(REMIND + "use small: go")], "rule", "small", id="the user's words after a reminder"),
        pytest.param([says("quickly" + REMIND)], "rule", "ruled", id="the user's words before a reminder"),
        pytest.param([says("quickly"), says("ok", "assistant"), says("hello")], "default", "main",
                     id="an older prompt"),
        pytest.param([says("quickly"), says("ok", "assistant"), tool_result({"type": "text", "text": "r"})],
                     "rule",
                     "ruled", id="a tool round stays on its model"),
        pytest.param([says("quickly"), says("ok", "assistant"), beside_a_result("Tool loaded.")], "rule", "ruled",
                     id="a tool that is loaded is not the user's words"),
        pytest.param([says("hello"), says("ok", "assistant"), beside_a_result("Base directory for this skill: /x\n\nquickly")],
                     "default", "main", id="a skill's words are not the user's"),
        pytest.param([says("quickly"), says("ok", "assistant"), beside_a_result("hello")], "default", "main",
                     id="the user's words beside a tool result"),
        pytest.param([says("hello"), says("ok", "assistant"), tool_result({"type": "text",
                                                                           "text": "quickly"})],
                     "default", "main", id="tool results are not the user's words"),
        pytest.param([says("quickly"), says("ok", "assistant"), says(REMIND)], "rule", "ruled",
                     id="a turn of reminders alone is passed over"),
        pytest.param([says("quickly"), says("note", "system")], "rule", "ruled", id="a system message after it"),
        pytest.param([says("hello"), says("quickly", "system")], "default", "main", id="system words"),
        pytest.param([{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text":
                     "quickly"}]}], "rule", "ruled", id="any text block of the turn"),
    ],
)  # fmt: skip
def test_prompt_rules(messages: list, reason: str, model: str) -> None:
    found = route(ask(messages=messages), config=RULED)
    assert (found.reason, found.model) == (reason, model), found.trail


def test_a_rule_that_names_nothing_served_is_told_in_the_trail() -> None:
    assert dict(route(ask(messages=[says("use nobody: x")]), config=RULED).trail)["rule"] == (
        "names nobody, which nobody serves"
    )


def test_a_rule_that_can_name_nothing_served_is_warned_of() -> None:
    rule = "[[router.rules]]\npattern = 'use (?P<name>\\S+)'\nmodel = '{}'\n"
    served = '[[providers]]\nname = "d"\ntype = "demo"\nmodels = ["small"]\n'
    models = [
        "d/x",
        "$1",
        "$0",
        "d/${name}",
        "smal",
        "$2",
        "d/$nam",
        "$" + "9" * 5000,
    ]  # Python reads no such number
    warnings = ccmux.load_config("".join(map(rule.format, models)) + served, {}).warnings
    assert [w[:43] for w in warnings] == [
        "[[router.rules]] 5: its model 'smal' is ser",
        "[[router.rules]] 6: its model '$2' names th",
        "[[router.rules]] 7: its model 'd/$nam' name",
        "[[router.rules]] 8: its model '$99999999999",
    ]
    assert "did you mean 'small'?" in warnings[0] and "group $nam, which its pattern lacks" in warnings[2]


@pytest.mark.parametrize("model", ["small", "$1"])
def test_the_trail_keeps_no_prompt(model: str) -> None:
    rules = f"[[router.rules]]\npattern = '(?s)(.*)'\nmodel = '{model}'\n"
    [(_, note), *_] = route(ask(messages=[says("my words " * 100)]), config=config(rules)).trail
    assert len(note) < 150 and ("my words" in note) == (model == "$1")


@pytest.mark.parametrize(
    ("text", "left"),
    [
        pytest.param("use small: go on", "go on", id="the match and the space after it go"),
        pytest.param(REMIND + "use small: go", REMIND + "go", id="reminders stay"),
        pytest.param("use small: ", "use small: ", id="a text that is nothing else stays"),
    ],
)
def test_strip_takes_the_matched_words_out(text: str, left: str) -> None:
    messages = [says("use small: older"), says("ok", "assistant"), says(text), says("note", "system")]
    found = route(ask(messages=messages, metadata={"x": 1}), config=RULED)
    assert found.body == ask(messages=[messages[0], messages[1], says(left), messages[3]], metadata={"x": 1})


def test_strip_keeps_string_content_usable() -> None:
    found = route(ask(messages=[{"role": "user", "content": "use small: go"}]), config=RULED)
    assert ccmux.text_of(found.body["messages"][0]["content"]) == "go"


def test_strip_leaves_the_other_keys_of_a_block() -> None:
    block = {"type": "text", "text": "use small: go", "cache_control": {"type": "ephemeral"}}
    found = route(ask(messages=[{"role": "user", "content": [block]}]), config=RULED)
    assert found.body["messages"][0]["content"] == [{**block, "text": "go"}]


def test_without_strip_the_request_goes_as_it_came() -> None:
    assert route(ask(messages=[says("quickly")]), config=RULED).body is None


@pytest.mark.parametrize(
    ("system", "left"),
    [
        pytest.param("be brief " + TAG, "be brief ", id="string"),
        pytest.param([{"type": "text", "text": TAG}], [], id="a block that was nothing else"),
        pytest.param([{"type": "text", "text": "a", "cache_control": {}}, {"type": "text",
                                                                           "text": f"b{TAG}c"}],
                     [{"type": "text", "text": "a", "cache_control": {}}, {"type": "text", "text": "bc"}],
                     id="the other blocks stay"),
    ],
)  # fmt: skip
def test_the_tag_is_taken_out(system: object, left: object) -> None:
    assert route(ask(system=system)).body == ask(system=left)


@pytest.mark.parametrize(
    "system",
    [
        "<CCM-SUBAGENT-MODEL>" + " " * 100_000,  # cubic where blanks match in three ways
        "<CCM-SUBAGENT-MODEL>" * 50_000,  # square where each is looked for an end behind the next
    ],
    ids=["blanks", "tags"],
)
def test_a_tag_that_never_ends_costs_no_time(system: str) -> None:
    assert route(ask(system=system)).reason == "default"


def test_a_tag_that_names_nothing_served_is_passed_over() -> None:
    body = ask(system="<CCM-SUBAGENT-MODEL>nobody</CCM-SUBAGENT-MODEL>")
    found = route(body)
    assert found.reason == "default"
    assert dict(found.trail)["tag"] == "names nobody, which nobody serves"


# Names

MAPPED = """
[[models]]
name = "pair"
[[models.mappings]]
provider = "lab"
actual_model = "second"
priority = 2
[[models.mappings]]
provider = "or"
actual_model = "first"
priority = 1
[[models.mappings]]
provider = "anthropic"
actual_model = "also-first"
[[models]]
name = "a/b"
[[models.mappings]]
provider = "lab"
actual_model = "row-wins"
[[models]]
name = "glm-5"
context = 1000
[[models]]
name = "empty"
"""


@pytest.mark.parametrize(
    ("name", "targets"),
    [
        pytest.param("pair", [("or", "first"), ("anthropic", "also-first"), ("lab", "second")], id="by priority"),
        pytest.param("shared", [("or", "shared"), ("lab", "shared")], id="listed by two providers"),
        pytest.param("or/z/q", [("or", "z/q")], id="the first slash"),
        pytest.param("a/b", [("lab", "row-wins")], id="a row with a slash in its name"),
        pytest.param("anthropic/pair", [("or", "first"), ("anthropic", "also-first"), ("lab", "second")],
                     id="the alias of a row"),
        pytest.param("anthropic/glm-5", [("anthropic", "glm-5")], id="a provider named anthropic"),
        pytest.param("glm-5", [("or", "glm-5")], id="a row without mappings, for a listed model"),
        pytest.param("empty", [], id="a row without mappings"),
        pytest.param("nobody", [], id="nobody"),
        pytest.param("or/", [], id="no model after the slash"),
        pytest.param("/x", [], id="no provider before it"),
        pytest.param("nobody/x", [], id="no such provider"),
        pytest.param("", [], id="nothing"),
    ],
)  # fmt: skip
def test_resolve(name: str, targets: list) -> None:
    found = ccmux.resolve(config("", MAPPED), name)
    assert [(t.provider, t.actual_model) for t in found] == targets


def test_a_row_without_mappings_is_told_of() -> None:
    with pytest.raises(
        ApiError, match=r"'empty' is served by no provider; its \[\[models\]\] row has no mappings"
    ):
        route(ask("empty"), config=config("", MAPPED))


def test_the_alias_without_a_provider_named_anthropic() -> None:
    served = SERVED.replace('name = "anthropic"', 'name = "a"')
    targets = ccmux.resolve(config("", "", served), "anthropic/glm-5")
    assert [(t.provider, t.actual_model) for t in targets] == [("or", "glm-5")]
    assert ccmux.resolve(config("", "", served), "anthropic/nobody") == ()


@pytest.mark.parametrize(
    ("router", "rows", "asked", "model", "target"),
    [
        pytest.param('[router]\ndefault = "or/z"\n', ROWS, "claude-x", "or/z", ("or", "z"), id="as configured"),
        pytest.param("", ROWS, "claude-x", "main", ("or", "up-main"), id="left out: the first row"),
        pytest.param("", "", "claude-x", "anthropic/claude-x", ("anthropic", "claude-x"),
                     id="no rows: the first provider, name untouched"),
        pytest.param('[router]\nfallback_provider = "lab"\n', ROWS, "odd/name", "lab/odd/name", ("lab",
                                                                                                 "odd/name"),
                     id="a name nobody serves goes to the fallback"),
        pytest.param('[router]\nfallback_provider = "lab"\n', ROWS, "claude-x", "main", ("or", "up-main"),
                     id="Claude's own names do not"),
    ],
)  # fmt: skip
def test_default(router: str, rows: str, asked: str, model: str, target: tuple[str, str]) -> None:
    found = route(ask(asked), config=config(router, rows))
    assert (found.model, found.reason) == (model, "default")
    assert (found.targets[0].provider, found.targets[0].actual_model) == target


def test_an_empty_auto_map_regex_matches_nothing() -> None:
    made = config('[router]\ndefault = "main"\nauto_map_regex = ""\n')
    assert route(ask("claude-opus-5-5"), config=made).reason == "asked"
    with pytest.raises(ApiError):
        route(ask("claude-x"), config=made)


def test_a_disabled_provider_is_not_the_default() -> None:
    served = SERVED.replace('base_url = "http://a.test"', 'base_url = "http://a.test"\nenabled = false')
    assert route(ask("claude-x"), config=config("", "", served)).targets[0].provider == "or"


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("glm-6", "did you mean 'glm-5'?"),
        ("smal", "did you mean 'small'?"),
        ("zzz", "known are"),
        ("zz", "lab/<model>"),
    ],
)
def test_a_name_nobody_serves_is_a_404_that_names_the_nearest(name: str, nearest: str) -> None:
    with pytest.raises(ApiError) as caught:
        route(ask(name))
    assert (caught.value.status, caught.value.type) == (404, "not_found_error")
    assert nearest in caught.value.message
    assert repr(name) in caught.value.message
    assert caught.value.should_retry is False


def test_an_endless_name_costs_no_time_and_is_not_sent_back() -> None:
    slow = config('[router]\nbackground = "main"\nbackground_regex = "(?i)claude.*haiku"\n')
    with pytest.raises(ApiError) as caught:  # minutes, if the pattern saw it all
        route(ask("claude" * 300_000), config=slow)
    assert (caught.value.status, len(caught.value.message) < 500) == (400, True)


def test_a_name_that_is_too_long_goes_nowhere() -> None:
    """It would stay in what is known of each target, and in a header that clients do not take."""
    at_most = "or/" + "m" * (ccmux.LONGEST_NAME - 3)
    tagged = [ask(system=TAG.replace("helper", name)) for name in (at_most, at_most + "m")]
    assert [route(body).reason for body in (ask(at_most), *tagged)] == ["asked", "tag", "default"]
    with pytest.raises(ApiError, match="at most 256 characters"):
        route(ask(at_most + "m"))


def test_where_no_name_is_known_the_404_says_how_to_get_one() -> None:
    with pytest.raises(ApiError, match=r"the config names none .*ccmux\.py init"):
        route(ask("glm-6"), config=Config())


def test_a_name_that_an_unset_variable_takes_away_is_a_404_that_names_it() -> None:
    unset = (
        '[[providers]]\nname = "a"\ntype = "anthropic"\nbase_url = "http://a.test"\napi_key = "$NOT_SET"\n'
    )
    with pytest.raises(ApiError, match=r"^model: 'claude-x' is .*; provider a: \$NOT_SET is not set"):
        route(ask("claude-x"), config=config("", "", unset))


@pytest.mark.parametrize("model", [None, "", 3, ["claude"]], ids=repr)
def test_a_request_without_a_model_is_a_400(model: object) -> None:
    with pytest.raises(ApiError) as caught:
        route({**ask(), "model": model})
    assert caught.value.status == 400
    assert "model" in caught.value.message


# A model that is too small

TIGHT = (
    '[[models]]\nname = "tight"\ncontext = 500\n[[models.mappings]]\nprovider = "or"\nactual_model = "t"\n'
)
SMALL = config(
    '[router]\ndefault = "tight"\nlong_context = "roomy"\nlong_context_tokens = 100000\n', ROWS + TIGHT
)


@pytest.mark.parametrize(
    ("tokens", "model", "reason"), [(500, "tight", "default"), (501, "roomy", "long_context")]
)
def test_a_model_too_small_for_the_count_is_passed_over(tokens: int, model: str, reason: str) -> None:
    found = route(ask(), tokens=tokens, config=SMALL)
    assert (found.model, found.reason) == (model, reason)
    if reason == "long_context":
        assert found.trail[-1] == ("long_context", "501 tokens are more than the 500 of tight")
        assert [(t.provider, t.actual_model) for t in found.targets] == [("or", "up-roomy")]


def test_a_model_asked_for_by_its_alias_is_passed_over_too() -> None:
    assert [route(ask("anthropic/tight"), tokens=n, config=SMALL).model for n in (500, 501)] == [
        "anthropic/tight",
        "roomy",
    ]


def test_passing_a_model_over_keeps_what_routing_took_out() -> None:
    rules = "[[router.rules]]\npattern = '^use tight: '\nmodel = 'tight'\nstrip = true\n"
    made = config(
        '[router]\ndefault = "main"\nlong_context = "roomy"\nlong_context_tokens = 100000\n' + rules,
        ROWS + TIGHT,
    )
    found = route(ask(messages=[says("use tight: go")]), tokens=501, config=made)
    assert found.model == "roomy"
    assert found.body == ask(messages=[says("go")])


def test_without_long_context_nothing_is_passed_over() -> None:
    made = config(
        '[router]\ndefault = "tight"\n',
        '[[models]]\nname = "tight"\ncontext = 5\n[[models.mappings]]\nprovider = "or"\nactual_model = "t"\n',
    )
    assert route(ask(), tokens=10**6, config=made).model == "tight"


@pytest.mark.parametrize(
    ("limit", "rows", "least"),
    [
        pytest.param(180_000, "", 180_000, id="long_context_tokens"),
        pytest.param(180_000, TIGHT, 500, id="a model's context"),
        pytest.param(180_000, TIGHT + "context = 400\n", 400, id="a target's context"),
        pytest.param(300, TIGHT, 300, id="contexts are larger"),
    ],
)
def test_the_fewest_tokens_that_a_route_may_turn_on(limit: int, rows: str, least: int) -> None:
    made = config(f'[router]\nlong_context = "roomy"\nlong_context_tokens = {limit}\n', ROWS + rows)
    assert made.smallest_limit == least


# Config of routes


@pytest.mark.parametrize("slot", ccmux.ROUTE_SLOTS)
def test_a_slot_that_names_nothing_served_is_a_config_error(slot: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config(f'[router]\n{slot} = "mian"\n')
    assert f"[router]: key '{slot}' is 'mian'" in str(caught.value)
    assert "did you mean 'main'?" in str(caught.value)


@given(
    st.recursive(
        st.none() | st.integers() | st.text(max_size=8),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(["role", "content", "type", "text", "model", "effort", "budget_tokens"]),
                inner,
            )
        ),
        max_leaves=10,
    )
)
def test_any_shape_of_a_request_is_routed_or_refused(value: object) -> None:
    for key in ("messages", "system", "tools", "thinking", "output_config", "safeguards", "model"):
        for made in (CONFIG, RULED):
            try:
                choose_route({**ask(), key: value}, {}, made)
            except ApiError as error:
                assert error.status in (400, 404)
