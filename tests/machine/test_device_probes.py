"""What probes do on a GPU, against a library and a device that are planted; the device itself where there is one."""

from __future__ import annotations

import contextlib
import os
import time
from types import SimpleNamespace

import pynvml
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from effbench.core.run import InferPlan, RunLog
from effbench.machine import ceilings, clock, nvml, peak
from effbench.machine.clock import Span
from effbench.machine.watch import Watch
from effbench.nn.infer import graphs
from effbench.nn.infer.engine import Engine
from effbench.probes import Reading, cost, energy, speed

CUDA = torch.device("cuda", 0)
UUID = "6b5c"
ME = os.getpid()
MIB = 2**20


class Nvml:
    """A planted library with one device; what a test does not plant is not supported."""

    def __init__(self, monkeypatch):
        self.patch = monkeypatch
        for name in dir(pynvml):
            if name.startswith("nvmlDevice"):
                self.plant(**{name.removeprefix("nvmlDevice"): self.unsupported})
        monkeypatch.setattr(pynvml, "nvmlInit", lambda: None)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=UUID))
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 1000 * MIB)
        self.known_as(f"GPU-{UUID}")

    def known_as(self, uuid):
        """The name under which NVML knows the device."""
        self.plant(GetHandleByUUID=lambda form: "gpu" if form == uuid else self.unsupported())

    @staticmethod
    def unsupported(*args):
        raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)

    def plant(self, **calls):
        for name, call in calls.items():
            self.patch.setattr(pynvml, f"nvmlDevice{name}", call)

    def processes(self, **found):
        """Per handle: process id to bytes."""
        self.plant(
            GetComputeRunningProcesses=lambda handle: [
                SimpleNamespace(pid=pid, usedGpuMemory=held) for pid, held in found.get(handle, {}).items()
            ]
        )


@pytest.fixture
def library(monkeypatch):
    for cached in (nvml.available, nvml.handle):
        cached.cache_clear()
    yield Nvml(monkeypatch)
    for cached in (nvml.available, nvml.handle):
        cached.cache_clear()


@pytest.fixture
def no_device(monkeypatch):
    """Calls of torch that need a device and mean nothing here."""
    for name in ("synchronize", "empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda device=None: None)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Planted GPU")


# NVML


def test_the_state_of_a_gpu_is_read_and_reasons_are_named(library):
    library.plant(
        GetClockInfo=lambda gpu, kind: {pynvml.NVML_CLOCK_SM: 1980, pynvml.NVML_CLOCK_MEM: 3201}[kind],
        GetPowerUsage=lambda gpu: 612_345,
        GetTemperature=lambda gpu, sensor: 71,
        GetCurrentClocksEventReasons=lambda gpu: 0x4 | 0x20,
        GetMemoryInfo=lambda gpu, version: SimpleNamespace(used=4000 * MIB),
    )
    library.processes(gpu={ME: 1500 * MIB, 1: 2000 * MIB, 2: None})
    assert nvml.state(CUDA) == {
        "sm_mhz": 1980,
        "memory_mhz": 3201,
        "power_w": 612.3,
        "temperature_c": 71,
        "clocks_held_by": ["sw_power_cap", "sw_thermal_slowdown"],
        "other_processes": 2,
        "other_processes_mib": 2000,
        "outside_torch_mib": 3000,
    }


def test_every_reason_of_the_library_has_one_name(library):
    names = nvml._reasons()
    assert names[0x1] == "gpu_idle" and names[0x2] == "applications_clocks_setting"
    assert names[0x8] == "hw_slowdown" and names[0x80] == "hw_power_brake_slowdown"
    assert all(bit & (bit - 1) == 0 for bit in names) and len(set(names.values())) == len(names) >= 9


def test_an_old_driver_knows_reasons_by_their_old_name(library):
    library.plant(GetCurrentClocksThrottleReasons=lambda gpu: 0x8)
    library.processes()
    assert nvml.state(CUDA) == {"clocks_held_by": ["hw_slowdown"]}


def test_what_is_not_supported_is_absent(library):
    assert nvml.state(CUDA) == {}
    assert nvml.process_bytes(CUDA) is None and nvml.energy_joules(CUDA) is None
    assert nvml.state(torch.device("cpu")) == {} and nvml.process_bytes(torch.device("cpu")) is None


def test_without_the_library_there_is_nothing(library, monkeypatch):
    monkeypatch.setattr(pynvml, "nvmlInit", library.unsupported)
    assert nvml.handle(CUDA) is None and nvml.state(CUDA) == {} and nvml.describe() == {}


