"""The files of docs/serving: what they name exists in the server, and their shape is what their readers expect."""

from __future__ import annotations

import configparser
import importlib
import json
import re
import shutil
import subprocess
from typing import Any

import pytest

from cuplama.cli.main import cli
from cuplama.engine.stats import EngineStats
from cuplama.server.endpoints import ENDPOINTS
from cuplama.server.limits import Limits
from cuplama.server.metrics import Metrics
from tests.paths import ROOT
from tests.server.live import Live

FOLDER = ROOT / "docs" / "serving"
yaml: Any = importlib.import_module("yaml")  # huggingface_hub brings it, without types


def board() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((FOLDER / "grafana" / "cuplama.json").read_text())
    return found


def expressions() -> list[tuple[str, str]]:
    """Title of the panel and PromQL expression of everything that the board asks for."""
    return [(panel["title"], target["expr"]) for panel in board()["panels"] for target in panel["targets"]]


def options(text: str) -> set[str]:
    return set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text))


def test_every_metric_of_the_board_is_one_of_the_server() -> None:
    metrics = Metrics("m", EngineStats)
    metrics.ended("stop")
    samples = {
        (sample.name, label)
        for family in metrics.registry.collect()
        for sample in family.samples
        for label in sample.labels
    }
    names, labels = {name for name, _ in samples}, {label for _, label in samples} | {"instance"}
    for title, expression in expressions():
        used = re.findall(r"cuplama:\w+", expression)
        assert used, title
        assert not set(used) - names, f"{title}: the server has no {set(used) - names}"
        by = {label for group in re.findall(r"by \(([^)]*)\)", expression) for label in re.split(r",\s*", group)}
        assert by <= labels, title
    asked = {name for _, expression in expressions() for name in re.findall(r"cuplama:\w+", expression)}
    wanted = ["num_requests_running", "num_requests_waiting", "generation_tokens_total", "kv_cache_usage_perc"]
    wanted += ["time_to_first_token_seconds_bucket", "inter_token_latency_seconds_bucket", "prefix_cache_hits_total"]
    assert {f"cuplama:{name}" for name in (*wanted, "num_preemptions_total")} <= asked


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_every_curl_line_of_the_page_works(live: Live) -> None:
    page = (ROOT / "docs" / "serving.md").read_text()
    blocks = [block for block in re.findall(r"^```sh\n(.*?)^```", page, re.M | re.S) if "curl $U" in block]
    said = "".join(blocks)
    program = re.sub(r"^U=\S+;", f"U={live.url};", said, count=1, flags=re.M)
    shown = (
        "curl() { command curl --silent --max-time 20 --output /dev/null --write-out '%{http_code} %{url}\\n' \"$@\"; }"
    )
    done = subprocess.run(["bash", "-c", f"{shown}\n{program}"], capture_output=True, text=True, check=False)
    answers = done.stdout.splitlines()
    assert len(answers) == said.count("\ncurl ") + said.startswith("curl "), done.stderr
    assert [answer for answer in answers if not answer.startswith("200 ")] == []
    named = set(re.findall(r"curl (?:-N )?\$U(/[\w/.]+)", said))
    assert {endpoint.path for endpoint in ENDPOINTS if "{" not in endpoint.path} - named <= {"/", "/ping", "/v1/health"}


def test_options_in_the_page_exist() -> None:
    page = (ROOT / "docs" / "serving.md").read_text()
    serve = cli.commands["serve"]
    known = {option for param in serve.params for option in (*param.opts, *param.secondary_opts)}
    lines = [line for line in page.splitlines() if "cuplama serve" in line or line.startswith("| `-")]
    assert {o for line in lines for o in options(line)} <= known
    table = {option for line in lines if line.startswith("| `-") for option in options(line)}
    own = {"--host", "--port", "--api-key", "--served-model-name", "--max-running", "--max-waiting", "--cache-tokens"}
    assert own | {"--limit", "--drain-seconds", "--cors", "--log-prompts"} <= table


def test_limits_and_metrics_in_the_page_exist() -> None:
    page = (ROOT / "docs" / "serving.md").read_text()
    limits, metrics = (page.split(f"\n## {name}\n")[1].split("\n## ")[0] for name in ("Limits", "Metrics"))
    rows = re.findall(r"^\| (`.*?`) \|", limits, re.M)
    assert {name for row in rows for name in re.findall(r"`(\w+)`", row)} == set(Limits.__dataclass_fields__)
    known = {family.name for family in Metrics("m", EngineStats).registry.collect()}
    rows = re.findall(r"^\| (`.*?`) \|", metrics, re.M)
    named = {name.removesuffix("_total") for row in rows for name in re.findall(r"`(\w+)`", row)}
    assert {f"cuplama:{name}" for name in named} <= known


