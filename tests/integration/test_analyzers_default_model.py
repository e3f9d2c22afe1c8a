"""The analyzers on the default model, against what is known of models like it."""

from __future__ import annotations

import pytest

from workbench.analyzers import attention_sinks, head_patterns
from workbench.models import Model


@pytest.mark.model
def test_sinks_on_text_that_vanish_on_repeated_tokens(default_model: Model) -> None:
    table = attention_sinks.run(default_model, n=12).validate()
    frame = table.frame[table.frame["layer"].isna()].set_index("input")
    # Gu et al.: rotary models without absolute positions have sinks on text and random tokens, next to none on repeated
    assert frame.loc["repeated", "ci_high"] < frame.loc["natural", "ci_low"]
    assert frame.loc["natural", "value"] > 0.5
    assert frame.loc["random", "value"] > 0.5
    assert frame.loc["repeated", "value"] < 0.05
    assert table.matrix("alpha", input="natural").max() > 0.9


@pytest.mark.model
def test_it_has_previous_token_and_induction_heads(default_model: Model) -> None:
    table = head_patterns.run(default_model, n=4).validate()
    previous, induction = (table.top(metric, 3) for metric in ("previous_token", "induction"))
    assert previous["value"].min() > 0.5
    assert induction["value"].min() > 0.5
    heads = [set(zip(frame["layer"], frame["head"], strict=True)) for frame in (previous, induction)]
    assert not heads[0] & heads[1]
    # an induction head reads what an earlier head wrote: none can be in the first layer
    assert induction["layer"].min() > 0
    assert previous["layer"].min() < induction["layer"].max()
    assert table.matrix("induction")[0].max() < 0.3
