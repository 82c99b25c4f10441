"""import-litellm: what each shape of a LiteLLM config.yaml becomes, and that the report is truthful."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import yaml

import ccmux

FIXTURES = Path(__file__).parent / "fixtures/litellm"
SECRETS = (
    "sk-written-in-the-file",
    "secret-team-token",
    "fake-key",
    "hunter2",
    "sk-1234-master-key",
    "eYVX71",
    "password@",
)


def imported(text: str, **env: str) -> ccmux.LiteLLMImport:
    return ccmux.LiteLLMImport(yaml.safe_load(text), env)


def config_of(text: str, **env: str) -> ccmux.Config:
    return ccmux.load_config(imported(text, **env).toml(), env)


def report_of(text: str, word: str, **env: str) -> list[str]:
    return [line for kind, line in imported(text, **env).report if kind == word]


def row(model: str, *, name: str = "m", info: str = "", **params: Any) -> str:
    inner = "".join(f", {key}: {value}" for key, value in params.items())
    return (
        f"  - {{model_name: '{name}', litellm_params: {{model: '{model}'{inner}}}, model_info: {{{info}}}}}\n"
    )


def model_list(*rows: str, more: str = "") -> str:
    return "model_list:\n" + "".join(rows) + more


@pytest.mark.parametrize(
    ("params", "provider"),
    [
        pytest.param({"model": "openai/gpt-4o"}, ("openai", "openai", "https://api.openai.com/v1", "gpt-4o"), id="openai"),
        pytest.param({"model": "gpt-5-mini"}, ("openai", "openai", "https://api.openai.com/v1", "gpt-5-mini"), id="no-prefix"),
        pytest.param({"model": "claude-opus-5"}, ("anthropic", "anthropic", "https://api.anthropic.com", "claude-opus-5"),
                     id="claude"),
        pytest.param({"model": "openrouter/z-ai/glm-5.3"},
                     ("openrouter", "openrouter", "https://openrouter.ai/api/v1", "z-ai/glm-5.3"), id="openrouter"),
        pytest.param({"model": "together_ai/zai-org/GLM-5.3"},
                     ("together_ai", "together", "https://api.together.xyz/v1", "zai-org/GLM-5.3"), id="together"),
        pytest.param({"model": "ollama/llama2"}, ("ollama", "ollama", "http://localhost:11434", "llama2"), id="ollama"),
        pytest.param({"model": "azure/dep", "api_base": "https://x.example/"},
                     ("azure", "openai", "https://x.example/openai/v1", "dep"), id="azure"),
        pytest.param({"model": "azure/d", "api_base": "'https://openai/openai/deployments/d?api-version=1'"},
                     ("azure", "openai", "https://openai/openai/v1", "d"), id="azure-deployment"),
        pytest.param({"model": "openai/responses/gpt-5.5"},
                     ("openai-responses", "responses", "https://api.openai.com/v1", "gpt-5.5"), id="responses"),
        pytest.param({"model": "o3-pro", "info": "mode: responses"},
                     ("openai-responses", "responses", "https://api.openai.com/v1", "o3-pro"), id="responses-by-mode"),
        pytest.param({"model": "azure/responses/d", "api_base": "https://x.example"},
                     ("azure-responses", "responses", "https://x.example/openai/v1", "d"), id="azure-responses"),
        pytest.param({"model": "hosted_vllm/org/m", "api_base": "http://h:8000/v1"},
                     ("hosted_vllm", "openai", "http://h:8000/v1", "org/m"), id="vllm"),
        pytest.param({"model": "somebody/Org/M", "api_base": "https://s.example/v1"},
                     ("somebody", "openai", "https://s.example/v1", "Org/M"), id="unknown-with-address"),
        pytest.param({"model": "gpt-4o", "custom_llm_provider": "groq"},
                     ("groq", "groq", "https://api.groq.com/openai/v1", "gpt-4o"), id="custom-provider"),
    ],
)  # fmt: skip
def test_deployment(params: dict[str, str], provider: tuple[str, ...]) -> None:
    config = config_of(model_list(row(**params)))
    made, target = config.providers[0], config.models[0].mappings[0]
    assert (made.name, made.type, made.base_url, target.actual_model) == provider
    assert (target.provider, target.priority) == (made.name, 1)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        pytest.param(row("bedrock/us.anthropic.claude"), "ccmux has no preset or format for 'bedrock'", id="bedrock"),
        pytest.param(row("mistralai/mistral-7b-instruct"), "no preset or format for 'mistralai'", id="unknown"),
        pytest.param(row("openai/e", info="mode: embedding"), "mode embedding", id="embedding"),
        pytest.param(row("azure/", api_base="https://x.example"), "model m: no model of azure is named", id="no-model"),
        pytest.param(row("openai/x", api_base="os.environ/NOWHERE"), "NOWHERE, which is not set", id="address-in-variable"),
        pytest.param(row("azure/x"), "AZURE_API_BASE, which is not set", id="azure-address-in-its-variable"),
        pytest.param(row("openai/x", rpm=6, tpm=7), "model m: rpm, tpm", id="limits"),
        pytest.param(row("openai/x", info="input_cost_per_token: 1"), "needs both", id="half-a-price"),
        pytest.param(row("openai/x", name="claude-*"), "write the names into `models`", id="odd-wildcard"),
        pytest.param("  - litellm_params: {model: openai/x}", "a row of model_list without", id="no-name"),
        pytest.param("guardrails: [1]", "guardrails: ccmux has nothing like it", id="other-table"),
        pytest.param("router_settings: {timeout: soon}", "timeout = 'soon': not a number", id="no-number"),
        pytest.param("litellm_settings: {callbacks: [otel], cache: true}", "litellm_settings: cache, callbacks", id="settings"),
    ],
)  # fmt: skip
def test_dropped(text: str, said: str) -> None:
    text = model_list(text) if text.startswith("  -") else text
    assert said in "\n".join(report_of(text, "dropped"))


def test_keys_and_providers() -> None:
    """The same address and key are one provider; a written key becomes a variable's name, the same one each time."""
    text = model_list(
        row("openai/a", api_key="os.environ/ONE"), row("openai/b", api_key="os.environ/ONE"),
        row("openai/c", api_key="sk-two"), row("openai/d", api_key="sk-two"), row("openai/e"),
    )  # fmt: skip
    made = imported(text)
    assert [(p["name"], p.get("api_key")) for p in made.providers] == [
        ("openai", "$ONE"), ("openai-2", "$LITELLM_KEY_1"), ("openai-3", None),
    ]  # fmt: skip
    assert "sk-two" not in made.toml() + str(made.report)


