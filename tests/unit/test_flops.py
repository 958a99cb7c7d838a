"""The planned FLOPs against what torch counts of the plain model's own operations, forward and backward.

torch's counter sees matrix products, as the plan does. Two of its gaps are closed here: it knows no formula for attention's
fused kernel on a CPU, so that attention is run as the products that it is of, whole, mask and all; and none for the products
that add in place, which the gradients of entries are. Then the counts are equal, to the last FLOP.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode, mm_flop

from lime_dist.config import Config, check_config, parse_config
from lime_dist.lime.model import model_loss, plain_model
from lime_dist.lime.values import initialize
from lime_dist.plan.run_plan import RunPlan, plan_run

NUM_TOKENS = 2 * 8
RUN = {
    "model": {"num_layers": 6, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "vocab_size": 96},
    "data": {"seq_length": 8, "global_batch_size": 2},
}
GQA = "model.num_kv_heads=2"
MODELS = [
    *(["depth.router=none", *more] for more in ([], [GQA], ["model.tie_embeddings=false"])),
    *([f"depth.pattern={pattern}", *more] for pattern in ("full", "first:2", "stride:2") for more in ([], [GQA])),
    *(
        ["depth.entry=hidden", f"depth.router={router}", f"depth.pattern={pattern}", GQA]
        for router in ("static", "dynamic")
        for pattern in ("full", "first:2")
    ),
]


def make_config(overrides: list[str]) -> Config:
    return check_config(parse_config(RUN, overrides))


def addmm_in_place(summed: torch.Size, left: torch.Size, right: torch.Size, **_: object) -> int:
    return mm_flop(left, right)


def baddbmm_in_place(summed: torch.Size, left: torch.Size, right: torch.Size, **_: object) -> int:
    return left[0] * mm_flop(left[1:], right[1:])


def new_counter() -> FlopCounterMode:
    in_place = {torch.ops.aten.addmm_: addmm_in_place, torch.ops.aten.baddbmm_: baddbmm_in_place}
    return FlopCounterMode(display=False, custom_mapping=in_place)


def count_flops(config: Config, *, recompute: bool = False) -> tuple[int, int]:
    """A token's, forward and backward, by running the whole model on one device."""
    model = plain_model(config.model, config.pattern, recompute=recompute)
    initialize(model, seed=3)
    tokens: Tensor = torch.randint(config.model.vocab_size, (2, 9), generator=torch.Generator().manual_seed(7))
    with sdpa_kernel(SDPBackend.MATH):
        with new_counter() as forward:
            loss = model_loss(model, tokens)
        with new_counter() as backward:
            loss.backward()
    counts = [counter.get_total_flops() for counter in (forward, backward)]
    assert all(count % NUM_TOKENS == 0 for count in counts)
    return counts[0] // NUM_TOKENS, counts[1] // NUM_TOKENS


def mixed_again(config: Config, plan: RunPlan) -> int:
    """LIMe v1 does not keep its mix, and makes it again in the backward pass (`lime/hidden.py`): recomputation."""
    if config.depth.entry != "hidden":
        return 0
    model, num_reads = config.model, sum(len(sources) for sources in plan.chunks[0].transfer.reads.values())
    return num_reads * 2 * model.kv_heads * model.hidden_size


@pytest.mark.parametrize("overrides", MODELS, ids=" ".join)
def test_planned_flops_are_those_that_torch_counts(overrides: list[str]) -> None:
    config = make_config(overrides)
    plan, (forward, backward) = plan_run(config), count_flops(config)
    assert forward == sum(chunk.flops.total for chunk in plan.chunks)
    assert backward == 2 * forward + mixed_again(config, plan)
    assert plan.model_flops_per_token == 3 * forward


def test_recomputation_is_not_counted() -> None:
    """Else a run that computes its layers twice would seem to use its devices better."""
    config = make_config(["parallel.recompute=layer"])
    forward, backward = count_flops(config)
    recomputed = count_flops(config, recompute=True)
    assert recomputed[0] == forward and recomputed[1] > backward
    assert plan_run(config).model_flops_per_token == forward + backward


@pytest.mark.parametrize("layout", (["parallel.pp=3"], ["parallel.pp=2", "parallel.virtual_stages=3", "parallel.tp=2"]))
@pytest.mark.parametrize("policy", ("least", "relay"))
def test_a_layout_changes_no_flops(layout: list[str], policy: str) -> None:
    """A partial sum is as many operations as the read that it spares; tensor ranks share them."""
    microbatches = ["pipeline.num_microbatches=2", f"depth.policy={policy}"]
    plain, laid_out = plan_run(make_config([])), plan_run(make_config([*layout, *microbatches]))
    assert laid_out.model_flops_per_token == plain.model_flops_per_token


def test_a_step_is_all_replicas_tokens() -> None:
    plan = plan_run(make_config(["parallel.dp=2", "data.global_batch_size=6"]))
    assert plan.model_flops_per_step == 6 * 8 * plan.model_flops_per_token
