"""Reads and writes model files: GGUF, safetensors, the hub. It knows no model architecture."""

from moesaic.weights.checkpoint import Checkpoint, TensorInfo, find_tensor, open_checkpoint
from moesaic.weights.gguf_writer import GgufWriter

__all__ = ["Checkpoint", "GgufWriter", "TensorInfo", "find_tensor", "open_checkpoint"]
