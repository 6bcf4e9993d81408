"""What editors share whose updates of weights are computed by networks, trained before the first edit."""
