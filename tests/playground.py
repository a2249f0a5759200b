"""The playground in Chromium, as a person uses it: what tests press, read and see."""

import io
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image

from tests.serving import Running, running_server

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Locator, Page, Request

__all__ = ["LONG", "Open", "Playground", "open_browser", "open_pages", "pixels_of", "start_server"]

SCREENSHOTS = Path(__file__).parents[1] / "out" / "screenshots"
LONG = 2000
"""Steps: minutes of work, so that what is cancelled cannot have finished by itself."""
_NAMES = ("chromium", "chromium-browser", "google-chrome")
_OPTIONS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
]
# Notes which pictures each panel shows, and when it says that it is done.
_WATCH = """
window.seen = [];
new MutationObserver((changes) => {
  for (const { target, attributeName } of changes) {
    const panel = target.closest?.(".panel")?.id;
    if (panel === "left" || panel === "right") {
      window.seen.push([panel, attributeName, target.getAttribute(attributeName)]);
    }
  }
}).observe(document, { subtree: true, attributes: true, attributeFilter: ["src", "data-state"] });
document.addEventListener("securitypolicyviolation", (event) => {
  console.error(`policy: ${event.violatedDirective} ${event.blockedURI}`);
});
"""


def pixels_of(data: bytes) -> Any:
    """Colours of a PNG, as numbers that can be subtracted."""
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)


class Playground:
    """The page in a tab of its own, and everything that its console and network had to tell.

    Args:
        browser: That opens it.
        url: Of the server.
        context: Of Playwright's ``new_context``, for instance ``color_scheme``.
    """

    def __init__(self, browser: "Browser", url: str, **context: Any) -> None:
        from playwright.sync_api import expect

        self._expect = expect
        self.complaints: list[str] = []
        self.requests: list[Request] = []
        self.finished: list[str] = []
        self.context = browser.new_context(**{"viewport": {"width": 1440, "height": 900}} | context)
        self.context.grant_permissions(["clipboard-read", "clipboard-write"], origin=url)
        self.page: Page = self.context.new_page()
        self.page.set_default_timeout(20_000)
        self.page.on("console", lambda said: self.complaints.append(f"{said.type}: {said.text}"))
        self.page.on("pageerror", lambda error: self.complaints.append(f"uncaught: {error}"))
        self.page.on("request", self._note)
        self.page.add_init_script(_WATCH)
        self.url = url

    def _note(self, request: "Request") -> None:
        if request.method != "GET":
            self.requests.append(request)

    def open(self) -> "Playground":
        """Go there, and wait until the models are known."""
        self.page.goto(self.url)
        self.expect(self.page.get_by_label("Model")).to_be_visible()
        return self

    def expect(self, place: "Locator") -> Any:
        """Playwright's assertion that waits."""
        return self._expect(place)

    def field(self, label: str) -> "Locator":
        return self.page.get_by_label(label, exact=True)

    def fill(self, **fields: object) -> "Playground":
        """Fill in fields by their labels, with spaces written as underscores."""
        for label, value in fields.items():
            self.field(label.replace("_", " ")).fill(str(value))
        return self

    def panel(self, name: str) -> "Locator":
        return self.page.get_by_role("article", name=name, exact=True)

    def picture(self, name: str) -> "Locator":
        return self.panel(name).locator("img")

    @property
    def status(self) -> "Locator":
        return self.page.get_by_role("status")

    def generate(self) -> "Playground":
        """Press the keys for it, and wait for the end."""
        self.page.keyboard.press("Control+Enter")
        self.expect(self.status).to_contain_text("Finished")
        self.expect(self.page.locator("#pictures")).to_have_attribute("aria-busy", "false")
        return self

    def sent(self) -> list[dict[str, Any]]:
        """Bodies of all requests for pictures so far."""
        return [request.post_data_json or {} for request in self.requests if request.method == "POST"]

    def download(self, name: str) -> tuple[str, bytes]:
        """Name and bytes of a panel's picture."""
        with self.page.expect_download() as waiting:
            self.panel(name).get_by_role("link", name="Download PNG").click()
        return waiting.value.suggested_filename, waiting.value.path().read_bytes()

    def copied(self, name: str, language: str) -> str:
        """What a panel's button put into the clipboard."""
        self.panel(name).get_by_role("button", name=f"Copy as {language}").click()
        self.expect(self.status).to_contain_text("clipboard")
        return str(self.page.evaluate("navigator.clipboard.readText()"))

    def difference(self) -> Any:
        """Colours of the difference picture."""
        from base64 import b64decode

        address = self.page.evaluate("document.getElementById('difference-canvas').toDataURL('image/png')")
        return pixels_of(b64decode(address.partition(",")[2]))

    def seen(self, side: str) -> list[tuple[str, str]]:
        """What the panel ``left`` or ``right`` went through: states, and kinds of pictures."""
        noted = [(name, value) for panel, name, value in self.page.evaluate("window.seen") if panel == side]
        return [(name, value) for name, value in noted if value is not None]

    def screenshot(self, name: str, *, whole: bool = False) -> None:
        """Leave a picture of the page in out/screenshots."""
        SCREENSHOTS.mkdir(parents=True, exist_ok=True)
        self.page.screenshot(path=SCREENSHOTS / f"{name}.png", full_page=whole)

    def close(self, *expected: str) -> None:
        """Close the tab; fail on anything in the console, but for what holds one of some words."""
        self.context.close()
        unexpected = [one for one in self.complaints if not any(word in one for word in expected)]
        assert not unexpected, unexpected


@pytest.fixture(scope="module", name="browser")
def open_browser() -> Iterator["Browser"]:
    """A browser without a window; skips where there is none."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    program = next((found for name in _NAMES if (found := shutil.which(name))), None)
    if program is None:
        pytest.skip(f"no browser: none of {', '.join(_NAMES)} is on the PATH")
    with sync_api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=program, args=_OPTIONS)
        yield opened
        opened.close()


@pytest.fixture(scope="module", name="server")
def start_server(browser: "Browser", tiny_bundle: Path) -> Iterator[Running]:
    with running_server(tiny_bundle, "--max-steps", str(LONG)) as running:
        yield running


Open = Callable[..., Playground]


@pytest.fixture(name="opened")
def open_pages(browser: "Browser", server: Running) -> Iterator[Open]:
    """Opens the page; afterwards nothing may stand in its console but what ``allowed`` names."""
    pages: list[tuple[Playground, tuple[str, ...]]] = []

    def make(*, allowed: tuple[str, ...] = (), **context: Any) -> Playground:
        playground = Playground(browser, server.url, **context)
        pages.append((playground, allowed))
        return playground.open()

    yield make
    for playground, allowed in pages:
        playground.close(*allowed)