def test_in_a_container_our_process_goes_by_another_name(library):
    library.processes(gpu={1: 700 * MIB})
    assert nvml.process_bytes(CUDA) is None
    assert nvml.state(CUDA) == {"other_processes": 0}  # the one that is listed is us
    library.processes(gpu={1: 700 * MIB, 2: 100 * MIB})
    assert nvml.state(CUDA) == {"other_processes": 1}
    library.processes(gpu={ME: None})
    assert nvml.process_bytes(CUDA) is None and nvml.state(CUDA) == {"other_processes": 0}


def test_energy_is_counted_in_joules(library):
    library.plant(GetTotalEnergyConsumption=lambda gpu: 5_500)
    counter = nvml.energy_joules(CUDA)
    assert counter is not None and counter() == 5.5


PHYSICAL = {
    "GetTotalEnergyConsumption": lambda gpu: 5_500,
    "GetPowerUsage": lambda gpu: 300_000,
    "GetClockInfo": lambda gpu, kind: 1000,
}


def test_on_a_mig_instance_nothing_of_the_whole_gpu_is_ours(library):
    library.known_as(f"MIG-{UUID}")
    library.plant(
        **PHYSICAL,
        IsMigDeviceHandle=lambda gpu: SimpleNamespace(value=1),
        GetMemoryInfo=lambda gpu, version: SimpleNamespace(used=1100 * MIB),
    )
    library.processes(gpu={ME: 800 * MIB, 7: 90 * MIB})
    assert not nvml.whole("gpu") and nvml.energy_joules(CUDA) is None
    assert nvml.process_bytes(CUDA) == 800 * MIB
    shared = {"other_processes": 1, "other_processes_mib": 90, "outside_torch_mib": 100}
    assert nvml.state(CUDA) == {"mig_instance": True} | shared
    assert Watch(CUDA).findings() == {
        "device_state": "on one MIG instance, whose clocks and power NVML does not tell, "
        "beside 1 other process on the device, holding 90 MiB"
    }


def test_where_cuda_names_the_divided_gpu_our_instance_is_the_one_with_our_process(library):
    library.plant(
        **PHYSICAL,
        GetMigMode=lambda gpu: [1, 1],
        GetMaxMigDeviceCount=lambda gpu: 7,
        GetMigDeviceHandleByIndex=lambda gpu, index: f"part{index}" if index < 3 else library.unsupported(),
    )
    library.processes(part0={5: 10 * MIB, 6: 10 * MIB}, part2={ME: 800 * MIB, 7: 90 * MIB}, gpu={ME: 1})
    assert nvml.energy_joules(CUDA) is None
    assert nvml.process_bytes(CUDA) == 800 * MIB
    assert nvml.state(CUDA) == {"mig_instance": True, "other_processes": 1, "other_processes_mib": 90}
    library.processes(part0={5: 10 * MIB})
    assert nvml.process_bytes(CUDA) is None and nvml.state(CUDA) == {"mig_instance": True}


# Peaks


def test_peaks_of_torch_and_of_the_process_are_kept_apart(monkeypatch, no_device):
    held, marks = iter([100, 500, 950]), {"allocated": 10, "reserved": 20}
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: marks["allocated"])
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: marks["reserved"])
    monkeypatch.setattr(nvml, "process_bytes", lambda device: next(held, 300))
    with peak.PeakMemory(CUDA) as found:
        marks |= {"allocated": 70, "reserved": 90}
        time.sleep(20 * peak.SAMPLED)
    assert found.bytes == {"allocated": 60, "reserved": 70, "process": 850}
    assert set(found.bytes) | {"rss"} == set(peak.SCOPES)


def test_a_process_that_cannot_be_seen_has_no_peak_and_an_error_ends_the_sampling(monkeypatch, no_device):
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 10)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: 10)
    monkeypatch.setattr(nvml, "process_bytes", lambda device: None)
    found = peak.PeakMemory(CUDA)
    with pytest.raises(torch.OutOfMemoryError), found:
        raise torch.OutOfMemoryError("planted")
    assert found.bytes == {"allocated": 0, "reserved": 0}
    assert not found._process.is_alive()


