"""What a model family must say for its GGUF files to be read and written: keys of its config, names, row orders.

`models/<model_type>.py` subclasses `Family` for one architecture and is found by its name. Names of tensors come from
the map of the `gguf` package; a family adds only what that map does not say. Safetensors need no family: transformers
knows them. This module does not know how references are resolved (`gguf_map.py`) or files written (`gguf_export.py`).

Sources: the GGUF specification, and the keys and tensors that llama.cpp's converter writes (tests compare with it).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final

import gguf
import numpy as np
from transformers import PretrainedConfig, PreTrainedModel

from moesaic.errors import UnsupportedModelError
from moesaic.models.gguf_metadata import GgufMetadata
from moesaic.models.tensor_ref import MlaRefs, TensorRef, Transform
from moesaic.weights import TensorInfo

__all__ = ["COMMON_KEYS", "MOE_KEYS", "Family", "Key", "OutputTensor", "ValueMap", "split_head_order"]


REQUIRED: Final = object()


@dataclass(frozen=True, slots=True)
class Key:
    """One config field and the GGUF key that carries it.

    Attributes:
        field: field of the Hugging Face config.
        key: GGUF key without the architecture's prefix.
        kind: type of the value.
        default: value of the field where a file lacks the key; `REQUIRED` refuses such a file.
    """

    field: str
    key: str
    kind: type[int] | type[float] | type[bool]
    default: object = REQUIRED


COMMON_KEYS: tuple[Key, ...] = (
    Key("max_position_embeddings", "context_length", int),
    Key("hidden_size", "embedding_length", int),
    Key("intermediate_size", "feed_forward_length", int),
    Key("num_attention_heads", "attention.head_count", int),
    Key("num_key_value_heads", "attention.head_count_kv", int),
    Key("rms_norm_eps", "attention.layer_norm_rms_epsilon", float),
)
MOE_KEYS: tuple[Key, ...] = (Key("num_experts_per_tok", "expert_used_count", int),)


@dataclass(frozen=True, slots=True)
class OutputTensor:
    """One tensor of a GGUF to be written.

    Attributes:
        name: name in the GGUF.
        shape: row-major, K last.
        parts: references whose rows, one after the other, make the tensor.
        parameter: the stock parameter (for stacked experts: module and projection) that it holds, for rules by role.
    """

    name: str
    shape: tuple[int, ...]
    parts: tuple[TensorRef, ...]
    parameter: str


@dataclass(frozen=True, slots=True)
class ValueMap:
    """A parameter that GGUF stores as other numbers: `load` gives the parameter, `save` the stored values."""

    load: Transform
    save: Transform


def split_head_order(num_heads: int, head_dim: int) -> np.ndarray:
    """Rows of a GGUF projection, in the order that transformers wants them, for rotary pairs stored interleaved.

    llama.cpp's llama architecture rotates pairs (0, 1), (2, 3), ...; transformers rotates (0, d/2), (1, d/2 + 1), ...
    The converter therefore interleaves the two halves of each head's rows; this is the inverse, int64 `[rows]`.

    Raises:
        UnsupportedModelError: `head_dim` is odd, so that there are no pairs.
    """
    if head_dim % 2:
        raise UnsupportedModelError(f"heads of {head_dim} values cannot be rotated in pairs: expected an even number.")
    stored = np.arange(num_heads * head_dim, dtype=np.int64).reshape(num_heads, head_dim // 2, 2)
    return stored.transpose(0, 2, 1).reshape(-1)


class Family:
    """One architecture as GGUF files hold it; subclasses are stateless.

    Attributes:
        model_type: transformers' name of the architecture.
        architecture: GGUF's name of it (`general.architecture`).
        keys: config fields that a GGUF key carries one to one.
        constants: config fields that llama.cpp fixes for the architecture and no key carries.
        expert_count_field: config field with the number of routed experts.
        head_dim_from_key_length: whether `attention.key_length` is the config's `head_dim`.
        aliases: parameter name inside a layer -> tensor name inside a block, where gguf's map has no entry.
    """

    model_type: ClassVar[str]
    architecture: ClassVar[str]
    keys: ClassVar[tuple[Key, ...]] = COMMON_KEYS + MOE_KEYS
    constants: ClassVar[Mapping[str, Any]] = {}
    expert_count_field: ClassVar[str] = "num_experts"
    head_dim_from_key_length: ClassVar[bool] = True
    aliases: ClassVar[Mapping[str, str]] = {}

    # ---- config ------------------------------------------------------------------------------------------------

    def claims(self, metadata: GgufMetadata) -> bool:
        """Whether a file of this architecture is of this family (an architecture may serve several)."""
        return True

    def config_fields(self, metadata: GgufMetadata) -> dict[str, Any]:
        """Fields of the Hugging Face config that a file describes; subclasses add their own."""
        fields: dict[str, Any] = dict(self.constants)
        for key in self.keys:
            if metadata.has(key.key) or key.default is REQUIRED:
                fields[key.field] = metadata.value(key.key, key.kind)
            else:
                fields[key.field] = key.default
        fields["num_hidden_layers"] = metadata.num_layers
        fields["vocab_size"] = metadata.vocab_size
        fields["tie_word_embeddings"] = not metadata.has_tensor("output.weight")
        fields[self.expert_count_field] = metadata.integer("expert_count")
        if self.head_dim_from_key_length and metadata.has("attention.key_length"):
            fields["head_dim"] = metadata.integer("attention.key_length")
        fields["rope_parameters"] = self.rope_fields(metadata)
        fields |= metadata.special_tokens()
        return fields

    def rope_fields(self, metadata: GgufMetadata) -> dict[str, Any]:
        """`rope_parameters` of the config: base frequency and scaling."""
        fields: dict[str, Any] = {"rope_type": "default", "rope_theta": metadata.real("rope.freq_base", 10000.0)}
        scaling = metadata.text("rope.scaling.type", "none")
        if scaling in ("linear", "yarn"):
            fields |= {"rope_type": scaling, "factor": metadata.real("rope.scaling.factor")}
        if scaling == "yarn":
            fields |= {
                "original_max_position_embeddings": metadata.integer("rope.scaling.original_context_length"),
                "beta_fast": metadata.real("rope.scaling.yarn_beta_fast", 32.0),
                "beta_slow": metadata.real("rope.scaling.yarn_beta_slow", 1.0),
            }
        elif scaling not in ("none", "linear"):
            raise metadata.unsupported("rope.scaling.type", scaling, "none, linear or yarn")
        return fields

    def metadata(self, config: PretrainedConfig) -> dict[str, Any]:
        """GGUF key-values (with the architecture's prefix) that describe `config`; the inverse of `config_fields`."""
        values: dict[str, Any] = {"block_count": config.num_hidden_layers, "vocab_size": config.vocab_size}
        for key in self.keys:
            value = getattr(config, key.field, None)
            if value is not None:
                values[key.key] = key.kind(value)
        values["expert_count"] = getattr(config, self.expert_count_field)
        head_dim = getattr(config, "head_dim", None)
        if self.head_dim_from_key_length and head_dim is not None:
            values |= {"attention.key_length": head_dim, "attention.value_length": head_dim}
        values |= self.rope_metadata(config)
        return {f"{self.architecture}.{key}": value for key, value in values.items()}

    def rope_metadata(self, config: PretrainedConfig) -> dict[str, Any]:
        """GGUF keys (without prefix) for `config.rope_parameters`."""
        rope = config.rope_parameters or {}
        values: dict[str, Any] = {"rope.freq_base": float(rope.get("rope_theta", 10000.0))}
        if rope.get("rope_type") in ("linear", "yarn"):
            values |= {"rope.scaling.type": rope["rope_type"], "rope.scaling.factor": float(rope["factor"])}
        if rope.get("rope_type") == "yarn":
            values |= {
                "rope.scaling.original_context_length": int(rope["original_max_position_embeddings"]),
                "rope.scaling.yarn_beta_fast": float(rope.get("beta_fast") or 32.0),
                "rope.scaling.yarn_beta_slow": float(rope.get("beta_slow") or 1.0),
            }
        return values

    # ---- tensors -----------------------------------------------------------------------------------------------

    def tensor_name(self, parameter: str, names: gguf.TensorNameMap) -> str | None:
        """Name in the GGUF of a stock parameter outside the routed experts; None if it has none."""
        prefix, _, rest = parameter.removeprefix("model.layers.").partition(".")
        if parameter.startswith("model.layers.") and rest in self.aliases:
            return f"blk.{prefix}.{self.aliases[rest]}"
        found = names.get_name(parameter, try_suffixes=(".weight", ".bias"))
        return None if found is None else str(found)

    def row_order(self, parameter: str, config: PretrainedConfig) -> np.ndarray | None:
        """Rows of the GGUF's tensor in the order that the parameter wants; None if they are the same."""
        return None

    def value_map(self, parameter: str) -> ValueMap | None:
        """How the stored values differ from the parameter's; None if they are the same."""
        return None

    def special_refs(self, model: PreTrainedModel, tensors: Mapping[str, TensorInfo]) -> dict[str, TensorRef]:
        """References for parameters that no single tensor holds as it is, by parameter name."""
        return {}

    def mla_refs(self, model: PreTrainedModel, tensors: Mapping[str, TensorInfo]) -> dict[str, MlaRefs]:
        """Split halves of `kv_b_proj`, by the attention module's name."""
        return {}

    def special_outputs(
        self, config: PretrainedConfig, parameters: Mapping[str, TensorRef], mla: Mapping[str, MlaRefs]
    ) -> Sequence[OutputTensor]:
        """The inverse of `special_refs`: tensors to write for parameters that are stored in another way."""
        return ()
