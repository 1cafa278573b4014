"""Evaluation: how well a model predicts text, by length and by position."""