def test_no_key_goes_to_an_address_of_ones_own() -> None:
    """A preset's variable is for the preset's own address."""
    config = config_of(
        model_list(row("openai/x", api_base="http://localhost:1/v1")), OPENAI_API_KEY="sk-real"
    )
    assert config.providers[0].api_key == ()
    config = config_of(
        model_list(row("openai/x", api_base="https://api.openai.com/v1/")), OPENAI_API_KEY="sk-real"
    )
    assert config.providers[0].api_key == ("sk-real",)


def test_the_key_of_openais_responses() -> None:
    text = model_list(row("openai/responses/x"), row("openai/responses/y", api_key="os.environ/MINE"))
    text += row("openai/responses/z", api_base="http://localhost:1/v1")
    assert [p.get("api_key") for p in imported(text).providers] == ["$OPENAI_API_KEY", "$MINE", ""]


@pytest.mark.parametrize(
    ("model", "address", "variable"),
    [
        ("nvidia_nim/meta/llama3", "", "$NVIDIA_NIM_API_KEY"),
        ("github/gpt-4o", "", "$GITHUB_API_KEY"),
        ("codestral/x", "https://codestral.mistral.ai/v1", "$CODESTRAL_API_KEY"),
        ("azure/d", "https://x.example/openai/v1", "$AZURE_API_KEY"),
        ("azure/responses/d", "https://x.example/openai/v1", "$AZURE_API_KEY"),
    ],
)
def test_the_key_of_a_row_without_one(model: str, address: str, variable: str) -> None:
    made = imported(model_list(row(model)), AZURE_API_BASE="https://x.example").providers[0]
    assert (made.get("base_url", ""), made["api_key"]) == (address, variable)


