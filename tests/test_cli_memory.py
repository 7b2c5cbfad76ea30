"""`headway simulate memory`, as a user meets it."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from headway.cli import app


def invoke(*arguments):
    return CliRunner().invoke(app, ["simulate", "memory", "gpt2", "--cluster", "dgx-1v", *map(str, arguments)])


def test_every_policy_has_its_overhead_at_every_budget():
    result = invoke("--batch", 2, "--sequence", 32, "--budgets", "1,0.9,1kB", "--policies", "keep-all,dtr", "--json")
    assert result.exit_code == 0, result.stderr
    answer = json.loads(result.stdout)
    rows = {(row["policy"], round(row["budget_share"], 6)): row for row in answer["rows"]}
    assert len(rows) == 6
    assert answer["samples"] == 2
    assert rows["keep-all", 1.0]["overhead"] == pytest.approx(0.0)
    assert rows["keep-all", 0.9]["failure"]
    assert rows["dtr", 1.0]["price"]["peak_bytes"] <= rows["dtr", 1.0]["budget_bytes"]
    assert all(row["failure"] for row in answer["rows"] if row["budget_bytes"] == 1000)


def test_the_table_shows_a_dash_where_a_policy_does_not_get_that_low():
    result = invoke("--batch", 2, "--sequence", 32, "--budgets", "1,0.9", "--policies", "keep-all,dtr")
    assert result.exit_code == 0, result.stderr
    assert max(map(len, result.stdout.splitlines())) <= 100
    line = next(line for line in result.stdout.splitlines() if "keep-all" in line)
    assert line.split()[-2:] == ["0.0%", "-"]


@pytest.mark.parametrize(("option", "value"), [("--budgets", "0"), ("--budgets", "-1"), ("--policies", "no-such")])
def test_a_budget_or_policy_that_there_is_not_is_refused(option, value):
    result = invoke("--batch", 2, "--sequence", 32, option, value)
    assert result.exit_code == 2
    assert value in result.stderr
