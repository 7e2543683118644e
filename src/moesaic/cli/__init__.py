"""The `moesaic` command: parses, calls the engine, prints. It decides nothing about models."""
