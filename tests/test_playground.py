"""The playground's files without a browser: nothing missing, nothing inline, nothing from elsewhere."""

import asyncio
import re
import tomllib
from fnmatch import fnmatch
from html.parser import HTMLParser
from pathlib import Path

import httpx2
import pytest
from starlette.applications import Starlette

from emag_export.runtime.guidance.rules import Guidance
from emag_export.runtime.sampling.plan import EmagWindows
from emag_export.serve.page import CONTENT_POLICY, STATIC, page_routes
from emag_export.serve.schemas import EmagOptions, GenerationBody

Tag = tuple[str, dict[str, str]]

# Of the body: what is the same in every request of the page, what clients of OpenAI send and this server does
# not look at, and what has parts of its own.
FIXED = {"n", "quality", "background", "moderation", "response_format", "output_format", "user", "stream"}
INSTEAD = {"partial_images": "emag.preview_every", "size": "width"}
TYPES = {".html": "text/html", ".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}


class Page(HTMLParser):
    """Tags of the page, and the text of elements that a browser would run or apply."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[Tag] = []
        self.inline: list[str] = []
        self._open = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))
        self._open = tag

    def handle_endtag(self, tag: str) -> None:
        self._open = ""

    def handle_data(self, data: str) -> None:
        if self._open in ("script", "style") and data.strip():
            self.inline.append(data)

    def values(self, *names: str) -> list[str]:
        return [attributes[name] for _, attributes in self.tags for name in names if name in attributes]


@pytest.fixture(scope="module")
def page() -> Page:
    parser = Page()
    parser.feed((STATIC / "index.html").read_text("utf-8"))
    return parser


def files(ending: str) -> dict[str, str]:
    return {path.name: path.read_text("utf-8") for path in STATIC.glob(f"*{ending}")}


def test_everything_that_is_referenced_exists(page: Page) -> None:
    referenced = [value for value in page.values("src", "href") if not value.startswith("#")]
    assert "static/playground.js" in referenced
    assert [value for value in referenced if not (STATIC.parent / value).is_file()] == []
    reached, left = set(), ["playground.js"]
    while left:
        name = left.pop()
        reached.add(name)
        left += set(re.findall(r'from "\./([^"]+)"', (STATIC / name).read_text("utf-8"))) - reached
    assert reached == set(files(".js")), "a module that nothing imports, or an import of none"


def test_nothing_is_inline(page: Page) -> None:
    assert page.inline == []
    assert "style" not in [tag for tag, _ in page.tags]
    names = {name for _, attributes in page.tags for name in attributes}
    assert [name for name in names if name == "style" or name.startswith("on")] == []
    assert [value for value in page.values("src", "href") if value.startswith(("javascript:", "data:"))] == []


def test_nothing_comes_from_elsewhere() -> None:
    namespace = "http://www.w3.org/2000/svg"  # a name: nothing is loaded from there
    for path in STATIC.iterdir():
        text = path.read_text("utf-8").replace(f'xmlns="{namespace}"', "")
        assert re.findall(r"(?:https?:)?//[a-z0-9-]+\.[a-z]|@import|url\(", text) == [], path.name


def test_ids_are_unique_and_found(page: Page) -> None:
    ids = page.values("id")
    assert sorted(ids) == sorted(set(ids))
    many = " ".join(page.values("aria-labelledby", "aria-describedby")).split()
    scripts = "".join(files(".js").values())
    asked = re.findall(r'(?:byId|getElementById)\("([^"]+)"\)', scripts)
    anchors = [value[1:] for value in page.values("href") if value.startswith("#")]
    assert len(asked) > 20
    assert set(page.values("for") + many + asked + anchors) - set(ids) == set()


def test_every_control_has_a_name_that_is_read_out(page: Page) -> None:
    labelled = set(page.values("for"))
    controls = [attributes for tag, attributes in page.tags if tag in ("input", "select", "textarea")]
    assert len(controls) > 15
    unnamed = [one for one in controls if one.get("id") not in labelled and "aria-label" not in one]
    assert unnamed == []


def test_every_field_of_the_api_can_be_set(page: Page) -> None:
    scripts = files(".js")
    top = set(GenerationBody.model_fields) - FIXED - {"emag"}
    inner = {f"emag.{name}" for name in EmagOptions.model_fields} - {"emag.guidance"}
    controls = {INSTEAD.get(name, name) for name in top | inner}
    assert controls - set(page.values("name")) == {"emag.blocks"}, "boxes of blocks come from the candidates"
    assert {"left", "right"} <= set(page.values("name")), "the guidance of each side"
    sent = {name.removeprefix("emag.") for name in top | inner | {"emag.guidance"}} - {"partial_images"}
    assert [name for name in sorted(sent) if not re.search(rf"\b{name}\b", scripts["request.js"])] == []


def test_every_field_of_the_page_is_in_the_api(page: Page) -> None:
    known = set(GenerationBody.model_fields) | {f"emag.{name}" for name in EmagOptions.model_fields}
    # Those that the page puts together, or keeps for itself.
    own = {"left", "right", "width", "height", "view", "viewport", "color-scheme", "description"}
    assert set(page.values("name")) - own <= known
    assert set(page.values("data-param")) <= known, "what the server's errors are about"


def test_placeholders_are_the_defaults(page: Page) -> None:
    shown = {attributes.get("name"): attributes.get("placeholder") for _, attributes in page.tags}
    defaults = EmagWindows()
    for name in ("beta", "start", "delta", "stop", "strength"):
        assert shown[f"emag.{name}"] == str(getattr(defaults, name))
    assert shown["emag.guidance_interval"] == " ".join(f"{end:g}" for end in Guidance().interval)
    assert shown["emag.cfg_rescale"] == str(Guidance().rescale)
    assert shown["emag.cfg_zero_init"] == str(Guidance().zero_init)
    assert shown["emag.priority"] == str(EmagOptions().priority)


def test_the_server_sends_every_file_with_its_type_and_policy() -> None:
    async def ask() -> dict[str, httpx2.Response]:
        transport = httpx2.ASGITransport(app=Starlette(routes=page_routes()))
        async with httpx2.AsyncClient(transport=transport, base_url="http://server") as client:
            answers = {path.name: await client.get(f"/static/{path.name}") for path in STATIC.iterdir()}
            return answers | {"index.html": await client.get("/")}

    for name, answer in asyncio.run(ask()).items():
        assert answer.status_code == 200
        assert answer.content == (STATIC / name).read_bytes()
        # A module of another type is not run where x-content-type-options is nosniff.
        assert answer.headers["content-type"].split(";")[0] == TYPES[Path(name).suffix]
        assert answer.headers["content-security-policy"] == CONTENT_POLICY


def test_the_wheel_holds_every_file() -> None:
    project = tomllib.loads((STATIC.parents[2] / "pyproject.toml").read_text("utf-8"))
    patterns = project["tool"]["setuptools"]["package-data"]["emag_export.serve"]
    missing = [
        path.name
        for path in STATIC.rglob("*")
        if path.is_file()
        and not any(fnmatch(path.relative_to(STATIC.parent).as_posix(), pattern) for pattern in patterns)
    ]
    assert missing == []
