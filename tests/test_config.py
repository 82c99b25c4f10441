"""Config: TOML and environment -> dataclasses, or one line that names the table and the key."""

from __future__ import annotations

import dataclasses
import re
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import ccmux
from ccmux import Config, ConfigError, Price, Provider, Quirks, Server

FORMATS = ("anthropic", "openai", "demo")
PRESETS: dict[str, Any] = {
    "acme": {
        "type": "openai",
        "base_url": "https://api.acme.test/v1",
        "api_key": "$ACME_API_KEY",
        "default": "acme-1",
        "headers": {"X-From": "preset", "X-Kept": "yes"},
        "first_byte_timeout": 600,
        "quirks": {"effort": ["low", "high"], "files": True},
    },
    "zai": {"type": "anthropic", "base_url": "https://z.test", "api_key": "$ZAI_API_KEY"},
}
ENV = {
    "ACME_API_KEY": "acme-secret", "EMPTY": "", "KEY_2": "second-secret", "FROM_A_FILE": "file-secret\r\n",
    "TWO_LINES": "a\r\nb",
}  # fmt: skip


def parse(text: str, env: dict[str, str] = ENV, path: str = "") -> Config:
    return ccmux.parse_config(text, env, PRESETS, FORMATS, path)


def provider(lines: str, env: dict[str, str] = ENV) -> Provider:
    head = '[[providers]]\nname = "p"\n'
    type_and_url = "" if "type" in lines else 'type = "openai"\nbase_url = "http://p.test/v1"\n'
    return parse(head + type_and_url + lines, env).providers[0]


