"""The page of `headway plan --report`: the best plans, why, and pictures of the best one's step."""

from __future__ import annotations

from pathlib import Path

from headway.predict.occupancy import explain
from headway.predict.step import Predictor
from headway.report import gantt
from headway.report.picture_page import Drawing, write_picture_page
from headway.search.ranking import Candidate, Ranking
from headway.simulate.step import simulate_step
from headway.units import format_bytes, format_count, format_seconds

__all__ = ["write_plan_report"]

_REJECTED = 24


def write_plan_report(path: str | Path, ranking: Ranking, predictor: Predictor) -> Path:
    """Write one self-contained HTML page; `predictor` is of the workload and the machines that were searched.

    Pictures that cannot be drawn (too many kinds of ranks) are named on the page. Raises FileError.
    """
    best = ranking.best[0]
    return write_picture_page(
        path,
        "plan.html",
        _drawings(ranking, predictor),
        title=f"{predictor.workload.graph.name} on {predictor.cluster.name}",
        kicker="Headway plan",
        best=_row(best),
        plans=[_row(candidate) for candidate in ranking.best],
        searched=_searched(ranking),
        why=f"The step is bound by {best.prediction.bound}. {explain(predictor, best.plan)}",
        rejected=ranking.rejected[:_REJECTED],
    )


def _row(candidate: Candidate) -> dict[str, str]:
    prediction = candidate.prediction
    tokens = f"{format_count(prediction.tokens_per_second)} tokens/s"
    samples = f"{format_count(prediction.samples_per_second)} samples/s"
    return {
        "name": candidate.plan.describe(),
        "step": format_seconds(prediction.time.step_seconds),
        "memory": format_bytes(prediction.peak_bytes),
        "throughput": tokens if prediction.tokens_per_second else samples,
        "bound": prediction.bound,
    }


def _searched(ranking: Ranking) -> str:
    text = f"{ranking.considered:,} plans considered, {ranking.evaluated:,} of them predicted in full, "
    text += f"in {format_seconds(ranking.seconds)}."
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in ranking.totals.items())
    return f"{text} Left out: {reasons}." if reasons else text


def _drawings(ranking: Ranking, predictor: Predictor) -> list[Drawing]:
    best = ranking.best[0]
    plan = best.plan
    simulation = simulate_step(predictor, plan)
    kind = predictor.stages.layouts.kinds_of(plan)[0][0]
    latency = predictor.stages.latency(kind, plan.world_size > 1)
    share = plan.samples_of(0) / plan.context
    shards = predictor.stages.shards_of(plan)
    drawings: list[Drawing] = [
        (
            "One step, simulated",
            "Forward, backward and communication of one rank of each kind; numbers are micro-batches.",
            lambda width: gantt.gantt_figure(simulation, width=width),
        ),
        (
            "Memory over one step",
            "Bytes in use on each pipeline rank; the peak is divided by kind.",
            lambda width: gantt.memory_figure(simulation, best.prediction.memory, kind.memory_bytes, width=width),
        ),
        (
            "Operators under the roof",
            f"FLOP for each byte moved, against FLOP per second reached on {kind.name}; area is share of the time.",
            lambda width: gantt.roofline_figure(
                latency, max(1, round(share)), shards=shards, precision=plan.precision, width=width
            ),
        ),
    ]
    if ranking.history:
        series = gantt.Series("this search", ranking.history)
        drawings.append(
            ("The search", "The best step time so far.", lambda width: gantt.search_figure([series], width=width))
        )
    return drawings
