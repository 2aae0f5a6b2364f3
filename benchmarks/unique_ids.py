"""How many distinct ids N tokens of text hold, in shuffled windows as training sees them: a curve, a law, a plot.

    python benchmarks/unique_ids.py 32k=DATA 128k=DATA 256k=DATA --out benchmarks/results/unique_ids.json \
        --plot docs/images/unique-ids.png

DATA are folders that `flexmemory prepare` wrote; the name before `=` labels the curve.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import numpy as np

from flexmemory.provenance import provenance
from flexmemory.train.data import TokenDataset

WINDOW = 2048
DRAWS = 16
HELD_OUT_FROM = 2**20
OWNERS = {"tokens": 2**22, "world_sizes": (8, 64, 256, 1024)}


def curve(windows: np.ndarray, *, vocab_size: int) -> list[dict]:
    """Distinct ids in 2^k windows: mean and standard deviation over disjoint draws."""
    points = []
    for count in 2 ** np.arange(int(math.log2(len(windows))) + 1):
        draws = [
            seen(windows[i * count : (i + 1) * count], vocab_size) for i in range(min(DRAWS, len(windows) // count))
        ]
        unique = [int(draw.sum()) for draw in draws]
        point = {"tokens": int(count) * WINDOW, "unique": float(np.mean(unique)), "sd": float(np.std(unique))}
        points.append({**point, "draws": len(draws)})
    return points


def seen(windows: np.ndarray, vocab_size: int) -> np.ndarray:
    """(V,): which ids occur."""
    mask = np.zeros(vocab_size, dtype=bool)
    mask[windows.ravel()] = True
    return mask


def law(points: list[dict], *, vocab_size: int) -> dict:
    """Heaps' law with a ceiling, and how far it is off where it was fitted and where it was not."""
    tokens, unique = (np.array([point[key] for point in points]) for key in ("tokens", "unique"))
    early = tokens <= HELD_OUT_FROM

    def errors(parameters):
        return law_at(parameters, tokens, vocab_size=vocab_size) / unique - 1

    parameters = fit(tokens, unique)
    held_out = errors(fit(tokens[early], unique[early]))[~early]
    return {
        "parameters": dict(zip(("ln_k", "beta", "ln_ceiling", "ln_sharpness"), parameters.tolist(), strict=True)),
        "to_tokens": int(tokens[-1]),
        "largest_error": float(np.abs(errors(parameters)).max()),
        "fitted_to_1M_error_by_tokens": dict(zip(tokens[~early].tolist(), held_out.tolist(), strict=True)),
        "last_exponent": float(np.log2(unique[-1] / unique[-2])),
    }


def law_at(parameters, tokens, *, vocab_size: int) -> np.ndarray:
    """U(N) = (h^-s + c^-s)^(-1/s) with h = k N^beta: Heaps' law that bends at a ceiling c, at most V."""
    return np.minimum(np.exp(_log_law(parameters, np.log(tokens))), vocab_size)


def _log_law(parameters, log_tokens) -> np.ndarray:
    ln_k, beta, ln_ceiling, ln_sharpness = parameters
    sharpness = np.exp(ln_sharpness)
    return -np.logaddexp(-sharpness * (ln_k + beta * log_tokens), -sharpness * ln_ceiling) / sharpness


def fit(tokens: np.ndarray, unique: np.ndarray) -> np.ndarray:
    """The law's parameters by least squares of ln U (Levenberg-Marquardt)."""
    x, y = np.log(tokens), np.log(unique)
    parameters, damping, delta = np.array([0.5, 0.7, 11.0, -0.5]), 1e-2, 1e-5 * np.eye(4)
    residual = _log_law(parameters, x) - y
    for _ in range(500):
        columns = [_log_law(parameters + d, x) - _log_law(parameters - d, x) for d in delta]
        jacobian = np.stack(columns, axis=1) / 2e-5
        square = jacobian.T @ jacobian
        step = np.linalg.solve(square + damping * np.diag(np.diag(square) + 1e-9), -jacobian.T @ residual)
        tried = _log_law(parameters + step, x) - y
        if tried @ tried < residual @ residual:
            parameters, residual, damping = parameters + step, tried, max(damping / 3, 1e-9)
        else:
            damping *= 3
    return parameters


def owners(windows: np.ndarray, *, vocab_size: int) -> dict:
    """How evenly `id modulo W` spreads the ids of a large step: the busiest rank's ids over the mean."""
    (ids,) = seen(windows[: OWNERS["tokens"] // WINDOW], vocab_size).nonzero()
    busiest = {world: float(np.bincount(ids % world).max() * world / len(ids)) for world in OWNERS["world_sizes"]}
    return {"tokens": OWNERS["tokens"], "busiest_over_mean": busiest}


def measure(folder: str) -> dict:
    """Curve, law and owners of one data folder."""
    dataset = TokenDataset.open(folder)
    stream = dataset.train
    count = stream.num_windows(WINDOW)
    order = np.random.default_rng(0).permutation(count)
    windows = stream.read(0, count * WINDOW).astype(np.uint32).reshape(count, WINDOW)[order]
    points = curve(windows, vocab_size=stream.vocab_size)
    return {
        "vocab_size": stream.vocab_size,
        "text_tokens": len(stream),
        "text_bytes": stream.num_bytes,
        "data_fingerprint": dataset.fingerprint,
        "points": points,
        "law": law(points, vocab_size=stream.vocab_size),
        "owners": owners(windows, vocab_size=stream.vocab_size),
    }


def plot(curves: dict[str, dict], image: Path) -> None:
    """Measured points, the law through them, and the law beyond them."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    figure = Figure(figsize=(7.5, 4.6), layout="constrained")
    axes = figure.subplots()
    for number, (name, values) in enumerate(curves.items()):
        points, fitted, color = values["points"], values["law"], f"C{number}"
        tokens = [point["tokens"] for point in points]
        axes.plot(tokens, [point["unique"] for point in points], "o", color=color, markersize=4.5, label=name)
        for start, end, style in ((WINDOW, tokens[-1], "-"), (tokens[-1], 2**28, ":")):
            x = np.geomspace(start, end, 100)
            y = law_at(list(fitted["parameters"].values()), x, vocab_size=values["vocab_size"])
            axes.plot(x, y, style, color=color, linewidth=1.3)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xlabel("tokens of shuffled 2048-token windows")
    axes.set_ylabel("distinct ids")
    axes.xaxis.set_major_locator(LogLocator(base=4, numticks=20))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(short))
        axis.set_minor_formatter(NullFormatter())
    axes.grid(visible=True, alpha=0.3)
    axes.legend(title="vocabulary (line: law; dotted: extrapolated)", loc="lower right")
    figure.savefig(image, dpi=130)


def short(value: float, _=None) -> str:
    """4096 as 4k, 2^20 as 1M."""
    for size, letter in ((2**20, "M"), (2**10, "k")):
        if value >= size:
            return f"{value / size:g}{letter}"
    return f"{value:g}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", nargs="+", metavar="NAME=FOLDER")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    curves = {name: measure(folder) for name, _, folder in (text.partition("=") for text in args.data)}
    results = {"window": WINDOW, "curves": curves, "provenance": provenance()}
    args.out.write_text(json.dumps(results, indent=2) + "\n")
    if args.plot:
        plot(curves, args.plot)


if __name__ == "__main__":
    main()
