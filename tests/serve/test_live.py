"""What the model is asked as one types."""

import pytest
import torch
from torch.nn import functional as F

from flexmemory.engine.reference import generate
from flexmemory.interpret.tkv import Sign, TokenMemory
from flexmemory.model.memory import ScaledRows
from flexmemory.serve.live import MAX_NEW_TOKENS, MAX_TEXT_LENGTH


@pytest.fixture(scope="module")
def model(explored):
    return explored.checkpoint.load()


@pytest.fixture(scope="module")
def tokenizer(explored):
    return explored.checkpoint.tokenizer()


def test_rows_on_the_vocabulary(explored, model):
    memory = TokenMemory(model)
    mask = torch.tensor(explored.records.index.tokens["kept"])
    record = explored.get("/api/row/290")
    for layer in range(3):
        row = memory.rows(torch.tensor([290]), layer=layer)[0]
        sides: tuple[tuple[str, Sign], ...] = (("promoted", 1), ("suppressed", -1))
        for name, sign in sides:
            expected = memory.promoted(row, count=12, sign=sign, mask=mask)
            assert [t for t, _ in record["layers"][layer][name]] == [t for t, _ in expected]
            numbers = [number for _, number in record["layers"][layer][name]]
            assert numbers == pytest.approx([number for _, number in expected], rel=1e-3)


def test_similar_keys(explored, model):
    values = TokenMemory(model).values(1)
    cosines = F.cosine_similarity(values, values[5][None])
    cosines[5] = -2
    record = explored.get("/api/similar/1/5")
    assert [key for key, _ in record["values"]] == cosines.topk(12).indices.tolist()


@pytest.mark.parametrize("alphas", [[1.0, 1.0, 1.0], [1.0, 0.0, 0.5], [-1.0, 2.0, 0.0]])
def test_a_prompt_with_scaled_rows(explored, model, tokenizer, alphas):
    found = explored.post("/api/prompt", text="the red dog", alphas=alphas)
    ids = [tokenizer.boundary_id, *tokenizer.encode("the red dog")]
    assert found["ids"] == ids
    token_ids = torch.tensor([ids])
    with torch.no_grad():
        before = model(token_ids)[0].log_softmax(-1)
        logits = model(token_ids, ScaledRows(model.rows(token_ids), alphas))[0]
    after = logits.log_softmax(-1)
    for token, was, now in found["next"]:
        assert was == pytest.approx(float(before[-1, token].exp()), rel=1e-4)
        assert now == pytest.approx(float(after[-1, token].exp()), rel=1e-4)
    assert found["next"][0][0] == int(after[-1].argmax())
    assert int(before[-1].argmax()) in [token for token, _, _ in found["next"]]
    expected = float((after[-1].exp() * (after[-1] - before[-1])).sum())
    assert found["divergence"] == pytest.approx(expected, rel=1e-3, abs=1e-6)
    assert found["surprise"][1][0] is None
    assert found["surprise"][1][1:] == pytest.approx([-float(after[i, t]) for i, t in enumerate(ids[1:])], rel=1e-4)
    for token, parts in found["parts"].items():
        assert sum(parts) == pytest.approx(float(logits[-1, int(token)]), rel=1e-3, abs=1e-3)
    absent = {f"blocks.{layer}.hook_mlp_out" for layer, alpha in enumerate(alphas) if alpha == 0}
    assert not absent & set(found["labels"])


def test_a_position_before_the_last(explored, model, tokenizer):
    found = explored.post("/api/prompt", text="the red dog", position=1)
    ids = torch.tensor([[tokenizer.boundary_id, *tokenizer.encode("the red dog")]])
    assert found["next"][0][0] == int(model(ids)[0, 1].argmax())
    assert found["position"] == 1


def test_generation_is_the_references(explored, model, tokenizer):
    ids = [tokenizer.boundary_id, *tokenizer.encode("the")]
    expected = tokenizer.decode(list(generate(model, ids, max_new_tokens=8, stop_ids={tokenizer.boundary_id})))
    assert explored.post("/api/generate", text="the", max_new_tokens=8)["text"] == expected


def test_the_empty_text_is_the_beginning_of_a_document(explored, tokenizer):
    found = explored.post("/api/prompt", text="")
    assert found["ids"] == [tokenizer.boundary_id]
    assert found["surprise"] == [[None], [None]]


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({}, "lacks 'text'"),
        ({"text": 3}, "should be a string"),
        ({"text": "a" * (MAX_TEXT_LENGTH + 1)}, f"at most {MAX_TEXT_LENGTH}"),
        ({"text": "a b " * 2000}, "tokens; at most"),
        ({"text": "a", "alphas": [1]}, "one for each of 3 layers"),
        ({"text": "a", "alphas": [1, 1, "1"]}, "finite number"),
        ({"text": "a", "alphas": [1, 1, 1e300]}, "finite number"),
        ({"text": "a", "position": 99}, "out of range"),
        ({"text": "a", "position": True}, "whole number"),
    ],
)
def test_prompts_that_are_refused(explored, fields, reason):
    assert reason in explored.refused("/api/prompt", **fields)


@pytest.mark.parametrize("count", [0, MAX_NEW_TOKENS + 1])
def test_long_generations_are_refused(explored, count):
    assert "max_new_tokens" in explored.refused("/api/generate", text="a", max_new_tokens=count)
