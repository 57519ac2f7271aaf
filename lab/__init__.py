"""Experiments beyond the demo."""
