"""Alert rules and dashboard, judged by Prometheus itself."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from rampart.handlers.telemetry import declared

DEPLOY = Path("deploy")
RULES = DEPLOY / "prometheus" / "rampart.rules.yml"
DASHBOARD = DEPLOY / "grafana" / "rampart.json"
promtool = pytest.mark.skipif(not shutil.which("promtool"), reason="needs promtool of Prometheus")


def judged(*words: object) -> None:
    done = subprocess.run(["promtool", *map(str, words)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def queries() -> list[str]:
    panels = json.loads(DASHBOARD.read_text())["panels"]
    return [target["expr"] for panel in panels for target in panel["targets"]]


@promtool
def test_alerts_fire_when_they_should_and_only_then() -> None:
    judged("check", "rules", RULES)
    judged("test", "rules", RULES.with_name("rampart.test.yml"))


@promtool
def test_every_query_of_the_dashboard_is_one_that_prometheus_takes(tmp_path: Path) -> None:
    filled = [query.replace("$model", "m").replace("$__rate_interval", "5m") for query in queries()]
    rules = [{"record": f"panel:{i}", "expr": query} for i, query in enumerate(filled)]
    file = tmp_path / "panels.yml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": rules}]}))
    judged("check", "rules", file)


@promtool
def test_what_the_adapter_asks_is_a_query_that_prometheus_takes(tmp_path: Path) -> None:
    values = yaml.safe_load(RULES.with_name("adapter.yaml").read_text())
    (rule,) = values["rules"]["custom"]
    series = rule["seriesQuery"].partition("{")[0]
    filled = (
        rule["metricsQuery"]
        .replace("<<.Series>>", series)
        .replace("<<.LabelMatchers>>", 'namespace="rampart",pod=~"a|b"')
        .replace("<<.GroupBy>>", "pod")
    )
    assert "<<" not in filled and series in filled
    for i, query in enumerate((filled, rule["seriesQuery"])):
        file = tmp_path / f"{i}.yml"
        rules = [{"record": "asked:1", "expr": query}]
        file.write_text(yaml.safe_dump({"groups": [{"name": "adapter", "rules": rules}]}))
        judged("check", "rules", file)


def test_rules_and_dashboard_speak_of_metrics_that_there_are() -> None:
    known = {name for kind in declared().values() for name in kind}
    text = RULES.read_text() + "".join(queries())
    named = set(re.findall(r"rampart_\w+", text))
    assert named <= known and len(named) >= 8
    unseen = known - named - {f"rampart_{n}" for n in ("p_value_sum", "p_value_count")}
    assert unseen == {
        "rampart_stage_seconds_sum",
        "rampart_stage_seconds_count",
        "rampart_batch_images_bucket",
    }
