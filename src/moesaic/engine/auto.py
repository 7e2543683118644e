"""`AutoModelForCausalLM` and `AutoTokenizer`: the names and the use that people know from transformers.

What comes back is a real `PreTrainedModel` on packed weights, and a real tokenizer. This module only joins the parts.
"""

from __future__ import annotations

import warnings
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moesaic.engine.loader import load, prepare
from moesaic.engine.packing import Progress
from moesaic.errors import ConfigError
from moesaic.kernels import set_num_threads
from moesaic.models import load_tokenizer
from moesaic.placement import DEFAULT_CONTEXT, Plan, Rules
from moesaic.placement.units import parse_size
from moesaic.weights import open_checkpoint, resolve

__all__ = ["AutoModelForCausalLM", "AutoTokenizer", "parse_vram"]


class AutoModelForCausalLM:
    """Loads causal language models; it is not instantiated."""

    @classmethod
    def from_pretrained(
        cls,
        model: str,
        *,
        gguf: str | Path | None = None,
        plan: str | Path | Rules | Plan = "auto",
        vram: int | str | None = None,
        context: int = DEFAULT_CONTEXT,
        threads: int | None = None,
        progress: Progress = True,
        offline: bool = False,
        expert_profile: str | Path | None = None,
        defer_experts: int = 0,
    ) -> PreTrainedModel:
        """Load a model on packed weights; `generate()` works as in transformers.

        Args:
            model: `demo`, a folder with safetensors, a `.gguf`, `org/name` or `org/name:QUANT` on the hub.
            gguf: a GGUF to take the weights and the configuration from instead.
            plan: a template's name (auto, cpu, hybrid, layers, gpu), a placement file, rules, or a plan.
            vram: memory of the GPU to use at most, in bytes or as in "24GiB"; what is free, less a margin, if None.
            context: tokens of cache to leave room for; on a GPU no more fit, unless experts can lend them memory.
            threads: threads of the kernels, at least 1; None takes MOESAIC_THREADS or the physical cores.
            progress: True draws a bar, False is silent, a function is called with (bytes done, bytes in all).
            offline: take from the hub only what is on this computer.
            expert_profile: a file from `model.save_expert_profile(file)`, with whose busiest experts the cache of
                experts on a GPU begins.
            defer_experts: so many experts of each token, those with the lowest weights, arrive one layer late in decode
                where the CPU computes them for a GPU: quicker, and answers differ slightly from the exact model's.

        Raises:
            MoesaicError: the model cannot be found, read, placed or run; see `moesaic.errors`.
        """
        if threads is not None:
            set_num_threads(threads)
        prepared = prepare(model, gguf=gguf, plan=plan, vram=parse_vram(vram), context=context, offline=offline)
        return load(prepared, progress=progress, expert_profile=expert_profile, defer_experts=defer_experts)


def parse_vram(vram: int | str | None) -> int | None:
    """Bytes of a size such as "24GiB"; ConfigError if it is none."""
    try:
        size = parse_size(vram) if isinstance(vram, str) else vram
    except ValueError as error:
        raise ConfigError(f"vram: {error}.") from error
    if size is not None and size < 1:
        raise ConfigError(f"vram is {size}: expected bytes above 0, or a size such as '24GiB'.")
    return size


class AutoTokenizer:
    """Loads tokenizers; it is not instantiated."""

    @classmethod
    def from_pretrained(
        cls,
        model: str,
        *,
        gguf: str | Path | None = None,
        tokenizer: str | Path | None = None,
        offline: bool = False,
    ) -> PreTrainedTokenizerBase:
        """The tokenizer of a model: of its folder if it has one, otherwise rebuilt from the GGUF.

        Args:
            model: as for `AutoModelForCausalLM`.
            gguf: as for `AutoModelForCausalLM`.
            tokenizer: a folder with tokenizer files to use instead.
            offline: take from the hub only what is on this computer.

        Raises:
            TokenizerError: no tokenizer can be made from what there is.

        Warns:
            UserWarning: the tokenizer had to be rebuilt and may differ from the original.
        """
        files = resolve(model, gguf, offline)
        checkpoint = open_checkpoint(files.checkpoint)
        try:
            loaded = load_tokenizer(checkpoint, files.tokenizer if tokenizer is None else Path(tokenizer).expanduser())
        finally:
            checkpoint.close()
        if loaded.inexact is not None:
            warnings.warn(loaded.inexact, UserWarning, stacklevel=2)
        return loaded.tokenizer
