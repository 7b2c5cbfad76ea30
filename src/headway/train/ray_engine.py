"""Ranks across machines: each is a process beside a Ray actor, the actors in a placement group that matches the plan.

A rank does not run inside its actor. The actor (`Host`) starts the same worker process that the local engine starts,
hands its lines and events to the driver, and forwards signals; so a rank is the same program under either engine, and a
script that hangs in a collective can still be ended. If the driver dies, Ray ends the actors, and the kernel ends their
processes with them.

Bundles of the placement group are groups of ranks, and a bundle never spans two machines. The first of these that the
machines can hold is used: the ranks that the plan put on one node; the ranks of a tensor group; each rank by itself.

Needed on every machine: the same Python environment with `headway[ray]`, and the script and the run directory at the
same path (a shared file system when there are several machines), which is checked before anything starts. The plan and
the workload travel as content.
"""

from __future__ import annotations

import hashlib
import logging
import math
import os
import queue
import secrets
import signal
import socket
import struct
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from headway.errors import FileError, HeadwayError, InputError, MissingExtraError, RunError
from headway.hardware.cluster import Cluster
from headway.plan.plan import Plan
from headway.train.processes import Exit, Occurrence, Processes
from headway.value import read_text

__all__ = ["Host", "RayRanks", "groupings", "start"]

PLACEMENT_SECONDS = 30.0  # for the cluster to find room
SETUP_SECONDS = 60.0  # for the actors to start: each imports Python and headway on its machine
CLOSE_SECONDS = 3.0


class Host:
    """What stands beside a rank on its machine: starts the process, watches it, passes signals on. Made an actor."""

    def __init__(self) -> None:
        self._occurrences: queue.SimpleQueue[Occurrence] = queue.SimpleQueue()
        self._commands: queue.SimpleQueue[int] = queue.SimpleQueue()  # signals; 0: the whole process group, SIGKILL
        self._watcher: threading.Thread | None = None

    def describe(self) -> dict[str, Any]:
        """Where this is: node (Ray's id), address, network interface of that address, GPUs that Ray gave us."""
        import ray

        context = ray.get_runtime_context()
        address = ray.util.get_node_ip_address()
        return {
            "node": context.get_node_id(),
            "address": address,
            "interface": _interface_of(address),
            "gpus": [str(number) for number in ray.get_gpu_ids()],
        }

    def complaint(self, script: str, digest: str, token_file: str) -> str:
        """What is not as on the driver's machine (script, run directory); empty if all is."""
        try:
            found = hashlib.sha256(Path(script).read_bytes()).hexdigest()
        except OSError as error:
            return f"the script {script} cannot be read there: {error.strerror}"
        if found != digest:
            return f"the script {script} is another version there"
        if not Path(token_file).exists():
            return f"the run directory {Path(token_file).parent} is another one there, or none"
        return ""

    def free_port(self) -> int:
        """A TCP port that was free a moment ago on every address, which is where torch's rendezvous listens.

        Below those that systems give to connections on their own, of which one could take it in the meantime.
        """
        for _ in range(100):
            port = 20_000 + secrets.randbelow(12_000)
            with socket.socket() as probe, suppress(OSError):
                probe.bind(("", port))
                return port
        raise RunError("no TCP port from 20000 to 31999 is free", remedy="end what holds them on that machine")

    def start(
        self, rank: int, script: str, arguments: Sequence[str], variables: Mapping[str, str], files: Mapping[str, str]
    ) -> None:
        """Start the rank's process; `files` (variable → content) are written here and their paths put into it."""
        self._watcher = threading.Thread(
            target=self._watch, args=(rank, script, list(arguments), dict(variables), dict(files)), daemon=True
        )
        self._watcher.start()

    def poll(self, seconds: float) -> list[Occurrence]:
        """What happened since the last call; waits up to `seconds` for something to happen."""
        found: list[Occurrence] = []
        with suppress(queue.Empty):
            found.append(self._occurrences.get(timeout=seconds))
            while len(found) < 1000:
                found.append(self._occurrences.get_nowait())
        return found

    def signal(self, number: int) -> None:
        """Pass a signal on to the process; 0 kills it and all that it started."""
        self._commands.put(number)

    def close(self) -> None:
        """Kill what still runs and remove what was written here."""
        self._commands.put(0)
        if self._watcher is not None:
            self._watcher.join(CLOSE_SECONDS)

    def _watch(self, rank: int, script: str, arguments: list[str], variables: dict, files: dict) -> None:
        # The process is started by the thread that lives as long as it: the kernel's parent-death signal follows the
        # thread, and Ray's own threads come and go.
        from headway.train.launch import worker_command

        processes = Processes()
        try:
            with tempfile.TemporaryDirectory(prefix="headway-") as private:
                for name, content in files.items():
                    path = Path(private) / f"{name.lower()}.json"
                    path.write_text(content, encoding="utf-8")
                    variables[name] = str(path)
                directory = variables.pop("PWD", "")
                if not os.path.isdir(directory):
                    directory = str(Path(script).parent)
                processes.start(
                    rank, worker_command(sys.executable, script, arguments), {**os.environ, **variables}, directory
                )
                while processes.running():
                    for occurrence in processes.poll(0.05):
                        self._occurrences.put(occurrence)
                    with suppress(queue.Empty):
                        number = self._commands.get_nowait()
                        if number:
                            processes.signal(number)
                        else:
                            processes.kill()
        except (HeadwayError, OSError) as error:
            self._occurrences.put(Exit(rank, 1, time.time(), lost=f"its process could not be run: {error}"))
        finally:
            processes.close()


