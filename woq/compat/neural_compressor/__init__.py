"""neural-compressor's names on woq: write `woq.compat.neural_compressor` where a script imports `neural_compressor`.

Its packages for weight-only quantization are mirrored, as thin doors onto our own API: `transformers`, `torch.quantization`,
`torch.utils`, `evaluation.lm_eval`. Everything else of it (static quantization, FP8, MX) is not here.
"""
