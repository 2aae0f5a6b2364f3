"""The model for transformers: `Transformer` behind transformers' inputs, outputs, caches and attention functions.

The mathematics is the core's. What is here turns arguments: masks and attention functions into one `AttentionFunction`,
places of left-padded or packed sequences into positions, and rows from wherever they are. Weights have transformers'
names in memory and the core's on disk, so a folder is read and written by both. Dimension key: B batch, T new tokens, S
cached and new tokens, H query heads, G key and value heads, E head width, D model width, V vocabulary.
"""

# Classes of transformers declare less than they do.
# pyright: reportIncompatibleMethodOverride=false, reportIncompatibleVariableOverride=false

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import Cache, DynamicCache, GenerationMixin, PreTrainedModel, initialization
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightRenaming
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import eager_attention_forward
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file
from transformers.utils.generic import can_return_tuple

from flexmemory.config import MODEL_TYPE
from flexmemory.hf.configuration_flex_memory import FlexMemoryConfig
from flexmemory.model.attention import Attention, AttentionFunction
from flexmemory.model.init import INIT_STD, initial_scales
from flexmemory.model.memory import MemoryRows, Rows
from flexmemory.model.transformer import Transformer

register_checkpoint_conversion_mapping(
    MODEL_TYPE,
    [
        WeightRenaming(r"^(embedding|blocks|norm)\.", r"model.core.\1."),
        WeightRenaming(r"^head\.", r"lm_head."),
    ],
    overwrite=True,
)


@dataclasses.dataclass(frozen=True, slots=True)
class AttentionLayer:
    """What transformers' attention functions ask of the module that calls them."""

    layer_idx: int
    num_key_value_groups: int
    training: bool
    config: FlexMemoryConfig
    is_causal: bool = True


class FlexMemoryPreTrainedModel(PreTrainedModel):
    """Loading, saving and initialisation, shared by both models."""

    config: FlexMemoryConfig
    config_class = FlexMemoryConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["DenseBlock", "MemoryBlock", "FlexBlock"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        scales = initial_scales(self._base().core)
        for parameter in module.parameters(recurse=False):
            mean, std = scales.get(parameter, (0.0, INIT_STD))
            initialization.normal_(parameter, mean=mean, std=std)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: Any,
        *args: Any,
        tol: str | Path | None = None,
        rows: str | None = None,
        **kwargs: Any,
    ) -> Any:
        """`PreTrainedModel.from_pretrained`, and rows from a ToL store in place of FFN-M's weights.

        Args:
            pretrained_model_name_or_path: A folder, one of this package's checkpoints too, or a name on the Hub.
            args: As in transformers.
            tol: A ToL store built from this checkpoint; with it, memory weights are not read.
            rows: Where the rows of the store are kept: `disk` (the default), `host` or `device`.
            kwargs: As in transformers.

        Raises:
            ImportError: a store is given and this package is not installed (files beside the weights alone).
            ValueError: `rows` and `tol` do not go together, or the store is not of this checkpoint.
        """
        if tol is None:
            if rows not in (None, "compute"):
                raise ValueError(f"rows from {rows!r} need a ToL store: give tol='FOLDER', or leave rows out")
            found = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
            hub = {key: kwargs[key] for key in ("cache_dir", "token", "revision", "subfolder") if key in kwargs}
            edited = cached_file(
                pretrained_model_name_or_path, "rows.safetensors", _raise_exceptions_for_missing_entries=False, **hub
            )
            if edited is not None:  # rows that are given and not computed (docs/editing.md)
                core = cls._loaded(found).core
                core.give_rows(load_file(edited, device=str(core.device)))
            return found
        try:
            from flexmemory.hf.offload import open_rows
        except ImportError as error:
            raise ImportError("rows from a ToL store need the package: pip install flexmemory") from error
        looked_up = open_rows(pretrained_model_name_or_path, tol, rows=rows or "disk")
        found = super().from_pretrained(
            pretrained_model_name_or_path,
            *args,
            with_memory=False,
            with_embedding=not looked_up.embedding,
            **kwargs,
        )
        base = cls._loaded(found)
        base.row_source = looked_up.source(base)
        return found

    def save_pretrained(self, save_directory: Any, is_main_process: bool = True, **kwargs: Any) -> None:
        """`PreTrainedModel.save_pretrained`; in one shard, the folder is one of this package's checkpoints too.

        Raises:
            ValueError: the weights of FFN-M are not here to be saved.
        """
        if not self._base().with_memory:
            raise ValueError(
                "this model's rows are looked up and its FFN-M weights were not loaded, so saving it would lose them; "
                "load it without tol to save it"
            )
        folder = Path(save_directory)
        whole = is_main_process and not getattr(self, "_hf_peft_config_loaded", False)  # not of adapters alone
        for name in ("manifest.json", "rows.safetensors", SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME):
            if whole:
                (folder / name).unlink(missing_ok=True)
        super().save_pretrained(save_directory, is_main_process=is_main_process, **kwargs)
        if not whole:
            return
        try:
            from flexmemory.hf.offload import seal_checkpoint
        except ImportError:  # files beside the weights alone: what they save is read by them
            return
        seal_checkpoint(folder, self._base())

    @staticmethod
    def _loaded(found: Any) -> FlexMemoryModel:
        model = found[0] if isinstance(found, tuple) else found  # a tuple with output_loading_info
        return model._base()

    def _base(self) -> FlexMemoryModel:
        base = self.base_model
        assert isinstance(base, FlexMemoryModel)
        return base


