"""Demonstrations of Affect Edge. They use its public names only, as any customer's program would."""
