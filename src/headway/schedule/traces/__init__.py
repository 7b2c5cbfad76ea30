"""Jobs to play.

`read.py` reads files, `formats.py` knows their columns, `synthetic.py` draws jobs and varies traces.
"""

from __future__ import annotations

from headway.schedule.traces.read import FORMATS, Trace, detect, read_throughputs, read_trace

__all__ = ["FORMATS", "Trace", "detect", "read_throughputs", "read_trace"]
