"""Collected metrics as text: Prometheus 0.0.4, OpenMetrics 1.0 and JSON.

Label strings are rendered once and kept between scrapes by a `Renderer`, and so is the text of a row whose
values have not moved. Not for: reading values (slots.py), compression or HTTP (control).
Order is that of the declarations, rows ascending by label values; then the views, then foreign collectors.
A family without rows shows its HELP and TYPE, so that what can be exported is known before it happens.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import accumulate
from operator import add
from typing import Any, Final, Protocol, TypeVar

import msgspec

from llm_router.observe.metrics.slots import Collected, Exemplar, FamilyRows, Row
from llm_router.signals import Family, View

CONTENT_TYPE_TEXT: Final = "text/plain; version=0.0.4; charset=utf-8"
CONTENT_TYPE_OPENMETRICS: Final = "application/openmetrics-text; version=1.0.0; charset=utf-8"

logger = logging.getLogger(__name__)

T = TypeVar("T")


class Collector(Protocol):
    """Something that yields metric families as prometheus_client's collectors do.

    A family has `name`, `documentation`, `type`, `unit` and `samples`; a sample has `name`, `labels`,
    `value`, `timestamp` and `exemplar`.
    """

    def collect(self) -> Iterable[Any]:
        """The families, with their samples, at this moment."""


def negotiate(accept: str) -> bool:
    """Whether an Accept header prefers OpenMetrics to the text format. No header, or `*/*`, means text."""
    openmetrics = text = 0.0
    for item in accept.lower().split(","):
        media_type, *parameters = (part.strip() for part in item.split(";"))
        quality = 1.0
        for parameter in parameters:
            name, _, value = parameter.partition("=")
            if name.strip() == "q":
                try:
                    quality = float(value)
                except ValueError:
                    quality = 0.0
        if media_type == "application/openmetrics-text":
            openmetrics = max(openmetrics, quality)
        elif media_type in ("text/plain", "text/*", "*/*"):
            text = max(text, quality)
    return openmetrics > 0 and openmetrics >= text


def escape_label(value: str) -> str:
    """A label value as it stands between the quotes."""
    return value.replace("\\", "\\\\").replace("\n", "\\n").replace('"', '\\"')


def format_value(value: float) -> str:
    """A sample value as Prometheus reads it."""
    if math.isfinite(value):
        return repr(float(value))
    return "NaN" if math.isnan(value) else "+Inf" if value > 0 else "-Inf"


def _label_text(names: Sequence[str], values: Sequence[str]) -> str:
    return ",".join(f'{name}="{escape_label(value)}"' for name, value in zip(names, values, strict=True))


def _head(name: str, type: str, help: str, unit: str, openmetrics: bool) -> str:
    help = help.replace("\\", "\\\\").replace("\n", "\\n")
    if not openmetrics:
        return f"# HELP {name} {help}\n# TYPE {name} {type}\n"
    if type == "counter":
        name = name.removesuffix("_total")
    # OpenMetrics wants the unit as the last word of the name; otherwise the unit is not said.
    unit_line = f"# UNIT {name} {unit}\n" if unit and name.endswith(f"_{unit}") else ""
    help = help.replace('"', '\\"')
    return f"# HELP {name} {help}\n# TYPE {name} {type}\n{unit_line}"


class _Text:
    """The rendered form of one row, and the values it was last filled with."""

    __slots__ = ("template", "text", "values")

    def __init__(self, template: str) -> None:
        self.template = template
        self.values: Sequence[float] = ()
        self.text = ""


class _FamilyText:
    """The texts of one family's rows by label values."""

    def __init__(self, family: Family) -> None:
        self.family = family
        self.heads = {o: _head(family.name, family.type, family.help, family.unit, o) for o in (False, True)}
        self._rows: dict[tuple[str, ...], _Text] = {}
        self._template = self._histogram_template if family.type == "histogram" else self._single_template

    def append(self, rows: list[Row], openmetrics: bool, out: list[str]) -> None:
        known, histogram = self._rows, self.family.type == "histogram"
        for labels, values, exemplars in rows:
            text = known.get(labels)
            if text is None:
                text = known[labels] = _Text(self._template(labels))
            if text.values != values:
                text.values = values
                text.text = (
                    _fill_histogram(text.template, values) if histogram else text.template + _line_end(values[0])
                )
            if openmetrics and exemplars:
                out.append(_with_exemplars(text.text, exemplars))
            else:
                out.append(text.text)
        if len(known) > 2 * len(rows) + 64:  # series that left; pruned now and then
            present = {row.labels for row in rows}
            self._rows = {labels: text for labels, text in known.items() if labels in present}

    def _single_template(self, labels: tuple[str, ...]) -> str:
        family = self.family
        return f"{family.name}{{{_label_text(family.labels, labels)}}} " if labels else f"{family.name} "

    def _histogram_template(self, labels: tuple[str, ...]) -> str:
        """A %-format taking the cumulative counts, the sum and the count."""
        name = self.family.name
        text = _label_text(self.family.labels, labels).replace("%", "%%")
        comma, braces = ("," if text else ""), (f"{{{text}}}" if text else "")
        bounds = [format_value(bound) for bound in (*self.family.buckets, math.inf)]
        lines = [f'{name}_bucket{{{text}{comma}le="{bound}"}} %d.0\n' for bound in bounds]
        return "".join(lines) + f"{name}_sum{braces} %s\n{name}_count{braces} %d.0\n"


