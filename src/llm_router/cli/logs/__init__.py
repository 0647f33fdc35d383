"""`llm-router logs`: the log files as a person wants to read them.

Current and rotated files are read together, in order of time (files.py), chosen by a small language (where.py) and shown
a line each (lines.py). Not for: writing them (observe/logs).
"""