def error_of(text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        parse(text)
    words = str(caught.value)
    assert "\n" not in words, words
    return words


MODEL = '[[models]]\nname = "m"\n'
PROVIDER = '[[providers]]\nname = "p"\ntype = "openai"\nbase_url = "http://p.test/v1"\n'
MAPPING = "[[models.mappings]]\n"


def test_an_empty_file_is_a_config_of_defaults() -> None:
    made = parse("")
    assert (made.server, made.router, made.credits) == (Server(), ccmux.Router(), ccmux.Credits())
    assert (made.providers, made.models, made.warnings) == ((), (), ())


def test_the_documented_defaults() -> None:
    server, router = Server(), ccmux.Router()
    assert (server.host, server.port, server.database) == ("127.0.0.1", 13456, "ccmux.db")
    assert (server.require_key, server.max_connections) == (False, 512)
    assert (server.body_timeout, server.client_stall_timeout, server.drain_timeout) == (120, 60, 20)
    assert (router.think_on, router.long_context_tokens) == (("plan", "xhigh", "max"), 180_000)
    assert router.auto_map_regex == re.compile("^claude-")
    assert router.background_regex == re.compile("(?i)claude.*haiku")
    p = Provider()
    assert (p.max_retries, p.max_concurrent, p.enabled) == (1, 64, True)
    timeouts = (p.connect_timeout, p.first_byte_timeout, p.response_timeout, p.idle_timeout, p.total_timeout)
    assert timeouts == (10, 120, 600, 120, 3600)
    credits = ccmux.Credits()
    assert (credits.enforce, credits.markup_percent, credits.max_concurrent) == (False, 0, 8)
    assert credits.default_price == Price(Decimal(5), Decimal(25))


# One row a type of key: what is refused says the table, the key and what it must be.
TYPE_ERRORS = [
    ("[server]\nport = 'x'", "[server]: key 'port' must be a whole number"),
    ("[server]\nport = 80.5", "[server]: key 'port' must be a whole number"),
    ("[server]\nport = true", "[server]: key 'port' must be a whole number"),
    ("[server]\nport = -1", "[server]: key 'port' must be at least 0"),
    ("[server]\nport = 70000", "[server]: key 'port' must be at most 65535"),
    (f"[server]\nmax_connections = {10**30}", "[server]: key 'max_connections' must be at most 1000000"),
    ('[server]\ndatabase = "a\\u0000b"', "[server]: key 'database' must be text without a NUL character"),
    ("[server]\nhost = 5", "[server]: key 'host' must be text in quotes"),
    ("[server]\nrequire_key = 1", "[server]: key 'require_key' must be true or false"),
    ("[server]\nrequire_key = 'true'", "[server]: key 'require_key' must be true or false"),
    ("[server]\nbody_timeout = '1'", "[server]: key 'body_timeout' must be a number"),
    ("[server]\nbody_timeout = true", "[server]: key 'body_timeout' must be a number"),
    ("[server]\nbody_timeout = 0", "[server]: key 'body_timeout' must be at least 0.1"),
    ("[server]\nbody_timeout = nan", "[server]: key 'body_timeout' must be a number"),
    ("[server]\nbody_timeout = inf", "[server]: key 'body_timeout' must be a number"),
    ("[server]\nbody_timeout = 1e999", "[server]: key 'body_timeout' must be a number"),
    ("[server]\nbody_timeout = 2026-01-01", "[server]: key 'body_timeout' must be a number"),
    ("[server]\nallowed_hosts = 'a'", "[server]: key 'allowed_hosts' must be a list"),
    ("[server]\nallowed_hosts = ['a:80', 'https://b/']", "key 'allowed_hosts' has 'https://b/': write each name or address out, alone"),
    ("[server]\nallowed_hosts = ['*']", "key 'allowed_hosts' has '*': write each name or address out, alone"),
    ("[server]\nallowed_hosts = ['*.b.example']", "key 'allowed_hosts' has '*.b.example'"),
    ("[server]\nallowed_hosts = ['fd00::7']", "key 'allowed_hosts' has 'fd00::7'"),
    ("[server]\nallowed_hosts = ['a', 1]", "[server]: key 'allowed_hosts', item 2 must be text in quotes"),
    ("[server]\nlog_level = 'inof'", "[server]: key 'log_level' is 'inof': did you mean 'info'?"),
    ("[server]\nlog_level = 'x'", "known are debug, info, warning, error"),
    ("server = 5", "[server]: must be a table"),
    ("[[server]]\nport = 1", "[[server]]: must be a table"),
    ("[router]\nthink_on = ['plan', 'xhihg']", "[router]: key 'think_on' is 'xhihg': did you mean 'xhigh'?"),
    ("[router]\nauto_map_regex = '('", "[router]: key 'auto_map_regex' is not a regular expression"),
    ("[router]\nauto_map_regex = 'a{99999999999}'", "is not a regular expression: the repetition number is too large"),
    (f"[router]\nauto_map_regex = '{'(' * 3000}{')' * 3000}'", "is not a regular expression: maximum recursion depth"),
    ("[router]\nauto_map_regex = 3", "[router]: key 'auto_map_regex' must be text in quotes"),
    ("[router]\nlong_context_tokens = 0", "[router]: key 'long_context_tokens' must be at least 1"),
    ("[[router.rules]]\npattern = '['", "key 'pattern' is not a regular expression"),
    ("[[router.rules]]\nstrip = 'yes'", "key 'strip' must be true or false"),
    ("[router]\nrules = 'x'", "[router]: key 'rules' must be a list"),
    ("[router]\nrules = ['x']", "[router]: key 'rules', item 1: must be a table"),
    ("[credits]\nmarkup_percent = 'x'", "[credits]: key 'markup_percent' must be a number"),
    ("[credits]\nmarkup_percent = -1", "[credits]: key 'markup_percent' must be at least 0"),
    ("[credits]\nmarkup_percent = 1e30", "[credits]: key 'markup_percent' must be at most 100000"),
    ("[credits]\nstarting_credit = 1e12", "[credits]: key 'starting_credit' must be at most 1000000000"),
    ("[credits]\nmarkup_percent = nan", "[credits]: key 'markup_percent' must be a number"),
    ("[credits]\nstarting_credit = inf", "[credits]: key 'starting_credit' must be a number"),
    ("[credits]\ndefault_price = 3", "[credits]: key 'default_price' must be a table such as"),
    ("models = 3", "[models] must be a list"),
    ("[models]\nname = 'm'", "[models] must be a list"),
    ("[providers.p]\ntype = 'openai'", "providers: write it as [[providers]] tables"),
    ("providers = ['x']", "providers: write it as [[providers]] tables"),
    (MODEL + "mappings = ['x']", "key 'mappings', item 1: must be a table"),
    (PROVIDER + "quirks = 3", "[[providers]] 'p'"),
    (PROVIDER + "quirks = { fiels = true }", "unknown key 'fiels': did you mean 'files'?"),
    (PROVIDER + "quirks = { files = 1 }", "key 'quirks': key 'files' must be true or false"),
    (PROVIDER + "quirks = { effort = ['hihg'] }", "key 'effort' is 'hihg': did you mean 'high'?"),
    (PROVIDER + "quirks = { tool_id = '[a-z' }", "key 'quirks': key 'tool_id' is not a regular expression"),
    (PROVIDER + "quirks = { codex = '(' }", "key 'quirks': key 'codex' is not a regular expression"),
    (PROVIDER + "quirks = { cache_control = 'a{99999999999}' }", "'cache_control' is not a regular expression"),
    (PROVIDER + "quirks = { auth = 'basic' }", "key 'auth' is 'basic'"),
    (PROVIDER + "quirks = { extra_body = { a = 2026-01-01 } }", "has no JSON form"),
    (PROVIDER + "quirks = { extra_body = { a = 1e999 } }", "has no JSON form"),
    (PROVIDER + "headers = 3", "[[providers]] 'p'"),
    (PROVIDER + "headers = { 'X Y' = 'a' }", "[[providers]] 'p': key 'headers': 'X Y' is no name of a header"),
    (PROVIDER + "headers = { a = 3 }", "[[providers]] 'p': key 'headers', 'a' must be text in quotes"),
    (PROVIDER + "models = 'x'", "[[providers]] 'p': key 'models' must be a list"),
    (PROVIDER + "api_key = 3", "[[providers]] 'p': key 'api_key' must be a list"),
    (PROVIDER + "api_key = ['a', 3]", "[[providers]] 'p': key 'api_key', item 2 must be text in quotes"),
    (PROVIDER + "max_retries = -1", "[[providers]] 'p': key 'max_retries' must be at least 0"),
    (PROVIDER + "idle_timeout = 0", "[[providers]] 'p': key 'idle_timeout' must be at least 0.05"),
    (PROVIDER + "enabled = 'no'", "[[providers]] 'p': key 'enabled' must be true or false"),
    ("[[providers]]\ntype = 'openai'", "[[providers]] row 1: key 'name' must be 1 to 64 letters"),
    ("[[providers]]\nname = 'a/b'\ntype = 'openai'", "key 'name' must be 1 to 64 letters"),
    ("[[providers]]\nname = ''\ntype = 'openai'", "key 'name' must be 1 to 64 letters"),
    ("[[providers]]\nname = 3\ntype = 'openai'", "key 'name' must be 1 to 64 letters"),
    ("[[providers]]\nname = 'p'\ntype = 'openia'", "key 'type' is 'openia': did you mean 'openai'?"),
    ("[[providers]]\nname = 'p'\ntype = 'acmee'", "key 'type' is 'acmee': did you mean 'acme'?"),
    ("[[providers]]\nname = 'p'", "[[providers]] 'p': key 'type' is ''"),
    ("[[providers]]\nname = 'p'\ntype = 'openai'", "key 'base_url' is needed for type 'openai'"),
    (MODEL + "context = 'x'", "key 'context' must be a whole number"),
    (MODEL + "context = -1", "key 'context' must be at least 0"),
    (MODEL + "price = 3", "key 'price' must be a table such as"),
    (MODEL + "price = { input = 1 }", "'output' is missing"),
    (MODEL + "price = { input = 1, output = -2 }", "'output' must be a number of dollars, not below 0"),
    (MODEL + "price = { input = true, output = 2 }", "'input' must be a number of dollars"),
    (MODEL + "price = { input = nan, output = 2 }", "'input' must be a number of dollars"),
    (MODEL + "price = { input = inf, output = 2 }", "'input' must be a number of dollars"),
    (MODEL + "price = { input = 1e30, output = 2 }", "'input' is 1E+30 dollars for a million tokens; 100000 at most"),
    (MODEL + f"price = {{ input = 1{'0' * 400}, output = 2 }}", "dollars for a million tokens; 100000 at most"),
    (MODEL + "price = { input = 1, output = 2, cache_read = 100001 }", "'cache_read' is 100001 dollars"),
    (MODEL + "price = { input = 1, output = 2, cache_raed = 1 }", "did you mean 'cache_read'?"),
    (MODEL + "price = { input = 1, output = 2, tiers = 3 }", "tiers"),
    (MODEL + "price = { input = 1, output = 2, tiers = [3] }", "each tier needs `above`"),
    (MODEL + "price = { input = 1, output = 2, tiers = [{ input = 2 }] }", "each tier needs `above`"),
    (MODEL + "price = { input = 1, output = 2, tiers = [{ above = 5, inptu = 2 }] }",
     "did you mean 'input'?"),
    (MODEL + "mappings = 3", "key 'mappings' must be a list"),
    ("[[models]]\ncontext = 5", "[[models]]: each row needs a name"),
    (PROVIDER + MODEL + MAPPING + "provider = 'p'", "mapping to 'p': key 'actual_model' is needed"),
    (PROVIDER + MODEL + MAPPING + "provider = 'pp'\nactual_model = 'a'",
     "no such provider: did you mean 'p'?"),
    (PROVIDER + MODEL + MAPPING + "actual_model = 'a'", "no such provider"),
    (PROVIDER + MODEL + MAPPING + "provider = 'p'\nactual_model = 'a'\npriority = 'x'",
     "key 'priority' must be"),
    ("[router]\nfallback_provider = 'nobody'", "[router]: key 'fallback_provider' is 'nobody'"),
    (PROVIDER + PROVIDER, "[[providers]] 'p': the name is used twice"),
    (MODEL + MODEL, "[[models]] 'm': the name is used twice"),
    ("this is not TOML", "not valid TOML"),
    ("[server]\nhost = localhost", "not valid TOML: Invalid value (at line 2, column 8); text stands in quotes"),
    (f"[server]\nport = {'1' * 5000}", "not valid TOML: Exceeds the limit"),
    ("[credits]\nmarkup_percent = 1e99999999999999999999", "not valid TOML: a number is too large"),
    ("a = 1\na = 2", "not valid TOML"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "words"), TYPE_ERRORS, ids=[t.replace("\n", " ")[-60:] for t, _ in TYPE_ERRORS]
)
def test_what_is_wrong_is_told_in_one_line(text: str, words: str) -> None:
    assert words in error_of(text)


def test_a_type_that_is_a_format_and_a_preset_is_named_once() -> None:
    with pytest.raises(ConfigError, match=r"known are anthropic, openai, (?!.* (anthropic|openai),)"):
        ccmux.load_config('[[providers]]\nname = "p"\n', {})


def keys_of(cls: Any) -> list[str]:
    return [f.name for f in dataclasses.fields(cls) if "computed" not in f.metadata]


TABLES = {
    "[server]": ("[server]\n", Server),
    "[router]": ("[router]\n", ccmux.Router),
    "[credits]": ("[credits]\n", ccmux.Credits),
    "[[providers]]": (PROVIDER, Provider),
    "quirks": (PROVIDER + "[providers.quirks]\n", Quirks),
    "[[models]]": (MODEL, ccmux.Model),
    "mappings": (MODEL + MAPPING, ccmux.Target),
    "rules": ("[[router.rules]]\n", ccmux.PromptRule),
    "": ("", Config),
}
EVERY_KEY = [
    pytest.param(head, key, id=f"{table} {key}") for table, (head,
                                                             cls) in TABLES.items() for key in keys_of(cls)
]  # fmt: skip


@pytest.mark.parametrize(("head", "key"), EVERY_KEY)
def test_a_misspelt_key_names_the_nearest_known_one(head: str, key: str) -> None:
    typo = key + "x"
    words = error_of(f"{head}{typo} = 1\n")
    assert f"unknown key '{typo}': did you mean '{key}'?" in words
    if table := re.match(r"\[+(\w+)", head):
        assert table[1] in words


WRONG_FOR_ALL = "1979-05-27"  # a date is not the value of any key


@pytest.mark.parametrize(("head", "key"), [p for p in EVERY_KEY if p.values[0]])
def test_a_value_of_a_wrong_type_names_table_and_key(head: str, key: str) -> None:
    kept = "".join(line + "\n" for line in head.splitlines() if not line.startswith(f"{key} ="))
    words = error_of(f"{kept}{key} = {WRONG_FOR_ALL}\n")
    assert f"'{key}'" in words
    assert re.match(r"\[+(\w+)", head)[1] in words


@pytest.mark.parametrize("field", ["format", "default_model", "problem", "default"])
def test_what_ccmux_works_out_is_no_key_of_the_file(field: str) -> None:
    assert f"unknown key '{field}'" in error_of(PROVIDER + f"{field} = 'x'\n")


def test_every_key_has_help() -> None:
    for _, cls in TABLES.values():
        for field in dataclasses.fields(cls):
            assert "computed" in field.metadata or field.metadata["help"], f"{cls.__name__}.{field.name}"


# Environment


@pytest.mark.parametrize(
    ("written", "keys", "problem"),
    [
        pytest.param('"plain"', ("plain",), "", id="as written"),
        pytest.param('"$ACME_API_KEY"', ("acme-secret",), "", id="$NAME"),
        pytest.param('"${ACME_API_KEY}"', ("acme-secret",), "", id="${NAME}"),
        pytest.param('"x-$ACME_API_KEY-y"', ("x-acme-secret-y",), "", id="within a text"),
        pytest.param('"${ACME_API_KEY}$KEY_2"', ("acme-secretsecond-secret",), "", id="two"),
        pytest.param('"${NOT_SET:-fallback}"', ("fallback",), "", id="a default"),
        pytest.param('"${EMPTY:-fallback}"', ("fallback",), "", id="a default for an empty variable"),
        pytest.param('"${ACME_API_KEY:-fallback}"', ("acme-secret",), "", id="a default not needed"),
        pytest.param('"${NOT_SET:-}"', ("",), "", id="an empty default"),
        pytest.param('["$ACME_API_KEY", "two"]', ("acme-secret", "two"), "", id="a pool"),
        pytest.param('"$NOT_SET"', ("",), "$NOT_SET is not set in the environment", id="not set"),
        pytest.param('"$EMPTY"', ("",), "$EMPTY is not set in the environment", id="set but empty"),
        pytest.param('["one", "$NOT_SET"]', ("one", ""), "$NOT_SET is not set in the environment", id="in a pool"),
        pytest.param('"pa$-$"', ("pa$-$",), "", id="a dollar that names nothing"),
        pytest.param('"$FROM_A_FILE"', ("file-secret",), "", id="a line end after it"),
        pytest.param('" ${FROM_A_FILE} "', ("file-secret",), "", id="blanks around it"),
        pytest.param('["one", "$TWO_LINES"]', ("one", "a\r\nb"), "its api_key, or a header, has a line end inside",
                     id="a line end inside"),
        pytest.param('"cost$5"', ("cost$5",), "", id="a dollar and a digit"),
        pytest.param('""', (), "", id="none"),
        pytest.param('"passthrough"', ("passthrough",), "", id="the client's own"),
    ],
)  # fmt: skip
def test_api_key(written: str, keys: tuple[str, ...], problem: str) -> None:
    made = provider(f"api_key = {written}\n")
    if problem or keys == ("",):
        assert not any(k for k in made.api_key if "NOT_SET" in k or "EMPTY" in k)
    else:
        assert made.api_key == keys
    assert made.problem == problem
    assert made.usable is not bool(problem)
    assert made.passthrough is (written == '"passthrough"')


def test_a_missing_variable_disables_its_provider_with_a_warning() -> None:
    made = parse(PROVIDER + "api_key = '$NOT_SET'\n" + PROVIDER.replace('"p"', '"q"') + "api_key = 'k'\n")
    assert [p.usable for p in made.providers] == [False, True]
    assert made.warnings == ("provider p: $NOT_SET is not set in the environment; it is disabled until then",)


def test_a_disabled_provider_is_not_warned_of() -> None:
    assert parse(PROVIDER + "api_key = '$NOT_SET'\nenabled = false\n").warnings == ()


def test_a_model_that_nobody_can_ask_for_is_warned_of() -> None:
    [warning] = parse("[[models]]\nname = 'glm-5[1M]'\n[[models]]\nname = 'glm-5'\n").warnings
    assert warning.startswith("[[models]] 'glm-5[1M]': [1m] at the end of a name is ignored")


def test_headers_and_token_come_from_the_environment_too() -> None:
    assert provider("headers = { A = '$KEY_2', B = 'b' }\n").headers == {"A": "second-secret", "B": "b"}
    assert provider("headers = { A = '$NOT_SET' }\n").problem == "$NOT_SET is not set in the environment"
    assert parse("[server]\nadmin_token = '$KEY_2'\n").server.admin_token == "second-secret"


def test_other_keys_are_taken_as_written() -> None:
    assert provider("models = ['$ACME_API_KEY']\n").models == ("$ACME_API_KEY",)


def test_secrets_are_in_no_repr() -> None:
    made = parse(
        PROVIDER
        + "api_key = 'key-abcdef'\nheaders = { A = 'head-abcdef' }\n[server]\nadmin_token = 'tok-abcdefgh'\n"
    )
    assert "abcdef" not in repr((made.providers, made.server))
    assert made.secrets == ["tok-abcdefgh", "head-abcdef", "key-abcdef"]


def test_a_key_in_the_body_is_a_secret() -> None:
    made = parse(PROVIDER + "quirks = { extra_body = { api_key = 'body-abcdef', seed = 1 } }\n")
    assert made.secrets == ["body-abcdef"]


def test_a_password_in_an_address_is_a_secret() -> None:
    made = parse(PROVIDER + "proxy = 'http://anna:proxy-abcdef@proxy.test:3128'\n")
    assert made.secrets == ["proxy-abcdef"]


def test_a_passthrough_key_is_no_secret() -> None:
    assert parse(PROVIDER + "api_key = 'passthrough'\n").secrets == []
    assert parse(PROVIDER + "api_key = 'passthrough'\nheaders = { A = 'head-abcdef' }").secrets == [
        "head-abcdef"
    ]


# Presets


def test_a_preset_fills_in_the_rest() -> None:
    made = provider('type = "acme"\n')
    assert (made.type, made.format, made.base_url) == ("acme", "openai", "https://api.acme.test/v1")
    assert (made.api_key, made.first_byte_timeout, made.default_model) == (("acme-secret",), 600, "acme-1")
    assert (made.quirks.effort, made.quirks.files) == (("low", "high"), True)


def test_an_empty_base_url_is_the_presets() -> None:
    assert provider('type = "acme"\nbase_url = ""\n').base_url == "https://api.acme.test/v1"


def test_a_row_stands_over_its_preset() -> None:
    made = provider(
        'type = "acme"\nbase_url = "http://other.test"\napi_key = "k"\nfirst_byte_timeout = 5\n'
        'headers = { X-From = "row" }\nquirks = { files = false }\n'
    )
    assert (made.base_url, made.api_key, made.first_byte_timeout) == ("http://other.test", ("k",), 5)
    assert made.headers == {"X-From": "row", "X-Kept": "yes"}
    assert (made.quirks.effort, made.quirks.files) == (("low", "high"), False)


def test_a_preset_is_not_changed_by_a_row() -> None:
    before = repr(PRESETS)
    provider('type = "acme"\nquirks = { files = false }\nheaders = { A = "b" }\n')
    assert repr(PRESETS) == before


def test_a_preset_whose_variable_is_missing_is_disabled() -> None:
    assert provider('type = "acme"\n', {}).problem == "$ACME_API_KEY is not set in the environment"


def test_the_demo_needs_no_address() -> None:
    assert provider('type = "demo"\n').usable


# Addresses


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1:8080", "https://api.test/v1", "http://[::1]:11434", "http://192.168.1.5/v1",
        "http://localhost", "HTTPS://API.TEST", "http://user:pw@host.test/x", "http://10.0.0.7",
    ],
)  # fmt: skip
def test_addresses_that_are_taken(url: str) -> None:
    assert (
        parse(f'[[providers]]\nname = "p"\ntype = "openai"\nbase_url = "{url}"\n').providers[0].base_url
        == url
    )


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("ftp://host.test", "must be an http or https URL"),
        ("file:///etc/passwd", "must be an http or https URL"),
        ("api.test/v1", "must be an http or https URL"),
        ("http://", "must be an http or https URL"),
        ("http:///v1", "must be an http or https URL"),
        ("http://host.test:99999", "is not a URL"),
        ("http://[::1", "is not a URL"),
        (
            "http://anna:won/der@host.test",
            "is not a URL: in its user and password / ? # stand as %2F %3F %23",
        ),
        ("http://169.254.169.254/latest", "link-local"),
        ("http://169.254.0.1:80", "link-local"),
        ("http://[fe80::1]/", "link-local"),
        ("http://[fe80::1%25eth0]/", "link-local"),
        ("http://[::ffff:169.254.169.254]/", "link-local"),
        ("http://metadata.google.internal/", "link-local"),
        ("http://METADATA.google.internal./", "link-local"),
        pytest.param("http://2852039166/", "link-local", id="as one decimal number"),
        pytest.param("http://0xA9FEA9FE/", "link-local", id="as one hexadecimal number"),
        pytest.param("http://0251.0376.0251.0376/", "link-local", id="in octal"),
        pytest.param("http://169.254.43518/", "link-local", id="of three parts"),
        pytest.param("http://169.254.169.254./", "link-local", id="with a dot at the end"),
    ],
)
@pytest.mark.parametrize("key", ["base_url", "proxy"])
def test_addresses_that_are_refused(key: str, url: str, words: str) -> None:
    address = {"base_url": "http://p.test", key: url}
    told = error_of(
        '[[providers]]\nname = "p"\ntype = "openai"\n' + "".join(f'{k} = "{v}"\n' for k, v in address.items())
    )
    assert told.startswith(f"[[providers]] 'p': key '{key}' ")
    assert words in told


