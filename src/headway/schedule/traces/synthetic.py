"""Traces that nobody recorded: drawn from a mix of jobs fitted to a real trace, and real ones drawn again.

A `JobMix` keeps what shapes a queue: how often each gang size occurs, the quantiles of the run time of each size (heavy
tails are in them), and how submissions fall over the hours of a day. `PHILLY` is the mix of the 82,247 jobs that were
derived from Microsoft's Philly (Jeon et al., ATC 2019); `fit` makes one of any trace.

Jobs that recur are what a scheduler can learn from. Every drawn job follows a template of its user's (model, size, how
long), and `recurrence` says which share of the variance of its run time the template explains: 0, nothing is known
beforehand; 1, every repetition lasts as long as the last. The distribution over all jobs is the mix's, whatever it is.

Everything is drawn by numpy's PCG64 from the seed that the caller gives.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec
import numpy as np

from headway.errors import InputError
from headway.schedule.job import Job
from headway.schedule.traces.read import Trace
from headway.value import Value

__all__ = ["PHILLY", "JobMix", "SizeClass", "fit", "jitter", "resample", "shuffle", "synthesize"]

_SHARES = (0.0, 0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 0.999, 1.0)
_HOURS = 24
_DAY = 86400.0
_TEMPLATES = 4  # kinds of job that a user submits again and again
_MODELS = (
    "vgg19", "vgg16", "vgg11", "alexnet", "resnet152", "resnet101", "resnet50", "inception4", "inception3",
    "googlenet",
)  # fmt: skip


class SizeClass(Value):
    """Jobs of one gang size: how many there are, and quantiles of their run times in seconds (shares as in `fit`)."""

    devices: int
    jobs: int
    quantiles_seconds: tuple[float, ...]


class JobMix(Value):
    """What kinds of jobs come: by size, and `hours`, the relative rate of submission in each hour of a day."""

    name: str
    sizes: tuple[SizeClass, ...]
    hours: tuple[float, ...] = (1.0,) * _HOURS

    @property
    def mean_service(self) -> float:
        """Device-seconds of a job, on average, of the distribution that `synthesize` draws from."""
        total = sum(one.jobs for one in self.sizes)
        return sum(one.jobs * one.devices * _mean(one.quantiles_seconds) for one in self.sizes) / total


def _mean(quantiles: Sequence[float]) -> float:
    """Of the distribution whose logarithm is linear between the quantiles."""
    mean = 0.0
    for at in range(len(_SHARES) - 1):
        low, high = quantiles[at], quantiles[at + 1]
        ratio = high / low
        between = (high - low) / math.log(ratio) if ratio > 1 + 1e-9 else low
        mean += (_SHARES[at + 1] - _SHARES[at]) * between
    return mean


def fit(trace: Trace, *, fewest: int = 100) -> JobMix:
    """The mix of a trace: sizes with fewer than `fewest` jobs join the next smaller one that has as many.

    Raises InputError for a trace without jobs.
    """
    if not trace.jobs:
        raise InputError("there are no jobs to fit a mix to", place=trace.name)
    sizes = np.array([job.devices for job in trace.jobs])
    seconds = np.array([job.duration_seconds for job in trace.jobs])
    submitted = np.array([job.submit_seconds for job in trace.jobs])
    classes: list[list[int]] = []
    counted = 0
    for size in np.unique(sizes):
        count = int((sizes == size).sum())
        if not classes or (count >= fewest and counted >= fewest):
            classes.append([])
            counted = 0
        classes[-1].append(int(size))
        counted += count
    fitted = []
    for members in classes:
        chosen = np.isin(sizes, members)
        typical = max(members, key=lambda size: (int((sizes == size).sum()), -size))
        quantiles = tuple(float(f"{value:.4g}") for value in np.quantile(seconds[chosen], _SHARES))
        fitted.append(SizeClass(devices=typical, jobs=int(chosen.sum()), quantiles_seconds=quantiles))
    by_hour = np.bincount((submitted / 3600 % _HOURS).astype(int), minlength=_HOURS)
    hours = tuple(round(float(count) * _HOURS / len(submitted), 3) for count in by_hour)
    return JobMix(name=trace.name, sizes=tuple(fitted), hours=hours)


PHILLY = JobMix(
    name="philly",
    sizes=(
        SizeClass(
            devices=1, jobs=76627,
            quantiles_seconds=(1.0, 30.0, 52.0, 62.0, 122.0, 1117.0, 2716.0, 8512.0,
                19140.0, 135400.0, 865700.0, 3256000.0),
        ),
        SizeClass(
            devices=2, jobs=1818,
            quantiles_seconds=(2.0, 5.0, 9.0, 11.0, 16.0, 21.0, 76.0, 72740.0,
                197100.0, 523300.0, 1474000.0, 2583000.0),
        ),
        SizeClass(
            devices=4, jobs=1870,
            quantiles_seconds=(3.0, 35.69, 75.0, 137.8, 772.8, 17410.0, 89390.0, 184400.0,
                274000.0, 907400.0, 2446000.0, 2751000.0),
        ),
        SizeClass(
            devices=8, jobs=1650,
            quantiles_seconds=(1.0, 33.49, 125.0, 216.9, 1737.0, 23620.0, 173000.0, 350500.0,
                525600.0, 1059000.0, 2656000.0, 4628000.0),
        ),
        SizeClass(
            devices=16, jobs=282,
            quantiles_seconds=(1.0, 3.62, 35.05, 69.4, 609.5, 28470.0, 110000.0, 252000.0,
                445800.0, 940900.0, 1615000.0, 1711000.0),
        ),
    ),
    hours=(0.838, 0.956, 0.718, 0.65, 0.616, 0.784, 0.803, 0.665, 0.76, 0.933, 0.899, 1.067,
        1.075, 1.14, 1.039, 1.135, 1.223, 0.76, 0.88, 1.493, 1.96, 1.418, 1.345, 0.843),
)  # fmt: skip
"""The mix of Microsoft's Philly; `fit` of the trace in `philly_jobs/philly.csv` gives the same."""