class FlexMemoryModel(FlexMemoryPreTrainedModel):
    """The model without its head."""

    def __init__(self, config: FlexMemoryConfig, *, with_memory: bool = True, with_embedding: bool = True) -> None:
        """Allocate the weights; `with_memory` and `with_embedding` as for `Transformer`."""
        super().__init__(config)
        self.core = Transformer(config.core(), with_memory=with_memory, with_embedding=with_embedding)
        del self.core.head  # it is the causal language model's, under transformers' name
        self.with_memory = with_memory or not config.core().has_memory
        self.row_source: Callable[[Tensor], Rows] | None = None
        """Looks rows up; without it they are computed."""
        self.gradient_checkpointing = False
        if not self.with_memory:
            self._keys_to_ignore_on_load_unexpected = [r"\.memory\."]
        if self.core.embedding is None:
            self._keys_to_ignore_on_load_unexpected = [r"\.memory\.", r"embedding\."]
        self.post_init()

    def get_input_embeddings(self) -> nn.Module | None:
        """The embedding; None where rows carry it."""
        return self.core.embedding

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Replace the embedding."""
        self.core.embedding = value

    @can_return_tuple
    def forward(
        self,
        input_ids: Int[Tensor, "B T"] | None = None,
        attention_mask: Any = None,
        position_ids: Int[Tensor, "#B T"] | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """The normed residual stream; arguments as in transformers, those unknown here go to the attention function.

        Raises:
            ValueError: there are no `input_ids`, one is out of range, or a position is (both checked on the CPU).
        """
        config = self.config
        input_ids = _required(input_ids, inputs_embeds)
        batch, length = input_ids.shape
        checkpointing = self.gradient_checkpointing and self.training
        if (config.use_cache if use_cache is None else use_cache) and past_key_values is None and not checkpointing:
            past_key_values = DynamicCache(config=config)
        if checkpointing:
            past_key_values = None  # the backward pass would write to it again
        if position_ids is None:
            start = 0 if past_key_values is None else past_key_values.get_seq_length()
            position_ids = (torch.arange(length, device=input_ids.device) + start)[None]
        self._check_positions(position_ids)
        mask = create_causal_mask(
            config=config,
            inputs_embeds=torch.empty(batch, length, 0, dtype=self.dtype, device=input_ids.device),  # for its shape
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        attentions: list[Tensor] = []
        states: list[Tensor] = []
        call = self._gradient_checkpointing_func if checkpointing else _call

        def run(block: nn.Module, x: Tensor, *arguments: object) -> Tensor:
            states.append(x)
            return call(block, x, *arguments)

        last = self.core.hidden_states(
            input_ids,
            self._rows(input_ids),
            past_key_values,
            position_ids.expand(batch, length),
            attention=self._attention(mask, attentions, position_ids=position_ids, **kwargs),
            run=run,
        )
        wants_states = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        wants_attentions = config.output_attentions if output_attentions is None else output_attentions
        return BaseModelOutputWithPast(
            last_hidden_state=last,  # pyright: ignore[reportArgumentType] - transformers says FloatTensor
            past_key_values=past_key_values,
            hidden_states=(*states, last) if wants_states else None,  # pyright: ignore[reportArgumentType] - as said
            attentions=tuple(attentions) if wants_attentions else None,  # pyright: ignore[reportArgumentType] - as said
        )

    def _rows(self, input_ids: Tensor) -> Rows | None:
        """Rows that are looked up, or computed at every position where shapes must not depend on ids; else None."""
        if self.row_source is not None:
            return self.row_source(input_ids)
        static = torch.compiler.is_compiling() or (input_ids.is_cuda and torch.cuda.is_current_stream_capturing())
        if not static or not self.core.config.has_memory:
            return None
        index = torch.arange(input_ids.numel(), device=input_ids.device).view_as(input_ids)
        return MemoryRows(self.core.compute_rows(input_ids.flatten()), index)

    def _attention(self, mask: Any, weights: list[Tensor], **kwargs: Any) -> AttentionFunction:
        """The attention function that the configuration names, with all that one call of the model gives it."""
        name = self.config._attn_implementation or "eager"
        function = ALL_ATTENTION_FUNCTIONS.get_interface(name, eager_attention_forward)

        def attend(attention: Attention, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            layer = AttentionLayer(
                layer_idx=attention.layer,
                num_key_value_groups=attention.num_heads // attention.num_kv_heads,
                training=attention.training,
                config=self.config,
            )
            here = mask.to(query.device) if isinstance(mask, Tensor) else mask  # layers may be on several devices
            scaling = attention.head_size**-0.5
            attended, weight = function(layer, query, key, value, here, dropout=0.0, scaling=scaling, **kwargs)
            if weight is not None:
                weights.append(weight)
            return attended

        return attend

    def _check_positions(self, position_ids: Tensor) -> None:
        if position_ids.device.type != "cpu" or torch.compiler.is_compiling() or not position_ids.numel():
            return
        last, limit = int(position_ids.max()), self.config.max_seq_len
        if last >= limit:
            raise ValueError(f"sequence of {last + 1} tokens is longer than the model's {limit}")


class FlexMemoryForCausalLM(FlexMemoryPreTrainedModel, GenerationMixin):
    """The model with its head, for `generate`, `Trainer` and PEFT."""

    _tied_weights_keys = {"lm_head.weight": "model.core.embedding.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config: FlexMemoryConfig, *, with_memory: bool = True, with_embedding: bool = True) -> None:
        """Allocate the weights; `with_memory` and `with_embedding` as for `Transformer`."""
        super().__init__(config)
        self.model = FlexMemoryModel(config, with_memory=with_memory, with_embedding=with_embedding)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module | None:
        """The embedding; None where rows carry it."""
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Replace the embedding."""
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Linear:
        """The head."""
        return self.lm_head

    @can_return_tuple
    def forward(
        self,
        input_ids: Int[Tensor, "B T"] | None = None,
        attention_mask: Any = None,
        position_ids: Int[Tensor, "#B T"] | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Int[Tensor, "B T"] | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits (B, T, V) of the next token, and the loss where `labels` (B, T) are given; -100 is not counted.

        Raises:
            ValueError: as for `FlexMemoryModel`.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


def _call(block: nn.Module, *arguments: object) -> Tensor:
    return block(*arguments)


def _required(input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
    if input_ids is not None and inputs_embeds is None:
        return input_ids
    if inputs_embeds is None:
        raise ValueError("no input_ids were given: they are required")
    raise ValueError(
        "inputs_embeds were given: this model takes input_ids alone, since each layer adds a row that is a function of "
        "the token's id, and an embedding does not say which token it is of"
    )
