"""The playground's page itself: on a phone, in the dark, by keyboard alone, and its reader of streams."""

import re
from typing import TYPE_CHECKING, Any

import pytest

from tests.playground import LONG, Open, open_browser, open_pages, start_server  # noqa: F401  fixtures
from tests.serving import wait_for

if TYPE_CHECKING:
    from playwright.sync_api import Route

pytestmark = pytest.mark.browser

# Of WCAG 2.1, level AA, for text of this size.
LEAST_CONTRAST = 4.5
# Colours and opacity of every text that is seen, with the ground below it.
TEXTS = """() => {
  const shown = [];
  for (const element of document.querySelectorAll("body *")) {
    const own = [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
    if (!own || !element.checkVisibility() || element.closest(":disabled, option")) continue;
    let opacity = 1, ground = null;
    for (let place = element; place; place = place.parentElement) {
      const style = getComputedStyle(place);
      opacity *= ground ? 1 : Number(style.opacity);
      if (!ground && !style.backgroundColor.startsWith("rgba(0, 0, 0, 0")) ground = style.backgroundColor;
    }
    const { color } = getComputedStyle(element);
    shown.push([element.textContent.trim().slice(0, 40), color, ground, opacity]);
  }
  return shown;
}"""
# What is wider than the card that it is in, by class and text. Captions are cut, and on a phone the form's
# buttons lie at the window's lower edge.
STICKING_OUT = """[...document.querySelectorAll(".controls, .panel, .run")].flatMap((card) => {
  const { left, right } = card.getBoundingClientRect();
  return [...card.querySelectorAll("*")].filter((one) => {
    const box = one.getBoundingClientRect();
    const out = box.left < left || box.right > right + 0.5;
    return out && one.checkVisibility() && !one.closest(".run-caption, .actions");
  }).map((one) => `${card.className}: ${one.tagName} ${one.textContent.trim().slice(0, 20)}`);
})"""
# Heights that the pictures' part of the page takes on, from now on.
WATCH_HEIGHT = """() => new Promise((resolve) => {
  window.heights = [];
  const note = ([{ contentRect }]) => resolve(window.heights.push(Math.round(contentRect.height)));
  new ResizeObserver(note).observe(document.getElementById("pictures"));
})"""
# A stream cut into two pieces, at every place, and into single bytes.
READ_CUT = """async (text) => {
  const { readEvents } = await import("/static/events.js");
  const bytes = new TextEncoder().encode(text);
  const read = async (chunks) => {
    const stream = new ReadableStream({
      start(controller) {
        chunks.forEach((chunk) => controller.enqueue(chunk));
        controller.close();
      },
    });
    const events = [];
    for await (const { name, data } of readEvents(stream)) events.push([name, data]);
    return JSON.stringify(events);
  };
  const found = new Set([await read([...bytes].map((byte) => Uint8Array.of(byte)))]);
  for (let cut = 0; cut <= bytes.length; cut++) {
    found.add(await read([bytes.slice(0, cut), bytes.slice(cut)]));
  }
  return [...found].map((one) => JSON.parse(one));
}"""


def luminance(colour: str, ground: str, opacity: float) -> float:
    """Relative luminance as WCAG defines it."""
    mixed = [
        (opacity * front + (1 - opacity) * back) / 255
        for front, back in zip(numbers(colour), numbers(ground), strict=True)
    ]
    linear = [level / 12.92 if level <= 0.04045 else ((level + 0.055) / 1.055) ** 2.4 for level in mixed]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def numbers(colour: str) -> list[float]:
    return [float(part) for part in re.findall(r"[\d.]+", colour)[:3]]


def faint(texts: list[Any]) -> list[Any]:
    """Those that are hard to read."""
    found = []
    for text, colour, ground, opacity in texts:
        bright, dark = sorted(
            (luminance(colour, ground, opacity), luminance(ground, ground, 1)), reverse=True
        )
        if (contrast := (bright + 0.05) / (dark + 0.05)) < LEAST_CONTRAST:
            found.append((text, round(contrast, 2)))
    return found


@pytest.mark.parametrize("width", [320, 390])
def test_nothing_is_wider_than_a_phone(opened: Open, width: int) -> None:
    playground = opened(viewport={"width": width, "height": 844}, has_touch=True, is_mobile=True)
    playground.page.get_by_text("More settings").click()
    for seed in range(3):
        playground.fill(Seed=seed, Steps=4).generate()
    page = playground.page
    assert page.evaluate("[document.documentElement.scrollWidth, innerWidth]") == [width, width]
    panels = [playground.panel(name).bounding_box() for name in ("CFG", "EMAG", "Difference")]
    lefts, tops = ([box[side] for box in panels if box] for side in ("x", "y"))
    assert len(set(lefts)) == 1
    assert tops == sorted(set(tops)), "one column"
    small = page.evaluate(
        "[...document.querySelectorAll('button')].filter((one) => one.checkVisibility())"
        ".map((one) => [one.textContent.trim(), one.getBoundingClientRect().height])"
        ".filter(([, height]) => height < 32)"
    )
    assert small == [], "too low for a finger"
    if width == 390:
        page.evaluate("document.getElementById('results').scrollIntoView({ behavior: 'instant' })")
        playground.screenshot("phone")
        page.evaluate("scrollTo(0, 0)")
        playground.screenshot("phone-form")


