"""Config: editing the file. What was meant is what parses; what was not touched stays byte for byte."""

from __future__ import annotations

import errno
import os
import re
import stat
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import assume, given, settings

import ccmux
from ccmux import ConfigError, StaleError, edit_toml, emit_value, save_config, scan_toml

FILE = """\
# my ccmux, do not touch
title = "x"   # unknown keys stay

[server]   # the server
port = 1 # the port
host = "127.0.0.1"

# who serves
[[providers]] # first
name = "a"
type = "openai"
api_key = "$A_KEY" # from the environment
quirks = { effort = [
    "low", # cheap
    "high",
] }

# the second one
[[providers]]
name = "b"
type = "anthropic"
  [providers.headers]
  x-a = "[[providers]]"   # looks like a header

[[models]]
name = "m"
[[models.mappings]]
provider = "a"   # A
actual_model = "am"
[[models.mappings]]
provider = "b"
actual_model = "bm"

# routes
[router]
default = "m"
text = '''
[router]
# not a comment'''
# the end
"""


def edited(root: str, name: str | None, table: Any, text: str = FILE) -> str:
    out = edit_toml(text, root, name, table)
    assert tomllib.loads(out) == ccmux.meant_tables(tomllib.loads(text), root, name, table)
    return out


def row(root: str, name: str) -> Any:
    return next(r for r in tomllib.loads(FILE)[root] if r["name"] == name)


def lines_lost(before: str, after: str) -> list[str]:
    left = after.splitlines()
    return [line for line in before.splitlines() if line not in left]


@pytest.mark.parametrize(
    ("root", "name", "table", "lost"),
    [
        pytest.param("server", None, {"port": 2, "host": "127.0.0.1"}, ["port = 1 # the port"], id="one value"),
        pytest.param("server", None, {"port": 1}, ['host = "127.0.0.1"'], id="a key taken away"),
        pytest.param("server", None, {"port": 1, "host": "127.0.0.1", "log_level": "debug"}, [], id="a key added"),
        pytest.param("credits", None, {"enforce": True, "markup_percent": 2.5}, [], id="a table that was not there"),
        pytest.param("providers", "a", {**row("providers", "a"), "enabled": False}, [], id="a key added to a row"),
        pytest.param("providers", "b", {**row("providers", "b"), "type": "zai"}, ['type = "anthropic"'], id="a row's value"),
        pytest.param("providers", "c", {"name": "c", "type": "demo"}, [], id="a new row"),
        pytest.param("models", "m", {**row("models", "m"), "context": 5}, [], id="a key beside sub-tables"),
        pytest.param(
            "providers", "b", None,
            ['name = "b"', 'type = "anthropic"', "  [providers.headers]", '  x-a = "[[providers]]"   # looks like a header',
             "[[providers]]"],
            id="a row taken away: the comment above it stays",
        ),
        pytest.param("models", "n", {"name": "n", "mappings": [{"provider": "a", "actual_model": "x"}]}, [], id="a new model"),
    ],
)  # fmt: skip
def test_only_what_is_edited_changes(root: str, name: str | None, table: Any, lost: list[str]) -> None:
    after = edited(root, name, table)
    assert sorted(lines_lost(FILE, after)) == sorted(line for line in lost if line not in after.splitlines())


def test_a_trailing_comment_stays_when_its_value_changes() -> None:
    assert "port = 2 # the port\n" in edited("server", None, {"port": 2, "host": "127.0.0.1"})


MAPPINGS = """\
[[models]] # M
name = "m"
# the best
[[models.mappings]] # 1
provider = "a" # A
actual_model = "am" # AM
priority = 1 # P
# the second
[[models.mappings]] # 2
# inside
provider = "b" # B
actual_model = "bm" # BM
priority = 2
# the end
"""
ONE, TWO = ({"provider": p, "actual_model": f"{p}m", "priority": n} for n, p in enumerate("ab", 1))


