"""The demo pair: a task, its training text, the training itself and the evaluation."""
