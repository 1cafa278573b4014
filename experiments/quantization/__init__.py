"""The parts of experiments.quantize: where model and text come from, the schemes, the cells, and the report."""
