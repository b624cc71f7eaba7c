"""The page in Debian's Chromium: silent, offline, usable with a keyboard, and without accessibility faults.

Needs chromium, chromium-driver and selenium (`pip install .[browser]`), and for one test axe-core, whose
axe.min.js the environment variable AXE points to. `.ci/run` installs all of them and, with CI=true, makes the
tests mandatory; elsewhere they are skipped with what is missing.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fake_runs
import pytest

REQUIRED = os.environ.get("CI") == "true"
AXE = os.environ.get("AXE", "")


def need(there: object, what: str) -> None:
    if not there:
        (pytest.fail if REQUIRED else pytest.skip)(f"{what} is missing")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    found, driver = shutil.which("chromium"), shutil.which("chromedriver")
    need(found, "chromium (Debian package chromium)")
    need(driver, "chromedriver (Debian package chromium-driver)")
    try:
        from selenium import webdriver
    except ImportError:
        need(False, "selenium (pip install .[browser])")
    options = webdriver.ChromeOptions()
    options.binary_location = found
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    session = webdriver.Chrome(options, webdriver.ChromeService(driver))
    session.set_page_load_timeout(280)
    yield session
    session.quit()


@pytest.fixture(scope="module")
def page(browser: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The page of three synthetic methods with pictures of hostile prompts, just opened."""
    from bench.reports import page as pages
    from bench.reports.load import load_runs

    root = tmp_path_factory.mktemp("browser")
    seeds = (5775709, 1)
    metrics = {**fake_runs.METRICS, "imagereward": (-1.2, 0.4, 0.5, 3.0)}
    written = fake_runs.write_all(
        root / "runs", count=30, images=6, guidance=(3.0,), image_seeds=seeds, metrics=metrics
    )
    runs = load_runs(None, written)
    browser.set_window_size(1280, 900)
    browser.get(pages.write(runs, root / "report.html").as_uri())
    return browser


def test_nothing_is_logged_and_no_request_leaves_the_page(page: Any) -> None:
    page.execute_script(
        "for (const b of document.querySelectorAll('details')) b.open = true;"
        "window.scrollTo(0, document.body.scrollHeight)"
    )
    events = [json.loads(entry["message"])["message"] for entry in page.get_log("performance")]
    asked = [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]
    assert asked and all(url.startswith(("file:", "data:")) for url in asked)
    assert page.get_log("browser") == []
    assert page.execute_script("return document.querySelectorAll('script').length") == 1


def test_tables_sort_by_key_and_say_so(page: Any) -> None:
    from selenium.webdriver.common.keys import Keys

    values = (
        "return [...document.querySelectorAll('[data-stat=gain] table')].filter(t => t.offsetParent)[0]"
        ".querySelectorAll('tbody tr td:nth-child(2)')"
    )
    button = page.execute_script(
        "return [...document.querySelectorAll('[data-stat=gain] table')]"
        ".filter(t => t.offsetParent)[0].querySelectorAll('thead button')[1]"
    )
    for state in ("descending", "ascending"):
        button.send_keys(Keys.ENTER)
        found = [float(cell.get_attribute("data-sort")) for cell in page.execute_script(values)]
        assert found == sorted(found, reverse=state == "descending") and len(found) > 3
        assert button.find_element("xpath", "..").get_attribute("aria-sort") == state


def test_rows_are_filtered_by_typing(page: Any) -> None:
    box = page.find_element("css selector", ".filter input")
    rows = "return [...document.querySelectorAll('[data-stat=gain] tbody tr')].filter(r => r.offsetParent).length"
    before = page.execute_script(rows)
    box.send_keys("SPIN")
    assert 0 < page.execute_script(rows) < before
    assert " rows" in page.find_element("css selector", "[role=status]").text
    box.clear()
    box.send_keys(" ")
    assert page.execute_script(rows) == before


def test_statistics_switch_and_the_protocol_is_one_step_away(page: Any) -> None:
    visible = "return [...document.querySelectorAll('[data-stat]')].find(p => p.offsetParent)"
    for button in page.find_elements("css selector", "[data-switch=stat] button"):
        page.execute_script("arguments[0].click()", button)
        shown = page.execute_script(visible)
        assert shown.get_attribute("data-stat") == button.get_attribute("value")
        assert shown.find_elements("css selector", "a[href='#protocol']")
    page.execute_script("document.querySelector('[data-switch=stat] button').click()")
    assert page.find_element("id", "protocol")


