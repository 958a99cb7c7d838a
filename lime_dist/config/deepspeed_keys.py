"""The keys under `deepspeed:` as data, since importing DeepSpeed takes seconds. A test compares them with the installed one."""

from __future__ import annotations

DEEPSPEED_VERSION = "0.19"

# Keys that follow from this project's own; each with the key that sets it.
OWNED = {
    "train_batch_size": "data.global_batch_size",
    "train_micro_batch_size_per_gpu": "data.micro_batch_size",
    "gradient_accumulation_steps": "pipeline.num_microbatches",
    "managed_gradient_accumulation": "pipeline.num_microbatches",
    "gradient_clipping": "optim.max_grad_norm",
    "optimizer": "optim",
    "scheduler": "optim.lr_schedule",
    "fp16": "run.dtype",
    "bf16": "run.dtype",
    "bfloat16": "run.dtype",
    "amp": "run.dtype",
    "torch_autocast": "run.dtype",
    "data_types": "run.dtype",
    "pipeline": "pipeline",
    "tensor_parallel": "parallel.tp",
    "activation_checkpointing": "parallel.recompute",
    "tensorboard": "run.dir",
}

ZERO_OWNED = {"compute_grad_norm": "optim.max_grad_norm"}  # the same, under `zero_optimization`

PASSED_ON = frozenset((
    "aio", "autotuning", "checkpoint", "comet", "comms_logger", "communication_data_type", "compile", "csv_monitor",
    "data_efficiency", "dataloader_drop_last", "datastates_ckpt", "disable_allgather", "disable_python_gc", "dump_state",
    "expert_parallel", "flops_profiler", "gradient_allreduce_op", "gradient_predivide_factor", "hybrid_engine",
    "log_level", "memory_breakdown", "prescale_gradients", "seq_parallel_communication_data_type", "steps_per_print",
    "timers", "use_data_before_expert_parallelism", "vocabulary_size", "wall_clock_breakdown", "wandb",
    "weight_quantization", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer", "zero_optimization",
))  # fmt: skip

LOG_LEVELS = ("debug", "info", "warning", "error", "critical")

# Under `zero_optimization`, by what they take.
ZERO_BOOLEANS = frozenset((
    "contiguous_gradients", "reduce_scatter", "use_multi_rank_bucket_allreduce", "allgather_partitions", "overlap_comm",
    "compute_grad_norm", "load_from_fp32_weights", "elastic_checkpoint", "cpu_offload_param",
    "cpu_offload_use_pin_memory", "cpu_offload", "stage3_gather_16bit_weights_on_model_save",
    "stage3_use_all_reduce_for_fetch_params", "stage3_allgather_sequential",
    "stage3_gather_fp16_weights_on_model_save", "ignore_unused_parameters", "legacy_stage1", "round_robin_gradients",
    "parameter_alignment", "zero_quantized_weights", "zero_quantized_nontrainable_weights",
    "zero_quantized_gradients", "memory_efficient_linear", "pipeline_loading_checkpoint", "override_module_apply",
    "log_trace_cache_warnings", "enable_sanity_checks", "save_muon_momentum_buffer_in_memory",
))  # fmt: skip
ZERO_WHOLE_NUMBERS = frozenset((
    "reduce_bucket_size", "allgather_bucket_size", "sub_group_size", "stage3_prefetch_bucket_size",
    "stage3_param_persistence_threshold", "stage3_model_persistence_threshold", "stage3_max_live_parameters",
    "stage3_max_reuse_distance", "stage3_module_granularity_threshold", "zero_hpz_partition_size",
))  # fmt: skip
ZERO_SECTIONS = frozenset(("offload_param", "offload_optimizer", "zenflow", "leaf_module"))
ZERO = ZERO_BOOLEANS | ZERO_WHOLE_NUMBERS | ZERO_SECTIONS | {"stage"}
