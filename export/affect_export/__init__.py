"""The workstation's side: float models, targets, recipes and the commands that make bundles."""
