"""Folders as one data set: opened, named, fingerprinted; what does not belong together is refused."""

import math
import shutil

import pytest

from flexmemory.storage import read_json
from flexmemory.tokenizer import Tokenizer
from flexmemory.train import loop
from flexmemory.train.loop import train
from flexmemory.train.metrics import read_lines
from flexmemory.train.mixture import Mixture
from tests.train.conftest import assert_same_state, encode, nano, recipe, structured_text, write_prepared


@pytest.fixture(autouse=True)
def _no_plots(monkeypatch):
    monkeypatch.setattr(loop, "can_plot", lambda: False)


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tokenizer):
    """Folders a, b and c; c has no validation split."""
    root = tmp_path_factory.mktemp("mixture")
    for seed, name in enumerate("abc"):
        texts = structured_text(sentences=200 * (seed + 1), seed=seed)
        validation = [encode(tokenizer, structured_text(sentences=32, seed=9 + seed))] if name != "c" else []
        splits = {"train": [encode(tokenizer, texts)], "validation": validation}
        write_prepared(root / name, tokenizer=tokenizer, splits=splits)
    return root


def test_one_folder_is_that_folder(prepared, dataset):
    for names in (prepared, str(prepared), [prepared], [f"{prepared}=0.7"]):
        mixture = Mixture.open(names)
        assert mixture.fingerprint == dataset.fingerprint
        assert mixture.vocab_size == dataset.vocab_size
        assert mixture.tokenizer().fingerprint == dataset.tokenizer_fingerprint
        assert mixture.weights is None
        assert len(mixture.train) == len(dataset.train)
        assert mixture.describe()["folders"][0]["path"] == str(prepared.resolve())


def test_folders_are_mixed_by_size_or_by_weight(folders):
    a, b, c = (folders / name for name in "abc")
    sizes = [len(Mixture.open(folder).train) for folder in (a, b, c)]
    by_size = Mixture.open([a, b, c])
    assert [len(stream) for stream in by_size.train.streams] == sizes
    assert by_size.weights is None
    assert by_size.validation is not None
    assert len(by_size.validation.streams) == 2
    assert Mixture.open([f"{a}=0.7", f"{b}=0.3"]).weights == [7, 3]
    assert Mixture.open([f"{a}=1/3", f"{b}=2e-1", f"{c}=1"]).weights == [5, 3, 15]
    assert Mixture.open([c]).validation is None


def test_a_folder_may_have_an_equals_sign_in_its_name(folders, tmp_path):
    folder = shutil.copytree(folders / "a", tmp_path / "lr=3")
    assert Mixture.open(str(folder)).datasets[0].folder == folder
    mixture = Mixture.open([f"{folder}=2", f"{folders / 'b'}=4"])
    assert (mixture.datasets[0].folder, mixture.weights) == (folder, [1, 2])


def test_fingerprint_is_of_folders_order_and_shares(folders):
    a, b = folders / "a", folders / "b"
    mixes = [[a], [b], [a, b], [b, a], [f"{a}=1", f"{b}=1"], [f"{a}=1", f"{b}=2"], [f"{a}=2", f"{b}=1"]]
    assert len({Mixture.open(names).fingerprint for names in mixes}) == len(mixes)
    assert Mixture.open([f"{a}=7", f"{b}=3"]).fingerprint == Mixture.open([f"{a}=0.7", f"{b}=.3"]).fingerprint


