"""Exposition: valid for the parsers of Prometheus and prometheus_client, and the values are those collected."""

from __future__ import annotations

import json
import math
import subprocess
from collections.abc import Iterable, Iterator
from types import SimpleNamespace
from typing import Any

import prometheus_client
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client.metrics_core import Metric
from prometheus_client.openmetrics import parser as openmetrics_parser
from prometheus_client.parser import text_string_to_metric_families

from llm_router import families
from llm_router.observe.metrics.exposition import Renderer, escape_label, format_value, negotiate, render, render_json
from llm_router.observe.metrics.slots import Collected, Exemplar, FamilyRows, Reader, Row, Segment, Writer
from llm_router.signals import Family, Reading, View
from support.fuzz import examples
from support.tools import require

REQUESTS = Family("requests_total", "counter", ("model", "status"), 'Requests, "all"\nof\\them.')
SECONDS = Family("wait_seconds", "histogram", ("model",), "Seconds.", (0.5, 60.0), "seconds")
UP = Family("up_ratio", "gauge", (), "Up.")


def parse(text: bytes, *, openmetrics: bool = False) -> dict[str, Metric]:
    """What prometheus_client's parser of the format makes of it, by name."""
    read: Any = openmetrics_parser.text_string_to_metric_families if openmetrics else text_string_to_metric_families
    return {family.name: family for family in read(text.decode())}


def collected(*rows: tuple[Family, list[Row]]) -> Collected:
    return Collected([FamilyRows(family, list(members)) for family, members in rows])


EXAMPLE = collected(
    (REQUESTS, [Row(("a", "ok"), [3.0]), Row(('b"\\\n', "ok"), [0.5])]),
    (SECONDS, [Row(("a%d",), [1.0, 2.0, 0.0, 61.5], (None, Exemplar('trace_id="1"', 59.5, 1700000000.25), None))]),
    (UP, [Row((), [math.nan])]),
)


def test_the_text_format_to_the_letter() -> None:
    assert render(EXAMPLE).decode() == (
        '# HELP requests_total Requests, "all"\\nof\\\\them.\n'
        "# TYPE requests_total counter\n"
        'requests_total{model="a",status="ok"} 3.0\n'
        'requests_total{model="b\\"\\\\\\n",status="ok"} 0.5\n'
        "# HELP wait_seconds Seconds.\n"
        "# TYPE wait_seconds histogram\n"
        'wait_seconds_bucket{model="a%d",le="0.5"} 1.0\n'
        'wait_seconds_bucket{model="a%d",le="60.0"} 3.0\n'
        'wait_seconds_bucket{model="a%d",le="+Inf"} 3.0\n'
        'wait_seconds_sum{model="a%d"} 61.5\n'
        'wait_seconds_count{model="a%d"} 3.0\n'
        "# HELP up_ratio Up.\n"
        "# TYPE up_ratio gauge\n"
        "up_ratio NaN\n"
    )


def test_openmetrics_to_the_letter() -> None:
    assert render(EXAMPLE, openmetrics=True).decode() == (
        '# HELP requests Requests, \\"all\\"\\nof\\\\them.\n'
        "# TYPE requests counter\n"
        'requests_total{model="a",status="ok"} 3.0\n'
        'requests_total{model="b\\"\\\\\\n",status="ok"} 0.5\n'
        "# HELP wait_seconds Seconds.\n"
        "# TYPE wait_seconds histogram\n"
        "# UNIT wait_seconds seconds\n"
        'wait_seconds_bucket{model="a%d",le="0.5"} 1.0\n'
        'wait_seconds_bucket{model="a%d",le="60.0"} 3.0 # {trace_id="1"} 59.5 1700000000.250\n'
        'wait_seconds_bucket{model="a%d",le="+Inf"} 3.0\n'
        'wait_seconds_sum{model="a%d"} 61.5\n'
        'wait_seconds_count{model="a%d"} 3.0\n'
        "# HELP up_ratio Up.\n"
        "# TYPE up_ratio gauge\n"
        "up_ratio NaN\n"
        "# EOF\n"
    )


