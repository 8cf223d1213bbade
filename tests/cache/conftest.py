"""Tests that take ``device`` run on the CPU and, where there is one, on the GPU."""

from __future__ import annotations

import pytest
import torch

no_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=no_gpu)])
def device(request) -> str:
    return request.param
