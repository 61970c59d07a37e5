"""`neural_compressor.torch.algorithms`."""
