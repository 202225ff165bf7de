"""Samplers: predictor-corrector (`pc`) and the probability-flow ODE (`ode`)."""
