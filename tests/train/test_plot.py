"""Loss curves: what is drawn where, what is left out, and limits that show the later losses."""

import importlib
import logging
import math
import sys

import numpy as np
import pytest

from flexmemory.train.metrics import append_line
from flexmemory.train.plot import can_plot, draw_losses, plot_losses

STEPS = 400


def metrics(*, steps=STEPS, offset=0.0, without=()):
    """Lines of a run whose loss falls from 11 to 3 by tokens, and whose validation loss is 0.1 above."""
    lines = []
    for step in range(1, steps + 1):
        loss = 3 + 8 * math.exp(-step / 10) + offset
        at = {"step": step, "tokens": step * 10_000, "train_s": step * 60.0, "flops": step * 1e13}
        at = {field: value for field, value in at.items() if field not in without}
        lines.append({**at, "ce": loss, "loss": loss + 1, "lr": 1e-3})
        if step % 10 == 0:
            lines.append({**at, "val_loss": loss + 0.1, "val_ppl": math.exp(loss + 0.1)})
    return lines


@pytest.fixture
def panels(monkeypatch, tmp_path):
    """`panels(runs)`: the axes of the one figure that is drawn of them."""
    figure_module = importlib.import_module("matplotlib.figure")
    drawn = []
    save = figure_module.Figure.savefig

    def savefig(figure, *args, **options):
        drawn.append(figure)
        save(figure, *args, **options)

    monkeypatch.setattr(figure_module.Figure, "savefig", savefig)

    def draw(runs):
        draw_losses(runs, image=tmp_path / "losses.png")
        (figure,) = drawn
        assert [path.name for path in tmp_path.iterdir()] == ["losses.png"]
        assert (tmp_path / "losses.png").read_bytes().startswith(b"\x89PNG")
        return figure.axes

    return draw


def legend(axes):
    return [text.get_text() for text in axes.figure.legends[0].get_texts()]


def test_losses_by_tokens_time_and_compute(panels):
    axes = panels({"short": metrics(steps=100), "long": metrics(offset=0.5)})
    assert [each.get_xlabel() for each in axes] == [
        "training tokens (millions)", "training time (hours)", "training compute (PFLOP)",
    ]  # fmt: skip
    for each, per_step in zip(axes, (0.01, 1 / 60, 0.01), strict=True):
        training, validation, long_training, _ = each.lines
        np.testing.assert_allclose(training.get_xdata(), per_step * np.arange(1, 101))
        np.testing.assert_allclose(validation.get_xdata(), per_step * np.arange(10, 101, 10))
        expected = [line["val_loss"] for line in metrics(steps=100) if "val_loss" in line]
        np.testing.assert_allclose(validation.get_ydata(), expected)
        assert validation.get_color() == training.get_color() != long_training.get_color()
        assert validation.get_linewidth() > training.get_linewidth()
    assert legend(axes[0]) == ["short", "long", "validation", "training, smoothed"]


def test_the_first_losses_do_not_hide_the_rest(panels):
    axes = panels({"a": metrics(), "b": metrics(steps=200, offset=0.3)})
    low, high = axes[0].get_ylim()
    assert low < 3 < 3.4 < high < 5
    assert {each.get_ylim() for each in axes} == {(low, high)}


def test_a_loss_below_every_later_one_is_shown(panels):
    lines = [{"step": step, "tokens": step, "ce": loss} for step, loss in enumerate([2.0, *[5.0] * 30], start=1)]
    assert panels({"diverged": lines})[0].get_ylim()[0] < 2


def test_one_loss_alone_is_shown(panels):
    (axes,) = panels({"begun": [{"step": 1, "tokens": 8, "ce": 5.0}]})
    assert axes.get_ylim()[0] < 5 < axes.get_ylim()[1]
    assert axes.get_xlabel() == "training tokens"


def test_training_losses_are_means_of_their_neighbours(panels):
    noise = np.random.default_rng(0).normal(size=1000)
    lines = [{"step": n, "tokens": n, "ce": 3 + value} for n, value in enumerate(noise, start=1)]
    smoothed = panels({"run": lines})[0].lines[0].get_ydata()
    assert smoothed[0] == pytest.approx(3 + noise[0])
    assert smoothed[2] == pytest.approx(3 + noise[:5].mean())
    assert smoothed[500] == pytest.approx(3 + noise[485:516].mean())
    assert smoothed[-1] == pytest.approx(3 + noise[-16:].mean())


def test_few_losses_are_drawn_as_they_are(panels):
    lines = metrics(steps=30)
    assert panels({"run": lines})[0].lines[0].get_ydata() == pytest.approx(
        [line["ce"] for line in lines if "ce" in line]
    )


@pytest.mark.parametrize("validations", [1, 12, 40])
def test_some_validations_and_the_last_are_marked(panels, validations):
    curve = panels({"run": metrics(steps=10 * validations)})[0].lines[1]
    marked = range(validations)[curve.get_markevery()]
    assert marked[-1] == validations - 1
    assert min(validations, 6) <= len(marked) <= 12


def test_a_run_without_a_field_is_left_out_of_its_panel_and_named(panels, caplog):
    axes = panels({"old": metrics(without=["train_s", "flops"]), "new": metrics()})
    assert [len(each.lines) for each in axes] == [4, 2, 2]
    assert axes[1].lines[0].get_color() == axes[0].lines[2].get_color()
    assert "old: metrics without train_s, left out of the panel by training time" in caplog.text
    assert "old: metrics without flops, left out of the panel by training compute" in caplog.text
    assert legend(axes[0])[:2] == ["old", "new"]


def test_a_panel_without_runs_is_left_out(panels, caplog):
    axes = panels({name: metrics(without=["flops"]) for name in ("a", "b")})
    assert [each.get_xlabel() for each in axes] == ["training tokens (millions)", "training time (hours)"]
    assert "a, b: metrics without flops" in caplog.text


def test_many_runs_look_different(panels):
    names = [f"a-long-name-of-a-run-in-a-sweep-{number}" for number in range(20)]
    axes = panels({name: metrics(steps=20, offset=number) for number, name in enumerate(names)})[0]
    assert len({(line.get_color(), line.get_marker()) for line in axes.lines[1::2]}) == 20
    box, window = axes.figure.legends[0].get_window_extent(), axes.figure.bbox
    assert window.x0 <= box.x0
    assert box.x1 <= window.x1


def test_a_run_draws_its_own_once_it_has_losses(tmp_path, caplog):
    runs, image = {"run": tmp_path / "metrics.jsonl"}, tmp_path / "loss.png"
    plot_losses(runs, image=image)
    assert not image.exists()
    append_line(runs["run"], {"step": 1, "tokens": 8, "ce": 3.0})
    plot_losses(runs, image=image)
    assert image.read_bytes().startswith(b"\x89PNG")
    assert not caplog.records


def test_without_matplotlib_a_sentence_says_what_to_install(monkeypatch, caplog, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with caplog.at_level(logging.WARNING):
        assert not can_plot()
    assert "pip install 'flexmemory[train]'" in caplog.text
    with pytest.raises(ImportError, match=r"pip install 'flexmemory\[train\]'"):
        draw_losses({"run": metrics()}, image=tmp_path / "losses.png")
