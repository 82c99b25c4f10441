"""The dashboard and the admin page in a real browser, on a real ccmux with a fake provider behind it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import tomllib
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import proxy_harness
import pytest
import pytest_asyncio
from fakes import Answer, AnthropicFake, Tokens
from proxy_harness import ADMIN_TOKEN, ROOT, Proxy, in_process, provider_row, until

import ccmux

CHROMIUM = Path("/usr/bin/chromium")
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip
TABS = ("overview", "providers", "models", "router", "users", "billing", "try", "inspect", "config")
HOSTILE = "<img src=x onerror=\"document.title='owned'\">"

try:
    from playwright.async_api import Browser, Page, Route, async_playwright, expect
except ImportError:
    async_playwright = None  # type: ignore[assignment]

pytestmark = pytest.mark.asyncio(loop_scope="module")  # one browser for all


@pytest_asyncio.fixture(loop_scope="module")
async def provider() -> AsyncIterator[AnthropicFake]:
    async with AnthropicFake(
        lambda turn: Answer("Hello from upstream.", tokens=Tokens(1000, 100, 0))
    ) as fake:
        yield fake


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def browser() -> AsyncIterator[Browser]:
    if (async_playwright is None or not CHROMIUM.exists()) and os.environ.get("CI") != "true":
        pytest.skip("needs the playwright package and /usr/bin/chromium")
    async with async_playwright() as playwright:
        chromium = await playwright.chromium.launch(executable_path=str(CHROMIUM), args=FLAGS)
        yield chromium
        await chromium.close()


@contextlib.asynccontextmanager
async def opened(browser: Browser, url: str, **options: Any) -> AsyncIterator[Page]:
    """A page at an address, in a context of its own; what its console said must be nothing, CSP included."""
    context = await browser.new_context(reduced_motion="reduce", **options)
    page = await context.new_page()
    page.set_default_timeout(10_000)
    said: list[str] = []
    page.on("console", lambda message: said.append(message.text) if is_fault(message) else None)
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("dialog", lambda dialog: asyncio.ensure_future(dialog.accept()))
    await page.goto(url)
    yield page
    assert said == []
    await context.close()


def is_fault(message: Any) -> bool:
    """A warning or an error of the page's own; a refused save is also an error line of the browser's."""
    return message.type in ("error", "warning") and not message.text.startswith("Failed to load resource")


def admin_url(proxy: Proxy) -> str:
    return f"{proxy.url}/admin#token={ADMIN_TOKEN}"


Admin = Callable[..., AbstractAsyncContextManager[tuple[Proxy, "Page"]]]


@pytest.fixture
def admin(browser: Browser, provider: AnthropicFake, tmp_path: Path) -> Admin:
    """`async with admin() as (proxy, page)`: a ccmux before the provider, or with a config of its own, and its admin page."""

    @contextlib.asynccontextmanager
    async def opened_on(
        text: str = config_of(provider), *, is_timed: bool = False
    ) -> AsyncIterator[tuple[Proxy, Page]]:
        async with in_process(tmp_path, text) as proxy, opened(browser, "about:blank") as page:
            if is_timed:  # by the test: its timers run as `page.clock` says
                await page.clock.install()
            await page.goto(admin_url(proxy))
            yield proxy, page

    return opened_on


async def tab(page: Page, name: str) -> None:
    await page.click(f'nav a[href="#{name}"]')
    await page.wait_for_selector(f'nav a[href="#{name}"][aria-current="page"]')
    await page.wait_for_selector("main .card")


def facts(page: Page) -> Any:
    """The dialog's part on what a model can and costs."""
    return page.locator("dialog h3:text-is('Facts') + div")


async def save(page: Page) -> None:
    """Saves the view's first form."""
    await page.click("form button:text-is('Save') >> nth=0")
    await expect(page.locator("#status")).to_contain_text("saved")


def config_of(fake: AnthropicFake, model: str = "tiny", extra: str = "") -> str:
    name = model.replace('"', '\\"')
    row = provider_row("up", "anthropic", base_url=fake.base_url, api_key="sk-secret-0123456789")
    return (
        f'# a comment that stays\n{row}[[models]]\nname = "{name}"\nprice = {{ input = 3.0, output = 15.0 }}\n'
        f'[[models.mappings]]\nprovider = "up"\nactual_model = "{name}"\n{extra}'
    )


async def ask(proxy: Proxy, model: str, key: str = "none") -> int:
    body = {"model": model, "max_tokens": 50, "messages": [{"role": "user", "content": "Hi"}]}
    return (await proxy_harness.ask(proxy, key=key, body=body)).status


# The pages as they are sent; what their headers forbid is in test_security.py.


async def test_pages_are_small_and_name_no_outside_address() -> None:
    for page in (ccmux.DASHBOARD, ccmux.ADMIN):
        assert len(page.encode()) < 120_000
        outside = [u for u in re.findall(r"https?://[^\s\"'`]+", page) if "www.w3.org/2000/svg" not in u]
        assert outside in ([], ["https://host/v1"])  # a placeholder


# In the browser.


async def test_from_nothing_to_a_cost_on_the_dashboard(
    browser: Browser, provider: AnthropicFake, tmp_path: Path
) -> None:
    async with in_process(tmp_path, "# nothing yet\n") as proxy:
        async with opened(browser, admin_url(proxy)) as page:
            assert ADMIN_TOKEN not in page.url
            await expect(page.locator("main")).to_contain_text("no provider")
            await tab(page, "providers")
            await page.click("text=Add a provider")
            await page.get_by_label("Type", exact=True).select_option("anthropic")
            await page.get_by_label("Name", exact=True).fill("up")
            await page.get_by_label("Base URL").fill(provider.base_url)
            await page.get_by_label("API key").fill("sk-typed-in-0123456789")
            await expect(page.locator("dialog")).to_contain_text("127.0.0.1")
            await page.click("dialog button:text-is('Save')")
            await expect(page.locator("main")).to_contain_text("…6789")

            await tab(page, "models")
            await page.click("text=Add a model")
            await page.get_by_label("Name", exact=True).fill("mine")
            await page.get_by_label("Model at the provider").fill("tiny")
            await facts(page).get_by_label("Input", exact=True).fill("3")
            await facts(page).get_by_label("Output", exact=True).fill("15")
            await page.click("dialog button:text-is('Save')")
            await expect(page.locator("main")).to_contain_text("anthropic/mine")

            await tab(page, "providers")
            await page.click("main button:text-is('Test')")
            await page.click("dialog button:text-is('Test')")
            await expect(page.locator("dialog")).to_contain_text("Hello from upstream.")
            await page.click("dialog button:text-is('Close')")

            await tab(page, "router")
            await page.get_by_label("Default", exact=True).fill("mine")
            await save(page)

            await tab(page, "try")
            await page.get_by_label("Model asked for").fill("claude-sonnet-4-5")
            await page.click("button:text-is('Send')")
            await expect(page.locator("main")).to_contain_text("Hello from upstream.")
            await expect(page.locator("main")).to_contain_text("$0.0045")

            await tab(page, "overview")
            await expect(page.locator(".log")).to_contain_text("up/tiny")
            assert await ask(proxy, "claude-opus-4-1") == 200
            await expect(page.locator(".log")).to_contain_text("claude-opus-4-1")
        await proxy.idle()
        written = (tmp_path / "config.toml").read_text()
        assert "# nothing yet" in written and 'default = "mine"' in written
        async with opened(browser, proxy.url) as page:
            await expect(page.locator(".tiles")).to_contain_text("Spent today")
            await expect(page.locator(".tiles")).to_contain_text("$0.009")
            await expect(page.locator("main")).to_contain_text("claude-opus-4-1")


