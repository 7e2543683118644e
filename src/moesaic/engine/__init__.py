"""Checkpoint + plan -> running model. It knows every layer to its left and no command line."""
