"""Who goes first: one small class for each policy, and `make_policy` to have one by its name.

- `ordering.py`: what a policy is and what it sees; begin here. `catalog.py`: names to policies.
- `fifo.py`, `shortest.py`: orders by what a job asks for. `tiresias.py`: by attained service, with `gittins.py`.
- `gandiva.py`: slices, packing, migration. `fairness.py`: Themis, max-min. `gavel.py`: kinds of devices.
- `elastic.py`: Optimus and Pollux, with measured `goodput.py`. `recurring.py`: QSSF.
- `headway.py`: our own, with what it learns in `history.py`.
"""

from __future__ import annotations

from headway.schedule.policies.catalog import POLICIES, make_policy

__all__ = ["POLICIES", "make_policy"]
