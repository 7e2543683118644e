"""A server under load: a client of `/v1/completions`, and a server of this process for a model without a tokenizer."""
