"""What every room needs and torch does not: errors, files, YAML, options, progress."""