async def test_a_second_tabs_stale_save_is_refused_and_keeps_what_was_typed(
    browser: Browser, provider: AnthropicFake, tmp_path: Path
) -> None:
    async with in_process(tmp_path, config_of(provider)) as proxy:
        async with opened(browser, admin_url(proxy)) as one, opened(browser, admin_url(proxy)) as two:
            for page, word in ((one, "first"), (two, "second")):
                await tab(page, "router")
                await page.get_by_label("Background", exact=True).fill("tiny")
                await page.get_by_label("Background regex").fill(word)
            await one.click("form button:text-is('Save') >> nth=0")
            await expect(one.locator("#status")).to_contain_text("saved")
            await two.click("form button:text-is('Save') >> nth=0")
            await expect(two.locator("[role=alert] >> nth=0")).to_contain_text("has changed")
            await expect(two.get_by_label("Background regex")).to_have_value("second")
        text = (tmp_path / "config.toml").read_text()
        assert (
            'background_regex = "first"' in text and "second" not in text and "# a comment that stays" in text
        )


async def test_an_error_stands_beside_its_field(admin: Admin) -> None:
    async with admin() as (_, page):
        await tab(page, "router")
        await page.get_by_label("Background", exact=True).fill("nobody-serves-this")
        await page.click("form button:text-is('Save') >> nth=0")
        await expect(page.get_by_label("Background", exact=True)).to_have_attribute("aria-invalid", "true")
        await expect(page.locator(".field [role=alert]")).to_contain_text("nobody-serves-this")


async def test_an_error_of_no_field_does_not_stay_beside_the_last_one(
    admin: Admin, provider: AnthropicFake
) -> None:
    async with admin() as (proxy, page):
        await tab(page, "providers")
        await page.get_by_label("Edit up").click()
        await page.click("text=More settings")
        await page.get_by_label("Max retries").fill("-1")
        await page.click("dialog button:text-is('Save')")
        await expect(page.locator("dialog .field [role=alert]")).to_contain_text("max_retries")
        await page.get_by_label("Max retries").fill("1")
        await page.click("text=More settings")  # closed, so that what is in it is not seen
        proxy.config_file.write_text(config_of(provider, "other"))
        await page.click("dialog button:text-is('Save')")
        await expect(page.locator("dialog form > [role=alert]")).to_contain_text("has changed")
        await expect(page.locator("dialog [role=alert]")).to_be_visible()


async def test_hostile_names_are_text(browser: Browser, provider: AnthropicFake, tmp_path: Path) -> None:
    async with in_process(tmp_path, config_of(provider, HOSTILE)) as proxy:
        assert await ask(proxy, HOSTILE) == 200
        await proxy.idle()
        async with opened(browser, proxy.url) as page:
            await expect(page.locator("main")).to_contain_text(HOSTILE)
            assert await page.locator("img").count() == 0 and await page.title() == "ccmux"
        async with opened(browser, admin_url(proxy)) as page:
            await expect(page.locator(".log")).to_contain_text(HOSTILE)
            for name in TABS:
                await tab(page, name)
                assert await page.locator("img").count() == 0
            assert await page.title() == "ccmux admin"


async def test_a_provider_is_added_by_keyboard_alone(admin: Admin) -> None:
    async with admin("") as (proxy, page):
        await page.wait_for_selector("main .tiles")
        await tab_to(page, "Providers")
        await page.keyboard.press("Enter")
        await expect(page.locator("main")).to_contain_text("None yet")
        await tab_to(page, "Add a provider")
        await page.keyboard.press("Enter")
        await page.keyboard.type("demo")
        await tab_to(page, "Save")
        await page.keyboard.press("Enter")
        await expect(page.locator("#status")).to_contain_text("Provider demo is saved.")
        await tab(page, "overview")
        await expect(page.locator(".problems")).to_contain_text(
            "The built-in demo answers what Claude Code asks"
        )
    assert proxy.config_file.read_text() == provider_row()


async def tab_to(page: Page, words: str) -> None:
    """Presses Tab until the element with these words has the focus, which must be seen."""
    for _ in range(80):
        await page.keyboard.press("Tab")
        found = await page.evaluate(
            "() => { const e = document.activeElement; return [e.textContent, getComputedStyle(e).outlineStyle]; }"
        )
        if found[0] == words:
            assert found[1] == "solid"
            return
    raise AssertionError(f"{words!r} cannot be reached by Tab")


@pytest.mark.parametrize("width", [320, 360])  # 320: a zoom of 400 %
async def test_small_without_sideways_scrolling(
    width: int, browser: Browser, provider: AnthropicFake, tmp_path: Path
) -> None:
    folder = tmp_path / ("long_" * 12)  # its name is shown, too
    folder.mkdir()
    extra = f'[[providers]]\nname = "{"long_" * 12}"\ntype = "openrouter"\napi_key = "$NO_SUCH_KEY"\n'
    async with in_process(
        folder, config_of(provider, "a-model-with-a-rather-" + "long-" * 12 + "name", extra)
    ) as proxy:
        assert await ask(proxy, "a-model-with-a-rather-" + "long-" * 12 + "name") == 200
        await proxy.idle()
        small = {"width": width, "height": 740}
        async with opened(browser, proxy.url, viewport=small) as page:
            await page.wait_for_selector(".tiles")
            assert await width_of(page) <= width
        async with opened(browser, admin_url(proxy), viewport=small) as page:
            await page.wait_for_selector(".tiles")
            for name in TABS:
                await tab(page, name)
                assert await width_of(page) <= width, name


@pytest.mark.parametrize("width", [360, 768])
async def test_no_cell_covers_another(
    width: int, browser: Browser, provider: AnthropicFake, tmp_path: Path
) -> None:
    covered = """() => [...document.querySelectorAll("tbody tr")].flatMap((row) => {
      const boxes = [...row.cells].map((cell) => cell.getBoundingClientRect());
      return boxes.slice(1).filter((box, n) => box.left < boxes[n].right - 1).map(() => row.textContent); })"""
    async with in_process(tmp_path, config_of(provider)) as proxy:
        proxy.state.store.add_user("ann", 0, {"day_microusd": 5_000_000}, "")
        size = {"width": width, "height": 740}
        async with opened(browser, admin_url(proxy), viewport=size) as page:
            await page.wait_for_selector(".tiles")
            for name in ("providers", "models", "users"):
                await tab(page, name)
                await page.wait_for_selector("tbody")
                assert await page.evaluate(covered) == [], name


async def width_of(page: Page) -> int:
    return int(await page.evaluate("document.documentElement.scrollWidth"))