class RayRanks:
    """The ranks of a plan behind Ray actors, as `launch.supervise` wants them."""

    def __init__(self, hosts: Sequence[Any], places: Sequence[Mapping[str, Any]]) -> None:
        import ray
        import ray.exceptions

        self._ray = ray
        self._hosts = dict(enumerate(hosts))
        self._places = places
        self._pending: dict[Any, int] = {host.poll.remote(1.0): rank for rank, host in self._hosts.items()}
        self._running = set(self._hosts)

    def running(self) -> tuple[int, ...]:
        """Ranks whose Exit has not been handed out."""
        return tuple(sorted(self._running))

    def where(self, rank: int) -> str:
        """Address of the machine of a rank."""
        return self._places[rank]["address"]

    def poll(self, seconds: float) -> list[Occurrence]:
        """What happened since the last call; waits up to `seconds` for something to happen."""
        occurrences: list[Occurrence] = []
        if not self._pending:
            return occurrences
        ready, _ = self._ray.wait(list(self._pending), num_returns=1, timeout=seconds)
        if ready:  # and whatever else is there already
            ready, _ = self._ray.wait(list(self._pending), num_returns=len(self._pending), timeout=0)
        for reference in ready:
            rank = self._pending.pop(reference)
            try:
                found = self._ray.get(reference)
            except self._ray.exceptions.RayError as error:
                self._running.discard(rank)
                occurrences.append(Exit(rank, 1, time.time(), lost=_first_line(error)))
                continue
            occurrences.extend(found)
            if any(isinstance(occurrence, Exit) for occurrence in found):
                self._running.discard(rank)
            else:
                self._pending[self._hosts[rank].poll.remote(1.0)] = rank
        return occurrences

    def signal(self, number: int) -> None:
        """Send a signal to all running ranks."""
        for rank in self._running:
            self._hosts[rank].signal.remote(number)

    def kill(self) -> None:
        """SIGKILL to all running ranks and to what they started."""
        self.signal(0)


def groupings(plan: Plan, cluster: Cluster | None) -> list[list[tuple[int, ...]]]:
    """Ways to divide the ranks into groups that stay on one machine each, the best way first.

    The ranks that the plan put on one node of `cluster`; the ranks of a tensor group (they talk most); single ranks.
    """
    ways: list[list[tuple[int, ...]]] = []
    if cluster is not None:
        node_of = {device.name: device.node for device in cluster.devices}
        by_node: dict[str, list[int]] = {}
        for rank, device in enumerate(plan.devices):
            by_node.setdefault(node_of.get(device, device), []).append(rank)
        ways.append([tuple(ranks) for ranks in by_node.values()])
    tensor_groups = [plan.tensor_group(rank) for rank in range(0, plan.world_size, plan.tensor)]
    for way in (tensor_groups, [(rank,) for rank in range(plan.world_size)]):
        if way not in ways:
            ways.append(way)
    return ways