# Prices


@pytest.mark.parametrize(
    ("written", "price"),
    [
        ("{ input = 3.0, output = 15 }", Price(Decimal("3.0"), Decimal(15))),
        ("{ input = 0, output = 0 }", Price(Decimal(0), Decimal(0))),
        (
            "{ input = 0.1, output = 0.3, cache_read = 0.01, cache_write = 0.125, cache_write_1h = 0.2 }",
            Price(*map(Decimal, ("0.1", "0.3", "0.01", "0.125", "0.2"))),
        ),
        (
            "{ input = 1, output = 2, cache_read = 0.5, tiers = [{ above = 200000, input = 2, output = 4 }]}",
            Price(
                Decimal(1), Decimal(2), Decimal("0.5"),
                tiers=((200_000, Price(Decimal(2), Decimal(4), Decimal("0.5"))),),
            ),
        ),
    ],
)  # fmt: skip
def test_prices_are_exact(written: str, price: Price) -> None:
    assert parse(MODEL + f"price = {written}\n").models[0].price == price


def test_a_price_of_one_target() -> None:
    text = (
        PROVIDER
        + MODEL
        + MAPPING
        + "provider = 'p'\nactual_model = 'a'\nprice = { input = 1, output = 2 }\ncontext = 9\n"
    )
    [target] = parse(text).models[0].mappings
    assert (target.price, target.context) == (Price(Decimal(1), Decimal(2)), 9)


