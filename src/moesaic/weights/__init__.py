"""Reads and writes model files: GGUF, safetensors, the hub. It knows no model architecture."""

from moesaic.weights.checkpoint import Checkpoint, TensorInfo, find_tensor, open_checkpoint

__all__ = ["Checkpoint", "TensorInfo", "find_tensor", "open_checkpoint"]
