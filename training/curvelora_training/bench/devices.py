"""What the hardware did during a measurement: clocks, energy, memory, and what its matrix units can reach."""

from __future__ import annotations

import contextlib
import re
import time
from typing import Any

import torch

# Dense bf16 tensor-core peaks in TFLOP/s by name, from the vendor's data sheets (without sparsity).
PEAKS = {
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.4,
    "H200": 989.4,
    "A100": 311.9,
    "A10G": 70.0,
    "L40": 181.0,
    "L40S": 362.0,
    "L4": 121.0,
    "RTX 4090": 165.2,
}


class Device:
    """The device of this process; without a GPU every driver value is None.

    Args:
        device: where the models are.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.is_gpu = device.type == "cuda"
        self._nvml, self._handle = _open_driver(device) if self.is_gpu else (None, None)

    @property
    def name(self) -> str:
        """The GPU's name, or `cpu`."""
        return torch.cuda.get_device_name(self.device) if self.is_gpu else "cpu"

    @property
    def peak_tflops(self) -> float | None:
        """The data sheet's dense bf16 peak; None for a device that the table does not have."""
        if "MIG" in self.name:  # a slice of a card
            return None
        return next((peak for key, peak in PEAKS.items() if re.search(rf"\b{key}\b", self.name)), None)

    def synchronise(self) -> None:
        """Wait until the device has done everything."""
        if self.is_gpu:
            torch.cuda.synchronize(self.device)

    def joules(self) -> float | None:
        """Energy since the driver was loaded, in joules; differences of it are what counts."""
        with contextlib.suppress(Exception):  # drivers without the counter, or without the right to read it
            return self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle) / 1e3
        return None

    def clocks(self) -> dict[str, Any] | None:
        """SM and memory clock (MHz), power (W), temperature (degrees C), driver version; None without a driver to ask."""
        if self._nvml is None:
            return None
        n, found = self._nvml, {}
        queries = {
            "sm_mhz": lambda: n.nvmlDeviceGetClockInfo(self._handle, n.NVML_CLOCK_SM),
            "memory_mhz": lambda: n.nvmlDeviceGetClockInfo(self._handle, n.NVML_CLOCK_MEM),
            "sm_max_mhz": lambda: n.nvmlDeviceGetMaxClockInfo(self._handle, n.NVML_CLOCK_SM),
            "watts": lambda: n.nvmlDeviceGetPowerUsage(self._handle) / 1e3,
            "celsius": lambda: n.nvmlDeviceGetTemperature(self._handle, n.NVML_TEMPERATURE_GPU),
            "driver": lambda: n.nvmlSystemGetDriverVersion(),
        }
        for key, query in queries.items():
            with contextlib.suppress(Exception):  # each of them may be missing on its own
                found[key] = query()
        return found

    def reset_peak(self) -> None:
        """Forget the memory peak so far, and give what is cached back, so that `peak` is of what follows."""
        if self.is_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)

    def peak(self) -> tuple[int, int] | None:
        """(allocated, reserved) peak in bytes since `reset_peak`; None on a CPU, where it is not counted by allocation."""
        if not self.is_gpu:
            return None
        return torch.cuda.max_memory_allocated(self.device), torch.cuda.max_memory_reserved(self.device)

    def gemm_tflops(self, dtype: torch.dtype, size: int | None = None, seconds: float = 0.4) -> float:
        """What a plain matrix product in `dtype` reaches here, in TFLOP/s: the ceiling measured in the same run."""
        size = size or (8192 if self.is_gpu else 1024)
        a, b = (torch.randn(size, size, device=self.device, dtype=dtype) for _ in range(2))
        for _ in range(3):
            a @ b
        self.synchronise()
        best, until = float("inf"), time.perf_counter() + seconds
        while time.perf_counter() < until:
            started = time.perf_counter()
            a @ b
            self.synchronise()
            best = min(best, time.perf_counter() - started)
        return 2 * size**3 / best / 1e12


def _open_driver(device: torch.device) -> tuple[Any, Any]:
    """(nvml, handle of this device), or (None, None) where there is no driver library."""
    try:
        import pynvml

        pynvml.nvmlInit()
        uuid = str(torch.cuda.get_device_properties(device).uuid)
        handle = pynvml.nvmlDeviceGetHandleByUUID(uuid if uuid.startswith("GPU-") else f"GPU-{uuid}")
        return pynvml, handle
    except Exception:  # no package, no library, no right: the values are then None
        return None, None
