"""First-order methods against their definitions, by automatic differentiation over hooks on the module."""

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

import workbench as wb
from families import FAMILIES, tiny_module, tiny_pairs
from oracle.hook_oracle import HookOracle, hooked, logit_diff
from oracle.test_edges_exact import BASE, answer_logprob, kl_to_clean
from unit.patching.patching_cases import LATE, gather, model_of, prompts, tiny_prompts
from workbench.models.weights import Norm
from workbench.patching import receiver_exact
from workbench.patching.attribution import attribution_effects
from workbench.patching.exact import exact_effects
from workbench.patching.graph import Edges, Graph
from workbench.patching.receiver_exact import receiver_exact_effects
from workbench.patching.runs import Runs, make_runs

BUDGET = 1 << 28
NO_NORM = Norm(kind="none")


def close(found, expected, tolerance=1e-10):
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)


def runs_of(model, pairs, direction="noising", metric="logit_diff"):
    return make_runs(model.fast_weights, pairs, direction=direction, metric=metric, trace=True)


def by_receiver_exact(runs, edges, budget=BUDGET):
    return gather(receiver_exact_effects(runs, edges, budget_bytes=budget), edges, len(runs.pairs))


def by_attribution(runs, edges, steps=1):
    return gather(attribution_effects(runs, edges, steps=steps), edges, len(runs.pairs))


def exactly(runs, edges):
    return gather(exact_effects(runs, edges, budget_bytes=BUDGET), edges, len(runs.pairs))


def scaled(runs: Runs, factor: float) -> Runs:
    """The same base run, with every write replaced only `factor` of the way."""
    names = ("delta_z", "delta_mlp", "delta_input")
    return replace(runs, **{name: getattr(runs, name) * factor for name in names})


def output_gradients(oracle) -> dict[str, Tensor]:
    """Gradient [n, pos, d_model] of the metric at what each layer's attention ("a0") and MLP ("m0") write."""
    leaves: dict[str, Tensor] = {}

    def leaf(name):
        def hook(_module, _args, output):
            leaves[name] = torch.zeros_like(output, requires_grad=True)
            return output + leaves[name]

        return hook

    hooks = []
    for layer, block in enumerate(oracle.parts.blocks):
        hooks += [(block.out, "post", leaf(f"a{layer}")), (block.mlp, "post", leaf(f"m{layer}"))]
    with hooked(*hooks):
        logits = oracle.module(oracle.tokens).logits
    value = oracle.metric(logits[torch.arange(len(logits)), oracle.pairs["answer_positions"]], oracle.pairs)
    return dict(zip(leaves, torch.autograd.grad(value.sum(), list(leaves.values())), strict=True))


def writer(receiver: str) -> str:
    return receiver.split(".", maxsplit=1)[0]


def receiver_exact_by_hooks(oracle, edges: Edges) -> Tensor:
    """Change in what the receiver writes, in one forward an edge, times the gradient there; exact for `logits`."""
    gradient = output_gradients(oracle)

    def written(receiver, hooks):
        block = oracle.parts.blocks[int(writer(receiver)[1:])]
        kept = []
        site = block.mlp if receiver.startswith("m") else block.out
        with torch.no_grad(), hooked(*hooks, (site, "post", lambda _module, _args, output: kept.append(output))):
            oracle.module(oracle.tokens)
        return kept[0]

    base = {name: written(name, []) for name in gradient}
    found = []
    for sender, _, receiver in (name.partition("->") for name in edges.names):
        if receiver == "logits":
            found.append(oracle.edge_effect(sender, receiver))
            continue
        change = written(receiver, oracle.patch(sender, receiver)) - base[writer(receiver)]
        found.append((change * gradient[writer(receiver)]).sum((-1, -2)))
    return torch.stack(found)


@dataclass(frozen=True, kw_only=True)
class Case:
    runs: dict[str, Runs]
    edges: Edges
    by_hooks: dict[str, Tensor]
    family: str


CASES = (
    ("gpt2", "noising", "logit_diff"),
    ("neox_parallel", "denoising", "logit_diff"),
    ("llama", "noising", "answer_logprob"),
    ("llama_bias", "denoising", "kl_to_clean"),
    ("llama_yarn", "denoising", "logit_diff"),
    ("qwen3", "noising", "logit_diff"),
)


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def case(request):
    family, direction, metric = request.param
    module = tiny_module(family, dtype=torch.float64)
    raw = tiny_pairs(module, n=5)
    score = {"logit_diff": logit_diff, "answer_logprob": answer_logprob, "kl_to_clean": kl_to_clean(module, raw)}[
        metric
    ]
    model = wb.wrap_model(module)
    edges = Graph(model.spec).all_edges()
    expected = receiver_exact_by_hooks(HookOracle(module, raw, base=BASE[direction], metric=score), edges)
    return Case(
        family=family,
        edges=edges,
        runs={
            "all": runs_of(model, prompts(raw), direction, metric),
            "late": runs_of(model, prompts(raw, LATE), direction, metric),
        },
        by_hooks={"all": expected, "late": expected[:, list(LATE)]},
    )


