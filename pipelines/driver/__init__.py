"""The process a person starts: drives a run or a batch, watches it, concludes it."""
