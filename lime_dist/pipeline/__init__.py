"""The pipeline. Plan (pure data): partition, schedule, bundle. Act (needs ranks): stage, transport, executor."""
