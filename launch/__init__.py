"""Command line, job submission and cluster manifests."""
