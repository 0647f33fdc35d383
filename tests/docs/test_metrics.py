"""The metrics reference is true: every family, label, closed value, bucket and view, and nothing else."""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

from llm_router import families
from llm_router.accounts.limits import KINDS, Scope
from llm_router.errors import FaultDomain
from llm_router.instruments import _METHODS
from llm_router.models.registry import FORMAT
from llm_router.processes.supervisor import RestartReason
from llm_router.routing.failures import RetryReason
from llm_router.routing.policies import POLICIES, Reason
from llm_router.signals import OTHER, CostStatus, Kept, Outcome, UsageSource

REFERENCE = (Path(__file__).parents[2] / "docs" / "reference" / "metrics.md").read_text(encoding="utf-8")
PREFIX = families.PREFIX

CLOSED: dict[tuple[str, str], set[str]] = {
    ("http_requests_total", "method"): {*_METHODS, OTHER},
    ("http_request_duration_seconds", "method"): {*_METHODS, OTHER},
    ("active_connections", "type"): set(families.CONNECTION_TYPES),
    ("active_connections", "protocol"): set(families.CONNECTION_PROTOCOLS),
    ("connection_duration_seconds", "type"): set(families.CONNECTION_TYPES),
    ("connection_duration_seconds", "protocol"): set(families.CONNECTION_PROTOCOLS),
    ("errors_total", "component"): {component for component, _ in families.ERROR_KINDS.values()},
    ("errors_total", "severity"): {severity for _, severity in families.ERROR_KINDS.values()},
    ("inference_total", "status"): set(families.INFERENCE_STATUSES),
    ("inference_total", "cached"): {"true", "false"},
    ("usage_records_total", "source"): set(families.USAGE_SOURCES),
    ("cost_usd_total", "status"): set(families.COST_STATUSES),
    ("cache_hits_total", "cache_type"): set(families.CACHE_TYPES),
    ("cache_misses_total", "cache_type"): set(families.CACHE_TYPES),
    ("cache_size_bytes", "cache_type"): set(families.CACHE_TYPES),
    ("rate_limit_hits_total", "scope"): set(get_args(Scope)),
    ("rate_limit_hits_total", "limit"): set(KINDS),
    ("active_users", "window"): set(families.ACTIVE_WINDOWS),
    ("usage_dropped_total", "reason"): set(families.USAGE_DROP_REASONS),
    ("routing_decisions_total", "reason"): set(Reason),
    ("attempts_total", "outcome"): {"success", "cancelled", *FaultDomain},
    ("retries_total", "reason"): set(RetryReason),
    ("fallbacks_total", "reason"): set(RetryReason),
    ("models_loaded", "format"): {FORMAT, "remote"},
    ("model_load_duration_seconds", "format"): {FORMAT, "remote"},
    ("model_memory_bytes", "format"): {FORMAT, "remote"},
    ("models_loaded", "size_category"): set(families.SIZE_CATEGORIES),
    ("gc_duration_seconds", "generation"): {"0", "1", "2"},
    ("worker_restarts_total", "reason"): set(get_args(RestartReason)),
    ("runner_restarts_total", "reason"): set(get_args(RestartReason)),
    ("system_disk_io_bytes_total", "direction"): {"read", "write"},
    ("system_network_bytes_total", "direction"): {"receive", "transmit"},
    **{
        (family.name.removeprefix(PREFIX), "strategy"): {*POLICIES, OTHER}
        for family in families.FAMILIES
        if "strategy" in family.labels
    },
    ("internal_queue_size", "queue"): set(families.INTERNAL_QUEUES),
    ("log_dropped_total", "reason"): set(families.LOG_DROP_REASONS),
    ("spans_dropped_total", "reason"): set(families.SPAN_DROP_REASONS),
    ("facts_dropped_total", "reason"): set(families.FACT_DROP_REASONS),
    ("traces_kept_total", "reason"): set(get_args(Kept)) - {""},
    ("monitoring_cpu_seconds_total", "component"): set(families.MONITORING_COMPONENTS),
}
"""The values of every closed label, as the code has them."""


