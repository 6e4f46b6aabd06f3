"""AdamW (Loshchilov and Hutter 2017, arXiv:1711.05101), with moments in float32 or, through torchao, in 8 bits; and
Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon), for the matrices of hidden layers."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from plainsd.device import check_can_compile
from plainsd.errors import UserError
from plainsd.train.options import FitOptions

OUTER = ("conv_in", "conv_out")  # first and last layers
JUDGES = ("discriminator.convs.0", "discriminator.out")  # likewise
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # Muon's coefficients of x, (x x^T) x and (x x^T)^2 x
ROUNDS = 5
MOMENTUM = 0.95


def make_optimizer(modules: nn.Module, options: FitOptions) -> torch.optim.Optimizer:
    """For the parameters that require gradients. No weight decay for norms and biases, which are one-dimensional, and
    for DoRA's magnitudes.

    PyTorch's fused step reads each tensor once; it does not support sharded weights.
    """
    named = [(name, p) for name, p in modules.named_parameters() if p.requires_grad]
    parameters = [p for _, p in named]
    plain = [p for name, p in named if p.ndim < 2 or name.endswith(".magnitude")]
    decayed = [p for p in parameters if not any(p is other for other in plain)]
    groups = [{"params": decayed, "weight_decay": options.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    numbers: dict[str, Any] = {"lr": options.lr, "betas": options.betas, "eps": options.eps}
    if options.adam8bit:
        return adam8bit(parameters[0].device)([group for group in groups if group["params"]], **numbers)
    numbers["fused"] = not any(isinstance(p, DTensor) for p in parameters)
    if options.muon:
        return Muon(groups, hidden_matrices(modules), torch.bfloat16 if options.bf16 else torch.float32, **numbers)
    return torch.optim.AdamW(groups, **numbers)


def hidden_matrices(modules: nn.Module, judges: Collection[str] = JUDGES) -> list[nn.Parameter]:
    """The weights of linear layers and convolutions, but for first and last layers; a shared one once."""
    found = {
        id(module.weight): module.weight
        for name, module in modules.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d) and not (name.rpartition(".")[2] in OUTER or name in judges)
    }
    return [weight for weight in found.values() if weight.requires_grad and not is_narrow(weight)]


def is_narrow(p: nn.Parameter) -> bool:
    """Whether it has one row or column at most."""
    return p.ndim == 0 or p.numel() == max(p.shape)


def in_groups(saved: dict[str, Any], optimizer: torch.optim.Optimizer, modules: nn.Module) -> dict[str, Any]:
    """A saved state in the optimizer's own groups. Older versions took narrow matrices for vectors, which do not decay,
    and a discriminator's first and last layers for hidden ones: those, which have no moments of AdamW, begin anew."""
    own = optimizer.param_groups
    if [len(group["params"]) for group in saved["param_groups"]] == [len(group["params"]) for group in own]:
        return saved
    muon = isinstance(optimizer, Muon)
    matrices = {id(p) for p in hidden_matrices(modules, ())} if muon else set()
    parameters = [p for p in modules.parameters() if p.requires_grad]
    before = sorted(parameters, key=lambda p: (is_narrow(p), id(p) in matrices))
    if sum(len(group["params"]) for group in saved["param_groups"]) != len(before):
        return saved  # another model's, which PyTorch says
    states = {id(p): saved["state"].get(place, {}) for place, p in enumerate(before)}
    kept: dict[int, Any] = {}
    place = 0
    for group in own:
        for p in group["params"]:
            if states[id(p)] and ("momentum" in states[id(p)]) == group.get("matrix", False):
                kept[place] = states[id(p)]
            place += 1
    return {"state": kept, "param_groups": optimizer.state_dict()["param_groups"]}


class Muon(torch.optim.AdamW):
    """AdamW but for matrices of hidden layers, whose step is the orthogonal matrix nearest to their momentum: of the
    momentum U S V^T it is U V^T, so that all directions of a layer move alike.

    Times 0.2 sqrt(larger side) it is about as large as AdamW's step, and takes AdamW's rates and weight decay (Liu et
    al. 2025, arXiv:2502.16982, equation 4). A convolution is the matrix (outputs, inputs x height x width). `dtype`: of
    the orthogonalization.
    """

    def __init__(self, groups: list[dict], matrices: Collection[nn.Parameter], dtype: torch.dtype, **numbers: Any):
        wanted = {id(p) for p in matrices}
        parts = []
        for group in groups:
            for matrix in (False, True):
                own = [p for p in group["params"] if (id(p) in wanted) == matrix]
                parts.append(group | {"params": own, "matrix": matrix})
        super().__init__(parts, **numbers)
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure=None):  # type: ignore[override]
        for group in self.param_groups:
            if group["matrix"]:
                self._step_of_matrices([p for p in group["params"] if p.grad is not None], group)
                for p in group["params"]:
                    p.grad = None  # AdamW passes it by
        return super().step(closure)

    def _step_of_matrices(self, parameters: list[nn.Parameter], group: dict[str, Any]) -> None:
        alike: dict[tuple[int, ...], list[tuple[nn.Parameter, Tensor]]] = {}  # by shape, for one product each
        for p in parameters:
            state = self.state[p]
            if not state:
                state |= {"step": torch.zeros(()), "momentum": torch.zeros_like(p)}
            state["step"] += 1
            momentum, gradient = state["momentum"], p.grad
            momentum.lerp_(gradient, 1 - MOMENTUM)
            ahead = gradient.lerp(momentum, MOMENTUM).flatten(1)  # Nesterov's
            alike.setdefault(tuple(ahead.shape), []).append((p, ahead))
        for (rows, columns), entries in alike.items():
            updates = orthogonal(torch.stack([ahead for _, ahead in entries]).to(self.dtype))
            rate = float(group["lr"])
            for (p, _), update in zip(entries, updates, strict=True):
                p.mul_(1 - rate * group["weight_decay"])
                p.sub_(update.view(p.shape).to(p.dtype), alpha=0.2 * max(rows, columns) ** 0.5 * rate)


def orthogonal(matrices: Tensor) -> Tensor:
    """Of each matrix U S V^T about U V^T: (N, R, C) -> (N, R, C). Newton-Schulz iterations of degree 5, which bring
    singular values near 1, to between 0.7 and 1.2."""
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-7)  # all singular values below 1
    a, b, c = NEWTON_SCHULZ
    for _ in range(ROUNDS):
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def adam8bit(device: torch.device) -> type[torch.optim.Optimizer]:
    """Dettmers et al. 2021 (arXiv:2110.02861): blocks of 256 numbers share a scale. A quarter of the memory. UserError
    where it does not work."""
    check_can_compile(device, "--adam8bit")  # its step is one kernel
    try:
        from torchao.optim import AdamW8bit
    except ImportError:
        raise UserError("8-bit AdamW needs torchao; pip install torchao") from None
    return AdamW8bit


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):  # torchao would recompile for each float
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate
