"""Decoder layers whose attention, router and shared experts run on a GPU, and whose routed experts run where they lie.

They are made from the loaded layers of the CPU path (`modules`), whose structure they share, and know neither
checkpoints nor plans. Nothing here is imported unless a plan places something on a GPU.
"""
