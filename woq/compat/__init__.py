"""Doors for users who come from another library: what they import there, on our own API."""
