"""The playground in a browser, in front of a real server: what a person sees and gets."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import httpx2
import numpy as np
import pytest

from emag_export.runtime.pictures.metadata import read_picture_record
from emag_export.serve.errors import ApiError
from emag_export.serve.page import CONTENT_POLICY
from tests.playground import (  # noqa: F401  fixtures among them
    LONG,
    Open,
    Playground,
    open_browser,
    open_pages,
    pixels_of,
    start_server,
)
from tests.serving import Running, running_server, wait_for

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Route

pytestmark = pytest.mark.browser

KEY = "a-key-of-32-characters-for-tests"
ROUTE = "**/v1/images/generations"
# Of 255. Images share calls in the server; no pixel was ever seen to differ.
ONE_LEVEL = 1


def test_side_by_side_with_live_previews(opened: Open, tmp_path: Path) -> None:
    playground = opened().fill(Seed=7, Steps=40)
    playground.generate()
    for side in ("left", "right"):
        seen = playground.seen(side)
        previews = [value for name, value in seen if name == "src" and value.startswith("data:")]
        finished = seen.index(("data-state", "done"))
        assert len(set(previews)) > 5
        assert all(seen.index(("src", preview)) < finished for preview in previews)
        assert [value for name, value in seen if name == "src"][-1].startswith("blob:")

    left, right = playground.sent()
    assert (left.pop("emag"), right.pop("emag")) == (
        {"guidance": "cfg", "preview_every": 1},
        {"guidance": "emag", "scale": 1.5, "preview_every": 1},
    )
    assert left == right, "everything but the guidance is the same"
    begun = [request.timing["startTime"] for request in playground.requests]
    ended = [request.timing["startTime"] + request.timing["responseEnd"] for request in playground.requests]
    assert max(begun) < min(ended), "both are drawn at the same time"

    records, pixels = {}, {}
    for name in ("CFG", "EMAG"):
        file, data = playground.download(name)
        assert file == f"tiny-bundle-seed-7-{name.lower()}.png"
        (tmp_path / file).write_bytes(data)
        records[name], pixels[name] = read_picture_record(tmp_path / file), pixels_of(data)
    assert [record.request.guidance.name for record in records.values()] == ["cfg", "emag"]
    assert {record.request.seed for record in records.values()} == {7}

    apart = np.abs(pixels["CFG"] - pixels["EMAG"])
    assert apart.max() > 0
    for factor in (8, 1):
        playground.field("Amplified").fill(str(factor))
        assert (playground.difference() == np.minimum(factor * apart, 255)).all()
    facts = playground.page.locator("#difference-facts").inner_text()
    assert facts == f"Of 255 levels: mean {apart.mean():.1f}, largest {apart.max()}"


@pytest.mark.parametrize("language", ["curl", "Python"])
def test_what_is_copied_draws_the_same_picture(opened: Open, tmp_path: Path, language: str) -> None:
    if language == "curl" and not all(shutil.which(name) for name in ("bash", "curl", "jq", "base64")):
        pytest.skip("curl, jq or base64 is not installed")
    prompt = 'it\'s a "red" circle,\n\\ and $HOME — `ü`'
    playground = opened().fill(Prompt=prompt, Seed=2**63 - 1, Steps=4, Negative_prompt="grey")
    playground.generate()
    file, data = playground.download("EMAG")
    text = playground.copied("EMAG", language)
    program = ["bash", "-ec", text] if language == "curl" else [sys.executable, "-c", text]
    subprocess.run(program, cwd=tmp_path, check=True, timeout=120)
    (tmp_path / "page.png").write_bytes(data)
    records = [read_picture_record(tmp_path / name) for name in (file, "page.png")]
    assert records[0] == records[1]
    assert (records[0].request.prompt, records[0].request.seed) == (prompt, 2**63 - 1)
    assert np.abs(pixels_of((tmp_path / file).read_bytes()) - pixels_of(data)).max() <= ONE_LEVEL


def test_every_setting_is_sent(opened: Open) -> None:
    playground = opened().fill(Prompt="a ring", Negative_prompt="grey", Seed=3, Steps=6, Width=72, Height=56)
    playground.fill(Guidance_scale=5.5, EMAG_scale="")
    playground.page.get_by_text("More settings").click()
    playground.fill(Decay_per_step=0.9, Strength=0.5, Start=240, Delay=40, Stop=20)
    playground.fill(Preview=2, Priority=-3, Deadline=50)
    playground.field("4").check()
    playground.field("Left").select_option("apg")
    playground.field("Right").select_option("emag-only")
    playground.generate()
    queue = {"preview_every": 2, "priority": -3, "deadline": 50}
    window = {"beta": 0.9, "strength": 0.5, "start": 240, "delta": 40, "stop": 20, "blocks": [4]}
    common = {
        "model": "tiny-bundle",
        "prompt": "a ring",
        "negative_prompt": "grey",
        "seed": 3,
        "size": "72x56",
        "num_inference_steps": 6,
        "guidance_scale": 5.5,
        "stream": True,
    }
    assert playground.sent() == [
        {**common, "emag": {"guidance": "apg", **queue}},
        {**common, "emag": {"guidance": "emag-only", **window, **queue}},
    ]


def test_a_window_in_steps_and_random_blocks_are_sent(opened: Open) -> None:
    playground = opened().fill(Seed=3, Steps=6)
    playground.page.get_by_text("More settings").click()
    playground.field("Counted in").select_option("steps")
    playground.fill(Start=5, Delay=1, Stop=0, Random_blocks=1)
    playground.generate()
    (emag,) = [body["emag"] for body in playground.sent() if body["emag"]["guidance"] == "emag"]
    assert {name: emag[name] for name in ("unit", "start", "delta", "stop", "random_blocks")} == {
        "unit": "steps",
        "start": 5,
        "delta": 1,
        "stop": 0,
        "random_blocks": 1,
    }
    assert "blocks" not in emag and "blur_sigma" not in emag


def test_the_gallery_brings_back_a_run(opened: Open) -> None:
    playground = opened()
    shown = {}
    for seed in (1, 2, 3):
        playground.fill(Seed=seed, Steps=3 + seed).generate()
        shown[seed] = playground.picture("EMAG").get_attribute("src"), playground.difference()
    assert len({source for source, _ in shown.values()}) == 3
    runs = playground.page.locator("#gallery-list button")
    playground.expect(runs).to_have_count(3)
    runs.first.focus()
    for key in ("End", "ArrowLeft", "Home", "ArrowRight", "ArrowRight", "ArrowRight"):
        playground.page.keyboard.press(key)
    playground.expect(runs.nth(2)).to_be_focused()
    playground.page.keyboard.press("Enter")
    playground.expect(playground.field("Seed")).to_have_value("1")
    playground.expect(playground.field("Steps")).to_have_value("4")
    playground.expect(runs.nth(2)).to_have_attribute("aria-current", "true")
    playground.expect(playground.picture("EMAG")).to_have_attribute("src", shown[1][0])
    wait_for(lambda: (playground.difference() == shown[1][1]).all(), "the difference picture of the run")
    assert len(playground.sent()) == 6, "nothing is drawn again"


@pytest.mark.parametrize("how", ["Escape", "button"])
def test_cancelling_ends_both_requests(opened: Open, server: Running, how: str) -> None:
    playground = opened().fill(Steps=LONG)
    playground.page.get_by_role("button", name="Generate").click()
    for name in ("CFG", "EMAG"):
        playground.expect(playground.picture(name)).to_be_visible()
    if how == "Escape":
        playground.page.keyboard.press("Escape")
    else:
        playground.page.get_by_role("button", name="Cancel").click()
    playground.expect(playground.status).to_have_text("Cancelled.")
    playground.expect(playground.page.locator("#gallery")).to_be_hidden()
    given_up = [request.url for request in playground.requests if request.method == "DELETE"]
    assert len(given_up) == 2
    for url in given_up:
        wait_for(lambda url=url: httpx2.get(url).json()["status"] == "cancelled", f"the end of {url}")
    wait_for(lambda: server.figure("emag_live_images") == 0, "a server with nothing to do")
    playground.fill(Steps=4).generate()


def test_a_key_is_asked_for(browser: "Browser", tiny_bundle: Path) -> None:
    with running_server(tiny_bundle, environment={**os.environ, "EMAG_API_KEYS": KEY}) as running:
        playground = Playground(browser, running.url)
        playground.page.goto(running.url)
        playground.field("API key").fill("a wrong one")
        playground.page.keyboard.press("Enter")
        playground.expect(playground.status).to_have_text("The server does not know this key.")
        playground.expect(playground.field("API key")).to_have_attribute("aria-invalid", "true")
        playground.field("API key").fill(KEY)
        playground.screenshot("key")
        playground.page.get_by_role("button", name="Use key").click()
        playground.expect(playground.field("API key")).to_be_hidden()
        playground.fill(Steps=4).generate()
        command = playground.copied("CFG", "curl")
        assert "Bearer $EMAG_API_KEY" in command
        assert KEY not in command + playground.copied("CFG", "Python")
        stored = playground.page.evaluate("[JSON.stringify(sessionStorage), JSON.stringify(localStorage)]")
        assert (KEY in stored[0], KEY in stored[1]) == (True, False)
        playground.page.evaluate("sessionStorage.setItem('emag-api-key', 'stale')")
        playground.page.keyboard.press("Control+Enter")
        playground.field("API key").fill(KEY)
        playground.page.keyboard.press("Enter")
        playground.expect(playground.status).to_contain_text("Finished")
        playground.close("status of 401")


@pytest.mark.parametrize(("seconds", "click"), [(1, False), (100, True)])
def test_a_busy_server_is_asked_again(opened: Open, seconds: int, click: bool) -> None:
    playground = opened(allowed=("status of 429",)).fill(Steps=4)
    busy = ApiError(429, "64 images are waiting, which is the most", code="queue_full", retry_after=seconds)
    refusals: list[Route] = []

    def refuse_once(route: "Route") -> None:
        if len(refusals) == 2:
            route.continue_()
        else:
            refusals.append(route)
            route.fulfill(status=busy.status, headers=busy.headers, json=busy.body)

    playground.page.route(ROUTE, refuse_once)
    playground.page.keyboard.press("Control+Enter")
    text = re.compile(rf"64 images are waiting, which is the most\. Trying again in {seconds} s\.")
    playground.expect(playground.panel("EMAG").get_by_text(text)).to_be_visible()
    if click:
        playground.expect(playground.status).to_have_text("64 images are waiting, which is the most.")
        playground.expect(playground.panel("CFG").get_by_text(text)).to_be_visible()
        playground.screenshot("busy")
        playground.panel("EMAG").get_by_role("button", name="Try again now").click()  # one press for both
    playground.expect(playground.status).to_contain_text("Finished")
    assert len(playground.sent()) == 4


def test_errors_are_shown_where_they_belong(opened: Open) -> None:
    playground = opened(allowed=("status of 400", "ERR_FAILED")).fill(Width=65, Steps=4)
    playground.page.keyboard.press("Control+Enter")
    width = playground.field("Width")
    playground.expect(width).to_have_attribute("aria-invalid", "true")
    playground.expect(width).to_be_focused()
    playground.expect(width).to_have_accessible_description(re.compile("65 is no multiple of 8"))
    playground.screenshot("error")
    width.fill("64")
    playground.expect(width).not_to_have_attribute("aria-invalid", "true")
    playground.fill(Steps=LONG + 1)
    playground.page.keyboard.press("Control+Enter")
    playground.expect(playground.field("Steps")).to_have_accessible_description(f"Give 1 to {LONG}.")
    assert len(playground.sent()) == 2, "what cannot be right is not sent"
    playground.fill(Steps=4)
    playground.page.route(ROUTE, lambda route: route.abort())
    playground.page.keyboard.press("Control+Enter")
    playground.expect(playground.status).to_contain_text("cannot be reached")
    playground.page.unroute(ROUTE)
    playground.generate()


def test_the_policy_is_in_force(browser: "Browser", server: Running) -> None:
    assert httpx2.get(server.url).headers["content-security-policy"] == CONTENT_POLICY
    playground = Playground(browser, server.url).open()
    playground.page.evaluate("document.body.setAttribute('style', 'color: red')")
    wait_for(lambda: playground.complaints, "what the console says of an inline style")
    with pytest.raises(AssertionError, match="style-src"):
        playground.close()
