"""What a capture holds, against transformers itself and against the forward pass that it watches."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from tokenizers import processors
from torch import Tensor

import workbench as wb
from families import FAMILIES, N_HEADS, REFUSED, tiny_module
from tiny_text import tiny_text_model
from workbench.cache import Reduction, windows
from workbench.cache.plan import working_bytes
from workbench.errors import BudgetError, DataError, ModelError, PromptError, UnsupportedModelError
from workbench.models import Model, forward

LENGTHS = [12, 7, 1, 12, 9]


def tokens_of(n: int = 5, pos: int = 12, seed: int = 0) -> Tensor:
    return torch.randint(101, (n, pos), generator=torch.Generator().manual_seed(seed))


@cache
def tiny(name: str = "llama", **options) -> Model:
    return wb.wrap_model(tiny_module(name, **options), name="tiny")


@pytest.mark.parametrize("name", [*FAMILIES, "sliding_window", "scale_attn_by_inverse_layer_idx"])
def test_patterns_and_streams_are_those_of_transformers(name):
    module = tiny_module(name) if name in FAMILIES else REFUSED[name]()
    model = wb.wrap_model(module)
    tokens = tokens_of()
    held = wb.capture(model, tokens, ["pattern", "resid_pre"], lengths=LENGTHS, batch_size=2)
    reference = tiny_module(name) if name in FAMILIES else REFUSED[name]()
    reference.set_attn_implementation("eager")
    with torch.no_grad():
        found = reference(tokens, output_attentions=True, output_hidden_states=True)
    for layer in range(3):
        for prompt, length in enumerate(LENGTHS):
            pattern, resid = held["pattern", layer][prompt], held["resid_pre", layer][prompt]
            expected = found.attentions[layer][prompt]
            torch.testing.assert_close(
                pattern[:, :length, :length], expected[:, :length, :length], atol=2e-6, rtol=2e-5
            )
            torch.testing.assert_close(
                resid[:length], found.hidden_states[layer][prompt, :length], atol=2e-5, rtol=2e-5
            )
            assert pattern[:, length:].eq(0).all()
            assert resid[length:].eq(0).all()


@pytest.mark.parametrize("name", ["llama", "neox_parallel", "sliding_window"])
def test_every_site_is_the_tensor_of_the_forward_pass(name):
    model = wb.wrap_model(tiny_module(name) if name in FAMILIES else REFUSED[name]())
    sites = ["resid_pre", "q", "k", "v", "pattern", "z", "attn_out", "mlp_out", "resid_post"]
    seen: dict[tuple[str, int], Tensor] = {}

    def watcher(site):
        return lambda layer, value: seen.update({(site, layer): value.clone()})

    model.forward(tokens_of(), observe={site: watcher(site) for site in sites})
    held = wb.capture(model, tokens_of(), sites)
    assert set(held.names) == set(sites)
    assert all(torch.equal(held[key], value) for key, value in seen.items())
    z = seen["z", 2]
    assert torch.equal(held["z", 2, 3], z[:, :, 3])
    assert torch.equal(held.get("z", 2, 3, prompts=[4, 0, -1, 0]), z[[4, 0, -1, 0], :, 3])
    assert torch.equal(held.get("z", 2, prompts=slice(4, None, -2)), z[[4, 2, 0]])
    assert torch.equal(held.get("pattern", 1, 2, prompts=3), seen["pattern", 1][3, 2])
    assert held.get("z", 0, prompts=slice(0, 0)).shape == (0, *z.shape[1:])


def test_the_forward_pass_ends_with_the_last_layer_asked_for(monkeypatch):
    model = tiny()
    ran = []
    original = forward.queries_keys_values
    monkeypatch.setattr(forward, "queries_keys_values", lambda *given: (ran.append(given[1]), original(*given))[1])
    held = wb.capture(model, tokens_of(), "z", layers=[0, 1], batch_size=5)
    assert held.layers == (0, 1)
    assert [id(layer) for layer in ran] == [id(layer) for layer in model.weights.layers[:2]]


def test_logits_are_never_computed(monkeypatch):
    def fail(*arguments):
        raise AssertionError("unembedded")

    model = tiny()
    monkeypatch.setattr(forward, "unembed", fail)
    with pytest.raises(AssertionError, match="unembedded"):
        model.forward(tokens_of())
    assert wb.capture(model, tokens_of(), "resid_post").layers == (0, 1, 2)


@pytest.mark.parametrize(
    ("names", "layers", "expected"),
    [
        ("z", None, {"z": (0, 1, 2)}),
        ("blocks.1.attn.hook_z", None, {"z": (1,)}),
        (["blocks.0.attn.hook_z", "blocks.2.attn.hook_z", "hook_mlp_out"], None, {"z": (0, 2), "mlp_out": (0, 1, 2)}),
        ("attn.hook_rot_q", [2], {"q": (2,)}),
        ("blocks.*.hook_resid_post", None, {"resid_post": (0, 1, 2)}),
        ("blocks.[12].attn.hook_*", 1, {"q": (1,), "k": (1,), "v": (1,), "pattern": (1,), "z": (1,)}),
        ("resid_*", [0], {"resid_pre": (0,), "resid_mid": (0,), "resid_post": (0,)}),
    ],
)
def test_names_stand_for_sites_and_layers(names, layers, expected):
    held = wb.capture(tiny(), tokens_of(2, 4), names, layers=layers)
    assert {entry.name: entry.layers for entry in held.entries.values()} == expected


@pytest.mark.parametrize(
    ("family", "names", "layers", "message"),
    [
        ("llama", "patern", None, "unknown name 'patern': did you mean pattern"),
        ("llama", "blocks.1.attn.hook_zz", None, "did you mean attn.hook_z"),
        ("llama", "blocks.7.attn.hook_z", None, "has the layers 0 to 2"),
        ("llama", "blocks.1.attn.hook_q", None, "before the rotation"),
        ("llama", "attn.hook_result", None, "multiply by W_O"),
        ("llama", "nothing_*", None, "matches nothing"),
        ("llama", [], None, "names is empty"),
        ("llama", "z", [], "layers is"),
        ("llama", "z", [3], "from 0 to 2"),
        ("llama", "blocks.1.attn.hook_z", [0], "no layer in common"),
        ("neox_parallel", "resid_mid", None, "side by side"),
    ],
)
def test_a_filter_that_matches_nothing_is_an_error(family, names, layers, message):
    with pytest.raises(PromptError, match=message):
        wb.capture(tiny(family), tokens_of(), names, layers=layers)


def test_hook_q_is_the_query_where_nothing_rotates():
    assert wb.capture(tiny("gpt2"), tokens_of(2, 4), "blocks.1.attn.hook_q").names == ("q",)


def test_reductions_run_on_the_site_with_heads_before_positions():
    model = tiny()
    whole = wb.capture(model, tokens_of(), ["z", "resid_pre"], lengths=LENGTHS)
    held = wb.capture(model, tokens_of(), ["z", "resid_pre"], lengths=LENGTHS, reduce=["norm", "z.last"])
    assert held.names == ("resid_pre.norm", "z.norm", "z.last")
    torch.testing.assert_close(held["z.norm", 1], whole["z", 1].norm(dim=-1).transpose(1, 2))
    torch.testing.assert_close(held["resid_pre.norm", 1], whole["resid_pre", 1].norm(dim=-1))
    last = torch.stack([whole["z", 1][prompt, length - 1] for prompt, length in enumerate(LENGTHS)])
    assert torch.equal(held["z.last", 1], last)
    assert torch.equal(held["z.last", 1, 2], last[:, 2])


def test_a_reduction_of_ones_own_and_the_whole_beside_it():
    mine = Reduction(
        name="spread", version="2", compute=lambda x, lengths: x.amax((-1, -2)) - x.amin((-1, -2)), on=("z",)
    )
    held = wb.capture(tiny(), tokens_of(), ["z", "pattern"], reduce={"z": ["raw", mine], "pattern": "entropy"})
    assert held.names == ("pattern.entropy", "z", "z.spread")
    z = held["z", 2]
    assert torch.equal(held["z.spread", 2], z.amax((1, 3)) - z.amin((1, 3)))
    record = next(each for each in held.manifest["capture"]["entries"] if each["name"] == "z.spread")
    assert record["reduction"] == {"name": "spread", "version": "2", "parameters": {}, "builtin": False}
    assert record["hook"] == "blocks.{layer}.attn.hook_z"


@pytest.mark.parametrize(
    ("reduce", "message"),
    [
        ({"q": "norm"}, "names site 'q', which is not among the captured ones"),
        ({"z": "entropy"}, "is not for 'z'"),
        ("entropy", "is for pattern, and captured are z"),
        ({"z": ["norm", "norm"]}, "asks twice"),
        (Reduction(name="m", version="1", compute=lambda x, n: x.mean(0)), "expected a tensor that begins with"),
        (Reduction(name="m", version="1", compute=lambda x, n: 1.0), "makes float"),
        (Reduction(name="m", version="1", compute=lambda x, n: x.mul_(2)), "changes its input in place"),
        (Reduction(name="m", version="1", compute=lambda x, n: x @ x), "fails on 'z'"),
        (Reduction(name="m", version="1", compute=lambda x, n: x[:, :, : int(n[0])]), "depend on the shape"),
    ],
)
def test_reductions_that_cannot_be_are_refused(reduce, message):
    with pytest.raises(PromptError, match=message):
        wb.capture(tiny(), tokens_of(), "z", lengths=[3, 7, 1, 12, 9], reduce=reduce)


def test_a_cache_of_another_batch_size_differs_by_float_noise_only():
    model = tiny(dtype=torch.float64)
    one, all_ = (wb.capture(model, tokens_of(), ["z", "pattern"], lengths=LENGTHS, batch_size=b) for b in (1, 5))
    assert (len(one.shards), len(all_.shards)) == (5, 1)
    for key in (("z", 2), ("pattern", 1)):
        torch.testing.assert_close(one[key], all_[key], rtol=0, atol=1e-12)


def test_the_budget_decides_the_batch_and_too_much_is_refused_with_what_to_do(tmp_path):
    model = tiny()
    said: list[str] = []
    whole = wb.capture(model, tokens_of(40), "z", progress=said.append)
    assert "40 prompts x 12 tokens in 1 batches of 40: 184 kB in memory" in said[0]
    assert whole.nbytes == 40 * 3 * 12 * 32 * 4
    one = working_bytes(model, 12, pattern=False)
    small = wb.capture(model, tokens_of(40), "z", budget_bytes=whole.nbytes + 3 * one)
    assert 1 < len(small.shards) < 40
    with pytest.raises(BudgetError, match="budget_bytes is 100,000 ") as refused:
        wb.capture(model, tokens_of(40), "z", budget_bytes=100_000)
    for remedy in ("store=folder", "reduce 'z'", "fewer than 3 layers", "raise budget_bytes to"):
        assert remedy in str(refused.value)
    stored = wb.capture(model, tokens_of(40), "z", budget_bytes=100_000, store=tmp_path)
    assert torch.equal(stored["z", 2, 1], whole["z", 2, 1]) or torch.allclose(stored["z", 2, 1], whole["z", 2, 1])
    with pytest.raises(BudgetError, match="lower batch_size to"):
        wb.capture(model, tokens_of(40), "z", budget_bytes=100_000, store=tmp_path / "b", batch_size=40)
    wanted = int(str(refused.value).rpartition("raise budget_bytes to ")[2].replace(",", ""))
    assert wb.capture(model, tokens_of(40), "z", budget_bytes=wanted).nbytes == whole.nbytes
    with pytest.raises(BudgetError):
        wb.capture(model, tokens_of(40), "z", budget_bytes=wanted - 1)


def test_a_prompt_that_cannot_run_within_the_budget_is_refused_before_anything_of_its_size_is_made(monkeypatch):
    def fail(*given):
        raise AssertionError("made up")

    monkeypatch.setattr("workbench.cache.plan._made_up", fail)
    with pytest.raises(BudgetError, match="forward pass of one prompt of 12 tokens alone takes about"):
        wb.capture(tiny(), tokens_of(), "pattern", reduce="entropy", budget_bytes=1000)


def test_the_early_end_leaves_no_hooks_behind():
    model = wb.wrap_model(REFUSED["model_type"]())

    def hooks():
        return sum(len(point.fwd_hooks) for point in model.bridge.hook_dict.values())

    before = hooks()
    wb.capture(model, tokens_of(), ["z", "resid_pre"], layers=[0, 1], batch_size=2)
    assert hooks() == before


def test_dtype_is_that_of_what_is_kept_whole():
    held = wb.capture(
        tiny(), tokens_of(), ["z", "pattern"], reduce={"pattern": ["raw", "argmax", "entropy"]}, dtype=torch.float16
    )
    dtypes = {name: entry.dtype for name, entry in held.entries.items()}
    assert dtypes == {
        "pattern": torch.float16,
        "pattern.argmax": torch.int32,
        "pattern.entropy": torch.float32,
        "z": torch.float16,
    }
    assert held["z", 0].dtype == torch.float16
    bf = wb.capture(tiny(dtype=torch.bfloat16), tokens_of(), ["z", "pattern"])
    assert (bf.entries["z"].dtype, bf.entries["pattern"].dtype) == (torch.bfloat16, torch.float32)


def test_a_value_that_the_dtype_cannot_hold_is_not_made_infinite():
    module = tiny_module("llama")
    module.model.embed_tokens.weight.mul_(1e6)
    with pytest.raises(PromptError, match="dtype float16 cannot hold 'resid_pre' of layer 0"):
        wb.capture(wb.wrap_model(module), tokens_of(), "resid_pre", dtype=torch.float16)


@pytest.mark.parametrize(
    ("tokens", "options", "message"),
    [
        (torch.zeros(3), {}, r"must be a non-empty \[n, pos\]"),
        (torch.zeros(2, 3), {}, "not torch.float32"),
        (torch.full((1, 3), 101), {}, "token id 101 is outside"),
        (torch.zeros(1, 129, dtype=torch.long), {}, "do not fit the context"),
        ([1, 2], {}, "ids .* or texts, not list"),
        (tokens_of(), {"lengths": [1, 2]}, "5 numbers from 1 to 12"),
        (tokens_of(), {"lengths": [1, 2, 3, 0, 4]}, "go from 0 to 4"),
        (tokens_of(), {"labels": {"input": ["a"]}}, "has 1 entries and there are 5 prompts"),
        (tokens_of(), {"batch_size": 0}, "batch_size is 0"),
        (tokens_of(), {"dtype": torch.int32}, "expected a floating one"),
    ],
)
def test_bad_arguments_are_refused(tokens, options, message):
    with pytest.raises(PromptError, match=message):
        wb.capture(tiny(), tokens, "z", **options)


def test_attention_that_is_not_causal(monkeypatch):
    from dataclasses import replace

    model = tiny("gpt2")
    for holder in (model, model.weights):
        spec = replace(model.spec, causal=False)
        monkeypatch.setitem(holder.__dict__, "spec", spec) if "spec" in holder.__dict__ else None
    with pytest.raises(UnsupportedModelError, match="is not causal"):
        wb.capture(model, tokens_of(), "pattern", reduce="key_mean")
    with pytest.raises(PromptError, match="real tokens would see padding"):
        wb.capture(model, tokens_of(), "pattern", lengths=LENGTHS)
    assert "pattern" in wb.capture(model, tokens_of(), "pattern")


def test_a_site_of_unexpected_form_is_refused(monkeypatch):
    model = tiny()
    monkeypatch.setattr(model, "forward", lambda tokens, observe: observe["z"](0, torch.zeros(len(tokens), 12, 32)))
    with pytest.raises(ModelError, match="site 'z' of layer 0 comes as"):
        wb.capture(model, tokens_of(), "z")
    monkeypatch.setattr(model, "forward", lambda tokens, observe: None)
    with pytest.raises(ModelError, match="was not shown"):
        wb.capture(model, tokens_of(), "z")


def test_what_a_cache_does_not_hold_is_said():
    held = wb.capture(tiny(), tokens_of(), ["z", "pattern"], layers=[1], reduce={"pattern": "entropy"})
    assert repr(held).startswith("Cache(tiny, 5 prompts x 12 tokens, pattern.entropy layer 1; z layer 1; ")
    for call, message in [
        (lambda: held["pattern", 1], "no 'pattern': it holds pattern.entropy"),
        (lambda: held["z", 0], "of layer 1, not of layer 0"),
        (lambda: held["z", 1, N_HEADS], "heads 0 to 3"),
        (lambda: held["z"], "write cache"),
    ]:
        with pytest.raises(DataError, match=message):
            call()
    with pytest.raises(PromptError, match="prompts 0 to 4"):
        held.get("z", 1, prompts=[5])
    held.verify()


def test_texts_are_tokenised_and_counted():
    model = tiny_text_model()
    texts = ["Then Mary gave a drink", "the store", "John and Mary went to the store"]
    tokens, lengths = model.to_tokens(texts)
    held = wb.capture(model, texts, "z", labels={"input": ["a", "b", "a"]})
    assert torch.equal(held.tokens, tokens)
    assert torch.equal(held.lengths, lengths)
    assert held.labels == {"input": ("a", "b", "a")}
    given = wb.capture(model, tokens, "z", lengths=lengths)
    assert torch.equal(given["z", 1], held["z", 1])
    with pytest.raises(PromptError, match="the tokenizer counts"):
        wb.capture(model, texts, "z", lengths=lengths)


@pytest.mark.parametrize("bos", [False, True])
def test_windows_cut_a_text_into_prompts_that_cover_it_once(bos):
    model = tiny_text_model(bos_token="<s>")
    front = []
    if bos:
        front = [model.tokenizer.bos_token_id]
        model.tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", front[0])]
        )
    text = "Then Mary and John went to the store and gave a drink"
    ids = model.tokenizer(text, add_special_tokens=False)["input_ids"]
    tokens, lengths = windows(model, text, 5)
    rows = [row[:length].tolist() for row, length in zip(tokens, lengths, strict=True)]
    assert all(row[: len(front)] == front for row in rows)
    assert [each for row in rows for each in row[len(front) :]] == ids
    assert {len(row) for row in rows[:-1]} == {5}
    for bad, message in (("", "has no tokens"), (text, "length is 129")):
        with pytest.raises(PromptError, match=message):
            windows(model, bad, 129 if bad else 5)
