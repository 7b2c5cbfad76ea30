"""Which checkpoint of a launch is the newest, on disk or in remote memory, and that it is on disk in the end.

with NewestCheckpoint(variables, run_directory, on_event) as newest:
    ...                         # ranks, whose events go to newest.on_event
    newest.variables()          # what ranks that are started again go on from
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from headway.errors import HeadwayError

__all__ = ["NewestCheckpoint", "note"]


class NewestCheckpoint:
    """The newest checkpoint of this launch, in remote memory if `remote` names a node, or on disk.

    `requests()`: how often the user has asked to stop. Used with `with`: when the ranks have ended, well or not, and
    the newest checkpoint is in remote memory alone, which ends now, it is brought to the run's folder. Asked to stop a
    second time, it lets that be.
    """

    def __init__(
        self,
        remote: Mapping[str, str],
        run_directory: Path,
        on_event: Callable[[dict], None],
        requests: Callable[[], int] = lambda: 0,
    ) -> None:
        self._remote, self._directory, self._tell = remote, run_directory / "checkpoint", on_event
        self._requests = requests
        # Earlier launches' are not this one's.
        self._on_disk: tuple[int, str] | None = None  # (step, path), wherever the script wanted it
        self._in_run = -1  # the step of the newest in the run's folder, where `--resume` looks

    def on_event(self, event: dict) -> None:
        """Take note, and pass it on."""
        if event.get("event") == "checkpoint" and event.get("on") != "remote":
            step, path = int(event.get("step", 0)), str(event.get("path", ""))
            self._on_disk = step, path
            if Path(path).resolve().parent == self._directory.resolve():
                self._in_run = step
        self._tell(event)

    def is_remote(self) -> bool:
        """Whether it is in remote memory alone. Raises RunError when the memory node is gone."""
        return self._is_newer_than(-1 if self._on_disk is None else self._on_disk[0])

    def variables(self) -> dict[str, str]:
        """What tells ranks to go on from it; nothing where there is none. Raises RunError as `is_remote`."""
        if self.is_remote():
            return {"HEADWAY_RESUME": "remote"}
        return {} if self._on_disk is None else {"HEADWAY_RESUME": str(Path(self._on_disk[1]).resolve())}

    def __enter__(self) -> NewestCheckpoint:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        try:
            if self._is_newer_than(self._in_run):
                self._bring()
        except HeadwayError as lost:
            if error is None:
                raise
            # What went wrong first is what matters.
            note(error, lost)

    def _is_newer_than(self, step: int) -> bool:
        if not self._remote:
            return False
        from headway.train.remote_checkpoint import RemoteCheckpoints

        found = RemoteCheckpoints.attach(self._remote).step
        return found is not None and found > step

    def _bring(self) -> None:
        from headway.train.checkpoint import write_out
        from headway.train.remote_checkpoint import RemoteCheckpoints

        enough = max(2, self._requests() + 1)
        path = write_out(
            RemoteCheckpoints.attach(self._remote), self._directory, is_stopped=lambda: self._requests() >= enough
        )
        step = int(path.name.removeprefix("step-"))
        self.on_event({"event": "checkpoint", "rank": 0, "step": step, "path": str(path)})


def note(error: BaseException, lost: HeadwayError) -> None:
    """Add to an error that goes its way what else went wrong with the newest checkpoint, once."""
    text = f"the newest checkpoint is lost with the remote memory: {lost}"
    if text not in getattr(error, "__notes__", ()):
        error.add_note(text)
