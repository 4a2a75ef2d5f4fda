"""Float models in PyTorch: each has `initial_state`, `step` and `forward` with explicit state."""