@pytest.mark.parametrize(
    ("text", "root", "name", "table", "changed"),
    [
        pytest.param(
            MAPPINGS, "models", "m", {"mappings": [ONE, {**TWO, "actual_model": "x"}]},
            {'"bm"': '"x"'}, id="one row",
        ),
        pytest.param(
            MAPPINGS, "models", "m", {"mappings": [ONE, {**TWO, "context": 5}]},
            {"priority = 2\n": "priority = 2\ncontext = 5\n"}, id="a key more in a row",
        ),
        pytest.param(
            MAPPINGS, "models", "m", {"mappings": [{**TWO, "priority": 1}]},
            {'[[models.mappings]] # 1\nprovider = "a" # A\nactual_model = "am" # AM\npriority = 1 # P\n': "", "priority = 2": "priority = 1"},
            id="a row taken away",
        ),
        pytest.param(
            MAPPINGS, "models", "m", {"mappings": [ONE, TWO, {**ONE, "provider": "c"}]},
            {"priority = 2\n": 'priority = 2\n[[models.mappings]]\nprovider = "c"\nactual_model = "am"\npriority = 1\n'},
            id="a row more",
        ),
        pytest.param(
            "[[models]] # M\nname = 'm' # N\n\n# next\n[router]\n", "models", "m", {"context": 5, "mappings": [{"provider": "a"}]},
            {"# N\n": '# N\ncontext = 5\n[[models.mappings]]\nprovider = "a"\n'}, id="first rows and a key",
        ),
        pytest.param(
            "[[models]]\nname = 'm'\n# in dollars\n[models.price] # why\ninput = 1 # in\noutput = 2 # out\n",
            "models", "m", {"price": {"input": 1, "output": 3}}, {"output = 2": "output = 3"}, id="a sub-table",
        ),
        pytest.param("[[models]]\nname = 'm'\nprice.input = 1 # in\nprice.output = 2 # out\n", "models", "m",
            {"price": {"input": 3, "cache_read": 4}},
            {"input = 1": "input = 3", "price.output = 2 # out\n": "price.cache_read = 4\n"}, id="dotted keys in a row"),
        pytest.param("# c\nrouter.default = 'm' # why\nrouter.think = 't' # T\n[z]\n", "router", None, {"default": "n", "think": "t", "image": "i"},
            {"'m'": '"n"', "# T\n": '# T\nrouter.image = "i"\n'}, id="dotted at the top"),
        pytest.param(
            "router = { default = 'm' } # why\n[z]\n", "router", None, {"default": "n"},
            {"{ default = 'm' }": '{ default = "n" }'}, id="inline at the top",
        ),
        pytest.param(
            "models = [ # all\n  # one\n  {name = 'k', a = [1]}, # K\n  # two\n  {name = 'm'} # M\n]\n", "models", "m",
            {"context": 5}, {"{name = 'm'}": "{name = 'm', context = 5}"}, id="an inline row",
        ),
        pytest.param(
            "models = [\n  # one\n  {name = 'm'}, # M\n  # two\n  {name = 'k'}, # K\n]\n", "models", "m", None,
            {"{name = 'm'},": ""}, id="an inline row taken away",
        ),
        pytest.param(
            "models = [\n  # one\n  {name = 'k'}, # K\n]\n", "models", "m", {},
            {"# K\n": '# K\n  { name = "m" },\n'}, id="an inline row more",
        ),
        pytest.param(
            "[[router.rules]] # R\npattern = 'x' # X\n", "router", None, {"default": "m", "rules": [{"pattern": "x", "strip": True}]},
            {"# X\n": '# X\nstrip = true\n[router]\ndefault = "m"\n'}, id="a first key, and one in the row before it",
        ),
    ],
)  # fmt: skip
def test_every_comment_stays_in_its_place(
    text: str, root: str, name: str | None, table: Any, changed: dict[str, str]
) -> None:
    wanted = text
    for old, new in changed.items():
        assert wanted.count(old) == 1
        wanted = wanted.replace(old, new)
    whole = table if name is None or table is None else {"name": name, **table}
    assert edited(root, name, whole, text) == wanted
    assert edited(root, name, whole, text.replace("\n", "\r\n")) == wanted.replace("\n", "\r\n")


