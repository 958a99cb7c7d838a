"""The layering, read from the sources: arrows point up the list only, frameworks stay where they belong."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import lime_dist

ROOT = Path(lime_dist.__file__).parent
# A name stands for the module or all of the package. What is not listed may import all of these; none of these may import it.
ORDER = (
    "errors", "formats", "layout", "lifecycle.ending", "lifecycle.stopping", "lifecycle.ownership", "cluster.nodelist", "data", "lifecycle.launcher",
    "lifecycle.network", "lifecycle.rendezvous", "lifecycle.wire", "lifecycle.local", "lifecycle.pulse", "plan.tensors", "depth", "plan.partition", "plan.schedule",
    "config", "training.spikes", "pipeline.step_times", "plan", "lime", "training.optim", "pipeline", "backends", "training.world", "training.peak_memory", "training.rank", "testing",
)  # fmt: skip
TORCH_FREE = (
    "errors", "formats", "layout", "cluster", "comparison", "config", "depth", "plan", "training.records", "training.boards", "training.run_size", "training.wandb_board", "training.spikes", "lifecycle.ending", "lifecycle.stopping",
    "lifecycle.ownership", "lifecycle.launcher", "lifecycle.network", "lifecycle.pulse", "lifecycle.heartbeat", "lifecycle.silence",
    "pipeline.step_times", "profiling.accounting", "profiling.analysis", "profiling.calibration", "profiling.critical_path", "profiling.findings", "profiling.advice",
    "profiling.kernel_events", "profiling.profile_files", "profiling.screen", "profiling.stream_events", "profiling.timeline", "profiling.trace",
    "profiling.trace_events", "hugging_face.config_json", "hugging_face.names", "hugging_face.new_folder",
    "hugging_face.tokenizer_json", "checkpoint.boxes", "checkpoint.checking", "checkpoint.chunk_files", "checkpoint.reader", "checkpoint.whole_writer", "checkpoint.upkeep",
    "analysis.routers", "analysis.sentences", "analysis.text_report", "analysis.figures", "analysis.occurrences",
)  # fmt: skip


def within(module: str, name: str) -> bool:
    return f"{module}.".startswith(f"{name}.")


def read_imports(path: Path) -> set[str]:
    """What a file imports anywhere, functions included; `from a import b` gives both a and a.b."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


NAMES = {path: ".".join(path.relative_to(ROOT).with_suffix("").parts) for path in ROOT.rglob("*.py")}
IMPORTS = {name.removesuffix(".__init__"): read_imports(path) for path, name in NAMES.items()}
ARROWS = {
    module: {other for other in IMPORTS if other != module and f"lime_dist.{other}" in imports}
    for module, imports in IMPORTS.items()
}


def rank_of(module: str) -> int:
    return next((rank for rank, name in enumerate(ORDER) if within(module, name)), len(ORDER))


def test_arrows_point_up_the_list_only() -> None:
    assert all(any(within(module, name) for module in IMPORTS) for name in ORDER)
    down = {(module, other) for module in ARROWS for other in ARROWS[module] if rank_of(other) > rank_of(module)}
    assert down == set()


def test_no_modules_import_each_other() -> None:
    list(TopologicalSorter(ARROWS).static_order())  # raises CycleError, which names them


def test_only_backends_import_megatron_and_deepspeed() -> None:
    found = {
        (module, imported)
        for module, imports in IMPORTS.items()
        for imported in imports
        if within(imported, "megatron") or within(imported, "deepspeed")
        if not within(module, "backends")
        and not (within(module, "data") and within(imported, "megatron.core.datasets"))
    }
    assert found == set()


def test_the_plan_needs_no_torch() -> None:
    planned, reached = [module for module in IMPORTS if any(within(module, name) for name in TORCH_FREE)], set()
    while planned:
        module = planned.pop()
        reached.add(module)
        planned += ARROWS[module] - reached
    assert {module for module in reached if any(within(imported, "torch") for imported in IMPORTS[module])} == set()
