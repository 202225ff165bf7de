"""Triton kernels with their launchers (none yet: every op runs its plain-torch reference on a GPU)."""
