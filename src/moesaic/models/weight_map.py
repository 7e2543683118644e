"""Which checkpoint tensor feeds which parameter of the stock Hugging Face model.

It reads no tensor. Names and rearrangements of safetensors come from transformers' own conversion tables
(`safetensors_map.py`), those of GGUF from `gguf`'s name map and the files `models/<model_type>.py` (`gguf_map.py`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from moesaic.errors import CheckpointError, UnsupportedModelError
from moesaic.models.expert_layout import expert_modules
from moesaic.models.gguf_map import map_gguf
from moesaic.models.safetensors_map import map_safetensors
from moesaic.models.synthetic_map import map_synthetic
from moesaic.models.tensor_ref import ExpertRefs, MlaRefs, TensorRef
from moesaic.weights import Checkpoint

__all__ = ["WeightMap", "build_meta_model", "build_weight_map"]


class WeightMap:
    """References for every parameter and persistent buffer of a model.

    Attributes:
        path: the checkpoint.
        missing: parameters of the model for which the checkpoint has nothing.
        unused: tensors of the checkpoint that feed nothing (e.g. multi-token prediction layers).
    """

    def __init__(
        self,
        path: Path,
        parameters: Mapping[str, TensorRef],
        experts: Mapping[str, ExpertRefs],
        mla: Mapping[str, MlaRefs],
        missing: tuple[str, ...],
        unused: tuple[str, ...],
    ) -> None:
        self.path = path
        self._parameters = dict(parameters)
        self._experts = dict(experts)
        self._mla = dict(mla)
        self.missing = missing
        self.unused = unused

    def parameter(self, name: str) -> TensorRef:
        """The reference for a parameter or persistent buffer outside the routed experts.

        Raises:
            CheckpointError: the checkpoint has nothing for it.
        """
        if name not in self._parameters:
            raise CheckpointError(self.path, "has no tensor for this parameter of the model.", tensor=name)
        return self._parameters[name]

    def experts(self, module: str) -> ExpertRefs:
        """The references for the experts module of this name, e.g. `model.layers.3.mlp.experts`.

        Raises:
            CheckpointError: the checkpoint has nothing for it.
        """
        if module not in self._experts:
            raise CheckpointError(self.path, "has no tensors for this experts module.", tensor=module)
        return self._experts[module]

    def mla(self, module: str) -> MlaRefs | None:
        """The split halves of `kv_b_proj` of an attention module, if the file stores them apart."""
        return self._mla.get(module)

    @property
    def parameters(self) -> Mapping[str, TensorRef]:
        """All references outside the routed experts, by parameter name."""
        return self._parameters

    @property
    def expert_modules(self) -> tuple[str, ...]:
        """Names of the experts modules that have references."""
        return tuple(self._experts)


def build_meta_model(config: PretrainedConfig) -> PreTrainedModel:
    """The stock causal language model of a config, without storage (buffers included).

    Raises:
        UnsupportedModelError: transformers has no causal language model for the config, or refuses its values.
    """
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    except Exception as error:  # classes do arithmetic with a config's values, so all kinds of errors come
        raise UnsupportedModelError(
            f"transformers cannot build a causal language model of type '{config.model_type}': {error}"
        ) from error
    assert isinstance(model, PreTrainedModel)
    return model.eval()


def build_weight_map(model: PreTrainedModel, checkpoint: Checkpoint) -> WeightMap:
    """Map every parameter and persistent buffer of `model` (which may be on the meta device) to `checkpoint`.

    Raises:
        CheckpointError: a tensor has another shape than the model wants.
        UnsupportedModelError: the model stores its weights in a way that is not known here.
    """
    mappers = {"safetensors": map_safetensors, "gguf": map_gguf, "synthetic": map_synthetic}
    parameters, experts, mla = mappers[checkpoint.kind](model, checkpoint)
    _add_tied(model, parameters)
    wanted = _wanted_shapes(model)
    for name, ref in parameters.items():
        if ref.shape != wanted[name]:
            raise CheckpointError(
                checkpoint.path,
                f"has the shape {list(ref.shape)}: the model wants {list(wanted[name])} for {name}.",
                tensor=ref.name,
            )
    stacked = {f"{module}." for module in expert_modules(model)}
    missing = [name for name in wanted if name not in parameters and name.rpartition(".")[0] + "." not in stacked]
    missing += [module.rstrip(".") for module in stacked if module.rstrip(".") not in experts]
    used = {source for ref in parameters.values() for source in ref.sources}
    used |= {
        source for refs in experts.values() for part in refs.named().values() for ref in part for source in ref.sources
    }
    unused = tuple(name for name in checkpoint.tensors if name not in used)
    return WeightMap(checkpoint.path, parameters, experts, mla, _not_ignored(model, missing), unused)


def _wanted_shapes(model: PreTrainedModel) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _add_tied(model: PreTrainedModel, parameters: dict[str, TensorRef]) -> None:
    """Let a tied parameter (usually `lm_head.weight`) read what it is tied to."""
    for target, source in model.all_tied_weights_keys.items():
        if target not in parameters and source in parameters:
            parameters[target] = parameters[source]
        elif source not in parameters and target in parameters:
            parameters[source] = parameters[target]


def _not_ignored(model: PreTrainedModel, missing: list[str]) -> tuple[str, ...]:
    """Leave out what transformers says may be missing."""
    patterns = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_missing or ()]
    return tuple(sorted(name for name in missing if not any(pattern.search(name) for pattern in patterns)))
