"""The functional forward of the default model against the transformers module that it reads."""

import pytest
import torch

from workbench.models import Model


@pytest.mark.model
@torch.no_grad()
def test_logits_of_the_default_model_are_those_of_its_module(default_model: Model) -> None:
    assert default_model.path == "fast"
    tokens, lengths = default_model.to_tokens(
        ["The cat sat on the mat because it was", "def add(a, b):\n    return a +", "Anna gave the book to"]
    )
    assert default_model.module is not None
    theirs = default_model.module(tokens).logits
    ours = default_model.forward(tokens)
    real = torch.arange(tokens.shape[1]) < lengths[:, None]
    difference = (ours - theirs).abs()[real].max()
    assert theirs.std() > 1
    assert difference < 1e-3, f"logits differ by {difference:.2e}"
