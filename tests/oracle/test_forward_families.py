"""The functional forward and the canonical weights, against the transformers modules they were read from."""

import dataclasses
from contextlib import contextmanager

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

import workbench
from families import FAMILIES, REFUSED, tiny_module, tiny_pairs
from oracle.hook_oracle import HookOracle, anatomy, hooked
from workbench.models.bridge import forward_with_hooks
from workbench.models.forward import SITES

RELATIVE = 1e-9  # of the largest value, in float64


def relative_error(ours, theirs):
    assert ours.shape == theirs.shape
    return float((ours.double() - theirs.double()).abs().max() / theirs.double().abs().max())


def observed(model, tokens, sites=SITES):
    """What `Model.forward` shows: (site, layer) -> tensor."""
    seen = {}
    observe = {site: lambda layer, value, site=site: seen.__setitem__((site, layer), value) for site in sites}
    model.forward(tokens, observe=observe)
    return seen


@contextmanager
def attention_spy(module):
    """Let the module's attention run through a plain float64-safe implementation that keeps what it is given."""
    calls = []

    def spy(attention, query, key, value, attention_mask, scaling=None, dropout=0.0, **_):
        groups = query.shape[1] // key.shape[1]
        scores = query @ key.repeat_interleave(groups, dim=1).mT * scaling
        pattern = (scores + attention_mask).softmax(dim=-1)
        z = (pattern @ value.repeat_interleave(groups, dim=1)).transpose(1, 2)
        calls.append({"q": query.transpose(1, 2), "k": key.transpose(1, 2), "v": value.transpose(1, 2)})
        calls[-1] |= {"pattern": pattern, "z": z}
        return z, pattern

    AttentionInterface.register("attention_spy", spy)
    AttentionMaskInterface.register("attention_spy", eager_mask)
    before = module.config._attn_implementation
    module.set_attn_implementation("attention_spy")
    try:
        yield calls
    finally:
        module.set_attn_implementation(before)


def module_sites(module, tokens):
    """The same sites, from the transformers module's own submodules."""
    parts = anatomy(module)
    seen = {}

    def keep(site, layer, index):
        def hook(_module, args, output=None):
            seen[site, layer] = args[0] if index == "in" else output

        return hook

    hooks = []
    for layer, block in enumerate(parts.blocks):
        hooks += [(block.attn_norm, "pre", keep("resid_pre", layer, "in"))]
        hooks += [(block.out, "post", keep("attn_out", layer, "out"))]
        hooks += [(block.mlp, "post", keep("mlp_out", layer, "out"))]
        if not parts.parallel:
            hooks += [(block.mlp_norm, "pre", keep("resid_mid", layer, "in"))]
        after = parts.blocks[layer + 1].attn_norm if layer + 1 < len(parts.blocks) else parts.final_norm
        hooks += [(after, "pre", keep("resid_post", layer, "in"))]
    with torch.no_grad(), attention_spy(module) as calls, hooked(*hooks):
        module(tokens)
    assert len(calls) == len(parts.blocks)
    return seen | {(site, layer): call[site] for layer, call in enumerate(calls) for site in call}


@pytest.fixture(params=FAMILIES)
def module(request):
    return tiny_module(request.param, dtype=torch.float64)


@pytest.fixture
def model(module):
    return workbench.wrap_model(module)


def test_logits_are_those_of_the_module(module, model):
    pairs = tiny_pairs(module)
    whole_context = torch.randint(101, (2, 128), generator=torch.Generator().manual_seed(1))
    assert model.path == "fast"
    assert model.refusal is None
    for tokens in (pairs["clean"], pairs["corrupted"], whole_context):
        with torch.no_grad():
            theirs = module(tokens).logits
        assert theirs.dtype == torch.float64
        assert relative_error(model.forward(tokens), theirs) < RELATIVE


def test_every_observed_site_is_that_of_the_module(module, model):
    tokens = tiny_pairs(module)["clean"]
    ours, theirs = observed(model, tokens), module_sites(module, tokens)
    assert set(ours) == set(theirs)
    sites = {site for site, _ in ours}
    assert sites == (set(SITES) - {"resid_mid"} if model.spec.parallel else set(SITES))
    for where, value in theirs.items():
        assert relative_error(ours[where], value) < RELATIVE, where


