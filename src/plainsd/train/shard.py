"""Sharding of weights, gradients and optimizer states over processes (PyTorch's FSDP2; Rajbhandari et al. 2019, "ZeRO",
arXiv:1910.02054), for models that do not fit on one GPU. Each process holds a part of every tensor; a block is gathered
only while it computes.

A checkpoint is then a folder of shards, written by all processes, and can be loaded by another number of them.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from plainsd.models.unet import UNet


def shard(network: nn.Module) -> None:
    """Shards a UNet or a text encoder in place, block by block. Call it before creating the optimizer."""
    network.to(memory_format=torch.contiguous_format)  # FSDP2 supports no other
    blocks = [*network.down, network.mid, *network.up] if isinstance(network, UNet) else list(network.blocks)
    mesh = init_device_mesh(next(network.parameters()).device.type, (dist.get_world_size(),))
    for module in (*blocks, network):
        fully_shard(module, mesh=mesh, reshard_after_forward=True)
    for module in (*blocks, network):  # buffers are made now, not in a sample's inference mode
        module.unshard()
        module.reshard()


@torch.no_grad()
def gather(network: nn.Module) -> None:
    """Gathers the whole weights on every process, for saving; the network cannot run afterwards."""
    for module in network.modules():
        if isinstance(module, FSDPModule):
            module.__class__ = type(module).__bases__[1]  # FSDP2 has made it a subclass of what it was
        for name, parameter in module.named_parameters(recurse=False):
            if isinstance(parameter, DTensor):
                module.register_parameter(name, nn.Parameter(parameter.full_tensor(), parameter.requires_grad))


def whole_tensor(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
