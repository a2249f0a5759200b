"""What an operator sees of the server and sets: figures, logs, the page, settings, keys, bundles."""

import json
import logging
import re
from pathlib import Path
from typing import Any

import httpx2
import pytest

from emag_export.engines.config import EngineConfig
from emag_export.errors import InputError
from emag_export.runtime.batching.options import BatchingOptions
from emag_export.serve.metrics import METRICS, Metrics
from emag_export.serve.models import open_models
from emag_export.serve.settings import ServerSettings, read_keys
from tests.house import KEY, House, body, house, post, run
from tests.serving import PROMPT

__all__ = ["house"]


def test_figures_are_those_that_are_documented_and_move(house: House) -> None:
    def figures() -> dict[str, float]:
        lines = house.metrics.text().decode().splitlines()
        return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if line[0] != "#"}

    name = house.models[0].name
    before = figures()
    assert post(house, n=2, emag={"guidance": "cfg"}).status_code == 200
    after = figures()
    grown = {key: after[key] - before.get(key, 0.0) for key in after}
    assert grown[f'emag_images_total{{guidance="cfg",model="{name}"}}'] == 2
    assert grown[f'emag_requests_total{{model="{name}",outcome="completed"}}'] == 1
    assert grown[f'emag_call_seconds_count{{model="{name}",phase="plain"}}'] >= 4
    assert grown[f'emag_call_images_sum{{model="{name}"}}'] == 8
    for histogram in ("request", "queue", "encode", "decode"):
        assert grown[f'emag_{histogram}_seconds_count{{model="{name}"}}'] >= 1
    told = {}
    for line in house.metrics.text().decode().splitlines():
        if line.startswith("# TYPE "):
            _, _, family, kind = line.split(" ")
            told[family] = kind
    assert told == METRICS


def test_the_log_has_a_line_a_request_and_no_prompt(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[dict[str, Any]] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(getattr(record, "facts", {}))  # type: ignore[method-assign]
    logger = logging.getLogger("emag.access")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        post(house)
        app = house.restricted(log_prompts=True)

        async def ask() -> None:
            async with house.client(app=app) as client:
                await client.post("/v1/images/generations", json=body())

        run(ask())
    finally:
        logger.removeHandler(handler)
    assert lines[0]["status"] == 200 and lines[0]["model"] == house.models[0].name
    assert PROMPT not in json.dumps(lines[0]) and lines[1]["prompt"] == PROMPT


def test_the_page_may_load_nothing_from_elsewhere(house: House) -> None:
    async def ask() -> httpx2.Response:
        async with house.client() as client:
            return await client.get("/")

    answer = run(ask())
    policy = answer.headers["content-security-policy"]
    assert answer.status_code == 200 and "default-src 'none'" in policy and "unsafe" not in policy


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"host": "0.0.0.0"}, "no key was given"),
        ({"host": "::"}, "no key was given"),
        ({"host": "example.org"}, "no key was given"),
        ({"api_keys": ("short",)}, "a key has 5 characters"),
        ({"port": 70000}, "`port` is 70000"),
        ({"max_images": 0}, "`max_images` is 0"),
        ({"deadline": 0}, "`deadline` is 0"),
        ({"log_format": "xml"}, "choose text or json"),
    ],
)
def test_a_server_that_cannot_be_trusted_does_not_start(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        ServerSettings(**settings)


def test_a_public_address_needs_a_key_or_a_word() -> None:
    for given in ({"api_keys": (KEY,)}, {"insecure": True}):
        assert ServerSettings(host="0.0.0.0", **given).host == "0.0.0.0"
    for host in ("127.0.0.1", "::1", "localhost"):
        assert not ServerSettings(host=host).api_keys


def test_keys_come_from_a_file_and_the_environment(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text(f"# for the tests\n{KEY}\n\n")
    path.chmod(0o600)
    assert read_keys(path, {"EMAG_API_KEYS": f"one, {KEY} ,"}) == (("one", KEY), None)
    path.chmod(0o644)
    keys, warning = read_keys(path, {})
    assert keys == (KEY,) and warning is not None and "chmod 600" in warning
    path.write_text("# nothing\n")
    with pytest.raises(InputError, match="holds no key"):
        read_keys(path, {})
    with pytest.raises(InputError, match="cannot be read"):
        read_keys(tmp_path / "absent", {})


def test_two_bundles_of_one_name_are_refused(tiny_bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="two bundles are called"):
        open_models([tiny_bundle, tmp_path / tiny_bundle.name], EngineConfig(), BatchingOptions(), Metrics())


def test_every_figure_is_explained() -> None:
    guide = (Path(__file__).parent.parent / "docs" / "guides" / "serving.md").read_text("utf-8")
    assert dict(re.findall(r"^\| `(emag_\w+)` \| (\w+) \|", guide, re.MULTILINE)) == METRICS