FIRST, SECOND = MAPPINGS.index("# the best"), MAPPINGS.index("# the second")
END = MAPPINGS.index("# the end")


@pytest.mark.parametrize(
    ("text", "root", "name", "table", "wanted"),
    [
        pytest.param(
            MAPPINGS, "models", "m", {"mappings": [{**TWO, "priority": 1}, {**ONE, "priority": 2}]},
            MAPPINGS[:FIRST] + MAPPINGS[SECOND:END].replace("= 2", "= 1") + MAPPINGS[FIRST:SECOND].replace("= 1 #", "= 2 #") + MAPPINGS[END:],
            id="rows change places",
        ),
        pytest.param(
            MAPPINGS, "models", "m", {"mappings": [{"provider": "c"}, {**TWO, "actual_model": "x"}, ONE]},
            MAPPINGS[:FIRST] + '[[models.mappings]]\nprovider = "c"\n'
            + MAPPINGS[SECOND:END].replace('"bm"', '"x"') + MAPPINGS[FIRST:SECOND] + MAPPINGS[END:],
            id="a new row, and another edited as it moves",
        ),
        pytest.param(
            "[[router.rules]] # R1\npattern = 'a'\nmodel = 'm'\n# strip = true\n\n# apart\n\n"
            "[[router.rules]]\npattern = 'b' # R2\nmodel = 'n'\n# below\n\n[router]\nimage = 'i' # I\n",
            "router", None, {"image": "i", "rules": [{"pattern": "b", "model": "n"}, {"pattern": "a", "model": "m"}]},
            "[[router.rules]]\npattern = 'b' # R2\nmodel = 'n'\n# below\n\n# apart\n\n"
            "[[router.rules]] # R1\npattern = 'a'\nmodel = 'm'\n# strip = true\n\n[router]\nimage = 'i' # I\n",
            id="rows before their table; what touches a row goes along, what stands alone stays",
        ),
        pytest.param(
            "[[models]]\nname = 'm'\n"
            "mappings = [ # all\n  # one\n  {provider = 'a'}, # A\n\n  # two\n  {provider = 'b', x = 1}, # B\n  # last\n]\n",
            "models", "m", {"mappings": [{"provider": "b", "x": 2}, {"provider": "c"}, {"provider": "a"}]},
            "[[models]]\nname = 'm'\n"
            "mappings = [ # all\n\n  # two\n  {provider = 'b', x = 2}, # B\n  { provider = \"c\" },\n  # one\n  {provider = 'a'}, # A\n  # last\n]\n",
            id="inline rows",
        ),
        pytest.param(
            "[[models]]\nname = 'm'\nmappings = [{provider = 'a'} , {provider = 'b'}]", "models", "m",
            {"mappings": [{"provider": "b"}, {"provider": "a"}]},
            "[[models]]\nname = 'm'\nmappings = [{provider = 'b'}, {provider = 'a'}]", id="inline rows on one line",
        ),
        pytest.param(
            FILE, "providers", "a", {**row("providers", "a"), "quirks": {"effort": ["low", "max"], "files": True}},
            FILE.replace('"high",\n] }', '"max",\n], files = true }'), id="an array in an inline table",
        ),
        pytest.param(
            "[router]\nthink_on = [\n  'plan', # P\n  'high' # H\n]\n", "router", None, {"think_on": ["high", "max", "plan"]},
            "[router]\nthink_on = [\n  'high', # H\n  \"max\",\n  'plan' # P\n]\n", id="texts",
        ),
    ],
)  # fmt: skip
def test_rows_take_their_comments_along(
    text: str, root: str, name: str | None, table: Any, wanted: str
) -> None:
    whole = {"name": name, **table} if name else table
    assert edited(root, name, whole, text) == wanted
    assert edited(root, name, whole, text.replace("\n", "\r\n")) == wanted.replace("\n", "\r\n")


