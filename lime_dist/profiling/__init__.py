"""Where a step's time goes: recorded by ranks, put on one clock, accounted for by cause, and told in several ways."""
