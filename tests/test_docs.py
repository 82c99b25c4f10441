"""The documentation held to the code, both ways; its examples run, parse and load."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

import ccmux

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text("utf-8")
EXAMPLE = (ROOT / "config.example.toml").read_text("utf-8")

TABLES: dict[str, Any] = {
    "[server]": ccmux.Server, "[router]": ccmux.Router, "[[router.rules]]": ccmux.PromptRule,
    "[[providers]]": ccmux.Provider, "[providers.quirks]": ccmux.Quirks, "[[models]]": ccmux.Model,
    "[[models.mappings]]": ccmux.Target, "[credits]": ccmux.Credits,
}  # fmt: skip
INNER = {"rules", "quirks", "mappings"}  # keys that are tables of their own


def section(title: str) -> str:
    """The README's text under a heading, up to the next one of its level."""
    level = title.split()[0]
    found = re.search(rf"^{re.escape(title)}\n(.*?)(?=^#{{1,{len(level)}}} |\Z)", README, re.M | re.S)
    assert found, title
    return found[1]


def blocks(language: str) -> list[str]:
    """The README's fenced blocks of a language, without their indentation."""
    found = re.findall(rf"^( *)```{language}\n(.*?)^ *```$", README, re.M | re.S)
    return ["".join(line.removeprefix(indent) for line in text.splitlines(True)) for indent, text in found]


def first_cells(text: str) -> list[str]:
    """What stands in backticks at the start of each table row."""
    return [cell.replace("\\|", "|") for cell in re.findall(r"^\| `((?:[^`])+)` \|", text, re.M)]


def fields_of(table: Any) -> list[Any]:
    return [f for f in dataclasses.fields(table) if "computed" not in f.metadata and f.name not in INNER]


def choices_of(field: Any) -> list[str]:
    return [choice for choice in field.metadata.get("choices") or () if choice]


# Commands.


def test_every_command_is_in_the_readme_and_the_other_way_round() -> None:
    rows = first_cells(section("## Commands"))
    words = [re.match(r"(?:user )?[\w-]+", row)[0] for row in rows]
    assert sorted(words) == sorted(command.name for command in ccmux.COMMANDS)


@pytest.mark.parametrize("command", ccmux.COMMANDS, ids=lambda command: command.name)
def test_flags_of_a_command(command: ccmux.Command) -> None:
    rows = [
        row for row in first_cells(section("## Commands")) if re.match(rf"{command.name}( [^a-z]|$)", row)
    ]
    assert len(rows) == 1
    assert set(re.findall(r"(?<![\w-])--?[a-z][\w-]*", rows[0])) == {
        name for names, _ in command.flags for name in names if name.startswith("-")
    }
    for _, options in command.flags:
        assert "|".join(options.get("choices") or ()) in rows[0]


def test_commands_and_flags_named_in_the_text_exist() -> None:
    names = {command.name.split()[0] for command in ccmux.COMMANDS} | {"COMMAND"}
    for word in re.findall(r"ccmux\.py (?!-)([\w-]+)", README):
        assert word in names, word
    known = {name for command in ccmux.COMMANDS for names, _ in command.flags for name in names}
    for command in re.findall(r"ccmux\.py ((?!code)[^`\n|)]*)", README):
        for flag in re.findall(r"(?<!\S)--[a-z][\w-]*", command.partition(" > ")[0]):
            assert flag in known | {"--config", "--help", "--version"}, command


# Configuration.


@pytest.mark.parametrize("title", TABLES)
def test_every_key_is_in_the_readme_and_the_other_way_round(title: str) -> None:
    text = section(f"### `{title}`")
    assert first_cells(text) == [f.name for f in fields_of(TABLES[title])]
    for field in fields_of(TABLES[title]):
        line = re.search(rf"^\| `{field.name}` \| `(.*?)` \| (.*) \|$", text, re.M)
        assert line and field.metadata["help"] in line[2], field.name
        assert all(choice in line[2] for choice in choices_of(field)), field.name
        default = field.default
        if isinstance(default, (bool, int, float, str)) and default != "":
            assert tomllib.loads(f"x = {line[1]}")["x"] == default


