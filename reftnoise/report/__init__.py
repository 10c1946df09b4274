"""Reports of runs and studies: one HTML page without scripts, and its pictures."""

from .write import write_report as write_report
