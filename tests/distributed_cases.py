"""Cases of test_distributed.py: two processes with half of a batch each, against one process with all of it."""

import copy
import os
import sys
from collections.abc import Callable
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from odenet_cuda import ODEBlock, solve

GRADIENTS = ("direct", "checkpoint", "adjoint", "quadrature")
# A sample's steps do not depend on the rest of its batch, so that only the order of sums differs.
STEPS = ({"method": "rk4", "step_size": 0.25}, {"step_control": "per_sample", "rtol": 1e-5, "atol": 1e-5})
EXACT = {"rtol": 1e-10, "atol": 1e-12}
TIGHT = {"rtol": 1e-9, "atol": 1e-9}
SOLVED = {"rtol": 1e-6, "atol": 1e-8}  # of a solve at 1e-9
BATCH = 8
Distribute = Callable[[nn.Module], nn.Module]


class Field(nn.Module):
    """A small field that depends on t."""

    def __init__(self, width: int = 4):
        super().__init__()
        self.inner, self.outer = nn.Linear(width, 8), nn.Linear(8, width)

    def forward(self, t, y):
        return self.outer(torch.tanh(self.inner(y))) * torch.cos(t)


class PartlyUsedField(Field):
    """Has a parameter that it does not depend on."""

    def __init__(self):
        super().__init__()
        self.unused = nn.Parameter(torch.ones(5))


class PartlyUsed(nn.Module):
    """Has a layer that it never calls."""

    def __init__(self, **options):
        super().__init__()
        self.layers = sequential(PartlyUsedField(), **options)
        self.unused = nn.Linear(2, 2)

    def forward(self, x):
        return self.layers(x)


def sequential(field: nn.Module, **options) -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), ODEBlock(field, **options), nn.Linear(4, 2))


def sequential_field(**options) -> nn.Sequential:
    return sequential(Field(), **options)


def shared_field(**options) -> nn.Sequential:
    """One field in two blocks."""
    field = Field()
    blocks = ODEBlock(field, **options), ODEBlock(field, (0.0, 0.5), **options)
    return nn.Sequential(nn.Linear(3, 4), blocks[0], nn.Tanh(), blocks[1], nn.Linear(4, 2))


class Closure(nn.Module):
    """Solves with a function that calls its field."""

    def __init__(self, **options):
        super().__init__()
        self.field, self.options = Field(3), options

    def forward(self, x):
        return solve(lambda t, y: self.field(t, y), x, [0.0, 1.0], **self.options).ys[-1]


def whole_batch() -> torch.Tensor:
    return torch.randn(BATCH, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def own_share() -> torch.Tensor:
    return whole_batch().chunk(dist.get_world_size())[dist.get_rank()]


def whole(x: torch.Tensor | None) -> torch.Tensor | None:
    return x.full_tensor() if isinstance(x, DTensor) else x


def train(model: nn.Module, x: torch.Tensor) -> list[dict[str, torch.Tensor | None]]:
    """The parameters' gradients in each of three training steps."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    history = []
    for _ in range(3):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        grads = {name.removeprefix("module."): whole(parameter.grad) for name, parameter in model.named_parameters()}
        history.append({name: None if grad is None else grad.clone() for name, grad in grads.items()})
        optimizer.step()
    return history


def compare(one: nn.Module, distribute: Distribute, tolerances: dict[str, float], words: str) -> None:
    """Trains a copy of `one` in all processes, each with its share, and `one` itself with the whole batch."""
    shared = train(distribute(copy.deepcopy(one)), own_share())
    alone = train(one, whole_batch())
    for step, (found, expected) in enumerate(zip(shared, alone, strict=True)):
        assert found.keys() == expected.keys()
        for name, true in expected.items():
            mine, where = found[name], f"{words}: {name} in step {step}"
            if "unused" in name:
                assert mine is None or not mine.any(), where
                continue
            assert mine is not None and true is not None and true.any(), where
            torch.testing.assert_close(mine, true, msg=lambda text, where=where: f"{where}\n{text}", **tolerances)


def compare_all(build: Callable[..., nn.Module], distribute: Distribute) -> None:
    """By every gradient, with steps that do not depend on the batch and with joint ones."""
    for gradient in GRADIENTS:
        for options in (*STEPS, TIGHT):
            if gradient == "quadrature" and options is STEPS[1]:
                continue  # its backward steps depend on how large the loss is, and each process has a mean of its own
            torch.manual_seed(0)
            model = build(gradient=gradient, **options).double()
            compare(model, distribute, SOLVED if options is TIGHT else EXACT, f"{gradient} with {options}")


def ddp() -> None:
    compare_all(sequential_field, DistributedDataParallel)


def ddp_shared() -> None:
    compare_all(shared_field, DistributedDataParallel)


def ddp_unused() -> None:
    """A layer and a field's parameter that the loss does not depend on."""
    compare_all(PartlyUsed, lambda model: DistributedDataParallel(model, find_unused_parameters=True))


def ddp_unused_in_field() -> None:
    """Every parameter of a field is an input of the solve: DDP need not look for unused ones."""
    compare_all(lambda **options: sequential(PartlyUsedField(), **options), DistributedDataParallel)


def sharded(*names: str) -> Distribute:
    """Shards the submodules of these names, each for itself, and then what is left of the model."""

    def shard(model: nn.Module) -> nn.Module:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for name in names:
            fully_shard(model.get_submodule(name), mesh=mesh)
        return fully_shard(model, mesh=mesh)

    return shard


def fsdp_model() -> None:
    compare_all(sequential_field, sharded())


def fsdp_block() -> None:
    compare_all(sequential_field, sharded("1"))


def fsdp_shared() -> None:
    compare_all(shared_field, sharded())


def refuses(build: Callable[..., nn.Module], name: str) -> None:
    """A solve with gradients says that what is sharded must not be its field; one without gives the right state."""
    for gradient in GRADIENTS:
        for options in STEPS:
            torch.manual_seed(0)
            one = build(gradient=gradient, **options).double()
            model = sharded(name)(copy.deepcopy(one))
            with torch.no_grad():
                torch.testing.assert_close(model(own_share()), one(own_share()), **EXACT)
            with pytest.raises(RuntimeError, match="fully_shard"):
                model(own_share())


def fsdp_field() -> None:
    refuses(sequential_field, "1.func")


def fsdp_layer() -> None:
    refuses(sequential_field, "1.func.inner")


def fsdp_closure() -> None:
    refuses(Closure, "field")


CASES = {
    case.__name__: case
    for case in (
        *(ddp, ddp_shared, ddp_unused, ddp_unused_in_field),
        *(fsdp_model, fsdp_block, fsdp_shared, fsdp_field, fsdp_layer, fsdp_closure),
    )
}

if __name__ == "__main__":
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    for case in sys.argv[1:]:
        CASES[case]()
        if dist.get_rank() == 0:
            print("passed", case, flush=True)
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # gloo's threads now and then abort an interpreter that ends in order
