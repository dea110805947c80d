# SPDX-License-Identifier: Apache-2.0
"""The page: what it may load, and a conversation in a real browser."""

import importlib.util
import re
import shutil
import subprocess
import time

import pytest
from forced_answers import force

from jaxcp.serve.page import FILE

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-sync"]
TOOLS = '[{"type": "function", "function": {"name": "find", "parameters": {"type": "object"}}}]'
THINKING = "<think>\nHe is a count.\n</think>\n\nA hero <b>& more</b>."
CALL = '<tool_call>\n{"name": "find", "arguments": {"name": "Pierre"}}\n</tool_call>'
MISSING = (
    "Chromium: apt install chromium" if CHROMIUM is None
    else "pip install jaxcp[browser]" if importlib.util.find_spec("playwright") is None
    else ""
)  # fmt: skip


def needs_a_browser(test):
    return pytest.mark.slow(pytest.mark.skipif(bool(MISSING), reason=f"needs {MISSING}")(test))


def test_nothing_comes_from_elsewhere(server):
    reply = server.http.get("/")
    assert reply.status_code == 200 and reply.text == FILE.read_text(encoding="utf-8")
    policy = reply.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'") and "unsafe" not in policy
    assert not re.findall(r"https?://|url\(|@import|\bsrc=|innerHTML|\bon\w+=\"", reply.text)
    assert not re.findall(r"<[^>]* style=", reply.text)  # which the policy forbids


@pytest.mark.skipif(shutil.which("node") is None, reason="needs node")
def test_the_script_is_well_formed(tmp_path):
    [script] = re.findall(r"<script>(.*?)</script>", FILE.read_text(encoding="utf-8"), re.DOTALL)
    file = tmp_path / "page.js"
    file.write_text(script, encoding="utf-8")
    done = subprocess.run(["node", "--check", str(file)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser, server):
    """`open_page(width=, ...)`: the page in a window of its own; nothing may have gone wrong."""
    opened, wrong = [], []

    def open_one(width=1200, height=800, **options):
        page = browser.new_page(viewport={"width": width, "height": height}, **options)
        page.on("console", lambda message: wrong.append(message.text))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.goto(server.url)
        page.wait_for_selector("h1 >> text=tiny")
        page.set_default_timeout(30_000)
        opened.append(page)
        return page

    yield open_one
    for page in opened:
        page.close()
    assert not wrong


def say(page, text):
    page.fill("#text", text)
    page.keyboard.press("Enter")


@needs_a_browser
def test_a_conversation_with_thinking_and_a_tool(open_page, engine, monkeypatch, tmp_path):
    page = open_page(color_scheme="light")
    with monkeypatch.context() as patched:
        force(engine, patched, THINKING)
        say(page, "Who is Pierre?")
        page.wait_for_selector(".again")
        assert page.inner_text("article .text") == "A hero <b>& more</b>."  # is text, no markup
        assert page.inner_text("article summary").startswith("Thought for")
        assert not page.is_visible("article .thought > div")
        page.click("article summary")
        assert page.inner_text("article .thought > div") == "He is a count."
        page.keyboard.press("Alt+r")
        page.wait_for_selector(".about >> text=32 reused")
        assert page.locator("article").count() == 1
    with monkeypatch.context() as patched:
        force(engine, patched, CALL)
        page.click("#ask summary")
        page.fill("#tools", TOOLS)
        say(page, "Find him.")
        page.wait_for_selector(".call textarea")
        assert "Calls find" in page.inner_text(".call")
        assert '"name": "Pierre"' in page.inner_text(".call pre")
    with monkeypatch.context() as patched:
        force(engine, patched, "Found.")
        page.fill(".call textarea", "He is in Moscow.")
        page.get_by_role("button", name="Give results").click()
        page.wait_for_selector("article:last-child .text >> text=Found.")
        assert page.locator("article").count() == 3
    page.wait_for_selector("#sessions >> text=this page")
    assert re.search(r"\d+ kept, \d+ free", page.inner_text("#counts"))
    assert page.locator("#shards canvas").count() == 2
    page.screenshot(path=tmp_path / "wide.png")


@needs_a_browser
def test_an_answer_is_stopped_on_a_phone_in_the_dark(
    open_page, engine, server, monkeypatch, tmp_path
):
    step = engine.step
    force(engine, monkeypatch, "much " * 150)
    monkeypatch.setattr(engine, "step", lambda: (time.sleep(0.02), step())[1])
    page = open_page(width=390, height=844, color_scheme="dark")
    page.click("#ask summary")
    page.fill("#tokens", "900")
    right = "[...document.querySelectorAll('#ask *')].map(x => x.getBoundingClientRect().right)"
    assert page.evaluate(f"Math.max(...{right})") <= 390  # with all settings open
    page.click("#ask summary")
    page.click("#pool summary")
    say(page, "Say much.")
    page.wait_for_selector("article .text")
    assert page.is_visible("#stop") and page.is_disabled("#send")
    page.wait_for_selector("#counts >> text=/[1-9]\\d* in use/")
    page.screenshot(path=tmp_path / "phone.png")
    page.keyboard.press("Escape")
    page.wait_for_selector(".again")
    assert "stopped" in page.inner_text(".about")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    before = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.click("#theme")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != before
    server.idle()