def test_observing_the_pattern_leaves_the_logits_alone(module, model):
    tokens = tiny_pairs(module)["clean"]
    watched = model.forward(tokens, observe={"pattern": lambda layer, value: None})
    assert relative_error(watched, model.forward(tokens)) < 1e-12


def test_right_padding_and_the_rest_of_the_batch_do_not_matter(module, model):
    pairs = tiny_pairs(module)
    logits = model.forward(pairs["clean"])
    for row, length in enumerate(pairs["lengths"].tolist()):
        alone = model.forward(pairs["clean"][row : row + 1, :length])
        assert relative_error(logits[row : row + 1, :length], alone) < 1e-12


def test_unembedding_one_position_of_each_prompt(module, model):
    pairs = tiny_pairs(module)
    at = pairs["answer_positions"]
    few = model.forward(pairs["clean"], unembed_positions=at)
    assert few.shape == (3, 101)
    assert relative_error(few, model.forward(pairs["clean"])[torch.arange(3), at]) < 1e-12


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", FAMILIES)
def test_lower_precision_is_as_near_the_truth_as_the_module_is(name, dtype):
    reference = tiny_module(name, dtype=torch.float64)
    module = tiny_module(name, dtype=dtype)
    for low, high in zip(module.parameters(), reference.parameters(), strict=True):
        high.copy_(low)  # the rounded weights, so that only arithmetic differs
    model = workbench.wrap_model(module)
    assert model.path == "fast", model.refusal
    tokens = tiny_pairs(module)["clean"]
    with torch.no_grad():
        truth, theirs = reference(tokens).logits, module(tokens).logits
    ours = model.forward(tokens)
    assert ours.dtype == theirs.dtype == dtype
    error, their_error = (float((x.double() - truth).pow(2).mean().sqrt()) for x in (ours, theirs))
    assert their_error > 0
    assert error < 2 * their_error


@pytest.mark.parametrize("name", ["gpt2", "neox_parallel", "neox_sequential", "llama", "llama_mha", "qwen2", "qwen3"])
def test_the_fast_path_shows_what_transformer_lens_hooks_show(name):
    module = tiny_module(name)
    model = workbench.wrap_model(module)
    tokens = tiny_pairs(module)["clean"]
    ours = observed(model, tokens)
    theirs = {}
    silent = {"q", "k"} if name.startswith("neox") else set()  # TransformerLens has no rotated q and k of NeoX
    for site in {site for site, _ in ours}:
        observe = {site: lambda layer, value, s=site: theirs.__setitem__((s, layer), value)}
        if site in silent:
            with pytest.raises(workbench.errors.ModelError, match=f"site '{site}'"):
                forward_with_hooks(model.bridge, tokens, observe)
        else:
            forward_with_hooks(model.bridge, tokens, observe)
    assert set(theirs) == {(site, layer) for site, layer in ours if site not in silent}
    for where, value in theirs.items():
        assert relative_error(ours[where], value) < 1e-5, where


def tensors_of(thing):
    if isinstance(thing, torch.Tensor):
        yield thing
    elif isinstance(thing, torch.nn.Module):
        yield from thing.parameters()
    elif dataclasses.is_dataclass(thing):
        for field in dataclasses.fields(thing):
            yield from tensors_of(getattr(thing, field.name))
    elif isinstance(thing, tuple | list):
        for item in thing:
            yield from tensors_of(item)


def test_canonical_weights_are_views_of_the_module(module, model):
    own = {p.untyped_storage().data_ptr() for p in module.parameters()}
    weights = model.fast_weights
    per_head = [getattr(layer, name) for layer in weights.layers for name in ("W_Q", "W_K", "W_V", "W_O")]
    assert all(view.untyped_storage().data_ptr() in own for view in per_head)
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors_of(weights)}
    extra = sum(size for pointer, size in storages.items() if pointer not in own)
    total = sum({p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in module.parameters()}.values())
    assert extra < 0.1 * total
    layer = weights.layers[1]
    with torch.no_grad():
        before = model.forward(torch.arange(5)[None])
        layer.W_V[0].mul_(1.5)  # writing through the view changes the module
        after = module(torch.arange(5)[None]).logits
    assert relative_error(before, after) > 1e-4
    assert relative_error(model.forward(torch.arange(5)[None]), after) < RELATIVE


