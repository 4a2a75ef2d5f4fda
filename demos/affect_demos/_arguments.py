"""What the commands of the demos ask of their arguments."""

import argparse

__all__ = ["count"]


def count(text: str) -> int:
    """A whole number from 1 up, for argparse."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not a number from 1 up")
    return value


count.__name__ = "whole number"  # argparse names the type where int() fails