def test_no_price_is_none() -> None:
    assert parse(MODEL).models[0].price is None


# claude-code-mux 0.6

MUX = """
presets = ["x"]

[server]
host = "127.0.0.1"
port = 13456
log_level = "info"
api_key = "server-key"

[server.timeouts]
api_timeout_ms = 300000
connect_timeout_ms = 5000

[server.tracing]
enabled = true

[router]
default = "main"
background = "main"
think = "main"
websearch = "main"
auto_map_regex = "^claude-"
background_regex = "(?i)claude.*haiku"

[[router.prompt_rules]]
pattern = "^go"
model = "main"
strip_match = true

[[providers]]
name = "acme"
provider_type = "acme"
auth_type = "apikey"
api_key = "k"
enabled = true
models = []

[[providers]]
name = "z"
provider_type = "z.ai"
auth_type = "api_key"
api_key = "zk"
models = ["glm-4.6"]

[[providers]]
name = "max"
provider_type = "anthropic"
auth_type = "oauth"
oauth_provider = "anthropic-max"
enabled = true
models = []

[[models]]
name = "main"

[[models.mappings]]
priority = 1
provider = "max"
actual_model = "claude-x"

[[models.mappings]]
priority = 2
provider = "acme"
actual_model = "acme-1"
inject_continuation_prompt = true
"""


