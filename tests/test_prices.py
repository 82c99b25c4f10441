"""Prices and charges: the built-in table, which price applies, and the arithmetic to the micro-dollar."""

from __future__ import annotations

import dataclasses
import json
from decimal import Decimal
from fractions import Fraction

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ccmux import (
    PRESETS,
    PRICE_KINDS,
    Charge,
    Config,
    Credits,
    Facts,
    Json,
    Model,
    Price,
    Provider,
    Target,
    Usage,
    charge_of,
    charged_price,
    exact_cost,
    facts_of,
    fast_price,
    hold_of,
    price_json,
    price_of,
    price_table,
    with_markup,
)


def price(*amounts: str, tiers: tuple[tuple[int, Price], ...] = ()) -> Price:
    return Price(*map(Decimal, amounts), tiers=tiers)


def test_table_is_whole() -> None:
    table = price_table()
    assert len(table) >= 60
    for name, facts in table.items():
        assert facts.context >= facts.max_output > 0, name
        assert facts.price and facts.price.output > facts.price.input > 0, name
        sizes = [above for above, _ in facts.price.tiers]
        assert sizes == sorted(sizes) and all(t.input > facts.price.input for _, t in facts.price.tiers), name
        for _, tier in facts.price.tiers:
            assert [getattr(tier, k) is None for k in PRICE_KINDS] == [
                getattr(facts.price, k) is None for k in PRICE_KINDS
            ], name


FACTS = {
    "exact": ("claude-opus-4-5", "5"),
    "upper-case": ("GLM-5.3", "1.4"),
    "vendor": ("z-ai/glm-5.3", "1.4"),
    "two-vendors": ("openrouter/openai/gpt-5", "1.25"),
    "vendor-in-its-own-name": ("openai/gpt-oss-120b", "0.15"),
    "without-that-vendor": ("gpt-oss-120b", "0.35"),
    "date": ("claude-sonnet-4-5-20250929", "3"),
    "vertex-date": ("claude-sonnet-4-5@20250929", "3"),
    "iso-date": ("gpt-4o-2024-08-06", "2.5"),
    "free": ("z-ai/glm-4.6:free", "0"),
    "free-and-unknown": ("qwen/qwen3-coder:free", "0"),
    "another-tag": ("z-ai/glm-4.6:nitro", "0.6"),
    "latest": ("anthropic/claude-haiku-4-5-latest", "1"),
    "one-million": ("claude-sonnet-4-6[1m]", "3"),
    "vendor-date-tag": ("anthropic/claude-opus-4-5-20251101:thinking", "5"),
    "openrouter's-dot": ("anthropic/claude-opus-4.5", "5"),
    "openrouter's-dot-and-tag": ("anthropic/claude-haiku-4.5:thinking", "1"),
    "bedrock": ("us.anthropic.claude-sonnet-4-5-20250929-v1:0", "3"),
    "bedrock-without-date": ("bedrock/global.anthropic.claude-opus-4-6-v1", "5"),
    "vertex-default": ("claude-opus-5-5@default", "4"),
    "fireworks": ("accounts/fireworks/models/glm-5p3", "1.4"),
    "latest-in-its-own-name": ("mistral-large-latest", "0.5"),
}


@pytest.mark.parametrize(("model", "input"), FACTS.values(), ids=FACTS)
def test_facts_by_name(model: str, input: str) -> None:
    found = facts_of(model).price
    assert found is not None and found.input == Decimal(input)


@pytest.mark.parametrize(
    "model",
    ["", "llama-3-70b", "claude", "gpt-5-turbo", "gpt-5x", "opus-4-5", "or/" + ":a" * 200_000],
    ids=lambda model: model[:12],
)
def test_unknown_is_unknown(model: str) -> None:
    assert facts_of(model) == Facts()


def test_facts_say_what_a_model_refuses() -> None:
    assert (facts_of("claude-opus-5-5").sampling, facts_of("claude-opus-5-5").forced_tool) == (False, False)
    assert (facts_of("claude-opus-5").sampling, facts_of("claude-opus-5").forced_tool) == (False, True)
    always = {"claude-fable-5", "claude-fable-5-1", "claude-opus-5-5", "claude-sonnet-5-5"}
    assert {name for name, facts in price_table().items() if not facts.thinking_off} == always
    assert facts_of("claude-haiku-4-5") == Facts(
        200000, 64000, True, True, True, price("1", "5", "0.1", "1.25", "2")
    )