def example_tables() -> dict[str, dict[str, Any]]:
    """The example's tables by title; of a list of tables the one with the most keys."""
    data = tomllib.loads(EXAMPLE)
    fullest = {name: max(data[name], key=len) for name in ("providers", "models")}
    mappings = [mapping for model in data["models"] for mapping in model["mappings"]]
    return {
        "[server]": data["server"], "[router]": data["router"], "[[router.rules]]": data["router"]["rules"][0],
        "[[providers]]": fullest["providers"], "[providers.quirks]": fullest["providers"]["quirks"],
        "[[models]]": fullest["models"], "[[models.mappings]]": max(mappings, key=len), "[credits]": data["credits"],
    }  # fmt: skip


@pytest.mark.parametrize("title", TABLES)
def test_the_example_shows_every_key_with_its_help(title: str) -> None:
    table = example_tables()[title]
    assert [key for key in table if key not in INNER] == [f.name for f in fields_of(TABLES[title])]
    for field in fields_of(TABLES[title]):
        comment = re.search(rf"# ({re.escape(field.metadata['help'])}.*)", EXAMPLE)
        assert comment and all(choice in comment[1] for choice in choices_of(field)), field.name


def test_the_example_shows_the_defaults() -> None:
    """Where the file says that it does: the server's, the credits' and the quirks' keys, and a provider's limits."""
    config = ccmux.load_config(EXAMPLE, {})
    assert dataclasses.replace(config.server, admin_token="") == ccmux.Server()
    assert config.credits == ccmux.Credits()
    mine = config.provider("my-server")
    for name in ("enabled", "max_retries", "max_concurrent", "proxy", "connect_timeout", "first_byte_timeout",
                 "response_timeout", "idle_timeout", "total_timeout"):  # fmt: skip
        assert getattr(mine, name) == getattr(ccmux.Provider(), name), name


def test_the_example_loads_with_no_environment_and_with_one() -> None:
    bare = ccmux.load_config(EXAMPLE, {})
    assert {p.name for p in bare.providers if not p.usable} == {"anthropic", "openrouter", "my-server"}
    assert len(bare.warnings) == 3
    names = set(re.findall(r'"\$(\w+)"', EXAMPLE)) - {"NAME"}
    assert not ccmux.load_config(EXAMPLE, dict.fromkeys(names, "x")).warnings


def test_what_needs_a_restart() -> None:
    said = re.compile(r"([^.;]*) need a restart")
    for text in (README, EXAMPLE):
        assert [set(re.findall(r"[a-z_]+", m[1])) - {"and"} for m in said.finditer(text)] == [
            set(ccmux.AT_START)
        ]


# Routing, providers, endpoints, metrics.


def test_route_steps_in_their_order() -> None:
    text = section("## Routing")
    assert first_cells(text)[: len(ccmux.ROUTE_STEPS)] == [reason for reason, _ in ccmux.ROUTE_STEPS]
    for slot in re.findall(r"`router\.(\w+)`", text):
        assert slot in {f.name for f in dataclasses.fields(ccmux.Router)}
    for slot in ccmux.ROUTE_SLOTS:
        assert f"router.{slot}" in text


def test_presets() -> None:
    rows = re.findall(
        r"^\| `([\w-]+)` \| (\w+) \| (\S+|in ccmux) \| (\S+) \| (\S+) \|$", section("## Providers"), re.M
    )
    assert rows == [
        (
            name, row["type"], row["base_url"] or "in ccmux",
            f"`{re.search(r'[A-Z_]+', row['api_key'])[0]}`" if row["api_key"] else "-", row["default"] or "-",
        )
        for name, row in ccmux.PRESETS.items()
    ]  # fmt: skip
    formats = set(
        re.findall(r"`(\w+)`", section("## Providers").partition("\nFormats: ")[2].partition("\n")[0])
    )
    assert formats == set(ccmux.DIALECTS)


def documented_endpoints() -> set[tuple[str, str]]:
    text = section("## Endpoints")
    found = re.findall(r"`(GET|POST|PUT|PATCH|DELETE) (/[^`?]*)", text)
    return {(method, path) for method, path in found}


def served_endpoints() -> set[tuple[str, str]]:
    routes = [*ccmux.api_routes(), *ccmux.admin_routes()]
    return {(route.method, re.sub(r":[^}]*", "", route.path)) for route in routes}


def test_every_endpoint_is_in_the_readme_and_the_other_way_round() -> None:
    assert documented_endpoints() == served_endpoints()


def test_pages_are_in_the_readme() -> None:
    for route in ccmux.page_routes():
        assert f"at `{route.path}`" in section("## The pages")