CONTRAST = """() => {
  const light = (c) => { const p = c.match(/[\\d.]+/g).slice(0, 3).map((v) => v / 255)
    .map((v) => (v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
    return 0.2126 * p[0] + 0.7152 * p[1] + 0.0722 * p[2]; };
  const behind = (e) => { const b = getComputedStyle(e).backgroundColor;
    return /, 0\\)$|transparent/.test(b) && e.parentElement ? behind(e.parentElement) : b; };
  const bad = [];
  for (const e of document.querySelectorAll("body *")) {
    if (![...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim()) || !e.offsetParent || e.disabled) continue;
    const [a, b] = [light(getComputedStyle(e).color), light(behind(e))].sort((x, y) => y - x);
    if ((a + 0.05) / (b + 0.05) < 4.5) bad.push(`${e.tagName}.${e.className}: ${e.textContent.slice(0, 40)}`);
  }
  return bad;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_text_has_contrast(
    scheme: str, browser: Browser, provider: AnthropicFake, tmp_path: Path
) -> None:
    extra = '[[providers]]\nname = "gone"\ntype = "openrouter"\napi_key = "$NO_SUCH_KEY_HERE"\n'
    async with in_process(tmp_path, config_of(provider, extra=extra)) as proxy:
        assert await ask(proxy, "tiny") == 200
        await proxy.idle()
        async with opened(browser, proxy.url, color_scheme=scheme) as page:
            await page.wait_for_selector(".tiles")
            assert await page.evaluate(CONTRAST) == []
        async with opened(browser, admin_url(proxy), color_scheme=scheme) as page:
            await page.wait_for_selector(".tiles")
            for name in TABS:
                await tab(page, name)
                assert await page.evaluate(CONTRAST) == [], name


async def test_signing_in_with_a_users_key(browser: Browser, provider: AnthropicFake, tmp_path: Path) -> None:
    async with in_process(tmp_path, config_of(provider, extra="[server]\nrequire_key = true\n")) as proxy:
        _, key = proxy.state.store.add_user("ann", 5_000_000, {}, "")
        async with opened(browser, proxy.url) as page:
            await page.get_by_label("Your ccmux key").fill("wrong")
            await page.click("button:text-is('Sign in')")
            await expect(page.locator("[role=alert]")).to_have_text("That is not the right one.")
            await page.get_by_label("Your ccmux key").fill(key)
            await page.keyboard.press("Enter")
            await expect(page.locator(".tiles")).to_contain_text("$5.00")
            await expect(page.locator(".tiles")).to_contain_text("by ann")
            await expect(page.locator("main")).to_contain_text("Put your key where YOUR-CCMUX-KEY stands")


async def test_a_key_is_given_where_none_is_asked_for(browser: Browser, tmp_path: Path) -> None:
    async with in_process(tmp_path, "") as proxy, opened(browser, proxy.url) as page:
        _, key = proxy.state.store.add_user("ann", 5_000_000, {}, "")
        for given, name in (("wrong", "local"), (key, "ann")):
            await expect(page.locator(".tiles")).to_contain_text("by local")
            await page.get_by_role("button", name="Use a key").click()
            await page.get_by_label("Your ccmux key").fill(given)
            await page.keyboard.press("Enter")
            await expect(page.locator(".tiles")).to_contain_text(f"by {name}")
            told = "No user here has that key: this is the local user." if name == "local" else ""
            await expect(page.locator("#status")).to_have_text(told)


async def test_adding_a_user_shows_the_key_once_and_who_has_no_credit(
    browser: Browser, tmp_path: Path
) -> None:
    text = "[credits]\nenforce = true\n"
    async with in_process(tmp_path, text) as proxy:
        proxy.state.store.add_user("bob", 0, {}, "")
        proxy.state.store.local_user()  # never refused for lack of credit
        async with opened(browser, admin_url(proxy)) as page:
            await expect(page.locator(".problems.mild")).to_contain_text("bob has no credit left")
            await expect(page.locator(".problems")).not_to_contain_text("local")
            await tab(page, "users")
            await expect(page.locator("main")).not_to_contain_text("refuse nobody")
            await page.click("text=Add a user")
            await page.get_by_label("Name", exact=True).fill("not a name")
            await page.click("dialog button:text-is('Add')")
            await expect(page.locator("dialog [role=alert]")).not_to_be_empty()
            await page.get_by_label("Name", exact=True).fill("ann")
            await page.get_by_label("Credit, dollars").fill("2.5")
            await page.click("dialog button:text-is('Add')")
            await expect(page.locator("dialog pre")).to_contain_text("ccmux-")
            await expect(page.locator("main")).to_contain_text("$2.50")
            await page.click("dialog button:text-is('Close')")
            await expect(page.locator("main")).to_be_focused()  # its opener was drawn anew
            await expect(page.locator("main")).not_to_contain_text("ccmux-")


async def test_editing_a_provider_keeps_its_key_but_not_for_another_address(
    admin: Admin, tmp_path: Path
) -> None:
    file = tmp_path / "config.toml"
    async with admin() as (_, page):
        await tab(page, "providers")
        await page.get_by_label("Edit up").click()
        await expect(page.get_by_label("API key")).to_have_attribute("autocomplete", "new-password")
        assert "sk-secret" not in await page.content()
        await page.get_by_label("Models", exact=True).fill("one, two")
        await page.click("dialog button:text-is('Save')")
        await expect(page.locator("#status")).to_contain_text("saved")
        assert "sk-secret-0123456789" in file.read_text() and 'models = ["one", "two"]' in file.read_text()
        await page.get_by_label("Edit up").click()
        await page.get_by_label("Models", exact=True).fill("")
        await expect(page.locator("dialog")).not_to_contain_text("must be typed again")
        await page.get_by_label("Base URL").fill("")  # so to Anthropic's own
        await expect(page.locator("dialog")).to_contain_text("must be typed again")
        await page.get_by_label("Base URL").fill("https://elsewhere.example")
        await expect(page.locator("dialog")).to_contain_text("The key must be typed again")
        await page.click("dialog button:text-is('Save')")
        await expect(page.locator("main")).to_contain_text("elsewhere.example")
        assert "sk-secret" not in file.read_text() and "models = [" not in file.read_text()


async def test_another_type_at_another_address_wants_its_own_key(admin: Admin) -> None:
    text = '[[providers]]\nname = "up"\ntype = "openrouter"\napi_key = "sk-secret-0123456789"\n'
    async with admin(text) as (proxy, page):
        await tab(page, "providers")
        await page.get_by_label("Edit up").click()
        await expect(page.locator("dialog")).to_contain_text(
            "go to https://openrouter.ai/api/v1/chat/completions."
        )
        await page.get_by_label("Type", exact=True).select_option("deepseek")
        await expect(page.locator("dialog")).to_contain_text(
            "go to https://api.deepseek.com/anthropic/v1/messages. The key must be typed again"
        )
        await page.click("dialog button:text-is('Save')")
        await expect(page.locator("main")).to_contain_text("api.deepseek.com")
    assert "sk-secret" not in proxy.config_file.read_text()


async def test_a_kept_request_is_inspected_and_explained(admin: Admin, provider: AnthropicFake) -> None:
    async with admin() as (proxy, page):
        await tab(page, "inspect")
        await page.click("text=Keep requests for 15 minutes")
        await expect(page.locator("main")).to_contain_text("Waiting for requests")
        assert await ask(proxy, "tiny") == 200
        await page.click("main button:text-is('Show')")
        await expect(page.locator("pre").first).to_contain_text('"content": "Hi"')
        assert "sk-secret" not in await page.content()
        await tab(page, "router")
        await page.get_by_label("A recent request").select_option(index=1)
        await expect(page.get_by_label("Messages request (JSON)")).to_have_value(re.compile('"Hi"'))
        proxy.state.counter.factors["up", "tiny"] = (1.25, 9)
        await page.click("button:text-is('Explain')")
        await expect(page.locator("main")).to_contain_text("goes to tiny")
        await expect(page.locator("main")).to_contain_text(
            "counted (by 1.25, as its answers there have told)"
        )
        proxy.state.vocabulary.loaded["o200k_base"] = None
        await tab(page, "overview")
        await expect(page.locator(".problems")).to_contain_text("estimates until o200k_base is downloaded")
        assert len(provider.asked) == 1


async def test_any_logged_request_tells_why_it_went_where_it_did(
    admin: Admin, provider: AnthropicFake
) -> None:
    text = config_of(provider, extra='[[models.mappings]]\nprovider = "up"\nactual_model = "second"\n')
    async with admin(text) as (proxy, page):
        assert await ask(proxy, "tiny") == 200
        row = page.locator(".log tbody button").first
        await row.click()
        dialog = page.locator("dialog")
        for words in (
            "tiny was asked for",
            "Targets in order: up/tiny, then up/second. One that rests after faults, or is limited, is tried last.",
            "charged $0.0045",
            "is not kept",
        ):
            await expect(dialog).to_contain_text(words)
        await expect(page.get_by_role("region", name="Rules tried")).to_contain_text("no prompt rules")
        assert (
            await ask(proxy, "up/between") == 200
        )  # the row that was pressed is drawn anew behind the dialog
        await expect(page.locator(".log")).to_contain_text("up/between")
        await page.keyboard.press("Escape")
        await expect(page.locator(".log tbody button").nth(1)).to_be_focused()
        assert await page.locator("[role=status]").count() == 1
        assert await ask(proxy, "up/other") == 200  # the log goes on under the focus
        await expect(page.locator(".log")).to_contain_text("up/other")
        await expect(page.locator(".log tbody button").nth(2)).to_be_focused()

        await tab(page, "router")
        await expect(page.locator('nav a[href="#router"]')).to_be_focused()
        await page.get_by_label("A recent request").select_option(index=3)
        await expect(page.locator("main")).to_contain_text("Targets in order: up/tiny, then up/second")

        await tab(page, "inspect")
        await page.click("text=Keep requests for 15 minutes")
        await expect(page.locator("main")).to_contain_text("Waiting for requests")
        assert await ask(proxy, "tiny") == 200
        await tab(page, "overview")
        await page.locator(".log tbody button").first.click()
        await page.click("text=Explain it again")
        await expect(dialog).to_contain_text("goes to tiny")
        assert len(provider.asked) == 4


async def test_the_log_shows_what_ended_while_its_stream_was_broken(
    browser: Browser, provider: AnthropicFake, tmp_path: Path
) -> None:
    async with (
        in_process(tmp_path, config_of(provider)) as proxy,
        opened(browser, f"{proxy.url}/admin") as page,
    ):
        await page.route("**/admin/api/events", lambda route: route.abort())
        await page.get_by_label("Admin token").fill(ADMIN_TOKEN)
        await page.click("button:text-is('Sign in')")
        await expect(page.locator(".log")).to_contain_text("No requests yet")
        assert await ask(proxy, "tiny") == 200
        await proxy.idle()
        await page.unroute("**/admin/api/events")
        await expect(page.locator(".log")).to_contain_text("up/tiny", timeout=10_000)


async def test_a_backup_is_restored(admin: Admin, provider: AnthropicFake) -> None:
    text = config_of(provider)
    async with admin(text) as (proxy, page):
        await tab(page, "router")
        await page.get_by_label("Background", exact=True).fill("tiny")
        await save(page)
        await tab(page, "config")
        await page.get_by_label("Look at config.toml.bak1").dblclick()
        await expect(page.locator("dialog pre").first).to_contain_text('-background = "tiny"')
        assert "sk-secret" not in await page.content()
        assert await page.locator("dialog").count() == 1
        await page.click("dialog button:text-is('Restore')")
        await expect(page.locator("#status")).to_contain_text("config.toml.bak1 is the config again")
    assert proxy.config_file.read_text() == text


async def test_a_weeks_budget_stands_beside_what_was_spent(
    browser: Browser, provider: AnthropicFake, tmp_path: Path
) -> None:
    async with in_process(tmp_path, config_of(provider)) as proxy:
        proxy.state.store.local_user()
        proxy.state.store.set_budgets("local", {"week_microusd": 2_000_000})
        assert await ask(proxy, "tiny") == 200
        await proxy.idle()
        async with opened(browser, proxy.url) as page:
            await expect(page.locator("main")).to_contain_text("$0.0045 of $2.00 this week")
            await expect(page.get_by_label("budget of the week")).to_be_visible()
            await expect(page.locator(".tiles")).to_contain_text("Spent in all$0.0045")
        async with opened(browser, admin_url(proxy)) as page:
            await tab(page, "users")
            await expect(page.locator("main")).to_contain_text("$2.00 a week")
            await expect(page.locator("main")).to_contain_text(
                "Credit and budgets are counted, but refuse nobody"
            )
            await page.get_by_label("Open local").click()
            await expect(page.locator("dialog")).to_contain_text("limit nothing")
            await expect(page.locator("dialog")).to_contain_text("$0.0045 of $2.00 this week")


async def test_a_provider_that_refuses_its_key_is_told_apart(browser: Browser, tmp_path: Path) -> None:
    async with (
        AnthropicFake(lambda turn: Answer(status=401, error="no such key")) as fake,
        in_process(tmp_path, config_of(fake)) as proxy,
    ):
        assert await ask(proxy, "tiny") == 500
        async with opened(browser, admin_url(proxy)) as page:
            await expect(page.locator(".problems:not(.mild)")).to_contain_text(
                "up refuses its key. See Providers"
            )
            await expect(page.locator(".log")).to_contain_text("500 key refused")
            await page.get_by_label("Filter the requests").fill("KEY REFUSED")
            await expect(page.locator(".log tbody tr")).to_have_count(1)
            await tab(page, "providers")
            await expect(page.locator("tbody")).to_contain_text("refuses its key")


async def test_a_provider_whose_last_try_failed_is_not_called_working(
    browser: Browser, tmp_path: Path
) -> None:
    async with (
        AnthropicFake(lambda turn: Answer(status=500, error="out of order")) as fake,
        in_process(tmp_path, config_of(fake)) as proxy,
    ):
        assert await ask(proxy, "tiny") == 500
        async with opened(browser, admin_url(proxy)) as page:
            await expect(page.locator("main")).to_contain_text("failed last time")
        async with opened(browser, proxy.url) as page:
            await expect(page.locator(".tiles")).to_contain_text("Spent in all$0.00")


async def test_only_the_quirks_that_are_chosen_are_written(admin: Admin) -> None:
    async with admin("") as (proxy, page):
        await tab(page, "providers")
        await page.click("text=Add a provider")
        await page.get_by_label("Type", exact=True).select_option("deepseek")
        await page.get_by_label("API key").fill("$NO_SUCH_KEY_HERE")
        await page.click("text=Quirks")
        await page.get_by_label("Count tokens").select_option("auto")
        await page.click("dialog button:text-is('Save')")
        await expect(page.locator("#status")).to_contain_text("saved")
        await expect(page.locator("tbody")).to_contain_text("$NO_SUCH_KEY_HERE is not set in the environment")
        assert tomllib.loads(proxy.config_file.read_text())["providers"] == [
            {
                "name": "deepseek",
                "type": "deepseek",
                "api_key": "$NO_SUCH_KEY_HERE",
                "quirks": {"count_tokens": "auto"},
            }
        ]
        await page.get_by_label("Edit deepseek").click()
        await page.click("text=Quirks")
        await expect(page.get_by_label("Count tokens")).to_have_value("auto")
        await page.get_by_label("Count tokens").select_option("")
        await page.click("dialog button:text-is('Save')")
        await expect(page.locator("dialog")).to_have_count(0)
        assert "quirks" not in proxy.config_file.read_text()


async def test_a_provider_lists_its_models_and_is_switched_off(admin: Admin) -> None:
    async with admin() as (proxy, page):
        await tab(page, "providers")
        await page.get_by_label("Test up").click()
        await page.click("text=Fetch the model list")
        await expect(page.locator("dialog [aria-live] p")).to_have_text("1 model")
        await page.click("dialog button:text-is('Close')")
        await page.get_by_label("Edit up").click()
        await page.get_by_label("Enabled").select_option("no")
        await page.click("dialog button:text-is('Save')")
        await expect(page.locator("main")).to_contain_text("switched off")
        await expect(page.get_by_label("Edit up")).to_be_focused()
    assert "enabled = false" in proxy.config_file.read_text()


async def test_a_model_in_use_is_not_deleted_and_targets_move(admin: Admin, provider: AnthropicFake) -> None:
    text = config_of(
        provider, extra='# 2\n[[models.mappings]]\nprovider = "up" # B\nactual_model = "second"\n'
    )
    text = text.replace('provider = "up"\n', 'provider = "up" # A\n').replace("price", "# dear\nprice")
    async with admin(text + '# r\n[router]\ndefault = "tiny" # R\n') as (proxy, page):
        await tab(page, "models")
        await page.get_by_label("Edit tiny").click()
        await page.click("dialog button:text-is('Delete')")
        await expect(page.locator("dialog #status")).to_contain_text("used by default")
        second = page.get_by_role("group", name="target 2")
        await second.get_by_role("button", name="Up").click()
        await page.click("dialog button:text-is('Save')")
        await expect(page.locator("main")).to_contain_text("up/second, then up/tiny")
    assert re.findall(r"# .*", proxy.config_file.read_text()) == [
        "# a comment that stays", "# dear", "# 2", "# B", "# A", "# r", "# R",
    ]  # fmt: skip


async def test_one_kind_of_a_price_is_taken_away(admin: Admin, provider: AnthropicFake) -> None:
    above = "tiers = [{ above = 200000, input = 6.0 }]"
    text = config_of(provider).replace("output = 15.0", f"output = 15.0, cache_read = 0.3, {above}")
    async with admin(text) as (proxy, page):
        await tab(page, "models")
        await page.get_by_label("Edit tiny").click()
        await facts(page).get_by_label("Cache read").fill("")
        await page.click("dialog button:text-is('Save')")
        await expect(page.locator("#status")).to_contain_text("saved")
    written = tomllib.loads(proxy.config_file.read_text())["models"][0]["price"]
    assert written == {"input": 3, "output": 15, "tiers": [{"above": 200000, "input": 6}]}


async def test_what_is_added_takes_no_other_ones_place(admin: Admin, provider: AnthropicFake) -> None:
    text = config_of(provider)
    async with admin(text) as (proxy, page):
        await tab(page, "providers")
        await page.click("text=Add a provider")
        await page.click("dialog button:text-is('Save')")
        await expect(page.locator("dialog .field [role=alert]")).to_have_text("type: choose one first")
        await page.get_by_label("Type", exact=True).select_option("demo")
        await page.get_by_label("Name", exact=True).fill("up")
        await page.click("dialog button:text-is('Save')")
        await expect(page.locator("dialog .field [role=alert]")).to_contain_text("there is up already")
        await page.get_by_label("Name", exact=True).fill("down")
        await page.click("dialog button:text-is('Save')")
        await expect(page.locator("#status")).to_contain_text("Provider down is saved")
        await tab(page, "models")
        await expect(page.locator("tbody")).to_contain_text("default, as the first")
        await page.click("text=Add a model")
        await expect(page.get_by_label("Provider", exact=True)).to_have_value("down")  # what was just added
        await page.get_by_label("Name", exact=True).fill("tiny")
        await page.get_by_label("Model at the provider").fill("other")
        await page.click("dialog button:text-is('Save')")
        await expect(page.locator("dialog .field [role=alert]")).to_contain_text("there is tiny already")
        await page.click("dialog button:text-is('Close')")
    now, before = tomllib.loads(proxy.config_file.read_text()), tomllib.loads(text)
    assert now["providers"][0] == before["providers"][0] and now["models"] == before["models"]


async def test_what_is_no_number_is_not_taken_for_an_empty_box(
    browser: Browser, provider: AnthropicFake, tmp_path: Path
) -> None:
    async with in_process(tmp_path, config_of(provider)) as proxy:
        proxy.state.store.add_user("ann", 0, {"day_microusd": 5_000_000}, "")
        async with opened(browser, admin_url(proxy)) as page:
            await tab(page, "users")
            await page.get_by_label("Open ann").click()
            await no_number(page, page.get_by_label("Budget a day"), "Save budgets")
            await expect(page.locator("dialog")).to_contain_text("Budget a day, dollars: must be a number")
            for label, typed, save, told in (
                ("Budget a day", "-1", "Save budgets", "day, dollars: must be at least 0"),
                ("Budget a day", "1e12", "Save budgets", "day, dollars: must be at most 1,000,000,000"),
                (
                    "Amount, dollars",
                    "1e12",
                    "Change credit",
                    "Amount, dollars: must be at most 1,000,000,000",
                ),
                ("Amount, dollars", "1e-9", "Change credit", "Give an amount"),
            ):
                await page.get_by_label(label).fill(typed)
                await page.click(f"dialog button:text-is('{save}')")
                await expect(page.locator("dialog [role=alert]", has_text=told)).to_be_visible()
            await page.get_by_label("Budget a day").fill("6.5")
            await page.click("dialog button:text-is('Save budgets')")
            await expect(page.locator("main")).to_contain_text("$6.50 a day")
            await page.click("text=Add a user")
            await page.get_by_label("Name", exact=True).fill("bob")
            await no_number(page, page.get_by_label("Credit, dollars"), "Add")
            await page.click("dialog button:text-is('Close')")
            await tab(page, "models")
            await page.get_by_label("Edit tiny").click()
            price = facts(page).get_by_label("Output", exact=True)
            await no_number(page, price, "Save")
    assert "output = 15.0" in (tmp_path / "config.toml").read_text()


async def no_number(page: Page, box: Any, save: str) -> None:
    await box.fill("")
    await box.press_sequentially("1e")
    await page.click(f"dialog button:text-is('{save}')")
    await expect(page.locator("dialog [role=alert]", has_text="must be a number")).to_be_visible()


async def test_one_settings_save_leaves_the_other_form_good(admin: Admin) -> None:
    async with admin() as (proxy, page):
        await tab(page, "config")
        for label in ("Markup percent", "Body timeout"):
            await page.get_by_label(label).fill("77")
        for name in ("Credits", "Server"):
            form = page.locator("section.card", has=page.locator(f"h2:text-is('{name}')"))
            await form.locator("button:text-is('Save')").click()
            await expect(page.locator("#status")).to_contain_text(f"{name}: saved")
        written = tomllib.loads(proxy.config_file.read_text())
        assert written["credits"] == {"markup_percent": 77}
        assert written["server"]["body_timeout"] == 77


async def test_a_patterns_space_at_its_end_stays(admin: Admin, provider: AnthropicFake) -> None:
    rule = '[[router.rules]]\npattern = "^ultra "\nmodel = "tiny"\n'
    async with admin(config_of(provider, extra=rule)) as (proxy, page):
        await tab(page, "router")
        await page.get_by_label("Background", exact=True).fill("tiny")
        await save(page)
    assert rule in proxy.config_file.read_text()


async def test_an_overview_left_open_over_midnight_begins_a_new_day(
    browser: Browser, provider: AnthropicFake, tmp_path: Path
) -> None:
    async with in_process(tmp_path, config_of(provider)) as proxy, opened(browser, "about:blank") as page:
        assert await ask(proxy, "tiny") == 200
        await proxy.idle()
        await page.clock.install()
        await page.goto(admin_url(proxy))
        today = page.locator(".tiles .card", has_text="Requests today")
        await expect(today).to_contain_text("Requests today11 in all")
        date = re.compile(r"\d+/\d+/\d+")
        await expect(page.locator(".log time")).not_to_contain_text(date)
        await page.clock.set_system_time(datetime.now(UTC) + timedelta(days=1))
        await page.clock.run_for(6_000)
        await expect(today).to_contain_text("Requests today01 in all")
        await expect(page.locator(".log time")).to_contain_text(date)
        await tab(page, "router")
        await expect(page.get_by_label("A recent request")).to_contain_text(date)


async def test_a_view_that_is_left_early_leaves_nothing_behind(admin: Admin) -> None:
    async with admin() as (proxy, page):
        await page.wait_for_selector(".log")
        held: list[Any] = []

        async def hold(route: Any) -> None:
            held.append(route)

        await page.route("**/report?*", hold)
        await page.route("**/users", hold)
        await tab(page, "models")
        for name in ("overview", "users", "router"):
            async with page.expect_request("**/admin/api/state"):
                await page.click(f'nav a[href="#{name}"]')
            if name != "router":
                count = 2 if name == "overview" else 3
                while len(held) < count:
                    await page.wait_for_timeout(10)
        await page.get_by_label("Background", exact=True).fill("typed")
        for route in held[:2]:
            await route.continue_()
        await held[2].fulfill(status=500, json={})
        await page.wait_for_timeout(500)
        await expect(page.get_by_label("Background", exact=True)).to_have_value("typed")
        assert not proxy.state.listeners


async def test_polling_stops_while_the_page_is_hidden(
    browser: Browser, provider: AnthropicFake, tmp_path: Path
) -> None:
    hide = (
        """(hidden) => Object.defineProperty(document, "hidden", { get: () => hidden, configurable: true })"""
    )
    async with in_process(tmp_path, config_of(provider)) as proxy, opened(browser, "about:blank") as page:
        await page.clock.install()
        answers: list[str] = []
        page.on("response", lambda response: answers.append(response.url))
        for url, every, at_first in ((proxy.url, 31_000, 0), (admin_url(proxy), 6_000, 2)):
            await page.goto(url)
            await page.wait_for_selector("main .tiles")
            while sum("/requests?limit=100" in answer for answer in answers) < at_first:
                await page.wait_for_event("response")  # the log is read again once it is followed
            asked: list[str] = []
            page.on("request", lambda request, asked=asked: asked.append(request.url))
            await page.evaluate(hide, True)
            await page.clock.run_for(3 * every)
            assert asked == []
            await page.evaluate(hide, False)
            async with page.expect_request("**/api/*"):
                await page.clock.run_for(every)


async def test_unsaved_changes_warn(admin: Admin) -> None:
    async with admin() as (_, page):
        await tab(page, "router")
        asked: list[str] = []
        page.on("dialog", lambda dialog: asked.append(dialog.type))
        await page.get_by_label("Background", exact=True).fill("typed")
        await page.evaluate("window.confirm = () => { window.warned = true; return false; }; 0")
        await page.click('nav a[href="#users"]')
        # As a function: the page's policy lets an expression be evaluated the first time only.
        await page.wait_for_function("() => window.warned && location.hash === '#router'")
        await expect(page.get_by_label("Background", exact=True)).to_have_value("typed")
        await page.reload()
        assert asked == ["beforeunload"]


async def test_a_dashboard_outlives_a_restart(
    browser: Browser, provider: AnthropicFake, tmp_path: Path
) -> None:
    async with in_process(tmp_path, config_of(provider)) as proxy, opened(browser, "about:blank") as page:
        await page.clock.install()
        await page.goto(proxy.url)
        await page.wait_for_selector("main .tiles")
        await page.route("**/api/*", lambda route: route.abort())
        await page.clock.run_for(31_000)
        await expect(page.locator("#status")).to_contain_text("does not answer")
        await expect(page.locator("main .tiles")).to_be_visible()
        await page.unroute("**/api/*")
        assert await ask(proxy, "tiny") == 200
        await proxy.idle()
        await page.clock.run_for(31_000)
        await expect(page.locator(".tiles")).to_contain_text("Spent in all$0.0045")


async def test_escape_never_closes_a_changed_form_unasked(admin: Admin) -> None:
    async with admin() as (_, page):
        await tab(page, "providers")
        await page.get_by_label("Edit up").click()
        await page.evaluate(
            "window.asked = 0; window.confirm = () => { window.asked += 1; return false; }; 0"
        )
        await page.get_by_label("Models", exact=True).fill("one, two")
        for _ in range(4):
            await page.keyboard.press("Escape")
        await expect(page.get_by_label("Models", exact=True)).to_have_value("one, two")
        assert await page.evaluate("window.asked") == 4
        await page.evaluate("window.confirm = () => true; 0")
        await page.keyboard.press("Escape")
        await expect(page.locator("dialog")).to_have_count(0)


async def test_a_late_report_is_not_shown_as_another(admin: Admin, provider: AnthropicFake) -> None:
    async with admin() as (proxy, page):
        assert await ask(proxy, "tiny") == 200
        await proxy.idle()
        await tab(page, "billing")
        held: asyncio.Queue[Any] = asyncio.Queue()
        await page.route("**/report?by=model*", held.put)
        await page.get_by_label("By", exact=True).select_option("model")
        late = await held.get()
        await page.get_by_label("By", exact=True).select_option("provider")
        await expect(page.locator("tbody")).to_contain_text("up")
        async with page.expect_response("**/report?by=model*") as answered:
            await late.continue_()
        await (await answered.value).finished()
        await page.wait_for_timeout(100)
        await expect(page.locator("tbody")).to_contain_text("up")


async def test_a_header_line_without_a_colon_is_told(admin: Admin) -> None:
    async with admin() as (proxy, page):
        await tab(page, "providers")
        await page.get_by_label("Edit up").click()
        await page.click("text=More settings")
        await page.get_by_label("Headers").fill("X-Title=mine")
        await page.click("dialog button:text-is('Save')")
        await expect(page.locator("dialog .field [role=alert]")).to_contain_text("X-Title=mine lacks a colon")
        await page.get_by_label("Headers").fill("X-Title: mine\n\n")
        await page.click("dialog button:text-is('Save')")
        await expect(page.locator("#status")).to_contain_text("saved")
    assert 'X-Title = "mine"' in proxy.config_file.read_text()


async def test_a_double_click_tests_a_provider_once(admin: Admin, provider: AnthropicFake) -> None:
    async with admin() as (_, page):
        await tab(page, "providers")
        await page.get_by_label("Test up").click()
        for times in (1, 2):
            await page.dblclick("dialog button:text-is('Test')")
            await expect(page.locator("dialog")).to_contain_text("Hello from upstream.")
            assert len(provider.asked) == times
        await expect(page.locator("tbody")).to_contain_text("working")
        await page.click("dialog button:text-is('Close')")
        await expect(page.get_by_label("Test up")).to_be_focused()


async def test_a_hidden_page_holds_no_connection(admin: Admin) -> None:
    hide = """(hidden) => { Object.defineProperty(document, "hidden", { get: () => hidden, configurable: true });
        document.dispatchEvent(new Event("visibilitychange")); }"""
    async with admin() as (proxy, page):
        await expect(page.locator(".log")).to_contain_text("No requests yet")
        await until(lambda: bool(proxy.state.listeners), "the page listens")
        await page.evaluate(hide, True)
        await until(lambda: not proxy.state.listeners, "the stream was closed")
        assert await ask(proxy, "tiny") == 200
        await page.evaluate(hide, False)
        await expect(page.locator(".log")).to_contain_text("up/tiny")
        await until(lambda: bool(proxy.state.listeners), "the page listens again")


async def test_the_focus_stays_on_a_button_that_was_pressed(admin: Admin) -> None:
    async with admin() as (_, page):
        await tab(page, "try")
        await page.get_by_role("button", name="Send").focus()
        await page.keyboard.press("Enter")
        await expect(page.locator("main")).to_contain_text("first token after")
        await expect(page.get_by_role("button", name="Send")).to_be_focused()


async def test_a_save_asks_before_the_dialogs_other_form_is_lost(
    browser: Browser, provider: AnthropicFake, tmp_path: Path
) -> None:
    async with in_process(tmp_path, config_of(provider)) as proxy:
        proxy.state.store.add_user("ann", 0, {}, "")
        async with opened(browser, admin_url(proxy)) as page:
            await tab(page, "users")
            await page.get_by_label("Open ann").click()
            await page.get_by_label("Amount, dollars").fill("10")
            await page.get_by_label("Budget a day").fill("3")
            await page.evaluate("window.confirm = () => false; 0")
            for name in ("Change credit", "Save budgets"):
                await page.click(f"dialog button:text-is('{name}')")
                form = page.locator("dialog form", has=page.get_by_role("button", name=name))
                await expect(form.locator("[role=alert]")).to_contain_text("Nothing is saved")
            await page.click("dialog button:text-is('Disable')")
            await expect(page.locator("#status")).to_contain_text("Nothing is saved")
            await expect(page.get_by_label("Amount, dollars")).to_have_value("10")
            ann = proxy.state.store.known("ann")
            assert (ann.balance, ann.budgets["day_microusd"], ann.disabled) == (0, None, False)
            await page.evaluate("window.confirm = () => true; 0")
            await page.click("dialog button:text-is('Change credit')")
            await expect(page.locator("main")).to_contain_text("$10.00")


async def test_a_removed_target_leaves_the_focus_near_and_back_closes_a_dialog(admin: Admin) -> None:
    async with admin() as (_, page):
        await tab(page, "providers")
        await tab(page, "models")
        await page.get_by_label("Edit tiny").click()
        await page.get_by_role("button", name="Remove").focus()
        await page.keyboard.press("Enter")
        await expect(page.get_by_role("button", name="Add a target")).to_be_focused()
        await page.go_back()  # asked, and left
        await expect(page.locator('nav a[href="#providers"]')).to_have_attribute("aria-current", "page")
        await expect(page.locator("dialog")).to_have_count(0)
        assert await page.locator("[role=status]").count() == 1


async def test_another_amount_is_not_taken_for_the_one_whose_answer_was_lost(
    browser: Browser, tmp_path: Path
) -> None:
    lost: list[bool] = []

    async def lose_the_first_answer(route: Route) -> None:
        if lost:
            await route.continue_()
            return
        lost.append(True)
        await route.fetch()
        await route.abort()

    async with in_process(tmp_path, "") as proxy:
        proxy.state.store.add_user("ann", 0, {}, "")
        async with opened(browser, admin_url(proxy)) as page:
            await tab(page, "users")
            await page.get_by_label("Open ann").click()
            await page.route("**/credit", lose_the_first_answer)
            error = page.locator("dialog [role=alert]").first
            for dollars, words in (("5", "does not answer"), ("-5", "5.00 dollars were entered already")):
                await page.get_by_label("Amount, dollars").fill(dollars)
                await page.click("dialog button:text-is('Change credit')")
                await expect(error).to_contain_text(words)
            assert proxy.state.store.known("ann").balance == 5_000_000
            await page.get_by_label("Amount, dollars").fill("5")
            await page.click("dialog button:text-is('Change credit')")
            await expect(page.locator("main")).to_contain_text("$5.00")
            assert proxy.state.store.known("ann").balance == 5_000_000


async def test_many_requests_at_once_are_drawn_once(admin: Admin) -> None:
    async with admin() as (proxy, page):
        await ask(proxy, "tiny")
        await page.wait_for_selector(".log tbody tr")
        await page.evaluate("""() => { window.draws = 0; new MutationObserver(() => { draws += 1; })
          .observe(document.querySelector(".log"), { childList: true }); }""")
        for _ in range(4):
            await asyncio.gather(*(ask(proxy, "tiny") for _ in range(10)))
        await expect(page.locator(".log tbody tr")).to_have_count(41)
        assert await page.evaluate("draws") < 20


async def test_a_tried_answer_is_added_piece_by_piece(admin: Admin) -> None:
    """With the whole text set anew for each of 20,000 pieces it would take 5 s instead of 0.6."""
    async with admin() as (_, page):
        await tab(page, "try")
        await page.click("button:text-is('Send')")
        await page.wait_for_selector("text=first token after")
        pre = page.get_by_role("region", name="Answer")
        await expect(pre).to_have_text("Hello from upstream.")
        assert await pre.evaluate("(node) => node.childNodes.length") > 1
        await page.get_by_label("Most output tokens").fill("0")
        await page.click("button:text-is('Send')")
        await expect(page.locator("main [role=alert]")).to_contain_text(
            "Most output tokens: must be at least 1"
        )
        await page.get_by_label("Most output tokens").fill("9")
        await page.get_by_label("Model asked for").fill("up/unpriced")
        await page.click("button:text-is('Send')")
        await expect(page.locator("main")).to_contain_text("100 out, no price")
        by_default_price = "chargeOf({ cost_microusd: null, charge_microusd: 1500000 })"
        assert await page.evaluate(by_default_price) == await page.evaluate("usd(1500000)")


async def test_what_is_typed_while_a_save_draws_the_view_anew_stays(admin: Admin) -> None:
    held = asyncio.Event()

    async def hold(route: Route) -> None:
        await held.wait()
        await route.continue_()

    async with admin() as (proxy, page):
        for name, label, send in (("router", "Think", "Save"), ("config", "config.toml", "Check and save")):
            await tab(page, name)
            box, save = page.get_by_label(label, exact=True), page.locator("form", has_text=label).last
            before = await box.input_value()
            held.clear()
            await page.route("**/admin/api/state", hold)
            async with page.expect_request("**/admin/api/state"):
                await save.get_by_role("button", name=send).click()
            more = before + "\n# more" if before else "tiny"
            await box.fill(more)
            held.set()
            await expect(page.locator("#status")).to_contain_text("saved")
            await page.unroute("**/admin/api/state")
            await expect(box).to_have_value(more)
            await page.evaluate("document.querySelector('#status').textContent = ''")
            await save.get_by_role("button", name=send).click()  # and no other one's change is in its way
            await expect(page.locator("#status")).to_contain_text("saved")
        written = proxy.config_file.read_text()
        assert 'think = "tiny"' in written and "# more" in written


@pytest.mark.parametrize(
    "token",
    [
        pytest.param("another-token-of-the-admin-0123456789", id="plain"),
        pytest.param("with-one,comma-in-it-0123456789", id="a comma, which parts only keys"),
    ],
)
async def test_who_changes_the_admin_token_stays_signed_in(admin: Admin, token: str) -> None:
    async with admin("") as (proxy, page):
        await tab(page, "config")
        await page.get_by_label("Admin token").fill(token)
        await page.locator("section", has_text="Host, port").get_by_role("button", name="Save").click()
        await expect(page.locator("#status")).to_contain_text("Server: saved")
        await expect(page.get_by_label("Admin token")).to_have_attribute(
            "placeholder", re.compile("ends in 6789")
        )
        assert proxy.state.admin_token == token


async def test_a_dark_page_prints_dark_on_white_and_whole(
    browser: Browser, provider: AnthropicFake, tmp_path: Path
) -> None:
    async with (
        in_process(tmp_path, config_of(provider)) as proxy,
        opened(browser, proxy.url, color_scheme="dark") as page,
    ):
        await page.wait_for_selector(".tiles")
        colour = "getComputedStyle(document.body).color"
        assert await page.evaluate(colour) == "rgb(229, 233, 240)"
        await page.emulate_media(media="print")
        assert await page.evaluate(colour) == "rgb(27, 34, 48)"
        assert (
            await page.evaluate("getComputedStyle(document.querySelector('.scroll')).overflowX") == "visible"
        )


async def test_every_short_word_for_a_fault_has_a_plain_one() -> None:
    source = (Path(ccmux.__file__)).read_text("utf-8")
    causes = set(re.findall(r'cause="(\w+)"|error="(\w+)"|else "(client_gone)"', source))
    table = ccmux.SCRIPT.partition("const FAULTS = {")[2].partition("};")[0]
    assert {word for found in causes for word in found if word} <= set(re.findall(r"(\w+): ", table))


async def test_forms_do_not_speak_as_the_file_does(admin: Admin) -> None:
    async with admin() as (_, page):
        said = ""
        for name in TABS:
            await tab(page, name)
            if name == "config":  # whose forms are drawn last
                await expect(page.locator("main")).to_contain_text("whether every client needs a user's key")
            said += await page.locator("main").inner_text()
        for name, opener in (("providers", "Edit up"), ("models", "Edit tiny")):
            await tab(page, name)
            await page.get_by_label(opener).click()
            await page.evaluate("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
            said += await page.locator("dialog").inner_text()
            await page.keyboard.press("Escape")
        assert not re.search(r"true:|false:|left out:|\[\[", said)
        assert "unset: the built-in table" in said


async def test_a_browser_that_keeps_nothing_shows_both_pages(browser: Browser, tmp_path: Path) -> None:
    refuse = """for (const name of ["localStorage", "sessionStorage"]) Object.defineProperty(window, name,
      { get() { throw new DOMException("denied", "SecurityError"); } });"""
    async with in_process(tmp_path, "") as proxy, opened(browser, "about:blank") as page:
        await page.add_init_script(refuse)
        for url in (proxy.url, admin_url(proxy)):
            await page.goto(url)
            await page.wait_for_selector("main .tiles")
        await page.click("#theme")
        await expect(page.locator("#theme")).to_have_text("Light")


async def test_a_token_of_any_letters_is_judged_and_leaves_a_way_back(
    browser: Browser, tmp_path: Path
) -> None:
    async with in_process(tmp_path, "") as proxy, opened(browser, f"{proxy.url}/admin") as page:
        proxy.state.admin_token = "Schlüssel-100%-mit-…-und-mehr"
        await page.get_by_label("Admin token").fill("falsch…")
        await page.keyboard.press("Enter")
        await expect(page.locator("[role=alert]")).to_contain_text("not the right one")
        await page.get_by_label("Admin token").fill(proxy.state.admin_token)
        await page.keyboard.press("Enter")
        await page.wait_for_selector("main .tiles")
        await page.goto("about:blank")
        await page.goto(f"{proxy.url}/admin#token=50%-wrong")
        await expect(page.locator("[role=alert]")).to_contain_text("not the right one")


async def test_an_overview_whose_token_was_changed_asks_for_the_new_one(admin: Admin) -> None:
    async with admin("", is_timed=True) as (proxy, page):
        await page.wait_for_selector("main .tiles")
        await until(lambda: bool(proxy.state.listeners), "the page listens")
        proxy.state.admin_token = "another-token-of-the-admin-0123456789"
        await page.clock.run_for(6_000)
        await page.get_by_label("Admin token").fill(proxy.state.admin_token)
        await until(lambda: not proxy.state.listeners, "the overview's stream was closed")
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        await page.clock.run_for(11_000)  # no other poll takes what was typed
        assert asked == []
        await page.keyboard.press("Enter")
        await page.wait_for_selector("main .tiles")


async def test_a_stream_beside_which_the_log_cannot_be_read_is_given_back(
    browser: Browser, tmp_path: Path
) -> None:
    """It would hold one of the browser's six connections for as long as the page is open."""
    asked: list[str] = []

    async def second_fails(route: Route) -> None:
        asked.append(route.request.url)
        await (route.abort() if len(asked) == 2 else route.continue_())

    async with in_process(tmp_path, "") as proxy, opened(browser, "about:blank") as page:
        await page.route("**/requests?limit=100", second_fails)
        await page.goto(admin_url(proxy))
        await until(lambda: len(asked) > 2, "the log was read again")
        await until(lambda: len(proxy.state.listeners) == 1, "the first stream was closed")


