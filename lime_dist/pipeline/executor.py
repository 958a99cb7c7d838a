"""Carries out one stage's operations: posts receives, waits, runs passes, sends. Reads the plan and changes nothing of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from lime_dist.lime.depth_memory import DepthMemory
from lime_dist.lime.microbatch import Microbatch
from lime_dist.lime.model import LimeStage
from lime_dist.pipeline.transport import Incoming, Link, ResidualShare, Transport
from lime_dist.plan.messages import Cargo, Message
from lime_dist.plan.operations import Operation, Verb
from lime_dist.plan.schedule import Action, Kind
from lime_dist.plan.stages import ChunkPlan, StagePlan

# Differentiates (root, gradient) pairs in one joint backward; a gradient of None is that of a loss.
Backward = Callable[[list[Tensor], list[Tensor | None]], None]
# Waits for a message of a pass, before the pass, within it or behind it.
AwaitInput = Callable[[Action, Incoming], Tensor]
Follow = Callable[[Iterator[Operation]], Iterator[Operation]]


@dataclass
class _InFlight:
    """What a microbatch leaves on a chunk between its forward and its backward pass."""

    memory: DepthMemory
    received_residual: Tensor | None
    output: Tensor  # the residual, or the loss on the last chunk
    chain: Tensor  # the end of the memory's


@dataclass(frozen=True, kw_only=True)
class Executor:
    """One stage's passes over the microbatches of a step.

    call: the stage module, or what wraps it (DeepSpeed's engine under ZeRO 2 and 3).
    backward: `joint_backward`, or what wraps that.
    await_input: `Incoming.wait`, or what wraps that.
    """

    stage: LimeStage
    plan: StagePlan
    transport: Transport
    residual_share: ResidualShare
    call: Callable[..., tuple[Tensor, Tensor]]
    backward: Backward
    await_input: AwaitInput = lambda action, incoming: incoming.wait()

    @cached_property
    def chunks(self) -> dict[int, ChunkPlan]:
        """By chunk."""
        return {chunk.chunk: chunk for chunk in self.plan.chunks}

    def run(
        self,
        actions: Sequence[Action],
        microbatches: Sequence[Microbatch],
        *,
        with_loss: bool = True,
        follow: Follow = iter,
    ) -> list[Tensor]:
        """Carry out `actions` over `microbatches`.

        follow: gives out the operations one by one, and is asked for the next when the last is done.

        Gradients of the mean loss over the microbatches are added to the parameters. Returns the loss of
        each microbatch, or its residual if not `with_loss`, on the last stage and nothing elsewhere.
        Collective: pp and tp groups.
        """
        passes = _Passes(self, microbatches, with_loss, follow(self.plan.operations(actions)))
        passes.carry_out()
        self.transport.flush()
        return [passes.outputs[index] for index in sorted(passes.outputs)]


class _Passes:
    """The passes over the microbatches of one step or evaluation, and what is under way between them.

    A pass that is running calls `_reach` at each layer that leaves an entry, and the operations that the plan has for that
    point are carried out from within it.
    """

    def __init__(
        self, executor: Executor, microbatches: Sequence[Microbatch], with_loss: bool, operations: Iterator[Operation]
    ):
        self._executor, self._microbatches, self._with_loss = executor, microbatches, with_loss
        self._operations = operations
        self.outputs: dict[int, Tensor] = {}
        self._memories: dict[tuple[int, int], DepthMemory] = {}  # by chunk, microbatch
        self._in_flight: dict[tuple[int, int], _InFlight] = {}
        self._incoming: dict[tuple[Action, Message], Incoming] = {}
        self._residuals: dict[Action, Tensor] = {}  # received, or the gradient of one that was sent
        self._running: Operation | None = None  # how far the pass that runs is to go
        self._left: tuple[Action, _InFlight] | None = None  # by the pass that ran last, until another action's turn

    def carry_out(self) -> None:
        for operation in self._operations:
            if self._left is not None and self._left[0] != operation.action:
                self._let_go()
            if operation.message is None:
                self._run(operation)
            else:
                self._move(operation, operation.message)
        self._let_go()

    def _move(self, operation: Operation, message: Message) -> None:
        action = operation.action
        if operation.verb is Verb.RECEIVE:
            self._incoming[action, message] = self._link(action.kind, sends=False).receive(self._room(action, message))
        elif operation.verb is Verb.AWAIT:
            incoming = self._incoming.pop((action, message))
            self._take_in(action, message, self._executor.await_input(action, incoming))
        else:
            self._link(action.kind, sends=True).send(self._outgoing(action, message), message.cargo.value)

    def _reach(self, kind: Kind, layer: int) -> None:
        """Carry out what is planned for this point of the pass. A layer computed again in a backward pass has nothing to do."""
        running = self._running
        if running is None or running.action.kind is not kind or running.until != layer:
            return
        for operation in self._operations:
            if operation.message is None:
                self._running = operation
                return
            self._move(operation, operation.message)

    def _link(self, kind: Kind, *, sends: bool) -> Link:
        transport = self._executor.transport
        forward, backward = (
            (transport.to_next, transport.to_previous) if sends else (transport.from_previous, transport.from_next)
        )
        link = forward if kind is Kind.FORWARD else backward
        assert link is not None  # the plan has messages where there is a neighbour only
        return link

    # ---- receiving

    def _memory(self, chunk: int, microbatch_index: int) -> DepthMemory:
        """Made when it is first asked for."""
        place = chunk, microbatch_index
        if place not in self._memories:
            kept = {
                earlier: self._memory(earlier, microbatch_index)
                for earlier in self._executor.chunks[chunk].transfer.kept
            }
            num_tokens = self._microbatches[microbatch_index].inputs.numel()
            module = self._executor.stage.chunk(chunk)
            self._memories[place] = module.new_memory(num_tokens, kept=kept, reach=self._reach)
        return self._memories[place]

    def _room(self, action: Action, message: Message) -> Tensor:
        """Where to receive the message: its place in the depth memory where it has one."""
        memory = self._memory(action.chunk, action.microbatch_index)
        if message.cargo is Cargo.RESIDUAL:
            module, shape = self._executor.stage.chunk(action.chunk), self._executor.chunks[action.chunk].shape
            return torch.empty(shape.rows, shape.hidden_size, dtype=module.dtype, device=module.device)
        buffer = memory.entries if message.cargo is Cargo.ENTRIES else memory.sums
        return buffer.new_rows(len(message.layers)) if message.is_gradient else buffer.room_for(message.layers)

    def _take_in(self, action: Action, message: Message, received: Tensor) -> None:
        if message.cargo is Cargo.RESIDUAL:
            self._residuals[action] = received
            return
        memory = self._memory(action.chunk, action.microbatch_index)
        buffer = memory.entries if message.cargo is Cargo.ENTRIES else memory.sums
        if message.is_gradient:
            buffer.add_gradients(message.layers, received)
        else:
            buffer.load(message.layers, received)

    # ---- sending

    def _outgoing(self, action: Action, message: Message) -> Tensor:
        if message.cargo is Cargo.RESIDUAL:
            assert self._left is not None  # the plan sends it behind the pass, before any other action
            left = self._left[1]
            return self._executor.residual_share.share(_residual_gradient(left) if message.is_gradient else left.output)
        memory = self._memory(action.chunk, action.microbatch_index)
        buffer = memory.entries if message.cargo is Cargo.ENTRIES else memory.sums
        return buffer.select_gradients(message.layers) if message.is_gradient else buffer.select(message.layers)

    # ---- computing

    def _run(self, operation: Operation) -> None:
        """A pass from its beginning to its end."""
        self._running, action = operation, operation.action
        chunk, is_forward = self._executor.chunks[action.chunk], action.kind is Kind.FORWARD
        self._left = action, self._forward(chunk, action) if is_forward else self._backward(chunk, action)
        assert self._running.until == "behind", f"{self._running} is planned, and the pass did not come to that layer"
        self._running = None

    def _let_go(self) -> None:
        """Of what no later pass reads and what has been given to be sent."""
        if self._left is None:
            return
        (action, left), self._left = self._left, None
        if action.kind is Kind.BACKWARD:
            del self._memories[action.chunk, action.microbatch_index]
        elif not torch.is_grad_enabled():
            self._forget(action)
        elif not self._executor.stage.chunk(action.chunk).recompute:
            left.memory.sums.release_values()  # else the layers read them again

    def _forward(self, chunk: ChunkPlan, action: Action) -> _InFlight:
        batch, memory = self._microbatches[action.microbatch_index], self._memory(chunk.chunk, action.microbatch_index)
        inputs, targets = batch.inputs, batch.targets if self._with_loss else None
        residual = None
        if not chunk.is_first:
            residual = self._executor.residual_share.whole(self._residuals.pop(action))
            residual.requires_grad_(torch.is_grad_enabled())
        output, chain = self._executor.call(
            chunk.chunk,
            inputs if residual is None else residual,
            *inputs.shape,
            memory,
            targets,
            batch.examples,
        )
        left = _InFlight(memory, residual, output, chain)
        if torch.is_grad_enabled():
            self._in_flight[action.chunk, action.microbatch_index] = left
        if chunk.is_last:
            self.outputs[action.microbatch_index] = output.detach()
        return left

    def _forget(self, action: Action) -> None:
        """Without a backward pass a memory serves until the last chunk that reads it."""
        for chunk in self._executor.plan.chunks:
            if chunk.last_use == action.chunk:
                del self._memories[chunk.chunk, action.microbatch_index]

    def _backward(self, chunk: ChunkPlan, action: Action) -> _InFlight:
        held = self._in_flight.pop((action.chunk, action.microbatch_index))
        if chunk.is_last:
            # The last layer reads the end of the memory's chain, so the loss is the only root.
            self._executor.backward([held.output / len(self._microbatches)], [None])
            return held
        roots: list[Tensor] = [held.output]
        gradients: list[Tensor | None] = [self._executor.residual_share.whole(self._residuals.pop(action))]
        if held.chain.requires_grad:
            roots.append(held.chain)
            gradients.append(torch.zeros_like(held.chain))
        self._executor.backward(roots, gradients)
        return held


def _residual_gradient(left: _InFlight) -> Tensor:
    assert left.received_residual is not None and left.received_residual.grad is not None  # behind a backward pass
    return left.received_residual.grad


def joint_backward(roots: list[Tensor], gradients: list[Tensor | None]) -> None:
    """One walk over the chunk for all its outputs."""
    torch.autograd.backward(roots, gradients)