def test_metrics() -> None:
    named = set(re.findall(r'"(ccmux_\w+)[{"]', (ROOT / "ccmux.py").read_text("utf-8"))) - {"ccmux_system"}
    assert set(first_cells(section("## Metrics"))) == named


def test_sections_of_the_architecture() -> None:
    listed = re.findall(r"^\d+\. (.+)$", section("## Architecture"), re.M)
    assert listed == re.findall(r"^    (\S.*)$", str(ccmux.__doc__).partition("Sections,")[2], re.M)


# Examples.


@pytest.mark.parametrize("text", blocks("toml"), ids=lambda text: text.splitlines()[0])
def test_toml_examples_load(text: str) -> None:
    ccmux.load_config(text, {})


@pytest.mark.parametrize("text", blocks("json"), ids=lambda text: text[:30])
def test_json_examples_parse(text: str) -> None:
    json.loads(text)


def test_inline_json_parses() -> None:
    for text in re.findall(r"`(\{\"[^`]*\})`", README):
        json.loads(text)


def test_runnable_shell_blocks_run(tmp_path: Path) -> None:
    """In the order of the README, in one folder, as a newcomer would."""
    found = blocks("sh run")
    assert len(found) >= 4
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/python3").symlink_to(sys.executable)
    (tmp_path / "ccmux.py").symlink_to(ROOT / "ccmux.py")
    environment = {
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "HOME": str(tmp_path), "OLLAMA_HOST": "127.0.0.1:9",
        "VIRTUAL_ENV": sys.prefix, "PYTHONPATH": os.pathsep.join(p for p in sys.path if "site-packages" in p),
    }  # fmt: skip
    for text in found:
        done = subprocess.run(
            ["bash", "-eu", "-c", text],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, f"{text}\n{done.stderr}"


def test_the_charge_worked_out_is_what_ccmux_charges() -> None:
    text = section("## Users, credits, billing")
    rows = dict(re.findall(r"^\| ([\w ,-]+?) \| ([\d,]+) \|", text, re.M))
    tokens = {name: int(amount.replace(",", "")) for name, amount in rows.items()}
    usage = ccmux.Usage(
        input=tokens["input, not cached"], cache_read=tokens["cache read"], cache_write=tokens["cache write"],
        output=tokens["output"],
    )  # fmt: skip
    config = ccmux.load_config(
        '[[providers]]\nname = "anthropic"\ntype = "anthropic"\n[credits]\nmarkup_percent = 20', {}
    )
    price = ccmux.price_of(config, ccmux.Target("anthropic", "claude-sonnet-5-5"), "")
    charge = ccmux.charge_of(usage, price, config.credits.markup_percent)
    for amount in (charge.cost, charge.markup, charge.charge):
        assert f"{amount:,}" in text
    assert "input $2, output $10, cache read $0.10, 5-minute cache write $2.50" in text
    assert (price.input, price.output, price.cache_read, price.cache_write) == (
        2,
        10,
        ccmux.Decimal("0.1"),
        ccmux.Decimal("2.5"),
    )


SAMPLES = (
    r"'[^']*'|\$NAME|provider X|http://\S*|\d[\d.:]*|\bN\b|\$[\d.]+|the day's|\.\.\.|\(421\)|\(403\)|\bX\b"
)


def test_troubleshooting_quotes_what_ccmux_says() -> None:
    """Each message's own words, without the samples in it, stand in the code."""
    source = re.sub(r"\s+", " ", (ROOT / "ccmux.py").read_text("utf-8"))
    source = re.sub(r'" f?"', "", re.sub(r"\{[^{}]*\}", "", source))
    for message in first_cells(section("## Troubleshooting")):
        for words in re.split(SAMPLES, message):
            words = words.strip(" :;,?()")
            assert words in source, (message, words)


def test_every_environment_variable_of_ccmux_is_explained() -> None:
    source = (ROOT / "ccmux.py").read_text("utf-8")
    for name in set(re.findall(r'environ(?:\.get)?[(\[]"(CCMUX_\w+)"', source)):
        assert name in README, name


def test_links_within_the_readme_lead_somewhere() -> None:
    titles = re.findall(r"^#+ (.+)$", README, re.M)
    anchors = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
    assert set(re.findall(r"\]\(#([\w-]+)\)", README)) <= anchors
