"""Deferral and searches inside foreign engines; each needs its engine installed.

:mod:`~tta_ext.engines.rows` is what they share and knows none of them.
"""