def test_prices_and_context() -> None:
    info = (
        "input_cost_per_token: 0.0000025, output_cost_per_token: 1e-05, cache_read_input_token_cost: 1.25e-06, "
        "cache_creation_input_token_cost: 3.125e-06, max_input_tokens: 128000"
    )
    target = config_of(model_list(row("openai/x", info=info))).models[0].mappings[0]
    assert target.price == ccmux.Price(Decimal("2.5"), Decimal(10), Decimal("1.25"), Decimal("3.125"))
    assert target.context == 128_000


FALLBACKS = """
router_settings:
  fallbacks: [{"a": ["b", "c"]}, {"b": ["a"]}, {"a": ["a"]}, {"c": ["nobody"]}]
litellm_settings:
  context_window_fallbacks: [{"c": ["b"]}]
"""


def test_fallbacks_are_targets_in_order() -> None:
    """Also where they lead in a circle."""
    text = model_list(
        row("openai/a", name="a"), row("groq/a", name="a"), row("openai/b", name="b"), row("openai/c", name="c"),
        more=FALLBACKS,
    )  # fmt: skip
    config = config_of(text)
    assert {
        m.name: [(f"{t.provider}/{t.actual_model}", t.priority) for t in m.mappings] for m in config.models
    } == {
        "a": [("openai/a", 1), ("groq/a", 1), ("openai/b", 2), ("openai/c", 3)],
        "b": [("openai/b", 1), ("openai/a", 2), ("groq/a", 2)],
        "c": [("openai/c", 1), ("openai/b", 2)],
    }
    assert "fallbacks: c -> nobody" in "\n".join(report_of(text, "dropped"))
    assert "context_window_fallbacks: c -> b" in "\n".join(report_of(text, "approximated"))


def test_default_fallbacks() -> None:
    text = (
        model_list(row("openai/a", name="a"), row("openai/b", name="b"))
        + 'litellm_settings: {default_fallbacks: ["b"]}'
    )
    assert [t.actual_model for t in config_of(text).model("a").mappings] == ["a", "b"]
    assert [t.actual_model for t in config_of(text).model("b").mappings] == ["b"]


def test_aliases() -> None:
    alias = (
        'router_settings: {model_group_alias: {"x": "m", "y": {"model": "m", "hidden": true}, "z": "nobody"}}'
    )
    config = config_of(model_list(row("openai/gpt-4o")) + alias)
    assert [m.name for m in config.models] == ["m", "x", "y"]
    assert config.model("x").mappings == config.model("y").mappings == config.model("m").mappings


def test_wildcards() -> None:
    text = model_list(row("openai/*", name="*"), row("groq/*", name="groq/*"))
    config = config_of(text)
    assert (config.router.fallback_provider, config.models) == ("openai", ())
    body = {"model": "groq/llama-4", "messages": []}
    assert ccmux.choose_route(body, {}, config).targets == (ccmux.Target("groq", "llama-4"),)
    body = {"model": "whatever", "messages": []}
    assert ccmux.choose_route(body, {}, config).targets == (ccmux.Target("openai", "whatever"),)


def test_master_key_where_the_page_about_claude_code_has_it() -> None:
    text = model_list(row("openai/a")) + "litellm_settings: {master_key: os.environ/LITELLM_MASTER_KEY}\n"
    server = config_of(text, LITELLM_MASTER_KEY="t").server
    assert (server.require_key, server.admin_token) == (True, "t")