@pytest.mark.parametrize("table", [None, {"name": "m500", "context": 5}], ids=["gone", "changed"])
def test_one_row_among_a_thousand_is_not_compared_with_all(table: Any) -> None:
    text = "".join(f"[[models]]\nname = 'm{n}'\nx = 1 # {n}\n" for n in range(1000))
    called: list[str] = []
    sys.setprofile(lambda frame, event, _: called.append(frame.f_code.co_name) if event == "call" else None)
    try:
        after = edit_toml(text, "models", "m500", table)
    finally:
        sys.setprofile(None)
    assert called.count("likeness") <= 1 and called.count("slot") <= 2
    row = "name = 'm500'\ncontext = 5\n" if table else ""
    assert after == text.replace("[[models]]\nname = 'm500'\nx = 1 # 500\n", f"[[models]]\n{row}" * bool(row))


@pytest.mark.parametrize(
    "text",
    [
        "router.default = 'm'\nrouter.think = 'n' # why\n[server]\nport = 1\n",
        "router = { default = 'm', think = 'n' }\n",
        "[router]\ndefault='m'\n[router.deep]\nx=1\n[other]\ny=2\n",
        "[other.router]\ndefault=1\n[router]\ndefault='m'",
        '["router"]\n"default" = "m"\n',
        "providers = [ { name = 'a' } ]\n[router]\ndefault = 'm'\n",
        "[[router.rules]]\npattern = 'a'\n[router]\ndefault = 'm'\n",
    ],
)
def test_any_layout_of_a_table(text: str) -> None:
    old = tomllib.loads(text)["router"]
    edited("router", None, {**old, "default": "changed", "new": [1, {"a": "b"}]}, text)
    edited("router", None, {"default": "alone"}, text)
    edited("router", None, None, text)


@pytest.mark.parametrize(
    "text",
    [
        "providers = [ { name = 'a', x = 1 }, { name = 'b' } ]\n",
        "[[providers]]\nname = 'a'\n[[providers]]\nname = 'b'\n[z]\nk=1\n",
        "[[providers]]\nname = 'a'\n[z]\nk=1\n[[providers]]\nname = 'b'\n",
        "[[providers]]\nname = 'a'\nquirks.effort = ['low']\nquirks.files = true\n",
        "",
    ],
)
def test_any_layout_of_rows(text: str) -> None:
    edited("providers", "a", {"name": "a", "type": "demo", "quirks": {"files": True}}, text)
    edited("providers", "new", {"name": "new", "headers": {"a b": "c"}}, text)
    if text:
        edited("providers", "a", None, text)


def test_cr_lf_stays() -> None:
    after = edited("server", None, {"port": 3, "host": "127.0.0.1", "x": 1}, FILE.replace("\n", "\r\n"))
    assert after.count("\n") == after.count("\r\n")


def test_mixed_line_ends_stay() -> None:
    text = "[server]\r\nport = 1\n[router]\ndefault = 'm' # why\r\nimage = 'i'"
    after = edited("router", None, {"default": "n", "image": "i", "think": "t"}, text)
    assert after == text.replace("'m'", '"n"') + '\nthink = "t"'


def test_statements_cover_the_file_without_gaps() -> None:
    found = scan_toml(FILE)
    assert "".join(s.text for s in found) == FILE


@pytest.mark.parametrize("value", [float("nan"), None, {1, 2}, "\ud800"])
def test_what_toml_cannot_say_is_refused(value: Any) -> None:
    if value != value:
        assert emit_value(value) == "nan"
        return
    with pytest.raises(ConfigError, match="cannot be written"):
        emit_value(value)