async def test_what_may_not_be_copied_is_selected(browser: Browser, tmp_path: Path) -> None:
    async with in_process(tmp_path, "") as proxy, opened(browser, "about:blank") as page:
        await page.add_init_script('Object.defineProperty(navigator, "clipboard", { value: undefined });')
        await page.goto(proxy.url)
        await page.get_by_role("button", name="Copy").first.click()
        await expect(page.locator("#status")).to_contain_text("press Ctrl+C")
        assert f"export ANTHROPIC_BASE_URL='{proxy.url}'" in await page.evaluate("String(getSelection())")


async def test_what_a_save_would_break_is_told_before_it(admin: Admin, provider: AnthropicFake) -> None:
    text = config_of(provider, extra='[router]\ndefault = "tiny"\n')
    async with admin(text) as (proxy, page):
        told = page.locator("[role=alert]:not(:empty)")
        for name, opener, words in (
            ("providers", "Edit up", "tiny would still say up"),
            ("models", "Edit tiny", "default would still say tiny"),
        ):
            await tab(page, name)
            await page.get_by_label(opener).click()
            await page.get_by_label("Name", exact=True).fill("renamed")
            await page.click("dialog button:text-is('Save')")
            await expect(told).to_contain_text(words)
            await page.keyboard.press("Escape")
        await page.get_by_label("Edit tiny").click()
        await page.click("dialog button:text-is('Remove')")
        await page.click("dialog button:text-is('Save')")
        await expect(told).to_contain_text("Add a target")
        await page.keyboard.press("Escape")
        await tab(page, "router")
        await page.click("text=Add a rule")
        await page.get_by_label("Model", exact=True).fill("tiny")
        await page.click(
            "form button:text-is('Save') >> nth=0"
        )  # without a pattern it would match everything
        await expect(told).to_contain_text("Each rule needs a pattern")
    assert proxy.config_file.read_text() == text


