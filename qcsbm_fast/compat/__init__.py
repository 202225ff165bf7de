"""The names and signatures of score_sde_pytorch, in the form that the authors of the paper give them, on this package.

`from qcsbm_fast.compat import losses, sampling` in place of `import losses, sampling` is all that a training script
needs. Every function takes the script's own SDE and model objects, known by what they can do, as well as ours.
"""