@contextmanager
def start(
    script: Path,
    arguments: Sequence[str],
    plan: Plan,
    *,
    run_directory: Path,
    workload_path: Path,
    plan_path: Path,
    cluster: Cluster | None,
    environment: Mapping[str, str],
) -> Iterator[RayRanks]:
    """Place the ranks of `plan` on a Ray cluster, start them, and end them (and what Ray we started) on leaving.

    The cluster is the one that this process is connected to, else that of RAY_ADDRESS, else one running on this
    machine, else a new one on this machine, bound to loopback and ended with the run.

    Raises MissingExtraError without Ray, InputError if the ranks find no room within PLACEMENT_SECONDS or the
    script or run directory is not the same on every machine, RunError if the actors do not start.
    """
    ray = _import_ray()
    needs = [_needs(plan, cluster, rank) for rank in range(plan.world_size)]
    files = {"HEADWAY_PLAN": read_text(plan_path), "HEADWAY_WORKLOAD": read_text(workload_path)}
    with _connected(ray, needs):
        group, groups = _place(ray, plan, cluster, needs, PLACEMENT_SECONDS)
        hosts: list[Any] = []
        try:
            try:
                hosts = _start_hosts(ray, group, groups, needs)
                places = ray.get([host.describe.remote() for host in hosts], timeout=SETUP_SECONDS)
                _check_files(ray, hosts, places, script, run_directory)
                address = places[0]["address"]
                port = ray.get(hosts[0].free_port.remote(), timeout=SETUP_SECONDS)
                started = []
                for rank, variables in enumerate(_environments(plan, cluster, places, needs, run_directory)):
                    variables |= {"MASTER_ADDR": address, "MASTER_PORT": str(port), "HEADWAY_INIT_METHOD": "env://"}
                    variables |= {"PWD": os.getcwd(), **environment}
                    started.append(hosts[rank].start.remote(rank, str(script), list(arguments), variables, files))
                ray.get(started, timeout=SETUP_SECONDS)
            except ray.exceptions.RayError as error:
                raise RunError(
                    f"the ranks could not be started: {_first_line(error)}",
                    place="Ray",
                    remedy="see `ray status`; every machine needs the same Python with headway[ray] installed",
                ) from error
            yield RayRanks(hosts, places)
        finally:
            closing = [host.close.remote() for host in hosts]
            if closing:
                ray.wait(closing, num_returns=len(closing), timeout=CLOSE_SECONDS)
            for host in hosts:
                ray.kill(host)
            ray.util.remove_placement_group(group)


def _import_ray() -> Any:
    # Headway reports nothing to anybody; neither shall the Ray that it starts.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
        import ray.exceptions
        import ray.util.placement_group
        import ray.util.scheduling_strategies
    except ImportError:
        raise MissingExtraError(library="ray", extra="ray", place="--engine ray") from None
    return ray


@contextmanager
def _connected(ray: Any, needs: Sequence[Mapping[str, float]]) -> Iterator[None]:
    if ray.is_initialized():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)  # ray.init replaces it
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    address = _running_address(ray)
    try:
        if address:
            ray.init(address=address, **options)
        else:
            cores = max(os.cpu_count() or 1, int(sum(need["CPU"] for need in needs)))
            ray.init(
                address="local",
                num_cpus=cores,
                include_dashboard=False,
                # Nobody else needs to reach it. (127.0.0.1 Ray would replace by the address of a network card.)
                _node_ip_address="127.0.0.2" if sys.platform == "linux" else None,
                **options,
            )
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise InputError(
            f"cannot connect to Ray: {_first_line(error)}",
            place=address or "a new Ray on this machine",
            remedy="check RAY_ADDRESS, and that `ray status` answers",
        ) from error
    try:
        yield
    finally:
        ray.shutdown()
        if threading.current_thread() is threading.main_thread() and before is not None:
            signal.signal(signal.SIGTERM, before)


def _running_address(ray: Any) -> str:
    """Address of the Ray cluster to use; empty: start one. InputError if RAY_ADDRESS does not answer.

    Asked with a plain TCP connection first: ray.init retries a dead address for minutes.
    """
    wanted = os.environ.get("RAY_ADDRESS", "")
    if wanted and wanted != "auto":
        if "://" not in wanted and not _answers(wanted, ray):
            raise InputError(
                "no Ray answers there",
                place=f"RAY_ADDRESS={wanted}",
                remedy="start one with `ray start --head`, or unset RAY_ADDRESS to use this machine",
            )
        return wanted
    # Where `ray start` notes the cluster that it started on this machine.
    note = Path(os.environ.get("RAY_TMPDIR", "/tmp")) / "ray" / "ray_current_cluster"
    with suppress(OSError, UnicodeDecodeError):
        noted = note.read_text(encoding="utf-8").strip()
        if noted and _answers(noted, ray):
            return noted
    if wanted == "auto":
        raise InputError(
            "no Ray runs on this machine", place="RAY_ADDRESS=auto", remedy="start one with `ray start --head`"
        )
    return ""


