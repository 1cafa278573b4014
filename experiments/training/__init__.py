"""The parts of experiments.train."""
