"""Console, errors, files, environment and distributed processes, used by every package."""