async def test_the_overview_counts_what_it_leaves_out_and_who_was_not_asked(
    browser: Browser, provider: AnthropicFake, tmp_path: Path
) -> None:
    names = [f"mystery-{n}" for n in range(10)]
    text = config_of(provider, extra="[credits]\nenforce = true\n")
    async with in_process(tmp_path, text.replace("api_key", f"models = {names}\napi_key")) as proxy:
        _, key = proxy.state.store.add_user("ann", 5_000_000, {"day_microusd": 0}, "")
        assert await ask(proxy, "tiny", key) == 429
        await proxy.idle()
        async with opened(browser, admin_url(proxy)) as page:
            await expect(page.locator(".problems")).to_contain_text("mystery-7 and 2 more: what these cost")
            await page.locator(".log tbody button").click()
            await expect(page.locator("dialog")).to_contain_text("up/tiny was not asked")
        async with opened(browser, proxy.url) as page:
            await page.wait_for_selector(".tiles")
            assert await page.get_by_role("navigation").count() == 0  # there is but one


async def test_a_save_without_a_change_leaves_the_file_as_it_is(admin: Admin) -> None:
    text = (ROOT / "config.example.toml").read_text("utf-8")
    text += '[[providers]]\nname = "mux"\nprovider_type = "anthropic"\n[[models]]\nname = "odd"\n'
    for name, priority in (("mux", 3), ("ollama", 7)):
        text += f'[[models.mappings]]\nprovider = "{name}"\nactual_model = "a"\npriority = {priority}\n'
    tables = tomllib.loads(text)
    async with admin(text) as (proxy, page):
        for root, word in (("providers", "Provider"), ("models", "Model")):
            for row in tables[root]:
                await tab(page, root)
                await page.get_by_label(f"Edit {row['name']}", exact=True).click()
                await page.click("dialog button:text-is('Save')")
                await expect(page.locator("#status")).to_contain_text(f"{word} {row['name']} is saved")
                assert proxy.config_file.read_text("utf-8") == text, row["name"]
        for name, heading, told in (
            ("router", "Router", "The router is saved"),
            ("config", "Credits", "Credits: saved"),
            ("config", "Server", "Server: saved"),
        ):
            await tab(page, name)
            card = page.locator("section", has=page.get_by_role("heading", name=heading, exact=True))
            await card.get_by_role("button", name="Save", exact=True).click()
            await expect(page.locator("#status")).to_contain_text(told)
            assert proxy.config_file.read_text("utf-8") == text, heading


