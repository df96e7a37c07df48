"""Loss Change Allocation: which parameter, at which step, changed the loss by how much."""
