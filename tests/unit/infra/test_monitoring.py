"""Every query of infra/monitoring asks for a metric that is exported, every metric is shown, and every call has one."""

import ast
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipelines.cluster.metrics import METRICS, observed, record

ROOT = Path(__file__).parents[3]
MONITORING = ROOT / "infra" / "monitoring"
EXPORTED = {ending: name for name, metric in METRICS.items() for ending in metric.exported(name)}


def queries() -> list[str]:
    dashboard = json.loads((MONITORING / "dashboard.json").read_text())
    shown = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    groups = yaml.safe_load((MONITORING / "alerts.yaml").read_text())["groups"]
    return shown + [rule["expr"] for group in groups for rule in group["rules"]]


@pytest.mark.parametrize("query", queries())
def test_a_query_asks_for_what_is_exported(query: str) -> None:
    asked = re.findall(r"\bray_\w+", query)
    assert asked
    assert set(asked) <= set(EXPORTED)
    known = {label for name in asked for label in METRICS[EXPORTED[name]].labels}
    grouped = {label.strip() for labels in re.findall(r"by \(([^)]*)\)", query) for label in labels.split(",")}
    compared = set(re.findall(r"[{,]\s*(\w+)\s*[=!]", query))
    assert grouped | compared <= known | {"le"}
    assert ("le" in grouped) == any(name.endswith("_bucket") for name in asked)


def test_every_metric_is_shown() -> None:
    asked = {EXPORTED[name] for query in queries() for name in re.findall(r"\bray_\w+", query)}
    assert asked == set(METRICS)


def recorded() -> set[str]:
    """The names in calls of `record`; an f-string counts for all that it can become."""
    names = set()
    for path in (ROOT / "pipelines").rglob("*.py"):
        for call in ast.walk(ast.parse(path.read_text())):
            if isinstance(call, ast.Call) and getattr(call.func, "id", "") in ("record", "record_metric"):
                name: Any = call.args[0]
                if isinstance(name, ast.Constant):
                    names.add(str(name.value))
                elif isinstance(name, ast.JoinedStr):
                    pattern = "".join(
                        re.escape(p.value) if isinstance(p, ast.Constant) else r"\w+" for p in name.values
                    )
                    names |= {known for known in METRICS if re.fullmatch(pattern, known)}
    return names


def test_every_metric_is_recorded_somewhere_and_no_other() -> None:
    assert recorded() == set(METRICS)


def test_the_rules_and_the_dashboard_are_where_prometheus_and_grafana_look() -> None:
    prometheus = yaml.safe_load((MONITORING / "prometheus.yaml").read_text())
    assert [(MONITORING / name).is_file() for name in prometheus["rule_files"]] == [True]
    dashboard = json.loads((MONITORING / "dashboard.json").read_text())
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])


def test_outside_ray_nothing_happens_and_messages_go_on() -> None:
    told: list[dict[str, Any]] = []
    tell = observed(told.append, lane="0")
    messages = [
        {"kind": "phase", "phase": "training", "time": 0.0, "start": 0, "workers": 1, "asked": 1},
        {"kind": "step", "metrics": {"step": 1, "images_per_second": 2.0}},
        {"kind": "checkpoint", "step": 1, "seconds": 0.1},
    ]
    for message in messages:
        tell(message)
    record("dreambooth_retries_total", 1, batch="dogs")
    assert told == messages