async def test_a_demo_that_still_answers_beside_a_provider_is_told(
    browser: Browser, provider: AnthropicFake, tmp_path: Path
) -> None:
    demo = provider_row()
    off = '[[providers]]\nname = "off"\ntype = "openrouter"\napi_key = "$NO_SUCH_KEY_HERE"\nenabled = false\n'
    text = config_of(provider, extra=off)  # what is switched off is no problem
    for config, is_told in ((demo + text.partition("[[models]]")[0], True), (demo + text, False)):
        folder = tmp_path / str(is_told)
        folder.mkdir()
        async with in_process(folder, config) as proxy, opened(browser, admin_url(proxy)) as page:
            await page.wait_for_selector(".tiles")
            await expect(page.locator(".problems")).to_have_count(int(is_told))


async def test_what_is_paused_or_selected_is_not_drawn_anew(admin: Admin) -> None:
    async with admin(is_timed=True) as (proxy, page):
        assert await ask(proxy, "tiny") == 200
        rows = page.locator(".log tbody tr")
        await page.clock.run_for(3_000)
        await expect(rows).to_have_count(1)
        await page.evaluate("getSelection().selectAllChildren(document.querySelector('.tiles'))")
        await page.clock.run_for(11_000)
        assert "Requests today" in await page.evaluate("String(getSelection())")
        await page.evaluate("getSelection().removeAllRanges()")
        await page.get_by_role("button", name="Pause").click()
        assert await ask(proxy, "tiny") == 200
        await page.clock.run_for(3_000)
        await page.clock.run_for(11_000)
        await expect(page.locator(".tiles")).to_contain_text("2 in all")
        await page.get_by_label("Filter the requests").fill("tiny")
        await expect(rows).to_have_count(1)
        await page.click("text=Go on")
        await expect(rows).to_have_count(2)


async def test_a_server_that_hangs_is_asked_once(admin: Admin) -> None:
    async with admin("", is_timed=True) as (_, page):
        await page.wait_for_selector("main .tiles")
        held: list[Route] = []
        await page.route("**/admin/api/state", lambda route: held.append(route))
        for _ in range(4):
            await page.clock.run_for(5_000)
        await until(lambda: bool(held), "the server is asked")
        assert len(held) == 1
        await held[0].continue_()
        async with asyncio.timeout(30):
            while len(held) == 1:  # and again once it has answered
                await page.clock.run_for(5_000)
        await held[1].continue_()
