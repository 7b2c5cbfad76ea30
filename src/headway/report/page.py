"""The page that a run ends with: everything that was planned, predicted and measured, in one file.

`write_report` reads a run directory and writes `report.html` into it. The page asks nothing of any other file or
machine: style, script and pictures stand inside it. What the run did not leave is named on the page.
"""

from __future__ import annotations

import datetime
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib import metadata, resources
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from headway.hardware.cluster import Cluster
from headway.plan.plan import Plan
from headway.predict.prediction import StepTime
from headway.report import charts, timelines
from headway.report.directory import ModelLayer, ModelSummary, RunDirectory, read_directory, steps_to_show
from headway.timeline import Timeline
from headway.units import format_bytes, format_count, format_flop, format_rate, format_seconds
from headway.value import write_atomically

__all__ = ["packaged", "render", "variables", "write_report"]

_MAX_RANKS = 32  # more are named, not drawn
_MAX_LANES = 96
_MAX_REJECTED = 24


def write_report(run_directory: str | Path) -> Path:
    """Write `report.html` into a run directory and return its path.

    Raises FileError if it is not a run directory, if none of its files can be used, or if it cannot be written to.
    """
    run = read_directory(run_directory)
    path = run.path / "report.html"
    write_atomically(path, render(run))
    return path


def render(run: RunDirectory) -> str:
    """The report of a run as HTML."""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string(packaged("page.html"))
    return template.render(
        style=Markup(variables() + packaged("page.css")),
        script=Markup(packaged("page.js")),
        version=metadata.version("headway"),
        written=_date(datetime.datetime.now(datetime.UTC)),
        gaps=run.gaps,
        header=_header(run),
        figures=_key_figures(run),
        comparison=_comparison(run),
        timeline=_timelines(run),
        loss=_loss(run),
        throughput=_throughput(run),
        memory=_memory(run),
        search=_search(run),
        model=_model(run.model),
        machine=_machine(run.cluster),
        plan=_plan(run.plan, run.model),
    )


def packaged(name: str) -> str:
    """A file that comes with this package: a template, the style, the script."""
    return resources.files("headway.report").joinpath(name).read_text(encoding="utf-8")


def variables() -> str:
    """The palettes as CSS variables, light and dark."""

    def rules(palette: dict[str, str]) -> str:
        return " ".join(f"--{role}: {colour};" for role, colour in palette.items())

    return (
        f":root {{ {rules(charts.PALETTE)} }}\n"
        f"@media (prefers-color-scheme: dark) {{ :root {{ {rules(charts.PALETTE_DARK)} }} }}\n"
    )


@dataclass(frozen=True)
class Picture:
    """A picture at the width of a desk and at that of a phone."""

    wide: Markup
    narrow: Markup


def _picture(draw: Callable[[float], str], name: str, label: str) -> Picture:
    def at(width: float, size: str) -> Markup:
        # The SVG was serialised by an XML library, which escaped the names in it.
        return Markup(charts.inline_svg(draw(width), label=label, prefix=f"{name}-{size}-"))

    return Picture(at(charts.WIDE, "wide"), at(charts.NARROW, "narrow"))


# -------------------------------------------------------------------------------------------------------- what happened


def _header(run: RunDirectory) -> dict[str, Any]:
    model = run.plan.model if run.plan else run.model.graph.name if run.model else ""
    state, text = _outcome(run)
    record = run.record
    command = " ".join((record.script, *record.arguments)).strip() if record else ""
    started = _parsed_date(record.started) if record else None
    finished = _parsed_date(record.finished) if record else None
    if started is None:
        # Without a record, the newest file says when.
        times = [path.stat().st_mtime for path in run.path.glob("*.json*") if path.is_file()]
        finished = datetime.datetime.fromtimestamp(max(times), datetime.UTC) if times else None
    dates = [_date(moment) for moment in (started or finished,) if moment is not None]
    if started is not None and finished is not None and finished > started:
        dates.append(f"took {format_seconds((finished - started).total_seconds())}")
    return {
        "name": run.name,
        "model": model,
        "plan": run.plan.describe() if run.plan else "",
        "machine": _machine_line(run.cluster),
        "dates": dates,
        "command": command,
        "engine": record.engine if record else "",
        "resumed_from": record.resumed_from if record else "",
        "state": state,
        "outcome": text,
        "message": record.message if record else "",
    }