def _line_end(value: float) -> str:
    # The test is cheaper than a call, and false only for NaN and infinities.
    return f"{value!r}\n" if value - value == 0.0 else f"{format_value(value)}\n"


def _fill_histogram(template: str, values: Sequence[float]) -> str:
    counts = list(accumulate(values[:-1]))
    return template % (*counts, format_value(values[-1]), counts[-1])


def _with_exemplars(text: str, exemplars: tuple[Exemplar | None, ...]) -> str:
    """The lines of a histogram with exemplars behind its buckets, which come first."""
    lines = text.split("\n")
    for number, exemplar in enumerate(exemplars):
        if exemplar is not None:
            at = f"{exemplar.time:.3f}"
            lines[number] += f" # {{{exemplar.labels}}} {format_value(exemplar.value)} {at}"
    return "\n".join(lines)


class _ViewRows:
    """Rows of a view made from rows of its source; which row goes where is worked out once per label set."""

    def __init__(self, view: View) -> None:
        source = view.source
        if view.scale != 1.0 and source.type == "histogram":
            raise ValueError(f"{view.name}: the values of a histogram cannot be scaled")
        labels = tuple(label for label, _ in view.labels)
        self.source = source
        self.family = Family(view.name, source.type, labels, view.help, source.buckets, source.unit)
        self._scale = view.scale
        self._take = tuple(source.labels.index(label) for _, label in view.labels)
        self._where = tuple((source.labels.index(label), value) for label, value in view.where)
        self._targets: dict[tuple[str, ...], tuple[str, ...] | None] = {}

    def rows(self, rows: list[Row]) -> list[Row]:
        if len(self._targets) > 2 * len(rows) + 64:
            self._targets.clear()
        merged: dict[tuple[str, ...], Row] = {}
        for row in rows:
            labels = row.labels
            target = self._targets[labels] if labels in self._targets else self._target(labels)
            if target is None:
                continue
            before = merged.get(target)
            if before is None:
                merged[target] = Row(target, row.values, row.exemplars)
            else:
                values = list(map(add, before.values, row.values))
                merged[target] = Row(target, values, _newer(before.exemplars, row.exemplars))
        scale = self._scale
        if scale != 1.0:
            return [Row(labels, (values[0] * scale,)) for labels, values, _ in sorted(merged.values(), key=_by_labels)]
        return sorted(merged.values(), key=_by_labels)

    def _target(self, labels: tuple[str, ...]) -> tuple[str, ...] | None:
        wanted = all(labels[position] == value for position, value in self._where)
        target = tuple(labels[position] for position in self._take) if wanted else None
        self._targets[labels] = target
        return target


