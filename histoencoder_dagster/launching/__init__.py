"""Starting runs: each is a process forked from one that has imported all that runs need.

What flows: the daemon takes a run off its queue and hands it to the launcher, which tells the
forker, a process that it owns; that forks the run and tells its process id. The run writes into its
tags which process it is, and belongs to nobody from then on: it ends when it is done, also if the
daemon, and with it the forker, is started anew. By the tag it is found, asked to stop, and told
dead.
"""

from histoencoder_dagster.launching.launcher import ForkingRunLauncher

__all__ = ["ForkingRunLauncher"]
