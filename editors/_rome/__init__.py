"""What the editors of ROME's family share: facts, values, second moments and the closed form."""