def synthesize(
    jobs: int,
    *,
    devices: int,
    load: float,
    seed: int,
    mix: JobMix = PHILLY,
    arrivals: str = "poisson",
    users: int = 50,
    recurrence: float = 0.6,
    models: Sequence[str] = _MODELS,
) -> Trace:
    """Draw `jobs` jobs of a mix, submitted over the time in which `devices` devices at `load` would do them all.

    - `load`: device-seconds asked for over those offered between first and last submission; 1 is as much as they can.
    - `arrivals`: "poisson" (independent, at one rate) or "diurnal" (at the rate of the mix's hours).
    - `users`: so many submit, the busiest ones most (Zipf). `recurrence`: 0 to 1, see above.

    Sizes above `devices` are drawn as `devices`. Raises InputError for a number that makes no sense.
    """
    for name, value, right in (
        ("jobs", jobs, jobs >= 1),
        ("devices", devices, devices >= 1),
        ("load", load, 0 < load < math.inf),
        ("users", users, users >= 1),
        ("recurrence", recurrence, 0 <= recurrence <= 1),
        ("arrivals", arrivals, arrivals in ("poisson", "diurnal")),
    ):
        if not right:
            raise InputError(
                f"{name} is {value}", place="synthetic trace", remedy="see headway.schedule.traces.synthetic"
            )
    random = np.random.default_rng(seed)
    weights = np.array([one.jobs for one in mix.sizes], dtype=float)
    # Users and their templates: the size is the template's, the run time scatters around the template's level.
    busy = 1.0 / np.arange(1, users + 1)
    user = random.choice(users, size=jobs, p=busy / busy.sum())
    template = user * _TEMPLATES + random.integers(_TEMPLATES, size=jobs)
    # Busy templates must not decide the sizes by luck: jobs get sizes in the mix's shares, sorted by their templates.
    order = random.permutation(users * _TEMPLATES)[template]
    ranked = np.argsort(order + random.random(jobs) * 0.5, kind="stable")
    cuts = np.concatenate(([0.0], np.cumsum(weights) / weights.sum()))
    size = np.empty(jobs, dtype=np.int64)
    size[ranked] = np.clip(np.searchsorted(cuts, (np.arange(jobs) + 0.5) / jobs, side="right") - 1, 0, len(weights) - 1)
    level = random.standard_normal(users * _TEMPLATES)[template]
    normal = math.sqrt(recurrence) * level + math.sqrt(1 - recurrence) * random.standard_normal(jobs)
    seconds = np.empty(jobs)
    for at, one in enumerate(mix.sizes):
        mine = np.flatnonzero(size == at)
        # By rank, so that the distribution is the mix's even where few templates share a size.
        share = np.empty(len(mine))
        share[np.argsort(normal[mine], kind="stable")] = (np.arange(len(mine)) + 0.5) / max(1, len(mine))
        seconds[mine] = np.exp(np.interp(share, _SHARES, np.log(one.quantiles_seconds)))
    gang = np.minimum(np.array([one.devices for one in mix.sizes])[size], devices)
    span = float((gang * seconds).sum()) / (devices * load)
    submitted = np.sort(_instants(random, jobs, span, mix.hours if arrivals == "diurnal" else None))
    submitted -= submitted[0]
    model = random.integers(len(models), size=users * _TEMPLATES)[template]
    made = tuple(
        Job(
            name=f"job-{at}",
            submit_seconds=float(submitted[at]),
            devices=int(gang[at]),
            duration_seconds=float(seconds[at]),
            model=models[int(model[at])],
            user=f"user-{user[at]}",
            queue=f"queue-{user[at] % 8}",
        )
        for at in range(jobs)
    )
    note = f"drawn from {mix.name} with seed {seed}: load {load:g} of {devices} devices, {arrivals} arrivals"
    return Trace(name=f"{mix.name}-{jobs}-{seed}", format="headway", jobs=made, notes=(note,))