def _outcome(run: RunDirectory) -> tuple[str, str]:
    """(a CSS class, what happened in a few words)."""
    steps = run.metrics.steps[-1] if run.metrics else 0
    after = f" after step {steps}" if steps else ""
    outcome = run.record.outcome if run.record else ""
    if not outcome:
        if run.measured is not None:
            outcome = "finished"
        elif steps:
            return "unknown", f"ended{after}, unmeasured"
        else:
            return "unknown", "not trained"
    states = {"finished": "good", "interrupted": "warn", "failed": "bad", "running": "unknown"}
    words = {"running": "was running when this was written"}
    return states.get(outcome, "unknown"), words.get(outcome, outcome) + after


def _machine_line(cluster: Cluster | None) -> str:
    if cluster is None:
        return ""
    counts: dict[str, int] = {}
    for device in cluster.devices:
        counts[device.accelerator] = counts.get(device.accelerator, 0) + 1
    devices = ", ".join(f"{count} × {name}" for name, count in counts.items())
    nodes = len(cluster.nodes)
    return f"{cluster.name}: {devices}" + (f" in {nodes} nodes" if nodes > 1 else "")


def _key_figures(run: RunDirectory) -> list[dict[str, str]]:
    figures: list[dict[str, str]] = []

    def figure(label: str, value: str, note: str = "") -> None:
        figures.append({"label": label, "value": value, "note": note})

    predicted = run.prediction.time.step_seconds if run.prediction else None
    measured = run.measured.time.step_seconds if run.measured and run.measured.time else None
    seconds = _pair(predicted, measured, format_seconds)
    if seconds:
        figure("Step time", *seconds)
    predicted_peak = run.prediction.peak_bytes if run.prediction and run.prediction.memory else None
    peaks = _peaks(run)
    size = _pair(predicted_peak, max(peaks.values(), default=None), format_bytes)
    if size:
        figure("Peak memory", size[0], f"{size[1]}; fullest rank")
    unit, expected = _predicted_rate(run)
    rate = _typical_rate(run, unit)
    pair = _pair(expected, rate, format_count)
    if pair:
        figure(f"{unit.capitalize()} per second", *pair)
    losses = [loss for loss in run.metrics.loss if math.isfinite(loss)] if run.metrics else []
    if losses:
        figure("Loss", f"{charts.smoothed(losses)[-1]:.3f}", f"smoothed; {losses[0]:.3f} at first")
    if run.prediction and run.prediction.mfu:
        figure("FLOP utilisation", f"{run.prediction.mfu:.1%}".replace("%", " %"), "predicted")
    return figures


def _pair(predicted: float | None, measured: float | None, text: Callable[[float], str]) -> tuple[str, str] | None:
    """The measured value with the predicted beneath it, or the predicted alone."""
    if measured is not None:
        return text(measured), f"{text(predicted)} predicted" if predicted is not None else "measured"
    return (text(predicted), "predicted") if predicted is not None else None


def _peaks(run: RunDirectory) -> dict[int, float]:
    peaks = run.measured.peak_bytes if run.measured else ()
    return {rank: peak for rank, peak in enumerate(peaks) if peak is not None and peak > 0}


# ------------------------------------------------------------------------------------------------ predicted, measured


