"""`models.utils` and `models.ema`."""
