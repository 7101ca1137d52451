"""The ways in which real code changes weights between two steps: each edit is (model) -> None."""

from __future__ import annotations

from collections.abc import Callable

import torch
from session_models import HIDDEN, Stack, make_stack
from torch import nn


def noise(like: torch.Tensor, seed: int = 7) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 0.01 * torch.randn(like.shape, generator=generator).to(like.dtype)


def every(model: Stack, name: str = "up") -> list[nn.Linear]:
    return [getattr(block, name) for block in model.blocks]


def add_to_data(model: Stack) -> None:  # PEFT merges so: neither version nor address changes
    for leaf in every(model):
        leaf.weight.data += noise(leaf.weight)


def add_in_place(model: Stack) -> None:
    for leaf in every(model, "down"):
        leaf.weight.add_(noise(leaf.weight))


def copy_over(model: Stack) -> None:
    for leaf in every(model, "mix"):
        leaf.weight.copy_(noise(leaf.weight))


def write_one_element(model: Stack) -> None:
    model.blocks[4].up.weight[3, 5] = 2.0


def scale_all(model: Stack) -> None:
    for parameter in model.parameters():
        parameter.data.mul_(1.01)


def rebind_data(model: Stack) -> None:
    for leaf in every(model):
        leaf.weight.data = noise(leaf.weight)


def rebind_data_to_a_view(model: Stack) -> None:
    values = noise(torch.empty(2, 2 * HIDDEN, HIDDEN))
    model.blocks[1].up.weight.data = values[1]


def new_parameter(model: Stack) -> None:
    for leaf in every(model):
        leaf.weight = nn.Parameter(noise(leaf.weight), requires_grad=False)


def new_parameter_of_another_layout(model: Stack) -> None:
    values = noise(torch.empty(HIDDEN, 2 * HIDDEN)).t()
    model.blocks[2].up.weight = nn.Parameter(values, requires_grad=False)


def load_values(model: Stack) -> None:
    model.load_state_dict({k: noise(v, seed=11) for k, v in model.state_dict().items()})


def load_tensors(model: Stack) -> None:
    state = {k: noise(v, seed=12) for k, v in model.state_dict().items()}
    model.load_state_dict(state, assign=True)
    model.requires_grad_(False)


def exchange_parameters(model: Stack) -> None:
    one, other = model.blocks[0].up, model.blocks[5].up
    one.weight, other.weight = other.weight, one.weight


def exchange_data(model: Stack) -> None:
    one, other = model.blocks[0].up.weight, model.blocks[5].up.weight
    one.data, other.data = other.data, one.data


def tie_two_leaves(model: Stack) -> None:
    model.blocks[1].mix.weight = model.blocks[4].mix.weight


def edit_small(model: Stack) -> None:
    model.blocks[3].norm.weight.data += 0.5
    model.blocks[3].norm.bias.data.copy_(noise(model.blocks[3].norm.bias))


def edit_outside_the_blocks(model: Stack) -> None:
    model.inp.weight.data += noise(model.inp.weight)
    model.out.weight = nn.Parameter(noise(model.out.weight), requires_grad=False)
    model.shift.mul_(2.0)


def edit_bias(model: Stack) -> None:
    model.blocks[2].down.bias.data.fill_(0.25)


def drop_bias(model: Stack) -> None:
    model.blocks[2].down.bias = None


def delete_and_register_again(model: Stack) -> None:
    leaf = model.blocks[2].down
    weight = leaf.weight
    del leaf.weight
    leaf.register_parameter("weight", nn.Parameter(weight * 2, requires_grad=False))


def write_through_parameters_dict(model: Stack) -> None:
    leaf = model.blocks[5].mix
    leaf._parameters["weight"] = nn.Parameter(noise(leaf.weight), requires_grad=False)


def replace_leaf(model: Stack) -> None:
    leaf = nn.Linear(HIDDEN, 2 * HIDDEN).requires_grad_(False)
    leaf.weight.copy_(noise(leaf.weight))
    leaf.bias.zero_()
    model.blocks[2].up = leaf


def replace_block(model: Stack) -> None:
    model.blocks[2] = make_stack(seed=5).blocks[0]


def append_block(model: Stack) -> None:
    model.blocks.append(make_stack(seed=5).blocks[0])
    model.order.append(6)


def remove_block(model: Stack) -> None:
    del model.blocks[2]
    model.order.pop()


def another_shape(model: Stack) -> None:  # a rank that is pruned: fewer rows up, fewer columns down
    block = model.blocks[3]
    block.up.weight = nn.Parameter(block.up.weight[:384].clone(), requires_grad=False)
    block.up.bias = nn.Parameter(block.up.bias[:384].clone(), requires_grad=False)
    block.down.weight = nn.Parameter(block.down.weight[:, :384].clone(), requires_grad=False)


EDITS: list[Callable[[Stack], None]] = [
    add_to_data,
    add_in_place,
    copy_over,
    write_one_element,
    scale_all,
    rebind_data,
    rebind_data_to_a_view,
    new_parameter,
    new_parameter_of_another_layout,
    load_values,
    load_tensors,
    exchange_parameters,
    exchange_data,
    tie_two_leaves,
    edit_small,
    edit_outside_the_blocks,
    edit_bias,
    drop_bias,
    delete_and_register_again,
    write_through_parameters_dict,
    replace_leaf,
    replace_block,
    append_block,
    remove_block,
    another_shape,
]
