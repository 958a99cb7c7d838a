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
from lime_dist.plan.stages import ChunkPlan, StagePlan

# Differentiates (root, gradient) pairs in one joint backward; a gradient of None is that of a loss.
Backward = Callable[[list[Tensor], list[Tensor | None]], None]
# Waits for what a pass of this kind reads from the neighbouring stage.
AwaitInput = Callable[[Kind, Incoming], list[Tensor]]


@dataclass
class _InFlight:
    """What a microbatch leaves on a chunk between its forward and its backward pass."""

    memory: DepthMemory
    received_residual: Tensor | None
    output: Tensor  # the residual, or the loss on the last chunk
    chain: Tensor  # the end of the memory's


_Place = tuple[int, int]  # chunk, microbatch


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
        self._chunks = {chunk.chunk: chunk for chunk in plan.chunks}
        self._memories: dict[_Place, DepthMemory] = {}
        self._in_flight: dict[_Place, _InFlight] = {}
        self._incoming: dict[Action, Incoming] = {}
        # Used only where the plan has the neighbour, and then there.
        self._from_previous, self._to_previous = cast(Link, transport.from_previous), cast(Link, transport.to_previous)
        self._from_next, self._to_next = cast(Link, transport.from_next), cast(Link, transport.to_next)

    def run(self, actions: Sequence[Action], microbatches: Sequence[Tensor], *, with_loss: bool = True) -> list[Tensor]:
        """Carry out `actions` over `microbatches` (token ids [batch, seq + 1] each).

        Gradients of the mean loss over the microbatches are added to the parameters. Returns the loss of
        each microbatch, or its residual if not `with_loss`, on the last stage and nothing elsewhere.
        Collective: pp and tp groups.
        """
        outputs: dict[int, Tensor] = {}
        self._post_receive(actions[0], microbatches)
        for position, action in enumerate(actions):
            if position + 1 < len(actions):
                self._post_receive(actions[position + 1], microbatches)
            if action.kind is Kind.FORWARD:
                output = self._forward(action, microbatches[action.microbatch_index], with_loss)
                if output is not None:
                    outputs[action.microbatch_index] = output
            else:
                self._backward(action, len(microbatches))
        self._transport.flush()
        return [outputs[index] for index in sorted(outputs)]

    # ---- receiving, one action ahead of need

    def _post_receive(self, action: Action, microbatches: Sequence[Tensor]) -> None:
        chunk, place = self._chunks[action.chunk], (action.chunk, action.microbatch_index)
        if action.kind is Kind.FORWARD:
            kept = {earlier: self._memories[earlier, action.microbatch_index] for earlier in chunk.transfer.kept}
            num_tokens = _num_tokens(microbatches[action.microbatch_index])
            self._memories[place] = self._stage.chunk(action.chunk).new_memory(num_tokens, kept)
            if not chunk.is_first:
                self._incoming[action] = self._post_bundle(chunk, self._memories[place])
        elif not chunk.is_last:
            self._incoming[action] = self._post_gradients(chunk, self._memories[place])

    def _post_bundle(self, chunk: ChunkPlan, memory: DepthMemory) -> Incoming:
        return self._from_previous.receive(
            [
                memory.entries.room_for(chunk.received_passed_on),
                memory.entries.room_for(chunk.received_made),
                memory.sums.room_for(chunk.transfer.received.partial_sums),
                self._residual_buffer(chunk),
            ]
        )

    def _post_gradients(self, chunk: ChunkPlan, memory: DepthMemory) -> Incoming:
        sent = chunk.transfer.sent
        return self._from_next.receive(
            [
                self._residual_buffer(chunk),
                memory.entries.new_rows(len(sent.raw_entries)),
                memory.sums.new_rows(len(sent.partial_sums)),
            ]
        )

    def _residual_buffer(self, chunk: ChunkPlan) -> Tensor:
        module, shape = self._stage.chunk(chunk.chunk), (chunk.shape.rows, chunk.shape.hidden_size)
        return torch.empty(shape, dtype=module.dtype, device=module.device)

    # ---- computing

    def _forward(self, action: Action, tokens: Tensor, with_loss: bool) -> Tensor | None:
        """The loss, or the residual, on the last chunk."""
        chunk, place = self._chunks[action.chunk], (action.chunk, action.microbatch_index)
        memory, residual = self._memories[place], None
        if not chunk.is_first:
            received = self._await_input(action.kind, self._incoming.pop(action))
            _load_received(chunk, memory, received)
            residual = self._share.whole(received[-1]).requires_grad_(torch.is_grad_enabled())
        if not chunk.is_last:
            # Cut-through: what only passes by does not wait for this chunk's layers.
            self._to_next.send(memory.entries.select(chunk.passed_on))
        inputs, targets = tokens[:, :-1], tokens[:, 1:] if with_loss else None
        output, chain = self._call(
            action.chunk, inputs if residual is None else residual, *inputs.shape, memory, targets
        )
        if not chunk.is_last:
            self._to_next.send(memory.entries.select(chunk.made))
            self._to_next.send(memory.sums.select(chunk.transfer.sent.partial_sums))
            self._to_next.send(self._share.share(output))
        if not self._stage.chunk(action.chunk).recompute:  # else the layers read them again in the backward pass
            memory.sums.release_values()
        if torch.is_grad_enabled():
            self._in_flight[place] = _InFlight(memory, residual, output, chain)
        else:
            self._forget(action)
        return output.detach() if chunk.is_last else None

    def _forget(self, action: Action) -> None:
        """Without a backward pass a memory serves until the last chunk that reads it."""
        for chunk in self._plan.chunks:
            if chunk.last_use == action.chunk:
                del self._memories[chunk.chunk, action.microbatch_index]

    def _backward(self, action: Action, num_microbatches: int) -> None:
        chunk, place = self._chunks[action.chunk], (action.chunk, action.microbatch_index)
        held = self._in_flight.pop(place)
        if chunk.is_last:
            # The last layer reads the end of the memory's chain, so the loss is the only root.
            self._backward_roots([held.output / num_microbatches], [None])
        else:
            self._backward_from_next(chunk, held, action)
        if not chunk.is_first:
            assert held.received_residual is not None and held.received_residual.grad is not None
            self._to_previous.send(self._share.share(held.received_residual.grad))
            received = chunk.transfer.received
            self._to_previous.send(held.memory.entries.select_gradients(received.raw_entries))
            self._to_previous.send(held.memory.sums.select_gradients(received.partial_sums))
        del self._memories[place]

    def _backward_from_next(self, chunk: ChunkPlan, held: _InFlight, action: Action) -> None:
        residual_share, entries, sums = self._await_input(action.kind, self._incoming.pop(action))
        sent = chunk.transfer.sent
        held.memory.entries.add_gradients(sent.raw_entries, entries)
        held.memory.sums.add_gradients(sent.partial_sums, sums)
        roots: list[Tensor] = [held.output]
        gradients: list[Tensor | None] = [self._share.whole(residual_share)]
        if held.chain.requires_grad:
            roots.append(held.chain)
            gradients.append(torch.zeros_like(held.chain))
        self._backward_roots(roots, gradients)


def joint_backward(roots: list[Tensor], gradients: list[Tensor | None]) -> None:
    """One walk over the chunk for all its outputs."""
    torch.autograd.backward(roots, gradients)


def _load_received(chunk: ChunkPlan, memory: DepthMemory, received: list[Tensor]) -> None:
    memory.entries.load(chunk.received_passed_on, received[0])
    memory.entries.load(chunk.received_made, received[1])
    memory.sums.load(chunk.transfer.received.partial_sums, received[2])


def _num_tokens(tokens: Tensor) -> int:
    return tokens.shape[0] * (tokens.shape[1] - 1)
