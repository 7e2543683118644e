"""Kernels on a GPU, written in Triton so that NVIDIA and AMD share them. It knows no model.

Nothing here is imported unless a plan places something on a GPU. With TRITON_INTERPRET=1 in the environment the same
kernels run in Triton's interpreter on tensors of the CPU, which is how they are tested without a GPU.
"""