def test_a_claude_code_mux_file_loads_unchanged() -> None:
    made = parse(MUX)
    assert [(p.name, p.type, p.format) for p in made.providers] == [
        ("acme", "acme", "openai"), ("z", "zai", "anthropic"),
    ]  # fmt: skip
    assert [(p.response_timeout, p.connect_timeout) for p in made.providers] == [(300, 5), (300, 5)]
    [rule] = made.router.rules
    assert (rule.pattern.pattern, rule.model, rule.strip) == ("^go", "main", True)
    assert [(t.provider, t.actual_model) for t in made.models[0].mappings] == [("acme", "acme-1")]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        pytest.param('"acme"', '"acme coding plan"', id="a provider's name with spaces, as in its example"),
        pytest.param('"info"', '"warn"', id="its log level warn"),
        pytest.param('"info"', '"trace"', id="its log level trace"),
        pytest.param('"^go"', "'(?<verb>go)'", id="a named group as Rust has it"),
    ],
)
def test_what_else_a_claude_code_mux_file_may_say(old: str, new: str) -> None:
    text = MUX.replace('provider_type = "acme"', "provider_type = 'acme'").replace(old, new)
    assert text != MUX and len(parse(text).warnings) == 5


def test_what_is_empty_in_a_claude_code_mux_file_is_left_out() -> None:
    made, default = (
        parse(MUX.replace('"^claude-"', '""').replace('"(?i)claude.*haiku"', '""')).router,
        ccmux.Router(),
    )
    assert (made.auto_map_regex, made.background_regex) == (default.auto_map_regex, default.background_regex)
    assert parse("[router]\nauto_map_regex = ''\n").router.auto_map_regex is None


