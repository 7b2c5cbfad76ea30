"""Published measurements as what Headway predicts: tables of training speed and memory, row by row, to workloads,
clusters and plans.

A file is recognised by its header. Two forms are known: one line for each training run with the columns of
`COLUMNS` (speed, memory, or both), and vTrain's table of single-node iteration times (`VTRAIN_COLUMNS`). A row that
lacks what a prediction needs, or contradicts itself, is listed as a `SkippedRow` with the reason, and never guessed.
What a table leaves out but its source states elsewhere (the attention heads in its scripts, the vocabulary of a known
model), and what a source does not state (the network of a single node), is filled in, and `PublishedRow.assumed` says
so.

The columns count as their sources count: `tokens_per_s_per_gpu` for each GPU, `global_batch` in sequences, `dp`
without context parallelism, memory of the fullest GPU in GiB (what torch's allocator and nvidia-smi count in).

`rows.py` reads tables and puts rows together; `cells.py` the cells of one row; what they say about the `frameworks.py`,
`models.py`, `machines.py` and `plans.py` has a file each.
"""

from __future__ import annotations

from headway.predict.published.rows import COLUMNS, VTRAIN_COLUMNS, PublishedRow, SkippedRow, is_fitted, read_rows

__all__ = ["COLUMNS", "VTRAIN_COLUMNS", "PublishedRow", "SkippedRow", "is_fitted", "read_rows"]
