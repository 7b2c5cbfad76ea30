"""`headway simulate cluster`, as a user meets it."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from headway.cli import app

HEAD = "job_id,num_gpu,submit_time,iterations,model_name,duration,interval\n"
GOOD = HEAD + "a,2,0,1,vgg19,10,0\nb,4,1,1,vgg11,10,0\nc,1,2,1,alexnet,1,0\n"


@pytest.fixture
def trace(tmp_path):
    path = tmp_path / "jobs.csv"
    path.write_text(GOOD)
    return path


def invoke(*arguments):
    return CliRunner().invoke(app, ["simulate", "cluster", *map(str, arguments)])


def test_a_trace_gives_figures_for_every_policy_and_seed(trace):
    result = invoke(
        "--trace", trace, "--cluster", "n1g4", "--policy", "fifo,srtf", "--placement", "first-fit", "--json"
    )
    assert result.exit_code == 0, result.stderr
    answer = json.loads(result.stdout)
    fifo, srtf = answer["summaries"]
    assert (fifo["policy"], srtf["policy"]) == ("fifo", "srtf")
    assert fifo["completion_mean"] == pytest.approx(16)  # 10, 19, 19
    assert srtf["completion_mean"] == pytest.approx((10 + 19 + 1) / 3)
    assert (answer["format"], answer["devices"]) == ("tiresias", 4)


def test_a_table_a_page_and_a_row_for_each_job(trace, tmp_path):
    page, rows = tmp_path / "page.html", tmp_path / "rows.csv"
    result = invoke(
        "--trace", trace, "--cluster", "n1g4", "--policy", "fifo,2d-las", "--report", page, "--csv", rows,
        "--workers", 1, "--baseline", "2d-las", "--overhead", "1s",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    assert "vs 2d-las" in result.stdout
    assert str(page) in result.stdout
    assert max(len(line) for line in result.stdout.splitlines() if str(tmp_path) not in line) <= 100
    assert "2/2" in result.stderr
    assert page.read_text().startswith("<!doctype html>")
    assert len(rows.read_text().splitlines()) == 1 + 2 * 3


def test_bad_rows_are_all_named_and_nothing_runs(trace):
    trace.write_text(GOOD + "d,0,3,1,vgg19,10,0\nd,1,3,1,vgg19,-1,0\nbig,8,4,1,vgg19,1,0\n")
    result = invoke("--trace", trace, "--cluster", "n1g4", "--policy", "fifo")
    assert result.exit_code == 2
    for line in (5, 6, 7):
        assert f"line {line}:" in result.stderr
    assert not result.stdout


def test_flagged_rows_are_named_the_rest_is_played_and_the_exit_code_says_so(trace):
    trace.write_text(GOOD + "big,8,4,1,vgg19,1,0\nodd,1,5,1,vgg91,1,0\n")
    result = invoke(
        "--trace", trace, "--cluster", "n1g4", "--policy", "fifo", "--bad", "flag", "--json", "--workers", 1
    )
    assert result.exit_code == 2
    answer = json.loads(result.stdout)
    assert answer["summaries"][0]["jobs"] == 4
    assert {problem["effect"] for problem in answer["problems"]} == {"left out", "kept"}
    assert "never start" in result.stderr


def test_synthetic_jobs_are_the_same_for_the_same_seed():
    def answer(seed):
        result = invoke(
            "--synthetic", 40, "--load", 1.2, "--cluster", "n2g4", "--policy", "headway", "--seed", seed, "--seeds", 2,
            "--workers", 1, "--arrivals", "diurnal", "--json",
        )  # fmt: skip
        assert result.exit_code == 0, result.stderr
        found = json.loads(result.stdout)["summaries"]
        return [{name: value for name, value in each.items() if name != "seconds"} for each in found]

    assert answer(3) == answer(3)
    assert answer(3)[1] == answer(4)[0]


def test_gittins_without_a_history_says_what_it_knows(trace):
    result = invoke("--trace", trace, "--cluster", "n1g4", "--policy", "2d-gittins", "--thresholds", "5,20")
    assert result.exit_code == 0, result.stderr
    assert "--history" in result.stderr
    result = invoke("--synthetic", 20, "--cluster", "n1g4", "--policy", "2d-gittins", "--seed", 4, "--workers", 1)
    assert result.exit_code == 0, result.stderr
    assert "drawn with seed 5" in result.stderr


def test_patience_may_be_a_time_or_never(trace):
    for patience in ("2h", "never"):
        result = invoke("--trace", trace, "--cluster", "n1g4", "--policy", "srsf", "--patience", patience)
        assert result.exit_code == 0, result.stderr


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ((), "give a trace or --synthetic"),
        (("--synthetic", "5", "--policy", "magic"), "magic"),
        (("--synthetic", "5", "--placement", "anywhere"), "anywhere"),
        (("--synthetic", "5", "--thresholds", "many"), "--thresholds"),
        (("--synthetic", "5", "--policy", "themis", "--engine", "fast"), "pure machine only"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(wrong, says):
    result = invoke("--cluster", "n1g4", "--workers", "1", *wrong)
    assert result.exit_code == 2
    assert says in result.stderr


@pytest.mark.parametrize("option", ["--patience", "--quantum"])
@pytest.mark.parametrize("span", ["0s", "-1h", ""])
def test_no_time_at_all_is_not_taken_for_the_default(option, span):
    result = invoke("--synthetic", "1", option, span)
    assert result.exit_code == 2
    assert "rror" in result.stderr


def test_tiresias_simulator_can_be_played_beside_the_exact_machine(trace):
    """It counts devices, whatever the placement; of these three jobs it and the exact machine say the same."""
    result = invoke("--trace", trace, "--cluster", "n1g4", "--policy", "fifo,srtf", "--engine", "tiresias", "--json")
    assert result.exit_code == 0, result.stderr
    fifo, srtf = json.loads(result.stdout)["summaries"]
    assert {each["engine"] for each in (fifo, srtf)} == {"tiresias"}
    assert {each["placement"] for each in (fifo, srtf)} == {"count"}
    assert fifo["completion_mean"] == pytest.approx(16)
    assert srtf["completion_mean"] == pytest.approx(10)
    for wrong, says in ((("--policy", "headway"), "no headway"), (("--overhead", "1s"), "overhead")):
        result = invoke("--trace", trace, "--cluster", "n1g4", "--policy", "fifo", "--engine", "tiresias", *wrong)
        assert result.exit_code == 2
        assert says in result.stderr
