"""Rows from a ToL store in transformers: FFN-M is never loaded, and nothing else changes."""

import pytest
import torch
from transformers import AutoTokenizer

from flexmemory.engine.loading import load_model
from flexmemory.hf import FlexMemoryModel, offload
from flexmemory.model.checkpoint import Checkpoint
from flexmemory.tol.build import build_store
from flexmemory.tol.format import ToLMismatchError
from tests.hf.conftest import MINI, opened

GREEDY = {"do_sample": False, "pad_token_id": 0, "max_new_tokens": 8}


@pytest.fixture
def build(tmp_path):
    def write(folder, **options):
        out = tmp_path / f"tol-{folder.name}-{len(options)}"
        build_store(Checkpoint.open(folder), out, **options)
        return out

    return write


@pytest.mark.parametrize("rows", [None, "disk", "host", "device"])
@pytest.mark.parametrize("name", ["nano-memory", "nano-flex3", "ffn+table"])
def test_looked_up_rows_give_the_logits_of_computed_ones(checkpoint, build, tokens, name, rows):
    folder, ids = checkpoint(name), tokens(2, 11)
    tol = build(folder, codec="fp32")
    computed = opened(folder)
    model, report = opened(folder, tol=tol, rows=rows, output_loading_info=True)
    assert not any(report.values()), report
    assert not any(".memory." in parameter for parameter, _ in model.named_parameters())
    torch.testing.assert_close(model(ids).logits, computed(ids).logits, rtol=1e-5, atol=1e-5)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    for cache in ("dynamic", "static"):
        options = {"attention_mask": mask, "cache_implementation": cache, **GREEDY}
        assert torch.equal(model.generate(ids, **options), computed.generate(ids, **options))


def test_rows_may_carry_the_embedding(checkpoint, build, tokens):
    folder, ids = checkpoint("untied"), tokens(2, 9)
    tol = build(folder, codec="fp32", embedding=True)
    model = opened(folder, tol=tol)
    assert model.get_input_embeddings() is None
    computed = opened(folder)
    torch.testing.assert_close(model(ids).logits, computed(ids).logits, rtol=1e-5, atol=1e-5)
    assert torch.equal(model.generate(ids, **GREEDY), computed.generate(ids, **GREEDY))
    base = FlexMemoryModel.from_pretrained(folder, tol=tol)
    torch.testing.assert_close(base(ids).last_hidden_state, computed.model(ids).last_hidden_state)


def test_a_real_model_from_disk_says_the_same(tmp_path):
    build_store(Checkpoint.open(MINI / "mini-memory"), tmp_path / "tol", codec="bf16")
    text = AutoTokenizer.from_pretrained(MINI / "mini-memory")("The city of", return_tensors="pt").input_ids
    computed = opened(MINI / "mini-memory")
    looked_up = opened(MINI / "mini-memory", tol=tmp_path / "tol", rows="disk")
    assert looked_up.num_parameters() < 0.6 * computed.num_parameters()
    disk = load_model(Checkpoint.open(MINI / "mini-memory"), tol=tmp_path / "tol")
    assert disk.row_source is not None
    assert torch.equal(looked_up(text).logits, disk.model(text, disk.row_source(text)))
    torch.testing.assert_close(looked_up(text).logits, computed(text).logits, rtol=0, atol=0.1)


def test_low_rank_adapters_beside_looked_up_rows(checkpoint, build, tokens):
    peft = pytest.importorskip("peft")
    folder, ids = checkpoint("nano-memory"), tokens(2, 9)
    model = opened(folder, tol=build(folder, codec="fp32"), rows="host")
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["qkv", "output"], init_lora_weights=False))
    model.train()
    model(ids, labels=ids).loss.backward()
    gradients = [p.grad for p in model.parameters() if p.requires_grad]
    assert len(gradients) == 3 * 2 * 2
    assert all(gradient is not None for gradient in gradients)


def test_what_does_not_go_together_is_refused(checkpoint, build, tmp_path):
    folder, dense = checkpoint("nano-memory"), checkpoint("nano-base")
    tol = build(folder)
    with pytest.raises(ValueError, match=r"rows from 'host' need a ToL store: give tol='FOLDER', or leave rows out"):
        opened(folder, rows="host")
    with pytest.raises(ValueError, match=r"rows must be one of device, host, disk with a ToL store, got 'moon'"):
        opened(folder, tol=tol, rows="moon")
    with pytest.raises(ValueError, match=r"is a dense model: it has no rows to look up; leave out tol"):
        opened(dense, tol=tol)
    with pytest.raises(ToLMismatchError, match=r"was built from another checkpoint"):
        opened(checkpoint("nano-flex3"), tol=tol)
    with pytest.raises(ValueError, match=r"its FFN-M weights were not loaded, so saving it would lose them"):
        opened(folder, tol=tol).save_pretrained(tmp_path / "lost")
    assert not (tmp_path / "lost").exists()


def test_a_name_on_the_hub_is_fetched_first(checkpoint, build, monkeypatch, tokens):
    folder = checkpoint("nano-memory")
    tol = build(folder)
    monkeypatch.setattr(offload, "snapshot_download", {"someone/model": str(folder)}.__getitem__)
    assert offload.open_rows("someone/model", tol, rows="host").store.vocab_size == 512
