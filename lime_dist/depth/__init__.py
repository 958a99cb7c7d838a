"""Who reads whom across depth, and what of it must cross stage boundaries. Pure data: no torch, no ranks."""
