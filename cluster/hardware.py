"""Accelerators by their data sheets: the ceilings of a roofline. What share of them is reached is
`cluster.performance.roofline`'s matter."""

from __future__ import annotations

import difflib
from collections.abc import Mapping

import msgspec

from cluster.errors import InvalidConfig


class Accelerator(msgspec.Struct, frozen=True, kw_only=True):
    """One device. Floating-point rates are dense, without sparsity."""

    name: str
    flops: float
    """bfloat16 operations per second."""
    fp8_flops: float | None = None
    """None where the device has no 8-bit floating point."""
    memory_bytes: int
    bandwidth_bytes_s: float
    link_bytes_s: float
    """To its neighbours in the machine, both directions together."""
    idle_w: float
    tdp_w: float
    source: str


def _gpu(
    name: str,
    tflops: float,
    fp8_tflops: float | None,
    memory_gb: int,
    bandwidth_gb_s: float,
    link_gb_s: float,
    idle_w: float,
    tdp_w: float,
    source: str,
) -> Accelerator:
    return Accelerator(
        name=name,
        flops=tflops * 1e12,
        fp8_flops=None if fp8_tflops is None else fp8_tflops * 1e12,
        memory_bytes=memory_gb * 10**9,
        bandwidth_bytes_s=bandwidth_gb_s * 1e9,
        link_bytes_s=link_gb_s * 1e9,
        idle_w=idle_w,
        tdp_w=tdp_w,
        source=source,
    )


# Idle watts are not in data sheets: a tenth of TDP, rounded, but for the A100, a fifth, of POLCA (ASPLOS'24).
ACCELERATORS: Mapping[str, Accelerator] = {
    device.name: device
    for device in (
        _gpu("a10", 125, None, 24, 600, 64, 15, 150, "NVIDIA A10 data sheet"),
        _gpu("l4", 121, 242, 24, 300, 64, 8, 72, "NVIDIA L4 data sheet, halved for density"),
        _gpu("l40s", 362, 733, 48, 864, 64, 35, 350, "NVIDIA L40S data sheet, halved for density"),
        _gpu("a100-40g", 312, None, 40, 1555, 600, 80, 400, "NVIDIA A100 SXM data sheet"),
        _gpu("a100-80g", 312, None, 80, 2039, 600, 80, 400, "NVIDIA A100 SXM data sheet"),
        _gpu("h100", 989, 1979, 80, 3352, 900, 70, 700, "NVIDIA H100 SXM data sheet, halved for density"),
        _gpu("h200", 989, 1979, 141, 4800, 900, 70, 700, "NVIDIA H200 SXM data sheet, halved for density"),
        _gpu("b200", 2250, 4500, 180, 8000, 1800, 100, 1000, "NVIDIA HGX B200 data sheet, per GPU, halved for density"),
        _gpu("mi300x", 1307, 2615, 192, 5300, 896, 75, 750, "AMD Instinct MI300X data sheet"),
        # Ice Lake server core pair with AVX-512 in float32: an order of magnitude for laptops, not a measurement.
        _gpu("cpu", 0.2, None, 16, 20, 20, 20, 65, "order of magnitude for two AVX-512 cores; measure with an engine's `warm`"),
    )
}


def accelerator(name: str) -> Accelerator:
    """A device of the catalogue. Raises InvalidConfig naming the nearest."""
    device = ACCELERATORS.get(name)
    if device is None:
        near = difflib.get_close_matches(name, ACCELERATORS, cutoff=0.4) or sorted(ACCELERATORS)
        raise InvalidConfig(f"accelerator {name!r} is not known; near: {', '.join(near)}")
    return device
