"""What a trained model does, by the paper's own analyses (arXiv 2502.09245v2): routers, spectra, probes, edges."""
