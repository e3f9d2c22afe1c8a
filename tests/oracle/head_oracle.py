"""Ablating one head or MLP by its definition, with plain hooks on the transformers module and one forward each.

Imports nothing of workbench. What a head mixes is replaced in front of the output map, columns of one head at a time;
a zero query is put in at the output of the query projection, where norms and rotations keep it zero.
"""

import torch

from oracle.hook_oracle import HookOracle, anatomy, hooked


def columns(parts, head):
    return slice(head * parts.d_head, (head + 1) * parts.d_head)


@torch.no_grad()
def kept(module, tokens):
    """What every layer's output map reads, what its MLP writes, and its values `[n, pos, kv, d_head]`."""
    parts = anatomy(module)
    mixed, mlps, values = {}, {}, {}
    hooks = []
    for layer, block in enumerate(parts.blocks):

        def keep_z(_module, args, layer=layer):
            mixed[layer] = args[0]

        def keep_mlp(_module, _args, output, layer=layer):
            mlps[layer] = output

        def keep_v(_module, _args, output, layer=layer, block=block):
            heads = [output[..., block.columns("v", head)] for head in range(parts.n_kv_heads)]
            values[layer] = torch.stack(heads, dim=2)

        hooks += [(block.out, "pre", keep_z), (block.mlp, "post", keep_mlp), (block.projection["v"], "post", keep_v)]
    with hooked(*hooks):
        module(tokens)
    return mixed, mlps, values


def means_by_template(stack, templates, lengths):
    """For every prompt and position the mean over prompts of its template that have the position; by counting."""
    found = torch.zeros_like(stack)
    for row, name in enumerate(templates):
        for position in range(stack.shape[1]):
            same = [i for i, other in enumerate(templates) if other == name and position < lengths[i]]
            if same:
                found[row, position] = torch.stack([stack[i, position] for i in same]).mean(0)
    return found


class HeadOracle(HookOracle):
    """Effects of ablating components, one forward each.

    Args:
        module, pairs, base, metric: as for `HookOracle`.
        templates: for mean ablation, the template of each prompt.
    """

    def __init__(self, module, pairs, *, base="clean", templates=None, **options):
        super().__init__(module, pairs, base=base, **options)
        other = pairs["corrupted" if base == "clean" else "clean"]
        self.mixed, self.mlps, self.values = kept(module, self.tokens)
        self.other_mixed, self.other_mlps, _ = kept(module, other)
        self.templates = templates

    def new_z(self, ablation, layer, head):
        """What takes the place of what a head mixes `[n, pos, d_head]`."""
        part = columns(self.parts, head)
        mine = self.mixed[layer][..., part]
        values = self.values[layer][:, :, head * self.parts.n_kv_heads // self.parts.n_heads]
        if ablation in {"zero", "value_zero"}:
            return torch.zeros_like(mine)
        if ablation == "resample":
            return self.other_mixed[layer][..., part]
        if ablation == "mean":
            return means_by_template(self.other_mixed[layer][..., part], self.templates, self.pairs["lengths"])
        if ablation == "pattern_to_first":
            return values[:, :1].expand_as(mine)
        if ablation == "uniform_pattern":
            return torch.stack([values[:, : q + 1].mean(1) for q in range(values.shape[1])], dim=1)
        raise ValueError(ablation)

    def hooks_of(self, name, ablation, where=None):
        """Hooks that ablate `a1.h2`, all heads `a1` or the MLP `m1`, at positions `where` `[n, pos]`."""
        layer = int(name[1:].split(".")[0])
        block = self.parts.blocks[layer]
        where = torch.ones(self.tokens.shape, dtype=torch.bool) if where is None else where
        if name.startswith("m"):
            new = {
                "zero": lambda: torch.zeros_like(self.mlps[layer]),
                "resample": lambda: self.other_mlps[layer],
                "mean": lambda: means_by_template(self.other_mlps[layer], self.templates, self.pairs["lengths"]),
            }[ablation]()
            return [(block.mlp, "post", lambda _m, _a, output: torch.where(where[..., None], new, output))]
        heads = [int(name.split(".h")[1])] if "." in name else list(range(self.parts.n_heads))
        if ablation == "query_zero":

            def silence(_module, _args, output):
                output = output.clone()
                for head in heads:
                    place = block.columns("q", head)
                    output[..., place] = output[..., place].masked_fill(where[..., None], 0)
                return output

            return [(block.projection["q"], "post", silence)]

        def swap(_module, args):
            mixed = args[0].clone()
            for head in heads:
                part = columns(self.parts, head)
                mixed[..., part] = torch.where(where[..., None], self.new_z(ablation, layer, head), mixed[..., part])
            return (mixed,)

        return [(block.out, "pre", swap)]

    def total(self, name, ablation, where=None):
        """Total effect `[n]`."""
        return self.run(*self.hooks_of(name, ablation, where)) - self.base_value

    def direct(self, name, ablation):
        """Effect `[n]` of what only the final norm reads of the ablated write."""
        with hooked(*self.hooks_of(name, ablation)):
            changed = self.writes(self.tokens)
        delta = self.ablated_write(name, changed) - self.ablated_write(name, self.base_writes)
        return self.run((self.parts.final_norm, "pre", lambda _module, args: (args[0] + delta,))) - self.base_value

    def ablated_write(self, name, writes):
        if "." in name or name.startswith("m"):
            return writes[name]
        return sum(writes[f"{name}.h{head}"] for head in range(self.parts.n_heads))
