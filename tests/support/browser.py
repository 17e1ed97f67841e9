"""A real browser, Debian's chromium, and a web server for a folder."""

import contextlib
import functools
import shutil
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest

PROGRAMS = ("chromium", "chromium-browser", "google-chrome")
CONTROLS = {"button", "checkbox", "combobox", "image", "img", "link", "radio", "slider", "spinbutton", "tab", "textbox"}


def missing(what):
    """Skip, with the reason, which `.ci/run` prints."""
    pytest.skip(what)


@contextlib.contextmanager
def open_browser(*flags):
    """Yields a browser of Playwright."""
    program = next(filter(None, map(shutil.which, PROGRAMS)), None)
    if program is None:
        missing("no browser: apt-get install chromium")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        missing("no Playwright: pip install playwright (its own browsers are not needed)")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox", *flags])
        yield browser
        browser.close()


class _Handler(SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@contextlib.contextmanager
def serve_folder(folder):
    """Serve it as `python -m http.server` does; yields the address."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_Handler, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextlib.contextmanager
def watched_page(browser, expected_errors=(), **options):
    """A tab; when it is left, its console must hold no error but those expected."""
    page = browser.new_page(**options)
    errors = []
    page.on("console", lambda m: errors.append(m.text) if m.type == "error" else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    yield page
    page.close()
    assert [e for e in errors if not any(text in e for text in expected_errors)] == []


def nameless_controls(page):
    """The HTML of those controls that a screen reader could not name."""
    session = page.context.new_cdp_session(page)
    nodes = session.send("Accessibility.getFullAXTree")["nodes"]
    shown = [n for n in nodes if not n.get("ignored") and n["role"]["value"] in CONTROLS]
    assert shown
    nameless = [n["backendDOMNodeId"] for n in shown if not n.get("name", {}).get("value", "").strip()]
    return [session.send("DOM.getOuterHTML", {"backendNodeId": node})["outerHTML"] for node in nameless]
