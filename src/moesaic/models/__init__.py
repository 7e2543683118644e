"""What an architecture is: its config from a checkpoint's metadata, and which tensor feeds which module."""

from moesaic.models.config import config_for
from moesaic.models.expert_layout import expert_modules, stock_experts
from moesaic.models.generation import generation_config_for, sampling_metadata
from moesaic.models.gguf_export import gguf_metadata, gguf_tensors
from moesaic.models.synthetic_map import synthetic_checkpoint
from moesaic.models.tensor_ref import ExpertRefs, MlaRefs, TensorRef
from moesaic.models.tokenizer import LoadedTokenizer, load_tokenizer
from moesaic.models.tokenizer_export import tokenizer_metadata
from moesaic.models.weight_map import WeightMap, build_meta_model, build_weight_map

__all__ = [
    "ExpertRefs",
    "LoadedTokenizer",
    "MlaRefs",
    "TensorRef",
    "WeightMap",
    "build_meta_model",
    "build_weight_map",
    "config_for",
    "expert_modules",
    "generation_config_for",
    "gguf_metadata",
    "gguf_tensors",
    "load_tokenizer",
    "sampling_metadata",
    "stock_experts",
    "synthetic_checkpoint",
    "tokenizer_metadata",
]
