"""Search by reward over whole answers: AISP and its baselines, and their comparison."""