def _answers(address: str, ray: Any) -> bool:
    host, _, port = address.rpartition(":")
    if host in ("localhost", "127.0.0.1", "::1"):
        host = ray.util.get_node_ip_address()  # so does ray.init
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=5.0):
            return True
    except (OSError, ValueError):
        return False


def _needs(plan: Plan, cluster: Cluster | None, rank: int) -> dict[str, float]:
    """What Ray must set aside for a rank: CPUs (as many as it has threads), and a GPU if its device is one."""
    from headway.train.launch import accelerator_of

    kind = accelerator_of(plan, cluster, rank)
    if kind is None:
        return {"CPU": 1.0}
    needs = {"CPU": float(max(1, kind.threads))}
    if kind.torch_device == "cuda":
        needs["GPU"] = 1.0
    return needs


def _sum(needs: Sequence[Mapping[str, float]]) -> dict[str, float]:
    total: dict[str, float] = {}
    for need in needs:
        for name, amount in need.items():
            total[name] = total.get(name, 0.0) + amount
    return total


def _fits(bundles: Sequence[Mapping[str, float]], nodes: Sequence[Mapping[str, float]]) -> bool:
    """Whether empty machines of these resources could hold the bundles (largest first into the first that has room)."""
    free = [dict(node) for node in nodes]
    for bundle in sorted(bundles, key=lambda bundle: -sum(bundle.values())):
        for node in free:
            if all(node.get(name, 0.0) >= amount for name, amount in bundle.items()):
                for name, amount in bundle.items():
                    node[name] -= amount
                break
        else:
            return False
    return True


def _place(
    ray: Any, plan: Plan, cluster: Cluster | None, needs: Sequence[Mapping[str, float]], seconds: float
) -> tuple[Any, list[tuple[int, ...]]]:
    """A placement group that is ready, and the ranks that each of its bundles holds."""
    nodes = [node for node in ray.nodes() if node["Alive"]]
    ways = groupings(plan, cluster)
    possible = [
        way
        for way in ways
        if _fits([_sum([needs[rank] for rank in ranks]) for ranks in way], [node["Resources"] for node in nodes])
    ]
    # None fits: a cluster that grows on demand (autoscaler) may still make room, so ask, and wait the bounded time.
    deadline = time.monotonic() + seconds
    possible = possible or [[(rank,) for rank in range(plan.world_size)]]
    for position, way in enumerate(possible):
        bundles = [_sum([needs[rank] for rank in ranks]) for ranks in way]
        group = ray.util.placement_group(bundles, strategy="PACK")
        share = (deadline - time.monotonic()) / (len(possible) - position)
        try:
            if group.wait(max(1, math.ceil(share))):  # Ray counts whole seconds
                return group, _in_order_of_nodes(ray, group, way)
        except BaseException:
            ray.util.remove_placement_group(group)
            raise
        ray.util.remove_placement_group(group)
    amounts = sorted((node["NodeManagerAddress"], _amounts(node["Resources"])) for node in nodes)
    has = "; ".join(f"{address}: {amount}" for address, amount in amounts) or "no machines"
    single = {_amounts(need) for need in needs}
    raise InputError(
        f"no room for the ranks within {seconds:g} s: the plan needs {plan.world_size} ranks of "
        f"{' or '.join(sorted(single))} each, and the Ray cluster has in all (used or not) {has}",
        place="Ray placement",
        remedy="plan for fewer devices (--devices), add machines, or free some: `ray status` shows who uses what",
    )


