"""Runs one stage's list of actions: receives, computes, sends. Reads the plan and changes nothing of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from lime_dist.lime.depth_memory import DepthMemory
from lime_dist.lime.model import LimeStage
from lime_dist.pipeline.transport import Incoming, Link, ResidualShare, Transport
from lime_dist.plan.schedule import Action, Kind
from lime_dist.plan.stages import StagePlan

# Differentiates (root, gradient) pairs in one joint backward; a gradient of None is that of a loss.
Backward = Callable[[list[Tensor], list[Tensor | None]], None]
# Waits for what a pass of this kind reads from the neighbouring stage.
AwaitInput = Callable[[Kind, Incoming], list[Tensor]]


@dataclass
class _InFlight:
    """What a microbatch leaves on a stage between its forward and its backward pass."""

    memory: DepthMemory
    received_residual: Tensor | None
    output: Tensor  # the residual, or the loss on the last stage
    token: Tensor


class Executor:
    """One stage's passes over the microbatches of a step.

    call: the stage module, or what wraps it (DeepSpeed's engine under ZeRO 2 and 3).
    backward: `joint_backward`, or what wraps that.
    await_input: `Incoming.wait`, or what wraps that.
    """

    def __init__(
        self,
        stage: LimeStage,
        plan: StagePlan,
        transport: Transport,
        residual_share: ResidualShare,
        *,
        call: Callable[..., tuple[Tensor, Tensor]],
        backward: Backward,
        await_input: AwaitInput = lambda kind, incoming: incoming.wait(),
    ):
        self._stage, self._plan, self._transport, self._share = stage, plan, transport, residual_share
        self._call, self._backward_roots, self._await_input = call, backward, await_input
        self._in_flight: dict[int, _InFlight] = {}
        self._incoming: dict[Action, tuple[DepthMemory, Incoming]] = {}
        # Used only where the plan has the neighbour, and then there.
        self._from_previous, self._to_previous = cast(Link, transport.from_previous), cast(Link, transport.to_previous)
        self._from_next, self._to_next = cast(Link, transport.from_next), cast(Link, transport.to_next)

    def run(self, actions: Sequence[Action], microbatches: Sequence[Tensor], *, with_loss: bool = True) -> list[Tensor]:
        """Carry out `actions` over `microbatches` (token ids [batch, seq + 1] each).

        Gradients of the mean loss over the microbatches are added to the parameters. Returns the loss of
        each microbatch, or its residual if not `with_loss`, on the last stage and nothing elsewhere.
        Collective: pp and tp groups.
        """
        outputs: list[Tensor] = []
        self._post_receive(actions[0], microbatches)
        for position, action in enumerate(actions):
            if position + 1 < len(actions):
                self._post_receive(actions[position + 1], microbatches)
            if action.kind is Kind.FORWARD:
                outputs += self._forward(action, microbatches[action.microbatch_index], with_loss)
            else:
                self._backward(action, len(microbatches))
        self._transport.flush()
        return outputs

    # ---- receiving, one action ahead of need

    def _post_receive(self, action: Action, microbatches: Sequence[Tensor]) -> None:
        if action.kind is Kind.FORWARD:
            memory = self._stage.new_memory(_num_tokens(microbatches[action.microbatch_index]))
            self._incoming[action] = memory, self._post_bundle(memory)
        elif not self._plan.is_last_stage:
            memory = self._memory_of(action.microbatch_index)
            self._incoming[action] = memory, self._post_gradients(memory)

    def _memory_of(self, microbatch_index: int) -> DepthMemory:
        """Of a microbatch whose forward has run, or is the next to run."""
        if microbatch_index in self._in_flight:
            return self._in_flight[microbatch_index].memory
        forward = Action(kind=Kind.FORWARD, chunk=self._plan.stage_index, microbatch_index=microbatch_index)
        return self._incoming[forward][0]

    def _post_bundle(self, memory: DepthMemory) -> Incoming:
        if self._plan.is_first_stage:
            return Incoming([], [])
        passed_on, made = self._plan.received_entries
        sums = self._plan.transfer.received.partial_sums
        return self._from_previous.receive(
            [
                memory.entries.room_for(passed_on),
                memory.entries.room_for(made),
                memory.sums.room_for(sums),
                self._residual_buffer(),
            ]
        )

    def _post_gradients(self, memory: DepthMemory) -> Incoming:
        sent = self._plan.transfer.sent
        return self._from_next.receive(
            [
                self._residual_buffer(),
                memory.entries.new_rows(len(sent.raw_entries)),
                memory.sums.new_rows(len(sent.partial_sums)),
            ]
        )

    def _residual_buffer(self) -> Tensor:
        shape = self._plan.shape.rows, self._plan.shape.hidden_size
        return torch.empty(shape, dtype=self._stage.dtype, device=self._stage.device)

    # ---- computing

    def _forward(self, action: Action, tokens: Tensor, with_loss: bool) -> list[Tensor]:
        memory, incoming = self._incoming.pop(action)
        received = self._await_input(action.kind, incoming)
        residual = None
        if not self._plan.is_first_stage:
            self._load_received(memory, received)
            residual = self._share.whole(received[-1]).requires_grad_(torch.is_grad_enabled())
        if not self._plan.is_last_stage:
            # Cut-through: what only passes by does not wait for this stage's layers.
            self._to_next.send(memory.entries.select(self._plan.sent_entries[0]))
        inputs, targets = tokens[:, :-1], tokens[:, 1:] if with_loss else None
        output, token = self._call(inputs if residual is None else residual, *inputs.shape, memory, targets)
        if torch.is_grad_enabled():
            self._in_flight[action.microbatch_index] = _InFlight(memory, residual, output, token)
        if self._plan.is_last_stage:
            self._release_sums(memory)
            return [output.detach()]
        self._to_next.send(memory.entries.select(self._plan.sent_entries[1]))
        self._to_next.send(memory.sums.select(self._plan.transfer.sent.partial_sums))
        self._to_next.send(self._share.share(output))
        self._release_sums(memory)
        return []

    def _release_sums(self, memory: DepthMemory) -> None:
        if not self._stage.recompute:  # else the layers read them again in the backward pass
            memory.sums.release_values()

    def _load_received(self, memory: DepthMemory, received: list[Tensor]) -> None:
        passed_on, made = self._plan.received_entries
        memory.entries.load(passed_on, received[0])
        memory.entries.load(made, received[1])
        memory.sums.load(self._plan.transfer.received.partial_sums, received[2])

    def _backward(self, action: Action, num_microbatches: int) -> None:
        held = self._in_flight.pop(action.microbatch_index)
        if self._plan.is_last_stage:
            # The last layer reads the memory's last token, so the loss is the only root.
            self._backward_roots([held.output / num_microbatches], [None])
        else:
            self._backward_from_next(held, action)
        if not self._plan.is_first_stage:
            assert held.received_residual is not None and held.received_residual.grad is not None
            self._to_previous.send(self._share.share(held.received_residual.grad))
            received = self._plan.transfer.received
            self._to_previous.send(held.memory.entries.select_gradients(received.raw_entries))
            self._to_previous.send(held.memory.sums.select_gradients(received.partial_sums))

    def _backward_from_next(self, held: _InFlight, action: Action) -> None:
        _, incoming = self._incoming.pop(action)
        residual_share, entries, sums = self._await_input(action.kind, incoming)
        sent = self._plan.transfer.sent
        held.memory.entries.load_gradients(sent.raw_entries, entries)
        held.memory.sums.load_gradients(sent.partial_sums, sums)
        roots: list[Tensor] = [held.output]
        gradients: list[Tensor | None] = [self._share.whole(residual_share)]
        if held.token.requires_grad:
            roots.append(held.token)
            gradients.append(torch.zeros_like(held.token))
        self._backward_roots(roots, gradients)


def joint_backward(roots: list[Tensor], gradients: list[Tensor | None]) -> None:
    """One walk over the stage for all its outputs."""
    torch.autograd.backward(roots, gradients)


def _num_tokens(tokens: Tensor) -> int:
    return tokens.shape[0] * (tokens.shape[1] - 1)
