"""An example plugin for moeforge."""
