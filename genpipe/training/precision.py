"""What numbers a run computes in, by what its device can multiply itself."""

import torch


def has_native_bf16(device: torch.device) -> bool:
    """Whether matrix products in bfloat16 are the device's own; emulated ones are tens of times slower."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()


def resolve_precision(precision: str, device: torch.device) -> str:
    """`auto` -> "bf16" where matrix products in bf16 are native, else "no"; others stay."""
    if precision != "auto":
        return precision
    return "bf16" if has_native_bf16(device) else "no"
