"""The report in a real browser: it opens without a word in the console or to the network, hovers, and fits a phone."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path

import pytest

from orchestrator.report.html import report
from tests.browser import Page, browsing, executable
from tests.orchestrator.report.test_html import study

pytestmark = pytest.mark.skipif(executable() is None, reason="no Chromium is installed, which the report is opened in")

PHONE = 360, 740
MIDDLE = "(() => { const box = %s.getBoundingClientRect(); return [box.x + box.width / 2, box.y + box.height / 2]; })()"
OVERFLOW = """[...document.querySelectorAll("body *")]
  .filter(e => !e.closest(".wide, svg, #tip") && e.getBoundingClientRect().right > innerWidth + 1)
  .map(e => e.tagName + " " + e.textContent.slice(0, 40))"""
COVERED = (
    "[...document.querySelectorAll('th, td')].filter(e => e.scrollWidth > e.offsetWidth + 1).map(e => e.textContent)"
)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "report.html"
    path.write_text(report(study(40)), encoding="utf-8")
    return path


async def middle(page: Page, selector: str) -> tuple[float, float]:
    """Where the first element of a selector is, scrolled to."""
    found = f"document.querySelector({selector!r})"
    await page.evaluate(f"{found}.scrollIntoView({{block: 'center'}})")
    await page.drawn()  # scrolling hides what is hovered
    x, y = await page.evaluate(MIDDLE % found)
    return x, y


async def tip(page: Page) -> str:
    return str(
        await page.evaluate("document.querySelector('#tip').hidden ? '' : document.querySelector('#tip').innerText")
    )


def test_the_report_works_in_a_browser(file: Path, tmp_path: Path) -> None:
    async def look() -> None:
        async with browsing(tmp_path) as page:
            await page.resize(1200, 900)
            await page.open(file)
            await hovers(page)
            await filters(page)
            await fits_a_phone(page)
            await prints(page)
            assert page.complaints() == []
            assert page.requests() == [file.resolve().as_uri()]

    asyncio.run(look())


async def hovers(page: Page) -> None:
    """A point of the front says what it is, with the mouse and with the keyboard; away from it nothing is said."""
    assert await tip(page) == ""
    x, y = await middle(page, "svg.scatter [data-tip][tabindex]")
    await page.mouse("mouseMoved", x, y)
    said = await tip(page)
    assert re.match(r"(trial \d+, round \d+|the unpruned model) · \w{12}\n", said) and "sparsity" in said
    inside = "(() => { const b = document.querySelector('#tip').getBoundingClientRect();"
    assert await page.evaluate(f"{inside} return b.left >= 0 && b.right <= innerWidth && b.bottom <= innerHeight }})()")
    await page.mouse("mouseMoved", 2, 2)
    assert await tip(page) == ""
    await page.evaluate("document.querySelector('svg.scatter [data-tip][tabindex]').focus()")
    assert await tip(page) == said
    await page.evaluate("document.activeElement.blur()")


async def filters(page: Page) -> None:
    """A drag along an axis of the search leaves the trials in that range, a double click all of them."""
    shown = "[...document.querySelectorAll('svg.parallel .trial')].filter(e => !e.classList.contains('off')).length"
    every = await page.evaluate(shown)
    x, y = await middle(page, "svg.parallel .range[data-axis='1']")
    await page.mouse("mousePressed", x, y - 20, button="left", clickCount=1)
    await page.mouse("mouseMoved", x, y + 60, button="left", buttons=1)
    await page.mouse("mouseReleased", x, y + 60, button="left", clickCount=1)
    some = await page.evaluate(shown)
    assert 0 < some < every == 40
    assert f"{some} of 40 trials" in await page.evaluate("document.querySelector('#search').innerText")
    for clicks in (1, 2):
        await page.mouse("mousePressed", x, y, button="left", clickCount=clicks)
        await page.mouse("mouseReleased", x, y, button="left", clickCount=clicks)
    assert await page.evaluate(shown) == every


async def fits_a_phone(page: Page) -> None:
    """Nothing but what scrolls by itself is wider than a phone; and a tap shows what a point is, on the screen."""
    await page.resize(*PHONE, mobile=True)
    assert await page.evaluate("document.documentElement.scrollWidth") <= PHONE[0]
    assert await page.evaluate(OVERFLOW) == []
    assert await page.evaluate(COVERED) == [], "no cell's text lies over its neighbour's"
    x, y = await middle(page, "svg.scatter [data-tip][tabindex]")
    await page.mouse("mousePressed", x, y, button="left", clickCount=1)
    assert "sparsity" in await tip(page)
    await page.mouse("mouseReleased", x, y, button="left", clickCount=1)
    await page.resize(1200, 900)


async def prints(page: Page) -> None:
    """On paper nothing is cut off at the right, and there are no links to click or tips to hover for."""
    await page.media("print")
    await page.resize(718, 1000)  # A4 less the margins that Chromium prints with
    assert await page.evaluate("document.documentElement.scrollWidth") <= 718
    assert await page.evaluate("getComputedStyle(document.querySelector('nav')).display") == "none"
    await page.media()
    assert (await page.pdf()).startswith(b"%PDF")


def test_canary_a_page_that_fetches_throws_and_overflows_is_seen(tmp_path: Path) -> None:
    bad = tmp_path / "bad.html"
    wide = '<div style="width:2000px">wide</div><img src="http://127.0.0.1:9/x.png"><script>throw Error("no")</script>'
    bad.write_text(f"<!DOCTYPE html><meta name=viewport content='width=device-width'>{wide}")

    async def look() -> None:
        async with browsing(tmp_path) as page:
            await page.resize(*PHONE)
            await page.open(bad)
            assert len(page.requests()) == 2 and len(page.complaints()) >= 1
            assert await page.evaluate(OVERFLOW) == ["DIV wide"]

    asyncio.run(look())