UNPRICED = {"", "demo", "kimi-for-coding"}  # the last is a subscription's


@pytest.mark.parametrize("name", PRESETS)
def test_what_a_start_without_a_config_asks_for_has_a_price(name: str) -> None:
    default = PRESETS[name]["default"]
    assert (facts_of(default).price is None) is (default in UNPRICED)


OWN, ROW = price("7", "8"), price("5", "6")
CHOICES = {
    "own-price-first": (Target("p", "gpt-5", 1, OWN), "mine", OWN),
    "then-the-row's": (Target("p", "gpt-5"), "mine", ROW),
    "the-row's-by-its-alias": (Target("p", "gpt-5"), "anthropic/mine", ROW),
    "then-built-in-by-upstream-name": (Target("p", "gpt-5"), "other", facts_of("gpt-5").price),
    "then-built-in-by-name": (Target("p", "deployment-7"), "gpt-5", facts_of("gpt-5").price),
    "unknown": (Target("p", "deployment-7"), "other", None),
    "demo-costs-nothing": (Target("demo", "gpt-5", 1, OWN), "mine", price("0", "0")),
    "no-such-provider": (Target("gone", "gpt-5"), "other", facts_of("gpt-5").price),
}


@pytest.mark.parametrize(("target", "model", "expected"), CHOICES.values(), ids=CHOICES)
def test_price_of(target: Target, model: str, expected: Price | None) -> None:
    providers = (Provider(name="p", format="openai"), Provider(name="demo", format="demo"))
    config = Config(providers=providers, models=(Model(name="mine", price=ROW),))
    assert price_of(config, target, model) == expected


def test_charged_price_is_the_default_where_nobody_knows_one_and_credits_are_enforced() -> None:
    known, unknown = Target("p", "gpt-5"), Target("p", "deployment-7")
    providers = (Provider(name="p", format="openai"),)
    for credits, expected in ((Credits(enforce=True), Credits().default_price), (Credits(), None)):
        config = Config(providers=providers, credits=credits)
        assert charged_price(config, unknown, "other") == expected
        assert charged_price(config, known, "other") == facts_of("gpt-5").price


FULL = price("3", "15", "0.3", "3.75", "6")
TIERED = price("2", "10", tiers=((100, price("4", "15", "0.4")), (200, price("6", "60"))))


def test_with_markup_is_what_a_user_pays() -> None:
    for plain in (FULL, TIERED):
        marked = with_markup(plain, Decimal("12.5"))
        for usage in (Usage(80, 20, 8), Usage(150, 20), Usage(1000, 10)):
            assert exact_cost(usage, marked) == exact_cost(usage, plain) * Decimal("1.125")
    assert with_markup(FULL, Decimal(0)) == FULL


CHARGES = {
    "nothing": (Usage(), FULL, "0", Charge(0, 0, 0)),
    "each-kind-apart": (Usage(100, 10, 1000, 100, 10), FULL, "0", Charge(1185, 0, 1185)),
    "rounded-up": (Usage(cache_read=1), FULL, "0", Charge(1, 0, 1)),
    "sum-first-then-rounded": (Usage(cache_read=1, cache_write=1), FULL, "0", Charge(5, 0, 5)),
    "left-out-costs-input": (Usage(0, 0, 1, 1, 1), price("3", "15"), "0", Charge(9, 0, 9)),
    "one-hour-left-out-costs-input": (
        Usage(cache_write_1h=2),
        price("3", "15", "1", "4"),
        "0",
        Charge(6, 0, 6),
    ),
    "zero-is-free": (Usage(cache_write=9), price("3", "15", "1", "0"), "0", Charge(0, 0, 0)),
    "markup": (Usage(100), FULL, "10", Charge(300, 30, 330)),
    "markup-on-the-exact-sum": (Usage(cache_read=1), FULL, "100", Charge(1, 0, 1)),
    "markup-rounded-up-alone": (Usage(1), FULL, "0.1", Charge(3, 1, 4)),
    "at-the-tier": (Usage(100, 1), TIERED, "0", Charge(210, 0, 210)),
    "above-the-tier-all-of-it": (Usage(101, 1), TIERED, "0", Charge(419, 0, 419)),
    "tier-counts-cached-too": (Usage(1, 0, 100), TIERED, "0", Charge(44, 0, 44)),
    "highest-tier": (Usage(201, 1), TIERED, "0", Charge(1266, 0, 1266)),
    "tiers-in-any-order": (
        Usage(201, 1),
        dataclasses.replace(TIERED, tiers=TIERED.tiers[::-1]),
        "0",
        Charge(1266, 0, 1266),
    ),
    "output-is-no-prompt": (Usage(1, 500), TIERED, "0", Charge(5002, 0, 5002)),
}


