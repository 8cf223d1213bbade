"""Every test of the ops runs on the CPU and, where there are kernels for it, on the GPU: ``device`` is torch's default device."""

from __future__ import annotations

import pytest
import torch

from million_ops import has_kernels

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() and has_kernels("cuda") else [])


@pytest.fixture(autouse=True, params=DEVICES)
def device(request):
    torch.set_default_device(request.param)
    yield request.param
    torch.set_default_device(None)
