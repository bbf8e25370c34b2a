"""Hydra plugins for sweeps of train.py: sweepers that continue, and launchers for several machines.

Hydra takes plugins from the namespace package `hydra_plugins` only, and imports every module in it whenever any Hydra
application starts: so torch, qat, Ray, submitit and Optuna are imported where they are used.
"""
