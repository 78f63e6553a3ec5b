"""The page in a real browser, from a file: sorted, filtered and read by keyboard, light and dark, on a phone."""

import json
import time

import pytest
from fake_records import RECORDS, failed, make, store_records

from effbench.cli.main import main
from effbench.core.paths import PUBLISHED

pytestmark = pytest.mark.browser

HOSTILE = ("<script>alert(1)</script>", r"a_b&50%#{x}\input{y}", "<b>bold</b><a href='javascript:alert(3)'>x</a>")


@pytest.fixture(scope="module")
def page(browser, tmp_path_factory):
    """The page of records whose names are markup, freshly opened."""
    folder = tmp_path_factory.mktemp("page")
    records = [
        *RECORDS,
        *(make(name, worse=0.1 * at, bits=5 - at / 2, rng_seed=at) for at, name in enumerate(HOSTILE, 1)),
    ]
    store = store_records(folder / "results", [*records, failed("x()", reason="<i>no</i>")])
    store.write(make(suite="other"))
    assert main(["report", f"results={store.results}", "format=html", f"to={folder}"]) == 0
    open_page(browser, folder / "all-suites.html")
    return browser


def open_page(browser, file):
    browser.get(file.as_uri())
    wait(browser, "return document.documentElement.dataset.ready")


@pytest.fixture(autouse=True)
def reset(page):
    page.execute_script(
        "const dialog = document.getElementById('record'); if (dialog.open) dialog.close();"
        "const filter = document.getElementById('filter'); filter.value = ''; filter.dispatchEvent(new Event('input'));"
    )


def wait(browser, script, seconds=60):
    """What the script returns as soon as that is true."""
    end = time.monotonic() + seconds
    while not (found := browser.execute_script(script)):
        assert time.monotonic() < end, script
        time.sleep(0.1)
    return found


def press(browser, *keys):
    from selenium.webdriver import ActionChains, Keys

    ActionChains(browser).send_keys(*(getattr(Keys, key, key) for key in keys)).perform()


def list_names(browser):
    script = "return [...document.querySelectorAll('#table-1 tbody tr, #table-0 tbody tr')].filter(row => !row.hidden)"
    return browser.execute_script(f"{script}.map(row => row.cells[0].querySelector('a').textContent)")


def test_nothing_is_asked_of_the_network_and_nothing_goes_wrong(page):
    wait(page, "return document.querySelector('.plot .main-svg')")
    asked = [json.loads(entry["message"])["message"] for entry in page.get_log("performance")]
    sent = [one["params"] for one in asked if one["method"] == "Network.requestWillBeSent"]
    ours = [one["request"]["url"] for one in sent if one["documentURL"].startswith("file:")]
    assert ours and {address.partition(":")[0] for address in ours} <= {"file", "data", "blob"}
    assert page.get_log("browser") == []  # errors, and what the policy of the page forbids


def test_names_are_shown_as_they_are(page):
    assert {*HOSTILE} <= {*list_names(page)}
    wait(page, "return document.querySelector('.plot .textpoint')")
    texts = page.execute_script(
        "return [...document.querySelectorAll('.plot .textpoint')].map(each => each.textContent)"
    )
    assert {*HOSTILE} & {*texts} and not {"alert(1)", "bold"} & {*texts}
    assert (
        page.execute_script("return document.querySelectorAll('.plot b, .plot a[href^=javascript], table b').length")
        == 0
    )
    assert page.execute_script("return document.scripts.length") == 3


def test_rows_are_sorted_by_keyboard(page):
    button = page.execute_script(
        "const headers = [...document.querySelectorAll('#table-1 th')];"
        "return headers.find(header => header.textContent.startsWith('perplexity')).querySelector('button')"
    )
    for order in ("ascending", "descending"):
        page.execute_script("arguments[0].focus()", button)
        press(page, "ENTER")
        header = page.execute_script("return arguments[0].closest('th')", button)
        assert header.get_attribute("aria-sort") == order
        keys = page.execute_script(
            "const at = arguments[0].cellIndex, rows = [...arguments[0].closest('table').tBodies[0].rows];"
            "return rows.map(row => row.cells[at].dataset.key)",
            header,
        )
        values = [float(key) for key in keys if key]
        assert values == sorted(values, reverse=order == "descending") and len(values) > 5
        assert keys[len(values) :] == [""] * (len(keys) - len(values)) and "" in keys  # missing ones last, both ways


def test_rows_are_filtered_by_keyboard(page):
    page.execute_script("document.activeElement.blur()")
    press(page, "/")
    assert page.execute_script("return document.activeElement.id") == "filter"
    press(page, "rtn -8")
    assert [*dict.fromkeys(list_names(page))] == ["rtn(bits=2)"]
    assert page.execute_script("return document.getElementById('found').textContent") == "1 of 11 rows"
    page.execute_script("document.getElementById('filter').value = ''")
    press(page, "oom")
    assert {*list_names(page)} == {"squeezellm(bits=3)", "x()"}