def _comparison(run: RunDirectory) -> dict[str, Any]:
    predicted = run.prediction.time if run.prediction else None
    measured = run.measured.time if run.measured else None
    rows = [_row("Step", *_fields(predicted, measured, "step_seconds"), format_seconds, total=True)]
    for field, (role, name) in charts.TIME_PARTS.items():
        rows.append(_row(name, *_fields(predicted, measured, field), format_seconds, role=role))
    if run.prediction or (run.measured and run.measured.samples_per_second):
        rows.append(
            _row(
                "Samples per second",
                run.prediction.samples_per_second if run.prediction else None,
                (run.measured.samples_per_second or None) if run.measured else None,
                format_count,
                total=True,
            )
        )
    memory = {rank: item.total_bytes for rank, item in enumerate(run.prediction.memory)} if run.prediction else {}
    peaks = _peaks(run)
    ranks = sorted({*memory, *peaks})
    shown = _fullest(ranks, memory, peaks)
    for rank in shown:
        rows.append(_row(f"Memory, rank\u00a0{rank}", memory.get(rank), peaks.get(rank), format_bytes, total=True))
    picture = None
    if predicted or measured:
        label = "Bars: the parts of a step. " + "; ".join(
            f"{name} {format_seconds(time.step_seconds)}"
            for name, time in (("predicted", predicted), ("measured", measured))
            if time
        )
        picture = _picture(lambda width: charts.comparison_svg(predicted, measured, width=width), "comparison", label)
    return {
        "rows": rows if predicted or measured or ranks else [],
        "picture": picture,
        "more": len(ranks) - len(shown),
        "bound": run.prediction.bound if run.prediction else "",
        "steps": run.measured.steps if run.measured else 0,
    }


def _fields(predicted: StepTime | None, measured: StepTime | None, field: str) -> tuple[float | None, float | None]:
    return getattr(predicted, field, None), getattr(measured, field, None)


def _row(
    name: str,
    predicted: float | None,
    measured: float | None,
    text: Callable[[float], str],
    *,
    role: str = "",
    total: bool = False,
) -> dict[str, Any]:
    error = None
    if predicted is not None and measured is not None and measured > 0:
        error = (predicted - measured) / measured
    return {
        "name": name,
        "predicted": "–" if predicted is None else text(predicted),
        "measured": "–" if measured is None else text(measured),
        "error": "–" if error is None else _percent(error),
        "role": role,
        "total": total,
    }


def _percent(ratio: float) -> str:
    """0.0123 → `"+1.2 %"`, with a true minus sign."""
    return f"{ratio:+.1%}".replace("-", "−").replace("%", " %")


def _fullest(ranks: Sequence[int], *sizes: dict[int, float]) -> list[int]:
    """All ranks if they are few; otherwise those with the most memory, in order."""
    if len(ranks) <= _MAX_RANKS:
        return list(ranks)
    fullest = sorted(ranks, key=lambda rank: -max(size.get(rank, 0.0) for size in sizes))[:_MAX_RANKS]
    return sorted(fullest)


# ------------------------------------------------------------------------------------------------------------ pictures


def _timelines(run: RunDirectory) -> dict[str, Any]:
    measured_time = run.measured.time if run.measured else None
    predicted_time = run.prediction.time if run.prediction else None
    views = []
    for name, timeline, time in (
        ("Measured", run.timeline, measured_time),
        ("Predicted", run.predicted_timeline, predicted_time),
    ):
        found = steps_to_show(timeline, step_seconds=time.step_seconds if time else 0.0) if timeline else None
        if timeline is not None and found is not None:
            views.append((name, _few_lanes(timeline), time, *found))
    window = max((stop - start for *_, start, stop in views), default=0.0)
    drawn = []
    for name, (timeline, hidden), time, what, start, stop in views:
        if time and time.step_seconds > 0:
            bubble = time.bubble_seconds / time.step_seconds
        else:
            bubble = timelines.bubble_share(timeline, start_seconds=start, stop_seconds=stop)
        label = f"{name} timeline: {what}, {format_seconds(stop - start)}, by rank; bubble {bubble:.1%}"

        def draw(width: float, timeline=timeline, start=start, stop=stop) -> str:
            return timelines.timeline_svg(
                timeline, start_seconds=start, stop_seconds=stop, window_seconds=window, width=width
            )

        drawn.append(
            {
                "name": name,
                "what": what if name == "Measured" else "one step",
                "duration": format_seconds(stop - start),
                "bubble": f"{bubble:.1%}".replace("%", " %"),
                "hidden": hidden,
                "picture": _picture(draw, name.lower(), label),
            }
        )
    return {"views": drawn}