def test_per_head_weights_reproduce_each_projection(module, model):
    tokens = tiny_pairs(module)["clean"]
    parts, layer = anatomy(module), 1
    block, ours = parts.blocks[layer], model.fast_weights.layers[layer]
    spec = model.spec
    seen = {}
    hooks = [(block.attn_norm, "post", lambda _m, _a, output: seen.__setitem__("normed", output))]
    for kind in "qkv":
        hooks.append((block.projection[kind], "post", lambda _m, _a, output, k=kind: seen.__setitem__(k, output)))
    with torch.no_grad(), hooked(*hooks):
        module(tokens)
    assert ours.W_Q.shape == (spec.n_heads, spec.d_model, spec.d_head)
    assert ours.W_K.shape == ours.W_V.shape == (spec.n_kv_heads, spec.d_model, spec.d_head)
    assert ours.W_O.shape == (spec.n_heads, spec.d_head, spec.d_model)
    for kind, weight, bias in zip("qkv", (ours.W_Q, ours.W_K, ours.W_V), ours.qkv.biases, strict=True):
        for head in range(len(weight)):
            product = seen["normed"] @ weight[head]
            product = product if bias is None else product + bias[head]
            assert relative_error(product, seen[kind][..., block.columns(kind, head)]) < 1e-12
    z = observed(model, tokens, ["z"])["z", layer]
    writes = HookOracle(module, tiny_pairs(module)).base_writes
    for head in range(spec.n_heads):
        assert relative_error(z[:, :, head] @ ours.W_O[head], writes[f"a{layer}.h{head}"]) < RELATIVE
    assert (ours.b_O is None) == (block.out.bias is None)


@pytest.mark.parametrize("name", ["llama", "llama_mqa", "llama_bias", "mistral", "qwen2", "qwen3"])
def test_ungrouping_keeps_the_logits(name):
    module = tiny_module(name, dtype=torch.float64)
    tokens = tiny_pairs(module)["clean"]
    with torch.no_grad():
        theirs = module(tokens).logits
    model = workbench.wrap_model(module, ungroup=True)
    assert model.path == "fast"
    assert model.spec.n_kv_heads == model.spec.n_heads == 4
    assert relative_error(model.forward(tokens), theirs) < RELATIVE
    with torch.no_grad():
        assert torch.equal(module(tokens).logits, theirs)  # the wrapped module is left as it was


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_fast_path_does_not_honour_goes_to_hooks(name):
    """Named by the config field, and with the module's own logits, also beyond the window or context."""
    module = REFUSED[name]()
    tokens = torch.randint(101, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        theirs = module(tokens).logits
    model = workbench.wrap_model(module)
    assert model.path == "hooks"
    assert name in model.refusal
    assert relative_error(model.forward(tokens), theirs) < 1e-5
    with pytest.raises(workbench.errors.UnsupportedModelError, match=name):
        _ = model.fast_weights


@pytest.mark.parametrize("name", ["gpt2", "llama", "neox_parallel"])
def test_a_config_field_nobody_knows_is_refused_by_name(name):
    module = tiny_module(name)
    module.config.attention_temperature = 0.5
    model = workbench.wrap_model(module)
    assert model.path == "hooks"
    assert "attention_temperature" in model.refusal


@pytest.mark.parametrize("name", FAMILIES)
def test_a_module_that_computes_something_else_is_refused_by_its_numbers(name):
    module = tiny_module(name)
    anatomy(module).blocks[1].mlp.register_forward_hook(lambda _module, _args, output: 1.05 * output)
    model = workbench.wrap_model(module)
    assert model.path == "hooks"
    assert "differs" in model.refusal