def test_a_sign_in_to_vertex_is_skipped_like_oauth() -> None:
    made = parse(MUX.replace('provider_type = "z.ai"', 'provider_type = "vertex-ai"\nproject_id = "x"'))
    assert "z" not in [p.name for p in made.providers] and len(made.warnings) == 6


def test_a_model_of_skipped_providers_alone_is_skipped_with_its_routes() -> None:
    text = MUX.replace('think = "main"', 'think = "plan"').replace("[[models]]", OAUTH_ONLY + "[[models]]", 1)
    made = parse(text)
    assert [m.name for m in made.models] == ["main"]
    assert (made.router.default, made.router.think) == ("main", "")
    assert len([w for w in made.warnings if "[[models]] 'plan'" in w]) == 1


OAUTH_ONLY = """
[[models]]
name = "plan"

[[models.mappings]]
priority = 1
provider = "max"
actual_model = "claude-x"

"""


@pytest.mark.parametrize(
    "words",
    [
        "provider max: signing in by OAuth is not something ccmux does; it is skipped",
        "claude-code-mux's key 'presets'",
        "[server]: claude-code-mux's key 'api_key'",
        "[server]: claude-code-mux's key 'tracing'",
        "claude-code-mux's key 'inject_continuation_prompt'",
    ],
)
def test_what_is_skipped_is_warned_of_once(words: str) -> None:
    assert len([w for w in parse(MUX).warnings if words in w]) == 1


