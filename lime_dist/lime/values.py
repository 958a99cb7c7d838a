"""Values of logical tensors into and out of a stage's parameters: initial weights, loading, reading back."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from lime_dist.lime.model import LimeChunk, LimeStage
from lime_dist.plan.tensors import LogicalTensor, Normal, ParameterSpec, Piece, Role

NORMAL_STD = 0.02


def initial_values(tensor: LogicalTensor, seed: int) -> Tensor:
    """The initial fp32 values of one logical tensor: a function of (seed, name) alone, so the same under every layout.

    Where the tensor's kind of routing does not say otherwise: norms one, matrices normal(0, 0.02), as in Hugging Face's LLaMA
    and in the authors' code (arXiv 2502.09245v2).
    """
    digest = hashlib.sha256(f"{seed}:{tensor.name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
    values = torch.empty(tensor.shape, dtype=torch.float32)
    if tensor.role is Role.NORM:
        return values.fill_(1.0)
    initial = tensor.initial or Normal(std=NORMAL_STD)
    if isinstance(initial, Normal):
        return values.normal_(0.0, initial.std, generator=generator)
    values.uniform_(-initial.bound, initial.bound, generator=generator)
    if initial.own_identity:
        values[:, -1] = torch.eye(len(values)) if values.dim() == 3 else 1.0
    return values


def initialize(stage: LimeChunk | LimeStage, seed: int) -> None:
    """Fill every parameter of the stage with its initial values; padding with zeros."""
    load(stage, lambda tensor: initial_values(tensor, seed))


@torch.no_grad()
def load(stage: LimeChunk | LimeStage, values_of: Callable[[LogicalTensor], Tensor]) -> None:
    """Fill every parameter from logical tensors; `values_of` gives the whole tensor, of any dtype, on the CPU."""
    for spec, parameter in specified_parameters(stage):
        parameter.copy_(assemble_local(spec, values_of))


def assemble_local(spec: ParameterSpec, values_of: Callable[[LogicalTensor], Tensor]) -> Tensor:
    """fp32 values of one parameter, padding zero, from whole logical tensors."""
    local = torch.zeros(spec.shape)
    for piece in spec.pieces:
        part = values_of(piece.tensor).narrow(piece.dim, piece.start, piece.length)
        local.narrow(piece.dim, piece.local_start, piece.length).copy_(part)
    return local


def specified_parameters(stage: LimeChunk | LimeStage) -> Iterator[tuple[ParameterSpec, torch.nn.Parameter]]:
    """Each parameter of the stage with what it is."""
    parameters = dict(stage.named_parameters())
    for spec in stage.parameter_specs():
        yield spec, parameters[spec.name]


def slices(spec: ParameterSpec, local: Tensor) -> Iterator[tuple[Piece, Tensor]]:
    """The logical slices that lie in `local`, a tensor shaped as the parameter (values or gradient)."""
    for piece in spec.pieces:
        yield piece, local.narrow(piece.dim, piece.local_start, piece.length)


def gather_logical(stage: LimeChunk | LimeStage, local_of: Callable[[torch.nn.Parameter], Tensor]) -> dict[str, Tensor]:
    """Logical tensors by name from a stage that holds them whole (one device); `local_of`: the values or the gradient."""
    return {
        piece.tensor.name: part
        for spec, parameter in specified_parameters(stage)
        for piece, part in slices(spec, local_of(parameter))
    }
