"""Reads and writes model files: GGUF, safetensors, the hub. It knows no model architecture."""

from moesaic.weights.checkpoint import Checkpoint, Rows, TensorInfo, find_tensor, open_checkpoint
from moesaic.weights.gguf_writer import GgufWriter
from moesaic.weights.resolve import ModelFiles, resolve

__all__ = ["Checkpoint", "GgufWriter", "ModelFiles", "Rows", "TensorInfo", "find_tensor", "open_checkpoint", "resolve"]
