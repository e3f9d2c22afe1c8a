"""Compile two RASP programs to transformer weights with tracr, and write them to .npz files.

Run by an interpreter that has ``tracr-pypi==1.0.0`` and ``jax<0.6`` (``make tracr`` makes it; the workbench's own
environment has neither)::

    python tests/oracle/tracr_compile.py [FOLDER]

The programs are those of Conmy et al. 2023 (ACDC): ``reverse`` (the tokens 1, 2, 3 in reverse order) and
``xproportion`` (at each position, the fraction of tokens so far that are x), at most 5 tokens after BOS, attention
without a causal mask, no layer norm.

Format of ``tracr_<program>.npz``, numbers and strings only, no pickles; float32 unless said otherwise; L layers,
H heads, D residual width, K head width, F MLP width, V tokens:

======================  =============  ================================================================
token_embed             [V, D]         position_embed [6, D]
W_Q, W_K, W_V           [L, D, H K]    b_Q, b_K, b_V [L, H K]; heads side by side
W_O                     [L, H K, D]    b_O [L, D]
W_in                    [L, D, F]      b_in [L, F]; ReLU; W_out [L, F, D], b_out [L, D]
unembed                 [D, O]         output columns in the order of ``outputs``
shape                   int64 [4]      L, H, K, F
residual_labels         str [D]        tracr's name of each residual direction, "variable:value" or "variable"
tokens                  str [V]        what each token id stands for; "BOS" and "PAD" among them
outputs                 str [O]        what each output column stands for
inputs                  int64 [n, 6]   every input of one to five tokens that was checked, BOS first, PAD after
expected                [n, 6, D]      residual stream at the end, computed by tracr itself in jax
decoded                 str [n, 6]     what tracr's own decoder makes of it
======================  =============  ================================================================

The files come out the same, byte for byte, with the same versions on the same kind of machine.
"""

import sys
from pathlib import Path

import numpy as np
from tracr.compiler import compiling, lib
from tracr.rasp import rasp

LENGTH = 5


def programs():
    """Name, program and vocabulary."""
    yield "reverse", lib.make_reverse(rasp.tokens), ["1", "2", "3"]
    yield "xproportion", lib.make_frac_prevs(rasp.tokens == "x"), ["w", "x", "y", "z"]


def some_inputs(vocabulary, n=16):
    """Inputs of every length, the same on every run."""
    rng = np.random.default_rng(0)
    for index in range(n):
        yield [str(t) for t in rng.choice(vocabulary, size=1 + index % LENGTH)]


def compiled(program, vocabulary):
    """Arrays of one program, as the module's docstring describes them."""
    model = compiling.compile_rasp_to_model(
        program, vocab=set(vocabulary), max_seq_len=LENGTH, causal=False, compiler_bos="BOS", compiler_pad="PAD"
    )
    config, params = model.model_config, model.params
    ids = model.input_encoder.encoding_map
    layers = [f"transformer/layer_{layer}" for layer in range(config.num_layers)]

    def stack(part, kind):
        return np.stack([np.asarray(params[f"{layer}/{part}"][kind]) for layer in layers])

    arrays = {
        "token_embed": np.asarray(params["token_embed"]["embeddings"]),
        "position_embed": np.asarray(params["pos_embed"]["embeddings"]),
        "shape": np.array([config.num_layers, config.num_heads, config.key_size, config.mlp_hidden_size]),
        "residual_labels": np.array(model.residual_labels),
        "tokens": np.array([str(token) for token in ids]),
    }
    names = {"Q": "attn/query", "K": "attn/key", "V": "attn/value", "O": "attn/linear"}
    names |= {"in": "mlp/linear_1", "out": "mlp/linear_2"}
    for short, long in names.items():
        arrays[f"W_{short}"], arrays[f"b_{short}"] = stack(long, "w"), stack(long, "b")

    # The unembedding is a projection on the directions of the program's output; tracr keeps it in a closure.
    encoder = getattr(model.output_encoder, "encoding_map", None)  # numerical programs have one output direction
    output = str(program.label)
    own = [i for i, label in enumerate(model.residual_labels) if label.split(":")[0] == output]
    arrays["outputs"] = np.array([str(value) for value in encoder] if encoder else [output])
    arrays["unembed"] = np.eye(len(model.residual_labels), dtype=np.float32)[:, own]

    inputs, expected, decoded = [], [], []
    for words in some_inputs(vocabulary):
        padded = ["BOS", *words, *["PAD"] * (LENGTH - len(words))]
        result = model.apply(padded)
        stream = np.asarray(result.transformer_output)[0]
        numbers = stream @ arrays["unembed"]
        made = numbers.argmax(-1) if encoder else numbers[:, 0]
        if not np.array_equal(made, np.asarray(result.unembedded)[0]):
            raise SystemExit(f"{output}: the unembedding found by label is not tracr's own")
        inputs.append([ids[word] for word in padded])
        expected.append(stream)
        decoded.append([str(value) for value in result.decoded])
    arrays |= {"inputs": np.array(inputs), "expected": np.array(expected), "decoded": np.array(decoded)}
    return arrays


def main():
    """Write both programs."""
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent)
    for name, program, vocabulary in programs():
        path = folder / f"tracr_{name}.npz"
        np.savez_compressed(path, **compiled(program, vocabulary))
        sys.stdout.write(f"{path}: {path.stat().st_size} bytes\n")


if __name__ == "__main__":
    main()
