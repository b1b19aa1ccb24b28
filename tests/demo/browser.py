# SPDX-License-Identifier: Apache-2.0
"""A headless Chromium and what a user does with the page; shared by the tests and by the pictures of the documentation."""

import contextlib
import shutil

#: milliseconds; a busy machine answers slowly
PATIENCE = 120_000
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@contextlib.contextmanager
def chromium():
    """The browser that the system has; nothing is downloaded."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"]
        )
        yield browser
        browser.close()


def visit(browser, address, width=1280, height=900):
    """The page in a context of its own (another user), at a width in CSS pixels."""
    page = browser.new_context(viewport={"width": width, "height": height}).new_page()
    page.set_default_timeout(PATIENCE)
    page.goto(address)
    page.wait_for_selector("#vc-ask")
    return page


def tab(page, title):
    page.get_by_role("tab", name=title, exact=True).click()


def upload(page, where, path):
    """Choose a file, and wait until the page has looked at it."""
    page.set_input_files(f"{where} input[type=file]", str(path))


def step(page, where, value):
    """Move a slider as the keyboard would."""
    page.locator(f"{where} input[type=range]").evaluate(
        "(e, v) => { e.value = v; e.dispatchEvent(new Event('input', {bubbles: true}));"
        " e.dispatchEvent(new Event('change', {bubbles: true})); e.dispatchEvent(new Event('pointerup', {bubbles: true})); }",
        value,
    )


def ask(page, picture, question, tokens):
    """Put a question on the first tab, whose picture makes ``tokens`` visual tokens; waits for everything."""
    upload(page, "#vc-image", picture)
    wait_for_words(page, "#vc-budget-words", f"of {tokens}")
    say(page, "#vc-question", question)
    answered(page)


def answered(page):
    """Ask, and wait for the answers, the costs and the picture."""
    page.click("#vc-ask")
    page.wait_for_selector("#vc-costs .vc-metric")
    page.wait_for_selector("#vc-picture img")


def load(page, name, words):
    """Load another model, and wait until ``words`` name it."""
    if not page.locator("#vc-model-name").is_visible():
        page.locator("#vc-model button").first.click()
    box = page.locator("#vc-model-name input")
    box.fill(str(name))
    box.press("Enter")
    page.click("#vc-model-load")
    wait_for_words(page, "#vc-model-current", words)


def say(page, where, text):
    page.locator(f"{where} textarea, {where} input").first.fill(text)


def choose(page, where, value):
    """Pick an entry of a dropdown by what it begins with."""
    box = page.locator(f"{where} input").first
    box.click()
    page.locator("ul[role=listbox] li", has_text=value).first.click()


def done(page, where):
    """Wait until an answer is complete; returns it."""
    return page.locator(f"{where} .vc-answer[data-state=done]").inner_text()


def too_wide(page):
    """By how many pixels the page is wider than the window."""
    return page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")


def wait_for_words(page, where, words):
    page.wait_for_function("([w, t]) => document.querySelector(w).innerText.includes(t)", arg=[where, words])


def wait_for_fewer(page, what, count):
    page.wait_for_function("([w, n]) => document.querySelectorAll(w).length < n", arg=[what, count])
