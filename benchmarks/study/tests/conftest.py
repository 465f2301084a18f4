"""One thread and a fixed seed for every test."""

import pytest
import torch


@pytest.fixture(autouse=True)
def reproducible() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
