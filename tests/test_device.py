"""The machine's facts, read from a made-up root folder."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from exporter import device


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


ORIN = {
    "proc/cpuinfo": "processor\t: 0\nBogoMIPS\t: 62.50\n",
    "proc/device-tree/model": "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super\0",
    "etc/nv_tegra_release": "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64\n# KERNEL\n",
    "etc/nvpmodel.conf": "# < POWER_MODEL ID=2 NAME=NOT_THIS >\n< POWER_MODEL ID=0 NAME=15W >\nCPU_ONLINE 1\n< POWER_MODEL ID=2 NAME=MAXN_SUPER >\n",
    "var/lib/nvpmodel/status": "pmode:0002\n",
    "var/lib/dpkg/status": "Package: nvidia-jetpack-dev\nStatus: install ok installed\nVersion: 1\n\n"
    "Package: nvidia-jetpack\nStatus: install ok installed\nDepends: a,\n b\nVersion: 6.2+b77\n\n"
    "Package: libnvinfer10\nVersion: 10.3.0.30-1+cuda12.5\n",
    "sys/devices/system/cpu/cpufreq/policy0/scaling_min_freq": "729600\n",
    "sys/devices/system/cpu/cpufreq/policy0/scaling_max_freq": "1728000\n",
    "sys/devices/system/cpu/cpufreq/policy0/scaling_governor": "schedutil\n",
    "sys/devices/system/cpu/cpufreq/policy0/scaling_cur_freq": "1036800\n",
    "sys/devices/system/cpu/cpufreq/policy4/scaling_min_freq": "729600\n",
    "sys/devices/system/cpu/cpufreq/policy4/scaling_max_freq": "1728000\n",
    "sys/devices/system/cpu/cpufreq/policy4/scaling_governor": "schedutil\n",
    "sys/class/devfreq/17000000.gpu/min_freq": "1020000000\n",
    "sys/class/devfreq/17000000.gpu/max_freq": "1020000000\n",
    "sys/class/devfreq/15340000.vic/max_freq": "1\n",
    "sys/class/thermal/thermal_zone0/temp": "48500\n",
    "sys/class/thermal/thermal_zone1/temp": "51250\n",
    "sys/class/thermal/thermal_zone2/temp": "-256000\n",
}


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A PATH with one folder, where nvidia-smi may be put."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    return folder


def test_a_jetson(tmp_path: Path) -> None:
    found = device.facts(write(tmp_path, ORIN))
    expected = {
        "module": "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super",
        "JetPack": "6.2+b77",
        "L4T": "36.4.3",
        "power mode": "MAXN_SUPER",
        "CPU clocks": "schedutil 730–1728 MHz",
        "GPU clocks": "1020 MHz",
        "TensorRT of the system": "10.3.0.30-1+cuda12.5",
    }
    assert {k: found[k] for k in expected} == expected
    assert "driver" not in found
    state = device.state(tmp_path)
    assert (state["temperature_c"], state["clock_mhz"]) == (51.2, 1037)


def test_a_power_mode_without_a_name(tmp_path: Path) -> None:
    assert device.facts(write(tmp_path, {"var/lib/nvpmodel/status": "pmode:0007"}))["power mode"] == "mode 7"


def test_a_machine_that_tells_nothing(tmp_path: Path) -> None:
    found = device.facts(tmp_path / "empty")
    assert {"processor", "cores", "system"} <= set(found)
    assert not {"module", "JetPack", "power mode", "CPU clocks", "GPU"} & set(found)
    assert "temperature_c" not in device.state(tmp_path / "empty")


def smi(folder: Path, script: str) -> None:
    path = folder / "nvidia-smi"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def test_two_gpus(tmp_path: Path, no_gpu: Path) -> None:
    smi(no_gpu, "echo 'NVIDIA L4, 8.9, 550.54.15, 72.00'; echo 'NVIDIA L4, 8.9, 550.54.15, 60.00'")
    found = device.facts(tmp_path)
    assert (found["GPU"], found["SM"], found["driver"]) == ("NVIDIA L4 (2×)", "8.9 (2×)", "550.54.15 (2×)")
    assert found["GPU power limit (W)"] == "72.00, 60.00 (2×)"


@pytest.mark.parametrize(
    "script", ["echo 'Orin (nvgpu), [N/A], 540.4.0, [N/A]'", "echo 'no devices'; exit 9", "exit 0"]
)
def test_a_gpu_that_tells_little(tmp_path: Path, no_gpu: Path, script: str) -> None:
    smi(no_gpu, script)
    found = device.facts(tmp_path)
    assert "SM" not in found
    assert found.get("driver") in (None, "540.4.0")


def test_differences() -> None:
    before, now = {"driver": "540.4", "cores": "6"}, {"driver": "550.1", "cores": "6", "module": "Orin"}
    assert device.differences(before, now) == ["driver 540.4 → 550.1", "module none → Orin"]
    assert device.differences(before, before) == []
