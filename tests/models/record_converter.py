"""Records what llama.cpp's converter makes of the tiny models, as the oracle of `test_converter.py`.

    python -m tests.models.record_converter PATH/TO/llama.cpp dots1 [more families]

Needs a checkout of llama.cpp (its `conversion` and `gguf-py` packages are imported, nothing is built). Families that
are not named keep their record. Run it in a process of its own: llama.cpp's gguf package goes before the installed one.
"""

from __future__ import annotations

import json
import sys
import tempfile
import zlib
from pathlib import Path
from typing import Any

RECORD = Path(__file__).parent / "converter_output.json"
SOURCE = (
    "llama.cpp's convert_hf_to_gguf (the version in llama-cpp-python 0.3.36), --outtype f32, on tests.tiny_models with "
    "fill_with_pattern; tensors: shape and CRC-32 of the bytes"
)
# What published checkpoints have in config.json, though transformers' own configs do not write it.
PUBLISHED: dict[str, dict[str, Any]] = {
    "deepseek_v3": {"scoring_func": "sigmoid"},
    "minimax_m2": {"scoring_func": "sigmoid", "rotary_dim": 32},
    "hunyuan_v1_moe": {"moe_intermediate_size": [256] * 3, "num_shared_expert": [1] * 3, "moe_topk": [2] * 3},
}


def convert(folder: Path, output: Path) -> None:
    """Run the converter on a folder, without a vocabulary."""
    import gguf
    from conversion import ModelBase, ModelType, get_model_class
    from conversion.base import get_model_architecture

    architecture = get_model_architecture(ModelBase.load_hparams(folder, False), ModelType.TEXT)
    converter = get_model_class(architecture)
    converter.set_vocab = lambda self: None
    converter.no_mtp = True
    converter(folder, gguf.LlamaFileType.ALL_F32, output, eager=True).write()


def record(path: Path) -> dict[str, Any]:
    """Metadata of the architecture, shape and CRC-32 of every tensor."""
    from moesaic.weights import open_checkpoint

    checkpoint = open_checkpoint(path)
    architecture = str(checkpoint.metadata["general.architecture"])
    own = {key: value for key, value in checkpoint.metadata.items() if key.startswith(f"{architecture}.")}
    return {
        "architecture": architecture,
        "metadata": {key: value.tolist() if hasattr(value, "tolist") else value for key, value in own.items()},
        "tensors": {
            name: [list(info.shape), zlib.crc32(checkpoint.raw(name).tobytes())]
            for name, info in checkpoint.tensors.items()
        },
    }


def save(families: dict[str, Any]) -> None:
    """Write the record with one line per family and part, so that changes can be read."""
    entries = []
    for name, entry in sorted(families.items()):
        parts = [f"{json.dumps(key)}:{json.dumps(value, separators=(',', ':'))}" for key, value in entry.items()]
        entries.append(f"{json.dumps(name)}:{{" + ",\n ".join(parts) + "}")
    RECORD.write_text(f'{{"source":{json.dumps(SOURCE)},"families":{{\n' + ",\n".join(entries) + "\n}}\n")


def main() -> None:
    """Record the families named on the command line."""
    llama_cpp = Path(sys.argv[1])
    sys.path[:0] = [str(llama_cpp), str(llama_cpp / "gguf-py")]
    from tests.tiny_models import fill_with_pattern, make_tiny_model

    families = json.loads(RECORD.read_text())["families"]
    for family in sys.argv[2:]:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            fill_with_pattern(make_tiny_model(family)).save_pretrained(folder)
            config = json.loads((folder / "config.json").read_text()) | PUBLISHED.get(family, {})
            (folder / "config.json").write_text(json.dumps(config))
            convert(folder, folder / "model.gguf")
            families[family] = record(folder / "model.gguf")
    save(families)


if __name__ == "__main__":
    main()
