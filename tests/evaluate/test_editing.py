"""Scores, searches and changes against slow and obvious references."""

import dataclasses
import math
from collections.abc import Callable, Sequence

import pytest
import torch

from flexmemory.evaluate.edit_locality import TextWindows, logits_of, text_effect
from flexmemory.evaluate.edit_methods import (
    DENSE,
    ROWS,
    WEIGHTS,
    Change,
    Setting,
    Workbench,
    changed,
    down_weight,
    joint,
    least_update,
    sampled_moment,
)
from flexmemory.evaluate.edit_search import Search, added, fine_tune, keys_and_outputs, margin_gradients, search_vectors
from flexmemory.evaluate.editing import Case, make_case, score, summarise
from flexmemory.evaluate.facts import SynthKB
from flexmemory.evaluate.questions import Questions, word_id
from flexmemory.interpret.patch import Patch
from flexmemory.interpret.rank_one import moment_factor, rank_one_factors, second_moment
from flexmemory.interpret.spill import spill
from flexmemory.interpret.tkv import TokenMemory
from flexmemory.model.transformer import Transformer
from flexmemory.tokenizer import Tokenizer
from tests.conftest import NANO, random_model

Make = Callable[..., Workbench]
CPU = torch.device("cpu")


def of_kind(cases: Sequence[Case], kind: int, count: int) -> list[Case]:
    return [case for case in cases if len(case.subject) == kind][:count]


@pytest.fixture(scope="module")
def make_bench(names_tokenizer: Tokenizer) -> Make:
    def make(preset: str = "nano-memory") -> Workbench:
        config = dataclasses.replace(NANO[preset], vocab_size=names_tokenizer.vocab_size)
        model = random_model(config, seed=1).requires_grad_(False)
        generator = torch.Generator().manual_seed(0)
        text = torch.randint(config.vocab_size, (8, 32), generator=generator)
        counts = torch.randint(1000, (config.vocab_size,), generator=generator)
        return Workbench(model, names_tokenizer, contexts=[(), (5, 6, 7)], counts=counts, text=text)

    return make


@pytest.fixture(scope="module")
def cases(facts: SynthKB, names_tokenizer: Tokenizer) -> list[Case]:
    return [make_case(record, names_tokenizer, device=CPU) for record in facts.records()]


def last_log_probs(model: Transformer, prompt: Sequence[int], tokenizer: Tokenizer) -> torch.Tensor:
    return model(torch.tensor([[tokenizer.boundary_id, *prompt]]))[0, -1].log_softmax(dim=-1)