# Any file, any edit.

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
KEYS = st.one_of(st.sampled_from(["default", "a-b", "x y", "", "ü", "a.b", '"', "#", "[x]"]), TEXTS)
SCALARS = st.one_of(
    TEXTS,
    st.integers(-(10**12), 10**12),
    st.booleans(),
    st.floats(allow_nan=False),
    st.just("'''\n[router]\n\"\"\""),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(KEYS, inner, max_size=3)),
    max_leaves=5,
)
TABLES = st.dictionaries(KEYS.filter(lambda k: k != "name"), VALUES, max_size=4)
NOTES = st.sampled_from(["", "", " # why"])
COMMENTS = st.sampled_from(["", "# note\n", "\n\n", "   # [router]\n", "# \"\"\" '''\n"])


def written(draw: Any, title: str, table: Any, kind: str) -> str:
    """A table in one of the ways people write them: values inline, dotted, or under headers of their own."""
    head, below = f"[[{title}]]" if kind == "array" else f"[{title}]", ""
    above = st.sampled_from(["", "# of a sub-table\n", "\n"]) if "." in title else COMMENTS
    lines = [draw(above) + head + draw(NOTES)]
    for key, value in table.items():
        way = (
            draw(st.sampled_from(["inline", "dotted", "header"])) if isinstance(value, dict) and value else ""
        )
        if way == "header":
            below += written(draw, f"{title}.{ccmux.emit_key(key)}", value, "table")
        elif way == "dotted":
            lines += [f"{ccmux.dotted((key, k))} = {broken(draw, v)}{draw(NOTES)}" for k, v in value.items()]
        elif (
            value
            and isinstance(value, list)
            and all(isinstance(v, dict) for v in value)
            and draw(st.booleans())
        ):
            below += "".join(written(draw, f"{title}.{ccmux.emit_key(key)}", v, "array") for v in value)
        else:
            lines.append(f"{ccmux.emit_key(key)} = {broken(draw, value)}{draw(NOTES)}")
    return "\n".join(lines) + "\n" + below