def _few_lanes(timeline: Timeline) -> tuple[Timeline, int]:
    """The timeline with as many lanes as a page can show, and how many ranks that leaves out."""
    groups: dict[str, set[str]] = {}
    for span in timeline.spans:
        groups.setdefault(span.lane.split("/", 1)[0], set()).add(span.lane)
    kept: set[str] = set()
    count = 0
    for group in sorted(groups, key=timelines.lane_order):
        if kept and count + len(groups[group]) > _MAX_LANES:
            break
        kept.add(group)
        count += len(groups[group])
    if len(kept) == len(groups):
        return timeline, 0
    spans = tuple(span for span in timeline.spans if span.lane.split("/", 1)[0] in kept)
    return Timeline(name=timeline.name, spans=spans), len(groups) - len(kept)


def _loss(run: RunDirectory) -> dict[str, Any] | None:
    if run.metrics is None:
        return None
    metrics = run.metrics
    finite = [(step, loss) for step, loss in zip(metrics.steps, metrics.loss, strict=True) if math.isfinite(loss)]
    reference = (run.record.reference_loss if run.record else None) or metrics.reference_loss
    line = (reference.label, reference.value) if reference else None
    if not finite:
        return {"picture": None, "lost": len(metrics.steps), "text": ""}
    last = charts.smoothed([loss for _, loss in finite])[-1]
    text = f"From {finite[0][1]:.3f} at step {finite[0][0]} to {last:.3f} (smoothed) at step {finite[-1][0]}."
    if reference:
        below = "below" if last < reference.value else "above"
        text += f" That is {abs(reference.value - last):.3f} {below} the {reference.label} of {reference.value:.3f}."
    picture = _picture(
        lambda width: charts.loss_svg(metrics.steps, metrics.loss, reference=line, width=width),
        "loss",
        f"Curve: loss over steps. {text}",
    )
    return {"picture": picture, "lost": len(metrics.steps) - len(finite), "text": text}


def _rates(run: RunDirectory, unit: str) -> list[float]:
    if run.metrics is None:
        return []
    return run.metrics.tokens_per_second if unit == "tokens" else run.metrics.samples_per_second


def _predicted_rate(run: RunDirectory) -> tuple[str, float | None]:
    """("tokens" or "samples", what was predicted of them in a second)."""
    tokens = run.prediction.tokens_per_second if run.prediction else 0.0
    if tokens or any(rate > 0 for rate in _rates(run, "tokens")):
        return "tokens", tokens or None
    return "samples", run.prediction.samples_per_second if run.prediction else None


