"""Worker: the routed experts of kt-kernel 0.7.2, called as its own wrappers call the extension.

Runs in any environment that has `kt-kernel` (installed with --no-deps), its imports (torch, numpy, safetensors, gguf)
and nothing of ours. GGUF blocks come as a file from the process that drives the comparison.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from worker import serve
from workload import GGUF_TYPES, PAIRINGS, Dims

_MAX_TOKENS = 512
_BF16 = 30  # ggml's number
_GROUP_SIZE = {"RAWINT4": 32, "FP8": 128}
# Classes of the extension, best first; a variant for a lesser processor lacks some.
_CLASSES = {
    "AMXINT4": ("AMXInt4_MOE",),
    "AMXINT8": ("AMXInt8_MOE",),
    "BF16": ("AMXBF16_MOE", "AVX2BF16_MOE"),
    "FP8": ("AMXFP8_MOE", "AVX2FP8_MOE"),
    "LLAMAFILE": ("MOE",),
}

Part = tuple[int, int]  # rows, columns


class KtKernel:
    """Experts in kt-kernel's memory."""

    def __init__(self, request: dict[str, Any], dims: Dims) -> None:
        import kt_kernel

        self._extension = kt_kernel.kt_kernel_ext
        self._request, self._dims = request, dims
        pairing = PAIRINGS[request["pairing"]]
        self._backend = pairing.backend
        self.expert_bytes = pairing.expert_bytes(dims)
        self._pool = self._make_pool(request["threads"], request["numa_nodes"])
        make = self._class()
        self.detail = f"{kt_kernel.__version__} {kt_kernel.__cpu_variant__} {make.__name__}"
        self._map = torch.arange(request["num_experts"], dtype=torch.int64)
        self._kept: list[Any] = []
        self._layers = [self._load(make, layer) for layer in range(request["num_layers"])]
        ctypes.CDLL(None).malloc_trim(0)

    def prepare(self, layer: int, x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> Callable[[], object]:
        """See `worker.Program`."""
        moe, pool = self._layers[layer], self._pool
        source = x.to(torch.bfloat16).contiguous()
        out = torch.empty_like(source)
        count = torch.tensor([len(x)], dtype=torch.int32)

        def step() -> torch.Tensor:
            task = moe.forward_task(
                count.data_ptr(),
                index.shape[1],
                index.data_ptr(),
                weights.data_ptr(),
                source.data_ptr(),
                out.data_ptr(),
                False,
            )
            pool.submit(task)
            pool.sync()
            return out

        return step

    def _make_pool(self, threads: int, numa_nodes: int) -> Any:
        config = self._extension.WorkerPoolConfig()
        config.subpool_count = numa_nodes
        config.subpool_numa_map = list(range(numa_nodes))
        config.subpool_thread_count = [
            threads // numa_nodes + (node < threads % numa_nodes) for node in range(numa_nodes)
        ]
        return self._extension.CPUInfer(config)

    def _class(self) -> Any:
        if self._backend == "RAWINT4":
            from kt_kernel.utils.amx import _select_rawint4_backend

            found = _select_rawint4_backend(_GROUP_SIZE["RAWINT4"])
        else:
            names = _CLASSES[self._backend]
            found = next((c for name in names if (c := getattr(self._extension.moe, name, None)) is not None), None)
        if found is None:
            import kt_kernel

            raise RuntimeError(f"this processor's variant ({kt_kernel.__cpu_variant__}) has no {self._backend}")
        return found

    def _load(self, make: Any, layer: int) -> Any:
        dims, num_experts = self._dims, self._request["num_experts"]
        config = self._extension.moe.MOEConfig(num_experts, dims.top_k, dims.hidden, dims.intermediate, 0)
        config.layer_idx = layer
        config.pool = self._pool.backend_
        config.max_len = _MAX_TOKENS
        if self._backend in _GROUP_SIZE:
            config.quant_config.bits = 4 if self._backend == "RAWINT4" else 8
            config.quant_config.group_size = _GROUP_SIZE[self._backend]
            config.quant_config.zero_point = False
        sources = self._fill(config)
        moe = make(config)
        self._pool.submit(moe.load_weights_task(self._map.data_ptr()))
        self._pool.sync()
        if self._backend in ("RAWINT4", "LLAMAFILE"):  # the sources can be what is computed with
            self._kept.append(sources)
        return moe

    def _fill(self, config: Any) -> list[Any]:
        """Point the configuration to weights; what is returned must live until they are loaded."""
        hidden, intermediate = self._dims.hidden, self._dims.intermediate
        parts = {"gate": (intermediate, hidden), "up": (intermediate, hidden), "down": (hidden, intermediate)}
        if self._backend == "LLAMAFILE":
            return self._fill_gguf(config, parts)
        if self._backend in ("AMXINT4", "AMXINT8"):  # rounded by kt-kernel while it loads
            tensors = {name: _bf16(self._request["num_experts"], *shape) for name, shape in parts.items()}
            for name, tensor in tensors.items():
                setattr(config, f"{name}_proj", tensor.data_ptr())
            return list(tensors.values())
        return self._fill_native(config, parts)

    def _fill_gguf(self, config: Any, parts: dict[str, Part]) -> list[Any]:
        number, block_size, _ = GGUF_TYPES[self._request["pairing"]]
        blocks = np.load(self._request["blocks"], allow_pickle=False)
        config.m_block, config.group_min_len, config.group_max_len = 32, 10, _MAX_TOKENS
        config.hidden_type = _BF16
        sources = []
        for name, (rows, cols) in parts.items():
            count = self._request["num_experts"] * rows * cols // block_size
            source = np.resize(blocks, (count, blocks.shape[1]))
            setattr(config, f"{name}_proj", source.ctypes.data)
            setattr(config, f"{name}_type", number)
            sources.append(source)
        return sources

    def _fill_native(self, config: Any, parts: dict[str, Part]) -> list[Any]:
        """Pointers per expert, as for checkpoints; where kt-kernel copies them all point to one expert."""
        sources: list[Any] = []
        num_experts = self._request["num_experts"]
        distinct = num_experts if self._backend == "RAWINT4" else 1
        for name, shape in parts.items():
            made = [_NATIVE[self._backend](*shape)]
            made += [tuple(part.clone() for part in made[0]) for _ in range(distinct - 1)]
            sources.extend(made)
            weights, scales = zip(*made, strict=True)
            repeat = num_experts // distinct
            setattr(config, f"{name}_projs", [[tensor.data_ptr() for tensor in weights] * repeat])
            addresses = [0 if tensor is None else tensor.data_ptr() for tensor in scales]
            setattr(config, f"{name}_scales", [addresses * repeat])
        return sources


def _bf16(num_experts: int, rows: int, cols: int) -> torch.Tensor:
    stack = torch.empty(num_experts, rows, cols, dtype=torch.bfloat16)
    stack[:] = (torch.randn(rows, cols) * 0.02).to(torch.bfloat16)
    return stack


def _native_bf16(rows: int, cols: int) -> tuple[torch.Tensor, None]:
    return _bf16(1, rows, cols), None


def _native_fp8(rows: int, cols: int) -> tuple[torch.Tensor, torch.Tensor]:
    values = torch.randn(rows, cols).to(torch.float8_e4m3fn).view(torch.uint8)
    return values, torch.full((math.ceil(rows / 128), math.ceil(cols / 128)), 0.02)


def _native_int4(rows: int, cols: int) -> tuple[torch.Tensor, torch.Tensor]:
    packed = torch.randint(-(2**31), 2**31, (rows, cols // 8), dtype=torch.int64).to(torch.int32)
    return packed, torch.full((rows, cols // 32), 0.004, dtype=torch.bfloat16)


_NATIVE: dict[str, Callable[[int, int], tuple[torch.Tensor, torch.Tensor | None]]] = {
    "BF16": _native_bf16,
    "FP8": _native_fp8,
    "RAWINT4": _native_int4,
}


if __name__ == "__main__":
    serve(KtKernel)