def test_json_is_as_prom_client_gives_it() -> None:
    document = json.loads(render_json(EXAMPLE))
    assert [family["name"] for family in document] == ["requests_total", "wait_seconds", "up_ratio"]
    assert document[0]["values"][0] == {"labels": {"model": "a", "status": "ok"}, "value": 3.0}
    assert document[1]["type"] == "histogram"
    assert document[1]["values"][2:] == [
        {"labels": {"le": "+Inf", "model": "a%d"}, "value": 3.0, "metricName": "wait_seconds_bucket"},
        {"labels": {"model": "a%d"}, "value": 61.5, "metricName": "wait_seconds_sum"},
        {"labels": {"model": "a%d"}, "value": 3.0, "metricName": "wait_seconds_count"},
    ]
    assert document[2]["values"] == [{"labels": {}, "value": None}]


SENT_BY_PROMETHEUS_2 = (
    "application/openmetrics-text;version=1.0.0,application/openmetrics-text;version=0.0.1;q=0.75,"
    "text/plain;version=0.0.4;q=0.5,*/*;q=0.1"
)
SENT_BY_PROMETHEUS_3 = (
    "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.6,"
    "text/plain;version=1.0.0;escaping=allow-utf-8;q=0.5,text/plain;version=0.0.4;q=0.4,*/*;q=0.3"
)


@pytest.mark.parametrize(
    ("accept", "openmetrics"),
    (
        ("", False),
        ("*/*", False),
        ("text/html", False),
        ("text/plain;version=0.0.4", False),
        ("application/openmetrics-text", True),
        ("application/openmetrics-text; version=1.0.0; charset=utf-8", True),
        ("application/openmetrics-text;version=1.0.0;q=0.1,text/plain;version=0.0.4;q=0.2", False),
        ("application/openmetrics-text;q=0", False),
        ("application/openmetrics-text;q=x", False),
        (SENT_BY_PROMETHEUS_2, True),
        (SENT_BY_PROMETHEUS_3, True),
    ),
)
def test_the_format_is_the_one_that_is_accepted(accept: str, openmetrics: bool) -> None:
    assert negotiate(accept) is openmetrics


@given(st.floats())
def test_values_read_back_as_they_were(value: float) -> None:
    read = float(format_value(value))
    assert read == value or (math.isnan(read) and math.isnan(value))


# Prometheus separates lines by \n only; python's parsers split at more, which Prometheus would not.
labels = st.text(st.characters(codec="utf-8", exclude_characters="\x0b\x0c\r\x1c\x1d\x1e\x85\u2028\u2029"), max_size=12)
numbers = st.floats(0, 1e12)


@settings(max_examples=examples(60))
@given(
    counters=st.dictionaries(st.tuples(labels, labels), numbers, max_size=5),
    histograms=st.dictionaries(labels, st.lists(st.integers(0, 10**9), min_size=3, max_size=3), max_size=4),
    openmetrics=st.booleans(),
)
def test_parsers_read_back_what_was_collected(
    counters: dict[tuple[str, str], float], histograms: dict[str, list[int]], openmetrics: bool
) -> None:
    """Whatever label values contain, in both formats, rendered afresh and from what is kept."""
    rows = [Row(key, [value]) for key, value in counters.items()]
    waits = [Row((key,), [*map(float, counts), 7.5]) for key, counts in histograms.items()]
    renderer = Renderer()
    for _ in range(2):
        text = renderer.render(collected((REQUESTS, rows), (SECONDS, waits)), openmetrics=openmetrics)
        found = parse(text, openmetrics=openmetrics)
        samples = {(s.labels["model"], s.labels["status"]): s.value for s in found["requests"].samples}
        assert samples == counters
        assert found["wait_seconds"].type == "histogram"
        for sample in found["wait_seconds"].samples:
            counts = histograms[sample.labels["model"]]
            expected = {"wait_seconds_sum": 7.5, "wait_seconds_count": sum(counts)}
            if sample.name == "wait_seconds_bucket":
                position = ("0.5", "60.0", "+Inf").index(sample.labels["le"])
                assert sample.value == sum(counts[: position + 1])
            else:
                assert sample.value == expected[sample.name]


