"""Values of logical tensors into and out of a stage's parameters: initial weights, loading, reading back."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from lime_dist.lime.model import LimeChunk, LimeStage
from lime_dist.plan.parameters import LogicalTensor, ParameterSpec, Piece, Role

NORMAL_STD = 0.02
HIDDEN_ROUTER_STD = 0.1


def initial_values(tensor: LogicalTensor, seed: int) -> Tensor:
    """The initial fp32 values of one logical tensor: a function of (seed, name) alone, so the same under every layout.

    As in the authors' code (arXiv 2502.09245v2): router identity on its own layer, elsewhere uniform(-b, b),
    b = sqrt(3 / (sources * H_kv)); K and V kaiming_uniform(a = sqrt 5); other matrices normal(0, 0.02), dynamic
    routers among them. Static routers of hidden states normal(0, 0.1) (arXiv 2502.09245v1).
    """
    digest = hashlib.sha256(f"{seed}:{tensor.name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
    values = torch.empty(tensor.shape, dtype=torch.float32)
    if tensor.role is Role.NORM:
        return values.fill_(1.0)
    if tensor.role is Role.ROUTER:
        return _router_values(values, generator)
    if tensor.role is Role.KEY_VALUE:
        bound = tensor.shape[1] ** -0.5
        return values.uniform_(-bound, bound, generator=generator)
    std = HIDDEN_ROUTER_STD if tensor.role is Role.HIDDEN_ROUTER else NORMAL_STD
    return values.normal_(0.0, std, generator=generator)


def _router_values(values: Tensor, generator: torch.Generator) -> Tensor:
    num_heads, num_sources, _ = values.shape
    bound = (3.0 / (num_sources * num_heads)) ** 0.5
    values.uniform_(-bound, bound, generator=generator)
    values[:, -1] = torch.eye(num_heads)
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
