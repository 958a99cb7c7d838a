"""What ranks do with the plan: move bundles, run the passes."""
