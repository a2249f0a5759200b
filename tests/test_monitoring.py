"""Dashboard, alerts and autoscaling ask for metrics that the server has, and treat them as what they are."""

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import Counter, Gauge, Histogram

from emag_export.serve.metrics import METRICS as EXPOSED
from emag_export.serve.metrics import Metrics
from tests.promql import Metric, faults

DEPLOY = Path(__file__).parent.parent / "deploy"
DASHBOARD = DEPLOY / "grafana" / "emag-export.json"


def metric(type_: str, *labels: str) -> Metric:
    return Metric(type_, frozenset(labels))


METRICS = {
    "emag_requests_total": metric("counter", "model", "outcome"),
    "emag_rejected_total": metric("counter", "model", "reason"),
    "emag_images_total": metric("counter", "model", "guidance"),
    "emag_queue_images": metric("gauge", "model"),
    "emag_live_images": metric("gauge", "model"),
    "emag_call_seconds": metric("histogram", "model", "phase"),
    "emag_call_images": metric("histogram", "model"),
    "emag_scheduler_seconds_total": metric("counter", "model"),
    "emag_request_seconds": metric("histogram", "model"),
    "emag_queue_seconds": metric("histogram", "model"),
    "emag_first_preview_seconds": metric("histogram", "model"),
    "emag_encode_seconds": metric("histogram", "model"),
    "emag_decode_seconds": metric("histogram", "model"),
    "emag_engine_failures_total": metric("counter", "model"),
    "emag_engine_reopened_total": metric("counter", "model"),
    "emag_ready": metric("gauge", "model"),
    "emag_draining": metric("gauge"),
    "emag_open_streams": metric("gauge"),
    "emag_build_info": metric("gauge", "version"),
    "emag_retry_after_seconds": metric("gauge", "model"),
}
"""What monitoring relies on. The server may have more."""

FROM_PROMETHEUS = {"up": metric("gauge")}


def dashboard() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(DASHBOARD.read_text("utf-8"))
    return found


def rules() -> list[dict[str, Any]]:
    groups = yaml.safe_load((DEPLOY / "prometheus-rules.yaml").read_text("utf-8"))["groups"]
    return [rule for group in groups for rule in group["rules"]]


def adapter_rule() -> dict[str, Any]:
    values = yaml.safe_load((DEPLOY / "kubernetes" / "prometheus-adapter.yaml").read_text("utf-8"))
    (rule,) = values["rules"]["custom"]
    found: dict[str, Any] = rule
    return found


def expressions() -> Iterator[tuple[str, str]]:
    """Where it stands, and the expression with every variable filled in."""
    for panel in dashboard()["panels"]:
        for target in panel.get("targets", ()):
            text = target["expr"].replace("$__rate_interval", "1m")
            yield f"panel {panel['title']}, {target['refId']}", re.sub(r"\$\w+", ".*", text)
    for variable in dashboard()["templating"]["list"]:
        if variable["type"] == "query":
            found = re.fullmatch(r"label_values\((\w+), (\w+)\)", variable["query"]["query"])
            assert found, variable
            yield f"variable {variable['name']}", f"sum by ({found[2]}) ({found[1]})"
    for rule in rules():
        yield f"alert {rule['alert']}", rule["expr"]
    rule = adapter_rule()
    yield "adapter, series", rule["seriesQuery"]
    filled = rule["metricsQuery"].replace("<<.Series>>", rule["name"]["as"])
    filled = filled.replace("<<.LabelMatchers>>", 'namespace="n"').replace("<<.GroupBy>>", "pod")
    yield "adapter, values", filled


EXPRESSIONS = dict(expressions())


@pytest.mark.parametrize("place", EXPRESSIONS)
def test_an_expression_fits_the_metrics(place: str) -> None:
    assert faults(EXPRESSIONS[place], METRICS | FROM_PROMETHEUS) == []


@pytest.mark.parametrize(
    ("expression", "fault"),
    [
        ("sum(rate(emag_request_total[1m]))", "does not exist"),
        ("sum(emag_requests_total)", "only ever grows"),
        ("rate(emag_queue_images[1m])", "is a gauge"),
        ("emag_queue_images[1m]", "do not go together"),
        ("avg_over_time(emag_queue_images)", "do not go together"),
        ("rate(emag_request_seconds[1m])", "is a histogram"),
        ("emag_request_seconds_sum / emag_request_seconds_count", "only ever grows"),
        (
            "histogram_quantile(0.9, sum by (model) (rate(emag_request_seconds_bucket[1m])))",
            "needs the label le",
        ),
        ("histogram_quantile(0.9, sum by (le) (rate(emag_request_seconds_sum[1m])))", "takes buckets"),
        ("sum by (le) (rate(emag_request_seconds_bucket[1m]))", "nothing else does"),
        ('rate(emag_requests_total{reason="x"}[1m])', "no label reason"),
        ("sum by (phase) (emag_ready)", "no label phase"),
        ("rate(emag_requests_total_bucket[1m])", "does not exist"),
        ("1 + 1", "takes no series"),
    ],
)
def test_a_wrong_expression_is_found(expression: str, fault: str) -> None:
    assert any(fault in found for found in faults(expression, METRICS)), faults(expression, METRICS)