def test_padding_changes_no_answer(make_bench: Make, names_tokenizer: Tokenizer):
    bench = make_bench()
    prompts = [[3, 4, 5, 6, 7], [9], [20, 21]]
    asked = Questions.of(prompts, boundary_id=names_tokenizer.boundary_id, device=CPU)
    expected = torch.stack([last_log_probs(bench.model, prompt, names_tokenizer) for prompt in prompts])
    torch.testing.assert_close(asked.log_probs(bench.model), expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(asked.log_probs(bench.model, batch=2), expected, rtol=1e-9, atol=1e-9)


def test_score_asks_each_prompt_of_the_record(make_bench: Make, cases: list[Case], names_tokenizer: Tokenizer):
    model = make_bench().model

    def probs(prompt: str) -> torch.Tensor:
        return last_log_probs(model, names_tokenizer.encode(prompt), names_tokenizer).exp()

    for case in (*of_kind(cases, 1, 3), *of_kind(cases, 2, 2)):
        record, figures = case.record, score(model, case)
        request = record["requested_rewrite"]
        new, true = (word_id(request[name]["str"], names_tokenizer) for name in ("target_new", "target_true"))
        asked = probs(request["prompt"].format(request["subject"]))
        assert figures["EM"] == pytest.approx(float(asked[new] - asked[true]))
        assert figures["ES"] == float(asked[new] > asked[true])
        paraphrased = [probs(prompt) for prompt in record["paraphrase_prompts"]]
        assert figures["PM"] == pytest.approx(sum(float(each[new] - each[true]) for each in paraphrased) / 2)
        if record["neighborhood_prompts"]:
            near = [probs(prompt) for prompt in record["neighborhood_prompts"]]
            assert figures["NS"] == pytest.approx(sum(float(each[true] > each[new]) for each in near) / len(near))
        kept = [
            float(int(probs(each["prompt"]).argmax()) == word_id(each["target"], names_tokenizer))
            for each in record["same_subject"]
        ]
        assert figures["same_subject_right"] == pytest.approx(sum(kept) / len(kept))


def test_exact_match_needs_the_object_and_then_a_stop(make_bench: Make, cases: list[Case], names_tokenizer: Tokenizer):
    model, case = make_bench().model, cases[0]
    stop = names_tokenizer.encode(".")[0]
    bias = torch.zeros(len(case.kinds), model.config.vocab_size)
    for first, second, exact in ((case.new, stop, 1.0), (case.new, case.true, 0.0), (case.true, stop, 0.0)):
        logits = bias.clone()
        logits[0, first] = logits[1, second] = 9.0

        class Fixed(Questions):
            def log_probs(self, model: Transformer, *, batch: int | None = None, said=logits) -> torch.Tensor:
                return said.log_softmax(dim=-1)

        fixed = dataclasses.replace(case, questions=Fixed(case.questions.token_ids, case.questions.last))
        assert score(model, fixed)["exact"] == exact


def test_summaries():
    found = summarise([{"ES": 1.0, "PS": 0.5, "NS": 1.0}, {"ES": 0.0, "PS": 0.5, "NS": 0.5}, {"ES": 1.0, "PS": 1.0}])
    assert found.count == 3
    assert found.means["ES"] == pytest.approx(2 / 3)
    assert found.stderrs["ES"] == pytest.approx(math.sqrt(1 / 3) / math.sqrt(3))
    assert found.means["score"] == pytest.approx(3 / (1 / 0.5 + 1 / 0.5 + 1 / 0.75))
    assert found.stderrs["score"] > 0
    with pytest.raises(ValueError, match="no records"):
        summarise([])


def test_a_searched_vector_is_the_same_as_a_row_that_is_edited(make_bench: Make, cases: list[Case]):
    bench, some = make_bench(), [*of_kind(cases, 1, 3), *of_kind(cases, 2, 3)]
    setting = Setting(layers=(1,), search=Search(steps=8, clamp=0.7))
    vectors = bench.vectors(some, setting)
    lengths = keys_and_outputs(bench.model, some, layer=1, contexts=[()], tokenizer=bench.tokenizer)[1].norm(dim=1)
    assert (vectors[:, 0].norm(dim=1) <= 0.7 * lengths * (1 + 1e-6)).all()
    for case, change, vector in zip(some, ROWS["row, gradient"](bench, some, setting), vectors, strict=True):
        before = case.questions.log_probs(bench.model)
        at = (case.questions.token_ids == case.token)[..., None]
        with added(bench.model, {1: lambda at=at, vector=vector: at * vector[0]}):
            expected = case.questions.log_probs(bench.model)
        with changed(bench.model, change) as edited:
            torch.testing.assert_close(case.questions.log_probs(edited), expected, rtol=1e-9, atol=1e-9)
        assert expected[0, case.new] > before[0, case.new]


def test_kept_prompts_hold_the_vector_back(make_bench: Make, cases: list[Case]):
    bench, some = make_bench(), of_kind(cases, 1, 4)
    lengths = [
        float(
            search_vectors(
                bench.model, some, layers=[0], contexts=[()], tokenizer=bench.tokenizer, search=Search(kl=kl, decay=0.0)
            ).norm()
        )
        for kl in (0.0, 1e4)
    ]
    assert lengths[1] < lengths[0]


@pytest.mark.parametrize("preset", ["nano-memory", "nano-base"])
def test_gradients_of_margins_against_differences(make_bench: Make, cases: list[Case], preset: str):
    bench, some = make_bench(preset), of_kind(cases, 2, 2)
    margins, gradients = margin_gradients(
        bench.model, some, layer=0, contexts=bench.contexts, tokenizer=bench.tokenizer
    )
    case, step = some[1], 1e-5
    direction = torch.nn.functional.one_hot(torch.tensor(7), gradients.shape[1]).double()

    def margin(size: float) -> float:
        total = 0.0
        for context in bench.contexts:
            prompt = [bench.tokenizer.boundary_id, *context, *case.prompt]
            at = (torch.tensor([prompt]) == case.token)[..., None]
            with added(bench.model, {0: lambda at=at: at * direction * size}):
                said = last_log_probs(bench.model, prompt[1:], bench.tokenizer)
            total += float(said[case.new] - said[case.true]) / len(bench.contexts)
        return total

    assert float(margins[1]) == pytest.approx(margin(0.0))
    assert float(gradients[1, 7]) == pytest.approx((margin(step) - margin(-step)) / (2 * step), rel=1e-5)


def test_the_least_update_gives_every_value_and_is_the_least():
    generator = torch.Generator().manual_seed(0)
    keys, values = torch.randn(3, 12, generator=generator).double(), torch.randn(3, 5, generator=generator).double()
    root = torch.randn(12, 12, generator=generator).double()
    moment = root @ root.T + torch.eye(12)
    change = values.T @ least_update(keys, moment)
    torch.testing.assert_close(change @ keys.T, values.T, rtol=1e-4, atol=1e-4)
    other = torch.randn(5, 12, generator=generator).double()
    other -= other @ torch.linalg.pinv(keys) @ keys  # moves no key's value
    size = torch.trace(change @ moment @ change.T)
    for step in (1e-2, -1e-2):
        moved = change + step * other
        assert torch.trace(moved @ moment @ moved.T) > size


def test_for_one_key_it_is_the_library_s_rank_one_update(make_bench: Make, cases: list[Case]):
    bench, case = make_bench(), cases[0]
    memory = TokenMemory(bench.model)
    row = torch.arange(float(memory.hidden_size)).double()
    moment = second_moment(memory, layer=1, progress=False)
    _, expected = rank_one_factors(memory, case.token, layer=1, row=row, factor=moment_factor(moment, ridge=0.0))
    factors = least_update(memory.coefficients(torch.tensor([case.token]), layer=1), moment)
    torch.testing.assert_close(factors[0], expected, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("preset", ["nano-memory", "nano-base"])
def test_many_facts_in_one_change(make_bench: Make, cases: list[Case], preset: str):
    bench, some = make_bench(preset), list({case.token: case for case in of_kind(cases, 1, 9)}.values())
    setting = Setting(layers=(1,), search=Search(steps=6))
    vectors, keys = bench.vectors(some, setting)[:, 0], bench.keys(some, 1)
    change = joint(bench, some, setting)
    if isinstance(change, Patch):
        before, after = TokenMemory(bench.model).values(1), TokenMemory(change.apply(bench.model)).values(1)
        moved = keys @ (after - before)
    else:
        moved = keys @ change[1].T
    torch.testing.assert_close(moved, vectors, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("preset", ["nano-memory", "nano-base"])
def test_fine_tuning_is_bounded_and_is_what_the_weights_do(make_bench: Make, cases: list[Case], preset: str):
    bench, some = make_bench(preset), of_kind(cases, 1, 3)
    changes = fine_tune(bench.model, some, layer=1, limit=0.02, tokenizer=bench.tokenizer, steps=8)
    assert float(changes.abs().max()) <= 0.02
    setting = Setting(layers=(1,), limit=0.02)
    table = DENSE if preset == "nano-base" else WEIGHTS
    for case, change in zip(some, table["FT-L"](bench, some, setting), strict=True):
        before = case.questions.log_probs(bench.model)[0, case.new]
        with changed(bench.model, change) as model:
            assert case.questions.log_probs(model)[0, case.new] > before


@pytest.mark.parametrize("name", [*ROWS, *WEIGHTS])
def test_methods_of_a_memory(make_bench: Make, cases: list[Case], name: str):
    """Rows move nobody else, bit for bit; what else is edited moves others. The model stays as it is."""
    bench, some = make_bench(), [*of_kind(cases, 1, 1), *of_kind(cases, 2, 1)]
    setting = Setting(layers=(0, 1) if "4 layers" in name else (1,), search=Search(steps=3), limit=0.02)
    stream = torch.randint(1000, (40 * 16,), generator=torch.Generator().manual_seed(2))
    stream[::37] = some[0].token
    windows = TextWindows(stream, length=16, device=CPU)
    weights = {key: tensor.clone() for key, tensor in bench.model.named_parameters()}
    method = (ROWS | WEIGHTS)[name]
    for case, change in zip(some, method(bench, some, setting), strict=True):
        assert isinstance(change, Patch)
        lacking = windows.lacking(case.token, count=4)
        with changed(bench.model, change) as edited:
            before, after = logits_of(bench.model, lacking), logits_of(edited, lacking)
        effect = text_effect(before, after, lacking, token_id=None)
        patch = dataclasses.replace(change, tokens=(case.token,))
        moved = sum(entry["any"] for entry in spill(TokenMemory(bench.model), patch, progress=False).summary())
        assert effect.identical == (name in ROWS) == (moved == 0)
        assert (effect.kl == 0) == effect.identical
    holding = windows.holding(some[0].token, count=4)
    assert len(holding) == 4
    assert (holding == some[0].token).any(dim=1).all()
    for key, tensor in bench.model.named_parameters():
        assert torch.equal(tensor, weights[key])


@pytest.mark.parametrize("name", list(DENSE))
def test_methods_of_a_dense_model_are_undone_bit_for_bit(make_bench: Make, cases: list[Case], name: str):
    bench, some = make_bench("nano-base"), of_kind(cases, 2, 2)
    setting = Setting(layers=(0, 1) if "4 layers" in name else (1,), search=Search(steps=3), limit=0.02)
    weights = {key: tensor.clone() for key, tensor in bench.model.named_parameters()}
    changes: list[Change] = DENSE[name](bench, some, setting)
    for change in changes:
        assert isinstance(change, dict)
        with changed(bench.model, change) as model:
            assert model is bench.model
            assert all(not torch.equal(down_weight(model, 1), weights["blocks.1.ffn.down.weight"]) for _ in change)
        for key, tensor in bench.model.named_parameters():
            assert torch.equal(tensor, weights[key])


def test_the_sampled_moment_is_a_mean_over_positions(make_bench: Make):
    bench = make_bench("nano-base")
    text = torch.arange(20).view(2, 10)
    seen = []
    handle = bench.model.blocks[1].ffn.down.register_forward_pre_hook(lambda _m, inputs: seen.append(inputs[0]))  # pyright: ignore
    bench.model(text)
    handle.remove()
    expected = sum(torch.outer(hidden, hidden) for hidden in seen[0].flatten(0, 1)) / 20
    torch.testing.assert_close(sampled_moment(bench.model, text, layer=1), expected, rtol=1e-4, atol=1e-6)


def test_text_effect_counts_from_the_token_on():
    windows = torch.tensor([[1, 2, 0, 1], [2, 2, 2, 2]])
    before, after = torch.zeros(2, 4, 3), torch.zeros(2, 4, 3)
    after[0, 1, 0] = 2.0
    after[0, 0, 1] = 5.0  # before the token: not counted
    effect = text_effect(before, after, windows, token_id=2)
    p = after[0, 1].softmax(dim=0)
    assert effect.positions == 5
    assert effect.kl == pytest.approx(float((torch.full((3,), 1 / 3) * (math.log(1 / 3) - p.log())).sum()) / 5)
    assert effect.nats == pytest.approx((math.log(1 / 3) - math.log(float(p[0]))) / 5, rel=1e-5)
    assert not effect.identical
    with pytest.raises(ValueError, match="no position"):
        text_effect(before, after, windows, token_id=7)


def test_refusals(cases: list[Case], names_tokenizer: Tokenizer, make_bench: Make):
    record = {**cases[0].record, "subject_tokens": 2}
    with pytest.raises(ValueError, match="not 2"):
        make_case(record, names_tokenizer, device=CPU)
    with pytest.raises(ValueError, match="expected one"):
        word_id("unheard-of", names_tokenizer)
    with pytest.raises(ValueError, match="no prompt"):
        Questions.of([], boundary_id=0, device=CPU)
    with pytest.raises(ValueError, match="nothing to edit"):
        score(make_bench().model, dataclasses.replace(cases[0], new=cases[0].true))
    with pytest.raises(ValueError, match="no window"):
        TextWindows(torch.arange(5), length=16, device=CPU)
