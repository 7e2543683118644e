"""The demo model: its data, tokenizer, training, evaluation and export. Not part of the installed package."""
