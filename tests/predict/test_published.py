"""Tables of published measurements: what each cell becomes, and that nothing missing is made up."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from headway.errors import FieldError, FileError, InputError
from headway.predict.published import COLUMNS, VTRAIN_COLUMNS, is_fitted, read_rows

DATA = Path(__file__).parents[3] / "shared" / "data" / "planning"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="the published measurements are not here")

GPT = {
    "source": "somebody, Megatron-LM fork", "model": "GPT-8B", "layers": "32", "hidden": "4096", "heads": "32",
    "ffn": "16384", "vocab": "50257", "seq": "2048", "global_batch": "64", "micro_batch": "2", "gpu": "A100-SXM-80GB",
    "n_gpus": "16", "gpus_per_node": "8", "interconnect": "8x HDR IB 200Gbps/node", "tp": "4", "pp": "2", "dp": "2",
    "zero_stage": "1", "recompute": "full", "precision": "bf16", "iter_time_s": "10", "status": "ok",
}  # fmt: skip


def table(*rows: dict[str, str], columns=COLUMNS) -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, columns, restval="")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


@pytest.fixture
def read(tmp_path):
    """Reads a table of GPT rows with changes: read({"tp": "8"}, ...)."""

    def reader(*changes: dict[str, str]):
        path = tmp_path / "table.csv"
        path.write_text(table(*({**GPT, **change} for change in changes)))
        return read_rows(path)

    return reader


@pytest.fixture
def one(read):
    def reader(**change: str):
        rows, skipped = read(change)
        assert not skipped, skipped
        return rows[0]

    return reader


@pytest.fixture
def refused(read):
    def reader(**change: str) -> str:
        rows, skipped = read(change)
        assert not rows
        return "; ".join(skipped[0].reasons)

    return reader


# -- rows to plans ----------------------------------------------------------------------------------------------------


def test_a_row_becomes_the_plan_that_it_states(one):
    row = one()
    plan = row.plan.validate(row.workload.graph, row.cluster)
    assert (plan.tensor, plan.pipeline, plan.data, plan.zero_stage, plan.schedule) == (4, 2, 2, 1, "1f1b")
    assert (plan.global_batch, plan.micro_batch, plan.micro_batches, plan.precision) == (64, 2, 16, "bfloat16")
    assert [len(stage.recompute) for stage in plan.stages] == [16, 16]
    assert row.workload.global_batch == 64
    assert (row.hardware, row.kind, row.step_seconds, row.line) == ("A100-SXM-80GB", "tensor+pipeline+data", 10.0, 2)
    assert row.tokens_per_second == 64 * 2048 / 10
    assert len(row.cluster) == 16
    assert len({device.node for device in row.cluster.devices}) == 2


def test_a_step_is_as_long_as_tokens_per_second_for_each_gpu_say(one):
    assert one(iter_time_s="", tokens_per_s_per_gpu="512").step_seconds == 64 * 2048 / (512 * 16)


def test_two_measurements_that_contradict_each_other_are_not_averaged(refused):
    assert "iter_time_s" in refused(tokens_per_s_per_gpu="1000")


def test_memory_counts_in_binary_gigabytes_and_failures_have_none(one):
    row = one(memory_gb="40")
    assert row.memory_bytes == 40 * 2**30
    assert not row.out_of_memory
    failed = one(iter_time_s="", status="OOM")
    assert failed.out_of_memory
    assert failed.memory_bytes is None
    assert failed.step_seconds is None


@pytest.mark.parametrize(
    ("word", "precision"),
    [
        ("amp_bf16/DEFAULT", "bfloat16"), ("fp16", "float16"), ("FP8-CS", "float8"), ("MXFP8", "float8"),
        ("fp8-linear", "float8"), ("NVFP4", "float4"), ("fp32", "float32"), ("tf32", "float32"),
    ],
)  # fmt: skip
def test_precision_is_understood_in_the_words_of_the_sources(one, word, precision):
    assert one(precision=word).plan.precision == precision


@pytest.mark.parametrize(
    ("words", "gbit_per_node"),
    [
        ("8x HDR IB 200Gbps/node (Selene)", 1600),
        ("4x Omni-Path 100Gbps/node (Jean Zay)", 400),
        ("1x EDR IB 100Gbps/node", 100),
        ("IB 800Gbps/node (vTrain config inter_node_bandwidth)", 800),
        ("RoCE 1600Gbps/node", 1600),
        ("RDMA 400Gbps/GPU (Grand Teton)", 3200),
        ("25 Gbps/node Ethernet", 25),
    ],
)
def test_a_network_is_as_wide_as_its_words_say(one, words, gbit_per_node):
    row = one(interconnect=words)
    inside = {switch.name for switch in row.cluster.switches if switch.node == "node0"}
    outside = {switch.name for switch in row.cluster.switches if not switch.node}
    rate = sum(link.bytes_per_second for link in row.cluster.links if link.source in inside and link.target in outside)
    assert rate * 8e-9 == pytest.approx(gbit_per_node)
    assert not any("interconnect" in text for text in row.assumed)


def test_an_unstated_network_is_assumed_and_said_only_where_one_is_used(one):
    assert any("interconnect" in text for text in one(interconnect="not stated").assumed)
    alone = one(interconnect="not stated", n_gpus="8", dp="1", zero_stage="0")
    assert not any("interconnect" in text for text in alone.assumed)


def test_a_rack_is_one_domain_of_nvlink(one):
    row = one(gpu="GB200", gpus_per_node="4", interconnect="GB200 NVL72", n_gpus="64", dp="8")
    assert len({device.node for device in row.cluster.devices}) == 1
    many = one(gpu="GB200", gpus_per_node="4", interconnect="GB200 NVL72", n_gpus="256", dp="32")
    assert len({device.node for device in many.cluster.devices}) == 4
    assert any("NVLink domain" in text for text in many.assumed)


def test_megatron_pads_the_vocabulary_to_its_tensor_degree_and_others_do_not(one):
    assert one(tp="4").shape.vocabulary == 50688
    assert one(tp="1", pp="1", dp="16").shape.vocabulary == 50304
    assert one(tp="1", pp="1", dp="16", source="llm-foundry", model="MPT-8b").shape.vocabulary == 50257


@pytest.mark.parametrize(
    ("layers", "pp", "virtual", "blocks"),
    [
        ("32", 4, "1", [8, 8, 8, 8]),
        ("126", 8, "8", [1] + [2] * 62 + [1]),  # the embedding and the head count as one layer each
        ("126", 16, "8", [0] + [1] * 126 + [0]),
        ("126", 4, "1", [31, 32, 32, 31]),
        ("13", 4, "1", [3, 4, 4, 2]),
    ],
)
def test_layers_are_dealt_out_as_the_frameworks_do(one, layers, pp, virtual, blocks):
    row = one(layers=layers, pp=str(pp), virtual_stages=virtual, n_gpus=str(8 * pp), global_batch="256")
    last = len(row.workload.graph.layers) - 1
    found = [sum(0 < at < last for at in range(stage.start, stage.stop)) for stage in row.plan.stages]
    assert sum(found) == int(layers)
    assert found == blocks
    row.plan.validate(row.workload.graph, row.cluster)


def test_models_have_the_shape_of_their_family(one):
    llama = one(model="Llama-3-8B", vocab="", kv_heads="", ffn="", pp="1", dp="4", source="pytorch/torchtitan docs")
    shape = llama.shape
    assert (shape.gated, shape.norm, shape.positions, shape.tied) == (True, "rms", "rotary", False)
    assert (shape.kv_heads, shape.ffn, shape.vocabulary) == (8, 14336, 128256)
    assert llama.workload.graph.parameter_count == 8_030_261_248
    assert len([text for text in llama.assumed if "of this model" in text]) == 3
    assert llama.plan.sequence_parallel
    assert one().shape.positions == "learned"
    assert one(model="BLOOM-8B").shape.positions == "none"


# -- rows that cannot be used -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"micro_batch": ""}, "micro_batch: missing"),
        ({"heads": ""}, "heads: missing"),
        ({"hidden": "wide"}, "hidden: 'wide'"),
        ({"virtual_stages": ">1"}, "virtual_stages: '>1'"),
        ({"n_gpus": "32"}, "n_gpus: 32, and tp x pp x dp x cp = 16"),
        ({"micro_batch": "3"}, "micro_batch: 3 on 2 replicas does not divide"),
        ({"iter_time_s": ""}, "iter_time_s: missing"),
        ({"iter_time_s": "nan"}, "iter_time_s"),
        ({"status": "crashed"}, "status"),
        ({"precision": "half"}, "precision: 'half'"),
        ({"recompute": "some"}, "recompute: 'some'"),
        ({"zero_stage": "4"}, "zero_stage: 4"),
        ({"gpu": "TPUv4"}, "gpu: 'TPUv4'"),
        ({"model": "Mamba-8B"}, "architecture"),
        ({"ep": "8"}, "ep: the experts"),
        ({"heads": "30", "hidden": "3840"}, "tp: 4 ranks cannot share 30 heads"),
        ({"virtual_stages": "2", "global_batch": "12", "micro_batch": "2"}, "micro_batch"),
    ],
)
def test_what_is_missing_or_wrong_is_listed_by_its_column(refused, change, reason):
    assert reason in refused(**change)


def test_every_reason_of_a_row_is_listed_and_other_rows_are_read(read):
    rows, skipped = read({}, {"micro_batch": "", "hidden": "", "model": "Mamba"}, {"tp": "2", "dp": "4"})
    assert [row.line for row in rows] == [2, 4]
    assert skipped[0].line == 3
    assert {reason.partition(":")[0] for reason in skipped[0].reasons} >= {"micro_batch", "model"}


# -- files that are no tables -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "place", "message"),
    [
        ("", "line 1", "empty"),
        ("\n\n", "line 1", "empty"),
        ("hello world\n1,2\n", "line 1", "not a table"),
        (table(GPT, columns=(*GPT, "colour")), "line 1, column 23", "'colour'"),
        (table(GPT, columns=(*GPT, "model")), "line 1, column 23", "twice"),
        ("source,model\nx,y\n", "line 1", "no column 'layers'"),
        (table(GPT) + "1,2,3\n", "line 3", "3 cells"),
        (",".join(VTRAIN_COLUMNS[:-1]) + "\n", "line 1", "iteration time"),
        ('source,"model\n', "", "not a CSV file"),
    ],
)
def test_a_file_that_is_no_such_table_is_refused_by_line_and_column(tmp_path, text, place, message):
    path = tmp_path / "no.csv"
    path.write_text(text)
    with pytest.raises(FieldError, match=message) as caught:
        read_rows(path)
    assert caught.value.place.endswith(place)
    assert str(path) in caught.value.place


def test_a_file_that_is_not_there_or_not_text_is_named(tmp_path):
    with pytest.raises(FileError):
        read_rows(tmp_path / "none.csv")
    (tmp_path / "binary.csv").write_bytes(bytes(range(256)))
    with pytest.raises(FileError):
        read_rows(tmp_path / "binary.csv")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(st.sampled_from(COLUMNS), st.text(max_size=6) | st.sampled_from(["0", "-1", "1e99", "inf", ""])))
def test_no_cell_whatever_is_in_it_ends_in_anything_but_a_row_or_a_reason(tmp_path, change):
    path = tmp_path / "fuzzed.csv"
    text = table({**GPT, **{name: value.replace("\r", "").replace("\n", "") for name, value in change.items()}})
    path.write_text(text)
    try:
        rows, skipped = read_rows(path)
    except InputError:
        return  # a control character that ends a line
    assert len(rows) + len(skipped) == 1
    assert all(one.reasons for one in skipped)


# -- fitted and held out ----------------------------------------------------------------------------------------------


def test_whether_a_row_is_fitted_follows_from_the_models_sizes_alone(one, read):
    row = one()
    others = [{"seq": "1024"}, {"tp": "1", "dp": "8"}, {"gpu": "H100-SXM-80GB"}, {"source": "else"}, {"vocab": "32000"}]
    assert {is_fitted(other) for change in others for other in read(change)[0]} == {is_fitted(row)}


def test_about_two_fifths_of_all_models_are_fitted(read):
    rows, skipped = read(*({"layers": "2", "ffn": str(64 * width)} for width in range(1, 201)))
    assert not skipped
    share = sum(map(is_fitted, rows)) / len(rows)
    assert 0.3 < share < 0.5


# -- the tables themselves --------------------------------------------------------------------------------------------


@needs_data
def test_all_rows_but_the_incomplete_ones_of_the_published_table_are_read():
    rows, skipped = read_rows(DATA / "published_throughput.csv")
    assert len(rows) + len(skipped) == 341
    assert len(skipped) == 7
    assert {reason.partition(":")[0] for one in skipped for reason in one.reasons} == {
        "micro_batch", "virtual_stages", "n_gpus",
    }  # fmt: skip
    share = sum(map(is_fitted, rows)) / len(rows)
    assert 0.35 < share < 0.45
    for row in rows:
        assert row.plan.validate(row.workload.graph) is row.plan


@needs_data
def test_read_models_have_as_many_parameters_as_the_table_says():
    path = DATA / "published_throughput.csv"
    with path.open() as file:
        counts = {line: row["params_b"] for line, row in enumerate(csv.DictReader(file), start=2)}
    for row in read_rows(path)[0]:
        if counts[row.line]:
            # BLOOM's are stated in rounded billions, and without the vocabulary.
            close = 0.025 if "BLOOM" in row.model else 0.005
            found = row.workload.graph.parameter_count / 1e9
            assert found == pytest.approx(float(counts[row.line]), rel=close, abs=0.5 if "52B" in row.model else 0)


@needs_data
def test_vtrains_single_node_table_and_the_memory_table_are_read_whole():
    rows, skipped = read_rows(DATA / "vtrain_single_node.csv")
    assert (len(rows), len(skipped)) == (540, 0)
    assert {row.hardware for row in rows} == {"A100-SXM-80GB"}
    first = rows[0]
    assert first.step_seconds == pytest.approx(0.1606027)
    assert (first.plan.tensor, first.plan.data, first.plan.pipeline) == (4, 1, 2)
    assert all(len({device.node for device in row.cluster.devices}) == 1 for row in rows)
    rows, skipped = read_rows(DATA / "measured_memory.csv")
    assert (len(rows), len(skipped)) == (34, 0)
    assert sum(row.out_of_memory for row in rows) == 3
    assert {row.memory_of for row in rows} == {"allocator", "device"}
