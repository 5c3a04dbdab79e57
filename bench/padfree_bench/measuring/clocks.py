"""The clocks that a figure was measured at: read through NVML, else nvidia-smi, and never set."""

import functools
from dataclasses import dataclass
from typing import Any

import torch

from padfree_bench.measuring.processes import output

# What holds the clocks back, from NVML's lowest bit on; IDLE alone holds back nothing that was timed.
IDLE = "idle"
REASONS = [IDLE, "applications clocks", "sw power cap", "hw slowdown", "sync boost"]
REASONS += ["sw thermal slowdown", "hw thermal slowdown", "hw power brake", "display clocks"]
FIELDS = ("clocks.sm", "clocks.mem", "clocks.max.sm", "temperature.gpu", "power.draw")
NAMES = ("sm_mhz", "mem_mhz", "max_sm_mhz", "temperature_c", "power_w")
# The second is what drivers before 535 call it.
MASKS = ("clocks_event_reasons.active", "clocks_throttle_reasons.active")


def read_clocks() -> dict[str, Any] | None:
    """SM and memory clock, temperature, power and what holds the clocks back, now; None where nothing tells."""
    return _through_nvml() or _through_nvidia_smi()


def reasons(mask: int) -> list[str]:
    """The names of the set bits; an unknown bit keeps its number."""
    bits = [index for index in range(mask.bit_length()) if mask >> index & 1]
    return [REASONS[bit] if bit < len(REASONS) else hex(1 << bit) for bit in bits]


def uuid() -> str | None:
    """This process's GPU as NVML names it, whatever CUDA_VISIBLE_DEVICES counts."""
    return f"GPU-{torch.cuda.get_device_properties().uuid}" if torch.cuda.is_available() else None


@functools.cache
def _nvml() -> Any:
    """(pynvml, handle), or None where one of them is missing."""
    try:
        import pynvml  # type: ignore[import-not-found]

        pynvml.nvmlInit()
        name = uuid()
        by_name, by_index = pynvml.nvmlDeviceGetHandleByUUID, pynvml.nvmlDeviceGetHandleByIndex
        return pynvml, by_name(name) if name else by_index(0)
    except Exception:  # noqa: BLE001 - no package, no driver, no right to ask: nvidia-smi may do
        return None


def _through_nvml() -> dict[str, Any] | None:
    if (found := _nvml()) is None:
        return None
    nvml, gpu = found
    mask = getattr(nvml, "nvmlDeviceGetCurrentClocksEventReasons", None)
    mask = mask or nvml.nvmlDeviceGetCurrentClocksThrottleReasons
    try:
        values = (
            nvml.nvmlDeviceGetClockInfo(gpu, nvml.NVML_CLOCK_SM),
            nvml.nvmlDeviceGetClockInfo(gpu, nvml.NVML_CLOCK_MEM),
            nvml.nvmlDeviceGetMaxClockInfo(gpu, nvml.NVML_CLOCK_SM),
            nvml.nvmlDeviceGetTemperature(gpu, nvml.NVML_TEMPERATURE_GPU),
            nvml.nvmlDeviceGetPowerUsage(gpu) / 1e3,
        )
        return dict(zip(NAMES, values, strict=True)) | {"reasons": reasons(int(mask(gpu)))}
    except nvml.NVMLError:
        return None


def _through_nvidia_smi() -> dict[str, Any] | None:
    which = ["--id", name] if (name := uuid()) else []
    for mask in MASKS:
        query = f"--query-gpu={','.join((*FIELDS, mask))}"
        if told := output("nvidia-smi", *which, query, "--format=csv,noheader,nounits"):
            *fields, bits = (field.strip() for field in told.splitlines()[0].split(","))
            values = (float(x) if x.replace(".", "", 1).isdigit() else None for x in fields)
            held = reasons(int(bits, 16)) if bits.startswith("0x") else []
            return dict(zip(NAMES, values, strict=False)) | {"reasons": held}
    return None


@dataclass
class Watch:
    """Readings of the clocks around one timed part: call it with "before", "during" and "after".

    `entry` says what is timed, takes the readings, and goes into the result file.
    """

    entry: dict[str, Any]

    def __call__(self, moment: str) -> None:
        if (seen := read_clocks()) is not None:
            self.entry[moment] = seen

    @property
    def readings(self) -> list[dict[str, Any]]:
        return [value for value in self.entry.values() if isinstance(value, dict)]

    @property
    def remark(self) -> str:
        """What held the clocks back while this was timed, as a remark for its rows; "" for nothing."""
        held = {reason: None for reading in self.readings for reason in reading["reasons"] if reason != IDLE}
        return f"clocks held back: {', '.join(held)}" if held else ""
