"""Triton kernels with their launchers: noise and the ops that draw it. Importing one imports triton."""
