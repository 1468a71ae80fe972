"""The pages in a real browser: drawn, hovered over, offline, on a phone, in the dark.

Needs the python package playwright and a Chromium on PATH; its own browsers are not downloaded.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from report_synthetic import NUM_LAYERS, write_run

from kvbits.report.page import write_page
from kvbits.report.runs_page import write_comparison

api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))),
    None,
)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH")

FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
]
DESKTOP, PHONE = {"width": 1200, "height": 900}, {"width": 375, "height": 700}
LEAST_CONTRAST = 4.5  # WCAG 2.2, level AA, of text

# Every element or SVG text with words of its own: its colour against the nearest background that
# is not transparent. Text in cells of heat maps stands on the cell, which plotly chooses it for.
CONTRASTS = """() => {
  const channels = text => text.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => [r, g, b].map(v => v / 255)
    .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const background = element => {
    for (let e = element; e; e = e.parentElement) {
      const found = channels(getComputedStyle(e).backgroundColor);
      if (found.length < 4 || found[3] > 0) return found;
    }
    return [255, 255, 255];
  };
  const rows = [];
  for (const e of document.querySelectorAll("main *")) {
    const own = [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim());
    if (!own || e.closest("script, style, .heatmap-label, [aria-hidden]")) continue;
    if (!e.checkVisibility()) continue;
    const style = getComputedStyle(e);
    const ink = light(channels(e instanceof SVGElement ? style.fill : style.color));
    const paper = light(background(e));
    const contrast = (Math.max(ink, paper) + 0.05) / (Math.min(ink, paper) + 0.05);
    rows.push([e.textContent.trim().slice(0, 40), contrast, e instanceof SVGElement]);
  }
  return rows;
}"""


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> dict[str, Path]:
    """A run's page and that of two runs."""
    folder = tmp_path_factory.mktemp("pages")
    runs = [write_run(folder / f"run {seed}", seed) for seed in range(2)]
    return {
        "run": write_page(runs[0]),
        "comparison": write_comparison(runs, folder / "compare.html"),
    }


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with api.sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield running
        running.close()


class Opened:
    """A page with everything it said and asked for."""

    def __init__(self, browser: Any, path: Path, size: dict[str, int], scheme: str) -> None:
        self.context = browser.new_context(viewport=size, color_scheme=scheme)
        self.context.set_offline(True)
        self.page = self.context.new_page()
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(path.as_uri())
        self.page.wait_for_selector(".main-svg")


@pytest.fixture(scope="module")
def opened(browser, pages) -> dict[tuple[str, str], Opened]:
    """Both pages on a desk in the light and on a phone in the dark; opening takes seconds."""
    ways = {"wide": (DESKTOP, "light"), "narrow": (PHONE, "dark")}
    return {
        (name, way): Opened(browser, path, *ways[way])
        for name, path in pages.items()
        for way in ways
    }


@pytest.fixture(params=["run", "comparison"])
def wide(request, opened) -> Opened:
    return opened[request.param, "wide"]


@pytest.fixture(params=["run", "comparison"])
def narrow(request, opened) -> Opened:
    return opened[request.param, "narrow"]


def test_every_figure_is_drawn(wide):
    drawn = wide.page.eval_on_selector_all(
        "[data-figure]", "all => all.map(e => [e.id, e.querySelectorAll('.trace, .hm').length])"
    )
    assert {"bits", "front-0", "front-1", "front-2", "positions-0"} <= {name for name, _ in drawn}
    assert all(traces for _, traces in drawn), drawn


def test_nothing_is_fetched_and_nothing_complains(opened):
    for each in opened.values():
        assert each.requests == [each.page.url]
        assert each.complaints == []


def hovered(page: Any, figure: str, mark: Any) -> str:
    """Move the mouse over a mark and return what appears."""
    mark.scroll_into_view_if_needed()
    box = mark.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    label = page.locator(f"{figure} .hoverlayer text").first
    label.wait_for(timeout=5000)
    return label.text_content()


def test_hovering_over_a_bar_tells_layer_and_bits(opened):
    page = opened["run", "wide"].page
    bars = page.locator("#bits .point path")
    assert bars.count() == 2 * NUM_LAYERS
    assert "layer 3: keys" in hovered(page, "#bits", bars.nth(3))


def test_hovering_over_the_chosen_plan_tells_everything_recorded(wide):
    ring = wide.page.locator("#front-0 .trace.scatter").last.locator(".point").first
    text = hovered(wide.page, "#front-0", ring)
    assert ", chosen" in text
    for word in ("effective bits", "4\u202f096 tokens", "KL text", "±", "arithmetic", "made up"):
        assert word in text


def test_a_phone_needs_no_sideways_scrolling(narrow):
    page, body = narrow.page.evaluate(
        "[document.documentElement.scrollWidth, document.body.getBoundingClientRect().width]"
    )
    assert page <= PHONE["width"]
    assert body <= PHONE["width"]
    # What is wider than the phone scrolls in its own box, down to its last column.
    cut = narrow.page.eval_on_selector_all(
        "table, pre, .figure",
        "all => all.filter(e => e.scrollWidth > e.clientWidth + 1 && "
        "!['auto', 'scroll'].includes(getComputedStyle(e).overflowX)).length",
    )
    assert cut == 0


def test_text_can_be_read_in_either_scheme(opened):
    for each in opened.values():
        each.page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
        rows = each.page.evaluate(CONTRASTS)
        assert len(rows) > 200
        assert any(is_drawn for _, _, is_drawn in rows), "no text of a figure was seen"
        assert [row for row in rows if row[1] < LEAST_CONTRAST] == []


def test_the_check_of_contrast_finds_grey_on_white_and_ink_in_the_dark(opened):
    """Both kinds of text are seen: a page's own, and that of a figure."""
    page = opened["run", "wide"].page
    planted = page.add_style_tag(
        content="h1 { color: #999 } #bits svg text { fill: #ccc !important }"
    )
    found = [row for row in page.evaluate(CONTRASTS) if row[1] < LEAST_CONTRAST]
    planted.evaluate("e => e.remove()")
    assert {is_drawn for _, _, is_drawn in found} == {True, False}
    assert any("KV cache plan" in text for text, _, _ in found)


def test_the_dark_page_is_dark_and_follows_the_scheme(narrow):
    read = "getComputedStyle(document.body).backgroundColor"
    assert narrow.page.evaluate(read) == "rgb(20, 23, 29)"
    narrow.page.emulate_media(color_scheme="light")
    assert narrow.page.evaluate(read) == "rgb(255, 255, 255)"
    narrow.page.emulate_media(color_scheme="dark")


def test_links_of_the_page_lead_to_its_sections(wide):
    broken = wide.page.eval_on_selector_all(
        "nav a", "all => all.filter(a => !document.querySelector(a.getAttribute('href'))).length"
    )
    assert broken == 0
    assert wide.page.locator("nav a").count() >= 6
