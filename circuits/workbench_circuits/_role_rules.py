"""The rules that give heads their labels."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, kw_only=True)
class Thresholds:
    """What the rules ask for. A head gets the label of every rule that holds, in this order.

    - `mover`: `direct_effect` is at least `direct_share` of the clean logit difference with its 95 % interval above 0,
      and the head attends to some span or answer with at least `attention`.
    - `suppressor`, in place of `mover`: if it attends more to wrong answers than to right ones and its
      `negative_copying` is above its `copying`: it raises the difference by writing against what it sees.
    - `negative mover`: as `mover`, with a direct effect below 0.
    - `S-inhibition`: `mover_attention_change` is at most -`inhibition` with its interval below 0: with this head's
      corrupted write in their queries the movers look less at the right answer and more at the wrong one.
    - `induction`, `duplicate token`, `previous token`: the score is at least `pattern`.
    - `copying`, `negative copying`: the share is at least `copying`.

    Intervals are for single heads: among hundreds of heads some pass by chance, which the thresholds of size are for.

    Attributes:
        pattern: of the three attention patterns; Wang et al. (2022) read their figures at about 0.5.
        copying: of the copying scores; in GPT-2 small movers had above 0.95, the average head below 0.2.
        attention: of a mover's attention.
        direct_share: of the direct effect, as a share of the logit difference.
        inhibition: of the change of the movers' attention.
        most_movers: how many movers are watched.
    """

    pattern: float = 0.4
    copying: float = 0.5
    attention: float = 0.1
    direct_share: float = 0.03
    inhibition: float = 0.02
    most_movers: int = 8

    def as_dict(self) -> dict[str, float]:
        """The thresholds by name."""
        return asdict(self)


_PATTERNS = {"induction": "induction", "duplicate_token": "duplicate token", "previous_token": "previous token"}
_COPYING = {"copying": "copying", "negative_copying": "negative copying"}


def label_heads(frame: pd.DataFrame, rules: Thresholds, logit_diff: float) -> pd.DataFrame:
    """Add `label` and `rule` to a frame of scores.

    Args:
        frame: one row a head, with whatever scores there are.
        rules: the thresholds.
        logit_diff: mean logit difference on the clean prompts.
    """
    found = [list(_holding(row, rules, logit_diff)) for row in frame.to_dict("records")]
    return frame.assign(
        label=[", ".join(label for label, _ in each) for each in found],
        rule=["; ".join(reason for _, reason in each) for each in found],
    )


def _suppresses(row: Mapping[Any, Any]) -> bool:
    """Whether a head attends more to wrong answers than to right ones, and writes against what it sees."""
    looks = row.get("attention_to_wrong_answer", 0.0) > row.get("attention_to_answer", 0.0)
    return bool(looks and row.get("negative_copying", 0.0) > row.get("copying", 0.0))


def _holding(row: Mapping[Any, Any], rules: Thresholds, logit_diff: float) -> Iterator[tuple[str, str]]:
    looks = {name: value for name, value in row.items() if name.startswith("attention_to_") and math.isfinite(value)}
    where, most = max(looks.items(), key=lambda item: item[1], default=("", 0.0))
    effect, needed = row.get("direct_effect", 0.0), rules.direct_share * abs(logit_diff)
    if most >= rules.attention and abs(effect) >= needed:
        reason = f"direct effect {effect:+.2g} (at least {needed:.2g} in size), {where} {most:.2f}"
        if row["direct_effect_low"] > 0:
            yield ("suppressor" if _suppresses(row) else "mover"), reason
        elif row["direct_effect_high"] < 0:
            yield "negative mover", reason
    change = row.get("mover_attention_change", 0.0)
    if change <= -rules.inhibition and row["mover_attention_change_high"] < 0:
        yield "S-inhibition", f"mover attention {change:+.2g} (at most -{rules.inhibition:g})"
    for names, least in ((_PATTERNS, rules.pattern), (_COPYING, rules.copying)):
        for score, label in names.items():
            value = row.get(score, 0.0)
            if value >= least:
                yield label, f"{score} {value:.2f} (at least {least:g})"
