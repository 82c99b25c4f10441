"""The real Claude Code CLI does real work through a real ccmux process, on every kind of provider."""

from __future__ import annotations

from pathlib import Path

import pytest
from claude_cli import run_claude
from conftest import Start, config_for
from fakes import FAKES
from scenarios import SCENARIOS, Scenario


def check(scenario: Scenario, ran) -> None:
    told = f"{ran.stdout}\n{ran.stderr}"
    assert ran.status == 0, told
    assert scenario.says in ran.result.get("result", ""), told
    assert tuple(b["name"] for b in ran.blocks("tool_use"))[: len(scenario.tools)] == scenario.tools, told
    assert scenario.thinks in " ".join(b["thinking"] for b in ran.blocks("thinking")), told
    assert ran.files == scenario.files


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda s: s.name.replace(" ", "-"))
@pytest.mark.parametrize("kind", FAKES)
async def test_claude_code_works_through_ccmux(
    kind: str, scenario: Scenario, claude: Path, start_ccmux: Start
) -> None:
    async with FAKES[kind](scenario.script()) as fake, start_ccmux(config_for(fake)) as ccmux:
        ran = await run_claude(claude, ccmux.url, scenario.prompt, key="a-clients-key-1234", env=scenario.env)
        check(scenario, ran)
        assert {r.body["model"] for r in fake.asked} == {"tiny"}
        credentials = {r.headers.get("authorization", r.headers.get("x-api-key")) for r in fake.asked}
        assert "a-clients-key-1234" not in str(credentials)
    assert b"sk-upstream-0" not in ccmux.output