def test_every_kind_of_peak_of_applying_is_reported():
    steps = [
        {"step": "a()", "seconds": 1.0, "peaks": {"allocated": 5, "process": 9}},
        {"step": "b()", "seconds": 1.0, "peaks": {"allocated": 7}},
    ]
    reading = cost.take(SimpleNamespace(log=RunLog(steps=steps)), {})
    assert reading.metrics["apply_peak_allocated_bytes"].value == 7
    assert reading.metrics["apply_peak_process_bytes"].value == 9
    assert "NVML" in reading.protocols["apply_peak_process_bytes"]


# The clock


def test_events_and_the_wall_are_both_kept(monkeypatch, no_device):
    device = iter([2.0, 5.0])  # milliseconds at which the two events passed

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = next(device)

        def elapsed_time(self, later):
            return later.at - self.at

    monkeypatch.setattr(torch.cuda, "Event", Event)
    span = clock.timed(lambda: time.sleep(0.02), CUDA)
    assert span.device == pytest.approx(0.003)
    assert 0.02 <= span.wall < 0.2
    assert span.per(2) == Span(span.device / 2, span.wall / 2)


def test_the_gap_between_the_clocks_is_reported_on_cuda(no_device):
    paired = speed.Paired([Span(0.002, 0.0025)] * 7, [Span(0.004, 0.0045)] * 7, {"capped": True})
    run, reading = SimpleNamespace(device=CUDA), Reading()
    point = speed.Point(8, 128)
    seen = {"device_state": "beside 1 other process on the device"}
    speed._report(reading, run, point, 32, (paired, paired), 5.0, "eager (planted)", seen)
    values = {name: metric.value for name, metric in reading.metrics.items()}
    assert values["decode_launch_overhead_ms_per_token_b8_c128"] == pytest.approx(0.5)
    assert values["prefill_launch_overhead_ms_b8_c128"] == pytest.approx(0.5)
    assert values["decode_ms_per_token_b8_c128"] == pytest.approx(2)
    assert values["decode_speedup_b8_c128"] == 2
    assert reading.samples["decode_reference_wall_seconds_b8_c128"] == [0.0045] * 7
    assert "decode: eager (planted), Planted GPU" in reading.protocols["decode_tok_per_s_b8_c128"]
    assert "beside 1 other process" in reading.metrics["prefill_speedup_b8_c128"].findings["device_state"]


# The watch


def test_the_watch_looks_now_and_then_and_says_what_matters(monkeypatch):
    capped = ["sw_power_cap"]
    states = iter(
        [
            {"sm_mhz": 1980, "clocks_held_by": ["gpu_idle"], "other_processes": 0},
            {"sm_mhz": 1700, "clocks_held_by": capped, "other_processes": 2, "other_processes_mib": 900},
            {"sm_mhz": 1600, "clocks_held_by": [*capped, "hw_slowdown"], "other_processes": 1},
        ]
    )
    ticks = iter([0.0, 0.0, 0.2, 0.4, 0.6, 0.6, 0.7, 1.2, 1.2])
    monkeypatch.setattr(nvml, "state", lambda device: next(states))
    watch = Watch(CUDA, clock=lambda: next(ticks))
    assert watch.findings() == {}  # an idle clock before the work is no news
    for _ in range(5):
        watch.glance()
    assert [row["t"] for row in watch.rows] == [0.0, 0.6, 1.2]
    assert watch.findings() == {
        "device_state": "clocks held back by sw_power_cap, hw_slowdown, "
        "beside 2 other processes on the device, holding 900 MiB"
    }


def test_a_processor_has_nothing_to_watch():
    watch = Watch(torch.device("cpu"))
    watch.look()
    assert watch.rows == [] and watch.findings() == {}


