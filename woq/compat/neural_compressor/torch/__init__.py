"""`neural_compressor.torch`."""
