"""The command `verify`: this installation against its own fp64 reference, on random problems, on this machine.

The reference is `csrc_ref`, plain PyTorch under autograd, fed in fp64 with the very numbers that the backend gets.
"""
