"""`effbench bench`, the peers it times, and the scripts that run it and all else on a GPU."""

from __future__ import annotations

import importlib.util
import itertools
import json
import sys
import tarfile
import tempfile
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._pytree import tree_leaves

from effbench.bench import compile as compiling
from effbench.bench import document as command
from effbench.bench import measure as bench
from effbench.cli import main as cli
from effbench.core.errors import Usage
from effbench.ops import Case, Declined, Goal, LinearOp, Op, Peer, list_ops, load, multiply
from effbench.records.timings import Ceilings, Compilation, CompiledRow, Document, Quartiles, Row, Timings, encode, read
from effbench.report import kernels as timings
from effbench.report import pages as report

GPU = Path(__file__).parent.parent / "gpu"
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
CEILING = Ceilings(
    copy_bytes_per_s=1e9, read_bytes_per_s=2e9, matmul_flop_per_s=1e12, matmul_dtype="float32", graph_node_s=None
)
SIZES = dict(in_features=64, out_features=32)


# ---- an op with peers of every kind ----


class Plain(NamedTuple):
    """A matrix stored as it is."""

    weight: Tensor

    def out_features(self, in_features: int) -> int:
        return self.weight.shape[0]

    def dense(self, in_features: int) -> Tensor:
        return self.weight


def right(x: Tensor, matrix: Plain) -> Callable[[], Tensor]:
    """Converts first, and keeps only what it made of the weights."""
    turned = matrix.weight.T.contiguous()
    return lambda: x @ turned


def wrong(x: Tensor, matrix: Plain) -> Callable[[], Tensor]:
    """Forgets an input."""
    return lambda: x[:, 1:] @ matrix.weight[:, 1:].T


def unwritten(x: Tensor, matrix: Plain) -> Callable[[], Tensor]:
    """Leaves memory as it was."""
    return lambda: torch.empty(len(x), len(matrix.weight))


def absent(x: Tensor, matrix: Plain) -> Callable[[], Tensor]:
    """Is not there."""
    raise Declined("cannot be imported")


def broken(x: Tensor, matrix: Plain) -> Callable[[], Tensor]:
    """Raises when called."""

    def call() -> Tensor:
        raise RuntimeError("no kernel image\nfor this device")

    return call


@pytest.fixture(scope="module")
def toy() -> Iterator[Op]:
    """y = x W^T."""

    def random(case: Case, dtype: torch.dtype, on: dict[str, Any]) -> Plain:
        return Plain(torch.randn(case["out_features"], case["in_features"], **on).to(dtype))

    module = sys.modules["peers_for_tests"] = types.ModuleType("peers_for_tests")
    peers = (right, wrong, unwritten, absent, broken)
    vars(module).update({peer.__name__: peer for peer in peers})
    yield LinearOp(
        name="toy_bench",
        matrix=Plain,
        random=random,
        cases=[dict(batch=3, **SIZES)],
        timed=[dict(batch=batch, **SIZES) for batch in (1, 3)] + [dict(batch=1, in_features=4096, out_features=4096)],
        backends={"fast": "peers_for_tests:fast"},
        peers={peer.__name__: Peer(f"peers_for_tests:{peer.__name__}", "torch", note="a note") for peer in peers},
        goals=[Goal("H200", 1, 1000, must={"speedup": 2.0}, target={"speedup": 2.0, "copy_percent": 90})],
    )
    del sys.modules["peers_for_tests"]


@pytest.fixture
def only_toy(toy: Op, monkeypatch: pytest.MonkeyPatch) -> Op:
    """The toy is the only op, and the ceilings are known."""
    monkeypatch.setattr(command, "list_ops", lambda: [toy.name])
    monkeypatch.setattr(command, "load", lambda name: toy)
    monkeypatch.setattr(bench, "load", lambda name: toy)
    monkeypatch.setattr(bench, "ceilings", lambda device: CEILING)
    return toy


def by_name(rows: list[Row]) -> dict[str, Row]:
    return {row.name: row for row in rows}


CONTROL = timings.CONTROL[timings.DENSE]


