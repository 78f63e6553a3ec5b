"""Which devices there are, what they are called by every program, and where cells go for `device=`."""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace
from uuid import UUID

import pynvml
import pytest

from effbench.cells import plan as runner
from effbench.cells.options import RunOptions
from effbench.core.errors import OutOfMemory, Usage
from effbench.machine import devices, placement
from effbench.machine.devices import CPU, Device
from effbench.machine.gate import gate_file
from effbench.machine.placement import place

H200, L4 = "NVIDIA H200", "NVIDIA L4"
UUIDS = [UUID(int=(n << 120) + 7) for n in range(1, 9)]


class Driver:
    """A CUDA driver that shows these devices, by name and UUID."""

    def __init__(self, *shown, status=0):
        self.shown, self.status = shown, status

    def cuInit(self, flags):
        return self.status

    def cuDeviceGetCount(self, count):
        count._obj.value = len(self.shown)
        return 0

    def cuDeviceGet(self, device, index):
        device._obj.value = index
        return 0

    def cuDeviceGetName(self, buffer, size, device):
        buffer.value = self.shown[device.value][0].encode()
        return 0

    def cuDeviceGetUuid_v2(self, buffer, device):
        found = self.shown[device.value][1]
        if found is None:
            return 1
        buffer.raw = found.bytes
        return 0


@pytest.fixture
def driver(monkeypatch):
    """Puts a driver and CUDA_VISIBLE_DEVICES (None: not set) in place of this machine's."""

    def use(visible, *shown, status=0):
        monkeypatch.setattr(devices.ctypes, "CDLL", lambda name: Driver(*shown, status=status))
        if visible is None:
            monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        else:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)

    return use


def test_all_devices(driver):
    driver(None, (H200, UUIDS[0]), (L4, UUIDS[1]))
    assert devices.visible() == (
        Device("cuda:0", H200, "GPU-01000000-0000-0000-0000-000000000007", "0"),
        Device("cuda:1", L4, "GPU-02000000-0000-0000-0000-000000000007", "1"),
    )


@pytest.mark.parametrize("listed", ["4,6", " 4 , 6 ", "GPU-01,GPU-02", "4,6,-1,5"])
def test_listed_devices_are_passed_on_as_they_are_listed(driver, listed):
    driver(listed, (H200, UUIDS[0]), (H200, UUIDS[1]))
    found = devices.visible()
    assert [device.visible for device in found] == [entry.strip() for entry in listed.split(",")[:2]]
    assert [device.name for device in found] == ["cuda:0", "cuda:1"]


def test_no_device(driver, monkeypatch):
    driver("")
    assert devices.visible() == ()
    driver(None, (H200, UUIDS[0]), status=100)
    assert devices.visible() == ()

    def absent(name):
        raise OSError(name)

    monkeypatch.setattr(devices.ctypes, "CDLL", absent)
    assert devices.visible() == ()


class Nvml:
    """As much of the management library as is asked, for devices by UUID: (name, free, total)."""

    def __init__(self, monkeypatch, **known):
        self.known = {name.replace("_", "-"): found for name, found in known.items()}
        monkeypatch.setattr(pynvml, "nvmlInit", lambda: None)
        monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByUUID", self.handle)
        monkeypatch.setattr(pynvml, "nvmlDeviceGetName", lambda uuid: self.known[uuid][0])
        monkeypatch.setattr(pynvml, "nvmlDeviceGetUUID", lambda uuid: uuid)
        monkeypatch.setattr(pynvml, "nvmlDeviceGetMemoryInfo", self.memory)

    def handle(self, uuid):
        if uuid not in self.known:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_FOUND)
        return uuid

    def memory(self, uuid):
        return SimpleNamespace(free=self.known[uuid][1], total=self.known[uuid][2])


SLICE = "NVIDIA H200 MIG 1g.18gb"


def test_instances_of_a_gpu(driver, monkeypatch):
    """CUDA shows a process the first one listed; each is a device for processes of its own."""
    driver("MIG-a,MIG-b,MIG-gone", (SLICE, UUIDS[0]))
    Nvml(monkeypatch, MIG_a=(SLICE, 0, 0), MIG_b=(SLICE, 0, 0))
    assert devices.visible() == (
        Device("cuda:0", SLICE, "MIG-a", "MIG-a"),
        Device("cuda:1", SLICE, "MIG-b", "MIG-b"),
    )
    driver(None, (SLICE, UUIDS[0]))
    assert devices.visible()[0].uuid == f"MIG-{UUIDS[0]}"


