"""Circuits as files: our JSON, and the graph JSON of EAP-IG."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.errors import DataError, OutputError, PromptError
from workbench.stats import Estimate
from workbench_circuits.circuit import Able, Circuit, GraphShape, Steadiness
from workbench_circuits.evaluation import Evaluation
from workbench_circuits.wiring import Wiring

if TYPE_CHECKING:
    from workbench.models import Model

SCHEMA_VERSION = 1
KIND = "circuit"
_GROUPED = re.compile(r"a(\d+)\.kv(\d+)<([kv])>")
_TEXT = ("metric", "ablation", "direction", "method", "algorithm", "model", "model_hash")


def write_circuit(circuit: Circuit, path: str | Path) -> Path:
    """Write a circuit as JSON with its schema version.

    Raises:
        OutputError: if the file cannot be written; an earlier one stays as it was.
    """
    record = {"kind": KIND, "schema_version": SCHEMA_VERSION, **asdict(circuit)}
    return _write(_plain(record), Path(path))


def read_circuit(path: str | Path) -> Circuit:
    """Read what `write_circuit` wrote.

    Raises:
        DataError: if the file is missing, damaged, no circuit, or of another version.
    """
    path = Path(path)
    record = _read(path)
    if record.get("kind") != KIND:
        hint = ""
        if {"cfg", "nodes", "edges"} <= set(record):
            hint = "; it looks like a graph of EAP-IG: read it with Circuit.load_eap_ig"
        raise DataError(f"{path} is no circuit: its kind is {record.get('kind')!r}, expected {KIND!r}{hint}")
    if record.get("schema_version") != SCHEMA_VERSION:
        raise DataError(
            f"{path} has schema_version {record.get('schema_version')!r} and this workbench reads {SCHEMA_VERSION}: "
            "find the circuit again, or use the workbench that wrote it"
        )
    known = {f.name for f in fields(Circuit)}
    foreign = set(record) - known - {"kind", "schema_version"}
    missing = {"edges", "shape", "model", "model_hash"} - set(record)
    if foreign or missing:
        raise DataError(
            f"{path} is damaged: {', '.join(sorted(missing)) or 'nothing'} missing, "
            f"{', '.join(sorted(foreign)) or 'nothing'} unknown"
        )
    try:
        return Circuit(**_parsed({name: record[name] for name in known if name in record}))
    except (TypeError, ValueError, KeyError, AttributeError, OverflowError) as error:
        raise DataError(f"{path} is damaged: {error}") from error
    except DataError as error:
        raise DataError(f"{path}: {error}") from error


def _parsed(record: dict[str, Any]) -> dict[str, Any]:
    found = dict(record)
    shape = {name: found["shape"][name] for name in (f.name for f in fields(GraphShape))}
    for name, value in shape.items():
        if type(value) is not (bool if name in {"has_mlp", "parallel"} else int):
            raise TypeError(f"shape.{name} is {value!r}")
    sizes = [shape[name] for name in ("n_layers", "n_heads", "n_kv_heads")]
    if min(sizes) < 1 or sizes[1] % sizes[2]:
        raise ValueError(f"shape has {sizes} layers, heads and key/value heads")
    found["shape"] = GraphShape(**shape)
    if not isinstance(found["edges"], list) or not all(isinstance(name, str) for name in found["edges"]):
        raise TypeError("edges must be a list of names")
    found["edges"] = tuple(found["edges"])
    for name in _TEXT:
        if name in found and not isinstance(found[name], str):
            raise TypeError(f"{name} is {found[name]!r}, expected text")
    for name in ("effects", "inclusion"):
        if found.get(name) is not None:
            found[name] = tuple(math.nan if x is None else float(x) for x in found[name])
    for name in ("held_out", "train"):
        if found.get(name) is not None:
            found[name] = _evaluation(found[name])
    for name, made in (("competence", Able), ("stability", Steadiness)):
        if found.get(name) is not None:
            found[name] = made(**found[name])
    if not isinstance(found.get("provenance", {}), dict):
        raise TypeError("provenance must be an object")
    return found


def _evaluation(record: Mapping[str, Any]) -> Evaluation:
    parts = dict(record)
    for name in ("faithfulness", "circuit", "model", "none"):
        numbers: dict[str, Any] = {k: math.nan if v is None else v for k, v in parts[name].items()}
        parts[name] = Estimate(**numbers)
    return Evaluation(**parts)


def write_eap_ig(circuit: Circuit, path: str | Path, *, ungroup: bool = False) -> Path:
    """Write a circuit as EAP-IG's `Graph.to_json` writes a graph (github.com/hannamw/EAP-IG).

    The file names every edge of the model, with its score (0 where the circuit knows none) and whether it is in the
    graph. EAP-IG knows no shared keys and values. Of a model that has them, the file names the native ones,
    `a3.kv0<k>`, and EAP-IG cannot load it; with `ungroup`, an edge to a shared key or value stands as one edge to that
    of each query head, each with the score divided among them, which is the same circuit in the ungrouped model.

    Args:
        circuit: the circuit.
        path: file to write.
        ungroup: give every query head a key and value of its own.

    Raises:
        PromptError: for a model without MLPs, which EAP-IG's graphs always have.
        OutputError: if the file cannot be written.
    """
    if not circuit.shape.has_mlp:
        raise PromptError("EAP-IG's graphs have an MLP in every layer and this model has none: save it as our JSON")
    grouped = circuit.shape.n_kv_heads != circuit.shape.n_heads
    score = {name: 0.0 if math.isnan(x) else x for name, x in zip(circuit.edges, circuit.effects, strict=True)}
    inside = set(circuit.edges)
    edges: dict[str, dict[str, Any]] = {}
    group = circuit.shape.n_heads // circuit.shape.n_kv_heads
    for name in circuit.graph.all_edges().names:
        match = _GROUPED.search(name) if grouped and ungroup else None
        if match is None:
            edges[name] = {"score": score.get(name, 0.0), "in_graph": name in inside}
            continue
        sender = name[: match.start()]
        for head in range(int(match[2]) * group, (int(match[2]) + 1) * group):
            edges[f"{sender}a{match[1]}.h{head}<{match[3]}>"] = {
                "score": score.get(name, 0.0) / group,
                "in_graph": name in inside,
            }
    nodes = set(circuit.nodes)
    record: dict[str, Any] = {
        "cfg": {
            "n_layers": circuit.shape.n_layers,
            "n_heads": circuit.shape.n_heads,
            "parallel_attn_mlp": circuit.shape.parallel,
            "d_model": circuit.shape.d_model,
        },
        "nodes": {name: {"in_graph": name in nodes} for name in (*circuit.graph.sender_names, "logits")},
        "edges": edges,
    }
    record["nodes"]["logits"]["in_graph"] = True
    return _write(record, Path(path))


def read_eap_ig(path: str | Path, *, model: Model | None = None, name: str = "") -> Circuit:
    """Read a graph that EAP-IG wrote as JSON, of either of its versions, or that `write_eap_ig` wrote.

    Args:
        path: the file.
        model: the model it is of, to be checked against it and recorded; else the circuit does not know its weights.
        name: what to call the model if it is not given.

    Raises:
        DataError: if the file is missing, damaged, no such graph, has neurons, or is of another model than `model`.
    """
    path = Path(path)
    record = _read(path)
    if not {"cfg", "nodes", "edges"} <= set(record):
        raise DataError(f"{path} is no graph of EAP-IG: expected the keys cfg, nodes and edges, found {sorted(record)}")
    try:
        cfg, listed = record["cfg"], record["edges"]
        parts = {int(m[2]) for m in map(_GROUPED.search, listed) if m}
        shape = GraphShape(
            n_layers=int(cfg["n_layers"]),
            n_heads=int(cfg["n_heads"]),
            n_kv_heads=len(parts) if parts else int(cfg["n_heads"]),
            d_model=int(cfg.get("d_model", 0) or 0),
            has_mlp=True,
            parallel=bool(cfg["parallel_attn_mlp"]),
        )
        if any(isinstance(node, dict) and "neurons" in node for node in record["nodes"].values()):
            raise DataError(f"{path} selects neurons within nodes, which a circuit here cannot: export it by edges")
        scores = {edge: math.nan if info["score"] is None else float(info["score"]) for edge, info in listed.items()}
        inside = [edge for edge, info in listed.items() if info["in_graph"]]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{path} is a damaged graph of EAP-IG: {error!r}") from error
    if model is not None:
        expected = GraphShape.of(model.spec)
        if not shape.d_model:
            shape = GraphShape(**{**asdict(shape), "d_model": expected.d_model})
        if shape != expected:
            raise DataError(f"{path} is of a model with {shape}, and {model.name} has {expected}")
    try:
        names = [] if not inside else shape.graph.edges(inside).names
        order = Wiring(shape.graph).edges(Wiring(shape.graph).mask(names)).names
    except PromptError as error:
        raise DataError(f"{path} does not fit its own cfg: {error}") from error
    return Circuit(
        edges=tuple(order),
        effects=tuple(scores[edge] for edge in order),
        shape=shape,
        model=name if model is None else model.name,
        model_hash="" if model is None else model.model_hash,
        method="EAP-IG file",
        provenance={"source": path.name, "format": "EAP-IG"},
    )


def _read(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path} does not exist: give the file that `workbench discover --out` wrote") from None
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON: {error}") from error
    if not isinstance(record, dict):
        raise DataError(f"{path} holds no JSON object")
    return record


def _write(record: Mapping[str, Any], path: Path) -> Path:
    fresh = path.with_name(path.name + ".new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh.write_text(json.dumps(record, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        os.replace(fresh, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            fresh.unlink(missing_ok=True)
        raise OutputError(
            f"cannot write {path}: {error.strerror or error}. Choose another file, or make room"
        ) from error
    return path


def _plain(value: Any) -> Any:
    """JSON values; NaN, which JSON has not, becomes null."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if hasattr(value, "item") and not isinstance(value, (str, bytes)):
        return _plain(value.item())
    return value
