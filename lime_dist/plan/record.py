"""The plan of a run as JSON: in the run's folder, in each checkpoint, and under `plan` of `lime-dist plan --json`. Pure data."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from lime_dist.plan.messages import Message
from lime_dist.plan.run_plan import RunPlan
from lime_dist.plan.schedule import Kind
from lime_dist.plan.stages import ChunkPlan, StagePlan


def plan_record(plan: RunPlan) -> dict[str, Any]:
    """All of it: edges, chunks with their messages, each stage's actions in torch's notation, memory in bytes of one rank."""
    pattern = plan.transfer.pattern
    return {
        "layout": {**asdict(plan.layout), "virtual_stages": plan.virtual_stages},
        "schedule": plan.schedule,
        "warmup": plan.warmup,
        "num_microbatches": plan.num_microbatches,
        "pattern": {
            "name": pattern.name,
            "routing": pattern.routing.name,
            "edges": {str(reader): sources for reader, sources in pattern.edges.items()},
            "blocks": [[block.start, block.stop] for block in pattern.blocks],
        },
        "chunks": [_chunk_record(chunk, len(plan.stages)) for chunk in plan.chunks],
        "stages": [
            _stage_record(stage) | {"memory_bytes": memory.report()} for stage, memory in zip(plan.stages, plan.memory)
        ],
    }


def _chunk_record(chunk: ChunkPlan, num_stages: int) -> dict[str, Any]:
    return {
        "chunk": chunk.chunk,
        "stage": chunk.chunk % num_stages,
        "layers": [chunk.layers.start, chunk.layers.stop],
        "added": {str(reader): list(sources) for reader, sources in chunk.transfer.reads.items()},
        "kept": {str(earlier): list(layers) for earlier, layers in chunk.transfer.kept.items()},
        "held_bytes": chunk.held_bytes,
        "routing_flops_per_token": chunk.flops.routing,
        "forward": [_message_record(message) for message in chunk.sent[Kind.FORWARD]],
        "backward": [_message_record(message) for message in chunk.sent[Kind.BACKWARD]],
    }


def _message_record(message: Message) -> dict[str, Any]:
    return {
        "cargo": message.cargo.value,
        "layers": list(message.layers),
        "bytes": message.num_bytes,
        "leaves": message.leaves,
        "needed": message.needed,
    }


def _stage_record(stage: StagePlan) -> dict[str, Any]:
    return {
        "stage": stage.stage_index,
        "chunks": [chunk.chunk for chunk in stage.chunks],
        "receives_ahead": stage.receives_ahead,
        "actions": " ".join(map(str, stage.actions)),
    }
