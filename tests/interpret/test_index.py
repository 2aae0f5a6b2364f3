"""Every array against a slow, obvious reference in fp64; what interruptions leave behind; sizes and bounds."""

import dataclasses
import json
import math
import os
import sys

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from flexmemory.interpret import index as index_module
from flexmemory.interpret.index import as_stored, build_index
from flexmemory.interpret.index_format import (
    ACTIVE_SHARE,
    BINS,
    NO_CLUSTER,
    NOWHERE,
    STATS,
    Contents,
    Keep,
    array_specs,
    partial_folder,
)
from flexmemory.interpret.index_spaces import clustered, layer_points, mapped
from flexmemory.interpret.tkv import TokenMemory
from flexmemory.presets import get_preset
from flexmemory.storage import Progress
from tests.conftest import VARIED, random_model
from tests.interpret.conftest import OPTIONS
from tests.tol.conftest import files, write_checkpoint

V, K = 512, 128
SIDES = (("pos", True), ("neg", False))


def obvious_coefficients(model, layer):
    """Eq. 2.7 for the whole vocabulary, spelled out, (V, K)."""
    if model.config.architecture == "dense":
        return TokenMemory(model).coefficients(torch.arange(V), layer=layer)
    weights = dict(model.named_parameters())
    embeddings = weights["embedding.weight"]
    norm, gate, up = (weights[f"blocks.{layer}.memory.{name}.weight"] for name in ("norm", "ffn.gate", "ffn.up"))
    query = embeddings / (embeddings.square().mean(1, keepdim=True) + model.config.norm_eps).sqrt() * norm
    return query @ up.T * (query @ gate.T) * torch.sigmoid(query @ gate.T)


def assert_rounded(stored, exact):
    """Equal but for one bit of fp16: the last bit in fp64 may round the other way."""
    np.testing.assert_allclose(stored, exact.half(), rtol=1e-3, atol=1e-7)


def assert_lists(array, at, scores, *, largest=True, allowed=None):
    """Stored numbers are the extremes of `scores` (..., N), and stored ids have them; ties in any order."""
    ids, numbers = (array(f"{at[0]}_{part}")[at[1]] for part in ("idx", "val"))
    usable = scores if allowed is None else scores[:, allowed]
    expected = usable.sort(dim=1, descending=largest).values[:, : ids.shape[1]]
    assert_rounded(numbers, expected)
    ids = torch.from_numpy(ids.astype(np.int64))
    assert_rounded(numbers, scores.gather(1, ids))
    assert all(len(set(row)) == len(row) for row in ids.tolist())
    if allowed is not None:
        assert allowed[ids].all()


def index_of(config, tmp_path, *, counts=None, **options):
    model = random_model(config)
    checkpoint = write_checkpoint(tmp_path / "checkpoint", model)
    options = dataclasses.replace(OPTIONS, **options)
    return model, build_index(checkpoint, tmp_path / "index", counts=counts, options=options)


@pytest.mark.parametrize("name", ["nano-memory", "nano-flex2", "ffn+table", "untied", "nano-base"])
def test_arrays_are_what_they_say(name, tmp_path, counts):
    model, index = index_of(VARIED[name], tmp_path, counts=counts)
    kept = counts > 0
    assert index.layers == ((0,) if name == "nano-base" else (0, 1, 2))
    assert index.manifest.mask.tokens == int(kept.sum())
    memory = TokenMemory(model)
    assert index.manifest.scope == memory.scope
    with torch.no_grad():
        for place, layer in enumerate(index.layers):
            c = obvious_coefficients(model, layer)
            norms = memory.values(layer).norm(dim=1)
            check_token_keys(index, place, c, norms)
            rows = index.array("row_norms")[:, place]
            assert_rounded(rows, memory.rows(torch.arange(V), layer=layer).norm(dim=1))
            check_stats(index, place, c[kept], norms)
            logits = (memory.values(layer) * model.norm.weight) @ model.head.weight.T
            for side, largest in SIDES:
                for what, scores in (("key_tokens", c.T), ("value_logits", logits)):
                    assert_lists(index.array, (f"{what}_{side}", place), scores, largest=largest, allowed=kept)
    check_neighbors(index, "neighbors", obvious_coefficients(model, 0), kept)
    check_neighbors(index, "embedding_neighbors", model.embed(torch.arange(V)), kept)


