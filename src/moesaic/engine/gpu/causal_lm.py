"""A model of the model library whose forward is a runner's: what `generate()` needs, on the paged cache.

Everything that `generate()` offers works: batches with padding, beams, sampling, streamers. What listens inside layers
(hooks, `output_attentions`, `output_hidden_states`) does not, and is refused. It knows no plan and no file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.modeling_outputs import MoeCausalLMOutputWithPast

from moesaic.engine.expert_profile import ExpertProfile, ModelShape, write_profile
from moesaic.engine.gpu.partial_prefill import WantedLogits
from moesaic.engine.gpu.runner import ModelRunner
from moesaic.errors import ConfigError, GenerationError, UnsupportedModelError
from moesaic.kvcache import CACHE_ARGUMENT, given_cache
from moesaic.kvcache.paged import PagedSequence
from moesaic.kvcache.states import StateLayer

__all__ = ["GpuCausalLM", "PagedCache", "attach_runner"]


class PagedCache(DynamicCache):  # type: ignore[misc]
    """The sequences of one batch in a runner's pool, as `generate()` sees a cache.

    Args:
        runner: whose pool it is.
    """

    def __init__(self, runner: ModelRunner) -> None:
        super().__init__()
        self.runner = runner
        self.sequences: list[PagedSequence] = []
        self._columns = 0

    def __del__(self) -> None:
        self.reset()

    @property
    def is_linear(self) -> list[bool]:
        """Of each layer on the GPU, whether it keeps a recurrent state, which cannot be cropped."""
        return [isinstance(cache, StateLayer) for cache in self.runner.caches]

    @property
    def is_croppable(self) -> bool:
        """Whether `crop` may keep a part."""
        return not any(self.is_linear)

    def get_seq_length(self, *args: Any, **kwargs: Any) -> int:
        """Columns of the batch so far, padding included."""
        return self._columns

    def append(self, ids: torch.Tensor, mask: torch.Tensor | None) -> list[torch.Tensor]:
        """The new tokens of each row, padding left out.

        Args:
            ids: int64 `[batch, columns]`, new.
            mask: `[batch, all columns]`, 0 where there is padding; or None.
        """
        if not self.sequences:
            self.sequences = [self.runner.new_sequence() for _ in range(len(ids))]
        if len(ids) != len(self.sequences):
            raise GenerationError(f"a batch of {len(ids)} rows goes on with a cache of {len(self.sequences)}.")
        self._columns += ids.shape[1]
        if mask is None:
            return list(ids)
        if mask.ndim != 2:
            raise UnsupportedModelError("a mask of attention other than padding does not run on a GPU: use plan 'cpu'.")
        kept = mask[:, -ids.shape[1] :].bool()
        return [row[keep] for row, keep in zip(ids, kept, strict=True)]

    def reset(self) -> None:
        """Give all blocks back."""
        for sequence in self.sequences:
            sequence.free()
        self.sequences, self._columns = [], 0

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` positions (transformers passes a negative number, or 0)."""
        for sequence in self.sequences:
            sequence.truncate(max(0, sequence.length + tokens_to_remove))
        self._columns = max(0, self._columns + tokens_to_remove)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Beam search: row i becomes what row `beam_idx[i]` was."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep these rows, in this order; a row may occur more than once."""
        if indices.dtype == torch.bool:
            indices = indices.nonzero().flatten()
        wanted, before, taken = [int(index) for index in indices], self.sequences, set[int]()
        for index, sequence in enumerate(before):
            if index not in wanted:
                sequence.free()  # first, so that copies find room
        self.sequences = []
        try:
            for index in wanted:
                self.sequences.append(self.runner.copy(before[index]) if index in taken else before[index])
                taken.add(index)
        except BaseException:
            self.sequences += [before[index] for index in set(wanted) - taken]
            self.reset()
            raise

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row, copies side by side."""
        self.batch_select_indices(torch.arange(len(self.sequences)).repeat_interleave(repeats))


class GpuCausalLM:
    """What a model on a GPU does differently from its stock class, in front of which this one is put.

    Names of its own begin with `_moesaic`: the model library has many.
    """

    runner: ModelRunner
    _moesaic_shape: ModelShape | None
    _moesaic_note: str

    def new_cache(self) -> PagedCache:
        """A cache for one batch, as `generate()` takes it."""
        return PagedCache(self.runner)

    def save_expert_profile(self, path: str | Path) -> None:
        """Write how often each expert was chosen in decode so far, for `from_pretrained(expert_profile=path)`.

        Raises:
            ConfigError: the file cannot be written, or no experts are in DRAM.
        """
        server, shape = self.runner.server, self._moesaic_shape
        if server is None or shape is None:
            raise ConfigError(f"{path}: all experts lie on the GPU: there is no use of them that a cache could learn.")
        uses = np.zeros((len(shape.num_experts), max(shape.num_experts)), np.int64)
        uses[self.runner.hand_off.served] = server.uses.numpy().view(np.uint32)
        num_tokens = int(uses.sum(axis=1).max()) // max(1, self.runner.decoder.top_k)
        write_profile(path, ExpertProfile(shape, num_tokens, uses))

    def _moesaic_defer(self, count: int, note: str) -> None:
        """Let so many experts of each token arrive one layer late in decode, and say so."""
        self.runner.hand_off.defer(count)
        self._moesaic_note = " ".join(filter(None, (self._moesaic_note, note)))

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> MoeCausalLMOutputWithPast:
        """As the stock model on int64 `[batch, tokens]`; logits are float32 `[batch, tokens, vocab_size]` on the CPU.

        Positions are those of the tokens in their rows, padding left out, as `generate()` makes them.

        Raises:
            UnsupportedModelError: something is asked for that does not run on a GPU.
        """
        wanted = [name for name in ("output_attentions", "output_hidden_states", "labels") if kwargs.get(name)]
        if input_ids is None or kwargs.get("inputs_embeds") is not None or wanted:
            what = ", ".join(wanted) or "inputs_embeds"
            raise UnsupportedModelError(f"{what} is not there for a model on a GPU: load it with plan='cpu'.")
        given = given_cache(kwargs)
        cache = self.new_cache() if given is None else given
        if not isinstance(cache, PagedCache):
            raise UnsupportedModelError(
                f"a {type(cache).__name__} is no cache of a model on a GPU: leave it out, or use model.new_cache()."
            )
        kept = _kept_columns(logits_to_keep, input_ids.shape[1])
        logits = self._moesaic_logits(
            input_ids.cpu(), None if attention_mask is None else attention_mask.cpu(), cache, kept
        )
        result = {"logits": logits} | ({} if use_cache is False else {CACHE_ARGUMENT: cache})
        return MoeCausalLMOutputWithPast(**result)

    def _moesaic_logits(
        self, ids: torch.Tensor, mask: torch.Tensor | None, cache: PagedCache, kept: torch.Tensor
    ) -> torch.Tensor:
        """Logits `[batch, kept columns, vocab_size]`; zeros where there is padding."""
        before = cache.get_seq_length()
        rows = cache.append(ids, mask)
        try:
            if ids.shape[1] == 1 and before > 0 and all(len(row) == 1 for row in rows):
                return self._moesaic_step(cache.sequences, [int(row) for row in rows])
            return self._moesaic_prompt(cache.sequences, rows, ids.shape[1], kept)
        except BaseException:
            cache.reset()  # rows may differ in what they hold by now
            raise

    def _moesaic_step(self, sequences: list[PagedSequence], tokens: list[int]) -> torch.Tensor:
        size = self.runner.options.max_batch
        parts = [
            self.runner.decode(sequences[i : i + size], tokens[i : i + size], to_host=True).clone()
            for i in range(0, len(tokens), size)
        ]
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).unsqueeze(1)

    def _moesaic_prompt(
        self, sequences: list[PagedSequence], rows: list[torch.Tensor], columns: int, kept: torch.Tensor
    ) -> torch.Tensor:
        out = torch.zeros(len(rows), len(kept), self.runner.decoder.vocab_size)
        for index, (sequence, row) in enumerate(zip(sequences, rows, strict=True)):
            first = columns - len(row)  # padding is on the left
            only_last = len(kept) == 1 and int(kept) == columns - 1
            pieces, parts = torch.split(row, self.runner.options.max_chunk), []
            for number, piece in enumerate(pieces, 1):
                of_some: WantedLogits = "last" if number == len(pieces) else "none"
                parts.append(self.runner.prefill([(sequence, piece)], of_some if only_last else "all"))
            logits = parts[-1] if only_last else torch.cat(parts)
            if only_last:
                out[index, 0] = logits[-1]
            else:
                inside = kept >= first
                out[index, inside] = logits[(kept[inside] - first).to(logits.device)].cpu()
        return out


def _kept_columns(logits_to_keep: int | torch.Tensor, columns: int) -> torch.Tensor:
    if isinstance(logits_to_keep, torch.Tensor):
        return torch.arange(columns)[logits_to_keep.cpu()]
    return torch.arange(columns)[-logits_to_keep:] if logits_to_keep else torch.arange(columns)


def attach_runner(
    model: PreTrainedModel, runner: ModelRunner, shape: ModelShape | None = None, note: str = ""
) -> PreTrainedModel:
    """Put a runner's forward in front of a loaded model's own; changes the model in place.

    Args:
        model: loaded.
        runner: of its layers.
        shape: of its experts, if their use may be saved.
        note: what people should know of how it runs.
    """
    stock_class = type(model)
    model.__class__ = type(stock_class.__name__, (GpuCausalLM, stock_class), {})
    model.runner, model._moesaic_shape, model._moesaic_note = runner, shape, note
    return model