def test_every_number_opens_its_record(page):
    """Each link in turn: the panel names the row and has the metric with the value that the record holds."""
    wrong = page.execute_async_script("""
        const done = arguments[0], data = JSON.parse(document.getElementById("data").textContent);
        const dialog = document.getElementById("record"), wrong = [];
        (async () => {
          const links = [...document.querySelectorAll("td a, tbody .recipe > a:first-child")];
          for (const link of links) {
            const [, number, metric] = /^#row-(\\d+)(?:\\/(.+))?$/.exec(link.getAttribute("href"));
            const changed = new Promise(go => addEventListener("hashchange", () => setTimeout(go), {once: true}));
            location.hash = link.getAttribute("href");
            await changed;
            const row = data.rows[number], record = data.records[row.records[0]], text = dialog.textContent;
            const value = metric && String(record.metrics[decodeURIComponent(metric)][0]);
            const parts = [row.name, record.name, ...(metric ? [value] : [])];
            if (!dialog.open || !parts.every(part => text.includes(part)))
              wrong.push(link.getAttribute("href"));
          }
          dialog.close();
          done([links.length, wrong]);
        })();
    """)
    assert wrong[0] > 150 and wrong[1] == []


def test_a_record_is_read_and_closed_by_keyboard(page):
    link = page.execute_script("return [...document.querySelectorAll('td a')].find(each => each.checkVisibility())")
    page.execute_script("arguments[0].focus()", link)
    press(page, "ENTER")
    text = wait(page, "const d = document.getElementById('record'); return d.open && d.textContent")
    for part in ("Protocol:" if "Protocol:" in text else "Unit:", "Environment and commit", "Cell", "acme-cpu-2core"):
        assert part in text
    press(page, "ESCAPE")
    wait(page, "return !document.getElementById('record').open")
    assert page.execute_script("return document.activeElement === arguments[0]", link)
    assert page.execute_script("return location.hash") == ""


def test_a_definition_is_one_step_away(page):
    page.execute_script("document.querySelector('th a.means').click()")
    target = wait(page, "return document.querySelector(':target') && document.querySelector(':target').textContent")
    assert target.startswith("bits_per_weight")


def test_columns_are_chosen(page):
    script = "return [...document.querySelectorAll('#table-1 thead th')].filter(h => !h.hidden).length"
    counts = []
    for detail in ("speed", "all", "summary"):
        page.execute_script(
            "const select = document.querySelector('#table-1 .detail');"
            "select.value = arguments[0]; select.dispatchEvent(new Event('change'))",
            detail,
        )
        counts.append(page.execute_script(script))
    assert counts[1] > counts[2] > 1 and counts[0] > 1


def test_axes_are_chosen(page):
    select = "document.querySelector('.figure:not([hidden]) .axis-y')"
    for value, title in (("tasks_acc", "tasks, % (more is better)"), ("token_ppl", "perplexity (less is better)")):
        page.execute_script(f"const s = {select}; s.value = arguments[0]; s.dispatchEvent(new Event('change'))", value)
        wait(page, f"return document.querySelector('.plot .ytitle').textContent === '{title}'")


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (1280, "dark"), (390, "light"), (390, "dark")])
def test_it_fits_in_both_colours(page, width, scheme):
    """Nothing but tables, which scroll, is wider than the window; ink and ground differ as WCAG asks, in plots too."""
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    wait(page, f"return matchMedia('(prefers-color-scheme: {scheme})').matches && innerWidth === {width}")
    time.sleep(0.5)
    assert page.execute_script("return document.documentElement.scrollWidth <= innerWidth")
    colours = page.execute_script("""
        const parse = text => text.match(/[\\d.]+/g).slice(0, 3).map(Number);
        const ground = parse(getComputedStyle(document.body).backgroundColor);
        return [ground, ...[document.body, document.querySelector(".caption"), document.querySelector("main a[href]")]
          .map(each => parse(getComputedStyle(each).color)),
          parse(getComputedStyle(document.querySelector(".plot .xtick text")).fill)];
    """)
    ground, *inks = map(measure_light, colours)
    assert (ground < 0.2) == (scheme == "dark")
    for ink in inks:
        lighter, darker = max(ink, ground), min(ink, ground)
        assert (lighter + 0.05) / (darker + 0.05) >= 4.5


def test_colours_are_chosen_by_hand(page):
    theme = "document.documentElement.dataset.theme || ''"
    found = []
    for _ in range(3):
        page.execute_script("document.getElementById('theme').click()")
        found.append(page.execute_script(f"return {theme}"))
    assert found == ["light", "dark", ""]


@pytest.mark.skipif(PUBLISHED is None or not PUBLISHED.is_dir(), reason="nothing published here")
def test_all_published_suites_in_one_page(browser, page, tmp_path):
    assert main(["report", f"results={PUBLISHED}", "format=html", f"to={tmp_path}"]) == 0
    browser.get_log("browser")
    open_page(browser, tmp_path / "all-suites.html")
    browser.execute_script("document.querySelector('.figure:not([hidden])').scrollIntoView()")
    wait(browser, "return document.querySelector('.plot .main-svg')")
    assert browser.execute_script("return document.querySelectorAll('main > section[data-place]').length") >= 20
    assert browser.get_log("browser") == []


def measure_light(colour):
    """Relative luminance of an sRGB colour, as WCAG defines it."""
    parts = [part / 255 for part in colour]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