def _by_labels(row: Row) -> tuple[str, ...]:
    return row.labels


def _newer(left: tuple[Exemplar | None, ...], right: tuple[Exemplar | None, ...]) -> tuple[Exemplar | None, ...]:
    if not left or not right:
        return left or right
    return tuple(b if a is None or (b is not None and b.time > a.time) else a for a, b in zip(left, right, strict=True))


class Renderer:
    """Renders what a reader collected. Keeps the text of each row, so keep one for as long as you scrape.

    Args:
        views: second names for values of collected families; a family that is collected under the same name wins.
        collectors: foreign families, rendered last. One that raises, or whose name is taken, is left out;
            a raise is logged and reported to `on_collector_error`.
    Owned by one thread.
    """

    def __init__(
        self,
        views: Iterable[View] = (),
        collectors: Iterable[Collector] = (),
        *,
        on_collector_error: Callable[[Exception], None] | None = None,
    ) -> None:
        self._views = [_ViewRows(view) for view in views]
        self._collectors = list(collectors)
        self._on_collector_error = on_collector_error
        self._texts: dict[Family, _FamilyText] = {}

    def register(self, collector: Collector) -> None:
        """Render the families of `collector` too."""
        self._collectors.append(collector)

    def unregister(self, collector: Collector) -> None:
        """Render them no longer. Raises ValueError if they were not."""
        self._collectors.remove(collector)

    def render(self, collected: Collected, *, openmetrics: bool = False) -> bytes:
        """All families in the text format, or in OpenMetrics with exemplars and the closing `# EOF`."""
        out: list[str] = []
        names: set[str] = set()
        for family, rows in self._families(collected):
            names.add(family.name.removesuffix("_total"))
            text = self._texts.get(family)
            if text is None:
                text = self._texts[family] = _FamilyText(family)
            out.append(text.heads[openmetrics])
            text.append(rows, openmetrics, out)
        out += self._foreign(names, partial(_foreign_text, openmetrics=openmetrics))
        if openmetrics:
            out.append("# EOF\n")
        return "".join(out).encode()

    def render_json(self, collected: Collected) -> bytes:
        """An array of `{name, help, type, aggregator, values: [{labels, value, metricName?}]}`, as prom-client gives.

        Infinities and NaN become null; the `le` of a bucket is a number, or `"+Inf"`.
        """
        document: list[dict[str, Any]] = []
        names: set[str] = set()
        for family, rows in self._families(collected):
            names.add(family.name.removesuffix("_total"))
            values = _histogram_json(family, rows) if family.type == "histogram" else _single_json(family, rows)
            document.append(_family_json(family.name, family.help, family.type, values))
        document += self._foreign(names, _foreign_json)
        return msgspec.json.encode(document)

    def views(self, collected: Collected) -> list[FamilyRows]:
        """The rows of the views alone."""
        taken = {rows.family.name for rows in collected.families}
        return [
            FamilyRows(view.family, view.rows(collected.rows(view.source)))
            for view in self._views
            if view.family.name not in taken
        ]

    def _families(self, collected: Collected) -> list[FamilyRows]:
        return collected.families + self.views(collected)

    def _foreign(self, names: set[str], convert: Callable[[Any], T]) -> list[T]:
        """What collectors yield under names that are free, converted; nothing at all of a collector that raises."""
        found: list[T] = []
        for collector in self._collectors:
            try:
                families = {family.name: convert(family) for family in collector.collect() if family.name not in names}
            except Exception as error:
                # Whatever a foreign collector raises must not cost us the scrape.
                logger.warning("a registered metrics collector failed: %r", collector, exc_info=error)
                if self._on_collector_error is not None:
                    self._on_collector_error(error)
                continue
            names.update(families)
            found += families.values()
        return found

    def __repr__(self) -> str:
        return f"<Renderer: {len(self._texts)} families seen, {len(self._views)} views, {len(self._collectors)} collectors>"


