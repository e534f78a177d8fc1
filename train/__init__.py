"""From documents to rows, runs and comparisons."""