def _in_order_of_nodes(ray: Any, group: Any, way: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Groups of equal size handed to the bundles node by node, so that neighbours in the mesh are neighbours."""
    if len({len(ranks) for ranks in way}) != 1:
        return way
    node_of = ray.util.placement_group_table(group)["bundles_to_node_id"]
    first_seen: dict[str, int] = {}
    for bundle in range(len(way)):
        first_seen.setdefault(node_of[bundle], bundle)
    order = sorted(range(len(way)), key=lambda bundle: (first_seen[node_of[bundle]], bundle))
    placed: list[tuple[int, ...]] = [()] * len(way)
    for ranks, bundle in zip(way, order, strict=True):
        placed[bundle] = ranks
    return placed


def _start_hosts(ray: Any, group: Any, groups: list[tuple[int, ...]], needs: Sequence[Mapping[str, float]]) -> list:
    hosts: dict[int, Any] = {}
    for bundle, ranks in enumerate(groups):
        for rank in ranks:
            strategy = ray.util.scheduling_strategies.PlacementGroupSchedulingStrategy(
                placement_group=group, placement_group_bundle_index=bundle
            )
            actor = ray.remote(Host).options(
                num_cpus=needs[rank]["CPU"],
                num_gpus=needs[rank].get("GPU", 0),
                scheduling_strategy=strategy,
                max_restarts=0,
                max_concurrency=8,  # poll waits while signals must get through
            )
            hosts[rank] = actor.remote()
    return [hosts[rank] for rank in range(len(needs))]


def _check_files(ray: Any, hosts: Sequence[Any], places: Sequence[Mapping], script: Path, run_directory: Path) -> None:
    """InputError unless every machine sees this script and this run directory, at the same paths."""
    token = run_directory / f".headway-{secrets.token_hex(8)}"
    try:
        token.touch()
    except OSError as error:
        raise FileError(f"cannot be written: {error.strerror}", place=str(run_directory)) from error
    try:
        digest = hashlib.sha256(script.read_bytes()).hexdigest()
        asked = [host.complaint.remote(str(script), digest, str(token)) for host in hosts]
        for place, complaint in zip(places, ray.get(asked, timeout=SETUP_SECONDS), strict=True):
            if complaint:
                raise InputError(
                    complaint,
                    place=f"machine {place['address']}",
                    remedy="put the script and the run directory on a file system that all machines mount at one path",
                )
    finally:
        token.unlink(missing_ok=True)


def _environments(
    plan: Plan,
    cluster: Cluster | None,
    places: Sequence[Mapping[str, Any]],
    needs: Sequence[Mapping[str, float]],
    run_directory: Path,
) -> list[dict[str, str]]:
    """The variables of each rank; files (plan, workload) and the rendezvous are added by others."""
    from headway.train.launch import accelerator_of, rank_environment

    nodes = list(dict.fromkeys(place["node"] for place in places))
    environments = []
    for rank, place in enumerate(places):
        neighbours = [other for other, there in enumerate(places) if there["node"] == place["node"]]
        variables = rank_environment(
            rank,
            plan,
            run_directory=run_directory,
            workload_path=Path(),
            plan_path=Path(),
            threads=int(needs[rank]["CPU"]),
            accelerator=accelerator_of(plan, cluster, rank),
        )
        variables |= {
            "LOCAL_RANK": str(neighbours.index(rank)),
            "LOCAL_WORLD_SIZE": str(len(neighbours)),
            "GROUP_RANK": str(nodes.index(place["node"])),
        }
        if place["interface"]:
            variables |= {"GLOO_SOCKET_IFNAME": place["interface"], "NCCL_SOCKET_IFNAME": place["interface"]}
        # A rank sees the GPUs of all its neighbours, in the order of their local ranks, so that LOCAL_RANK means under
        # Ray what it means everywhere, and nccl can use the links between them.
        gpus = [gpu for other in neighbours for gpu in places[other]["gpus"]]
        if gpus:
            variables["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
        environments.append(variables)
    return environments


def _interface_of(address: str) -> str:
    """Name of the network interface that has this IPv4 address; empty if none is found."""
    from headway.train.launch import loopback_interface

    if address.startswith("127."):
        return loopback_interface()
    if sys.platform != "linux":
        return ""
    import fcntl

    siocgifaddr = 0x8915  # <bits/ioctls.h>
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        for _, name in socket.if_nameindex():
            with suppress(OSError):  # an interface without an IPv4 address
                answer = fcntl.ioctl(any_socket.fileno(), siocgifaddr, struct.pack("256s", name.encode()[:15]))
                if socket.inet_ntoa(answer[20:24]) == address:
                    return name
    return ""


def _amounts(resources: Mapping[str, float]) -> str:
    shown = [f"{resources[name]:g} {name}" for name in ("CPU", "GPU") if resources.get(name)]
    return " + ".join(shown) or "no CPU"


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