def broken(draw: Any, value: Any) -> str:
    """A value as TOML; an array may go over several lines, with comments."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{ccmux.emit_key(k)} = {broken(draw, v)}" for k, v in value.items()) + "}"
    if not isinstance(value, list) or not draw(st.booleans()):
        return emit_value(value)
    items = [draw(st.sampled_from(["", "\n # up\n", "\n\n"])) + broken(draw, v) for v in value]
    commas = [draw(st.sampled_from([",", " , # c\n", "\n,", " # b\n, # c\n"])) for _ in items]
    return "[" + "".join(map(str.__add__, items, commas)) + draw(st.sampled_from(["]", "\n# end\n ]"]))


def mixed(draw: Any, value: Any) -> Any:
    """A value with its lists in another order and some of what is in it gone or new."""
    if isinstance(value, dict):
        return {
            **{k: mixed(draw, v) for k, v in value.items() if draw(st.booleans())},
            **draw(st.sampled_from([{}, {"z": 1}])),
        }
    if isinstance(value, list):
        return draw(
            st.permutations(
                [*(mixed(draw, v) for v in value), *draw(st.sampled_from([[], ["z"], [{"z": 1}]]))]
            )
        )
    return value


@st.composite
def files(draw: Any) -> str:
    parts = [draw(COMMENTS), "top = 1\n" if draw(st.booleans()) else ""]
    tables = [("router", "table"), ("other", "table")]
    rows = draw(st.integers(0, 3))
    layout = draw(st.permutations([*tables, *[("providers", "array")] * rows]))
    number = 0
    for title, kind in layout:
        table = draw(TABLES)
        if kind == "array":
            number += 1
            table = {"name": f"p{number}", **table}
        parts.append(written(draw, title, table, kind))
    return "".join(p if p.endswith("\n") or not p else p + "\n" for p in parts)


@settings(max_examples=300, deadline=None)
@given(
    text=files(),
    table=TABLES,
    edit=st.sampled_from(
        [("router", None), ("providers", "p1"), ("providers", "p2"), ("providers", "new"), ("fresh", None)]
    ),
    deletes=st.booleans(),
    crlf=st.booleans(),
    data=st.data(),
)
def test_any_edit_means_what_it_says(
    text: str, table: Any, edit: tuple[str, str | None], deletes: bool, crlf: bool, data: Any
) -> None:
    try:
        before = tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        assume(False)
    root, name = edit
    rows = before.get(root, [] if name else {})
    old = next((row for row in rows if row["name"] == name), {}) if name else rows
    kept = {k: mixed(data.draw, v) for k, v in old.items() if data.draw(st.booleans())}
    wanted = None if deletes else {**({"name": name} if name else {}), **kept, **table}
    if crlf:
        text = text.replace("\n", "\r\n")
    after = edit_toml(text, root, name, wanted)
    assert not crlf or after.count("\n") == after.count("\r\n")
    parsed = tomllib.loads(after)
    assert ccmux.same_value(parsed, ccmux.meant_tables(before, root, name, wanted))
    words = [s.text.strip() for s in scan_toml(text) if not s.path and s.text.strip()]
    assert all(word in after for word in words if word != "# of a sub-table")  # it may go with its table


# Rows with comments of their own, in each of the ways to write them.


def noted_row(draw: Any, number: int, mapping: Any, layout: str) -> tuple[str, list[str]]:
    """A row as a person writes it, and its comments in order."""
    notes = [f"# {number}{letter}" for letter in "abcd" if draw(st.booleans())]
    at = {note[-1]: note for note in notes}
    items = [f"{k} = {emit_value(v)}" for k, v in mapping.items()]
    if layout == "inline":
        lead = f"  {at['a']}\n" if "a" in at else ""
        return f"{lead}  {{ {', '.join(items)} }}, {at.get('b', '')}\n", [
            notes[n] for n in range(len(notes)) if notes[n][-1] in "ab"
        ]
    lines = [
        at.get("a", ""),
        f"[[models.mappings]] {at.get('b', '')}",
        items[0],
        at.get("c", ""),
        *items[1:-1],
    ]
    if layout == "dotted":
        lines.append("price.input = 1\nprice.output = 2")
    lines.append(f"{items[-1]} {at.get('d', '')}")
    return "\n".join(filter(None, lines)) + "\n" + draw(st.sampled_from(["", "\n"])), notes


@settings(max_examples=300, deadline=None)
@given(data=st.data(), layout=st.sampled_from(["rows", "dotted", "inline"]), count=st.integers(1, 5))
def test_any_edit_of_rows_keeps_each_comment_with_its_row(data: Any, layout: str, count: int) -> None:
    rows = [
        {"provider": f"p{n}", "actual_model": f"m{n}", "x": n % 2 == 0, "priority": n + 1}
        for n in range(count)
    ]
    written = [noted_row(data.draw, n, row, layout) for n, row in enumerate(rows)]
    texts = "".join(text for text, _ in written)
    body = f"mappings = [\n{texts}]\n" if layout == "inline" else texts
    gap = data.draw(st.sampled_from(["", "\n"]))
    text = f"# top\n[[models]] # M\nname = 'm' # N\n{gap}{body}\n# next\n[router] # R\n"
    if layout == "dotted":
        rows = [{**row, "price": {"input": 1, "output": 2}} for row in rows]
    text = text.replace("\n", data.draw(st.sampled_from(["\n", "\r\n"])))
    order = data.draw(st.lists(st.sampled_from(range(count)), unique=True, min_size=1))
    changed = data.draw(
        st.lists(st.sampled_from(["provider", "actual_model", "x", "nothing"]), min_size=5, max_size=5)
    )
    new = [
        {**rows[n], **({changed[n]: "new"} if changed[n] in rows[n] else {}), "priority": at}
        for at, n in enumerate(order, 1)
    ]
    if data.draw(st.booleans()):
        new.insert(data.draw(st.integers(0, len(new))), {"provider": "fresh", "actual_model": "f"})
    more = data.draw(st.sampled_from([{}, {"context": 5}, {"price": {"input": 1, "output": 2}}]))
    after = edited("models", "m", {"name": "m", "mappings": new, **more}, text)
    gone = {note for n, (_, notes) in enumerate(written) if n not in order for note in notes}
    seen = [note for note in re.findall(r"# \w+", after) if note not in gone]
    assert seen == ["# top", "# M", "# N", *(note for n in order for note in written[n][1]), "# next", "# R"]
    if (
        sorted(order) == [*range(count)]
        and len(new) == count
        and set(changed[:count]) == {"nothing"}
        and not more
    ):
        plain = lambda words: sorted(re.sub(r"priority = \d", "", words).split())  # noqa: E731
        assert plain(after) == plain(text)


# Saving.


def test_saving_keeps_three_backups_and_the_mode(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    for number in range(5):
        expected = ccmux.hash_text(path.read_text()) if path.exists() else ""
        save_config(path, f"x = {number}\n", expected)
    texts = {p.name: p.read_text() for p in tmp_path.iterdir()}
    assert texts == {
        "config.toml": "x = 4\n",
        "config.toml.bak1": "x = 3\n",
        "config.toml.bak2": "x = 2\n",
        "config.toml.bak3": "x = 1\n",
    }
    assert {stat.S_IMODE(p.stat().st_mode) for p in tmp_path.iterdir()} == {0o600}


def test_a_save_is_on_the_disk_before_it_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The new file, the backup, and the folder that names them."""
    path, synced = tmp_path / "config.toml", []
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(stat.S_ISDIR(os.fstat(fd).st_mode)))
    save_config(path, "a = 1\n", "")
    save_config(path, "a = 2\n", ccmux.hash_text("a = 1\n"))
    assert synced == [False, True, False, False, True]