def _instants(random: np.random.Generator, jobs: int, span: float, hours: Sequence[float] | None) -> np.ndarray:
    """Instants of a Poisson process in [0, span) given their number: independent, by the density of the hours."""
    if hours is None:
        return random.random(jobs) * span
    density = np.array([hours[hour % _HOURS] for hour in range(max(1, math.ceil(span / 3600)))], dtype=float)
    edges = np.minimum(np.arange(len(density) + 1) * 3600.0, span)
    mass = np.concatenate(([0.0], np.cumsum(np.maximum(density, 1e-9) * np.diff(edges))))
    return np.interp(random.random(jobs) * mass[-1], mass, edges)


def resample(trace: Trace, seed: int, *, block_seconds: float = 0.0) -> Trace:
    """A trace like this one: its days in another order, some twice, some not at all (the block bootstrap, Künsch 1989).

    Within a block everything stays as it was: bursts, who submitted what. `block_seconds` 0: a day, or a twentieth of a
    trace that is shorter than twenty days.
    """
    if not trace.jobs:
        raise InputError("there are no jobs to draw from", place=trace.name)
    span = trace.span_seconds
    length = block_seconds or min(_DAY, span / 20) or 1.0
    blocks: list[list[Job]] = [[] for _ in range(int(span / length) + 1)]
    for job in trace.jobs:
        blocks[int(job.submit_seconds / length)].append(job)
    random = np.random.default_rng(seed)
    made: list[Job] = []
    for place, chosen in enumerate(random.integers(len(blocks), size=len(blocks))):
        for job in blocks[chosen]:
            made.append(
                msgspec.structs.replace(job, submit_seconds=job.submit_seconds + (place - int(chosen)) * length)
            )
    if not made:
        raise InputError("the days drawn had no jobs", place=trace.name, remedy="another seed")
    first = made[0].submit_seconds
    jobs = tuple(
        msgspec.structs.replace(job, name=f"{job.name}~{at}", submit_seconds=job.submit_seconds - first)
        for at, job in enumerate(sorted(made, key=lambda job: job.submit_seconds))
    )
    return _like(trace, jobs, f"{trace.name}~{seed}", f"blocks of {length:g} s drawn again with seed {seed}")


def jitter(trace: Trace, seed: int, seconds: float) -> Trace:
    """Each job submitted up to `seconds` later, uniformly: the same jobs, other coincidences."""
    random = np.random.default_rng(seed)
    late = random.random(len(trace.jobs)) * seconds
    moved = [
        msgspec.structs.replace(job, submit_seconds=job.submit_seconds + float(delay))
        for job, delay in zip(trace.jobs, late, strict=True)
    ]
    jobs = tuple(sorted(moved, key=lambda job: job.submit_seconds))
    return _like(trace, jobs, f"{trace.name}~{seed}", f"submissions up to {seconds:g} s later with seed {seed}")


def shuffle(trace: Trace, seed: int) -> Trace:
    """Users, queues and models dealt out anew among the jobs: whatever history teaches about them is wrong."""
    random = np.random.default_rng(seed)
    order = random.permutation(len(trace.jobs))
    jobs = tuple(
        msgspec.structs.replace(job, user=other.user, queue=other.queue, model=other.model)
        for job, other in ((trace.jobs[at], trace.jobs[to]) for at, to in enumerate(order))
    )
    return _like(trace, jobs, f"{trace.name}-shuffled", f"users, queues and models shuffled with seed {seed}")


def _like(trace: Trace, jobs: tuple[Job, ...], name: str, note: str) -> Trace:
    return Trace(name=name, format=trace.format, jobs=jobs, problems=trace.problems, notes=(*trace.notes, note))
