"""The demo: a small pair of models that ships with the package, and the task it was made for."""
