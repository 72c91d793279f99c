"""Deferral and searches inside foreign engines; each needs its engine installed."""
