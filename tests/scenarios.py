"""What Claude Code is asked to do in the end-to-end tests, and the tiny model's part in it.

A scenario runs on every kind of provider: its script decides by the conversation alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from fakes import Answer, Call, Script, Turn


@dataclass(frozen=True, slots=True)
class Scenario:
    """A prompt, the script that answers it, and what must come of it."""

    name: str
    prompt: str
    script: Callable[[], Script]  # a fresh one for each run, as some count
    says: str  # part of the final words
    files: dict[str, str] = field(default_factory=dict)
    tools: tuple[str, ...] = ()  # calls the CLI must have made, in order
    thinks: str = ""  # thinking the CLI must have seen
    env: dict[str, str] = field(default_factory=dict)


def stateless(script: Script) -> Callable[[], Script]:
    return lambda: script


def plain(turn: Turn) -> Answer:
    return Answer(text="Four: two and two make four.")


def bash_round(turn: Turn) -> Answer:
    if not turn.results:
        call = Call("Bash", {"command": "echo $((6 * 7)) from the shell", "description": "Multiply"})
        return Answer(text="I will ask the shell.", calls=(call,))
    return Answer(text=f"The shell said: {turn.results[-1].strip()}")


POEM = 'Roses are "red",\n\tViolets: \\blue\\, \u00fcber \U0001f339\n'


def write_file(turn: Turn) -> Answer:
    if not turn.results:
        return Answer(calls=(Call("Write", {"file_path": "poem.txt", "content": POEM}),))
    return Answer(text="The poem is written.")


def two_at_once(turn: Turn) -> Answer:
    if not turn.results:
        commands = ("echo first-$((1 + 1))", "echo second-$((2 + 2))")
        return Answer(calls=tuple(Call("Bash", {"command": c, "description": c}) for c in commands))
    # Claude Code sends parallel results in the order they came to be, not the order of the calls.
    return Answer(text="Both: " + " and ".join(sorted(r.strip() for r in turn.results)))


def reasoned(turn: Turn) -> Answer:
    if not turn.results:
        call = Call("Bash", {"command": "echo thought-$((3 + 3))", "description": "Check"})
        return Answer(reasoning="The user wants a check, so the shell it is.", calls=(call,))
    return Answer(reasoning="It is back.", text=f"Checked: {turn.results[-1].strip()}")


def failing_first(*failures: Answer) -> Callable[[], Script]:
    """The first answers are errors, then the bash round goes as usual."""
    return lambda: lambda turn: failures[turn.number] if turn.number < len(failures) else bash_round(turn)


OVERLOADED = Answer(status=529, error="Overloaded")
BROKEN = Answer(status=500, error="Something broke")

LIMIT = 30_000  # tokens, at four characters each, that the overflowing model takes
BIG = "seq -f 'line %05g of a long, long listing of nothing much' 1 500"


def overflowing(turn: Turn) -> Answer:
    """Reads until its context is full, and goes on once the client has compacted the conversation."""
    if "The listings were read" in turn.text:
        return Answer(text="All read, and compacted on the way.")
    if "<summary>" in turn.prompt:
        return Answer(text="<analysis>Long.</analysis><summary>The listings were read.</summary>")
    sent = len(turn.text) // 4
    if sent > LIMIT:
        return Answer(overflow=(sent, LIMIT))
    call = Call("Bash", {"command": f"{BIG} # {len(turn.results)}", "description": "List"})
    return Answer(calls=(call,))


SCENARIOS = (
    Scenario("plain answer", "What do two and two make?", stateless(plain), "two and two make four"),
    Scenario("bash round", "Multiply 6 by 7", stateless(bash_round), "42 from the shell", tools=("Bash",)),
    Scenario("write", "Write to poem.txt", stateless(write_file), "written", {"poem.txt": POEM}, ("Write",)),
    Scenario(
        "two tools at once", "Run both", stateless(two_at_once), "first-2 and second-4",
        tools=("Bash", "Bash"),
    ),
    Scenario(
        "reasoning then tool", "Check it", stateless(reasoned), "Checked: thought-6", tools=("Bash",),
        thinks="so the shell it is",
    ),
    Scenario(
        "error then recovery", "Multiply", failing_first(OVERLOADED, BROKEN), "42 from the shell",
        tools=("Bash",),
    ),
    Scenario("overflow then compaction", "Read the listings", stateless(overflowing), "compacted on the way"),
)  # fmt: skip
