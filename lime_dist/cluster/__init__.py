"""What a cluster is and says: its scheduler's words. No torch."""
