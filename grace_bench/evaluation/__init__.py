"""What a metric is, and how scores are kept up to date."""