@pytest.mark.parametrize("which", ["all", "late"])
def test_receiver_exact_is_gradient_times_exact_change(case, which):
    expected = case.by_hooks[which]
    assert (expected.abs().amax(1) > 1e-3).double().mean() > 0.8
    close(by_receiver_exact(case.runs[which], case.edges), expected)


@pytest.mark.parametrize("form", ["_Absorbed", "_Projected"])
@pytest.mark.parametrize("which", ["all", "late"])
def test_both_forms_of_receiver_exact_give_the_same(case, which, form, monkeypatch):
    if case.family == "qwen3" and form == "_Absorbed":
        pytest.skip("normalised queries and keys cannot be absorbed")
    chosen, made = getattr(receiver_exact, form), []

    def make(*args):
        made.append(args)
        return chosen(*args)

    monkeypatch.setattr(receiver_exact, "_Absorbed", make)
    monkeypatch.setattr(receiver_exact, "_Projected", make)
    close(by_receiver_exact(case.runs[which], case.edges), case.by_hooks[which])
    assert len(made) == 2 * case.runs[which].weights.spec.n_layers  # queries and keys of every layer, in one part
    close(by_receiver_exact(case.runs[which], case.edges, budget=1 << 10), case.by_hooks[which])
    assert len(made) > 6 * case.runs[which].weights.spec.n_layers  # a small budget parts the senders


def test_a_choice_of_edges_gets_the_same_effects(case):
    every = by_receiver_exact(case.runs["late"], case.edges)
    attributed = by_attribution(case.runs["late"], case.edges, steps=2)
    chosen = torch.randperm(len(case.edges), generator=torch.Generator().manual_seed(1))[:40]
    close(by_receiver_exact(case.runs["late"], case.edges[chosen.numpy()]), every[chosen], 1e-12)
    close(by_attribution(case.runs["late"], case.edges[chosen.numpy()], steps=2), attributed[chosen], 1e-12)


def test_edges_to_logits_are_exact(case):
    edges = case.edges[case.edges.classes == "logits"]
    assert len(edges) == len(edges.graph.senders)
    close(by_receiver_exact(case.runs["all"], edges), exactly(case.runs["all"], edges))


@pytest.mark.parametrize("family", ["gpt2", "llama", "neox_sequential", "neox_parallel"])
def test_last_layer_is_exact_where_the_final_norm_is_linear(family):
    """What nobody but the unembedding reads is linear: MLPs of the last layer, in parallel blocks also its heads."""
    model = model_of(family)
    model.weights = replace(model.fast_weights, ln_final=NO_NORM)
    graph = Graph(model.spec)
    runs, edges = runs_of(model, tiny_prompts(model)), graph.all_edges()
    approximate, exact = by_receiver_exact(runs, edges), exactly(runs, edges)
    last = [graph.receivers[r].layer == model.spec.n_layers - 1 for r in edges.receiver]
    kinds = [graph.receivers[r].kind for r in edges.receiver]
    linear = {"mlp"} if not model.spec.parallel else {"mlp", "q", "k", "v"}
    chosen = torch.tensor([at and kind in linear for at, kind in zip(last, kinds, strict=True)])
    assert chosen.sum() >= 11
    assert exact[chosen].abs().max() > 1e-2
    close(approximate[chosen], exact[chosen])
    earlier = ~torch.tensor(last) & torch.tensor([kind != "logits" for kind in kinds])
    assert (approximate[earlier] - exact[earlier]).abs().max() > 1e-3  # the rest is first order


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_value_edges_are_linear_without_a_norm(family):
    model = model_of(family)
    layers = tuple(replace(layer, ln1=NO_NORM) for layer in model.fast_weights.layers)
    plain = runs_of(model, tiny_prompts(model))
    model.weights = replace(model.fast_weights, layers=layers)
    runs, edges = runs_of(model, tiny_prompts(model)), Graph(model.spec).all_edges()
    kinds = [edges.graph.receivers[r].kind for r in edges.receiver]
    value, query = (torch.tensor([k == kind for k in kinds]) for kind in "vq")
    once, twice = by_receiver_exact(runs, edges), by_receiver_exact(scaled(runs, 2), edges)
    assert once[value].abs().max() > 1e-2
    close(twice[value], 2 * once[value])
    close(by_attribution(runs, edges)[value], once[value])
    assert (twice[query] - 2 * once[query]).abs().max() > 1e-3
    once, twice = by_receiver_exact(plain, edges), by_receiver_exact(scaled(plain, 2), edges)
    assert (twice[value] - 2 * once[value]).abs().max() > 1e-3  # with its norm