def test_the_server_has_these_metrics() -> None:
    assert {name: EXPOSED.get(name) for name in METRICS} == {name: row.type for name, row in METRICS.items()}


def test_the_metrics_have_these_labels() -> None:
    """An instrument refuses a set of labels that is not its own."""
    checked = set()
    for instrument in vars(Metrics()).values():
        if isinstance(instrument, (Counter, Gauge, Histogram)):
            (family,) = instrument.describe()
            name = f"{family.name}_total" if isinstance(instrument, Counter) else family.name
            if labels := METRICS[name].labels:
                instrument.labels(**dict.fromkeys(labels, "x"))
            checked.add(name)
    assert len(checked) > 12


def test_the_dashboard_shows_every_metric() -> None:
    text = DASHBOARD.read_text("utf-8")
    assert [name for name in EXPOSED if name not in text] == []


def test_panels_neither_overlap_nor_leave_the_grid() -> None:
    cells: dict[tuple[int, int], str] = {}
    for panel in dashboard()["panels"]:
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= 24, panel["title"]
        for x in range(at["x"], at["x"] + at["w"]):
            for y in range(at["y"], at["y"] + at["h"]):
                assert cells.setdefault((x, y), panel["title"]) == panel["title"]
    identities = [panel["id"] for panel in dashboard()["panels"]]
    assert len(set(identities)) == len(identities)


def test_every_panel_says_what_it_shows_and_asks_the_chosen_source() -> None:
    known = {variable["name"] for variable in dashboard()["templating"]["list"]} | {"__rate_interval"}
    for panel in dashboard()["panels"]:
        if panel["type"] == "row":
            continue
        assert panel["description"], panel["title"]
        for part in (panel, *panel["targets"]):
            assert part["datasource"] == {"type": "prometheus", "uid": "${datasource}"}, panel["title"]
        for target in panel["targets"]:
            assert set(re.findall(r"\$(\w+)", target["expr"])) <= known, target["expr"]


def test_an_alert_says_what_happened_and_what_to_do() -> None:
    assert {rule["alert"] for rule in rules()} == {
        "EmagNoServer",
        "EmagUnreachable",
        "EmagNotReady",
        "EmagRequestsFail",
        "EmagDeadlinesPass",
        "EmagQueueFull",
        "EmagEngineFails",
    }
    for rule in rules():
        assert rule["labels"]["severity"] in ("warning", "critical")
        assert rule["annotations"].keys() == {"summary", "description"}
        used = set(re.findall(r"\$labels\.(\w+)", rule["annotations"]["summary"]))
        by = re.search(r"by \(([^)]*)\)", rule["expr"])
        assert by is None or used <= set(re.findall(r"\w+", by[1])), rule["alert"]


def test_the_autoscaler_asks_for_what_the_adapter_offers() -> None:
    path = DEPLOY / "kubernetes" / "base" / "horizontalpodautoscaler.yaml"
    (asked,) = yaml.safe_load(path.read_text("utf-8"))["spec"]["metrics"]
    assert asked["type"] == "Pods"
    assert asked["pods"]["metric"]["name"] == adapter_rule()["name"]["as"]
    assert METRICS[asked["pods"]["metric"]["name"]].type == "gauge"


def test_prometheus_shows_the_key_and_reads_the_rules() -> None:
    config = yaml.safe_load((DEPLOY / "prometheus.yaml").read_text("utf-8"))
    (job,) = config["scrape_configs"]
    assert job["authorization"]["type"] == "Bearer"
    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text("utf-8"))
    (secret,) = compose["services"]["prometheus"]["secrets"]
    assert job["authorization"]["credentials_file"] == f"/run/secrets/{secret}"
    assert all((DEPLOY / name).exists() for name in config["rule_files"])
    (search,) = job["dns_sd_configs"]
    assert set(search["names"]) <= compose["services"].keys()
    named = {name for rule in rules() for name in re.findall(r'job="([^"]+)"', rule["expr"])}
    assert named == {job["job_name"]}


@pytest.mark.skipif(
    shutil.which("promtool") is None, reason="promtool, a part of Prometheus, is not installed"
)
def test_prometheus_accepts_the_rules() -> None:
    for command in (
        ("check", "rules", "prometheus-rules.yaml"),
        ("test", "rules", "prometheus-rules-test.yaml"),
    ):
        done = subprocess.run(["promtool", *command], cwd=DEPLOY, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
