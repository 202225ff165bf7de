"""The trainer: configuration, presets, run folders, checkpoints, and the loop that ties them together."""
