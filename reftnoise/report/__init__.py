"""Reports of runs and studies: one HTML page without scripts, and its pictures."""
