"""From the training run to what is shipped: a stock checkpoint folder, and the GGUF inside the package.

python -m demo.export --run DIR --checkpoint DIR/checkpoint     # BF16 safetensors with config and tokenizer
moesaic quantize DIR/checkpoint src/moesaic/demo/demo.gguf --format Q4_K
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import DeepseekV3ForCausalLM, GenerationConfig
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

from demo.model_config import demo_config
from demo.train import DEFAULT_TOKENIZER

__all__ = ["export_checkpoint"]


def export_checkpoint(run: Path, folder: Path, tokenizer: Path = DEFAULT_TOKENIZER) -> None:
    """Write the stock checkpoint of a training run.

    Args:
        run: folder that `demo.train` wrote.
        folder: where config, safetensors, generation settings and tokenizer go.
        tokenizer: the tokenizer's folder.

    Raises:
        RuntimeError: the run's weights are not those of `demo_config()`.
    """
    config = demo_config()
    model = DeepseekV3ForCausalLM(config).to(torch.bfloat16)
    for module in model.modules():
        if isinstance(module, DeepseekV3TopkRouter):  # stays float32 in the stock model too
            module.e_score_correction_bias = module.e_score_correction_bias.float()
    model.load_state_dict(load_file(run / "model.safetensors"), strict=True)
    model.generation_config = GenerationConfig(
        do_sample=False, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    )
    model.save_pretrained(folder)
    for file in tokenizer.iterdir():
        shutil.copy(file, folder / file.name)


def main() -> None:
    """Export the run that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="folder that demo.train wrote")
    parser.add_argument("--checkpoint", type=Path, required=True, help="folder to write")
    arguments = parser.parse_args()
    export_checkpoint(arguments.run, arguments.checkpoint)


if __name__ == "__main__":
    main()
