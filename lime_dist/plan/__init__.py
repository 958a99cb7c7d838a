"""What a run does, decided before it starts: partition, schedule, transfer, sizes, memory, and the table and picture of them. Pure data: no torch."""
