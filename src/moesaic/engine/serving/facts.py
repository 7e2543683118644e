"""What a server tells people of the model that it serves."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass

from moesaic.engine.loader import Prepared
from moesaic.quant import format_from_ggml, get_format

__all__ = ["ModelFacts"]


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """Of a loaded model.

    Attributes:
        path: MODEL as it was given.
        family: the model type.
        container: what its files are: gguf, safetensors or synthetic.
        format: the format that most bytes of its weights have, as the file has it.
        parameters: number of weights.
        nbytes: of the weights in memory.
        digest: of the names and sizes of its files, hexadecimal.
        notes: what people should know of how it is served, one sentence each.
    """

    path: str
    family: str
    container: str
    format: str
    parameters: int
    nbytes: int
    digest: str
    notes: tuple[str, ...] = ()

    @classmethod
    def of(cls, path: str, prepared: Prepared) -> ModelFacts:
        """Of a model that is about to be loaded."""
        plan, sizes = prepared.plan, Counter[str]()
        for entry in plan.entries:
            for name in entry.formats.values():
                recoded = get_format(name).recodes
                in_file = name if recoded is None else format_from_ggml(recoded).name
                sizes[in_file] += entry.nbytes // len(entry.formats)
        files = {info.file for info in prepared.checkpoint.tensors.values()}
        named = sorted((file.name, file.stat().st_size if file.is_file() else 0) for file in files)
        return cls(
            path=path,
            family=str(prepared.config.model_type),
            container=prepared.checkpoint.kind,
            format=max(sizes, key=sizes.__getitem__, default=""),
            parameters=sum(parameter.numel() for parameter in prepared.model.parameters()),
            nbytes=plan.nbytes,
            digest=hashlib.sha256(repr(named).encode()).hexdigest(),
            notes=plan.notes,
        )
