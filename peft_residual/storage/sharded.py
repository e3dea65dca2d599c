"""Weights that are spread over processes: FSDP2's (`DTensor`s) and DeepSpeed ZeRO-3's (parameters left empty)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta

import torch.distributed
from torch import Tensor, nn


# Processes that train together are seconds apart; a process group's own limit is half an hour, and says nothing.
PATIENCE = timedelta(minutes=3)


def is_sharded(module: nn.Module) -> bool:
    """Whether this process has only parts of the module's parameters."""
    return any(hasattr(p, "ds_id") or hasattr(p, "full_tensor") for p in module.parameters())


@contextmanager
def gathered(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Fill ZeRO-3's parameters for a while, to be read. Every process must enter.

    Raises:
        RuntimeError: If not every process comes within `PATIENCE`.
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
    """Bring tensors to the CPU, `DTensor`s put together. Every process must call it where there are any.

    Raises:
        RuntimeError: If not every process comes within `PATIENCE`.
    """
    if any(hasattr(tensor, "full_tensor") for tensor in tensors.values()):
        _wait_for_all_processes()
    return {
        name: (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().cpu()
        for name, tensor in tensors.items()
    }


def gathered_state(module: nn.Module, prefix: str = "") -> dict[str, Tensor]:
    """Copy a module's parameters and buffers to the CPU, whole. Every process must call it where they are spread.

    Raises:
        RuntimeError: If not every process comes within `PATIENCE`.
    """
    with gathered(module.parameters()):
        # Not `state_dict()`: called within a forward pass, FSDP2 would take apart what the pass still needs.
        tensors = gathered_tensors(dict([*module.named_parameters(prefix), *module.named_buffers(prefix)]))
        return {name: tensor.clone() for name, tensor in tensors.items()}


def _wait_for_all_processes() -> None:
    barrier = torch.distributed.barrier(async_op=True)
    try:
        barrier.wait(PATIENCE)
    except RuntimeError as error:
        raise RuntimeError(
            f"The weights are spread over {torch.distributed.get_world_size()} processes (FSDP2 or ZeRO-3) and only "
            f"whole when all take part, but not all came within {PATIENCE.total_seconds():.0f} seconds. Call this in "
            "every process, not only in the main one (`save_pretrained(..., is_main_process=...)` has one write)."
        ) from error
