"""Named models: the paper's sizes, one line each, and small families of our own.

The paper's presets (`250m`, `750m`, `1b`) have exactly its sizes (Table 5, with the errata of docs/architecture.md) and
its recipe (Table 3). `nano` is for tests, `demo` for `flexmemory demo`, `mini` (8.4M parameters) for the models in this
repository, `small` (about 27M parameters) trains overnight on a laptop and in minutes on a GPU.
"""

from __future__ import annotations

import dataclasses

from flexmemory.config import ModelConfig, TrainConfig, nearest

VARIANTS = ("base", "memory", "flex1", "flex2", "flex3")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Preset:
    """A model and the recipe to train it with."""

    model: ModelConfig
    train: TrainConfig


_PAPER_RECIPE = TrainConfig()


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _Family:
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    cells: tuple[int, int, int, int]
    """K of base and memory, then K of FFN-M for b = 1, 2, 3."""
    max_seq_len: int = 2048
    tie_embeddings: bool = False
    train: TrainConfig = _PAPER_RECIPE

    def preset(self, variant: str) -> Preset:
        ratio = int(variant[4:]) if variant.startswith("flex") else 0
        model = ModelConfig(
            architecture="dense" if variant == "base" else "flex" if ratio else "memory",
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            num_layers=self.num_layers,
            num_heads=self.num_heads,
            num_kv_heads=self.num_heads,
            intermediate_size=self.cells[ratio],
            flex_ratio=ratio,
            max_seq_len=self.max_seq_len,
            tie_embeddings=self.tie_embeddings,
        )
        return Preset(model=model, train=self.train)


_NANO_RECIPE = TrainConfig(
    total_tokens=20_480, batch_tokens=512, seq_len=64, micro_batch_size=4, lr=3e-3, lr_final=3e-4, warmup_steps=5,
    eval_every=20, eval_tokens=4096, save_every=20,
)  # fmt: skip
_DEMO_RECIPE = TrainConfig(
    total_tokens=245_760, batch_tokens=2048, seq_len=256, micro_batch_size=8, lr=1e-3, lr_final=1e-4, warmup_steps=10,
    eval_every=30, eval_tokens=32_768, save_every=60,
)  # fmt: skip
_MINI_RECIPE = TrainConfig(
    total_tokens=256_507_904, batch_tokens=131_072, seq_len=512, micro_batch_size=128, lr=3e-3, lr_final=1e-4,
    warmup_steps=100, log_every=20, eval_every=200, save_every=1000, keep_checkpoints=1,
)  # fmt: skip
_SMALL_RECIPE = TrainConfig(
    total_tokens=400_000_000, batch_tokens=65_536, seq_len=1024, micro_batch_size=16, lr=1e-3, lr_final=1e-4,
    warmup_steps=200,
)  # fmt: skip

_FAMILIES = {
    "250m": _Family(vocab_size=128_256, hidden_size=960, num_layers=24, num_heads=16, cells=(2560, 2240, 1920, 1600)),
    "750m": _Family(vocab_size=128_256, hidden_size=1600, num_layers=24, num_heads=16, cells=(4272, 3738, 3200, 2668)),
    "1b": _Family(vocab_size=128_256, hidden_size=2048, num_layers=24, num_heads=32, cells=(5464, 4778, 4096, 3418)),
    "nano": _Family(
        vocab_size=512, hidden_size=48, num_layers=3, num_heads=4, cells=(128, 112, 96, 80), max_seq_len=64,
        tie_embeddings=True, train=_NANO_RECIPE,
    ),
    "demo": _Family(
        vocab_size=4096, hidden_size=192, num_layers=6, num_heads=6, cells=(512, 448, 384, 320), max_seq_len=256,
        tie_embeddings=True, train=_DEMO_RECIPE,
    ),
    "mini": _Family(
        vocab_size=8192, hidden_size=256, num_layers=8, num_heads=4, cells=(680, 592, 512, 424), max_seq_len=512,
        tie_embeddings=True, train=_MINI_RECIPE,
    ),
    "small": _Family(
        vocab_size=16_384, hidden_size=384, num_layers=12, num_heads=6, cells=(1024, 896, 768, 640), max_seq_len=1024,
        tie_embeddings=True, train=_SMALL_RECIPE,
    ),
}  # fmt: skip

PRESETS: dict[str, Preset] = {
    f"{size}-{variant}": family.preset(variant) for size, family in _FAMILIES.items() for variant in VARIANTS
}


def get_preset(name: str) -> Preset:
    """The preset called `name`.

    Raises:
        ValueError: there is none; the nearest name is given.
    """
    if name not in PRESETS:
        sizes, variants = ",".join(_FAMILIES), ",".join(VARIANTS)
        raise ValueError(f"unknown preset {name!r}{nearest(name, PRESETS)} (presets: {{{sizes}}}-{{{variants}}})")
    return PRESETS[name]
