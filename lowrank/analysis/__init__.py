"""How compressible and how fast a model is: spectra, the frontier of size against error, benchmarks."""