@pytest.mark.parametrize("width", [320, 700, 720, 820, 1024, 1440])
def test_nothing_sticks_out_of_its_card(opened: Open, width: int) -> None:
    playground = opened(viewport={"width": width, "height": 900}).fill(Seed=1, Steps=2, Width=128, Height=48)
    playground.generate()
    playground.page.get_by_text("More settings").click()
    assert playground.page.evaluate(STICKING_OUT) == []
    cancel = playground.page.get_by_role("button", name="Cancel").bounding_box()
    bar = playground.page.locator(".actions").bounding_box()
    assert cancel
    assert bar
    assert cancel["x"] + cancel["width"] <= bar["x"] + bar["width"] - 12, "within the bar's edge"
    boxes = [playground.panel(name).bounding_box() for name in ("CFG", "EMAG")]
    tops = {box["y"] for box in boxes if box}
    assert len(tops) == (1 if width >= 820 else 2), "side by side where there is room for it"


def test_the_page_stands_still_while_it_draws(opened: Open) -> None:
    playground = opened().fill(Seed=1, Steps=8)
    playground.page.evaluate(WATCH_HEIGHT)
    playground.generate()
    playground.fill(Seed=2).generate()
    heights = playground.page.evaluate("heights")
    assert len(heights) == 2, f"it grows as the first run begins, and never again: {heights}"


@pytest.mark.parametrize(("size", "shape"), [((96, 48), 2), ((48, 64), 0.75), ((128, 32), 2)])
def test_frames_have_the_shape_of_the_pictures(opened: Open, size: tuple[int, int], shape: float) -> None:
    playground = opened().fill(Seed=1, Steps=2, Width=size[0], Height=size[1]).generate()
    for frame in playground.page.locator(".frame").all():
        box = frame.bounding_box()
        assert box
        assert box["width"] / box["height"] == pytest.approx(shape, rel=0.01)
    playground.fill(Width=64, Height=64).generate()
    playground.page.locator("#gallery-list button").last.click()
    box = playground.page.locator(".frame").first.bounding_box()
    assert box
    assert box["width"] / box["height"] == pytest.approx(shape, rel=0.01), "of the run that was brought back"


def test_more_settings_come_into_view(opened: Open) -> None:
    playground = opened(viewport={"width": 1440, "height": 900})
    playground.page.get_by_text("More settings").click()
    under = (
        "one => { const { x, y, width, height } = one.getBoundingClientRect();"
        " return document.elementFromPoint(x + width / 2, y + height / 2) === one; }"
    )
    wait_for(lambda: playground.field("Decay per step").evaluate(under), "a setting that nothing covers", 5)


def test_light_and_dark_can_both_be_read(opened: Open) -> None:
    grounds = {}
    for scheme in ("light", "dark"):
        playground = opened(color_scheme=scheme, allowed=("status of 400",))
        for seed, prompt in enumerate(
            ("a small green ring on grey", "two red squares", "a large red circle")
        ):
            playground.fill(Seed=seed, Prompt=prompt, Steps=12).generate()
        playground.screenshot(scheme, whole=True)
        playground.page.get_by_text("More settings").click()
        playground.fill(Width=65)
        playground.page.keyboard.press("Control+Enter")
        playground.expect(playground.status).to_contain_text("marked field")
        texts = playground.page.evaluate(TEXTS)
        assert len(texts) > 40
        assert faint(texts) == []
        grounds[scheme] = playground.page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert sum(numbers(grounds["light"])) > 600
    assert sum(numbers(grounds["dark"])) < 100


def test_everything_is_reached_by_keyboard_and_seen_to_be(opened: Open) -> None:
    playground = opened().fill(Seed=1, Steps=2).generate()
    page = playground.page
    page.get_by_text("More settings").click()
    wanted = page.evaluate(
        "[...document.querySelectorAll('input, select, textarea, button, a, summary')]"
        ".filter((one) => one.checkVisibility() && !one.disabled && one.name !== 'view')"
        ".map((one) => one.id || one.textContent.trim())"
    )
    page.evaluate("document.activeElement.blur()")
    reached: dict[str, str] = {}
    for _ in range(len(wanted) + 5):
        page.keyboard.press("Tab")
        name, outline = page.evaluate(
            "(({ id, textContent }) => [id || textContent.trim(), "
            "getComputedStyle(document.activeElement).outlineStyle])(document.activeElement)"
        )
        reached[name] = outline
    assert len(wanted) > 25
    assert set(wanted) - set(reached) == set()
    invisible = {name for name, outline in reached.items() if outline == "none"} & set(wanted)
    assert invisible == set()


