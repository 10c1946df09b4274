"""Reports of runs and studies: one HTML page without scripts, and its pictures."""

from .terminal import show_table as show_table
from .write import write_detection as write_detection
from .write import write_heads as write_heads
from .write import write_overlaps as write_overlaps
from .write import write_report as write_report
from .write import write_steering as write_steering
from .write import write_study_report as write_study_report