def render(collected: Collected, *, openmetrics: bool = False, views: Iterable[View] = ()) -> bytes:
    """Render once, without keeping anything. Use a `Renderer` for repeated scrapes."""
    return Renderer(views).render(collected, openmetrics=openmetrics)


def render_json(collected: Collected, *, views: Iterable[View] = ()) -> bytes:
    """Render once as JSON, without keeping anything."""
    return Renderer(views).render_json(collected)


# -- JSON -------------------------------------------------------------------------------------------


def _family_json(name: str, help: str, type: str, values: list[dict[str, Any]]) -> dict[str, Any]:
    return {"name": name, "help": help, "type": type, "aggregator": "sum", "values": values}


def _single_json(family: Family, rows: list[Row]) -> list[dict[str, Any]]:
    return [{"labels": dict(zip(family.labels, row.labels, strict=True)), "value": row.values[0]} for row in rows]


def _histogram_json(family: Family, rows: list[Row]) -> list[dict[str, Any]]:
    values: list[dict[str, Any]] = []
    for row in rows:
        labels = dict(zip(family.labels, row.labels, strict=True))
        counts = list(accumulate(row.values[:-1]))
        values += [
            {"labels": {"le": bound, **labels}, "value": count, "metricName": f"{family.name}_bucket"}
            for bound, count in zip((*family.buckets, "+Inf"), counts, strict=True)
        ]
        values.append({"labels": labels, "value": row.values[-1], "metricName": f"{family.name}_sum"})
        values.append({"labels": labels, "value": counts[-1], "metricName": f"{family.name}_count"})
    return values


def _foreign_json(family: Any) -> dict[str, Any]:
    samples = [{"labels": s.labels, "value": s.value, "metricName": s.name} for s in family.samples]
    return _family_json(family.name, family.documentation, family.type, samples)


# -- foreign families -------------------------------------------------------------------------------

_TEXT_TYPES: Final[Mapping[str, str]] = {
    "info": "gauge",
    "stateset": "gauge",
    "gaugehistogram": "histogram",
    "unknown": "untyped",
}
_NAME_SUFFIXES: Final[Mapping[str, str]] = {"counter": "_total", "info": "_info"}
_OPENMETRICS_ONLY: Final = ("_created", "_gsum", "_gcount")


def _foreign_text(family: Any, openmetrics: bool) -> str:
    """A family in prometheus_client's shape. What the text format does not know there becomes gauges of their own."""
    name, type = family.name, family.type
    if openmetrics:
        head = _head(name, type, family.documentation, family.unit, True)
        return head + "".join(_foreign_sample(sample, True) for sample in family.samples)
    lines = [_head(name + _NAME_SUFFIXES.get(type, ""), _TEXT_TYPES.get(type, type), family.documentation, "", False)]
    apart: dict[str, list[str]] = {}
    for sample in family.samples:
        suffix = sample.name.removeprefix(name)
        text = _foreign_sample(sample, False)
        if suffix in _OPENMETRICS_ONLY:
            apart.setdefault(sample.name, []).append(text)
        else:
            lines.append(text)
    for sample_name, texts in sorted(apart.items()):
        lines.append(_head(sample_name, "gauge", family.documentation, "", False))
        lines += texts
    return "".join(lines)


def _foreign_sample(sample: Any, openmetrics: bool) -> str:
    labels = sorted(sample.labels.items())
    text = _label_text([name for name, _ in labels], [str(value) for _, value in labels])
    line = f"{sample.name}{{{text}}} " if text else f"{sample.name} "
    line += format_value(sample.value)
    if sample.timestamp is not None:
        seconds = float(sample.timestamp)
        line += f" {seconds}" if openmetrics else f" {int(seconds * 1000)}"
    if openmetrics and sample.exemplar:
        exemplar = sample.exemplar
        names = sorted(exemplar.labels)
        line += f" # {{{_label_text(names, [exemplar.labels[n] for n in names])}}} {format_value(exemplar.value)}"
        if exemplar.timestamp is not None:
            line += f" {float(exemplar.timestamp)}"
    return line + "\n"