def test_only_what_is_correct_has_a_speed(toy: Op) -> None:
    rows = by_name(bench.measure_case(toy, toy.timed[1], CPU, torch.float32, CEILING))
    assert list(rows) == [timings.DENSE, "reference", *toy.peers, CONTROL]
    timed = {name for name, row in rows.items() if row.call_us}
    assert timed == {timings.DENSE, "reference", "right", CONTROL}
    assert rows["wrong"].ok is False and rows["wrong"].error > 0.01
    assert rows["unwritten"].ok is False and rows["unwritten"].error == "nan"
    assert rows["absent"].absent == "cannot be imported"
    assert rows["broken"].failed == "RuntimeError: no kernel image"
    for name in timed - {timings.DENSE}:
        ratio, times = rows[name].speedup, rows[name].call_us
        assert 0 < ratio.p25 <= ratio.median <= ratio.p75
        assert 0 < times.p25 <= times.median <= times.p75
    row = rows["right"]
    assert row.graph_us is None  # a processor has no graphs
    assert row.bytes == 4 * (3 * 64 + 32 * 64 + 3 * 32)
    seconds = row.call_us.median / 1e6
    assert row.copy_percent == pytest.approx(100 * row.bytes / seconds / 1e9)
    assert row.read_percent == pytest.approx(row.copy_percent / 2)
    assert row.matmul_percent == pytest.approx(100 * 2 * 3 * 64 * 32 / seconds / 1e12)
    assert row.rotated_bytes == 2 * 4 * 32 * 64  # over two copies of the weights


def test_every_call_has_its_own_copy_of_the_weights_and_the_same_x(toy: Op) -> None:
    arguments = toy.arguments(toy.timed[0])
    copies = bench.copy_arguments(toy, arguments, 3)
    assert len({each["weight"].data_ptr() for each in copies}) == 3
    assert len({each["x"].data_ptr() for each in copies}) == 1
    assert all(torch.equal(each["weight"], arguments["weight"]) for each in copies)


def test_timing_by_graphs(toy: Op, monkeypatch: pytest.MonkeyPatch) -> None:
    """The path that a GPU takes, with a capture that runs the calls one by one."""
    passes: list[int] = []

    def capture(step: Any, device: torch.device) -> Callable[[], object]:
        passes.append(len(step.args[0]))
        return step

    monkeypatch.setattr(bench, "CAPTURES", {"cpu": capture})
    rows = by_name(bench.measure_case(toy, toy.timed[1], CPU, torch.float32, CEILING))
    assert {name for name, row in rows.items() if row.graph_us} == {
        timings.DENSE, "reference", "right", CONTROL,
    }  # fmt: skip
    assert len(passes) == 3 and all(calls % 2 == 0 and calls > 2 for calls in passes)  # a graph takes a while
    seconds = rows["right"].graph_us.median / 1e6
    assert rows["right"].copy_percent == pytest.approx(100 * rows["right"].bytes / seconds / 1e9)


