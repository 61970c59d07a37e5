"""Leaving transformers: whole models in formats that other runtimes execute."""