@given(st.text())
def test_escaped_labels_stay_on_one_line(value: str) -> None:
    escaped = escape_label(value)
    assert "\n" not in escaped
    assert '"' not in escaped.replace("\\\\", "").replace('\\"', "")


def test_series_that_left_are_forgotten() -> None:
    renderer = Renderer()
    for turn in range(10):
        renderer.render(collected((REQUESTS, [Row((f"m{turn}-{n}", "ok"), [1.0]) for n in range(100)])))
    assert len(renderer._texts[REQUESTS]._rows) <= 2 * 100 + 64


# -- views


def test_a_view_sums_filters_and_scales() -> None:
    views = (
        View("by_model_total", REQUESTS, (("name", "model"),), "By model."),
        View("ok_total", REQUESTS, (), "Good ones.", where=(("status", "ok"),)),
        View("up_percent", UP, (), "Percent.", 100.0),
        View("view_seconds", SECONDS, (), "All."),
        View("up_ratio", UP, (), "A family of this name is there already."),
    )
    waits = [
        Row((name,), [1.0, 0.0, 1.0, 90.0], (Exemplar("", 0.1, at), None, None))
        for name, at in (("a", 1.0), ("b", 2.0))
    ]
    source = collected(
        (REQUESTS, [Row(("b", "ok"), [1.0]), Row(("a", "ok"), [2.0]), Row(("a", "no"), [4.0])]),
        (SECONDS, waits),
        (UP, [Row((), [0.25])]),
    )
    renderer = Renderer(views)
    for _ in range(2):
        assert {rows.family.name: rows.rows for rows in renderer.views(source)} == {
            "by_model_total": [(("a",), [6.0], ()), (("b",), [1.0], ())],
            "ok_total": [((), [3.0], ())],
            "up_percent": [((), (25.0,), ())],
            "view_seconds": [((), [2.0, 0.0, 2.0, 180.0], (Exemplar("", 0.1, 2.0), None, None))],
        }
    assert renderer.render(source).count(b"# TYPE up_ratio") == 1
    with pytest.raises(ValueError, match="cannot be scaled"):
        Renderer([View("x", SECONDS, (), "", 2.0)])


# -- the families of this project


def everything() -> Collected:
    """Each declared family with two rows, those of gauges as readings."""
    segment = Segment.private()
    writer = Writer(segment, families.FAMILIES, dropped=families.SERIES_DROPPED)
    readings = []
    for family in families.FAMILIES:
        for n in range(2 if family.labels else 1):
            values = tuple(f"{label}-{n}" for label in family.labels)
            if family.type == "counter":
                writer.counter(family, *values).inc(n + 1)
            elif family.type == "histogram":
                writer.histogram(family, *values).observe_with_exemplar(n + 0.1, 'trace_id="abc"', 1.7e9)
            else:
                readings.append(Reading(family, values, n / 2))
    return Reader([segment], families.FAMILIES).collect(readings)


def test_every_declared_family_and_view_is_shown_and_parses() -> None:
    renderer = Renderer(families.GUIDE_VIEWS)
    names = [f.name for f in families.FAMILIES] + [view.name for view in families.GUIDE_VIEWS]
    declared = {name.removesuffix("_total") for name in names}
    for source in (everything(), Reader([], families.FAMILIES).collect()):
        for openmetrics in (False, True):
            text = renderer.render(source, openmetrics=openmetrics)
            assert parse(text, openmetrics=openmetrics).keys() == declared


