"""The command `doctor`: what is installed here, on which devices, and which backend a call would run on, and why.

On each GPU the Triton backend is compared with the torch backend, as it is before the first call of a training run.
"""
