"""`neural_compressor.evaluation`."""