def test_nothing_else_is_warned_of() -> None:
    assert len(parse(MUX).warnings) == 5


def test_the_tables_stay_as_written() -> None:
    assert parse(MUX).tables["providers"][2]["auth_type"] == "oauth"


@pytest.mark.parametrize(
    "text",
    [
        "[server]\ntimeouts = 3\n",
        "[server.timeouts]\napi_timeout_ms = 'x'\n",
        "[router]\nprompt_rules = 'x'\n",
        "[router]\nprompt_rules = ['x']\n", "[[providers]]\nname = 'p'\nprovider_type = 3\n",
        "providers = ['x']\n", "models = ['x']\n", "[[models]]\nname = 'm'\nmappings = ['x']\n",
        "[[providers]]\nname = ['p']\nauth_type = 'oauth'\n[[models]]\nname = 'm'\n[[models.mappings]]\n"
        "provider = ['p']\n",
    ],
)  # fmt: skip
def test_a_broken_mux_file_is_one_line_or_loads(text: str) -> None:
    try:
        parse(text)
    except ConfigError as error:
        assert "\n" not in str(error)


VALUES = st.recursive(
    st.sampled_from(["1", "-1", "1.5", "true", '"x"', '""', "nan", "inf", "1979-05-27", "12:00:00"]),
    lambda inner: (
        st.lists(inner, max_size=2).map(lambda v: f"[{', '.join(v)}]")
        | inner.map(lambda v: f"{{ name = {v} }}")
    ),
    max_leaves=4,
)
KEYS = st.sampled_from(EVERY_KEY).map(lambda p: p.values)


@given(KEYS, VALUES)
def test_any_value_of_any_key_loads_or_is_told_in_one_line(key: tuple[str, str], value: str) -> None:
    head, name = key
    kept = "".join(line + "\n" for line in head.splitlines() if not line.startswith(f"{name} ="))
    try:
        parse(f"{kept}{name} = {value}\n")
    except ConfigError as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize(
    ("known", "says"),
    [
        pytest.param(["alpha", "", "beta"], "known are alpha, beta", id="few"),
        pytest.param(["alpha", "zzzy"], "did you mean 'zzzy'?", id="one is near"),
        pytest.param([f"m{n}" for n in range(33)], "m29 and 3 more", id="more than a line holds"),
    ],
)
def test_what_to_write_instead_of_an_unknown_name(known: list[str], says: str) -> None:
    assert ccmux.known_names("zzzz", known).endswith(says)