def check_token_keys(index, place, c, norms):
    keys = torch.from_numpy(index.array("token_keys_idx")[:, place].astype(np.int64))
    assert_rounded(index.array("token_keys_val")[:, place], c.gather(1, keys))
    weights = c.abs() * norms
    torch.testing.assert_close(weights.gather(1, keys), weights.sort(dim=1, descending=True).values[:, :16])
    assert (index.array("token_keys_val")[:, place] < 0).any()


def check_stats(index, place, c, norms):
    stats = dict(zip(STATS, index.array("key_stats")[place].T, strict=True))
    share = c.abs() / c.abs().sum(0)
    centred = c - c.mean(0)
    expected = {
        "mean": c.mean(0),
        "std": c.std(0, correction=0),
        "min": c.amin(0),
        "max": c.amax(0),
        "kurtosis": centred.pow(4).mean(0) / centred.pow(2).mean(0) ** 2,
        "active": (c.abs() > ACTIVE_SHARE * c.abs().max()).double().mean(0),
        "entropy": -(share * share.log()).sum(0),
        "value_norm": norms,
    }
    for name in STATS:
        np.testing.assert_allclose(stats[name], expected[name].detach(), rtol=1e-5, err_msg=name)
    for key in range(c.shape[1]):
        low, high = float(c[:, key].min()), float(c[:, key].max())
        counted = np.histogram(c[:, key].detach().numpy(), bins=BINS, range=(low, high))[0]
        np.testing.assert_array_equal(index.array("key_hist")[place, key], counted)
        assert index.array("key_hist_edges")[place, key].tolist() == [np.float32(low), np.float32(high)]


def check_neighbors(index, name, vectors, kept):
    directions = F.normalize(vectors.detach(), dim=1)
    cosines = directions @ directions.T
    cosines.fill_diagonal_(-2)
    assert_lists(index.array, (name, ...), cosines, allowed=kept)


def test_equal_coefficients_are_listed_once_each(tmp_path):
    model = random_model(VARIED["nano-memory"])
    with torch.no_grad():
        embeddings = model.get_parameter("embedding.weight")
        embeddings[100:300] = embeddings[7]  # 201 tokens that nothing tells apart
    checkpoint = write_checkpoint(tmp_path / "checkpoint", model)
    index = build_index(checkpoint, tmp_path / "index", options=OPTIONS)
    everything = torch.ones(V, dtype=torch.bool)
    with torch.no_grad():
        c = obvious_coefficients(model, 1)
    for side, largest in SIDES:
        assert_lists(index.array, (f"key_tokens_{side}", 1), c.T, largest=largest, allowed=everything)
    same = {7, *range(100, 300)}
    near = index.array("neighbors_idx")[7].tolist()
    assert set(near) <= same - {7}
    assert len(set(near)) == 8


def test_lists_are_as_long_as_they_are_asked_to_be(nano, tmp_path):
    keep = Keep(keys=3, tokens=1000, logits=2, neighbors=1)
    index = build_index(nano, tmp_path / "index", options=dataclasses.replace(OPTIONS, keep=keep, layers=(2, 0)))
    kept = index.manifest.mask.tokens
    assert index.layers == (2, 0)
    assert index.array("token_keys_idx").shape == (V, 2, 3)
    assert index.array("key_tokens_neg_val").shape == (2, K, kept)
    assert index.array("value_logits_pos_idx").shape == (2, K, 2)
    assert index.array("neighbors_idx").shape == (V, 1)
    whole = build_index(nano, tmp_path / "whole", options=dataclasses.replace(OPTIONS, neighbors=False))
    for name in ("key_stats", "key_hist"):
        np.testing.assert_array_equal(index.array(name), whole.array(name)[[2, 0]])


def test_tokens_that_text_does_not_give_are_left_out(indexed, nano):
    kept = np.array(indexed.tokens["kept"])
    assert 0 < indexed.manifest.mask.tokens == kept.sum() < V  # the tokenizer has fewer ids than the model
    assert kept[np.unique(indexed.array("key_tokens_pos_idx"))].all()
    assert kept[np.unique(indexed.array("neighbors_idx"))].all()
    assert "own text does not give" in indexed.manifest.mask.rule
    assert (indexed.array("key_hist").sum(axis=2) == kept.sum()).all()
    assert [indexed.tokens["text"][token] for token in nano.tokenizer().encode("two")] == ["t", "wo"]


