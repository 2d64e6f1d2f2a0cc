"""Which weights a part was trained beside: a fingerprint that survives saving, so that a mismatch can be refused."""

import hashlib

import torch
from torch import nn


def weights_identity(model: nn.Module) -> str:
    """SHA-256 in hex over the names, shapes and half-precision values of the parameters of `model`.

    Half precision, because that is how families are shipped: weights in float32, and the same weights after a round
    trip through float16, have one identity.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        half = parameter.detach().half().cpu().contiguous()
        digest.update(f"{name} {tuple(half.shape)}\n".encode())
        digest.update(half.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
