"""Triton twins of the hot loops. The torch code that each replaces is its oracle, and what runs on any other device."""

from __future__ import annotations

import functools
import importlib.util

from torch import Tensor


@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def fused(*tensors: Tensor) -> bool:
    """Whether kernels are to be used: all tensors lie on a CUDA device and Triton is installed."""
    return all(tensor.is_cuda for tensor in tensors) and _installed()
