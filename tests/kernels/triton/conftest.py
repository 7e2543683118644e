"""Tests of the kernels for a GPU: on one if there is one, otherwise in Triton's interpreter."""

from __future__ import annotations

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
