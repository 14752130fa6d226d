"""Memory that ran out: how to tell, and how to give back what is no longer needed."""

from __future__ import annotations

import gc

import torch

from vicuna.system_errors import MEMORY_WORDS


def is_memory(error: BaseException) -> bool:
    """Whether memory ran out: CUDA has a type for it, the CPU and Apple's GPU only words."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    words = str(error).lower()
    return isinstance(error, RuntimeError) and any(w in words for w in MEMORY_WORDS)


def give_back(device: torch.device) -> None:
    """Free what only cycles hold, and the blocks that PyTorch keeps for later on a GPU.

    Call it outside of `except`: an error that is being handled holds the tensors of its frames.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()