def test_order_limits_and_master_key() -> None:
    text = model_list(row("openai/a"), row("groq/b", order=2)) + (
        "litellm_settings: {num_retries: 3, request_timeout: 90}\n"
        "router_settings: {routing_strategy: least-busy}\n"
        "general_settings: {master_key: sk-1234}\n"
    )
    made, config = imported(text), config_of(text, CCMUX_ADMIN_TOKEN="t")
    assert [t.priority for t in config.models[0].mappings] == [1, 2]
    assert {(p.max_retries, p.response_timeout) for p in config.providers} == {(3, 90.0)}
    assert (config.server.require_key, config.server.admin_token) == (True, "t")
    assert "sk-1234" not in made.toml() + str(made.report)
    assert "routing_strategy least-busy" in str(made.report)


def test_no_retries_is_a_number_of_retries() -> None:
    config = config_of(model_list(row("openai/a")) + "litellm_settings: {num_retries: 0}")
    assert config.providers[0].max_retries == 0


def test_the_routers_timeout_stands_over_request_timeout() -> None:
    config = config_of(model_list(row("openai/a")) + "router_settings: {timeout: 30, request_timeout: 600}")
    assert config.providers[0].response_timeout == 30


def test_every_key_of_the_file_is_in_the_report() -> None:
    """Nothing is lost in silence: each key is mapped, approximated or dropped by name."""
    tables = yaml.safe_load((FIXTURES / "several.yaml").read_text("utf-8"))
    report = "\n".join(line for _, line in ccmux.LiteLLMImport(tables, {}).report)
    for entry in tables["model_list"]:
        assert f"model {entry['model_name']}" in report
    for table in ("litellm_settings", "router_settings", "general_settings"):
        for key in tables[table]:
            named = {"model_group_alias": "alias"}.get(key, key)
            assert named in report, key


# The command.


@pytest.mark.parametrize("path", sorted(FIXTURES.glob("*.yaml")), ids=lambda path: path.stem)
def test_dry_run_prints_a_config_that_loads(
    path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert ccmux.main(["import-litellm", str(path)]) == 0
    out, err = capsys.readouterr()
    ccmux.load_config(out, {})
    assert "# Report\n" in out and err == ""
    assert not [secret for secret in SECRETS if secret in out]
    assert not list(tmp_path.iterdir())


def test_write(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "config.toml"
    command = ["import-litellm", str(FIXTURES / "several.yaml"), "--write", str(target)]
    assert ccmux.main(command) == 0
    assert "mapped        model gpt-4o -> azure/gpt-4o-eu" in capsys.readouterr().out
    assert target.stat().st_mode & 0o777 == 0o600
    ccmux.load_config(target.read_text("utf-8"), {})
    assert ccmux.main(command) == 2  # never over a file that is there
    assert capsys.readouterr().err == f"ccmux: {target}: File exists\n"


@pytest.mark.parametrize(
    "text", ["a: [", "\x00", "just words", "- 1", ""], ids=["broken", "binary", "text", "list", "empty"]
)
def test_odd_files_are_one_line_or_nothing(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(text)
    status = ccmux.main(["import-litellm", str(path)])
    err = capsys.readouterr().err
    assert status in (0, 2) and err.count("\n") == (status == 2)


def test_without_pyyaml(tmp_path: Path) -> None:
    """One line that says how to get it into the Python that runs."""
    (tmp_path / "yaml.py").write_text("raise ImportError('no yaml')")
    done = subprocess.run(
        [sys.executable, importlib.import_module("ccmux").__file__, "import-litellm", "x.yaml"], cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path), "HOME": str(tmp_path)}, capture_output=True, text=True,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"ccmux: import-litellm needs PyYAML: {sys.executable} -m pip install pyyaml\n"
