"""Every layout gives the loss, every gradient and the weights after steps of the plain single-process model.

The words of a row are those of `common.SHORT`; a word that is missing has the default of `common.BASE`:
four layers, four heads (MHA), a vocabulary of 96 that is padded to 128 rows a tensor rank, tied embeddings,
twelve sequences of six tokens in one microbatch, one stage, ZeRO 1, 1f1b, full pattern, least traffic.
"""

from __future__ import annotations

import pytest
from common import assert_equals_the_single_process, make_config

LAYOUTS = (
    # one rank: microbatches, recompute, every ZeRO stage
    "micro=6",
    "micro=3 gpipe recompute zero=0",
    "zero=2 micro=2 recompute",
    "zero=3 micro=2",
    "zero=2 micro=3 gpipe",
    # tensor ranks
    "tp=2",
    "tp=2 sp micro=2",
    "tp=2 untied vocab=200 heads=4 kv=2",  # ranks with 128 and 72 rows of the vocabulary
    "tp=4 sp untied vocab=300 heads=8 kv=4 zero=0",  # 128, 128, 44 and 0 rows
    "tp=2 llama untied sp recompute",
    "tp=2 pattern=last:2 recompute vocab=256",  # no padding
    "tp=2 seq=5 batch=3 micro=3 sp",  # 5 tokens: the last row of the last rank is padding
    "tp=4 seq=5 batch=3 micro=3 sp pattern=stride:2",  # 5 tokens in rows of 2: the last rank has padding alone
    "tp=4 seq=7 batch=1 untied",
    # replicas
    "dp=2 zero=0 micro=2",
    "dp=2 zero=1 micro=3 pattern=first:2",
    "dp=2 zero=2 micro=2",
    "dp=2 zero=3 micro=3 untied heads=4 kv=2",
    "dp=2 zero=3 llama recompute",
    "dp=2 tp=2 zero=2 sp micro=2",
    "dp=2 tp=2 zero=3 sp seq=5 batch=6 micro=3",
    "dp=2 tp=2 zero=0 untied pattern=last:2",
    "dp=2 tp=4 zero=1 sp recompute heads=8 kv=4",
    # two stages
    "pp=2 micro=1",
    "pp=2 micro=4 gpipe untied zero=0 relay",
    "pp=2 micro=2 recompute pattern=first:2",
    "pp=2 split=[1,3] micro=3",  # the first stage has no router of its own
    "pp=2 split=[3,1] micro=3 llama",
    "pp=2 split=[3,1] micro=3 recompute",  # one partial sum against three entries
    "pp=2 layers=2 micro=2 zero=0 heads=4 kv=2",  # a layer a stage
    "pp=2 tp=2 sp micro=3 seq=5 batch=3 layers=6 split=[4,2]",
    "pp=2 tp=2 micro=2 seq=5 batch=2 zero=0 relay",
    "pp=2 tp=4 sp untied heads=8 kv=4 vocab=300 micro=2",
    "pp=2 tp=4 micro=3 seq=5 batch=3 pattern=stride:2 recompute",
    "pp=2 dp=2 micro=3 pattern=stride:2 relay",
    "pp=2 dp=2 micro=2 split=[1,3] zero=0 unclipped",
    "pp=2 tp=2 dp=2 sp micro=3 recompute split=[3,1]",
    "pp=2 tp=2 dp=2 micro=2 split=[1,3] gpipe untied zero=0 relay",
    # three stages: the middle one has neither embedding nor head
    "pp=3 layers=5 micro=4",
    "pp=3 layers=5 micro=4 relay",
    "pp=3 layers=5 split=[1,3,1] micro=6 pattern=first:2 untied",
    "pp=3 layers=6 split=[3,1,2] micro=3 gpipe recompute heads=4 kv=2",
    "pp=3 layers=5 micro=2 llama zero=0",
    "pp=3 layers=5 micro=1 pattern=last:2 gpipe",
    "pp=3 tp=2 sp layers=6 split=[3,2,1] micro=6 recompute",
    "pp=3 tp=2 layers=6 micro=4 pattern=last:2 seq=5 batch=4 heads=4 kv=2",
    "pp=3 dp=2 layers=6 micro=3 zero=0 untied pattern=stride:2",
    "pp=3 dp=2 layers=5 size=2",  # three microbatches, as their size says
    "pp=3 layers=8 split=[3,3,2] micro=2 pattern=block:3+first:1 tp=2 recompute",
    "pp=2 layers=6 split=[2,4] micro=3 pattern=block:2 relay heads=4 kv=2",
    # small messages together
    "pp=3 layers=9 micro=4 packed",
    "pp=3 layers=7 split=[3,2,2] micro=3 packed recompute pattern=first:2 relay",
    "v=2 pp=3 layers=12 micro=3 packed",
    "hidden v=2 pp=2 layers=8 micro=2 packed tp=2",
    # four stages
    "pp=4 micro=6",
    "pp=4 layers=8 micro=4 cost=[1,5,1]",
    "pp=4 layers=8 micro=3 relay pattern=stride:3 recompute",
    "pp=4 micro=4 gpipe pattern=first:2 zero=0",
    "pp=4 layers=7 split=[1,3,2,1] micro=2 pattern=last:3",
    "pp=4 layers=6 micro=3 pattern=stride:3 untied recompute",
    "pp=4 layers=8 micro=4 pattern=within_stage+first:1 recompute",
    "pp=4 layers=8 micro=2 pattern=first:1+last:2 untied",
    "pp=2 tp=2 layers=5 micro=2 pattern=within_stage",  # nothing but the residual crosses
    "pp=4 tp=2 sp layers=5 split=[2,1,1,1] micro=4 seq=5 batch=4 recompute",
    "pp=4 tp=2 layers=6 micro=6 heads=4 kv=2 untied zero=0 vocab=256",
    "pp=4 dp=2 layers=6 split=[1,1,3,1] micro=3 gpipe pattern=first:2",
    "pp=4 dp=2 micro=2 llama",
    # hidden states as entries (LIMe v1)
    "hidden tp=2 sp micro=2 heads=4 kv=2",
    "hidden pp=3 layers=5 micro=4 untied",
    "hidden pp=2 tp=2 micro=3 seq=5 batch=3 recompute pattern=first:2",
    "hidden dynamic pp=3 tp=2 layers=5 micro=3 sp",
    "hidden dynamic pp=2 dp=2 micro=2 zero=0 pattern=last:2 recompute",
    # virtual stages: entries are kept, and cross to no stage twice
    "v=2 pp=2 micro=4",
    "v=2 pp=2 micro=3 relay untied zero=0",
    "v=2 pp=2 tp=2 sp micro=2 layers=7 split=[1,3,1,2] recompute",
    "v=2 pp=2 dp=2 micro=2 layers=5 pattern=first:2",
    "v=2 pp=2 tp=2 dp=2 layers=6 micro=2 pattern=stride:2 zero=0",
    "v=2 pp=2 llama micro=4",
    "v=2 pp=2 gpipe layers=6 micro=3 split=[2,1,2,1]",
    "v=2 pp=3 layers=8 micro=6",
    "v=2 pp=3 layers=6 micro=3 relay recompute heads=4 kv=2",
    "v=2 pp=3 layers=8 micro=3 pattern=last:3 untied",
    "v=2 pp=3 tp=2 layers=7 micro=3 seq=5 batch=3 pattern=first:1+last:2",
    "v=2 pp=3 layers=8 split=[2,1,1,1,1,2] micro=6 pattern=within_stage+first:1",
    "v=2 pp=4 layers=8 micro=4 cost=[1,5,1,2]",
    "v=2 pp=4 layers=9 micro=4 pattern=stride:3 zero=0",
    "v=2 pp=4 dp=2 layers=8 micro=2",
    "v=3 pp=2 layers=7 micro=4 split=[1,2,1,1,1,1]",
    "v=3 pp=2 tp=2 layers=6 micro=2 heads=4 kv=2 pattern=last:2",
    "v=3 pp=3 layers=9 micro=3 gpipe pattern=stride:2",
    "v=3 pp=4 layers=12 micro=4 untied recompute",
    "v=4 pp=2 layers=8 micro=4 tp=2 sp",
    "v=4 pp=2 layers=16 micro=2 pattern=block:2",
    "v=4 pp=3 layers=12 micro=6 relay pattern=first:2",
    "v=4 pp=4 layers=16 micro=4",
    "hidden v=2 pp=2 tp=2 micro=2 layers=5 recompute",
    "hidden v=2 pp=3 layers=7 micro=3 pattern=last:3",
    "hidden dynamic v=2 pp=2 dp=2 layers=6 micro=2 zero=0",
    "hidden dynamic v=3 pp=2 tp=2 layers=6 micro=2 sp untied",
    "hidden v=4 pp=2 layers=8 micro=4 relay gpipe",
    # eager warm-up
    "pp=3 layers=5 micro=6 warmup=5",
    "pp=4 layers=8 micro=6 warmup=5 tp=2 recompute",
    "pp=4 micro=6 warmup=auto dp=2 zero=0 relay",
    "hidden pp=3 layers=6 micro=4 warmup=auto",
    "v=2 pp=2 micro=6 warmup=6",
)


@pytest.mark.parametrize("text", LAYOUTS)
def test_layout_equals_the_single_process(text: str) -> None:
    assert_equals_the_single_process(make_config(text))
