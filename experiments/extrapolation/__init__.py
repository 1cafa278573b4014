"""The parts of the length-extrapolation sweep: training on demand, the cells of a group, and the report."""