def test_exemplars_parse() -> None:
    parsed = parse(render(everything(), openmetrics=True), openmetrics=True)
    buckets = [s for s in parsed["llm_router_overhead_seconds"].samples if s.exemplar]
    assert [(s.labels["le"], s.exemplar.labels, s.exemplar.value) for s in buckets if s.exemplar] == [
        ("+Inf", {"trace_id": "abc"}, 0.1)
    ]


@pytest.mark.parametrize("filled", (True, False))
def test_promtool_finds_nothing_to_complain_about_in_canonical_names(filled: bool) -> None:
    """The guide's own names may break lint rules; they are its contract."""
    source = everything() if filled else Reader([], families.FAMILIES).collect()
    text = render(source, views=families.GUIDE_VIEWS)
    checked = subprocess.run([require("promtool"), "check", "metrics"], input=text, capture_output=True, check=False)
    complaints = [line for line in (checked.stdout + checked.stderr).decode().splitlines() if line]
    guide = {view.name for view in families.GUIDE_VIEWS}
    assert [line for line in complaints if line.split()[0] not in guide] == []
    assert checked.returncode in (0, 3)  # 3: lint only


# -- collectors of users


def test_families_of_prometheus_client_are_rendered_too() -> None:
    registry = prometheus_client.CollectorRegistry()
    prometheus_client.Counter("mine", "Mine.", ["who"], registry=registry).labels("me").inc(2, {"trace_id": "7"})
    prometheus_client.Histogram("mine_seconds", "Mine.", registry=registry, buckets=(1.0,)).observe(0.5)
    prometheus_client.Info("mine_build", "Mine.", registry=registry).info({"version": "1"})
    prometheus_client.Enum("mine_state", "Mine.", registry=registry, states=["on", "off"])
    prometheus_client.Summary("mine_size_bytes", "Mine.", registry=registry).observe(3)
    renderer = Renderer(collectors=[registry])
    text = parse(renderer.render(EXAMPLE))
    assert text["mine"].samples[0] == ("mine_total", {"who": "me"}, 2.0, None, None, None)
    assert (text["mine_build_info"].type, text["mine_state"].type, text["mine_created"].type) == ("gauge",) * 3
    openmetrics = parse(renderer.render(EXAMPLE, openmetrics=True), openmetrics=True)
    for family in registry.collect():
        assert openmetrics[family.name].type == family.type
        assert {(s.name, s.value) for s in openmetrics[family.name].samples} == {
            (s.name, s.value) for s in family.samples
        }
    exemplar = openmetrics["mine"].samples[0].exemplar
    assert exemplar is not None
    assert exemplar.labels == {"trace_id": "7"}
    assert {family["name"] for family in json.loads(renderer.render_json(EXAMPLE))} > {"mine", "mine_build"}
    renderer.unregister(registry)
    assert b"mine" not in renderer.render(EXAMPLE)


class Shaped:
    """Yields families in prometheus_client's shape without being of it."""

    def __init__(self, *names: str, fails: bool = False) -> None:
        self.names = names
        self.fails = fails

    def collect(self) -> Iterator[Any]:
        for name in self.names:
            sample = SimpleNamespace(name=name, labels={"n": 1}, value=1, timestamp=1.5, exemplar=None)
            yield SimpleNamespace(name=name, documentation="", type="unknown", unit="", samples=[sample])
        if self.fails:
            raise RuntimeError("broken")


def test_a_collector_that_fails_or_takes_our_names_costs_nothing_else(caplog: pytest.LogCaptureFixture) -> None:
    errors: list[Exception] = []
    collectors: Iterable[Any] = (Shaped("half", fails=True), Shaped("requests", "up_ratio", "free"), Shaped("free"))
    renderer = Renderer(collectors=collectors, on_collector_error=errors.append)
    text = renderer.render(EXAMPLE).decode()
    assert text == render(EXAMPLE).decode() + '# HELP free \n# TYPE free untyped\nfree{n="1"} 1.0 1500\n'
    assert [str(error) for error in errors] == ["broken"]
    assert "a registered metrics collector failed" in caplog.text
