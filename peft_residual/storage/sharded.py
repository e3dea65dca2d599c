"""Gathering sharded weights: FSDP2's `DTensor`s, and DeepSpeed ZeRO-3's parameters, which are empty until gathered."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta

import torch.distributed
from torch import Tensor, nn


# Processes of one training run are seconds apart. A process group's own timeout is half an hour, without a reason.
PATIENCE = timedelta(minutes=3)


def is_sharded(module: nn.Module) -> bool:
    """Whether this process holds only a part of the module's parameters."""
    return any(hasattr(p, "ds_id") or hasattr(p, "full_tensor") for p in module.parameters())


@contextmanager
def gathered(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Gather ZeRO-3's parameters within the block, for reading. Every process must enter the block.

    Raises:
        RuntimeError: If not all processes arrive within `PATIENCE`.
    """
    partitioned = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    if not partitioned:
        yield
        return
    _wait_for_all_processes()
    import deepspeed

    with deepspeed.zero.GatheredParameters(partitioned):
        yield


def gathered_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Move tensors to the CPU and gather `DTensor`s. If there are any, every process must call this function.

    Raises:
        RuntimeError: If not all processes arrive within `PATIENCE`.
    """
    if any(hasattr(tensor, "full_tensor") for tensor in tensors.values()):
        _wait_for_all_processes()
    return {
        name: (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().cpu()
        for name, tensor in tensors.items()
    }


def gathered_state(module: nn.Module, prefix: str = "") -> dict[str, Tensor]:
    """Copy a module's gathered parameters and buffers to the CPU. If it is sharded, every process must call this.

    Raises:
        RuntimeError: If not all processes arrive within `PATIENCE`.
    """
    with gathered(module.parameters()):
        # Not `state_dict()`: within a forward pass, FSDP2 would reshard parameters that the pass still needs.
        tensors = gathered_tensors(dict([*module.named_parameters(prefix), *module.named_buffers(prefix)]))
        return {name: tensor.clone() for name, tensor in tensors.items()}


def _wait_for_all_processes() -> None:
    barrier = torch.distributed.barrier(async_op=True)
    try:
        barrier.wait(PATIENCE)
    except RuntimeError as error:
        raise RuntimeError(
            f"The weights are sharded over {torch.distributed.get_world_size()} processes (FSDP2 or ZeRO-3). All "
            f"must help to gather them, but not all came within {PATIENCE.total_seconds():.0f} seconds. Call this in "
            "every process, not only in the main one (`save_pretrained(..., is_main_process=...)` has one write)."
        ) from error
