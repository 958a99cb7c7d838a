"""lime_dist: pretraining of LIMe (Layer-Integrated Memory) language models over tensor, pipeline and data ranks.

The method is arXiv 2502.09245. Importing this package imports no framework.
"""

__version__ = "0.1.0"
