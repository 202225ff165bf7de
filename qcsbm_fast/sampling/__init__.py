"""Samplers for a score and its process, or for a field alone (`mcmc`).

`pc`: predictor-corrector; `ode`: the probability-flow ODE; `annealed`: annealed Langevin dynamics; `mcmc`:
Langevin chains at one noise level; `conditional`: inpainting and colorisation; `noise`: samples that do not
depend on the batch.
"""
