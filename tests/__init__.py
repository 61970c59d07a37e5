"""Tests mirror the package; shared fixtures are in conftest.py."""
