"""The command line: HistoPrep's and HistoEncoder's commands, and SQL over what they make.

Commands only read options, call the stages of the core slide by slide, and tell what happened.
"""

from histoencoder_core.cli.app import main

__all__ = ["main"]