def test_chunks_are_bounded_by_bytes_and_change_nothing(nano, indexed, tmp_path, monkeypatch):
    heights = []
    compute = TokenMemory.coefficients
    monkeypatch.setattr(
        TokenMemory, "coefficients", lambda *args, **named: heights.append(len(args[1])) or compute(*args, **named)
    )
    index = build_index(nano, tmp_path / "index", options=dataclasses.replace(OPTIONS, working_bytes=2**17))
    assert max(heights) == 2**17 // 64 // K == 16
    for name in index.names:
        if name.startswith(("map", "cluster")):  # of points in fp16, which rounding may move
            continue
        np.testing.assert_allclose(index.array(name), indexed.array(name), rtol=1e-3, atol=1e-6, err_msg=name)


def interrupted(checkpoint, out, patch_target, *, at):
    """Build until the call number `at` of a function, which fails."""
    owner, name = patch_target
    original, calls = getattr(owner, name), []

    def failing(*args, **named):
        calls.append(args)
        if len(calls) > at:
            raise KeyboardInterrupt
        return original(*args, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, failing)
        with pytest.raises(KeyboardInterrupt):
            build_index(checkpoint, out, options=OPTIONS)
    assert not out.exists()


@pytest.mark.parametrize(
    ("target", "at"),
    [
        ((index_module, "layer_arrays"), 0),
        ((index_module, "layer_arrays"), 2),
        ((Progress, "append"), 2),  # numbers are written, but not recorded
        ((index_module, "nearest_arrays"), 1),
        ((index_module, "clustered"), 2),
        ((index_module, "mapped"), 1),
        ((index_module, "publish"), 0),
    ],
)
def test_a_resumed_build_has_the_bytes_of_a_straight_one(target, at, nano, indexed, tmp_path):
    out = tmp_path / "resumed"
    interrupted(nano, out, target, at=at)
    done = len((partial_folder(out) / Progress.NAME).read_text().splitlines()) - 1
    steps, run = [], index_module.layer_arrays
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(index_module, "layer_arrays", lambda *args, **named: steps.append(1) or run(*args, **named))
        build_index(nano, out, options=OPTIONS)
    assert len(steps) == max(0, 3 - done)
    assert files(out) == files(indexed.path)
    assert not partial_folder(out).exists()


def test_unfinished_work_of_another_kind_is_refused(nano, tmp_path):
    out = tmp_path / "index"
    interrupted(nano, out, (index_module, "layer_arrays"), at=1)
    with pytest.raises(ValueError, match=r"unfinished work of another kind \(contents, index differ\)|differ"):
        build_index(nano, out, options=dataclasses.replace(OPTIONS, layers=(0,)))
    array = partial_folder(out) / "key_stats.npy"
    array.write_bytes(array.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"key_stats\.npy is not as it was left"):
        build_index(nano, out, options=OPTIONS)


