"""One plan under a budget in bytes: what to save, what to compute again, what to keep gathered."""
