"""What must hold of prompt pairs; every failure names argument, prompt, value and remedy."""

from collections.abc import Mapping

from torch import Tensor

from workbench.errors import PromptError

ABSENT = -1
"""Fills up a row of a set, or a span, where a prompt has no such member."""


def check_tokens(clean: Tensor, corrupted: Tensor, lengths: Tensor, answer_positions: Tensor) -> None:
    """Shapes, lengths, ids and answer positions of `[n, t]` token rows."""
    if clean.numel() == 0:
        raise PromptError(f"clean is empty (shape {list(clean.shape)}): give at least one prompt of one token")
    for name, tensor, shape in (
        ("clean", clean, "[n, t]"),
        ("corrupted", corrupted, "[n, t]"),
        ("lengths", lengths, "[n]"),
        ("answer_positions", answer_positions, "[n]"),
    ):
        if tensor.ndim != shape.count(",") + 1:
            raise PromptError(f"{name} must be {shape}, got shape {list(tensor.shape)}")
    if clean.shape != corrupted.shape:
        raise PromptError(
            f"clean is {list(clean.shape)} and corrupted is {list(corrupted.shape)}: the two versions must line up "
            "token by token; pad both on the right to one width and pass lengths="
        )
    n, width = clean.shape
    for name, tensor in (("lengths", lengths), ("answer_positions", answer_positions)):
        if len(tensor) != n:
            raise PromptError(f"{name} has {len(tensor)} entries for {n} prompts: give one for each prompt")
    for row, (length, position) in enumerate(zip(lengths.tolist(), answer_positions.tolist(), strict=True)):
        if not 1 <= length <= width:
            raise PromptError(f"lengths[{row}] is {length}, but prompts have 1 to {width} tokens: count them again")
        if not 0 <= position < length:
            raise PromptError(
                f"answer_positions[{row}] is {position}, but prompt {row} has {length} tokens: it must be 0 to "
                f"{length - 1}, counted from the first token (the last is the default)"
            )
    for name, ids in (("clean", clean), ("corrupted", corrupted)):
        if (ids < 0).any():
            row, column = (ids < 0).nonzero()[0].tolist()
            raise PromptError(f"{name}[{row}] has token id {int(ids[row, column])}: ids are never negative")


def check_answers(n: int, answers: Tensor, wrong_answers: Tensor, candidates: Tensor) -> None:
    """Sets of answers `[n, k]`, disjoint from the wrong ones, and both among the candidates."""
    _check_set(n, "answers", answers)
    _check_set(n, "wrong_answers", wrong_answers)
    members = [[set(row) - {ABSENT} for row in ids.tolist()] for ids in (answers, wrong_answers)]
    for row, (right, wrong) in enumerate(zip(*members, strict=True)):
        if right & wrong:
            raise PromptError(
                f"prompt {row}: token {min(right & wrong)} is in answers and in wrong_answers: the metric would be "
                "zero by construction; choose another wrong answer"
            )
    _check_set(n, "candidates", candidates)
    members.append([set(row) - {ABSENT} for row in candidates.tolist()])
    for row, (right, wrong, among) in enumerate(zip(*members, strict=True)):
        if not right | wrong <= among:
            raise PromptError(
                f"candidates[{row}] is {sorted(among)} and lacks {sorted((right | wrong) - among)}: candidates must "
                "include the answers and the wrong answers"
            )


def _check_set(n: int, name: str, ids: Tensor) -> None:
    if ids.ndim != 2:
        raise PromptError(f"{name} must be [n] ids or [n, k] sets of ids, got shape {list(ids.shape)}")
    if len(ids) != n:
        raise PromptError(f"{name} has {len(ids)} rows for {n} prompts: give one for each prompt")
    for row, members in enumerate(ids.tolist()):
        present = [member for member in members if member != ABSENT]
        if not present or min(present) < 0:
            raise PromptError(f"{name}[{row}] is {members}: give at least one token id, none negative")
        if len(set(present)) < len(present):
            raise PromptError(f"{name}[{row}] is {members}: a set names each token once; drop the repeated one")


def check_spans(spans: Mapping[str, Tensor], lengths: Tensor) -> None:
    """Named positions `[n]` inside their prompts, or `ABSENT`."""
    for name, at in spans.items():
        if at.shape != lengths.shape:
            raise PromptError(f"spans[{name!r}] has shape {list(at.shape)}, expected [{len(lengths)}], one a prompt")
        bad = (at < ABSENT) | (at >= lengths.to(at.device))
        if bad.any():
            row = int(bad.nonzero()[0])
            raise PromptError(
                f"spans[{name!r}][{row}] is {int(at[row])}, but prompt {row} has {int(lengths[row])} tokens: give a "
                f"position inside it, or {ABSENT} where it has none"
            )


def check_vocabulary(name: str, ids: Tensor, d_vocab: int) -> None:
    """Every id below `d_vocab`."""
    if (ids >= d_vocab).any():
        row, column = (ids >= d_vocab).nonzero()[0].tolist()
        raise PromptError(
            f"{name}[{row}] has token id {int(ids[row, column])}, but the model's vocabulary has {d_vocab} tokens "
            f"(0 to {d_vocab - 1}): tokenise with this model's tokenizer"
        )