def test_a_full_disk_is_found_before_anything_is_computed(nano, tmp_path, monkeypatch):
    def full(descriptor, offset, length):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    monkeypatch.setattr(index_module, "layer_arrays", None)
    with pytest.raises(OSError, match="No space left"):
        build_index(nano, tmp_path / "index", options=OPTIONS)
    assert not (tmp_path / "index").exists()


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("table", {}, "a free table has no keys and values"),
        ("nano-base", {"layers": (1,)}, "layer 1 of a dense model reads the context"),
        ("nano-memory", {"layers": (3,)}, "the model has layers 0 to 2"),
        ("nano-memory", {"layers": (1, 1)}, "layers must be distinct"),
        ("nano-memory", {"layers": (1, 2), "map_layers": (0,)}, r"layers \[0\] are to have clusters or maps"),
        ("nano-memory", {"clusters": -1}, "clusters must not be negative"),
    ],
)
def test_what_cannot_be_indexed_is_said(name, options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        index_of(VARIED[name], tmp_path, **options)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_damaged_weights_and_useless_counts_are_refused(tmp_path, nano):
    with pytest.raises(ValueError, match="0 of 512 tokens are left"):
        build_index(nano, tmp_path / "index", counts=torch.zeros(V, dtype=torch.int64), options=OPTIONS)
    with pytest.raises(ValueError, match=r"counts must be int64 of \[512\]"):
        build_index(nano, tmp_path / "index", counts=torch.ones(9, dtype=torch.int64), options=OPTIONS)
    with pytest.raises(ValueError, match=r"keep\.tokens must be at least 1"):
        Keep(tokens=0)
    model = random_model(VARIED["nano-memory"])
    with torch.no_grad():
        model.get_parameter("blocks.1.memory.ffn.up.weight")[5, 5] = math.inf
    checkpoint = write_checkpoint(tmp_path / "checkpoint", model)
    with pytest.raises(ValueError, match="of layer 1 are not finite"):
        build_index(checkpoint, tmp_path / "index", options=OPTIONS)


def test_a_missing_library_is_named_before_anything_is_computed(nano, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "openTSNE", None)
        with pytest.raises(ImportError, match="openTSNE is not installed"):
            build_index(nano, tmp_path / "index")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ImportError, match=r"pip install 'flexmemory\[interpret\]'"):
        build_index(nano, tmp_path / "index")
    options = dataclasses.replace(OPTIONS, tables=False, neighbors=False, clusters=0)
    index = build_index(nano, tmp_path / "index", options=options)
    assert sorted(index.manifest.files) == ["clusters.json", "layers.json"]
    with pytest.raises(FileNotFoundError, match=r"without tokens\.parquet"):
        _ = index.tokens
    with pytest.raises(ValueError, match="does not hold neighbors_idx"):
        index.neighbors(3)


def test_points_are_coefficients_scaled_robustly(nano):
    memory, layer = TokenMemory(nano.load()), 1
    ids = torch.arange(0, V, 2)
    with torch.no_grad():
        c = obvious_coefficients(memory.model, layer)[ids]
        memory.model.get_parameter("blocks.1.memory.ffn.up.weight")[3] = 0  # a cell that never fires
    c[:, 3] = 0
    extremes = torch.stack((c.amin(0), c.amax(0)), dim=1).float()
    points = layer_points(memory, layer=layer, token_ids=ids, extremes=extremes, working_bytes=2**20)
    clipped = c.clamp(min=c.sort(dim=0).values[1], max=c.sort(dim=0).values[-2])  # 0.5 % of 256 at each end
    scaled = (clipped - clipped.mean(0)) / clipped.std(0, correction=0)
    scaled[:, 3] = 0
    torch.testing.assert_close(points.double(), F.normalize(scaled, dim=1), rtol=5e-3, atol=1e-4)