def test_rounds_alternate_and_ratios_are_per_round(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dense takes 4, 8, 12 ... s and the other a quarter of that: the ratio is 4 in every round."""
    order: list[str] = []
    clock = itertools.count(4, 4)
    now = {"dense": 0.0, "other": 0.0}

    def timed(work: Any, device: torch.device) -> Any:
        (call,) = work.args[0]
        if len(order) % 2 == 0:
            now["dense"] = next(clock)
            now["other"] = now["dense"] / 4
        order.append(call())
        return types.SimpleNamespace(wall=now[order[-1]], device=now[order[-1]])

    monkeypatch.setattr(bench, "timed", timed)
    dense, other = Row(op="toy", case={}, name=timings.DENSE), Row(op="toy", case={}, name="other")
    contenders = [bench.Contender(dense, [lambda: "dense"], None), bench.Contender(other, [lambda: "other"], None)]
    bench._time(contenders, timings.DENSE, CPU)
    assert order[:8] == ["dense", "other", "other", "dense"] * 2
    assert len(order) == 2 * bench.ROUNDS and bench.ROUNDS >= 30
    assert other.speedup == Quartiles(4, 4, 4) and dense.speedup is None
    assert dense.call_us.median == 4 * other.call_us.median


def test_turns_on_a_device_without_a_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            log.append("mark")
            self.at = sum({"a": 2.0, "b": 5.0}.get(entry, 0.0) for entry in log)

        def elapsed_time(self, end: Event) -> float:
            return end.at - self.at

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "device", lambda device: torch.no_grad())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: log.append("wait"))
    took = bench._time_in_turns([lambda: log.append("a"), lambda: log.append("b")], CUDA)
    assert log == ["a", "mark", "a", "mark", "b", "mark", "wait"]
    assert took == [0.002, 0.005]


def test_copies_exceed_the_cache_and_fit_in_memory(toy: Op, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = types.SimpleNamespace(L2_cache_size=100_000_000)
    free = [10**12]
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free[0], 10**12))
    arguments = {"x": torch.empty(1000, device="meta"), "weight": torch.empty(10**7, dtype=torch.int8, device="meta")}
    assert bench.count_copies(toy, arguments, CUDA, 5) == 40  # four times the cache
    gpu.L2_cache_size = 50_000_000
    assert bench.count_copies(toy, arguments, CUDA, 5) == -(-(2**28) // 10**7)
    free[0] = 10**9
    assert bench.count_copies(toy, arguments, CUDA, 5) == 10
    free[0] = 0
    assert bench.count_copies(toy, arguments, CUDA, 5) == 1
    assert bench.count_copies(toy, arguments, CPU, 5) == 2


def test_goals_are_judged_on_their_device_alone(toy: Op, monkeypatch: pytest.MonkeyPatch) -> None:
    def judged(device: str, batch: int = 1, size: int = 2000, name: str = "fast") -> Any:
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: device)
        row = Row(op="toy", case=dict(batch=batch, **SIZES), name=name, bytes=size)
        row.graph_us, row.speedup = Quartiles(4.0, 4.0, 4.0), Quartiles(2.5, 2.5, 2.5)
        bench._rate(toy, row, CUDA, CEILING)
        return row.goals

    assert judged("NVIDIA H200") == {"must": True, "target": False}
    assert judged("NVIDIA H200", size=4000) == {"must": True, "target": True}
    assert judged("NVIDIA H100 80GB HBM3") == {}
    assert judged("NVIDIA H200", batch=3) == {}
    assert judged("NVIDIA H200", size=999) == {}
    assert judged("NVIDIA H200", name="right") == {}


def test_what_suits_the_device_and_in_which_order(toy: Op) -> None:
    assert bench.plan_cases([], CPU) == []
    small, large = (bench.plan_cases(list_ops(), device) for device in (CPU, CUDA))
    assert {op.name for op, _ in small} == {op.name for op, _ in large} == set(list_ops())
    assert [op.name for op, _ in large[: len(list_ops())]] == list_ops()  # the first of each comes first
    biggest = max(
        op.bytes(case, torch.bfloat16) for op, case in large if op.name == "int_linear" and case["batch"] == 1
    )
    assert biggest > load("int_linear").goals[0].least_bytes


@pytest.mark.parametrize("name", list_ops())
def test_small_cases_are_right(name: str) -> None:
    op = load(name)
    for op_, case in bench.plan_cases([name], CPU):
        error, fine = op_.check(case, "reference")
        assert fine, error
    described = [*filter(torch.is_tensor, tree_leaves(op.describe_arguments(op.timed[-1], torch.bfloat16)))]
    assert {tensor.device.type for tensor in described} == {"meta"}
    assert (torch.bfloat16 in {tensor.dtype for tensor in described}) == (name != "fp8_product")  # of codes of 8 bits


# ---- the command ----


def test_the_command(only_toy: Op, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "bench"
    assert cli.main(["bench", "device=cpu", f"out={out}", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    (path,) = out.glob("*.json")
    assert path.stem == document["environment"]["machine"]
    assert json.loads(path.read_text()) == document and encode(read(path)) == path.read_text()
    assert document["ceilings"]["copy_bytes_per_s"] == 1e9 and document["dtype"] == "float32"
    assert [row["case"]["batch"] for row in document["rows"] if row["name"] == "right"] == [1, 3]
    assert cli.main(["bench", "device=cpu", f"out={out}"]) == 2  # nothing is overwritten
    assert "is not overwritten" in capsys.readouterr().err
    assert cli.main(["bench", "device=cpu", "dtype=bfloat16"]) == 0
    text = capsys.readouterr().out
    assert "WRONG" in text and "cannot be imported" in text and "RuntimeError: no kernel image" in text
    lines = [line for line in text.splitlines() if "| wrong" in line]
    assert len(lines) == 2 and all(line.count(" – ") == 6 for line in lines)  # no speed


def test_time_is_up(only_toy: Op, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "device=cpu", "seconds=1e-9"]) == 0
    assert "Left out, for time: toy_bench 1×64→32; toy_bench 3×64→32." in capsys.readouterr().out


def test_ours_in_the_wrong_ends_with_1(only_toy: Op, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Op, "verify", lambda *_: (0.5, False))
    assert cli.main(["bench", "device=cpu"]) == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["op=int_linaer"], "no op is called 'int_linaer'"),
        (["dtype=float8"], "unknown dtype 'float8'; did you mean"),
        (["seconds=0"], "seconds=0.0: must be above 0"),
        (["device=tpu"], "device=tpu: must be cpu, cuda or cuda:N"),
        (["device=cuda:99"], "device=cuda:99:"),
        (["--compile", "device=cpu"], "device=cpu: not with --compile"),
        (["shape=4096"], "unknown option 'shape'"),
    ],
)
def test_wrong_usage(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == "" and words in err and err.count("\n") == 1


def test_compiled_without_a_gpu(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    op = load("fp8_linear")
    token = next(case for case in op.timed if case["activations"] == "token" and case["in_features"] > 4096)
    monkeypatch.setattr(compiling, "plan_cases", lambda names, device: [(op, token)])
    assert cli.main(["bench", "op=fp8_linear", "--compile", "--json"]) == 0
    path = tmp_path / "compiled.json"
    path.write_text(capsys.readouterr().out)
    document = read(path)
    vendor, ours = document.rows
    assert vendor.name == "scaled_mm" and vendor.absent == "launches no kernel of ours"
    assert (ours.name, ours.kernel, ours.spills) == ("triton", "_fp8_linear", 0)
    assert ours.registers > 0 and ours.matrix_products > 0 and ours.lane_instructions > 1
    assert "| 16×8192→28672, activations token |" in timings.page(document)


# ---- tables ----


def document(**changes: Any) -> Timings:
    facts = {"machine": "gpu-of-tests", "packages": {"torch": "2.13.0"}, "driver": "1.2.3", "cores": 4}
    case = dict(batch=1, zero=True, wide=False, **SIZES)
    graph, call = Quartiles(1.0, 2.0, 3.0), Quartiles(10.0, 20.0, 30.0)
    dense, control = (
        Row(op="toy", case=case, name=name, error=1e-3, ok=True, version="1", graph_us=graph, call_us=call)
        for name in (timings.DENSE, CONTROL)
    )
    control.speedup = Quartiles(0.99, 1.0, 1.01)
    fields = dict(dtype="bfloat16", rounds=30, ceilings=CEILING, rows=[dense, control], left_out=[])
    return Timings(environment=facts, **fields | changes)


def test_a_noisy_machine_is_called_so() -> None:
    quiet = timings.page(document())
    assert "Too noisy" not in quiet and "1.00 [0.990–1.01] |" in quiet and "1×64→32, zero" in quiet
    rows = document().rows
    rows[1].speedup = Quartiles(0.99, 1.03, 1.01)
    assert "**Too noisy:** in 1 of 1 cases" in (text := timings.page(document(rows=rows)))
    assert "1.03 [0.990–1.01]!" in text


def test_goals_in_the_table() -> None:
    rows = document().rows
    rows[1].name, rows[1].goals = "triton", {"must": True, "target": False}
    assert "must: met; target: missed" in timings.page(document(rows=rows))


def test_an_op_that_multiplies_no_matrix_is_timed_against_its_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    def fill(x: Tensor, value: float) -> None:
        x.fill_(value)

    def inputs(case: Case, device: Any, dtype: Any, generator: Any) -> dict[str, Any]:
        return {"x": torch.randn(case["rows"], 8, device=device, generator=generator).to(dtype), "value": 2.0}

    op = Op(name="toy_fill", reference=fill, inputs=inputs, cases=[], timed=[{"rows": 4}], mutates=("x",))
    monkeypatch.setattr(bench, "load", lambda name: op)
    ((_, case),) = bench.plan_cases(["toy_fill"], CPU)
    first, again = bench.measure_case(op, case, CPU, torch.float32, CEILING)
    assert (first.name, again.name) == ("reference", "reference, again") and first.ok and first.error == 0
    assert again.speedup.median > 0 and again.matmul_percent == 0 and first.bytes == 2 * 4 * 4 * 8
    assert "| rows 4 " in timings.page(document(rows=[first, again]))


def test_tables_of_committed_documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "load", lambda results, suite: [])
    path = tmp_path / "results" / "bench" / "gpu-of-tests.json"
    path.parent.mkdir(parents=True)
    path.write_text(encode(document()))
    results = tmp_path / "results"
    table = results / "tables" / "bench-gpu-of-tests.md"
    assert len(report.check(results)) == 1
    assert report.write(results) == [table] and report.check(results) == []
    assert timings.page(document()) in table.read_text()
    assert report.render_pages([], results, "quant") == {}
    path.write_text("{")
    with pytest.raises(Usage, match=r"gpu-of-tests\.json"):
        report.check(results)


# ---- documents ----

COMPILATION = Compilation(
    environment={"machine": "none", "packages": {"triton": "3.6"}},
    rows=[CompiledRow(op="toy", case=dict(SIZES, batch=1), name="triton", kernel="k", registers=32, wide_loads=0.5)],
)


@pytest.mark.parametrize("original", [document(), COMPILATION], ids=["timed", "compiled"])
def test_a_document_is_read_as_it_was_written(original: Document, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(encode(original))
    assert read(path) == original and timings.page(read(path)) == timings.page(original)


def _places(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where there is a value in JSON data, at any depth."""
    yield place
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield from _places(value[key], (*place, key))


def _refused(path: Path, content: bytes) -> bool:
    """Whether the file is refused by one line that names it; otherwise it must make a page."""
    path.write_bytes(content)
    try:
        timings.page(read(path))
    except Usage as error:
        assert str(path) in str(error) and "\n" not in str(error)
        return True
    return False


FOREIGN = [None, -1, 0.5, True, "abc", [], [None], {}, {"a": []}, "x" * 3000, 10**400]


@pytest.mark.parametrize("original", [document(), COMPILATION], ids=["timed", "compiled"])
def test_a_document_with_any_one_value_replaced_is_read_or_refused(original: Document, tmp_path: Path) -> None:
    text = encode(original)
    refused = 0
    for place in _places(json.loads(text)):
        for value in FOREIGN:
            data = json.loads(text)
            if not place:
                data = value
            else:
                parent = data
                for key in place[:-1]:
                    parent = parent[key]
                parent[place[-1]] = value
            refused += _refused(tmp_path / "a.json", json.dumps(data).encode())
    assert refused > 100


@given(st.data())
def test_a_document_cut_short_or_with_other_bytes_is_refused(data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        content = encode(document()).encode()
        at = data.draw(st.integers(0, len(content) - 3))
        assert _refused(Path(folder) / "a.json", content[:at])
        _refused(Path(folder) / "a.json", content[:at] + data.draw(st.binary(max_size=9)) + content[at:])


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "Input data was truncated"),
        (b"\xff\xfe", "not a document"),
        (b"[" * 100_000, "not a document"),
        (b"[]", "Expected `object`"),
        (b'{"schema": 1, "rows": []}', "another version of effbench"),
        (encode(document()).replace('"rounds": 30', '"rounds": "abc"').encode(), "rounds"),
        (encode(document()).replace('"machine"', '"machines"').encode(), "machine"),
        (encode(document()).replace('"rounds"', '"round"').encode(), "round"),
    ],
    ids=range(8),
)
def test_what_is_no_document_is_named(content: bytes, words: str, tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    path.write_bytes(content)
    with pytest.raises(Usage, match=words) as caught:
        read(path)
    assert str(path) in str(caught.value)
    with pytest.raises(Usage, match="No such file"):
        read(tmp_path / "none.json")


def test_a_file_that_came_in_between_is_kept(only_toy: Op, tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    path = tmp_path / "a.json"
    monkeypatch.setattr(command, "_choose_path", lambda out, machine: path)
    path.write_text("another run's")
    assert cli.main(["bench", "device=cpu", "--json", f"out={path}"]) == 2
    out, err = capsys.readouterr()
    assert "is not overwritten" in err.splitlines()[-1] and json.loads(out)["rows"]  # nothing measured is lost
    assert path.read_text() == "another run's" and list(tmp_path.iterdir()) == [path]
    monkeypatch.setattr(command, "_choose_path", lambda out, machine: path / "b.json")
    assert cli.main(["bench", "device=cpu", "--json", f"out={path}/b.json"]) == 2
    out, err = capsys.readouterr()
    assert "cannot be written (Not a directory)" in err.splitlines()[-1] and json.loads(out)["rows"]


# ---- peers ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_tinygemm(dtype: torch.dtype) -> None:
    """On a processor torch has the same product in another layout; grid and codes are the same."""
    op = load("int_linear")
    for size, zero in ((128, True), (256, False), (32, True)):
        case = dict(batch=[2, 3], in_features=512, out_features=48, bits=4, group_size=size, zero=zero)
        error, fine = op.check(case, "tinygemm", dtype=dtype)
        assert fine, error
    for change in (
        {"bits": 8},
        {"group_size": None},
        {"g_idx": True},
        {"in_features": 192, "group_size": 64},
        {"in_features": 640, "group_size": 256},
        {"out_features": 40},
    ):
        with pytest.raises(Declined, match="takes"):
            op.check(case | change, "tinygemm", dtype=dtype)


def test_gemlite(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in that decodes as gemlite says it does: (code - zero) * scale, by row and group."""

    class Layer:
        def __init__(
            self, bits: int, group: int, inputs: int, outputs: int, input_dtype: str, output_dtype: str
        ) -> None:
            assert (bits, group, inputs, outputs) == (4, 128, 512, 48)
            assert input_dtype == output_dtype == "bf16"

        def pack(self, codes: Tensor, scales: Tensor, zeros: Tensor) -> None:
            assert codes.dtype == torch.uint8 and scales.dtype == zeros.dtype == torch.bfloat16
            grouped = codes.view(48, 4, 128).float() - zeros.float()[:, :, None]
            self.weight = (grouped * scales.float()[:, :, None]).view(48, 512)

        def __call__(self, x: Tensor) -> Tensor:
            return multiply(x, self.weight)

    op = load("int_linear")
    case = dict(batch=3, in_features=512, out_features=48, bits=4, group_size=128, zero=True)
    with pytest.raises(Declined, match="16-bit x"):
        op.check(case, "gemlite")
    module = types.SimpleNamespace(GemLiteLinear=Layer, DType=types.SimpleNamespace(BF16="bf16", FP16="fp16"))
    monkeypatch.setitem(sys.modules, "gemlite", None)
    with pytest.raises(Declined, match="cannot be imported"):
        op.check(case, "gemlite", dtype=torch.bfloat16)
    monkeypatch.setitem(sys.modules, "gemlite", module)
    assert op.check(case, "gemlite", dtype=torch.bfloat16)[1]


def test_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for its GPU code: pairs of codes, the earlier one in the higher half."""

    def gemv(x: Tensor, packed: Tensor, state: Any) -> Tensor:
        flat = packed.flatten()
        codes = torch.stack([flat >> 4, flat & 15], dim=1).flatten().long()
        weight = state.code[codes].view(-1, state.blocksize) * state.absmax[:, None]
        return multiply(x, weight.view(state.shape))

    op = load("lut_linear")
    case = dict(batch=1, in_features=512, out_features=48, bits=4, block=64)
    with pytest.raises(Declined, match="needs a GPU"):
        op.check(case, "bitsandbytes")
    module = types.SimpleNamespace(functional=types.SimpleNamespace(QuantState=types.SimpleNamespace, gemv_4bit=gemv))
    monkeypatch.setitem(sys.modules, "bitsandbytes", module)
    monkeypatch.setattr(Tensor, "is_cuda", True)
    assert op.check(case, "bitsandbytes", dtype=torch.bfloat16)[1]
    for change in ({"batch": 2}, {"bits": 3}, {"outliers": 2}, {"per_row": 1}):
        with pytest.raises(Declined, match="takes"):
            op.check(case | change, "bitsandbytes")


def test_scaled_mm() -> None:
    op = load("fp8_linear")
    case = dict(batch=[2, 9], in_features=64, out_features=48, activations="token")
    assert op.check(case, "torch._scaled_mm", dtype=torch.bfloat16)[1]
    for change in ({"activations": "tensor"}, {"per_tensor": True}, {"in_features": 72}):
        with pytest.raises(Declined, match="takes"):
            op.check(case | change, "torch._scaled_mm", dtype=torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.parametrize("name", [name for name in list_ops() if load(name).peers])
def test_peers_on_the_device(name: str) -> None:
    op, case = load(name), load(name).timed[0]
    right = {}
    for peer in op.peers:
        try:
            right[peer] = op.check(case, peer, device="cuda", dtype=torch.bfloat16)
        except Declined:
            continue
    assert all(fine for _, fine in right.values()), right
    assert name != "int_linear" or "tinygemm" in right  # torch has it on every GPU of these years


@pytest.mark.gpu
def test_bench_on_the_device() -> None:
    op = load("int_linear")
    case = dict(batch=1, in_features=4096, out_features=4096, bits=4, group_size=128, zero=True)
    rows = by_name(bench.measure_case(op, case, torch.device("cuda:0"), torch.bfloat16, CEILING))
    assert rows["triton"].graph_us.median > 0 and rows["triton"].rotated_bytes >= bench.COLD
    assert rows[CONTROL].speedup.median == pytest.approx(1, abs=0.1)


# ---- the scripts ----


def script(name: str) -> types.ModuleType:
    spec = importlib.util.spec_from_file_location(f"gpu_{name}", GPU / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def gpu_run(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    monkeypatch.setattr(sys, "path", list(sys.path))
    return script("run")


def test_the_one_command_in_a_dry_run(gpu_run: types.ModuleType, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    out = tmp_path / "out"
    # What collects all tests is left out: it is what has found this one. One plan of a suite is enough.
    todo = [step for step in gpu_run.checks() if step.name in ("ops", "spine")]
    monkeypatch.setattr(gpu_run, "checks", lambda: todo)
    assert gpu_run.main([f"out={out}", "--dry-run"]) == 0
    said = capsys.readouterr().out
    named = ("effbench bench", "suite=gpu-smoke", "suite=quant", "tests/kernels/test_kernels.py", "nothing is missing")
    for words in named:
        assert words in said
    assert said.count(" ok, ") == len(todo) == 2 and "FAILED" not in said
    assert not out.exists()


def test_steps_fail_without_ending_the_rest(gpu_run: types.ModuleType, tmp_path: Path, capsys: Any) -> None:
    wait = "import time\ntry:\n    time.sleep(60)\nexcept KeyboardInterrupt:\n    print('kept what there was')"
    save = "import pathlib, sys; p = pathlib.Path(sys.argv[1]); p.mkdir(); (p / 'a.json').write_text('1')"
    todo = [
        gpu_run.Step("saves", 10, ("-c", save, "{results}")),
        gpu_run.Step("fails", 10, ("-c", "print('because'); raise SystemExit(3)")),
        gpu_run.Step("sleeps", 5, ("-c", wait)),
        gpu_run.Step(
            "finds", 45, ("-c", "import effbench, os; print(os.environ['HF_HUB_OFFLINE'], effbench.__file__)")
        ),
    ]
    assert not gpu_run.carry_out(todo, 60, tmp_path)
    lines = (tmp_path / "summary.txt").read_text().splitlines()
    assert lines[0].startswith("saves      ok, ") and lines[1].startswith("fails      FAILED (3), ")
    assert lines[1].endswith(": because")
    assert "interrupted after" in lines[2] and lines[2].endswith("kept what there was")
    assert " ok, " in lines[3] and lines[3].endswith(str(Path("effbench") / "__init__.py"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["results.tar.gz", "summary.txt"]
    with tarfile.open(tmp_path / "results.tar.gz") as archive:
        names = {name.removeprefix("./") for name in archive.getnames()}
    assert {"summary.txt", "results/a.json", "logs/1-fails.log", "logs/3-finds.log"} <= names
    assert gpu_run.carry_out(todo[:1], 60, None)
    assert not gpu_run.carry_out(todo[:1], 1, None)
    assert capsys.readouterr().out.splitlines()[-1] == "saves      SKIPPED, no time is left"


def test_the_one_command_told_wrongly(
    gpu_run: types.ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "results.tar.gz").touch()
    for arguments, words in (
        ([], "give out=DIR"),
        ([f"out={tmp_path}"], "not overwritten"),
        (["out=x", "budget=0"], "budget=0.0"),
        (["out=x", "bugdet=9"], "did you mean 'budget'"),
    ):
        with pytest.raises(Usage, match=words):
            gpu_run.main(arguments)
    monkeypatch.setattr(gpu_run, "installed", lambda name: None if name == "msgspec" else "1")
    assert gpu_run.missing() == ["msgspec"]
    with pytest.raises(Usage, match=r"not installed: msgspec; .*wheels\.py"):
        gpu_run.main(["out=x"])


def test_which_wheels_are_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    wheels = script("wheels")
    needs = {
        "top": ["Mid.Dle[fast]>=1", "old; python_version < '3.12'", "there"],
        "mid-dle": ["leaf", "extra-leaf; extra == 'fast'", "slow-leaf; extra == 'slow'", "top"],
        "there": ["hidden"],
        "leaf": None,
    }
    monkeypatch.setattr(wheels, "installed", lambda name: "1" if name in needs else None)
    monkeypatch.setattr(wheels.metadata, "requires", lambda name: needs[name])
    found = wheels.closure(["top", "absent>2"], {"there"}, wheels.MACHINE)
    assert sorted(found) == ["absent", "extra-leaf", "leaf", "mid-dle", "top"]
    assert set(wheels.closure(["top", "mid_dle[slow]"], {"there"}, wheels.MACHINE)) == {
        "top", "mid-dle", "leaf", "extra-leaf", "slow-leaf",
    }  # fmt: skip


def test_wheels_that_are_too_many(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any) -> None:
    wheels = script("wheels")
    sizes = {"lm-eval": 20, "datasets": 30, "gemlite": 10}

    def fetch(name: str, requirement: Any, folder: Path) -> Path:
        (path := folder / f"{name}.whl").write_bytes(bytes(sizes[name]))
        return path

    monkeypatch.setattr(wheels, "closure", lambda texts, have, facts: dict.fromkeys(set(sizes) & set(
        text.partition(">")[0] for text in texts)))  # fmt: skip
    monkeypatch.setattr(wheels, "fetch", fetch)
    monkeypatch.setattr(wheels, "LARGEST", 59)
    with pytest.raises(Usage, match="60 bytes are more than 59"):
        wheels.main([f"to={tmp_path / 'to'}"])
    assert not (tmp_path / "to").exists()
    wheels.main([f"to={tmp_path / 'to'}", "peers=none"])
    assert sorted(path.name for path in (tmp_path / "to").iterdir()) == ["datasets.whl", "lm-eval.whl"]
    assert "50  bytes in 2 wheels" in capsys.readouterr().out
    for arguments, words in (
        ([f"to={tmp_path / 'to'}"], "not overwritten"),
        (["to=x", "peers=gemlight"], "did you mean 'gemlite'"),
        (["to=x", f"have={tmp_path / 'none'}"], "no such file"),
    ):
        with pytest.raises(Usage, match=words):
            wheels.main(arguments)


def test_what_the_machine_has_is_named_once(tmp_path: Path) -> None:
    wheels = script("wheels")
    (tmp_path / "have").write_text("# comment\nPyYAML==6.0\n\ntyping_extensions  # another\n")
    assert wheels.names(tmp_path / "have") == {"pyyaml", "typing-extensions"}
    assert {"torch", "triton", "transformers"} <= wheels.names(GPU / "have.txt")
    assert "lm-eval" not in wheels.names(GPU / "have.txt")
    assert wheels.pins()["lm-eval"] and wheels.pins()["gemlite"]