def test_two_programs_share_the_lock_of_a_device(driver, tmp_path, monkeypatch):
    """Whatever each sees and calls it."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    shown = (H200, UUIDS[0]), (H200, UUIDS[1])
    driver("4,6", *shown)
    both = [gate_file(device) for device in devices.visible()]
    driver("GPU-02", shown[1])
    assert gate_file(devices.visible()[0]) == both[1] != both[0]
    assert both[1] == tmp_path / f"effbench-GPU-{UUIDS[1]}.lock"
    assert gate_file(CPU) == tmp_path / "effbench-cpu.lock"
    driver("4,6", (H200, None), (H200, None))
    assert gate_file(devices.visible()[1]).name == "effbench-cuda-6.lock"


def test_a_full_device(driver, monkeypatch):
    driver("4,6", (H200, UUIDS[0]), (H200, UUIDS[1]))
    nvml = Nvml(monkeypatch, **{f"GPU-{UUIDS[0]}": (H200, 2**28, 2**37), f"GPU-{UUIDS[1]}": (H200, 2**36, 2**37)})
    with pytest.raises(OutOfMemory, match=r"NVIDIA H200 is full: 0\.25 GiB of 128\.00 GiB are free") as error:
        devices.check_room("cuda:0")
    assert error.value.shortfall == {"asked_bytes": devices.ROOM, "free_bytes": 2**28, "total_bytes": 2**37}
    devices.check_room("cuda:1")
    devices.check_room("cpu")
    nvml.known.clear()
    devices.check_room("cuda:0")  # nobody knows


# ---- device= ----


@pytest.fixture
def machine(monkeypatch):
    """A machine of eight cores with GPUs of these models."""
    monkeypatch.setattr(placement.os, "sched_getaffinity", lambda pid: range(8))
    monkeypatch.setattr(placement, "_cuda_is_built", lambda: True)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def use(*models):
        found = tuple(Device(f"cuda:{i}", model, f"GPU-{i}", str(i)) for i, model in enumerate(models))
        monkeypatch.setattr(placement, "visible", lambda: found)

    return use


def placed(**given):
    found = place(**given)
    return found.device, found.jobs, found.threads


def test_where_cells_go(machine):
    machine(H200, H200)
    assert placed() == ("cuda:0", 1, 8)
    assert placed(device="cuda") == ("cuda:0, cuda:1", 2, 4)
    assert placed(device="cuda:1") == ("cuda:1", 1, 8)
    assert placed(device="cuda", jobs=1) == ("cuda:0, cuda:1", 1, 8)
    assert placed(device="cuda", threads=3) == ("cuda:0, cuda:1", 2, 3)
    assert placed(device="cpu") == ("cpu", 8, 1)
    assert placed(device="cpu", threads=4) == ("cpu", 2, 4)
    assert (place().machine, place().tier) == ("nvidia-h200", "full")
    machine()
    assert placed() == ("cpu", 8, 1)


def test_gpus_of_another_model_are_left_out_and_that_is_said(machine):
    machine(H200, L4, H200)
    found = place(device="cuda")
    assert (found.device, found.jobs, found.machine) == ("cuda:0, cuda:2", 2, "nvidia-h200")
    assert found.notes == ("device=cuda: 2 of 3 GPUs are used, those like the first (NVIDIA H200)",)
    assert runner.plan(RunOptions(suite="quant", device="cuda")).notes[0] == found.notes[0]
    assert place(device="cuda:1").machine == "nvidia-l4"


def test_sharing_a_gpu_is_said(machine):
    machine(H200, H200)
    found = place(device="cuda", jobs=4)
    assert (found.jobs, found.threads) == (4, 2)
    assert found.notes == ("jobs=4 on 2 GPUs: cells share memory, and the time that their methods take",)
    assert place(device="cuda", jobs=2).notes == ()


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        ("cuda:7", "device=cuda:7: this machine has 2 CUDA devices"),
        ("tpu", "device=tpu: must be cpu, cuda or cuda:N"),
        ("cuda:-1", "must be cpu, cuda or cuda:N"),
    ],
)
def test_devices_that_are_not_there(machine, wanted, words):
    machine(H200, H200)
    with pytest.raises(Usage) as error:
        placed(device=wanted)
    assert str(error.value).startswith(words) or words in str(error.value)


def test_what_hides_a_device_is_named(machine, monkeypatch):
    machine()
    with pytest.raises(Usage, match=r"^device=cuda: this machine has no CUDA device$"):
        placed(device="cuda")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "9")
    with pytest.raises(Usage, match="has no CUDA device that CUDA_VISIBLE_DEVICES=9 shows"):
        placed(device="cuda")
    machine(H200)
    monkeypatch.setattr(placement, "_cuda_is_built", lambda: False)
    with pytest.raises(Usage, match="torch is built without CUDA"):
        placed(device="cuda")
    assert placed() == ("cpu", 8, 1)


def test_which_of_equal_gpus_does_not_matter(machine):
    def identities(**given):
        run = runner.plan(RunOptions(suite="quant", recipes="gptq-4b", threads=2, **given))
        return [planned.job.cell.identity for planned in run.cells]

    machine(H200, H200, L4)
    assert identities() == identities(device="cuda") == identities(device="cuda:0") == identities(device="cuda:1")
    assert not set(identities()) & set(identities(device="cuda:2"))
    run = runner.plan(RunOptions(suite="quant", recipes="gptq-4b", device="cuda"))
    assert [one.visible for one in run.cells[0].job.places] == ["0", "1"]
    assert len({one.gate for one in run.cells[0].job.places}) == 2


# ---- on the device itself ----


@pytest.mark.gpu
def test_the_driver_and_torch_agree():
    import torch

    found = devices.visible()
    assert len(found) == torch.cuda.device_count()
    for index, device in enumerate(found):
        torch_s = torch.cuda.get_device_properties(index)
        assert device.model == torch_s.name
        assert device.uuid.partition("-")[2] == str(torch_s.uuid).removeprefix("GPU-").removeprefix("MIG-")


@pytest.mark.gpu
def test_planning_holds_no_memory_on_a_device():
    code = (
        "import torch; from effbench.machine.placement import place;"
        "found = place(device='cuda');"
        "assert found.device and not torch.cuda.is_initialized();"
        "assert not any(torch._C._cuda_hasPrimaryContext(i) for i in range(len(found.devices)))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ)


@pytest.mark.gpu
def test_every_device_can_be_seen_alone():
    code = "from effbench.machine.devices import visible; print(*(device.uuid for device in visible()))"
    for device in devices.visible():
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": device.visible}
        done = subprocess.run([sys.executable, "-c", code], check=True, env=environment, capture_output=True, text=True)
        assert done.stdout.split() == [device.uuid]