def _typical_rate(run: RunDirectory, unit: str) -> float | None:
    """The median over steps: the first steps of a run are slow, and a mean would carry them along."""
    rates = sorted(rate for rate in _rates(run, unit) if math.isfinite(rate))
    return rates[len(rates) // 2] if rates else None


def _throughput(run: RunDirectory) -> dict[str, Any] | None:
    unit, expected = _predicted_rate(run)
    typical = _typical_rate(run, unit)
    if run.metrics is None or typical is None:
        return None
    rates, steps = _rates(run, unit), run.metrics.steps
    text = f"Median {format_count(typical)} {unit} per second"
    text += f", {format_count(expected)} predicted." if expected else "."
    reference = ("predicted", expected) if expected else None
    picture = _picture(
        lambda width: charts.throughput_svg(steps, rates, unit=unit, reference=reference, width=width),
        "throughput",
        f"Curve: throughput over steps. {text}",
    )
    return {"picture": picture, "text": text}


def _memory(run: RunDirectory) -> dict[str, Any] | None:
    memory = dict(enumerate(run.prediction.memory)) if run.prediction else {}
    peaks = _peaks(run)
    if not memory and not peaks:
        return None
    ranks = sorted({*memory, *peaks})
    shown = _fullest(ranks, {rank: item.total_bytes for rank, item in memory.items()}, peaks)
    capacity = None
    if run.cluster and run.cluster.accelerators:
        capacity = min(kind.memory_bytes for kind in run.cluster.accelerators.values())
    drawn_memory = {rank: memory[rank] for rank in shown if rank in memory}
    drawn_peaks = {rank: peaks[rank] for rank in shown if rank in peaks}
    text = "Bars and figures: predicted." if memory else "Nothing was predicted."
    if capacity is not None:
        text += f" The smallest device has {format_bytes(capacity)}."
    label = "Bars: predicted memory of each rank by kind" + (", with the measured peak marked" if drawn_peaks else "")
    rows = []
    for rank in shown:
        item = memory.get(rank)
        peak = peaks.get(rank)
        rows.append(
            {
                "rank": rank,
                "kinds": [format_bytes(getattr(item, field)) if item else "–" for field in charts.MEMORY_KINDS],
                "total": format_bytes(item.total_bytes) if item else "–",
                "peak": format_bytes(peak) if peak else "–",
            }
        )
    return {
        "picture": _picture(
            lambda width: charts.memory_svg(drawn_memory, drawn_peaks, capacity_bytes=capacity, width=width),
            "memory",
            label,
        ),
        "kinds": [name for _, name in charts.MEMORY_KINDS.values()],
        "rows": rows,
        "more": len(ranks) - len(shown),
        "text": text,
    }


# ---------------------------------------------------------------------------------------------- what it was chosen from


def _search(run: RunDirectory) -> dict[str, Any] | None:
    ranking = run.ranking
    if ranking is None:
        return None
    best = []
    for candidate in ranking.best:
        prediction = candidate.prediction
        best.append(
            {
                "plan": candidate.plan.describe(),
                "chosen": candidate.plan == run.plan,
                "step": format_seconds(prediction.time.step_seconds),
                "memory": format_bytes(prediction.peak_bytes) if prediction.memory else "–",
                "rate": format_count(prediction.samples_per_second),
                "bound": prediction.bound,
            }
        )
    return {
        "best": best,
        "rejected": ranking.rejected[:_MAX_REJECTED],
        "more": len(ranking.rejected[_MAX_REJECTED:]),
        "totals": [(reason, f"{count:,}") for reason, count in ranking.totals.items()],
        "considered": f"{ranking.considered:,}" if ranking.considered else "",
        "seconds": format_seconds(ranking.seconds) if ranking.seconds else "",
        "goal": ranking.goal,
    }


def _model(model: ModelSummary | None) -> dict[str, Any] | None:
    if model is None:
        return None
    graph = model.graph
    by_name = {name: parameter for parameter in graph.parameters for name in (parameter.name, *parameter.aliases)}
    counted: set[str] = set()
    rows = []
    for layers in _alike(graph.layers):
        # A tied weight counts where it is first read.
        names = {by_name[name].name for layer in layers for name in layer.parameters if name in by_name} - counted
        counted |= names
        rows.append(
            {
                "name": layers[0].name if len(layers) == 1 else f"{layers[0].name} … {layers[-1].name}",
                "count": len(layers),
                "parameters": f"{sum(by_name[name].elements for name in names):,}",
                "forward": format_flop(sum(layer.forward_flop.at(1) for layer in layers)),
                "backward": format_flop(sum(layer.backward_flop.at(1) for layer in layers)),
                "saved": format_bytes(sum(layer.saved.at(1) for layer in layers)),
            }
        )
    optimizer = model.optimizer
    return {
        "name": graph.name,
        "rows": rows,
        "parameters": f"{sum(parameter.elements for parameter in graph.parameters):,}",
        "forward": format_flop(sum(layer.forward_flop.at(1) for layer in graph.layers)),
        "backward": format_flop(sum(layer.backward_flop.at(1) for layer in graph.layers)),
        "saved": format_bytes(sum(layer.saved.at(1) for layer in graph.layers)),
        "layers": len(graph.layers),
        "facts": [
            ("Optimizer", f"{optimizer.name}, {optimizer.state_bytes_per_element:g} B of state per parameter"),
            ("Global batch", f"{model.global_batch:,} samples" + _tokens(graph.tokens_per_sample)),
            ("Precision", model.precision),
        ],
        "notes": graph.notes,
    }


def _tokens(tokens_per_sample: int) -> str:
    return f" of {tokens_per_sample:,} tokens" if tokens_per_sample else ""


def _alike(layers: Iterable[ModelLayer]) -> list[list[ModelLayer]]:
    """Layers, those that follow each other with the same signature together."""
    groups: list[list[ModelLayer]] = []
    for layer in layers:
        if groups and layer.signature and groups[-1][0].signature == layer.signature:
            groups[-1].append(layer)
        else:
            groups.append([layer])
    return groups


def _machine(cluster: Cluster | None) -> dict[str, Any] | None:
    if cluster is None:
        return None
    devices = []
    for key, kind in cluster.accelerators.items():
        devices.append(
            {
                "name": kind.name,
                "count": sum(device.accelerator == key for device in cluster.devices),
                "rates": [
                    f"{dtype} {format_flop(rate, per_second=True)}" for dtype, rate in kind.flop_per_second.items()
                ],
                "memory": format_bytes(kind.memory_bytes),
                "bandwidth": format_rate(kind.memory_bytes_per_second),
                "source": kind.source,
            }
        )
    kinds: dict[tuple[str, float, float], int] = {}
    for link in cluster.links:
        key = (link.kind or "link", link.bytes_per_second, link.latency_seconds)
        kinds[key] = kinds.get(key, 0) + 1
    links = [
        {"kind": kind, "count": count, "bandwidth": format_rate(rate), "latency": format_seconds(latency)}
        for (kind, rate, latency), count in sorted(kinds.items(), key=lambda item: -item[0][1])
    ]
    facts = [("Nodes", str(len(cluster.nodes))), ("Devices", str(len(cluster)))]
    if cluster.collective_latency_seconds:
        facts.append(("Starting a collective", format_seconds(cluster.collective_latency_seconds)))
    if cluster.contention != 1.0:
        facts.append(("Slowdown when all devices compute", f"{cluster.contention:.2f}"))
    facts.append(("Figures", "probed on this machine" if cluster.fingerprint else "from a description"))
    return {"name": cluster.name, "devices": devices, "links": links[:12], "more": len(links[12:]), "facts": facts}


def _plan(plan: Plan | None, model: ModelSummary | None) -> dict[str, Any] | None:
    if plan is None:
        return None
    names = [layer.name for layer in model.graph.layers] if model else []
    stages = []
    for position, stage in enumerate(plan.stages):
        first, last = stage.start, stage.stop - 1
        span = f"{first} to {last}" if last > first else f"{first}"
        if 0 <= first <= last < len(names):
            span += f" ({names[first]} … {names[last]})" if last > first else f" ({names[first]})"
        pipeline = position % max(1, plan.pipeline)
        width = plan.data * plan.tensor
        ranks = range(pipeline * width, (pipeline + 1) * width)
        stages.append(
            {
                "position": position,
                "layers": span,
                "recompute": len(stage.recompute),
                "ranks": str(ranks[0]) if width == 1 else f"{ranks[0]} to {ranks[-1]}",
            }
        )
    return {"stages": stages, "json": plan.to_json()}


# --------------------------------------------------------------------------------------------------------------- dates


def _parsed_date(text: str) -> datetime.datetime | None:
    try:
        moment = datetime.datetime.fromisoformat(text)
    except ValueError:
        return None
    # Without a zone it cannot be compared with one that has it.
    return moment if moment.tzinfo else moment.replace(tzinfo=datetime.UTC)


def _date(moment: datetime.datetime) -> str:
    return f"{moment.day} {moment:%B %Y, %H:%M} {moment.tzname() or ''}".strip()
