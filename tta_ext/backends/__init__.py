"""Implementations of the operators; one file name an operator family, in each backend."""
