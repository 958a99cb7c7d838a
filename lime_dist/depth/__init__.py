"""Who reads whom across depth. Pure data: no torch, no ranks."""
