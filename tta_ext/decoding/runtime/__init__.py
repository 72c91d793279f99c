"""What every way of decoding needs: models and rows, prompts, caches, when a row ends."""
