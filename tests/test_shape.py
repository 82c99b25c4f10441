"""The one file reads top to bottom: its list of sections, their banners, and who uses what agree."""

from __future__ import annotations

import ast
import fnmatch
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import ccmux

ROOT = Path(__file__).resolve().parent.parent
SOURCE = (ROOT / "ccmux.py").read_text("utf-8")
LINES = SOURCE.splitlines()
TREE = ast.parse(SOURCE)
RULE = re.compile(r"# -{20,}")


def banners() -> list[tuple[int, str]]:
    """(line number, title) of each section: a title between two rules."""
    ruled = [n for n, line in enumerate(LINES, 1) if RULE.fullmatch(line)]
    return [(n + 1, LINES[n].removeprefix("# ")) for n in ruled if n + 2 in ruled]


def listed() -> list[str]:
    """The sections that the docstring lists."""
    assert ccmux.__doc__ is not None
    _, _, after = ccmux.__doc__.partition("\nSections")
    return re.findall(r"^    (\S.*)$", after, re.M)


SECTIONS = [(0, "header"), *banners()]
TITLES = [title for _, title in SECTIONS]


def section_of(line: int) -> int:
    return max(n for n, (start, _) in enumerate(SECTIONS) if start <= line)


def title_only(text: str) -> str:
    return text.partition(" (")[0]


def test_the_list_of_sections_is_the_banners_in_order() -> None:
    assert [title_only(t) for t in listed()] == [title_only(t) for t in TITLES[1:]]


def test_a_banner_says_whether_its_section_is_pure() -> None:
    assert [("(pure" in t) for t in listed()] == [("(pure" in t) for t in TITLES[1:]]


def test_an_older_python_gets_as_far_as_being_told_so() -> None:
    """It compiles the whole file before it runs the first line, so the file keeps to what Python 3.8 can read."""
    tree = ast.parse(SOURCE, feature_version=(3, 8))  # which lets these two pass:
    indexes = [
        n.slice for n in ast.walk(tree) if isinstance(n, ast.Subscript) and isinstance(n.slice, ast.Tuple)
    ]
    assert not [i.lineno for i in indexes if any(isinstance(part, ast.Starred) for part in i.elts)]
    assert not [n for n, line in enumerate(LINES, 1) if re.fullmatch(r"\s*(async )?with \(", line)]


def names_defined(node: ast.stmt) -> Iterator[str]:
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        yield node.name
    elif isinstance(node, (ast.Assign, ast.AnnAssign)):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        yield from (n.id for t in targets for n in ast.walk(t) if isinstance(n, ast.Name))


DEFINED = {
    name: section_of(node.lineno) for node in TREE.body for name in names_defined(node)
}  # where each module-level name comes from


def names_used(node: ast.AST) -> Iterator[tuple[str, int]]:
    """(name, line) of what a module-level statement reads, its own local names left out."""
    own = {
        a.arg
        for n in ast.walk(node)
        if isinstance(n, ast.arguments)
        for a in ast.walk(n)
        if isinstance(a, ast.arg)
    }
    own |= {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    own |= {n.name for n in ast.walk(node) if isinstance(n, ast.FunctionDef) and n is not node}
    for n in ast.walk(node):
        if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load) and n.id not in own:
            yield n.id, n.lineno


@pytest.mark.parametrize("title", TITLES)
def test_a_section_uses_only_the_sections_above_it(title: str) -> None:
    here = TITLES.index(title)
    upwards = [
        f"line {line}: {name} of {TITLES[DEFINED[name]]!r}"
        for node in TREE.body
        if section_of(node.lineno) == here
        for name, line in names_used(node)
        if DEFINED.get(name, 0) > here
    ]
    assert not upwards


# Modules with effects, and what reads files and the environment.
IMPURE = {
    "aiohttp", "asyncio", "log", "logging", "open", "random", "signal", "sqlite3", "subprocess", "time",
    "web", "os.environ",
}  # fmt: skip
# Long counts run in a worker thread; the vocabulary files are looked for here.
ALLOWED_IN = {"Tokens and prices": {"asyncio", "os.environ"}, "Config": {"open"}}


@pytest.mark.parametrize("title", [t for t in TITLES if "(pure" in t])
def test_a_pure_section_touches_nothing_outside(title: str) -> None:
    here = TITLES.index(title)
    nodes = [n for node in TREE.body if section_of(node.lineno) == here for n in ast.walk(node)]
    touched = {n.id for n in nodes if isinstance(n, ast.Name)}
    attributes = {
        f"{n.value.id}.{n.attr}"
        for n in nodes
        if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name)
    }
    assert not ((touched | attributes) & IMPURE) - ALLOWED_IN.get(title_only(title), set())


def test_no_function_is_longer_than_forty_lines() -> None:
    long = [
        f"{node.name}: {lines} lines"
        for node in ast.walk(TREE)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        and (lines := (node.end_lineno or 0) - node.lineno + 1) > 40
    ]
    assert not long


def test_every_function_is_annotated() -> None:
    bare = [
        f"line {node.lineno}: {node.name}"
        for node in ast.walk(TREE)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.returns is None
    ]
    assert not bare


def test_the_state_is_in_no_global() -> None:
    assert not [n.lineno for n in ast.walk(TREE) if isinstance(n, ast.Global)]


def test_only_format_tables_ask_for_a_provider_by_name() -> None:
    asked = re.compile(r"\bif [^\n]*provider\.(?:name|type) == ")
    found = {section_of(SOURCE[: m.start()].count("\n") + 1) for m in asked.finditer(SOURCE)}
    assert {TITLES[n] for n in found} <= {"Dialects and presets (tables)"}


ALLOWED = {"ccmux.py", "config.example.toml", "tests", "README.md", "LICENSE"}


def test_the_top_level_is_what_the_card_allows() -> None:
    ignored = [line.rstrip("/") for line in (ROOT / ".gitignore").read_text("utf-8").split()]
    entries = {p.name for p in ROOT.iterdir() if not p.name.startswith(".")}
    kept = {name for name in entries if not any(fnmatch.fnmatch(name, pattern) for pattern in ignored)}
    assert kept <= ALLOWED


def packages_of_the_script() -> list[str]:
    match = re.search(r"^# /// script\n(.*?)^# ///$", SOURCE, re.M | re.S)
    assert match
    block = tomllib.loads("".join(line[2:] + "\n" for line in match[1].splitlines()))
    assert block["requires-python"] == ">=3.11"
    return block["dependencies"]


def test_the_dependencies_are_the_same_everywhere() -> None:
    wanted = (ROOT / "tests" / "requirements.txt").read_text("utf-8").split("\n")
    assert packages_of_the_script() == list(ccmux.PACKAGES)
    assert set(ccmux.PACKAGES) <= set(wanted)
    assert "PACKAGES[0]" in SOURCE.partition("def bootstrap_failed")[2]


def test_the_readme_has_one_test_command() -> None:
    readme = (ROOT / "README.md").read_text("utf-8")
    [block] = re.findall(r"^#+ Run the tests\n[^`#]*```\w*\n(.*?)```", readme, re.M | re.S)
    assert len(block.strip().splitlines()) == 1
    assert "-r tests/requirements.txt" in block
    assert "pytest tests" in block
