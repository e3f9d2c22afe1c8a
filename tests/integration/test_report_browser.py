"""The report in a real browser, with the network cut off."""

import re
import shutil

import pytest

import workbench as wb
from families import tiny_module
from head_tables import grid, row, table_of
from workbench.plots import head_heatmap, metric_scatter, rates, top_heads
from workbench.report import Section
from workbench.report.build import write_report

pytestmark = pytest.mark.browser

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
]
N_LAYERS, N_HEADS = 34, 9
EVIL = "<script>document.title = 'broken into'</script>"


def first(layer, head):
    return ((layer * N_HEADS + head) * 37 % 307) / 307


def second(layer, head):
    return -first(layer, head) / 2


def values(function):
    return [[function(layer, head) for head in range(N_HEADS)] for layer in range(N_LAYERS)]


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    model = wb.wrap_model(tiny_module("llama"), name=f"tiny {EVIL}")
    rows = grid("first", values(first)) + grid("second", values(second), unit="logits", input=EVIL)
    rows += [row("share", 0.3, input="natural", position=0), row("share", 0.2, input=EVIL, position=0)]
    table = table_of(rows)

    def section(context):
        return Section(
            name="made_up",
            title=f"A title {EVIL}",
            order=0,
            sentence="Some heads are larger than others.",
            method="By hand. " * 30,
            limits="Many. " * 30,
            figures=(
                head_heatmap(table, ["first", "second"]),
                top_heads(table, ["first", "second"]),
                rates(table, "share"),
                metric_scatter(table, "first", "second"),
            ),
            tables=(table,),
        )

    folder = write_report(model, tmp_path_factory.mktemp("report"), sections={"made_up": section}).folder
    return folder / "index.html"


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("no Chromium on the PATH")
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as engine:
        chromium = engine.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser, report):
    """The report, opened; leaving it checks that nothing was asked of the network and nothing went wrong."""
    requests, errors = [], []
    page = browser.new_page(viewport={"width": 1280, "height": 800})

    def answer(route):
        own = route.request.url.startswith(("file://", "data:", "blob:"))
        if not own:
            requests.append(route.request.url)
        route.continue_() if own else route.abort()

    page.route("**/*", answer)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda message: errors.append(message.text) if message.type in ("error", "warning") else None)
    page.goto(report.as_uri())
    page.wait_for_selector("#figure-made_up-4 .main-svg")
    yield page
    assert requests == []
    assert errors == []
    page.close()


def shown(page):
    return page.locator("#heads-table tbody tr:not([hidden]) th").all_inner_texts()


def ranking(function, *, reverse):
    heads = [(layer, head) for layer in range(N_LAYERS) for head in range(N_HEADS)]
    ordered = sorted(heads, key=lambda each: (-function(*each) if reverse else function(*each), each))
    return [f"a{layer}.h{head}" for layer, head in ordered]


def test_figures_are_drawn_and_nothing_is_executed(page):
    assert page.locator(".plot .main-svg").count() >= 4
    assert page.locator("#figure-made_up-1 .heatmaplayer image, #figure-made_up-1 .hm image").count() >= 2
    assert page.title() == f"The attention heads of tiny {EVIL}"


def test_page_does_not_overflow_sideways(page):
    width = page.evaluate("[document.documentElement.scrollWidth, document.documentElement.clientWidth]")
    assert width[0] <= width[1] == 1280
    boxes = page.evaluate(
        "Array.from(document.querySelectorAll('.plot .main-svg'), e => e.getBoundingClientRect().right)"
    )
    assert max(boxes) <= 1280


def test_heading_sorts_in_both_directions(page):
    button = page.get_by_role("button", name="first", exact=True)
    button.click()
    assert shown(page) == ranking(first, reverse=True)
    assert page.locator("th[aria-sort=descending]").inner_text().startswith("first")
    button.click()
    assert shown(page) == ranking(first, reverse=False)
    page.get_by_role("button", name="head", exact=True).click()
    assert shown(page)[:10] == [f"a0.h{head}" for head in range(9)] + ["a1.h0"]


def test_negative_numbers_sort_as_numbers(page):
    page.get_by_role("button", name="second").click()
    assert shown(page) == ranking(second, reverse=True)


def test_keyboard_alone_sorts(page):
    page.get_by_role("button", name="first", exact=True).focus()
    page.keyboard.press("Enter")
    assert shown(page) == ranking(first, reverse=True)
    page.keyboard.press("Tab")
    page.keyboard.press("Space")
    assert shown(page) == ranking(second, reverse=True)


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("a3.h1", ["a3.h1"]),
        ("L3", [f"a3.h{head}" for head in range(9)]),
        ("l3h1", ["a3.h1"]),
        ("3.1", ["a3.h1"]),
        ("L3 H1", ["a3.h1"]),
        ("zzz", []),
    ],
)
def test_search_finds_heads_by_their_usual_names(page, typed, expected):
    page.get_by_label("Search").fill(typed)
    assert shown(page) == expected
    assert page.locator("#heads-count").inner_text() == f"{len(expected)} of {N_LAYERS * N_HEADS} heads"


def test_minimum_filters_and_clear_brings_all_back(page):
    page.get_by_label("minimum of first").fill("0.9")
    expected = {f"a{layer}.h{head}" for layer in range(34) for head in range(9) if first(layer, head) >= 0.9}
    assert set(shown(page)) == expected
    page.get_by_label("minimum of second").fill("-0.47")
    both = {f"a{x}.h{y}" for x in range(34) for y in range(9) if first(x, y) >= 0.9 and second(x, y) >= -0.47}
    assert set(shown(page)) == both
    page.get_by_role("button", name="Clear filters").click()
    assert len(shown(page)) == N_LAYERS * N_HEADS


def test_contents_lead_to_every_section(page):
    for link in page.locator("nav a").all():
        target = link.get_attribute("href")
        assert page.locator(target).count() == 1


def test_print_fits_the_paper_and_shortens_the_table(page, tmp_path):
    page.emulate_media(media="print")
    page.evaluate("window.dispatchEvent(new Event('beforeprint'))")
    widths = page.evaluate("Array.from(document.querySelectorAll('.plot .main-svg'), e => e.clientWidth)")
    assert max(widths) <= 700
    visible = page.locator("#heads-table tbody tr").evaluate_all(
        "rows => rows.filter(row => getComputedStyle(row).display !== 'none').length"
    )
    assert visible == 40
    assert not page.locator("#heads-tools").is_visible()
    printed = page.pdf(prefer_css_page_size=True)
    assert len(re.findall(rb"/Type\s*/Page\b", printed)) <= 8
