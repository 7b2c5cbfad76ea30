"""The command line as a user meets it: help, JSON on stdout, errors of one screen with exit codes, documentation."""

import json
from pathlib import Path

import msgspec
import pytest
import torch
import typer
from typer.testing import CliRunner

from headway.cli import app
from headway.hardware.catalog import load_cluster
from headway.plan.plan import Plan, single_device_plan

ROOT = Path(__file__).parent.parent


def _verbs() -> dict:
    """Every verb; those of a group by two words, like `simulate collective`."""
    verbs = {}
    for name, command in typer.main.get_command(app).commands.items():
        if hasattr(command, "commands"):
            verbs.update({f"{name} {inner}": found for inner, found in command.commands.items()})
        else:
            verbs[name] = command
    return verbs


COMMANDS = _verbs()


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Verbs write into the current folder: let that be one of the test's own."""
    monkeypatch.chdir(tmp_path)


def invoke(*arguments: str):
    return CliRunner().invoke(app, list(arguments))


@pytest.mark.parametrize("verb", sorted(COMMANDS))
def test_every_verb_has_help_with_an_example(verb):
    result = invoke(*verb.split(), "--help")
    assert result.exit_code == 0
    assert "Example" in result.stdout
    assert f"headway {verb}" in result.stdout


@pytest.mark.parametrize("verb", sorted(COMMANDS))
def test_every_verb_takes_json(verb):
    assert any("--json" in parameter.opts for parameter in COMMANDS[verb].params)


@pytest.mark.parametrize("verb", sorted(COMMANDS))
def test_every_verb_and_option_is_documented(verb):
    text = (ROOT / "docs" / "cli.md").read_text()
    assert f"## headway {verb}" in text
    for parameter in COMMANDS[verb].params:
        for option in parameter.opts:
            if option.startswith("--"):
                assert f"`{option}" in text, f"docs/cli.md does not say what {verb} {option} does"


def test_trace_prints_the_model_and_nothing_else_on_stdout():
    result = invoke("trace", "gpt2", "--json")
    assert result.exit_code == 0
    workload = json.loads(result.stdout)
    assert sum_parameters(workload) == 124_439_808


def sum_parameters(workload: dict) -> int:
    total = 0
    for parameter in workload["graph"]["parameters"]:
        product = 1
        for size in parameter["shape"]:
            product *= size
        total += product
    return total


def test_plan_writes_a_plan_that_predict_reads(tmp_path):
    path = tmp_path / "plan.json"
    result = invoke("plan", "gpt2", "--cluster", "dgx-a100", "--batch", "64", "--output", str(path))
    assert result.exit_code == 0, result.output
    assert "Best plans" in result.stdout
    plan = Plan.load(path).validate()
    assert plan.global_batch == 64
    result = invoke("predict", "gpt2", "--plan", str(path), "--cluster", "dgx-a100", "--json")
    assert result.exit_code == 0, result.output
    prediction = json.loads(result.stdout)
    parts = prediction["time"]
    assert parts["step_seconds"] == pytest.approx(sum(value for name, value in parts.items() if name != "step_seconds"))
    assert len(prediction["memory"]) == plan.world_size


def test_a_refused_export_loses_neither_the_plans_nor_their_page(tmp_path):
    page = tmp_path / "plan.html"
    given = ("--cluster", "dgx-a100", "--batch", "64", "--pipeline", "2", "--report", str(page))
    result = invoke("plan", "gpt2", *given, "--export", "deepspeed")
    assert result.exit_code == 2
    assert "deepspeed cannot say" in result.stderr
    assert "Best plans" in result.stdout
    written = page.read_text(encoding="utf-8")
    assert "<h1>gpt2 on dgx-a100</h1>" in written
    assert written.count("<figure") == 4
    assert "Left out" in written


@pytest.mark.parametrize("goal", ["time", "memory", "cost"])
def test_plan_pursues_the_goal(goal):
    result = invoke("plan", "gpt2", "--cluster", "dgx-a100", "--batch", "64", "--goal", goal, "--json", "--keep", "3")
    assert result.exit_code == 0, result.output
    best = [item["prediction"] for item in json.loads(result.stdout)["best"]]
    keys = {
        "time": [item["time"]["step_seconds"] for item in best],
        "memory": [max(sum(rank.values()) for rank in item["memory"]) for item in best],
        "cost": [],
    }[goal]
    assert keys == sorted(keys)


def expect_error(result, code: int, *words: str) -> None:
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    assert "error:" in result.stderr
    flat = " ".join(result.stderr.split())
    for word in words:
        assert word in flat, result.stderr
    assert len(result.stderr.splitlines()) <= 40


def test_unknown_model_names_the_closest():
    expect_error(invoke("trace", "gpt22"), 2, "gpt22", "gpt2")


def test_missing_script_is_named():
    expect_error(invoke("run", "no/such/script.py"), 2, "no/such/script.py", "no such script")
    assert not Path("runs").exists()