def test_between_rounds_is_never_within_a_call():
    log = []

    def call(name):
        def work():
            log.append(name)
            return Span(0.01, 0.01)

        return work

    found = speed.paired(call("m"), call("r"), 0.0, clock=lambda: float(len(log)), between=lambda: log.append("|"))
    warm = log.index("|") - 2
    assert "".join(log[warm:]) == "mr|rm|" * (len(found.model) // 2)


# Ceilings


def test_ceilings_of_a_processor():
    found = ceilings.ceilings(torch.device("cpu"))
    assert found is ceilings.ceilings(torch.device("cpu"))
    assert found.bandwidth == max(found.copy_bytes_per_s, found.read_bytes_per_s)
    assert 1e9 < found.bandwidth < 1e13 and found.graph_node_s is None
    left, right = torch.randn(2, 512, 512)
    alone = min(clock.timed(lambda: left @ right, torch.device("cpu")).device for _ in range(5))
    assert found.matmul_dtype == "float32"
    assert 0.2 < found.matmul_flop_per_s / (2 * 512**3 / alone) < 5


def test_a_ceiling_is_the_work_over_the_fastest_call(monkeypatch):
    monkeypatch.setitem(ceilings.MATMUL, "cpu", (64, torch.float32))
    monkeypatch.setitem(ceilings.BUFFER, "cpu", 2**20)
    spans = iter([*[0.3, 0.2, 0.1, 0.2, 0.4], *[0.5, 0.4] * 2, 0.4, *[0.01] * 5])  # copy, read, matmul
    monkeypatch.setattr(ceilings, "timed", lambda work, device: Span(next(spans), 9.0))
    found = ceilings.ceilings.__wrapped__(torch.device("cpu"))
    assert found.copy_bytes_per_s == pytest.approx(2 * 2**20 / 0.1)
    assert found.read_bytes_per_s == pytest.approx(2**20 / 0.4)
    assert found.matmul_flop_per_s == pytest.approx(2 * 64**3 / 0.01)


def test_measuring_ceilings_leaves_the_runs_random_numbers_alone(monkeypatch):
    monkeypatch.setitem(ceilings.MATMUL, "cpu", (64, torch.float32))
    monkeypatch.setitem(ceilings.BUFFER, "cpu", 2**20)
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    ceilings.ceilings.__wrapped__(torch.device("cpu"))
    assert torch.equal(torch.rand(4), expected)


# Speed and energy by graphs


def small():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def run():
    found = SimpleNamespace(
        model=small(),
        reference=small(),
        seed=0,
        device=torch.device("cpu"),
        log=RunLog(),
        source=SimpleNamespace(kind="folder"),
        infer=InferPlan(),
    )
    found.pad, found.progress = 0, lambda unit, done, total: None
    return found


@pytest.fixture
def captures(monkeypatch):
    """Makes a processor capture, and counts the steps that were replayed."""
    replayed = []

    def capture(step, device):
        def replay():
            replayed.append(device)
            step()

        return replay

    monkeypatch.setitem(graphs.CAPTURES, "cpu", capture)
    return replayed


def test_speed_decodes_both_models_by_graphs(run, captures, monkeypatch):
    monkeypatch.setattr(nvml, "state", lambda device: {"sm_mhz": 1})
    reading = speed.take(run, {"speed_points": [[2, 8]], "speed_new_tokens": 4, "speed_seconds": 0.1})
    assert "decode: cuda graph over a static cache" in reading.protocols["decode_tok_per_s_b2_c8"]
    calls = len(reading.samples["decode_seconds_b2_c8"]) + len(reading.samples["decode_reference_seconds_b2_c8"])
    assert len(captures) >= 4 * (calls + 2) and len(captures) % 4 == 0
    state = reading.samples["speed_state_b2_c8"]
    assert len(state) >= 2 and state[0]["t"] == 0.0 and state[0]["sm_mhz"] == 1
    ours = 2 * sum(m.weight.numel() for m in run.model.modules() if isinstance(m, torch.nn.Linear))
    head = 2 * run.model.lm_head.weight.numel()
    assert speed.prefill_flops(run.model, speed.Point(2, 8)) == 2 * (8 * (ours - head) + head)
    values = {name: metric.value for name, metric in reading.metrics.items()}
    rate = values["prefill_tok_per_s_b2_c8"] * speed.prefill_flops(run.model, speed.Point(2, 8)) / 16
    percent = 100 * rate / values["matmul_flop_per_s"]
    assert values["prefill_percent_of_matmul_b2_c8"] == pytest.approx(percent)


def test_on_a_processor_decoding_is_eager_and_no_state_is_kept(run):
    reading = speed.take(run, {"speed_points": [[1, 8]], "speed_new_tokens": 2, "speed_seconds": 0.1})
    assert "decode: eager (no graphs on cpu)" in reading.protocols["decode_speedup_b1_c8"]
    assert not any("state" in name or "wall" in name for name in reading.samples)
    assert not any("launch" in name or "graph" in name for name in reading.metrics)


class Meter:
    """An energy counter: a hundred joules for every token that is prefilled and one for every step."""

    def __init__(self, monkeypatch):
        self.joules = 0.0
        monkeypatch.setattr(energy, "SECONDS", 0.02)
        monkeypatch.setattr(nvml, "energy_joules", lambda device: lambda: self.joules)
        for kind in (Engine, graphs.StaticDecoder):
            self.count(monkeypatch, kind, "prefill", lambda ids: 100.0 * ids.numel())
            self.count(monkeypatch, kind, "decode", lambda state: 1.0)

    def count(self, monkeypatch, kind, name, cost):
        real = getattr(kind, name)

        def counted(this, what):
            self.joules += cost(what)
            return real(this, what)

        monkeypatch.setattr(kind, name, counted)


@pytest.mark.parametrize("graphed", [True, False])
def test_decoding_is_charged_for_its_steps_alone(run, graphed, request, monkeypatch, no_device):
    if graphed:
        request.getfixturevalue("captures")
    Meter(monkeypatch)
    reading = energy.take(run, {"speed_points": [[2, 8]], "speed_new_tokens": 4})
    values = {name: metric.value for name, metric in reading.metrics.items()}
    assert values["prefill_energy_j_per_token_b2_c8"] == pytest.approx(100)
    assert values["decode_energy_j_per_token_b2_c8"] == pytest.approx(0.5)  # two sequences share a step
    protocol = reading.protocols["decode_energy_j_per_token_b2_c8"]
    assert ("rewound" in protocol and "cuda graph" in protocol) if graphed else "less the energy of the" in protocol


def test_why_energy_is_absent_is_in_the_log(run, library):
    run.device = CUDA
    assert energy.take(run, {}).metrics == {}
    assert run.log.energy == "not measured: the device has no energy counter"
    library.plant(**PHYSICAL, GetMigMode=lambda gpu: [1, 1])
    assert energy.take(run, {}).metrics == {}
    assert run.log.energy == "not measured: the counter is the whole GPU's, not a MIG instance's"
    nvml.handle.cache_clear()
    library.known_as("another")
    assert energy.take(run, {}).metrics == {}
    assert run.log.energy == "not measured: NVML does not know the device"


# The device itself


@pytest.mark.gpu
def test_a_planted_allocation_is_read_on_the_device():
    device = torch.device("cuda", torch.cuda.current_device())
    torch.zeros(1, device=device)
    with peak.PeakMemory(device) as found:
        kept = torch.empty(512 * MIB, dtype=torch.uint8, device=device)
        time.sleep(0.1)
        del kept
    assert found.bytes["allocated"] == 512 * MIB and found.bytes["reserved"] >= 512 * MIB
    assert found.bytes.get("process", 512 * MIB) == pytest.approx(512 * MIB, rel=0.05)


@pytest.mark.gpu
def test_a_planted_sleep_is_read_on_the_device():
    device = torch.device("cuda", torch.cuda.current_device())
    span = clock.timed(lambda: torch.cuda._sleep(10_000_000), device)
    assert 0.002 < span.device < 0.1 and span.device <= span.wall < span.device + 0.05


@pytest.mark.gpu
def test_ceilings_of_the_device():
    device = torch.device("cuda", torch.cuda.current_device())
    found = ceilings.ceilings(device)
    print(found)
    assert found.matmul_dtype == "bfloat16" and found.graph_node_s is not None
    assert 1e11 < found.copy_bytes_per_s < 2e13 and 0.7 < found.read_bytes_per_s / found.copy_bytes_per_s < 1.5
    assert 1e13 < found.matmul_flop_per_s < 1e16
    assert 1e-7 < found.graph_node_s < 2e-5


@pytest.mark.gpu
def test_the_state_of_the_device_is_plausible():
    device = torch.device("cuda", torch.cuda.current_device())
    gpu = nvml.handle(device)
    if gpu is None or not nvml.whole(gpu):
        pytest.skip("no NVML, or one MIG instance")
    state = nvml.state(device)
    print(state)
    assert 100 < state["sm_mhz"] < 4000 and 10 < state["power_w"] < 2000 and 10 < state["temperature_c"] < 110


@pytest.mark.gpu
def test_speed_on_the_device(run):
    run.device = torch.device("cuda", torch.cuda.current_device())
    run.model.to(run.device)
    run.reference.to(run.device)
    reading = speed.take(run, {"speed_points": [[2, 8]], "speed_new_tokens": 4, "speed_seconds": 1})
    assert "decode: cuda graph over a static cache" in reading.protocols["decode_speedup_b2_c8"]
    metric = reading.metrics["decode_speedup_b2_c8"]
    assert metric.value == pytest.approx(1, abs=0.05)
    assert reading.metrics["decode_launch_overhead_ms_per_token_b2_c8"].value >= 0