def table(first: str) -> list[list[str]]:
    """The cells of every row of the tables whose first column has this heading."""
    rows: list[list[str]] = []
    inside = False
    for line in REFERENCE.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if not line.startswith("|"):
            inside = False
        elif inside and not line.startswith("|---"):
            rows.append(cells)
        elif cells[0] == first:
            inside = True
    return rows


def coded(cell: str) -> list[str]:
    """What stands between backticks."""
    return re.findall(r"`([^`]+)`", cell)


def is_list(cell: str) -> bool:
    """Whether a cell is nothing but values: a closed list."""
    return re.fullmatch(r"`[^`]+`(, `[^`]+`)*", cell) is not None


def test_every_family_has_its_row() -> None:
    """With type, labels and unit; and no row describes a family that does not exist."""
    found = {coded(name)[0]: (type, tuple(coded(labels))) for name, type, labels, _, _ in table("family")}
    assert found == {family.name: (family.type, family.labels) for family in families.FAMILIES}
    assert len(table("family")) == len(families.FAMILIES)


def test_every_family_has_its_unit_and_a_sentence() -> None:
    """Seconds and bytes as declared, ratios by name, and a word for what is counted."""
    declared = {family.name: family for family in families.FAMILIES}
    for cell, _, _, unit, meaning in table("family"):
        family = declared[coded(cell)[0]]
        wanted = family.unit or ("ratio" if family.name.endswith("_ratio") else unit)
        assert unit == wanted, family.name
        assert unit, family.name
        assert meaning.endswith("."), family.name


def test_every_label_of_every_family_has_one_row() -> None:
    """A label means one thing per row; the same word may mean another thing in another family."""
    found = [(name, coded(label)[0]) for label, of, _, _ in table("label") for name in coded(of)]
    expected = [(family.name, label) for family in families.FAMILIES for label in family.labels]
    assert sorted(found) == sorted(expected)


def test_closed_values_are_those_of_the_code() -> None:
    """All of them, and no open label is written as if it were closed."""
    found = {
        (name.removeprefix(PREFIX), coded(label)[0]): set(coded(values))
        for label, of, values, _ in table("label")
        for name in coded(of)
        if is_list(values)
    }
    assert found == CLOSED


def test_declared_lists_are_those_of_the_records() -> None:
    """The families' closed lists and the types that the request path uses say the same."""
    assert set(families.INFERENCE_STATUSES) == set(get_args(Outcome))
    assert set(families.USAGE_SOURCES) == set(get_args(UsageSource))
    assert {*families.COST_STATUSES, ""} == set(get_args(CostStatus))


def test_every_kind_of_error_is_described() -> None:
    """With its component and severity."""
    found = {coded(kind)[0]: (component, severity) for kind, component, severity, _ in table("type")}
    assert found == families.ERROR_KINDS
    assert all(when.endswith(".") for _, _, _, when in table("type"))


def test_every_kind_of_error_is_counted_somewhere() -> None:
    """A kind that nothing in the sources ever names would be a promise that is not kept."""
    source = "".join(
        path.read_text(encoding="utf-8")
        for path in Path(families.__file__).parent.rglob("*.py")
        if path.name != "families.py"
    )
    assert [kind for kind in families.ERROR_KINDS if f'"{kind}"' not in source] == []


def test_buckets_are_those_of_the_families() -> None:
    """Of each histogram."""
    found = {coded(name)[0]: tuple(float(bound) for bound in bounds.split(",")) for name, bounds in table("histogram")}
    assert found == {family.name: family.buckets for family in families.FAMILIES if family.type == "histogram"}


def test_every_view_has_its_row() -> None:
    """With its source and its labels."""
    found = {coded(name)[0]: (coded(of)[0], coded(labels)) for name, of, labels, _ in table("view")}
    assert found == {
        view.name: (view.source.name, [label for label, _ in view.labels]) for view in families.GUIDE_VIEWS
    }
