"""Dashboard and alerts use metrics that exist, and a real Ray exports exactly those metrics."""

import json
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from jobs.runtime.telemetry import BATCH_S, BEHIND, COUNTERS, GAUGES
from tests.cluster.manifests import CLUSTER, ROOT, containers, documents, every

MONITORING = CLUSTER / "monitoring"
ELSEWHERE = {"kube_cronjob_status_last_successful_time"}  # kube-state-metrics
# PromQL's own words; every other word of an expression, labels aside, is a metric.
WORDS = {
    *("absent_over_time", "and", "by", "histogram_quantile", "increase", "le", "max", "rate", "stage", "sum", "time"),
}

# Reports to a tally as workers do, on a separate Ray, until it exports the given metrics; prints them.
PROGRAM = """
import sys, time, urllib.request
import ray
from jobs.runtime.tally import Tally

port, names = int(sys.argv[1]), sys.argv[2:]
ray.init(address="local", num_cpus=2, include_dashboard=False, _metrics_export_port=port, log_to_driver=False)
tally = Tally.start()
model = {"seconds": 1.5, "waiting": 0.5, "tokens": 90}
for stage, unit, counts in (
    ("read", "a", {"rows": 10, "rejects": 2, "unreadable": 1}),
    ("compare", "0", {"known": 1, "new": 8, "edited": 1, "gone": 0}),
    ("encode", "u", {"rows": 9, **model}),
    ("encode", "u", {"rows": 9, **model}),  # the same block again, after a failure
    ("generate", "u", {"answers": 9, **model}),
    ("time", "since step 0", {"step": 3.0, "waiting": 1.0}),
    ("time", "since step 0", {"step": 5.0, "waiting": 1.0}),
    ("train", "now", {"step": 3, "of": 10, "loss": 1.0, "validation": 2.0, "requests_per_s": 4.0}),
    ("commit", "commit 1", {"new": 5, "edited": 1, "gone": 0, "rows": 6}),
):
    tally.note(stage, unit, counts)
text, until = "", time.monotonic() + 60
while time.monotonic() < until and not all(f"{name}{{" in text for name in names):
    time.sleep(0.5)
    try:
        text = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10).read().decode()
    except OSError:
        continue
print(text)
"""


def exported_names() -> set[str]:
    """The names under which Prometheus sees the metrics."""
    counters = {f"ray_{one.full_name}_total" for one in COUNTERS.values()}
    gauges = {f"ray_{one.full_name}" for one in [*GAUGES.values(), BEHIND]}
    return counters | gauges | {f"ray_{BATCH_S.full_name}_{part}" for part in ("bucket", "count", "sum")}


def queries() -> list[str]:
    dashboard = json.loads((MONITORING / "dashboard.json").read_text())
    alerts = documents(MONITORING / "rules.yaml")
    return [*every("expr", dashboard), *every("expr", alerts)]


def metrics_in(query: str) -> set[str]:
    bare = re.sub(r"\{.*?\}|\[.*?\]|\"[^\"]*\"", " ", query)
    return set(re.findall(r"\b[a-z_]{2,}\b", bare)) - WORDS


@pytest.mark.parametrize("query", queries())
def test_every_query_names_metrics_that_exist(query: str) -> None:
    found = metrics_in(query)
    assert found and not found - exported_names() - ELSEWHERE
    assert query.count("(") == query.count(")")


def test_every_metric_is_used() -> None:
    seen = {name for query in queries() for name in metrics_in(query)}
    parts = {"ray_persona_batch_seconds_count", "ray_persona_batch_seconds_sum"}  # the buckets are used
    assert exported_names() - parts <= seen


def test_every_alert_says_what_to_do() -> None:
    alerts = [rule for group in documents(MONITORING / "rules.yaml")[0]["spec"]["groups"] for rule in group["rules"]]
    names = {alert["alert"] for alert in alerts}
    assert {"PersonaRefreshLate", "PersonaManyRejects", "PersonaNoProgress"} <= names
    for alert in alerts:
        assert alert["annotations"].keys() == {"summary", "action"}
        assert alert["labels"]["severity"] in {"page", "ticket"}


def test_grafana_gets_the_dashboard_and_prometheus_the_port_that_pods_name() -> None:
    found = {one["kind"]: one for one in documents(MONITORING)}
    assert found.keys() == {"ConfigMap", "PodMonitor", "PrometheusRule"}
    assert json.loads(found["ConfigMap"]["data"]["dashboard.json"])["uid"] == "persona-plug"
    monitor = found["PodMonitor"]["spec"]
    (endpoint,) = monitor["podMetricsEndpoints"]
    for name, pod, container in containers():
        ports = {one["name"]: one["containerPort"] for one in container.get("ports", [])}
        assert ports.get(endpoint["port"], 8080) == 8080, name
        assert endpoint["port"] in ports or not container["name"].startswith("ray-"), pod


def test_panels_do_not_overlap() -> None:
    panels = json.loads((MONITORING / "dashboard.json").read_text())["panels"]
    cells = [
        (x, y)
        for at in (panel["gridPos"] for panel in panels)
        for x in range(at["x"], at["x"] + at["w"])
        for y in range(at["y"], at["y"] + at["h"])
    ]
    assert len(cells) == len(set(cells)) and max(x for x, _ in cells) < 24
    assert len({panel["id"] for panel in panels}) == len(panels)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    """What Ray exports of a run: metric names, with the stage if there is one, and their sums over all reporters."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    program: Path = tmp_path_factory.mktemp("metrics") / "program.py"
    program.write_text(PROGRAM)
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "RAY_AUTH_MODE": "disabled"}
    environment |= {"RAY_metrics_report_interval_ms": "1000", "RAY_USAGE_STATS_ENABLED": "0"}
    done = subprocess.run(
        [sys.executable, str(program), port, *exported_names()],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=180,
    )
    found: dict[str, Any] = {}
    for name, labels, value in re.findall(r"^(ray_persona_\w+)\{(.*)\} (\S+)$", done.stdout, re.MULTILINE):
        stage = re.search(r'stage="(\w+)"', labels)
        key = f"{name}/{stage[1]}" if stage else name
        found[key] = found.get(key, 0.0) + float(value)
    return found


def test_ray_exports_the_metrics_under_these_names(exported: dict[str, float]) -> None:
    assert {name.split("/")[0] for name in exported} == exported_names()


def test_the_metrics_are_what_was_noted_and_a_repeated_block_counts_once(exported: dict[str, float]) -> None:
    assert exported["ray_persona_behaviors_encoded_total"] == 9
    assert exported["ray_persona_behaviors_compared_total"] == 10
    assert exported["ray_persona_rows_rejected_total"] == 2
    assert exported["ray_persona_behaviors_behind"] == 3
    assert exported["ray_persona_model_seconds_total/encode"] == 1.5
    assert exported["ray_persona_model_seconds_total/train"] == 5.0
    assert exported["ray_persona_model_waiting_seconds_total/generate"] == 0.5
    assert exported["ray_persona_batch_seconds_count/encode"] == 1
    assert exported["ray_persona_train_held_out_loss"] == 2.0