def test_a_stream_is_read_the_same_wherever_it_is_cut(opened: Open) -> None:
    text = (
        ": keep-alive\n\nevent: one\ndata: ä→🎨\n\n"
        "event: two\r\ndata:first\r\ndata:  second\r\n\r\n"
        "data: [DONE]\rid: 7\r\r"
        "event: empty\n\nevent: cut\ndata: off\n"
    )
    expected = [["one", "ä→🎨"], ["two", "first\n second"], ["message", "[DONE]"]]
    assert opened().page.evaluate(READ_CUT, text) == [expected]


def test_text_can_be_copied_without_a_clipboard(opened: Open) -> None:
    playground = opened().fill(Seed=1, Steps=2).generate()
    copied = playground.copied("CFG", "Python")
    playground.page.evaluate("Object.defineProperty(navigator, 'clipboard', { value: undefined })")
    playground.panel("CFG").get_by_role("button", name="Copy as Python").click()
    area = playground.field("Command")
    playground.expect(area).to_have_value(copied)
    assert area.evaluate("area => area.value.slice(area.selectionStart, area.selectionEnd)") == copied
    playground.page.keyboard.press("Escape")
    playground.expect(playground.page.get_by_role("dialog")).to_be_hidden()


def test_one_picture_alone(opened: Open) -> None:
    playground = opened().fill(Seed=1, Steps=4)
    playground.page.get_by_text("One picture").click()
    playground.field("Guidance").select_option("emag+cads")
    playground.generate()
    assert [body["emag"]["guidance"] for body in playground.sent()] == ["emag+cads"]
    playground.expect(playground.picture("EMAG + CADS")).to_be_visible()
    playground.expect(playground.panel("Difference")).to_be_hidden()


def test_progress_is_asked_for_where_there_are_no_previews(opened: Open) -> None:
    playground = opened().fill(Steps=LONG)
    playground.page.get_by_text("More settings").click()
    playground.fill(Preview="")
    playground.page.keyboard.press("Control+Enter")
    for name in ("CFG", "EMAG"):
        playground.expect(playground.panel(name).get_by_text(f"of {LONG}")).to_be_visible()
        playground.expect(playground.panel(name).get_by_role("progressbar")).to_have_js_property("max", LONG)
    assert all("preview_every" not in body["emag"] for body in playground.sent())
    playground.page.keyboard.press("Escape")
    playground.expect(playground.status).to_have_text("Cancelled.")


@pytest.mark.parametrize(
    ("stream", "said"),
    [
        ('event: error\ndata: {"error": {"message": "the engine failed"}}\n\n', "The engine failed."),
        (": keep-alive\n\nevent: image_generation.completed\ndata: {}\n", "ended the answer before"),
    ],
)
def test_one_side_may_fail(opened: Open, stream: str, said: str) -> None:
    playground = opened().fill(Seed=5, Steps=4)

    def break_emag(route: "Route") -> None:
        if '"guidance": "emag"' in (route.request.post_data or ""):
            route.fulfill(body=stream, content_type="text/event-stream")
        else:
            route.continue_()

    playground.page.route("**/v1/images/generations", break_emag)
    playground.page.keyboard.press("Control+Enter")
    playground.expect(playground.status).to_contain_text(said)
    playground.expect(playground.panel("EMAG")).to_contain_text(said)
    playground.expect(playground.picture("CFG")).to_be_visible()
    playground.expect(playground.panel("Difference")).to_contain_text("a picture is missing")
    run = playground.page.get_by_role("button", name="seed 5, CFG", exact=False)
    playground.expect(run.locator("img")).to_have_count(1)


def test_small_pictures_keep_their_pixels(opened: Open) -> None:
    playground = opened().fill(Seed=1, Steps=2).generate()
    for picture in (playground.picture("CFG"), playground.page.locator("#difference-canvas")):
        assert picture.evaluate("one => getComputedStyle(one).imageRendering") == "pixelated"


def test_nothing_moves_for_those_who_ask_for_that(opened: Open) -> None:
    durations = "[...document.querySelectorAll('*')].map((one) => getComputedStyle(one).transitionDuration)"
    assert set(opened().page.evaluate(durations)) > {"0s"}
    assert set(opened(reduced_motion="reduce").page.evaluate(durations)) == {"0s"}
