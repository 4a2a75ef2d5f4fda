"""What binds models, data and training."""