def test_a_save_that_is_not_what_was_meant_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "config.toml"
    save_config(path, "a = 1\n", "")
    monkeypatch.setattr(ccmux, "write_private", lambda place, text: place.write_text(text[:-2]))
    with pytest.raises(ConfigError, match="could not be written whole"):
        save_config(path, "a = 2\n", ccmux.hash_text("a = 1\n"))
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {"config.toml": "a = 1\n"}


@pytest.mark.skipif(sys.platform == "win32", reason="no such limit there")
def test_a_backup_that_cannot_be_written_costs_no_other(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    for number in range(4):
        save_config(path, f"x = {number}\n", ccmux.hash_text(path.read_text()) if path.exists() else "")
    path.write_text("# " + "x" * 5000)  # larger than what the limit lets a backup be, unlike the new text
    before = {p.name: p.read_text() for p in tmp_path.iterdir()}
    code = "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
    code += "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096)); import ccmux, pathlib; "
    code += f"p = pathlib.Path({str(path)!r}); ccmux.save_config(p, 'x = 5', ccmux.hash_text(p.read_text()))"
    run = [sys.executable, "-B", "-c", code]
    ended = subprocess.run(run, cwd=Path(ccmux.__file__).parent, capture_output=True, text=True)
    assert "File too large" in ended.stderr
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == before


def test_a_file_changed_on_disk_is_never_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_text("x = 1\n")
    with pytest.raises(StaleError, match="changed on disk"):
        save_config(path, "x = 2\n", ccmux.hash_text("x = 0\n"))
    assert path.read_text() == "x = 1\n"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_cannot_be_synced_is_no_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sync = os.fsync

    def fsync(file: int) -> None:  # as on a VirtualBox shared folder
        if stat.S_ISDIR(os.fstat(file).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        sync(file)

    monkeypatch.setattr(os, "fsync", fsync)
    save_config(tmp_path / "config.toml", "x = 1\n", "")
    assert (tmp_path / "config.toml").read_text() == "x = 1\n"


def test_a_symlink_stays_one(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "c.toml").write_text("x = 1\n")
    os.symlink(tmp_path / "real" / "c.toml", tmp_path / "config.toml")
    save_config(tmp_path / "config.toml", "x = 2\n", ccmux.hash_text("x = 1\n"))
    assert (tmp_path / "config.toml").is_symlink()
    assert (tmp_path / "real" / "c.toml").read_text() == "x = 2\n"