@pytest.mark.parametrize(
    ("names", "error", "message"),
    [
        ([], ValueError, "no data: name at least one folder"),
        (["a", "nowhere"], FileNotFoundError, "no prepared data in nowhere"),
        (["nowhere=2"], FileNotFoundError, "no prepared data in nowhere"),
        (["a", "b", "../{root}/a"], ValueError, "../{root}/a is in the data twice; name it once"),
        (["a=1", "a=2"], ValueError, "a is in the data twice; name it once, with the sum of its weights"),
        (["a=1", "b"], ValueError, "b has no weight; give every folder one"),
        (["a=0", "b=1"], ValueError, "the weight of a must be above 0, got 0; leave the folder out"),
        (["a=-1", "b=1"], ValueError, "the weight of a must be above 0, got -1"),
        (["a=half", "b=1"], ValueError, "the weight of a must be a number, got 'half'"),
        (["a=nan", "b=1"], ValueError, "the weight of a must be a number, got 'nan'"),
        (["a=inf", "b=1"], ValueError, "the weight of a must be a number, got 'inf'"),
        (["a=", "b=1"], ValueError, "the weight of a must be a number, got ''"),
        (["a=1/0", "b=1"], ValueError, "the weight of a must be a number, got '1/0'"),
    ],
)
def test_mistakes_are_named(folders, monkeypatch, names, error, message):
    monkeypatch.chdir(folders)
    with pytest.raises(error) as raised:
        Mixture.open([name.format(root=folders.name) for name in names])
    assert message.format(root=folders.name) in str(raised.value)


def test_folders_of_different_tokenizers_are_refused(folders, tmp_path):
    other = Tokenizer.train(["quite other text " * 9], vocab_size=300)
    folder = write_prepared(tmp_path / "other", tokenizer=other, splits={"train": [[1, 2]], "validation": []})
    message = f"{folders / 'a'} and {folder} are of different tokenizers; prepare one with --tokenizer of the other"
    with pytest.raises(ValueError, match=message):
        Mixture.open([folders / "a", folder])


def test_a_run_on_a_mixture_stopped_and_resumed_is_never_stopped(folders, tmp_path):
    names = [f"{folders / 'a'}=3", f"{folders / 'b'}=1"]
    for out, lengths in (("whole", [20]), ("parts", [9, 20])):
        for steps in lengths:
            config = recipe(steps=steps, warmup_steps=0, lr=1e-3, lr_final=1e-3)
            train(nano(), train_config=config, data=names, out=tmp_path / out, resume=steps > lengths[0])
    assert_same_state(*(tmp_path / out / "checkpoints" / "step-00000020" for out in ("whole", "parts")))
    described = read_json(tmp_path / "whole" / "config.json")["data"]
    assert described == Mixture.open(names).describe()
    assert [folder["weight"] for folder in described["folders"]] == [3, 1]
    losses = [line["val_loss"] for line in read_lines(tmp_path / "whole" / "metrics.jsonl") if "val_loss" in line]
    assert all(map(math.isfinite, losses))
    assert len(losses) == 2


def test_resume_refuses_another_mixture_and_says_which_folder(folders, tmp_path, tokenizer):
    for name in "ab":
        shutil.copytree(folders / name, tmp_path / name)
    a, b, c = tmp_path / "a", tmp_path / "b", folders / "c"
    config, out = recipe(steps=2), tmp_path / "run"
    train(nano(), train_config=config, data=[a, b], out=out)

    def refusal(*names):
        with pytest.raises(ValueError, match=f"the data that {out}.*step-00000002 was trained on; resume") as raised:
            train(nano(), train_config=config, data=names, out=out, resume=True)
        return str(raised.value)

    mixture = "the mixture (its folders, their order or weights) is not the data"
    for names in ([a], [b, a], [f"{a}=1", f"{b}=1"]):
        assert refusal(*names).startswith(mixture)
    assert refusal(a, b, c).startswith(f"{c} is not the data")
    shutil.rmtree(b)
    splits = {"train": [encode(tokenizer, structured_text(sentences=400, seed=5))], "validation": []}
    write_prepared(b, tokenizer=tokenizer, splits=splits)
    assert refusal(a, b).startswith(f"{b} is not the data")


def test_validation_splits_shorter_than_a_sequence_are_no_validation(tmp_path, tokenizer, caplog):
    ids = encode(tokenizer, structured_text(sentences=80, seed=0))
    names = []
    for name in ("a", "b"):
        splits = {"train": [ids], "validation": [ids[:20]]}
        names.append(write_prepared(tmp_path / name, tokenizer=tokenizer, splits=splits))
    result = train(nano(), train_config=recipe(steps=1), data=names, out=tmp_path / "run")
    assert "no validation: that split holds 20 tokens, need seq_len + 1 = 33" in caplog.text
    assert result.val_loss is None
