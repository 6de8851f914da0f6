"""Student and teacher compiled by torch.compile learn what they learn uncompiled."""

import pytest
import torch

from crosskd_assign import CrossHeadDistiller
from tests.makers.small_models import scene, small_fcos

# Not inductor: torch 2.15's, on the CPU, gets the gradient of a group norm's bias in torchvision's FCOS head wrong by
# one per cent, without any of our code.
BACKEND = "aot_eager"


@pytest.mark.filterwarnings("ignore")  # the compiler's own, about itself
def test_compiled_backbones_and_heads_give_the_same_losses_and_gradients():
    torch.compiler.reset()
    images, targets = scene(((64, 64), (64, 64)))

    def step(compiled):
        student, teacher = small_fcos(1), small_fcos(2)
        distiller = CrossHeadDistiller(student, teacher)
        if compiled:
            for model in (student, teacher):
                model.backbone.compile(backend=BACKEND)
                model.head.compile(backend=BACKEND)
        losses = distiller(images, targets)
        torch.stack(list(losses.values())).sum().backward()
        return losses, {name: p.grad for name, p in distiller.named_parameters() if p.requires_grad}

    plain, compiled = step(False), step(True)
    torch.testing.assert_close(compiled[0], plain[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(compiled[1], plain[1], rtol=1e-3, atol=1e-5)