def test_the_board_has_the_shape_that_grafana_reads() -> None:
    found = board()
    assert {"uid", "title", "schemaVersion", "panels", "templating", "time"} <= found.keys()
    assert len({panel["id"] for panel in found["panels"]}) == len(found["panels"])
    places = set[tuple[int, int]]()
    for panel in found["panels"]:
        assert {"type", "title", "description", "datasource", "gridPos", "fieldConfig", "targets"} <= panel.keys()
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert not cells & places, f"{panel['title']} lies over another panel"
        places |= cells
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])
    variables = {variable["name"] for variable in found["templating"]["list"]}
    assert set(re.findall(r"\$\{?(\w+)", json.dumps(found))) - {"__rate_interval", "__all"} <= variables


@pytest.mark.parametrize("title", ["First token", "Between tokens", "Whole request"])
def test_latencies_are_shown_at_three_percentiles(title: str) -> None:
    found = [expression for name, expression in expressions() if name == title]
    assert [re.findall(r"histogram_quantile\(([\d.]+),", e) for e in found] == [["0.5"], ["0.95"], ["0.99"]]


def test_the_compose_file_mounts_what_is_there() -> None:
    found = yaml.safe_load((FOLDER / "compose.yaml").read_text())
    assert found["services"].keys() == {"cuplama", "prometheus", "grafana"}
    named = {volume.split(":")[0] for service in found["services"].values() for volume in service["volumes"]}
    files, volumes = {n for n in named if n.startswith("./")}, {n for n in named if not n.startswith("./")}
    assert all((FOLDER / name).is_file() for name in files)
    assert volumes == set(found["volumes"])
    build = found["services"]["cuplama"]["build"]
    assert (FOLDER / build["context"]).resolve() == ROOT
    assert (ROOT / build["dockerfile"]).is_file()
    published = [port for service in found["services"].values() for port in service.get("ports", ())]
    assert published
    assert all(port.startswith("127.0.0.1:") for port in published)


def test_prometheus_asks_the_server_of_the_compose_file() -> None:
    (job,) = yaml.safe_load((FOLDER / "prometheus.yml").read_text())["scrape_configs"]
    assert job["static_configs"] == [{"targets": ["cuplama:8000"]}]
    assert job.get("metrics_path", "/metrics") in {endpoint.path for endpoint in ENDPOINTS}
    compose = yaml.safe_load((FOLDER / "compose.yaml").read_text())
    (secret,) = compose["services"]["prometheus"]["secrets"]
    assert job["authorization"]["credentials_file"] == f"/run/secrets/{secret}"
    variable = compose["secrets"][secret]["environment"]
    assert variable in compose["services"]["cuplama"]["environment"]
    assert variable in {param.envvar for param in cli.commands["serve"].params}


def test_grafana_finds_prometheus_and_the_board() -> None:
    (source,) = yaml.safe_load((FOLDER / "grafana" / "datasources.yml").read_text())["datasources"]
    assert (source["type"], source["url"]) == ("prometheus", "http://prometheus:9090")
    (provider,) = yaml.safe_load((FOLDER / "grafana" / "dashboards.yml").read_text())["providers"]
    mounts = yaml.safe_load((FOLDER / "compose.yaml").read_text())["services"]["grafana"]["volumes"]
    assert f"./grafana/cuplama.json:{provider['options']['path']}/cuplama.json:ro" in mounts


def test_the_image_starts_the_server_as_nobody_special() -> None:
    text = (FOLDER / "Dockerfile").read_text()
    assert re.search(r"^USER cuplama$", text, re.M)
    (entry,) = re.findall(r"^ENTRYPOINT (\[.*\])$", text, re.M)
    program, command, *rest = json.loads(entry)
    assert (program, command) == ("cuplama", "serve")
    known = {option for param in cli.commands["serve"].params for option in param.opts}
    assert {word for word in rest if word.startswith("--")} <= known
    (check,) = re.findall(r"^HEALTHCHECK .*\\\n\s+CMD (\[.*\])$", text, re.M)
    path = re.search(r"http://127\.0\.0\.1:8000(/\w+)", json.loads(check)[2])
    assert path is not None
    assert path[1] in {endpoint.path for endpoint in ENDPOINTS if endpoint.open}
    ignored = (FOLDER / "Dockerfile.dockerignore").read_text().split()
    assert all((ROOT / line[1:]).exists() for line in ignored if line.startswith("!"))


def test_the_unit_starts_the_server_and_waits_for_its_end() -> None:
    unit = configparser.ConfigParser(strict=False, interpolation=None, comment_prefixes=("#",))
    unit.optionxform = str  # type: ignore[assignment, method-assign]
    unit.read(FOLDER / "cuplama.service")
    service = unit["Service"]
    assert " serve " in service["ExecStart"]
    known = {option for param in cli.commands["serve"].params for option in param.opts}
    assert options(service["ExecStart"]) <= known
    drain = next(param.default for param in cli.commands["serve"].params if param.name == "drain_seconds")
    assert isinstance(drain, int)
    assert int(service["TimeoutStopSec"]) > drain
    assert service["NoNewPrivileges"] == "yes"