@pytest.mark.parametrize("family", FAMILIES)
def test_eap_is_the_derivative_of_exact_at_zero_step(family):
    """Central differences of two step sizes, extrapolated to zero (Richardson)."""
    model = model_of(family)
    edges = Graph(model.spec).all_edges()
    for direction, rows in (("noising", None), ("denoising", LATE)):
        runs = runs_of(model, tiny_prompts(model, rows=rows), direction)
        wide, narrow = (
            (exactly(scaled(runs, step), edges) - exactly(scaled(runs, -step), edges)) / (2 * step)
            for step in (2e-4, 1e-4)
        )
        slope = (4 * narrow - wide) / 3
        found = by_attribution(runs, edges)
        assert found.abs().max() > 1e-2
        torch.testing.assert_close(found, slope, rtol=1e-6, atol=1e-6 * float(slope.abs().mean()))


def test_eap_ig_with_one_step_is_eap():
    model = model_of("llama")
    pairs = tiny_prompts(model)
    eap, one, five = (
        wb.edge_effects(model, pairs, method=method, steps=steps, per_prompt=True).per_prompt
        for method, steps in (("eap", 5), ("eap_ig", 1), ("eap_ig", 5))
    )
    assert (eap == one).all()
    assert abs(eap - five).max() > 1e-2


def eap_ig_by_hooks(oracle, edges: Edges, steps: int) -> Tensor:
    """Integrated gradients over embeddings, each receiver's gradient by differentiating its own norm and projection."""
    parts, module = oracle.parts, oracle.module
    embed = module.get_input_embeddings()
    base, other = embed(oracle.tokens), embed(oracle.pairs["corrupted"])
    receivers = dict.fromkeys(edges.graph.receiver_names)
    total: dict[str, Tensor] = {}
    for step in range(1, steps + 1):
        kept: dict[str, Tensor] = {}

        def keep_input(name, kept=kept):
            return lambda _module, args: kept.__setitem__(name, args[0])

        def keep_output(name, kept=kept):
            return lambda _module, _args, output: kept.__setitem__(name, output)

        hooks = [(parts.final_norm, "pre", keep_input("logits"))]
        for layer, block in enumerate(parts.blocks):
            hooks += [
                (block.attn_norm, "pre", keep_input(f"a{layer}")),
                (block.mlp_norm, "pre", keep_input(f"m{layer}")),
            ]
            hooks += [(block.projection[kind], "post", keep_output(f"{layer}{kind}")) for kind in "qkv"]
            hooks += [(block.mlp, "post", keep_output(f"{layer}mlp"))]
        point = (other + (base - other) * (step / steps)).requires_grad_()
        with hooked(*hooks):
            logits = module(inputs_embeds=point).logits
        value = oracle.metric(logits[torch.arange(len(logits)), oracle.pairs["answer_positions"]], oracle.pairs)
        outputs = {name: out for name, out in kept.items() if name[0].isdigit() or name == "logits"}
        found = torch.autograd.grad(value.sum(), list(outputs.values()), allow_unused=True)
        at_output = dict(zip(outputs, found, strict=True))
        for receiver in receivers:
            if receiver == "logits":
                gradient = at_output["logits"]
            else:
                layer = int(writer(receiver)[1:])
                block, stream = parts.blocks[layer], kept[writer(receiver)].detach().requires_grad_()
                if receiver.startswith("m"):
                    out, arriving = block.mlp(block.mlp_norm(stream)), at_output[f"{layer}mlp"]
                else:
                    kind = receiver[-2]
                    columns = block.columns(kind, int(receiver.split("<")[0].split(".")[1].lstrip("hkv")))
                    out = block.projection[kind](block.attn_norm(stream))[..., columns]
                    arriving = at_output[f"{layer}{kind}"][..., columns]
                (gradient,) = torch.autograd.grad((out * arriving).sum(), stream)
            total[receiver] = total.get(receiver, 0) + gradient / steps
    found = []
    for sender, _, receiver in (name.partition("->") for name in edges.names):
        delta = oracle.other_writes[sender] - oracle.base_writes[sender]
        found.append((delta * total[receiver]).sum((-1, -2)))
    return torch.stack(found)


@pytest.mark.parametrize("family", ["gpt2", "llama", "neox_parallel"])
def test_eap_ig_by_its_definition(family):
    model = model_of(family)
    raw = tiny_pairs(model.module, n=5)
    edges = Graph(model.spec).all_edges()
    expected = eap_ig_by_hooks(HookOracle(model.module, raw), edges, steps=3)
    assert (expected.abs().amax(1) > 1e-3).double().mean() > 0.8
    close(by_attribution(runs_of(model, prompts(raw)), edges, steps=3), expected)
    close(by_attribution(runs_of(model, prompts(raw, LATE)), edges, steps=3), expected[:, list(LATE)])
