"""A small model that streams in milliseconds, and what every test of a session does with it."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.nn import functional

import blockswap
from blockswap.session import Session

HIDDEN = 256
NUM_BLOCKS = 6
MAX_LEARNING_STEPS = 30
_HOOK_DICTS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_state_dict_hooks",
    "_load_state_dict_pre_hooks",
)


class Block(nn.Module):
    """Three leaf modules that stream (514, 513 and 257 KiB in fp32) and a norm that stays."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(HIDDEN)
        self.up = nn.Linear(HIDDEN, 2 * HIDDEN)
        self.down = nn.Linear(2 * HIDDEN, HIDDEN)
        self.mix = nn.Linear(HIDDEN, HIDDEN)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.mix(torch.tanh(self.down(torch.relu(self.up(self.norm(x))))))


class TwiceBlock(Block):
    """Runs its feed-forward twice in a forward, as blocks with two streams of tokens do."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        twice = [self.down(torch.relu(self.up(part))) for part in (self.norm(x), -x)]
        return x + self.mix(torch.tanh(twice[0] + twice[1]))


class DtypeBlock(Block):
    """Asks for a leaf's dtype before it calls the leaf, as diffusers does."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        from diffusers.models.modeling_utils import get_parameter_dtype

        return super().forward(x.to(get_parameter_dtype(self.up)))


class UncalledLeafBlock(Block):
    """Never calls ``up``: reads its weights."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        up = functional.linear(self.norm(x), self.up.weight, self.up.bias)
        return x + self.mix(torch.tanh(self.down(torch.relu(up))))


class PeekedLeafBlock(Block):
    """Reads the weights of leaves that it also calls, before (``mix``) and after (``up``)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scale = self.mix.weight.abs().mean()
        x = super().forward(x)
        return x + scale * self.up.weight[0, 0]


class Stack(nn.Module):
    """Six blocks between two linears."""

    def __init__(self, block: type[Block] = Block) -> None:
        super().__init__()
        self.inp = nn.Linear(HIDDEN, HIDDEN)
        self.blocks = nn.ModuleList(block() for _ in range(NUM_BLOCKS))
        self.out = nn.Linear(HIDDEN, HIDDEN)
        self.register_buffer("shift", torch.linspace(-1.0, 1.0, HIDDEN))
        self.order = list(range(NUM_BLOCKS))  # a test may skip or repeat blocks

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.inp(x) + self.shift
        for index in self.order:
            x = self.blocks[index](x)
        return self.out(x)


def make_stack(block: type[Block] = Block, seed: int = 0) -> Stack:
    """Return a model without grad; the same seed gives the same weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Stack(block).requires_grad_(False).eval()


def make_pair(block: type[Block] = Block) -> tuple[Stack, Stack]:
    """Return two equal models: one to attach, one that shows what is right."""
    return make_stack(block), make_stack(block)


def make_input(batch: int = 4, seed: int = 1) -> torch.Tensor:
    """Return one input of ``batch`` rows."""
    return torch.randn(batch, HIDDEN, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def steps(model: nn.Module, x: torch.Tensor, n: int = 1) -> list[torch.Tensor]:
    """Return the outputs of ``n`` forwards."""
    return [model(x) for _ in range(n)]


def assert_same(model: nn.Module, right: nn.Module, x: torch.Tensor, n: int = 3) -> None:
    """Every one of the next ``n`` forwards gives what ``right`` gives, bit for bit."""
    wanted = steps(right, x)[0]
    for number, got in enumerate(steps(model, x, n)):
        assert torch.equal(got, wanted), f"step {number} of {n} differs"


def attach(model: nn.Module, **options: Any) -> Session:
    """Attach on the CPU, with poisoned slots."""
    return blockswap.attach(model, **({"device": "cpu", "check": True} | options))


def make_ready(session: Session, x: torch.Tensor) -> Session:
    """Run until the plan for this input is settled."""
    for _ in range(MAX_LEARNING_STEPS):
        steps(session.model, x)
        if session.state == "ready":
            return session
    raise AssertionError(f"still {session.state} after {MAX_LEARNING_STEPS} steps")


def attach_ready(model: nn.Module, x: torch.Tensor, **options: Any) -> Session:
    """Attach, then run until the plan is settled."""
    return make_ready(attach(model, **options), x)


def block_bytes(model: Stack) -> int:
    """Return the bytes of the leaves that may stream."""
    return sum(
        parameter.nbytes
        for block in model.blocks
        for leaf in (block.up, block.down, block.mix)
        for parameter in leaf.parameters()
    )


# What is installed: the tests' one look behind the session's face --------------------------------


def leaves_by_piece(session: Session, resident: bool) -> list[list[str]]:
    """Return the names of the leaves of each resident, or of each streamed piece."""
    steward = session._steward
    names = {leaf.index: leaf.name for leaf in session._state.leaves.streamable}
    return [
        [names[index] for index in steward.plans.order[piece.first_leaf : piece.end_leaf]]
        for piece in steward.plans.plan.pieces
        if piece.resident == resident
    ]


def leaf_names(session: Session, resident: bool) -> set[str]:
    """Return the names of all leaves that are resident, or that stream."""
    return {name for piece in leaves_by_piece(session, resident) for name in piece}


def piece_bytes(session: Session) -> list[int]:
    """Return the size of each streamed piece."""
    return [piece.bytes for piece in session._steward.plans.plan.pieces if not piece.resident]


def blocks_of(leaves: set[str]) -> set[str]:
    """Return the names of the blocks that hold these leaves."""
    return {name.rpartition(".")[0] for name in leaves}


# What a model is, attribute by attribute ---------------------------------------------------------


def describe(model: nn.Module) -> dict[str, Any]:
    """Return everything that detaching must restore and a refusal must not touch."""
    found: dict[str, Any] = {"training": model.training}
    for name, module in model.named_modules():
        found[f"{name}: module"] = id(module), type(module), list(module.__dict__)
        for hooks in _HOOK_DICTS:
            found[f"{name}: {hooks}"] = dict(getattr(module, hooks))
        for kind in ("_parameters", "_buffers", "_modules"):
            members = getattr(module, kind)
            found[f"{name}: {kind}"] = type(members), id(members), list(members)
        tensors = {**module._parameters, **module._buffers}
        for key, tensor in tensors.items():
            found[f"{name}: {key}"] = None if tensor is None else _describe_tensor(tensor)
    return found


def _describe_tensor(tensor: torch.Tensor) -> dict[str, Any]:
    return {
        "object": id(tensor),
        "type": type(tensor),
        "device": tensor.device,
        "dtype": tensor.dtype,
        "requires_grad": tensor.requires_grad,
        "shape": tensor.shape,
        "stride": tensor.stride(),
        "offset": tensor.storage_offset(),
        "storage_bytes": tensor.untyped_storage().nbytes(),
        "values": bits(tensor),
    }


def assert_unchanged(model: nn.Module, before: dict[str, Any]) -> None:
    """Compare with an earlier `describe`; a failure names what differs."""
    after = describe(model)
    assert list(after) == list(before)
    different = [key for key in before if after[key] != before[key]]
    assert not different, {key: (before[key], after[key]) for key in different[:3]}


def bits(tensor: torch.Tensor) -> bytes:
    """Return the values as bytes: NaN equals itself, and -0.0 is not 0.0."""
    raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    return bytes(raw.numpy()) if math.prod(tensor.shape) else b""


def bits_of(model: nn.Module) -> dict[str, bytes]:
    """Return what ``state_dict`` reads now."""
    return {name: bits(tensor) for name, tensor in model.state_dict().items()}
