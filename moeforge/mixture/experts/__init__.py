"""Kinds of experts by name: ours, and those that a package registers under the entry-point group `moeforge.mixtures`."""
