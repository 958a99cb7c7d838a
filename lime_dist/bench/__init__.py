"""What things cost, measured: each benchmark prints a Markdown table and can write JSON."""
