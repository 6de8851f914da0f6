from __future__ import annotations

import pytest
import torch
from torchvision.models import resnet18


@pytest.fixture(scope="session")
def resnet_weights(tmp_path_factory):
    """A file with weights of a ResNet-18, and the weights."""
    path = tmp_path_factory.mktemp("weights") / "resnet18.pt"
    torch.manual_seed(5)
    state = resnet18().state_dict()
    torch.save(state, path)
    return path, state