@pytest.mark.parametrize(("usage", "at", "markup", "expected"), CHARGES.values(), ids=CHARGES)
def test_charge(usage: Usage, at: Price, markup: str, expected: Charge) -> None:
    assert charge_of(usage, at, Decimal(markup)) == expected


amounts = st.decimals(0, 500, places=4)
tokens = st.integers(0, 10**8)
usages = st.builds(Usage, tokens, tokens, tokens, tokens, tokens)
plain = st.builds(Price, amounts, amounts, *[st.none() | amounts] * 3)
tiers = st.lists(st.tuples(st.integers(1, 10**8), plain), max_size=3, unique_by=lambda t: t[0])
prices = st.builds(
    lambda flat, above: Price(*(getattr(flat, k) for k in PRICE_KINDS), tiers=tuple(above)),
    plain, tiers,
)  # fmt: skip
markups = st.decimals(0, 1000, places=3)
unhurried = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # a machine may be busy


def first(pair: tuple[int, Price]) -> int:
    return pair[0]


def exact(usage: Usage, at: Price) -> Fraction:
    """The cost in micro-dollars, reckoned in another way than ccmux does: fractions, kind by kind."""
    prompt = usage.input + usage.cache_read + usage.cache_write + usage.cache_write_1h
    for above, tier in sorted(at.tiers, key=first):
        if prompt > above:
            at = Price(*(getattr(tier, k) for k in PRICE_KINDS), tiers=at.tiers)
    total = Fraction(0)
    for kind in PRICE_KINDS:
        each = getattr(at, kind)
        total += getattr(usage, kind) * Fraction(at.input if each is None else each)
    return total


@unhurried
@given(usages, prices, markups)
def test_charge_is_exact(usage: Usage, at: Price, markup: Decimal) -> None:
    cost = exact(usage, at)
    charge = cost * (1 + Fraction(markup) / 100)
    got = charge_of(usage, at, markup)
    assert got.cost - 1 < cost <= got.cost
    assert got.charge - 1 < charge <= got.charge
    assert got.markup == got.charge - got.cost >= 0


@unhurried
@given(usages, prices)
def test_fast_mode_costs_twice_as_much(usage: Usage, at: Price) -> None:
    assert exact_cost(usage, fast_price(at)) == 2 * exact_cost(usage, at)


@unhurried
@given(tokens, tokens, prices, markups)
def test_hold(count: int, max_tokens: int, at: Price, markup: Decimal) -> None:
    output = min(max_tokens, 4096)
    held = hold_of(count, max_tokens, at, markup)
    assert held == charge_of(Usage(count, output), at, markup).charge
    floor = hold_of(count, 0, at, markup)
    assert floor == charge_of(Usage(count), at, markup).charge <= held


@unhurried
@given(prices)
def test_stored_price_is_exact(at: Price) -> None:
    stored = json.loads(json.dumps(price_json(at)))
    above = tuple((tier.pop("above"), read_price(tier)) for tier in stored.pop("tiers", []))
    assert dataclasses.replace(read_price(stored), tiers=above) == at


def read_price(stored: Json) -> Price:
    return Price(**{kind: Decimal(amount) for kind, amount in stored.items()})
