import dataclasses
import json

import pytest
import torch
from safetensors.torch import save

from flexmemory.model.memory import MemoryRows
from flexmemory.tol import trellis
from flexmemory.tol.allocate import Choice, Sizes, allocate, at_price, falling
from flexmemory.tol.build import ModelRows
from flexmemory.tol.fit import band_sizes, fit
from flexmemory.tol.format import ToLMismatchError
from flexmemory.tol.plan import PLAN, TENSORS, load_plan, make_plan, save_plan, store_bytes
from flexmemory.tol.rise import coded_rows, measure_rise
from flexmemory.tol.scheme import tensors_to_file
from flexmemory.tol.sensitivity import measure_sensitivity
from flexmemory.tol.tune import tune
from tests.conftest import NANO

V, L, D = NANO["nano-memory"].vocab_size, NANO["nano-memory"].num_layers, NANO["nano-memory"].hidden_size
PLAIN = 2 * V * L * D
"""Bytes of all rows in bf16."""


@pytest.fixture(scope="module", autouse=True)
def _quick():
    """One way over the seam of a ring: slices of the nano model are short, and would have many tried."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trellis, "RING", 1)
        yield


@pytest.fixture(scope="module")
def planned(nano):
    """What plans of `nano` are made of: source, sensitivity, counts, model and a text."""
    model = nano.load().requires_grad_(False)
    text = torch.randint(V, (16, 33), generator=torch.Generator().manual_seed(3))
    sensitivity = measure_sensitivity(model, text[:, :-1])
    counts = (10_000 / torch.arange(1, V + 1)).long()[torch.randperm(V, generator=torch.Generator().manual_seed(1))]
    return ModelRows(nano, device="cpu"), sensitivity, counts, model, text


@pytest.fixture(scope="module")
def plan(planned):
    source, sensitivity, counts, _, _ = planned
    return make_plan(source, sensitivity, counts=counts, budget_bytes=PLAIN // 4 + 60_000, passes=1)


def rise_of(scheme, planned):
    source, _, _, model, text = planned
    return measure_rise(model, text, lambda ids: coded_rows(scheme, source, ids), layers=scheme.layers)


def test_a_larger_budget_costs_less_and_is_kept(planned):
    source, sensitivity, counts, _, _ = planned
    rises = []
    for share in (8, 5, 3):
        budget = PLAIN // share + 30_000
        made = make_plan(source, sensitivity, counts=counts, budget_bytes=budget, basis=False, passes=1)
        assert made.size.total == store_bytes(made.scheme, num_layers=L).total <= budget
        rises.append(made.predicted)
    assert rises == sorted(rises, reverse=True)
    assert rises[0] > rises[-1]


def test_bytes_are_those_of_the_files(plan):
    scheme = plan.scheme
    rows = sum(band.tokens * sum(c.nbytes for c in band.slices if c) for band in scheme.bands)
    assert plan.size.rows == rows + 4096 * len(scheme.bands)
    assert plan.size.tensors == len(save(tensors_to_file(scheme.tensors, encoder=False)))
    assert plan.size.order == len(save({"order": scheme.order.int()}))


def test_frequent_tokens_get_more_bits(plan):
    sizes = [band.row_bytes for band in plan.scheme.bands]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] > sizes[-1]


def test_plans_beat_one_codec_at_its_bytes(planned):
    source, sensitivity, counts, _, _ = planned
    scheme = fit("int3", source, vocab_size=V, hidden_size=D, layers=range(L))
    bands = 6 * 4096 + 4 * V + 4000  # what bands cost a store as small as this
    size = store_bytes(scheme, num_layers=L).total + bands
    made = make_plan(source, sensitivity, counts=counts, budget_bytes=size, basis=False, passes=1)
    share = (counts + 0.5) / (counts + 0.5).sum()
    exact = source(torch.arange(V))[:, 1:]
    errors = {
        name: coded_rows(each, source, torch.arange(V))[:, torch.tensor(each.layers).argsort()] - exact
        for name, each in (("uniform", scheme), ("planned", made.scheme))
    }
    cost = {name: float(sensitivity.rise(error, share)) for name, error in errors.items()}
    assert cost["planned"] < 0.5 * cost["uniform"]


def test_plans_are_the_same_again(planned, plan):
    source, sensitivity, counts, _, _ = planned
    again = make_plan(source, sensitivity, counts=counts, budget_bytes=PLAIN // 4 + 60_000, passes=1)
    assert again.scheme.bands == plan.scheme.bands
    ids = torch.arange(V)
    assert torch.equal(coded_rows(again.scheme, source, ids), coded_rows(plan.scheme, source, ids))


def test_a_budget_that_is_too_small_says_what_is_possible(planned):
    source, sensitivity, counts, _, _ = planned
    with pytest.raises(ValueError, match="smallest possible is") as caught:
        make_plan(source, sensitivity, counts=counts, budget_bytes=1000, passes=1)
    smallest = int(str(caught.value).split("is ")[-1].split(" ")[0].replace(",", ""))
    made = make_plan(source, sensitivity, counts=counts, budget_bytes=smallest + 2000, basis=False, passes=1)
    assert made.size.total <= smallest + 2000


def test_a_plan_comes_back_as_it_was(nano, planned, plan, tmp_path):
    source = planned[0]
    save_plan(tmp_path / "plan", plan, nano, extra={"note": 1})
    loaded = load_plan(tmp_path / "plan", nano)
    ids = torch.arange(V)
    assert loaded.bands == plan.scheme.bands
    assert torch.equal(coded_rows(loaded, source, ids), coded_rows(plan.scheme, source, ids))
    with pytest.raises(FileExistsError):
        save_plan(tmp_path / "plan", plan, nano, extra={})


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda v: v.update(checkpoint_fingerprint="0"), ToLMismatchError, "another checkpoint"),
        (lambda v: v.update(format_version=9), ValueError, "update flexmemory"),
        (lambda v: v.update(format="x"), ValueError, "not a ToL plan"),
        (lambda v: v["bands"][0]["slices"][0].update(levels="magic"), ValueError, "not a coding|unknown levels"),
        (lambda v: v.pop("layers"), ValueError, "damaged"),
        (lambda v: v.update(tensors_sha256="0"), ValueError, "checksum"),
    ],
)
def test_what_is_not_this_plan_is_refused(nano, plan, tmp_path, change, error, message):
    save_plan(tmp_path / "plan", plan, nano, extra={})
    path = tmp_path / "plan" / PLAN
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))
    with pytest.raises(error, match=message):
        load_plan(tmp_path / "plan", nano)


def test_an_absent_plan_is_said(nano, plan, tmp_path):
    with pytest.raises(FileNotFoundError, match="tol plan"):
        load_plan(tmp_path, nano)
    save_plan(tmp_path / "plan", plan, nano, extra={})
    (tmp_path / "plan" / TENSORS).unlink()
    with pytest.raises(ValueError, match="damaged"):
        load_plan(tmp_path / "plan", nano)


def test_low_rank_writes_bf16_coefficients(planned):
    source, sensitivity, counts, _, _ = planned
    made = make_plan(source, sensitivity, counts=counts, budget_bytes=PLAIN // 2, low_rank=True, passes=1)
    codings = [coding for band in made.scheme.bands for coding in band.slices if coding]
    assert codings
    assert all(coding.levels == "bf16" and coding.basis for coding in codings)
    assert rise_of(made.scheme, planned).stderr > 0


def test_embeddings_are_bf16(planned):
    source, sensitivity, counts, _, _ = planned
    made = make_plan(
        source, sensitivity, counts=counts, budget_bytes=PLAIN // 2 + 2 * V * D, embedding=True, basis=False, passes=1
    )
    rows = coded_rows(made.scheme, source, torch.arange(V))
    assert torch.equal(rows[:, 0], source(torch.arange(V))[:, 0].bfloat16().float())


def test_tuned_tensors_decode_the_same_codes_better(nano, planned, tmp_path):
    source, sensitivity, counts, model, _ = planned
    text = torch.randint(V, (64, 33), generator=torch.Generator().manual_seed(5))
    made = make_plan(source, sensitivity, counts=counts, budget_bytes=PLAIN // 6 + 40_000, basis=True, passes=1)
    tuned = tune(made.scheme, model, source, text, rates={"mean": 0.02, "gain": 0.02, "basis": 0.002})
    ids = torch.arange(V)
    rows = source(ids)[:, 1:][:, list(tuned.layers)]
    assert tuned.order is not None
    members = tuned.order[-100:]
    assert torch.equal(tuned.encode(rows[members], 5), made.scheme.encode(rows[members], 5))
    assert not torch.equal(coded_rows(tuned, source, ids), coded_rows(made.scheme, source, ids))
    own = model.head(model.hidden_states(text[:, :-1])).softmax(-1)
    losses = []
    for scheme in (made.scheme, tuned):
        table = MemoryRows(coded_rows(scheme, source, ids), text[:, :-1], layers=scheme.layers)
        logits = model.head(model.hidden_states(text[:, :-1], table)).log_softmax(-1)
        losses.append(float(-(own * logits).sum(-1).mean()))
    assert losses[1] < losses[0]
    assert store_bytes(tuned, num_layers=L).total == made.size.total
    save_plan(tmp_path / "plan", dataclasses.replace(made, scheme=tuned), nano, extra={})
    loaded = load_plan(tmp_path / "plan", nano)
    assert torch.equal(coded_rows(loaded, source, ids), coded_rows(tuned, source, ids))


def test_exact_rows_cost_nothing(planned):
    source, _, _, model, text = planned
    found = measure_rise(model, text, lambda ids: source(ids)[:, 1:], layers=range(L))
    assert found.rise == 0
    assert found.tokens == text[:, 1:].numel()


@pytest.mark.parametrize(("price", "levels"), [(1e-9, "trellis"), (3e-4, "normal")])
def test_codes_are_those_of_a_trellis_where_there_are_enough(price, levels):
    spread = torch.logspace(0, -6, 64)[None]
    found = at_price(
        [Choice(basis=True, spread=spread, dropped=10 * spread.sum(1))],
        Sizes(tokens=(1000,), width=64, fixed=0),
        price=price,
    )
    ((coding,),) = found.codings
    assert coding is not None
    assert coding.levels == levels
    assert (coding.nbytes - 1 >= 4) == (levels == "trellis")


def test_falling_pools_what_rises():
    values = torch.tensor([[3.0, 1.0, 2.0, 0.0], [1.0, 1.0, 4.0, 6.0]])
    assert torch.equal(falling(values), torch.tensor([[3.0, 1.5, 1.5, 0.0], [3.0, 3.0, 3.0, 3.0]]))


def test_bits_go_where_they_save_most():
    spread = torch.logspace(0, -6, 64)[None]
    choice = Choice(basis=True, spread=spread, dropped=spread.sum(1))
    sizes = Sizes(tokens=(1000,), width=64, fixed=0)
    found = allocate([choice], sizes, budget_bytes=25_000)
    assert found is not None
    (coding,) = found.bands(0)
    assert coding is not None
    widths = [width for width, _ in coding.widths]
    assert widths == sorted(widths, reverse=True)
    assert 20_000 < sizes.nbytes(found.codings) <= 25_000
    assert allocate([choice], sizes, budget_bytes=10) is None


@pytest.mark.parametrize("vocab_size", [1, 3, 512, 8192, 50_257])
def test_bands_hold_every_token(vocab_size):
    sizes = band_sizes(vocab_size)
    assert sum(sizes) == vocab_size
    assert min(sizes) > 0