def test_planted_clusters_are_found_and_described():
    generator = torch.Generator().manual_seed(0)
    truth = torch.randint(4, (300,), generator=generator)
    centres = torch.randn(4, 20, generator=generator)
    points = (centres[truth] + 0.1 * torch.randn(300, 20, generator=generator)).half()
    ids = torch.arange(300) * 2
    kinds = ["word", "piece", "digits"] * 200
    labels, facts = clustered(points, token_ids=ids, kinds=kinds, count=4, seed=0)
    assert (labels[1::2] == NO_CLUSTER).all()
    assert len({*zip(truth.tolist(), labels[ids].tolist(), strict=True)}) == 4
    for label, cluster in enumerate(facts):
        members = ids[labels[ids] == label]
        of_kind = {kind: sum(kinds[token] == kind for token in members) for kind in set(kinds)}
        assert cluster["size"] == len(members)
        assert dict(cluster["kinds"]) == {kind: count for kind, count in of_kind.items() if count}
        assert [count for _, count in cluster["kinds"]] == sorted(of_kind.values(), reverse=True)
        assert set(cluster["medoids"]) <= set(members.tolist())
        directions = F.normalize(points.double()[members // 2], dim=1)
        assert cluster["cohesion"] == pytest.approx(
            float((directions @ F.normalize(directions.mean(0), dim=0)).mean()), abs=1e-3
        )


@pytest.mark.parametrize("method", ["pca", "tsne"])
def test_maps_have_one_scale_and_leave_tokens_out(method):
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(100, 5, generator=generator) * torch.tensor([9.0, 3, 1, 1, 1])
    points[50:, 0] += 100  # two groups, far apart
    places = mapped(points, token_ids=torch.arange(100, 200), vocab_size=256, method=method, seed=0)
    assert (places[:100] == NOWHERE).all()
    assert (places[200:] == NOWHERE).all()
    here = places[100:200].double()
    assert here.amin(0).tolist() == [0, 0]
    assert here.max() == NOWHERE - 1
    left, right = here[:50], here[50:]
    assert left[:, 0].max() < right[:, 0].min() or left[:, 0].min() > right[:, 0].max()
    if method == "pca":
        centred = points - points.mean(0)
        flat = centred @ torch.linalg.svd(centred, full_matrices=False).Vh[:2].T
        ratio = torch.pdist(here) / torch.pdist(flat.double())
        torch.testing.assert_close(ratio, ratio.median().expand_as(ratio), rtol=0.05, atol=0)


def test_clusters_and_maps_are_in_the_index(indexed, tmp_path, nano):
    kept = np.array(indexed.tokens["kept"])
    assert indexed.manifest.cluster_layers == (0, 1, 2)
    assert indexed.spaces == ("layer0", "embedding")
    for layer in indexed.manifest.cluster_layers:
        labels, clusters = indexed.labels(layer), indexed.clusters[str(layer)]
        assert ((labels == NO_CLUSTER) == ~kept).all()
        assert len(clusters) == kept.sum() // 8
        assert [cluster["size"] for cluster in clusters] == np.bincount(labels[kept], minlength=len(clusters)).tolist()
        for label, cluster in enumerate(clusters):
            assert {indexed.cluster(token, layer=layer) for token in cluster["medoids"]} <= {label}
    for space in indexed.spaces:
        places = indexed.array(f"map_{space}")
        assert ((places == NOWHERE).all(1) == ~kept).all()
    assert indexed.cluster(int((~kept).nonzero()[0][0]), layer=0) is None
    options = dataclasses.replace(OPTIONS, cluster_layers=(2, 2), maps=None, clusters=5)
    index = build_index(nano, tmp_path / "index", options=options)
    assert (index.manifest.cluster_layers, index.spaces) == ((2,), ())
    assert index.array("cluster_labels").shape == (1, V)
    with pytest.raises(ValueError, match="not clustered in layer 0; layers with clusters: 2"):
        index.labels(0)


def test_numbers_beyond_fp16_are_saturated():
    stored = as_stored(torch.tensor([1e6, -1e9, 2.5, 1e-9], dtype=torch.float64), np.dtype("float16"))
    assert stored.tolist() == [65504, -65504, 2.5, 0]


def test_keys_of_wide_layers_take_four_bytes():
    def dtype(num_keys):
        return array_specs(contents(num_keys=num_keys))["token_keys_idx"].dtype

    assert (dtype(65_535), dtype(65_536)) == ("uint16", "uint32")


def contents(**changes):
    config = get_preset("1b-memory").model
    values = {
        "vocab_size": config.vocab_size,
        "num_keys": config.intermediate_size,
        "layers": tuple(range(config.num_layers)),
        "kept_tokens": config.vocab_size,
        "keep": Keep(),
        "neighbors": True,
        "clusters": 100,
        "cluster_layers": (0, 12, 23),
        "spaces": ("layer0", "embedding"),
    }
    return Contents(**{**values, **changes})


def test_size_at_the_shape_of_1b_to_the_byte():
    cells, header = 24 * 5464, 128
    per_token = 24 * (16 * (2 + 2) + 2) + 2 * 8 * (4 + 2) + 3 * 2 + 2 * 4  # cells, norms, neighbours, labels, maps
    per_cell = 2 * 32 * (4 + 2) + 2 * 16 * (4 + 2) + 8 * 4 + 64 * 4 + 2 * 4
    specs = array_specs(contents())
    total = sum(spec.file_bytes for spec in specs.values())
    assert total == 128_256 * per_token + cells * per_cell + len(specs) * header
    assert total == 331_618_944
    assert total < 1e9


def test_files_have_the_sizes_that_they_should(indexed):
    manifest = json.loads((indexed.path / "manifest.json").read_text())
    found = {path.name: path.stat().st_size for path in indexed.path.iterdir()}
    expected = {f"{name}.npy": indexed.manifest.spec(name).file_bytes for name in manifest["arrays"]}
    expected |= {name: entry["bytes"] for name, entry in manifest["files"].items()}
    expected["manifest.json"] = found["manifest.json"]
    assert found == expected
    assert indexed.nbytes == sum(found.values()) - found["manifest.json"]
