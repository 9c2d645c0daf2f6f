"""Peak rates of devices and the memory they hold."""

import resource

import jax

PEAK_BF16_FLOPS = {
    # Dense bf16, per chip as JAX shows it (a TPU v4 or v7x chip shows as the devices named here).
    "NVIDIA A100": 312e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA B200": 2250e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5p": 459e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "TPU7x": 1153e12,
}


def peak_flops(device: jax.Device) -> float | None:
    """Peak dense bf16 FLOP/s of a device, or None where the table does not know it (a CPU)."""
    matches = [kind for kind in PEAK_BF16_FLOPS if device.device_kind.startswith(kind)]
    return PEAK_BF16_FLOPS[max(matches, key=len)] if matches else None


def peak_memory_bytes(device: jax.Device) -> int:
    """The most memory the device has held so far; on a CPU, the most the process has held."""
    stats = device.memory_stats() if device.platform != "cpu" else None
    if stats and "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"]
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
