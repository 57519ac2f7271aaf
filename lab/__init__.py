"""Experiments beyond the demo: both stores side by side, and a client without Celery."""
