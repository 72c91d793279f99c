"""Deferral between models: a base proposes, a proxy takes over what a rule rejects."""