def test_a_picture_opens_and_closes_with_the_keyboard(page: Any) -> None:
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys

    button = page.find_element("css selector", ".open")
    page.execute_script("arguments[0].scrollIntoView({block: 'center'}); arguments[0].focus()", button)
    button.send_keys(Keys.ENTER)
    dialog = page.find_element("css selector", "dialog")
    assert dialog.is_displayed() and dialog.find_element("css selector", "img").is_displayed()
    assert dialog.find_element("css selector", ".text").text
    ActionChains(page).send_keys(Keys.ESCAPE).perform()
    assert not dialog.is_displayed()
    assert page.switch_to.active_element == button


def test_two_models_are_compared_prompt_by_prompt_with_arrow_keys(page: Any) -> None:
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys

    page.execute_script("document.querySelector('.compare').click()")
    dialog = page.find_element("css selector", "dialog[open]")
    assert len([image for image in dialog.find_elements("css selector", "img") if image.is_displayed()]) == 2
    first = dialog.find_element("css selector", ".text").text
    ActionChains(page).send_keys(Keys.ARROW_RIGHT).perform()
    assert dialog.find_element("css selector", ".text").text != first
    ActionChains(page).send_keys(Keys.ARROW_LEFT).perform()
    assert dialog.find_element("css selector", ".text").text == first
    ActionChains(page).send_keys(Keys.ESCAPE).perform()
    assert not dialog.is_displayed()


def test_a_script_that_is_not_the_pages_own_does_not_run(page: Any) -> None:
    """By its Content-Security-Policy, whatever text should ever slip through as markup."""
    page.execute_script(
        "document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=\"window.hostile = 1\">');"
        "const script = document.createElement('script'); script.textContent = 'window.hostile = 2';"
        "document.body.append(script)"
    )
    assert page.execute_script("return window.hostile") is None
    refused = page.execute_script("return fetch('https://example.org').then(() => 'sent', () => 'refused')")
    assert refused == "refused"
    page.get_log("browser")  # what the browser says of the refusals is no fault of the page
    page.execute_script("document.querySelectorAll('img[src=x]').forEach(image => image.remove())")


def test_hostile_prompts_are_read_as_text(page: Any) -> None:
    shown = page.execute_script("return [...document.querySelectorAll('.prompt .text')].map(p => p.textContent)")
    assert all(any(prompt.strip() == text.strip() for text in shown) for prompt in fake_runs.HOSTILE)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_no_serious_fault(page: Any, scheme: str) -> None:
    need(Path(AXE).is_file(), "axe-core (npm install axe-core; AXE=.../axe.min.js)")
    wanted = {"name": "prefers-color-scheme", "value": scheme}
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [wanted]})
    page.set_script_timeout(280)
    page.execute_script(Path(AXE).read_text(encoding="utf-8"))
    found = page.execute_async_script("const done = arguments[0]; axe.run().then(r => done(r.violations))")
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    serious = [
        (v["id"], v["help"], [n["target"] for n in v["nodes"]][:3])
        for v in found
        if v["impact"] in ("serious", "critical")
    ]
    assert serious == []


def test_a_phone_never_scrolls_sideways(page: Any, tmp_path: Path) -> None:
    for width in (1280, 390):
        metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
        page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        page.execute_script("window.scrollTo(0, 0)")
        assert page.execute_script("return document.documentElement.scrollWidth") <= width
        page.save_screenshot(str(tmp_path / f"{width}.png"))
    page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_scores_stay_under_their_own_picture(page: Any) -> None:
    wide = """return [...document.querySelectorAll('.row figcaption span')].filter(line => line.offsetParent &&
        line.scrollWidth > line.closest('figure').clientWidth).map(line => line.textContent)"""
    for width in (1280, 390):
        metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
        page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        assert page.find_elements("css selector", ".row figcaption span")
        assert page.execute_script(wide) == []
    page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