def test_misspelt_field_in_a_cluster_file_is_named(tmp_path):
    path = tmp_path / "cluster.yaml"
    path.write_text("preset: dgx-a100\nntework: 25GB/s\n")
    expect_error(invoke("plan", "gpt2", "--cluster", str(path)), 2, "ntework", "network")


def test_unknown_cluster_names_the_closest():
    expect_error(invoke("plan", "gpt2", "--cluster", "dgx-a10"), 2, "dgx-a10", "dgx-a100")


def test_plan_with_wrong_degrees_is_refused_with_the_field(tmp_path):
    plan = single_device_plan("gpt2", 12, 8)
    path = tmp_path / "plan.json"
    path.write_text(plan.to_json().replace('"data": 1', '"data": 3'))
    expect_error(invoke("run", str(ROOT / "examples" / "gpt.py"), "--plan", str(path)), 2, "devices", "3 ranks")


def test_plan_with_an_unknown_field_is_refused(tmp_path):
    path = tmp_path / "plan.json"
    path.write_text('{"modle": "gpt2"}')
    expect_error(invoke("predict", "gpt2", "--plan", str(path)), 2, "modle")


def test_model_that_fits_nowhere_says_by_how_much():
    result = invoke("plan", "llama3.1-70b", "--cluster", "aws-g4dn.12xlarge", "--sequence", "512", "--batch", "4")
    expect_error(result, 3, "GB")


def test_a_plan_for_machines_that_are_not_here_is_not_started_here(monkeypatch):
    script = str(ROOT / "examples" / "gpt.py")
    monkeypatch.delenv("HEADWAY_DEVICE", raising=False)
    many = invoke("run", script, "--cluster", "dgx-a100:2", "--data", "16", "--zero", "0", "--name", "many")
    expect_error(many, 2, "2 machines", "--engine ray")
    if torch.cuda.device_count() < 8:
        one = invoke("run", script, "--cluster", "dgx-a100", "--data", "8", "--zero", "0", "--name", "one")
        expect_error(one, 2, "8 GPUs", "HEADWAY_DEVICE=cpu")


def test_report_of_a_folder_that_is_no_run(tmp_path):
    expect_error(invoke("report", str(tmp_path)), 2, str(tmp_path.name))


def test_resume_without_a_checkpoint(tmp_path):
    expect_error(invoke("run", "--resume", str(tmp_path / "nothing")), 2, "no such run")


def test_usage_error_exits_with_two():
    assert invoke("plan").exit_code == 2
    assert invoke("plan", "gpt2", "--zero", "7").exit_code == 2


def test_simulate_collective_compares_and_leaves_pictures_timelines_and_programs(tmp_path):
    arguments = ("--cluster", "dgx-1v", "--devices", "0,1,4", "--size", "100MB", "--algorithm", "packed,ring")
    result = invoke("simulate", "collective", *arguments, "--json")
    assert result.exit_code == 0, result.output
    answer = json.loads(result.stdout)
    assert [entry["algorithm"] for entry in answer["entries"]] == ["packed", "ring"]
    files = {path.name for path in (tmp_path / "runs" / "all_reduce-dgx-1v-3").iterdir()}
    assert {"packed.svg", "packed.timeline.json", "packed.json", "packed.xml", "ring.svg"} <= files
    table = invoke("simulate", "collective", *arguments)
    assert "packed" in table.stdout
    assert max(map(len, table.stdout.splitlines()[:10])) <= 100


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--cluster", "dgx-1v", "--devices", "0,9"), "positions are 0 to 7"),
        (("--cluster", "dgx-1v", "--size", "much"), "write it like"),
        (("--cluster", "dgx-1v", "--algorithm", "rign"), "ring"),
        (("--cluster", "dgx-1v", "--root", "8", "--op", "broadcast"), "8"),
        (("--cluster", "nowhere"), "no machine is called"),
    ],
)
def test_simulate_collective_refuses_what_cannot_be(arguments, words):
    result = invoke("simulate", "collective", *arguments)
    assert result.exit_code == 2
    assert words in result.output
    assert "Traceback" not in result.output


def test_simulate_collective_names_a_link_without_bandwidth_and_devices_that_are_apart(tmp_path):
    path = tmp_path / "lab.json"
    cluster = load_cluster("dgx-1v")
    lame = msgspec.structs.replace(cluster.links[0], bytes_per_second=0.0)
    msgspec.structs.replace(cluster, links=(lame, *cluster.links[1:])).save(path)
    result = invoke("simulate", "collective", "--cluster", str(path))
    assert result.exit_code == 2
    assert "bandwidth must be more than zero" in result.output.replace("\n", " ")
    msgspec.structs.replace(cluster, links=()).save(path)
    result = invoke("simulate", "collective", "--cluster", str(path))
    assert result.exit_code == 2
    assert "cannot reach" in result.output
