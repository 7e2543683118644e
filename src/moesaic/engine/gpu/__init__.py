"""Runs a model whose plan places something on a GPU: steps, graphs, and who computes which expert.

Nothing here is imported unless a plan asks for it.
"""
