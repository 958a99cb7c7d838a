"""The synthetic tasks of the LIMe paper (arXiv 2502.09245): how examples are made, told apart and judged. Knows no model."""
