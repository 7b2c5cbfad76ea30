"""Traces of every format, told by their columns, and every bad row named with its line."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from headway.errors import FieldError, FileError, InputError
from headway.schedule.job import Job
from headway.schedule.traces.read import FORMATS, Trace, detect, read_throughputs, read_trace, unfit, write_trace

DATA = Path(__file__).parents[4] / "shared" / "data" / "scheduling"

TIRESIAS = """job_id,num_gpu,submit_time,iterations,model_name,duration,interval
0,1,0,606,vgg19,164,30
1,8,30,133,vgg11,147,23
2,2,53,157,inception4,127,26
"""
MURI = """job_id,num_gpu,submit_time,iterations,model_name,batch_size,duration,interval,iteration_time,\
resource_time_0,resource_time_1,resource_time_2,priority
0,16,0,4378042,vgg16,16,1453510000,3840000,332,83,68,110,0
1,1,27069000,5190727,a2c,64,2683606000,13956000,517,514,14,0,1
"""
PHILLY = """timestamp,duration,num_gpus,gpu_time,cluster
2017-10-09 07:01:55,66.0,1,66.0,11cb48
2017-10-09 06:13:03,2951.0,4,11804.0,6214e9
"""
HELIOS = """job_id,user,vc,gpu_num,cpu_num,node_num,state,submit_time,start_time,end_time,duration,queue
1425511,uXBbc,vcJkd,1,1,1,COMPLETED,2020-06-09 18:41:01,2020-06-09 18:41:01,2020-06-10 04:55:09,36848,0
1425512,uVMrF,vchbv,0,16,1,COMPLETED,2020-06-09 18:41:20,2020-06-09 18:41:27,2020-06-09 18:45:36,249,7
1425513,uzqls,vcpDC,16,1,2,CANCELLED,2020-06-09 18:41:28,2020-06-09 18:41:28,2020-06-17 14:15:21,675233,0
"""
PAI_TASKS = """a1,worker,2,Terminated,1000.0,5000.0,600.0,29.3,50.0,T4
a1,ps,1,Terminated,1000.0,5000.0,600.0,29.3,,
a2,tensorflow,1,Terminated,1500.0,1600.0,600.0,29.3,25.0,MISC
"""
PAI_JOBS = """job_id,user,num_gpu,num_cpu,num_inst,submit_time,duration,gpu_type,group
7,u1,0.5,6,3,100,250,V100,g1
8,u1,0,6,1,120,250,CPU,g1
"""
SIA = """name,time,application,num_replicas,batch_size
cifar10-0,107,cifar10,6,2048
imagenet-1,1604,imagenet,10,1600
"""
GAVEL = (
    "ResNet-18 (batch size 16)\tpython3 main.py\timage\t--num_steps\t1\t1000\t1\t2\t-1.000000\t0\n"
    "A3C\tpython3 main.py\trl\t--max-steps\t1\t500\t1\t1\t-1.000000\t10.5\n"
)
RATES = """{"v100": {
"('ResNet-18 (batch size 16)', 1)": {"null": 4.0}, "('A3C', 1)": {"null": 2.0, "('A3C', 9)": [1, 1]}
},
"k80": {"('ResNet-18 (batch size 16)', 1)": {"null": 1.0}}}"""


def written(folder: Path, text: str, name: str = "trace.csv") -> Path:
    path = folder / name
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (TIRESIAS, "tiresias"), (MURI, "muri"), (PHILLY, "philly"), (HELIOS, "helios"), (PAI_TASKS, "alibaba"),
        (PAI_JOBS, "alibaba"), (SIA, "sia"), (GAVEL, "gavel"),
        ("name,submit_seconds,devices,duration_seconds\n", "headway"),
    ],
)  # fmt: skip
def test_a_format_is_told_by_its_columns(text, expected):
    assert detect(text) == expected


def test_columns_of_no_format_are_refused_with_the_formats_that_are_known():
    with pytest.raises(FieldError) as caught:
        detect("who,when\nme,now\n")
    assert all(name in str(caught.value) for name in FORMATS)


def test_a_format_that_is_asked_for_says_which_columns_it_lacks(tmp_path):
    with pytest.raises(FieldError, match="philly lacks timestamp"):
        read_trace(written(tmp_path, TIRESIAS), format="philly")


def test_tiresias_times_are_seconds(tmp_path):
    first, second, _ = read_trace(written(tmp_path, TIRESIAS)).jobs
    assert (first.name, first.devices, first.duration_seconds, first.model, first.iterations) == (
        "0", 1, 164.0, "vgg19", 606,
    )  # fmt: skip
    assert second.submit_seconds == 30.0


def test_muri_times_are_milliseconds(tmp_path):
    first, second = read_trace(written(tmp_path, MURI)).jobs
    assert (first.devices, first.duration_seconds, second.submit_seconds) == (16, 1453510.0, 27069.0)


def test_philly_rows_are_sorted_and_begin_at_zero(tmp_path):
    trace = read_trace(written(tmp_path, PHILLY))
    assert [(job.submit_seconds, job.devices, job.queue) for job in trace.jobs] == [
        (0.0, 4, "6214e9"), (48 * 60 + 52, 1, "11cb48"),
    ]  # fmt: skip
    assert any("sorted" in note for note in trace.notes)
    assert not trace.problems


def test_helios_rows_without_a_gpu_are_no_jobs_and_are_counted(tmp_path):
    trace = read_trace(written(tmp_path, HELIOS))
    assert [(job.name, job.user, job.queue, job.devices) for job in trace.jobs] == [
        ("1425511", "uXBbc", "vcJkd", 1), ("1425513", "uzqls", "vcpDC", 16),
    ]  # fmt: skip
    assert trace.jobs[1].submit_seconds == 27.0
    assert any("1 rows ask for no GPU" in note for note in trace.notes)


def test_alibaba_fractions_of_a_gpu_are_rounded_up_to_devices(tmp_path):
    tasks = read_trace(written(tmp_path, PAI_TASKS)).jobs
    assert [(job.name, job.devices, job.kinds, job.duration_seconds) for job in tasks] == [
        ("a1/worker", 1, ("T4",), 4000.0), ("a2/tensorflow", 1, (), 100.0),
    ]  # fmt: skip
    (job,) = read_trace(written(tmp_path, PAI_JOBS)).jobs
    assert (job.devices, job.user, job.kinds) == (2, "u1", ("V100",))


def test_sia_run_times_come_from_gpu_hours_of_the_application(tmp_path):
    first, second = read_trace(written(tmp_path, SIA), device_hours={"cifar10": 0.6}).jobs
    assert first.duration_seconds == pytest.approx(0.6 * 3600 / 6)
    assert second.service == pytest.approx(316 * 3600)
    assert (first.minimum_devices, first.maximum_devices) == (1, 12)


def test_gavel_run_times_are_steps_over_measured_steps_per_second(tmp_path):
    written(tmp_path, RATES, "simulation_throughputs.json")
    first, second = read_trace(written(tmp_path, GAVEL, "physical.trace")).jobs
    assert (first.duration_seconds, first.weight) == (250.0, 2.0)
    assert first.throughputs == {"v100": 1.0, "k80": 0.25}
    assert (second.duration_seconds, second.submit_seconds) == (250.0, 10.5)


def test_gavel_without_its_table_of_throughputs_says_what_to_give(tmp_path):
    with pytest.raises(FileError, match=r"simulation_throughputs\.json"):
        read_trace(written(tmp_path, GAVEL, "physical.trace"))


def test_a_gang_that_gavel_never_measured_is_flagged_and_taken_as_so_many_times_one(tmp_path):
    written(tmp_path, RATES, "simulation_throughputs.json")
    path = written(tmp_path, GAVEL.replace("\t500\t1\t", "\t500\t4\t"), "physical.trace")
    with pytest.raises(InputError, match="'A3C' on 4 v100"):
        read_trace(path)
    trace = read_trace(path, bad="flag")
    assert trace.jobs[1].duration_seconds == 500 / 8
    assert [problem.effect for problem in trace.problems] == ["kept"]


BAD = """job_id,num_gpu,submit_time,iterations,model_name,duration,interval
0,1,0,606,vgg19,164,30
1,0,30,133,vgg11,147,23
2,2,53,157,inception4,-5,26
3,2,60,157,vgg91,20,26
4,two,61,157,vgg19,20,26
4,1.5,62,157,vgg19,nan,26
5,1,10,157,vgg19,20,26
0,1,70,157,vgg19,20,26
6,1,71,157,vgg19,99999999999,26
7,1,72,157
8,64,73,157,vgg19,20,26
,1,74,157,vgg19,,26
"""


def test_all_bad_rows_are_named_with_their_lines_before_anything_is_returned(tmp_path):
    with pytest.raises(InputError) as caught:
        read_trace(written(tmp_path, BAD), devices=32)
    text = str(caught.value)
    for line, what in (
        (3, "num_gpu is 0, below 1"),
        (4, "duration is -5, not above 0"),
        (5, "unknown model 'vgg91'"),
        (6, "num_gpu is 'two', not a number"),
        (7, "num_gpu is 1.5, not a whole number"),
        (7, "duration is nan, not finite"),
        (8, "before a row above it"),
        (9, "id '0' stands on line 2 already"),
        (10, "lasts 1,157,407 days"),
        (11, "4 columns where there should be 7"),
        (12, "asks for 64 devices of 32"),
        (13, "the id is missing"),
        (13, "duration is missing"),
    ):
        assert any(row.startswith(f"  line {line}: ") and what in row for row in text.splitlines()), (line, what)


def test_flagged_rows_are_kept_sorted_renamed_or_left_out_as_their_effect_says(tmp_path):
    trace = read_trace(written(tmp_path, BAD), bad="flag", devices=32)
    assert [job.name for job in trace.jobs] == ["0", "5", "3", "0#2"]
    assert [job.submit_seconds for job in trace.jobs] == sorted(job.submit_seconds for job in trace.jobs)
    effects = {(problem.line, problem.kind): problem.effect for problem in trace.problems}
    assert effects[5, "model"] == "kept"
    assert effects[8, "order"] == "sorted"
    assert effects[9, "duplicate"] == "renamed"
    assert effects[12, "size"] == "left out"
    rows = BAD.strip().count("\n")
    assert len(trace.jobs) + trace.left_out == rows


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_every_row_is_a_job_or_a_problem(tmp_path, data):
    cell = st.sampled_from(["1", "8", "0", "-3", "", "x", "1e400", "nan", "2.5", "77", "vgg19", "who"])
    rows = data.draw(st.lists(st.tuples(*[cell] * 7), max_size=8))
    text = TIRESIAS.splitlines()[0] + "\n" + "".join(",".join(row) + "\n" for row in rows)
    trace = read_trace(written(tmp_path, text), bad="flag", devices=16)
    assert len(trace.jobs) + trace.left_out == len(rows)
    for job in trace.jobs:
        job.validate()
    assert len({job.name for job in trace.jobs}) == len(trace.jobs)


def test_a_repaired_id_is_nobody_elses(tmp_path):
    rows = "0,1,0,1,vgg19,1,0\n0,1,1,1,vgg19,1,0\n0#2,1,2,1,vgg19,1,0\n"
    trace = read_trace(written(tmp_path, TIRESIAS.splitlines()[0] + "\n" + rows), bad="flag")
    assert sorted(job.name for job in trace.jobs) == ["0", "0#2", "0#3"]


def test_a_limit_takes_the_first_submitted_and_says_so(tmp_path):
    trace = read_trace(written(tmp_path, PHILLY), limit=1)
    assert [job.devices for job in trace.jobs] == [4]
    assert "the first 1 of 2 jobs" in trace.notes


def test_jobs_larger_than_the_fleet_are_refused_or_flagged_after_reading(tmp_path):
    trace = read_trace(written(tmp_path, TIRESIAS))
    with pytest.raises(InputError, match="asks for 8 devices of 4"):
        unfit(trace, 4)
    assert [job.name for job in unfit(trace, 4, bad="flag").jobs] == ["0", "2"]
    assert unfit(trace, 4, bad="flag").left_out == 1
    assert unfit(trace, 8) == trace


def test_our_own_format_reads_back_to_the_same_jobs(tmp_path):
    jobs = (
        Job(name='a "quoted", name', submit_seconds=0.0, devices=3, duration_seconds=0.1 + 0.2, user="u", queue="q"),
        Job(name="b", submit_seconds=1 / 3, devices=2, duration_seconds=7.0, minimum_devices=1, maximum_devices=4),
    )
    write_trace(Trace(name="t", format="headway", jobs=jobs), tmp_path / "t.csv")
    assert read_trace(tmp_path / "t.csv").jobs == jobs


def test_load_is_service_over_what_is_offered_while_jobs_come():
    jobs = (
        Job(name="a", submit_seconds=0.0, devices=2, duration_seconds=10.0),
        Job(name="b", submit_seconds=5.0, devices=1, duration_seconds=20.0),
    )
    assert Trace(name="t", format="headway", jobs=jobs).load(4) == 2.0


@pytest.mark.parametrize(
    ("path", "name", "jobs"),
    [
        ("tiresias/60_job.csv", "tiresias", 60), ("muri/trace1.csv", "muri", 1494), ("muri/trace4.csv", "muri", 2638),
        ("gavel/physical_max_min_fairness.trace", "gavel", 96), ("gavel/msr_seed0_103959.trace", "gavel", 986),
    ],
)  # fmt: skip
def test_published_traces_are_read_whole(path, name, jobs):
    file = DATA / path
    if not file.exists():
        pytest.skip(f"no {path} in ../shared/data")
    trace = read_trace(file, bad="flag")
    assert (trace.format, len(trace.jobs), trace.left_out) == (name, jobs, 0)


def test_philly_is_what_its_source_says():
    file = DATA / "philly_jobs" / "philly.csv"
    if not file.exists():
        pytest.skip("no philly.csv in ../shared/data")
    trace = read_trace(file)
    assert len(trace.jobs) == 82247
    # Its source counts 978,078 GPU-hours; the file's own column of GPU-seconds agrees.
    with file.open() as rows:
        assert trace.service == pytest.approx(sum(float(row["gpu_time"]) for row in csv.DictReader(rows)))
    assert trace.service / 3600 == pytest.approx(978_078, abs=1)


def test_throughputs_are_read_for_jobs_alone_only(tmp_path):
    path = written(tmp_path, RATES, "rates.json")
    assert read_throughputs(path)["v100"] == {("ResNet-18 (batch size 16)", 1): 4.0, ("A3C", 1): 2.0}
    with pytest.raises(FieldError, match="Gavel's table"):
        read_throughputs(written(tmp_path, "[1]", "wrong.json"))
